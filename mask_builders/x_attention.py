"""XAttention: blocks by the sums of their antidiagonals (arXiv 2503.16428)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.nn.functional import pad

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts
from mmflex.ir.queries import QueryTokens
from mmflex.runtime.kernels.rows import take_rows

from .estimate import _on
from .shares import Shortlist, check_share, fewest

_SCORES = 1 << 27
"""Scores held at a time, in elements: bounds the memory of the estimate at any length."""


@dataclass(frozen=True)
class BlockMass:
    """The heaviest key blocks of every query block.

    Attributes:
        listed: over rows of query blocks [B, H, rows].
        skipped: query blocks before the first row (they hold no query of this chunk of the prompt).
        keys: key blocks.
    """

    listed: Shortlist
    skipped: int
    keys: int

    def scores(self, rows: slice) -> Tensor:
        """float32 [B, H, query blocks, key blocks]: the mass of the listed blocks, -inf elsewhere."""
        mass = self.listed.mass.masked_fill(self.listed.mass < 0, float("-inf"))
        out = mass.new_full((*mass.shape[:-1], self.keys), float("-inf"))
        out = out.scatter_reduce(-1, self.listed.index, mass, "amax")
        return pad(out, (0, 0, self.skipped, 0), value=float("-inf"))[:, :, rows]


@dataclass(frozen=True, eq=False)
class _Cells:
    """Where tokens in scope stand in blocks, host data: tokens by place, -1 for none.

    Attributes:
        queries: int [B, query blocks x block size], from the first query block with a query on (``skipped`` before it).
        keys: int [B, key blocks x block size], every run of ``stride`` reversed.
        reach: int [B, query blocks x block size / stride], the last run of keys that a run of queries reaches.
        block_reach: int [B, query blocks], likewise in blocks.
    """

    queries: np.ndarray
    keys: np.ndarray
    reach: np.ndarray
    block_reach: np.ndarray
    skipped: int


def _cells(view: View, given: QueryTokens, stride: int, size: int) -> _Cells:
    layout, scope, take = view.layout, view.scope, given.take

    def build() -> _Cells:
        inside, row = take(layout.of(scope.query)), take(layout.coordinate(scope.query))
        stand = take(layout.coordinate(scope.key))
        skipped = int(row[inside].min(initial=view.rows - 1)) // size
        row = row - skipped * size
        slots = (-(-view.rows // size) - skipped) * size
        queries = np.full((layout.batch_size, slots), -1)
        keys = np.full((layout.batch_size, -(-view.size // size) * size), -1)
        reach = np.full((layout.batch_size, slots // stride), -1)
        for b in range(layout.batch_size):
            at = np.flatnonzero(inside[b])
            queries[b, row[b, at]] = at
            np.maximum.at(reach[b], row[b, at] // stride, stand[b, at] // stride)
            at = np.flatnonzero(layout.of(scope.key)[b])
            place = np.arange(len(at))
            keys[b, place - place % stride + stride - 1 - place % stride] = at
        per = size // stride
        block_reach = reach.reshape(len(reach), -1, per).max(-1) // per
        return _Cells(queries, keys, reach, block_reach, skipped)

    return layout.once(("antidiagonals", scope, given, stride, size), build)


@dataclass(frozen=True)
class Antidiagonals:
    """Estimator: attention mass of blocks by their antidiagonals (XAttention, algorithm 1), for every query block the
    ``blocks`` heaviest.

    ``stride`` queries in a row, reversed, are joined to one vector of ``stride x D``, as many keys to another: their
    product is the sum of an antidiagonal. Scores are those products over ``stride`` (a mean), under a softmax over all
    runs of keys up to the run of queries; a block has the sum of its entries. That is a stride-th of the work of
    attention's scores, in float32, some rows of blocks at a time.
    """

    stride: int
    block_size: int
    blocks: int

    def scored(self, view: View) -> float:
        """Query-key products for one head and prompt: a stride-th of those of dense attention."""
        return view.rows * view.size / 2 / self.stride

    def query_block(self, view: View) -> int:
        """Queries of a block, all of which are needed to score it."""
        stride = view.block_size(self.stride)
        return -(-view.block_size(self.block_size) // stride) * stride

    def __call__(self, q: Tensor, k: Tensor, view: View, scale: float) -> BlockMass:
        """q [B, H, M, D], k [B, Hkv, N, D] -> `BlockMass`."""
        batch, heads, _, dim = q.shape
        kv_heads, stride = k.shape[1], view.block_size(self.stride)
        size = self.query_block(view)
        per = size // stride
        q, queries = view.whole_blocks(q, size)
        cells = _cells(view, queries, stride, size)
        rows_of_cells, reach, block_reach = (
            _on(a, q.device).expand(batch, -1) for a in (cells.queries, cells.reach, cells.block_reach)
        )
        key = take_rows(k, _on(cells.keys, q.device).expand(batch, -1)[:, None].expand(-1, kv_heads, -1))
        key = _finite(key).reshape(batch * kv_heads, -1, stride * dim)
        rows, keys = cells.block_reach.shape[1], key.shape[1] // per
        step = max(1, _SCORES // max(1, batch * heads * per * key.shape[1]))
        parts = []
        for first in range(0, rows, step):
            part = slice(first, min(rows, first + step))
            taken = rows_of_cells[:, part.start * size : part.stop * size, None].mT
            query = _finite(take_rows(q, taken.expand(-1, heads, -1)))
            query = query.reshape(batch * kv_heads, -1, stride * dim)
            some = per * (1 + max(0, int(cells.block_reach[:, part].max())))  # later keys are after all these queries
            scores = _product(query, key[:, :some]).view(batch, heads, -1, some)
            seen = torch.arange(some, device=q.device) <= reach[:, part.start * per : part.stop * per, None]
            hidden = torch.where(seen, 0.0, float("-inf"))[:, None]
            torch.add(hidden, scores, alpha=scale / stride, out=scores)
            mass = scores.softmax(-1).unflatten(-1, (-1, per)).sum(-1).nan_to_num_(0.0)
            mass = mass.unflatten(2, (-1, per)).sum(3)
            parts.append(Shortlist.of_blocks(mass, block_reach[:, part], self.blocks))
        return BlockMass(Shortlist.join(parts), cells.skipped, keys)


def _finite(t: Tensor) -> Tensor:
    """In place: numbers that are not finite count as none. In float32 where a product of halves cannot give it."""
    t = t.nan_to_num_(0.0, 0.0, 0.0)
    return t if t.is_cuda else t.float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.mT`` of [n, rows, width] and [n, columns, width], float32."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b.mT)
    return torch.bmm(a, b.mT, out_dtype=torch.float32)


@dataclass(frozen=True)
class XAttention(Pattern):
    """For every block of ``block_size`` queries the fewest key blocks that hold the share ``threshold`` of the mass, by
    antidiagonal scoring (XAttention, arXiv 2503.16428, algorithm 1; a fixed threshold for all heads).

    In every block the pairs on each ``stride``-th antidiagonal are summed: every query and every key takes part, and
    each column and each diagonal of the block crosses them. `Antidiagonals` says how. The larger the stride, the
    cheaper and the coarser; the paper uses 8 and 16.

    The first key block and the last one that the queries stand at always come first. At most ``blocks`` key blocks are
    kept for a query block, which the paper does not bound: where that binds, the heaviest are kept and the row holds
    less than the threshold. Of equals, the lower index wins. Blocks of the tile size (128) are cheapest.
    """

    stride: int = 8
    threshold: float = 0.9
    blocks: int = 64
    block_size: int = 128
    budgets: ClassVar[tuple[str, ...]] = ("blocks",)

    def __post_init__(self) -> None:
        check_share(self, "threshold")
        check_counts(self, "stride", "blocks", "block_size", minimum=1)
        if self.block_size % self.stride:
            raise ValueError(
                f"XAttention.stride is {self.stride}, which does not divide the block_size of {self.block_size}: "
                "use a divisor, such as 8 or 16 for blocks of 128"
            )

    def estimator(self) -> Antidiagonals:
        return Antidiagonals(self.stride, self.block_size, self.blocks)

    def select(self, estimate: BlockMass, view: View) -> Mapping[str, Tensor]:
        listed = estimate.listed
        kept = listed.spread(fewest(listed.mass, self.threshold * listed.total, listed.first), estimate.keys)
        return {"blocks": pad(kept, (0, 0, estimate.skipped, 0)) if estimate.skipped else kept}

    def mask(self, t: Tokens) -> Boolean:
        return t.blocks("blocks", self.blocks, self.block_size)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return tuple(cls(stride) for stride in (8, 16))
