"""Blocks that stand out to some of their queries, by one cut for all heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts
from mmflex.runtime.device import array_constant

from .block_mass import BlockMass, arranged, finite_rows
from .near import NEAR, with_room
from .shares import check_share
from .x_attention import Antidiagonals, Runs, check_stride

_KEYS = 4096
"""Keys before a query block at which a peak counts as it is."""


@dataclass(frozen=True)
class Peaks(Antidiagonals):
    """Estimator: for every query and key block the share of its attention that one of its queries gives there, of them
    the greatest: of the longest query of every run by its exact scores, and of all by the run's antidiagonals. Twice
    the products of XAttention's estimate.

    Scores grow with the length of a query (its norm), so that the longest is the one whose attention is sharpest. Of
    equals the last is taken.

    A share is multiplied by the square root of the keys up to the query block over 4096: the more keys share a query's
    attention, the less of it makes a block stand out.
    """

    def scored(self, view: View) -> float:
        """Query-key products for one head and prompt."""
        return 2 * super().scored(view)

    def runs(self, q: Tensor, k: Tensor, view: View, scale: float) -> tuple[Runs, ...]:
        """Antidiagonals; and the longest query of each run against the keys one by one."""
        batch, stride, size = q.shape[0], view.block_size(self.stride), self.query_block(view)
        each = arranged(view, 1, size)
        slots, reach, order = (
            array_constant(a, q.device).expand(batch, -1) for a in (each.queries, each.reach, each.keys)
        )
        longest = _longest(q, slots, stride)
        index, reach = (
            t.unflatten(1, (-1, stride))[:, None].expand(-1, q.shape[1], -1, -1).gather(3, longest)[..., 0]
            for t in (slots, reach)
        )
        key = finite_rows(k, order[:, None].expand(-1, k.shape[1], -1))
        return *super().runs(q, k, view, scale), Runs(q, index, key, reach, (size // stride, size), scale)

    def mass(self, runs: tuple[Runs, ...], part: slice, blocks: int) -> Tensor:
        """Peaks, as `Antidiagonals.mass` has sums."""
        peaks = reduce(torch.maximum, (some.mass(part, blocks, peak=True) for some in runs))
        joined, single = runs
        last = joined.reach.unflatten(2, (-1, joined.per[0]))[:, :, part].amax(-1, keepdim=True) // joined.per[1]
        keys = (last + 1) * single.per[1]  # a run is one key there
        return peaks * (keys / _KEYS).sqrt()


def _longest(q: Tensor, slots: Tensor, stride: int) -> Tensor:
    """int64 [B, H, runs, 1], the place in its run of the longest query; slots int [B, runs x stride], -1 for none."""
    norm = torch.linalg.vector_norm(q, dim=-1, dtype=torch.float32).nan_to_num(0.0, 0.0, 0.0)
    norm = norm.gather(2, slots.clamp(min=0).long()[:, None].expand(-1, q.shape[1], -1))
    norm = norm.masked_fill(slots[:, None] < 0, -1.0).unflatten(2, (-1, stride))
    place = torch.arange(stride, device=q.device)
    return torch.where(norm == norm.amax(-1, keepdim=True), place, -1).amax(-1, keepdim=True)


@dataclass(frozen=True)
class BlockPeaks(Pattern):
    """For every block of ``block_size`` queries the key blocks to which some of these queries give the share ``peak``
    of their attention or more. Of every ``stride`` queries in a row the longest (by its norm) is asked by itself, by
    its exact scores, and all of them together by XAttention's antidiagonals; of what they give to a block the greatest
    counts (`Peaks`). XAttention sums it instead, and keeps the blocks that together hold a share.

    Two things follow. A block that a few queries look for is kept, however little the other queries of their block make
    of it. And heads are treated alike by the cut, not by the share that they keep: where attention is spread over the
    whole prompt no block stands out, what is left out is much like what is kept, and little is computed; a share spends
    most blocks there.

    The cut falls with the square root of the keys up to the query block: ``peak`` is what it is at 4,096 keys, at 1,024
    it is twice that and at 16,384 half. So in a longer prompt a row keeps more blocks, and a smaller share of all.

    The first key block always comes first, and those that hold the ``near`` nearest keys of every query. At most
    ``blocks`` key blocks are kept for a query block (more where that has no room for the first): where that binds, the
    highest peaks are. Of equals, the lower index wins. Blocks of the tile size (128) are cheapest.

    Source: mmflex. At equal density it loses less on the model of ``docs/evaluation.md`` than the other patterns there.
    """

    peak: float = 0.05
    stride: int = 16
    blocks: int = 64
    block_size: int = 128
    near: int = NEAR
    as_needed: ClassVar[bool] = True
    budgets: ClassVar[tuple[str, ...]] = ("blocks",)
    levels: ClassVar[Mapping[str, tuple[float, ...]]] = {"peak": (0.02, 0.035, 0.05, 0.07, 0.1, 0.15)}

    def __post_init__(self) -> None:
        check_share(self, "peak")
        check_counts(self, "stride", "blocks", "block_size", minimum=1)
        check_counts(self, "near")
        check_stride(self)

    def estimator(self) -> Peaks:
        return Peaks(self.stride, self.block_size, self.blocks, self.near)

    def select(self, estimate: BlockMass, view: View) -> Mapping[str, Tensor]:
        return {"blocks": estimate.table(estimate.listed.above(self.peak))}

    def mask(self, t: Tokens) -> Boolean:
        return t.blocks("blocks", with_room(t, self.blocks, self.block_size, self.near), self.block_size)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return (cls(), cls(stride=8))
