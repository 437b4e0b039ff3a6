"""`BlockLaunch`: query tiles against listed key tiles, gathered keys in sections of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor

from ...compiler.launches import BlockLaunch, Part
from ...compiler.orders import NEVER
from .. import masks
from ..classify import Extremes
from ..kernels.sections import fill_sections
from ..state import PlanState, PreparedLaunch
from .base import BlockLister, Execution, repeat_for_empty_heads, slot_positions


@dataclass(eq=False)
class _Gathered:
    """Positions of the queries, limits of the key slots and their extremes per part.

    Attributes:
        row: int32 [B, Q]. base: the position of query slot 0, where slots run with positions (both then count from it).
        limit: int32 [B, H, key slots]; None where a key's limit is the number of its slot.
        table: see `PreparedLaunch.section_table`.
    """

    row: Tensor
    base: int | None
    limit: Tensor | None
    table: Tensor | None
    ends: list[Extremes]
    lister: BlockLister


class BlockExecution(Execution[BlockLaunch]):
    def gather(self, state: PlanState, launch: BlockLaunch) -> _Gathered:
        heads, batch, main = launch.heads.heads, state.batch, launch.keys.slots
        row, key, base = _counted_from_first_slot(state, launch)
        limit = table = None
        # Else a key's limit is the number of its slot.
        if base != 0 or launch.section or not launch.keys.slots_are_positions(state.program.layout):
            limit = torch.empty((batch, len(heads), launch.key_slots), dtype=torch.int32, device=state.device)
            limit[..., main if all(h >= 0 for h in heads) else 0 :] = NEVER
        if launch.section:
            shape = (batch, len(launch.heads.kv_heads) * launch.sections, launch.section)
            table = torch.full(shape, -1, dtype=torch.int64, device=state.device)
        gathered = _Gathered(row, base, limit, table, [], BlockLister(state, launch))
        for part in launch.parts:
            ends = _extremes(state, launch, len(part.heads))
            if part.gathered_keys != sympy.false:
                ends = self._gather_keys(state, launch, part, key, gathered, ends)
            elif limit is not None:
                limit[:, state.index(tuple(launch.heads.slot_of[h] for h in part.heads)), :main] = key[:, None]
            gathered.ends.append(ends)
        return gathered

    def _gather_keys(
        self, state: PlanState, launch: BlockLaunch, part: Part, key: Tensor, gathered: _Gathered, ends: Extremes
    ) -> Extremes:
        """Puts the gathered keys of a part's heads into their sections."""
        assert gathered.limit is not None
        assert gathered.table is not None
        end, usable = _end_of_visibility(state, launch, part)
        chosen = state.part_values(launch, part).of(part.gathered_keys)[:, :, 0]
        chosen = chosen if usable is None else chosen & usable[:, None]
        slots = tuple(launch.heads.slot_of[h] for h in part.heads)
        sections = tuple(launch.table_slot[h] for h in part.heads)
        low, high, gathered_low, gathered_high = fill_sections(
            chosen.expand(state.batch, len(part.heads), -1),
            key,
            end,
            None if launch.keys.identity else launch.keys.on("filled", state.device).expand(state.batch, -1),
            state.index(slots, torch.int32),
            state.index(sections, torch.int32),
            gathered.limit,
            gathered.table,
            state.program.tile,
            gathered.lister.fits,
        )
        return replace(ends, low=low, high=high, gathered_low=gathered_low, gathered_high=gathered_high)

    def list(self, state: PlanState, launch: BlockLaunch, gathered: _Gathered) -> PreparedLaunch:
        lister, row, limit = gathered.lister, gathered.row, gathered.limit
        for part, ends in zip(launch.parts, gathered.ends, strict=True):
            values = state.part_values(launch, part)
            lister.add(tuple(launch.heads.slot_of[h] for h in part.heads), part.mask, values, ends)
        if launch.tile_constant:
            mask_mod = masks.comparison(row.contiguous() if gathered.base is None else None, limit)
        else:
            (part,) = launch.parts
            repeat_for_empty_heads(values, part.heads, launch, state)
            assert limit is not None
            slots = (launch.keys.slots, launch.key_slots, state.batch, len(launch.heads.heads))
            mask_mod = masks.looked_up(row.contiguous(), limit, part.mask, values, *slots)
        return PreparedLaunch(lister.done(), mask_mod, section_table=gathered.table)

    def covers(self, state: PlanState, launch: BlockLaunch, slots: int, queries: int) -> bool:
        return launch.rows.stays(slots == queries) and launch.heads.in_place(state.program.heads)

    def merge(
        self,
        state: PlanState,
        launch: BlockLaunch,
        prepared: PreparedLaunch | None,
        out: Tensor,
        lse: Tensor | None,
        result: Tensor,
        sums: Tensor | None,
    ) -> None:
        rows, heads = result.shape[2], len(launch.heads.heads)  # all slots, or queries as given
        index = launch.rows.on("index", state.device)[:, None, :rows].expand(state.batch, heads, -1)
        count = torch.full((state.batch, heads), rows, device=state.device)
        self.scatter(state, launch, index, count, out, lse, result, sums)


def _counted_from_first_slot(state: PlanState, launch: BlockLaunch) -> tuple[Tensor, Tensor, int | None]:
    """`slot_positions`, counted from the first query slot where slots run with positions: the mask then compares the
    slot itself. The third is the position subtracted, None where slots do not."""
    program = state.program
    row, key = slot_positions(state, launch)
    runs = launch.rows.natural and program.queries.consecutive and not program.layout.padded
    if not (runs and launch.tile_constant):
        return row, key, None
    base = program.queries.first // program.tile * program.tile

    def build() -> tuple[Tensor, Tensor]:
        # Natural queries without padding are the same for all prompts. Keys are not: their order may go by modality.
        return row[:1] - base, key[: program.layout.batch_size] - base

    row, key = program.once(("from first slot", launch.rows, launch.keys, state.device), build)
    return row.expand(state.batch, -1), key.expand(state.batch, -1), base


def _extremes(state: PlanState, launch: BlockLaunch, heads: int) -> Extremes:
    """Extremes of the positions of a launch's tiles, before anything is gathered. Kept with the program."""

    def build() -> Extremes:
        row, key, _ = _counted_from_first_slot(state, launch)
        return Extremes.of(row[:, None], key[:, None].expand(-1, heads, -1), state.program.tile)

    key = ("extremes", launch.rows, launch.keys, launch.tile_constant, heads, state.batch, state.device)
    return state.program.once(key, build)


def _end_of_visibility(state: PlanState, launch: BlockLaunch, part: Part) -> tuple[Tensor | None, Tensor | None]:
    """`Part.visible_until` on the device, and which keys may be gathered, bool [B, S] (None: all): those that are
    there, less those that the mask shows to the end. Kept with the program."""

    def build() -> tuple[Tensor | None, Tensor | None]:
        _, key, base = _counted_from_first_slot(state, launch)
        real = key < NEVER // 2
        if part.visible_until is None:
            return None, None if (launch.keys.index >= 0).all() else real
        until = torch.tensor(part.visible_until, device=state.device).expand(state.batch, -1)
        return (until - (base or 0)).int().contiguous(), real & (until < NEVER)

    return state.program.once(("end of visibility", part, launch.tile_constant, state.batch, state.device), build)
