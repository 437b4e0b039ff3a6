"""The patterns that a search tries, and how they are brought to equal cost.

A table is a sequence of patterns from simple to complex: of two that are equally good, the first one is taken. The
paper's table is what the pattern classes offer by `Pattern.candidates`, whoever defines them, with MInference's own
budgets, with grids that keep a few columns besides (a grid alone has no room for the needle that a question is
about). A search tries patterns that keep what they need at several levels (`at_levels`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..ir.layout import TokenLayout
from ..ir.names import names
from ..ir.pattern import Pattern, Union, find
from ..ir.segments import modality_id

_MINFERENCE = (
    ("VerticalSlash", (30, 800)),
    ("VerticalSlash", (100, 750)),
    ("VerticalSlash", (500, 700)),
    ("VerticalSlash", (1000, 6096)),
    ("BlockTopK", (100,)),
)
"""MInference's budgets. Its A-shape of (100, 800) is MMInference's of (128, 1024), scaled and in whole tiles."""
COLUMNS = 128
"""Columns that a grid keeps besides: one tile of them costs no more than a few."""
_NEAR = 0.05
"""Close enough below a target, as a share of it: budgets come in whole tiles."""
_ALIKE = 0.2
"""Patterns whose budgets differ by less than this share are one."""
_TRIES = 5
_LIMIT = 256.0
"""Budgets are scaled by at most this factor, and down to as small a share."""


@dataclass(frozen=True)
class Besides(Union):
    """The union of two patterns, of which only the left one is scaled; what `scaled` gives is a plain union."""

    def scaled(self, factor: float) -> Pattern:
        return self.left.scaled(factor) | self.right


@dataclass(frozen=True)
class AsIs(Pattern):
    """A pattern that is tried as it is, whatever it costs: the heads of one layer do not tell what those of another
    need."""

    base: Pattern

    def scaled(self, factor: float) -> Pattern:
        return self.base


def at_levels(patterns: Iterable[Pattern]) -> list[Pattern]:
    """Patterns with `Pattern.levels` at each of those and at their own, as they are; others stay. One is tried at its
    own alone as `AsIs`."""
    found: dict[Pattern, None] = {}
    for pattern in patterns:
        for name, values in type(pattern).levels.items():
            tried = sorted({*values, getattr(pattern, name)})
            found |= dict.fromkeys(AsIs(replace(pattern, **{name: value})) for value in tried)  # type: ignore[type-var]
        if not type(pattern).levels:
            found[pattern] = None
    return list(found)


def paper() -> tuple[Pattern, ...]:
    """The table of MMInference and MInference, from simple to complex, with what other installed patterns offer."""
    found: dict[str, list[Pattern]] = {}
    for name in names():
        offered = find(name).candidates()
        if offered:
            found[name] = list(offered)
    for name, budgets in _MINFERENCE:
        found.setdefault(name, []).append(find(name)(*budgets))
    first = [name for name in ("AShape", "VerticalSlash", "BlockTopK", "Grid") if name in found]
    table = [p for name in first for p in found[name]]
    table += [p for name in sorted(set(found) - set(first)) for p in found[name]]
    columns = find("VerticalSlash")(COLUMNS, 0)
    table += [Besides(grid, columns) for grid in found.get("Grid", [])]
    return tuple(dict.fromkeys(table))


def for_layout(patterns: Sequence[Pattern], layout: TokenLayout) -> tuple[Pattern, ...]:
    """The patterns to try on a prompt: of the papers' table, grids only where there is more than text, because they
    are made for frames and are half of it."""
    if layout.modalities == (modality_id("text"),) and tuple(patterns) == paper():
        grid = find("Grid")
        return tuple(p for p in patterns if not isinstance(p.left if isinstance(p, Besides) else p, grid))
    return tuple(patterns)


def is_boundary(pattern: Pattern) -> bool:
    """Whether a pattern says by itself what each modality sees, so that it is tried whole only."""
    return isinstance(pattern, (find("QBoundary"), find("Boundary2D")))


class Curve:
    """What a pattern costs at several scales; every price is asked for once.

    Prices grow with budgets, but in steps and not in proportion: factors are found by secants between known prices.
    """

    def __init__(self, pattern: Pattern, price: Callable[[Pattern], float]) -> None:
        self.pattern, self.price = pattern, price
        self.known: dict[float, float] = {}
        self._at(1.0)

    def _at(self, factor: float) -> float:
        if factor not in self.known:
            self.known[factor] = self.price(self.pattern.scaled(factor))
        return self.known[factor]

    def scaled_to(self, target: float) -> Pattern | None:
        """The pattern with budgets such that its price is the target, or just below; None where it cannot be so cheap.

        A pattern without budgets, and one that cannot become dearer, stays as it is.
        """
        for _ in range(_TRIES):
            below = [f for f, cost in self.known.items() if cost <= target * (1 + 1e-9)]
            above = [f for f, cost in self.known.items() if cost > target * (1 + 1e-9)]
            low, high = max(below, default=0.0), min(above, default=math.inf)
            if below and self.known[low] >= target * (1 - _NEAR):
                break
            if math.isinf(high):
                factor = min(_LIMIT, low * min(8.0, max(1.5, target / max(self.known[low], 1e-12))))
            elif not below:
                factor = max(1 / _LIMIT, high * max(0.125, min(0.6, target / self.known[high])))
            else:
                share = (target - self.known[low]) / (self.known[high] - self.known[low])
                factor = low + (high - low) * min(0.9, max(0.1, share))
            if self.pattern.scaled(factor) in {self.pattern.scaled(f) for f in (low, high) if 0 < f < math.inf}:
                break
            self._at(factor)
        fits = {f: cost for f, cost in self.known.items() if cost <= target * (1 + 1e-9)}
        # Of equally dear ones the smallest: what makes no difference to the price should make none to the pattern.
        return self.pattern.scaled(min(fits, key=lambda f: (-fits[f], abs(math.log(f))))) if fits else None


def cheapest(patterns: Iterable[Pattern], price: Callable[[Pattern], float]) -> float:
    """The least price that any of the patterns can be brought to; infinite where none makes sense."""
    found = []
    for pattern in patterns:
        try:
            found.append(price(pattern.scaled(1 / _LIMIT)))
        except ValueError:
            continue
    return min(found, default=math.inf)


def alike(a: Any, b: Any) -> bool:
    """Whether two patterns differ in nothing but their budgets, and in those by little."""
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, Pattern):
        return bool(a == b)
    for name in (f.name for f in fields(a)):  # type: ignore[arg-type]
        x, y = getattr(a, name), getattr(b, name)
        near = abs(x - y) <= _ALIKE * max(x, y) if name in type(a).budgets else alike(x, y)
        if not near:
            return False
    return True


def at_costs(
    patterns: Iterable[Pattern], targets: Iterable[float], price: Callable[[Pattern], float]
) -> tuple[Pattern, ...]:
    """The table at every target: candidate by candidate, the cheapest version first, those that are alike once.

    Raises:
        ValueError: no candidate makes sense with this prompt (frames, but no video); the first one's reason.
    """
    table: dict[Pattern, None] = {}
    reasons: list[ValueError] = []
    tried = 0
    for pattern in patterns:
        tried += 1
        try:
            if isinstance(pattern, AsIs):
                price(pattern.base)
                table[pattern.base] = None
                continue
            curve = Curve(pattern, price)
            found = [curve.scaled_to(target) for target in sorted(targets)]
        except ValueError as error:
            reasons.append(error)
            continue
        for scaled in found:
            if scaled is not None and not any(alike(scaled, other) for other in table):
                table[scaled] = None
    if len(reasons) == tried:
        raise (
            reasons[0] if reasons else ValueError("there are no candidates: give some patterns, or None for the table")
        )
    return tuple(table)
