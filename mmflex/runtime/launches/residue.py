"""`ResidueLaunch`: queries and keys sorted by residue, merged with the rest by log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...compiler.launches import ResidueLaunch
from ...compiler.orders import NEVER, TokenOrder
from .. import masks
from ..classify import Extremes
from ..kernels.rows import take_rows
from ..merge import merge_attention
from ..state import PlanState, PreparedLaunch, take_heads
from .base import BlockLister, Execution, repeat_for_empty_heads, slot_positions


@dataclass(eq=False)
class _Sorted:
    """One side in residue-major order, [B, H, S]: the query or key in each slot, its position, and whether it is real.
    Empty slots come last and repeat the last one, so that they spoil no block's bounds."""

    index: Tensor
    position: Tensor
    real: Tensor

    def heads(self, pick: Tensor) -> _Sorted:
        return _Sorted(*(t.index_select(1, pick) for t in (self.index, self.position, self.real)))


class ResidueExecution(Execution[ResidueLaunch]):
    def gather(self, state: PlanState, launch: ResidueLaunch) -> tuple[_Sorted, _Sorted]:
        (part,) = launch.parts
        assert part.residues is not None
        row, key = slot_positions(state, launch)
        values, heads = state.part_values(launch, part), len(part.heads)
        rows = _sorted(state, values.of(part.residues[0])[..., 0], row, launch.rows, heads)
        keys = _sorted(state, values.of(part.residues[1])[:, :, 0], key, launch.keys, heads)
        rows.position = torch.where(rows.real, rows.position, -1).int()
        keys.position = torch.where(keys.real, keys.position, NEVER).int()
        return rows, keys

    def list(self, state: PlanState, launch: ResidueLaunch, gathered: tuple[_Sorted, _Sorted]) -> PreparedLaunch:
        (part,), (rows, keys) = launch.parts, gathered
        lister, heads = BlockLister(state, launch), launch.heads
        values = state.part_values(launch, part, rows.index, keys.index)
        ends = Extremes.of(rows.position, keys.position, state.program.tile)
        lister.add(tuple(heads.slot_of[h] for h in part.heads), part.mask, values, ends)
        if part.heads != heads.heads:  # empty heads repeat the first one's rows
            pick = state.index(tuple(part.heads.index(h) if h >= 0 else 0 for h in heads.heads))
            rows, keys = rows.heads(pick), keys.heads(pick)
            values = state.part_values(launch, part, rows.index, keys.index)
            repeat_for_empty_heads(values, part.heads, launch, state)
        slots = (launch.keys.slots, launch.keys.slots, state.batch, len(heads.heads))
        mask_mod = masks.looked_up(rows.position, keys.position, part.mask, values, *slots)
        count = rows.real.sum(-1)
        return PreparedLaunch(lister.done(), mask_mod, row_index=rows.index, row_count=count, key_index=keys.index)

    def keys(
        self, state: PlanState, launch: ResidueLaunch, prepared: PreparedLaunch, k: Tensor, v: Tensor, any_length: bool
    ) -> tuple[Tensor, Tensor]:
        """Every query head sorts the keys of its KV head for itself."""
        assert prepared.key_index is not None
        kv = state.index(tuple(max(h, 0) * k.shape[1] // state.program.heads for h in launch.heads.heads))
        k, v = (take_rows(t, prepared.key_index, heads_at=kv) for t in (k, v))
        return k, v

    def merge(
        self,
        state: PlanState,
        launch: ResidueLaunch,
        prepared: PreparedLaunch | None,
        out: Tensor,
        lse: Tensor | None,
        result: Tensor,
        sums: Tensor | None,
    ) -> None:
        assert prepared is not None
        assert prepared.row_index is not None
        assert prepared.row_count is not None
        assert lse is not None
        assert sums is not None
        real = tuple(i for i, h in enumerate(launch.heads.heads) if h >= 0)
        index, count, result, sums = (
            take_heads(t, real, state.device) for t in (prepared.row_index, prepared.row_count, result, sums)
        )
        slot = torch.arange(index.shape[-1], device=state.device).expand(index.shape)
        queries = out.shape[2]
        slot_of = torch.full((*index.shape[:2], queries + 1), -1, dtype=torch.int64, device=state.device)
        slot_of.scatter_(2, torch.where(slot < count[..., None], index, queries), slot)
        slot_of = slot_of[..., :-1]
        other_lse = torch.where(slot_of >= 0, sums.gather(2, slot_of.clamp(min=0)), float("-inf"))
        wide = slot_of.clamp(min=0)[..., None].expand(-1, -1, -1, result.shape[-1])
        heads = state.index(launch.heads.real)
        merged, total = merge_attention(
            out.index_select(1, heads), lse.index_select(1, heads), result.gather(2, wide), other_lse
        )
        out.index_copy_(1, heads, merged)
        lse.index_copy_(1, heads, total)


def _sorted(state: PlanState, residue: Tensor, position: Tensor, side: TokenOrder, heads: int) -> _Sorted:
    """The slots of one side by (residue [B, H, S], position [B, S])."""
    real = (side.on("index", state.device) >= 0)[:, None].expand(state.batch, heads, -1)
    key = residue.expand(real.shape).long() * (NEVER << 1) + position[:, None]
    slot = torch.where(real, key, torch.iinfo(torch.int64).max).argsort(-1)
    last = real.sum(-1, keepdim=True) - 1
    number = torch.arange(slot.shape[-1], device=state.device).expand(slot.shape)
    slot = slot.gather(-1, number.minimum(last.clamp(min=0)))
    index = side.on("filled", state.device).expand(state.batch, -1)[:, None].expand(real.shape).gather(-1, slot)
    return _Sorted(index, position[:, None].expand(real.shape).gather(-1, slot), number <= last)
