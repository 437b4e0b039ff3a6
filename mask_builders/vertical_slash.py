"""Vertical-slash: the heaviest columns and block diagonals (MInference, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from sympy.logic.boolalg import Boolean

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts

from .estimate import LastMass, LastQueries, first_of, heaviest

SINK_COLUMNS = 30
NEAR_DIAGONALS = 100


def always(view: View, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What is chosen before all else: the first keys, bool [keys], and the nearest block diagonals, bool [tiles]."""
    near = 1 + -(-(NEAR_DIAGONALS - 1) // view.tile)
    return first_of(view.size, SINK_COLUMNS, device), first_of(view.tiles, near, device)


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """``vertical`` key columns and ``slash`` diagonals, both in tokens, chosen by the attention of the last ``last_q``
    queries.

    Columns: the keys with the most mass; the first 30 keys always come first. Diagonals: whole block diagonals,
    ``ceil(slash / tile)`` of them, by the mass that each would hold (`estimate.LastMass`); those that hold the
    100 nearest distances always come first. What is forced counts towards the budget; a budget of 0 selects nothing;
    budgets beyond the sequence select all of it; of equals, the lower index wins.
    """

    vertical: int = 1000
    slash: int = 2048
    last_q: int = 64
    budgets: ClassVar[tuple[str, ...]] = ("vertical", "slash")

    def __post_init__(self) -> None:
        check_counts(self, "vertical", "slash")
        check_counts(self, "last_q", minimum=1)

    def estimator(self) -> LastQueries:
        return LastQueries(self.last_q)

    def select(self, estimate: LastMass, view: View) -> Mapping[str, torch.Tensor]:
        first, nearest = always(view, estimate.vertical.device)
        return {
            "columns": heaviest(estimate.vertical, self.vertical, first),
            "diagonals": heaviest(estimate.block_diagonals, -(-self.slash // view.tile), nearest),
        }

    def mask(self, t: Tokens) -> Boolean:
        return t.columns("columns", self.vertical) | t.diagonals("diagonals", -(-self.slash // t.tile))

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        budgets = [(1000, 1024), (1000, 2048), (2000, 2048), (1000, 3096), (2000, 3096), (1000, 4096), (2000, 4096)]
        return tuple(cls(*budget) for budget in [*budgets, (3500, 200), (1000, 2500)])
