"""Blocks that stand out to some of their queries, by one cut for all heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sympy.logic.boolalg import Boolean
from torch import Tensor

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts

from .block_mass import BlockMass
from .near import NEAR, with_room
from .shares import check_share
from .x_attention import Antidiagonals, check_stride


@dataclass(frozen=True)
class BlockPeaks(Pattern):
    """For every block of ``block_size`` queries the key blocks to which some of these queries give the share ``peak``
    of their attention or more. Every ``stride``-th query is asked by itself, by its exact scores, and all of them as
    runs of ``stride``, by XAttention's antidiagonals; of what they give to a block the greatest counts
    (`Antidiagonals`). XAttention sums it instead, and keeps the blocks that together hold a share.

    Two things follow. A block that a few queries look for is kept, however little the other queries of their block make
    of it. And heads are treated alike by the cut, not by the share that they keep: where attention is spread over the
    whole prompt no block stands out, what is left out is much like what is kept, and little is computed; a share spends
    most blocks there.

    The cut falls with the square root of the keys up to the query block: ``peak`` is what it is at 4,096 keys, at 1,024
    it is twice that and at 16,384 half. So a row of a longer prompt keeps more blocks, and fewer of its share.

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

    def estimator(self) -> Antidiagonals:
        return Antidiagonals(self.stride, self.block_size, self.blocks, self.near, peak=True)

    def select(self, estimate: BlockMass, view: View) -> Mapping[str, Tensor]:
        return {"blocks": estimate.table(estimate.listed.above(self.peak))}

    def mask(self, t: Tokens) -> Boolean:
        return t.blocks("blocks", with_room(t, self.blocks, self.block_size, self.near), self.block_size)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return (cls(), cls(stride=8))
