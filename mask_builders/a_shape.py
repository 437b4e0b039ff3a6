"""A-shape and tri-shape: sink, local window, last rows (MInference, section 3.1; MMInference, figure 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sympy.logic.boolalg import Boolean

from mmflex.ir.pattern import Pattern, Tokens, check_counts

from .near import MORE_THAN_A_TILE


@dataclass(frozen=True)
class AShape(Pattern):
    """The first ``sink`` keys and the last ``local`` keys up to the query, in tokens.

    Both are rounded outwards to the tiles they touch. Restricted to a modality, both are counted in its keys.
    """

    sink: int = 128
    local: int = 1024
    budgets: ClassVar[tuple[str, ...]] = ("local",)
    least: ClassVar[Mapping[str, int]] = {"local": MORE_THAN_A_TILE}

    def __post_init__(self) -> None:
        check_counts(self, "sink", "local")

    def mask(self, t: Tokens) -> Boolean:
        return t.sink(self.sink) | t.local(self.local)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return tuple(cls(128, local) for local in (1024, 2048, 4096))


@dataclass(frozen=True)
class TriShape(Pattern):
    """`AShape`, and the last ``last`` queries see every key. All in tokens, rounded outwards to tiles."""

    sink: int = 128
    local: int = 4096
    last: int = 128
    budgets: ClassVar[tuple[str, ...]] = ("local",)
    least: ClassVar[Mapping[str, int]] = {"local": MORE_THAN_A_TILE}

    def __post_init__(self) -> None:
        check_counts(self, "sink", "local", "last")

    def mask(self, t: Tokens) -> Boolean:
        return t.sink(self.sink) | t.local(self.local) | t.last(self.last)
