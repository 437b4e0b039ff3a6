"""Block top-k: the best key blocks of every query block (MInference's block-sparse heads; Stem, arXiv 2603.06274)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from sympy.logic.boolalg import Boolean

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts

from .estimate import Pooled, PooledBlocks, heaviest
from .near import NEAR, with_room
from .shares import check_share, check_weight, heaviest_of_rows

_SCORES = 1 << 26
"""Scores held at a time."""
_ROUNDING = 1e-6
"""Budgets are rounded down, but not for what float64 leaves of a whole number."""


@dataclass(frozen=True)
class BlockTopK(Pattern):
    """For every block of ``block_size`` queries the ``blocks`` key blocks with the highest mean-pooled score.

    The first key block, and those that hold the ``near`` nearest keys of every query, always come first; they count
    towards the budget, which grows in rows where it has no room for them. Of equals the lower index wins. Blocks of the
    tile size (128), or a multiple of it, are cheapest.

    Two refinements of Stem (arXiv 2603.06274), off by default:

    ``decay`` shrinks the budget along the prompt: what early tokens see is read by all later ones, so they get more.
    Queries that stand at key block ``blocks`` or before have the whole budget; from there on it falls evenly, to
    ``decay * blocks`` at the last key block of the prompt, rounded down (Stem: 0.7).

    ``values`` adds ``values * (prominence of the block's values)`` to its score: keys whose values are large change the
    output more (`mask_builders.values.block_prominence`; Stem: 0.2). `mmflex.plan` then needs ``v=``.

    Differences from Stem: it scores by antidiagonals, of which mean-pooling is the mean over all pairs; adds its first
    and last four blocks to the budget (here: ``BlockTopK(...) | AShape(512, 384)``); has a budget that follows the
    length (all of 56 blocks, then about a fifth and a tenth), and two dense first layers.
    """

    blocks: int = 100
    block_size: int = 128
    near: int = NEAR
    decay: float = 1.0
    values: float = 0.0
    budgets: ClassVar[tuple[str, ...]] = ("blocks",)

    def __post_init__(self) -> None:
        check_counts(self, "blocks", "block_size", minimum=1)
        check_counts(self, "near")
        check_share(self, "decay")
        check_weight(self, "values")

    def estimator(self) -> PooledBlocks:
        return PooledBlocks(self.block_size, self.near, self.values > 0)

    def select(self, estimate: Pooled, view: View) -> Mapping[str, torch.Tensor]:
        batch, heads, rows, _ = estimate.q.shape
        keys, device = estimate.k.shape[2], estimate.q.device
        table = torch.zeros((batch, heads, rows, keys), dtype=torch.bool, device=device)
        number = torch.arange(keys, device=device)
        step = max(1, _SCORES // max(1, batch * heads * keys))
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            forced = (number == 0) | estimate.near.mask(part, number)
            scores = estimate.scores(part, self.values).masked_fill(forced, float("inf"))
            seen = number <= estimate.reach[:, None, part, None]
            if self.decay == 1:
                best = heaviest(scores, self.blocks)
            else:
                best = heaviest_of_rows(scores, self._budgets(estimate.reach[:, part], view), self.blocks)
            table[:, :, part] = (best | forced) & seen
        return {"blocks": table}

    def _budgets(self, reach: torch.Tensor, view: View) -> torch.Tensor:
        """int64 [B|1, 1, rows, 1]: key blocks for query blocks that stand at key blocks ``reach`` [B|1, rows]."""
        size = view.block_size(self.block_size)
        blocks = min(self.blocks, -(-view.size // size))
        last = (view.counts(reach.device)[:, None] - 1) // size
        fallen = (reach - blocks).clamp(min=0) / (last - blocks).clamp(min=1).double()
        budgets = blocks * (1 - (1 - self.decay) * fallen.clamp(max=1))
        return (budgets + _ROUNDING).floor().long().clamp(min=1)[:, None, :, None]

    def mask(self, t: Tokens) -> Boolean:
        return t.blocks("blocks", with_room(t, self.blocks, self.block_size, self.near), self.block_size)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return (cls(100),)
