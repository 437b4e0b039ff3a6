"""XAttention: blocks by the sums of their antidiagonals (arXiv 2503.16428)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts
from mmflex.ir.shown import shown
from mmflex.runtime.device import array_constant
from mmflex.runtime.kernels.runs import fused, run_mass

from .block_mass import BlockMass, arranged, finite_rows
from .near import NEAR, NearBlocks, with_room
from .shares import SHARES, Shortlist, check_share, fewest

_SCORES = 1 << 27
"""Numbers held at a time, scores or sums of them: bounds the memory of the estimate at any length."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of queries and of keys as vectors, whose products are scores.

    Attributes:
        q: [B, H, M, D], all queries. index: int [B, 1|H, runs of queries x tokens of one], the queries of a vector.
        key: [B, Hkv, runs of keys, tokens of one x D]. reach: int [B, 1|H, runs of queries], the last run of keys that
            it sees.
        per: runs of queries and of keys in a block.
    """

    q: Tensor
    index: Tensor
    key: Tensor
    reach: Tensor
    per: tuple[int, int]
    scale: float

    @property
    def held(self) -> int:
        """Numbers that one row of blocks takes, for one head and prompt."""
        return self.per[0] * self.key.shape[2] // (self.per[1] if fused(self.key, *self.per) else 1)

    def mass(self, part: slice, blocks: int, peak: bool = False) -> Tensor:
        """`run_mass` of some rows of blocks over the first ``blocks`` blocks of keys."""
        batch, heads, _, dim = self.q.shape
        width = self.key.shape[3]
        rows = slice(part.start * self.per[0], part.stop * self.per[0])
        taken = self.index[..., rows.start * (width // dim) : rows.stop * (width // dim)]
        query = finite_rows(self.q, taken.expand(-1, heads, -1)).view(batch, heads, -1, width)
        key = self.key[:, :, : blocks * self.per[1]]
        return run_mass(query, key, self.reach[..., rows], self.per, self.scale, peak)


@dataclass(frozen=True)
class Antidiagonals:
    """Estimator: attention mass of blocks by their antidiagonals (XAttention, algorithm 1), for every query block the
    ``blocks`` heaviest, of which the first and those of the ``near`` nearest keys always come first.

    ``stride`` queries in a row, reversed, are joined to one vector of ``stride x D``, as many keys to another: their
    product is the sum of an antidiagonal. Scores are those products over ``stride`` (a mean), under a softmax over all
    runs of keys up to the run of queries; a block has the sum of its entries. That is a stride-th of the work of
    attention's scores, in float32, some rows of blocks at a time (`mmflex.runtime.kernels.runs`).
    """

    stride: int
    block_size: int
    blocks: int
    near: int = NEAR
    matrices: ClassVar[bool] = True

    def scored(self, view: View) -> float:
        """Query-key products for one head and prompt: a stride-th of those of dense attention."""
        return view.rows * view.size / 2 / self.stride

    def query_block(self, view: View) -> int:
        """Queries of a block, all of which are needed to score it."""
        stride = view.block_size(self.stride)
        return -(-view.block_size(self.block_size) // stride) * stride

    def runs(self, q: Tensor, k: Tensor, view: View, scale: float) -> tuple[Runs, ...]:
        """What is multiplied, of q in whole blocks of the view: here ``stride`` queries and keys, the keys reversed."""
        batch, stride, size = q.shape[0], view.block_size(self.stride), self.query_block(view)
        cells = arranged(view, stride, size)
        index, reach, order = (
            array_constant(a, q.device).expand(batch, -1) for a in (cells.queries, cells.reach, cells.keys)
        )
        key = finite_rows(k, order[:, None].expand(-1, k.shape[1], -1)).view(batch, k.shape[1], -1, stride * k.shape[3])
        return (Runs(q, index[:, None], key, reach[:, None], (size // stride, size // stride), scale / stride),)

    def mass(self, runs: tuple[Runs, ...], part: slice, blocks: int) -> Tensor:
        """What some query blocks give to the first ``blocks`` key blocks: float32 [B, H, those, blocks]."""
        return runs[0].mass(part, blocks)

    def __call__(self, q: Tensor, k: Tensor, view: View, scale: float) -> BlockMass:
        """q [B, H, M, D], k [B, Hkv, N, D] -> `BlockMass`."""
        batch, heads, device = q.shape[0], q.shape[1], q.device
        size = self.query_block(view)
        q, view = view.whole_blocks(q, size)
        cells = arranged(view, view.block_size(self.stride), size)
        block_reach = array_constant(cells.block_reach, device).expand(batch, -1)
        rows, keys = cells.block_reach.shape[1], cells.keys.shape[1] // size
        runs = self.runs(q, k, view, scale)
        step = max(1, _SCORES // max(1, batch * heads * max(some.held for some in runs)))
        near, room = NearBlocks.of(view, size, self.near, device), with_room(view, self.blocks, size, self.near)
        parts = []
        for first in range(0, rows, step):
            part = slice(first, min(rows, first + step))
            some = 1 + max(0, int(cells.block_reach[:, part].max()))  # later keys are after all these queries
            mass = self.mass(runs, part, some)
            number = torch.arange(mass.shape[-1], device=device)
            rows_of_near = slice(part.start + cells.skipped, part.stop + cells.skipped)
            forced = (number == 0) | near.mask(rows_of_near, number)
            parts.append(Shortlist.of_blocks(mass, block_reach[:, part], self.blocks, forced, room))
        return BlockMass(Shortlist.join(parts), cells.skipped, keys)


def check_stride(pattern: Pattern) -> None:
    """ValueError unless the stride of a pattern divides its blocks."""
    size, stride = (getattr(pattern, name) for name in ("block_size", "stride"))
    if size % stride:
        raise ValueError(
            f"{type(pattern).__name__}.stride is {shown(stride)}, which does not divide the block_size of "
            f"{shown(size)}: use a divisor, such as 8 or 16 for blocks of 128"
        )


@dataclass(frozen=True)
class XAttention(Pattern):
    """For every block of ``block_size`` queries the fewest key blocks that hold the share ``threshold`` of the mass, by
    antidiagonal scoring (XAttention, arXiv 2503.16428, algorithm 1; a fixed threshold for all heads).

    In every block the pairs on each ``stride``-th antidiagonal are summed: every query and every key takes part, and
    each column and each diagonal of the block crosses them. `Antidiagonals` says how. The larger the stride, the
    cheaper and the coarser; the paper uses 8 and 16.

    The first key block always comes first, and those that hold the ``near`` nearest keys of every query. At most
    ``blocks`` key blocks are kept for a query block (more where that has no room for the first): where that binds, the
    heaviest are kept and the row holds less than the threshold. Of equals, the lower index wins. Blocks of the tile
    size (128) are cheapest.

    Differences from the authors' code: it bounds nothing (64 blocks bind in diffuse heads from about 16k tokens on:
    give more where the threshold must hold); it forces the first block and the query's own alone (``near=1``); it
    rounds scores and sums to bfloat16, mmflex keeps float32. Its defaults are a stride of 16 and a threshold of 0.9,
    for Llama models one threshold per head (0.91, 0.76 and 0.79 on average for strides of 16, 8 and 4): a spec has one
    pattern for each head, so that such tables carry over.
    """

    stride: int = 8
    threshold: float = 0.9
    blocks: int = 64
    block_size: int = 128
    near: int = NEAR
    as_needed: ClassVar[bool] = True
    budgets: ClassVar[tuple[str, ...]] = ("blocks",)
    levels: ClassVar[Mapping[str, tuple[float, ...]]] = {"threshold": SHARES}

    def __post_init__(self) -> None:
        check_share(self, "threshold")
        check_counts(self, "stride", "blocks", "block_size", minimum=1)
        check_counts(self, "near")
        check_stride(self)

    def estimator(self) -> Antidiagonals:
        return Antidiagonals(self.stride, self.block_size, self.blocks, self.near)

    def select(self, estimate: BlockMass, view: View) -> Mapping[str, Tensor]:
        listed = estimate.listed
        return {"blocks": estimate.table(fewest(listed.mass, self.threshold * listed.total, listed.first))}

    def mask(self, t: Tokens) -> Boolean:
        return t.blocks("blocks", with_room(t, self.blocks, self.block_size, self.near), self.block_size)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return tuple(cls(stride) for stride in (8, 16))
