"""Block top-k: the best key blocks of every query block (MInference's block-sparse heads)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from sympy.logic.boolalg import Boolean

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts

from .estimate import Pooled, PooledBlocks, heaviest

_SCORES = 1 << 26
"""Scores held at a time."""


@dataclass(frozen=True)
class BlockTopK(Pattern):
    """For every block of ``block_size`` queries the ``blocks`` key blocks with the highest mean-pooled score.

    The first key block and the last one that the queries stand at always come first and count towards the budget; of
    equals the lower index wins. Blocks of the tile size (128), or a multiple of it, are cheapest.
    """

    blocks: int = 100
    block_size: int = 128
    budgets: ClassVar[tuple[str, ...]] = ("blocks",)

    def __post_init__(self) -> None:
        check_counts(self, "blocks", "block_size", minimum=1)

    def estimator(self) -> PooledBlocks:
        return PooledBlocks(self.block_size)

    def select(self, estimate: Pooled, view: View) -> Mapping[str, torch.Tensor]:
        batch, heads, rows, _ = estimate.q.shape
        keys = estimate.k.shape[2]
        table = torch.zeros((batch, heads, rows, keys), dtype=torch.bool, device=estimate.q.device)
        number = torch.arange(keys, device=estimate.q.device)
        step = max(1, _SCORES // max(1, batch * heads * keys))
        for first in range(0, rows, step):
            part = slice(first, first + step)
            scores = estimate.scores(part)
            scores = torch.where((number == 0) | (number == estimate.reach[:, None, part, None]), float("inf"), scores)
            seen = number <= estimate.reach[:, None, part, None]
            table[:, :, part] = heaviest(scores, self.blocks) & seen
        return {"blocks": table}

    def mask(self, t: Tokens) -> Boolean:
        return t.blocks("blocks", self.blocks, self.block_size)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return (cls(100),)
