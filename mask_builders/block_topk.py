"""Block top-k: the best key blocks of every query block (MInference's block-sparse heads)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sympy.logic.boolalg import Boolean

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts

from .estimate import PooledScores, heaviest


@dataclass(frozen=True)
class BlockTopK(Pattern):
    """For every block of ``block_size`` queries the ``blocks`` key blocks with the highest mean-pooled score.

    The first key block and the last one that the queries stand at always come first and count towards the budget; of
    equals the lower index wins. Blocks of the tile size (128), or a multiple of it, are cheapest.
    """

    blocks: int = 100
    block_size: int = 128

    def __post_init__(self) -> None:
        check_counts(self, "blocks", "block_size", minimum=1)

    def estimator(self) -> PooledScores:
        return PooledScores(self.block_size)

    def select(self, estimate: torch.Tensor, view: View) -> Mapping[str, torch.Tensor]:
        seen = estimate > float("-inf")
        number = torch.arange(estimate.shape[-1], device=estimate.device)
        own = seen.sum(-1, keepdim=True) - 1
        return {"blocks": heaviest(estimate, self.blocks, (number == 0) | (number == own)) & seen}

    def mask(self, t: Tokens) -> Boolean:
        return t.blocks("blocks", self.blocks, self.block_size)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return (cls(100),)
