"""What launches of every kind have in common: building block lists, positions and limits of slots, and how k, v and q
get into slots and rows into the output."""

from __future__ import annotations

import math
from typing import Any, Generic, TypeVar

import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ...compiler.launches import BlockLaunch, Launch
from ...compiler.orders import NEVER
from ...ir import expr as x
from ..backends import BlockLists
from ..classify import Extremes, Values, block_test, everything, slot_attribute
from ..kernels.lists import list_blocks, writes_triton
from ..kernels.rows import fill_slots, put_rows, take_rows
from ..state import PlanState, PreparedLaunch, take_heads

OVERFLOW = (
    "more key blocks of a query block, gathered keys or gathered rows than the spec's budget allows: a pattern "
    "selected more than it declared (at_most)"
)


class BlockLister:
    """Builds the block lists of a launch.

    Attributes:
        fits: int32 [1], becomes 0 where a static bound is exceeded.
    """

    def __init__(self, state: PlanState, launch: Launch) -> None:
        self.state, self.launch, self.tile = state, launch, state.program.tile
        shape = (2, state.batch, len(launch.heads.heads), launch.row_slots // self.tile)
        both = torch.zeros(math.prod(shape) * (launch.width + 1), dtype=torch.int32, device=state.device)
        self.counts, table = both[: math.prod(shape)].view(shape), both[math.prod(shape) :]
        self.table = table.view(*shape, launch.width)
        self.fits = torch.ones(1, dtype=torch.int32, device=state.device)

    def add(self, slots: tuple[int, ...], mask: Boolean, values: Values | None, ends: Extremes) -> None:
        """Lists the blocks of some heads, by number in the launch; values None: all pairs."""
        triton = writes_triton(ends.low)
        test = everything(triton) if values is None else block_test(mask, values, triton)
        first = (0,) * len(slots)  # tiles from the end of the main section to the head's own gathered section
        if isinstance(self.launch, BlockLaunch):
            section_slot, heads = self.launch.section_slot, self.launch.heads.heads
            first = tuple(section_slot.get(heads[i], 0) * (self.launch.section // self.tile) for i in slots)
        index = (self.state.index(numbers, torch.int32) for numbers in (slots, first))
        list_blocks(test, ends, self.table, self.counts, self.fits, *index)

    def done(self) -> BlockLists:
        """The lists. An error where a bound was exceeded (on CUDA asynchronously), never a dropped block."""
        torch._assert_async(self.fits, OVERFLOW)
        return BlockLists(self.counts[0], self.table[0], self.counts[1], self.table[1])


def slot_positions(state: PlanState, launch: Launch) -> tuple[Tensor, Tensor]:
    """(of queries [B, Q], of keys in the main section [B, S]) int32: positions in slot order, -1 for no query and
    `NEVER` for no key. Kept with the program."""
    rows, keys, layout, device = launch.rows, launch.keys, state.program.layout, state.device

    def build() -> tuple[Tensor, Tensor]:
        row = slot_attribute(x.q, layout, rows, None, device)[:, 0]
        # Empty slots repeat a neighbour, which keeps tile bounds tight; a tile of empty slots alone lists nothing.
        real = (rows.on("index", device) >= 0).unflatten(-1, (-1, rows.tile)).any(-1)
        row = torch.where(real.repeat_interleave(rows.tile, -1), row, -1)
        key = slot_attribute(x.k, layout, keys, None, device)[:, 0]
        key = torch.where(keys.on("index", device) >= 0, key, NEVER).int()
        return row.contiguous(), key.contiguous()

    row, key = state.program.once(("positions", rows, keys, device), build)
    return row.expand(state.batch, -1), key.expand(state.batch, -1)


def repeat_for_empty_heads(values: Values, heads: tuple[int, ...], launch: Launch, state: PlanState) -> None:
    """Gives the values of a part's heads to all heads of its launch; empty ones repeat the first one's."""
    if heads != launch.heads.heads:
        pick = state.index(tuple(heads.index(h) if h >= 0 else 0 for h in launch.heads.heads))
        values.selections = {name: table.index_select(1, pick) for name, table in values.selections.items()}
        values.memo = {}


L = TypeVar("L", bound=Launch)


class Execution(Generic[L]):
    """How launches of one kind are planned, fed and put into the output. Subclasses override what differs."""

    def gather(self, state: PlanState, launch: L) -> Any:
        """What it gathers, and where its slots stand: whatever `list` takes."""
        raise NotImplementedError

    def list(self, state: PlanState, launch: L, gathered: Any) -> PreparedLaunch:
        """Its block lists and mask_mod."""
        raise NotImplementedError

    def keys(
        self, state: PlanState, launch: L, prepared: PreparedLaunch, k: Tensor, v: Tensor, any_length: bool
    ) -> tuple[Tensor, Tensor]:
        """k and v [B, Hkv, N, D] in the key slots of the launch: main section, then gathered sections; themselves where
        nothing moves. ``any_length``: they need not fill all slots."""
        heads, layout, device = launch.heads.kv_heads, state.program.layout, state.device
        main, table = launch.keys.slots, prepared.section_table
        if table is None and launch.keys.stays(any_length):
            return take_heads(k, heads, device), take_heads(v, heads, device)
        out_k, out_v = (t.new_empty((t.shape[0], len(heads), launch.key_slots, t.shape[3])) for t in (k, v))
        first = 0
        if not launch.keys.slots_are_positions(layout):
            index = launch.keys.on("index", device)[:, None].expand(state.batch, len(heads), -1)
            for t, out in ((k, out_k), (v, out_v)):
                take_rows(t, index, out[:, :, :main], state.index(heads))
            first = main
        if table is not None:
            table = table.unflatten(1, (len(heads), -1)).flatten(2)
        if first < launch.key_slots:
            fill_slots(k, v, out_k, out_v, state.index(heads), main, table, first)
        return out_k, out_v

    def queries(self, state: PlanState, launch: L, prepared: PreparedLaunch, q: Tensor, any_length: bool) -> Tensor:
        """q [B, H, M, D] in the query slots of the launch."""
        heads, index = launch.heads.heads, prepared.row_index
        if index is None:
            if launch.rows.stays(any_length):
                return take_heads(q, heads, state.device)
            index = launch.rows.on("index", state.device)[:, None].expand(state.batch, len(heads), -1)
        return take_rows(q, index, heads_at=state.index(tuple(max(h, 0) for h in heads)))

    def attend(
        self,
        state: PlanState,
        launch: L,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        """Of a launch that lists no blocks: its heads [B, H, M, D], and float32 [B, H, M] if log-sum-exp is asked
        for."""
        raise NotImplementedError

    def covers(self, state: PlanState, launch: L, slots: int, queries: int) -> bool:
        """Whether its result, of so many slots, is the output as it stands."""
        return False

    def merge(
        self,
        state: PlanState,
        launch: L,
        prepared: PreparedLaunch | None,
        out: Tensor,
        lse: Tensor | None,
        result: Tensor,
        sums: Tensor | None,
    ) -> None:
        """Puts its rows, ``result`` [B, H, Q, D] and ``sums`` [B, H, Q], into out [B, Hq, M, D] and lse [B, Hq, M]."""
        raise NotImplementedError

    def scatter(
        self,
        state: PlanState,
        launch: L,
        index: Tensor,
        count: Tensor,
        out: Tensor,
        lse: Tensor | None,
        result: Tensor,
        sums: Tensor | None,
    ) -> None:
        """Writes slots over the rows of the output that they hold: ``index`` int64 [B, H, S], the first ``count`` [B,
        H] of them."""
        heads = state.index(launch.heads.heads)
        put_rows(result, index, count, heads, out)
        if lse is not None and sums is not None:
            put_rows(sums[..., None], index, count, heads, lse[..., None])
