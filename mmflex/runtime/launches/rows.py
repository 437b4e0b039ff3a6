"""`GatheredRows`: the few queries that see every key before them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor

from ...compiler.launches import GatheredRows
from .. import masks
from ..classify import Extremes
from ..kernels.select import gathered as gather_indices
from ..state import PlanState, PreparedLaunch
from .base import BlockLister, Execution, slot_positions


@dataclass(eq=False)
class _Gathered:
    """The gathered queries of a launch.

    Attributes:
        index: int64 [B, H, capacity], the query in each slot. count: int64 [B, H], how many are real.
        position: int32 [B, H, capacity], -1 for an empty slot.
    """

    index: Tensor
    count: Tensor
    position: Tensor
    lister: BlockLister


class RowsExecution(Execution[GatheredRows]):
    def gather(self, state: PlanState, launch: GatheredRows) -> _Gathered:
        row, _ = slot_positions(state, launch)
        heads, batch, device = launch.heads.heads, state.batch, state.device
        lister = BlockLister(state, launch)
        slots = []
        for part in launch.parts:
            chosen = (
                state.part_values(launch, part).of(part.gathered_queries)[..., 0].expand(batch, len(part.heads), -1)
            )
            if not launch.rows.identity:  # some slots are empty
                chosen = chosen & (launch.rows.on("index", device) >= 0)[:, None]
            slots.append(gather_indices(chosen, launch.capacity, lister.fits))
        if launch.parts[0].heads == heads:
            ((slot, count),) = slots
        else:
            slot = torch.zeros((batch, len(heads), launch.capacity), dtype=torch.int64, device=device)
            count = torch.zeros((batch, len(heads)), dtype=torch.int64, device=device)
            for part, (own, many) in zip(launch.parts, slots, strict=True):
                index = state.index(tuple(launch.heads.slot_of[h] for h in part.heads))
                slot[:, index], count[:, index] = own, many
        filled = torch.arange(launch.capacity, device=device) < count[..., None]
        position = row[:, None].expand(-1, len(heads), -1).gather(-1, slot)
        position = torch.where(filled, position, -1).int()
        query = slot
        if not launch.rows.identity:
            token = launch.rows.on("filled", device).expand(batch, -1)
            query = token[:, None].expand(-1, len(heads), -1).gather(-1, slot)
        return _Gathered(query, count, position, lister)

    def list(self, state: PlanState, launch: GatheredRows, gathered: _Gathered) -> PreparedLaunch:
        heads, tiled = len(launch.heads.heads), gathered.position.unflatten(-1, (-1, state.program.tile))
        ends = replace(_extremes(state, launch), row_low=tiled.amin(-1), row_high=tiled.amax(-1))
        gathered.lister.add(tuple(range(heads)), sympy.true, None, ends)
        limit = None  # a key's limit is the number of its slot
        if not launch.keys.slots_are_positions(state.program.layout):
            _, key = slot_positions(state, launch)
            limit = key[:, None].expand(-1, heads, -1).contiguous()
        mask_mod = masks.comparison(gathered.position, limit)
        return PreparedLaunch(gathered.lister.done(), mask_mod, row_index=gathered.index, row_count=gathered.count)

    def merge(
        self,
        state: PlanState,
        launch: GatheredRows,
        prepared: PreparedLaunch | None,
        out: Tensor,
        lse: Tensor | None,
        result: Tensor,
        sums: Tensor | None,
    ) -> None:
        assert prepared is not None
        assert prepared.row_index is not None
        assert prepared.row_count is not None
        self.scatter(state, launch, prepared.row_index, prepared.row_count, out, lse, result, sums)


def _extremes(state: PlanState, launch: GatheredRows) -> Extremes:
    """Of the natural rows; those of the gathered ones replace them. Kept with the program."""
    heads = len(launch.heads.heads)

    def build() -> Extremes:
        row, key = slot_positions(state, launch)
        return Extremes.of(row[:, None], key[:, None].expand(-1, heads, -1), state.program.tile)

    return state.program.once(("extremes", launch.rows, launch.keys, "rows", heads, state.batch, state.device), build)
