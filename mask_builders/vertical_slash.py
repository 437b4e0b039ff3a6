"""Vertical-slash: the heaviest columns and block diagonals (MInference, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from sympy.logic.boolalg import Boolean

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts

from .estimate import LastMass, LastQueries, first_of, heaviest
from .near import NEAR, near_diagonals

SINK_COLUMNS = 30
"""First keys that are always columns (MInference)."""


def columns_of(vertical: int) -> int:
    """The budget of columns: room for the first keys, unless it is 0."""
    return max(vertical, SINK_COLUMNS) if vertical else 0


def diagonals_of(slash: int, near: int, tile: int) -> int:
    """The budget of block diagonals: room for those of the nearest keys, unless it is 0."""
    return max(-(-slash // tile), near_diagonals(near, tile)) if slash else 0


def always(view: View, near: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What is chosen before all else: the first keys, bool [keys], and the nearest block diagonals, bool [tiles]."""
    diagonals = min(near_diagonals(near, view.tile), view.tiles)
    return first_of(view.size, SINK_COLUMNS, device), first_of(view.tiles, diagonals, device)


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """``vertical`` key columns and ``slash`` diagonals, both in tokens, chosen by the attention of the last ``last_q``
    queries.

    Columns: the keys with the most mass; the first 30 keys always come first. Diagonals: whole block diagonals,
    ``ceil(slash / tile)`` of them, by the mass that each would hold (`estimate.LastMass`); those that hold the ``near``
    nearest keys of every query always come first (two of 128: the first row of a tile sees none of them on one alone).
    What is forced counts towards the budget, and a budget too small for it grows to hold it; a budget of 0 selects
    nothing of its kind, forced or not. Budgets beyond the sequence select all of it; of equals, the lower index wins.
    """

    vertical: int = 1000
    slash: int = 2048
    last_q: int = 64
    near: int = NEAR
    budgets: ClassVar[tuple[str, ...]] = ("vertical", "slash")

    def __post_init__(self) -> None:
        check_counts(self, "vertical", "slash", "near")
        check_counts(self, "last_q", minimum=1)

    def estimator(self) -> LastQueries:
        return LastQueries(self.last_q)

    def select(self, estimate: LastMass, view: View) -> Mapping[str, torch.Tensor]:
        first, nearest = always(view, self.near, estimate.vertical.device)
        diagonals = diagonals_of(self.slash, self.near, view.tile)
        return {
            "columns": heaviest(estimate.vertical, columns_of(self.vertical), first),
            "diagonals": heaviest(estimate.block_diagonals, diagonals, nearest),
        }

    def mask(self, t: Tokens) -> Boolean:
        diagonals = t.diagonals("diagonals", diagonals_of(self.slash, self.near, t.tile))
        return t.columns("columns", columns_of(self.vertical)) | diagonals

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        budgets = [(1000, 1024), (1000, 2048), (2000, 2048), (1000, 3096), (2000, 3096), (1000, 4096), (2000, 4096)]
        return tuple(cls(*budget) for budget in [*budgets, (3500, 200), (1000, 2500)])
