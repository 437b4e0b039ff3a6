"""Budgets, and how heads share one: a multiple-choice knapsack.

Every head comes with a few options (`Option`), each with a cost, a density and an error. Per head, the best option
within the budget is taken. Shared, one option a head is chosen so that the sum of squared errors is least, each times
the weight of its head, while the mean cost (or density) of all heads stays within the budget; or the other way round,
the cost is least while the root of the weighted mean of squared errors stays within it. So heads that need more get it
from those that need less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..ir.pattern import Pattern

_BINS_EACH = 32
_BINS = (1 << 11, 1 << 15)


@dataclass(frozen=True)
class Option:
    """One way to compute a head.

    Attributes:
        pattern: what it sees.
        boundary: "none", "query" (Q-Boundary), "2d" (2D-Boundary) or "dense".
        ms: predicted kernel time of the head, milliseconds. density: pairs in computed blocks over causal pairs.
        error: of the output relative to dense attention (see `probe`). recall: share of attention mass kept.
        weight: how much the squared error of its head counts among all heads.
    """

    pattern: Pattern
    boundary: str
    ms: float
    density: float
    error: float
    recall: float
    weight: float = 1.0


def mean(options: Sequence[Option]) -> Option:
    """One pattern on several heads as one option: means, and the root of the weighted mean of squared errors."""
    ms, density, recall, weight = (
        float(np.mean([getattr(o, name) for o in options])) for name in ("ms", "density", "recall", "weight")
    )
    harm = float(np.mean([o.weight * o.error**2 for o in options]))
    error = (harm / max(weight, 1e-300)) ** 0.5
    return Option(options[0].pattern, options[0].boundary, ms, density, error, recall, weight)


@dataclass(frozen=True)
class Budget:
    """What attention may cost, or how wrong it may be. Built by `cost`, `density` or `error`.

    Attributes:
        kind: "cost", "density" or "error". value: the number.
        unit: of a cost: "share" of dense attention, or "ms", milliseconds of all layers together.
        shared: over all heads of the model; else every head keeps to it by itself.
    """

    kind: Literal["cost", "density", "error"]
    value: float
    unit: Literal["share", "ms", ""] = ""
    shared: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.value, (int, float)) or isinstance(self.value, bool) or not self.value > 0:
            raise ValueError(f"a budget is a number above 0, got {self.kind} {self.value!r}")
        if self.unit != "ms" and self.value > 1:
            raise ValueError(f"a {self.kind} of {self.value} is more than dense attention has: give a share up to 1")

    @classmethod
    def cost(cls, share: float | None = None, *, ms: float | None = None, shared: bool = True) -> Budget:
        """Predicted time of attention kernels at the sample's length: a share of dense attention's, or milliseconds
        of all layers together."""
        if (share is None) == (ms is None):
            raise ValueError("Budget.cost takes a share of dense attention or ms=milliseconds, one of the two")
        return cls("cost", ms, "ms", shared) if share is None else cls("cost", share, "share", shared)  # type: ignore[arg-type]

    @classmethod
    def density(cls, value: float, *, shared: bool = True) -> Budget:
        """Share of the causal pairs that may be in computed blocks."""
        return cls("density", value, "", shared)

    @classmethod
    def error(cls, value: float, *, shared: bool = True) -> Budget:
        """Error of attention outputs relative to dense to stay under (shared: root of the weighted mean square over
        heads)."""
        return cls("error", value, "", shared)

    @classmethod
    def parse(cls, text: str, *, shared: bool = True) -> Budget:
        """From "cost=0.2", "cost=12ms", "density=0.15" or "error=0.05"."""
        kind, _, value = text.replace(" ", "").partition("=")
        way_out = "write cost=0.2 (a share of dense), cost=12ms, density=0.15 or error=0.05"
        try:
            number = float(value.removesuffix("ms") if kind == "cost" else value)
        except ValueError:
            kind = ""
        if kind not in ("cost", "density", "error"):
            raise ValueError(f"the budget is {text!r}: {way_out}")
        try:
            if value.endswith("ms"):
                return cls.cost(ms=number, shared=shared)
            if kind == "density":
                return cls.density(number, shared=shared)
            return cls.cost(number, shared=shared) if kind == "cost" else cls.error(number, shared=shared)
        except ValueError as error:
            raise ValueError(f"the budget is {text!r}: {error}; {way_out}") from None

    @property
    def measure(self) -> str:
        """Which price of an `Option` the budget is about: "ms" or "density"."""
        return "density" if self.kind == "density" else "ms"

    def __str__(self) -> str:
        number = f"{self.value:g}{'ms' if self.unit == 'ms' else ''}"
        return f"{self.kind}={number}{'' if self.shared else ' per head'}"

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "value": self.value, "unit": self.unit, "shared": self.shared}

    def limit(self, dense: float, heads: int) -> float:
        """The mean price of a head that the budget allows; ``dense``: a head's dense price, ``heads`` of all layers."""
        if self.kind == "density":
            return self.value
        return self.value / heads if self.unit == "ms" else self.value * dense


class Unreachable(ValueError):
    """A budget below the least that the candidates can do."""


def unreachable(budget: Budget, least: float, dense: float, heads: int) -> Unreachable:
    """The error for a budget; ``least``: the smallest mean price of a head."""
    if budget.kind == "density":
        told = f"density={_up(least)}"
    elif budget.unit == "ms":
        told = f"cost={_up(least * heads)}ms"
    else:
        told = f"cost={_up(least / dense)}"
    return Unreachable(
        f"the budget {budget} cannot be reached: the cheapest candidates take {told}. Give at least that, or add "
        "cheaper candidates"
    )


def _up(value: float) -> str:
    """Three significant digits, rounded up: what is named must do."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step * (1 - 1e-12)) * step:.3g}"


def allocate(budget: Budget, heads: Sequence[Sequence[Option]], dense_ms: float) -> list[int]:
    """Which option each head takes.

    Args:
        heads: options of every head of the model. dense_ms: a head's dense price.

    Raises:
        Unreachable: not even the cheapest options are within the budget; names what is.
    """
    prices = [np.array([getattr(o, budget.measure) for o in options]) for options in heads]
    errors = [np.array([o.error for o in options]) for options in heads]
    harms = [np.array([o.weight * o.error**2 for o in options]) for options in heads]
    if budget.kind == "error":
        if budget.shared:
            return knapsack(harms, prices, budget.value**2 * sum(options[0].weight for options in heads))
        return [_best(e, p, budget.value) for e, p in zip(errors, prices, strict=True)]
    limit = budget.limit(dense_ms, len(heads))
    least = [float(p.min()) for p in prices]
    lowest = float(np.mean(least)) if budget.shared else max(least)
    if lowest > limit * (1 + 1e-9):
        raise unreachable(budget, lowest, dense_ms, len(heads))
    if budget.shared:
        return knapsack(prices, harms, limit * len(heads))
    return [_best(p, e, limit) for p, e in zip(prices, errors, strict=True)]


def _best(weight: np.ndarray, value: np.ndarray, limit: float) -> int:
    """The option of least value (of equals, of least weight) whose weight is within the limit."""
    fits = weight <= limit * (1 + 1e-9)
    return min(np.flatnonzero(fits).tolist(), key=lambda i: (value[i], weight[i]))


def knapsack(weights: Sequence[np.ndarray], values: Sequence[np.ndarray], capacity: float) -> list[int]:
    """One option of each item so that the sum of values is least and that of weights at most ``capacity``.

    Dynamic programming over weights in equal steps (32 an item, at least 2048): optimal to the rounding of weights to
    steps, and the sum never passes the capacity. ValueError where the least weights already do.
    """
    least = np.array([w.min() for w in weights])
    room = capacity - float(least.sum())
    if room < -1e-9 * abs(capacity):
        raise ValueError(f"the least weights sum to {least.sum():.4g}, more than the capacity of {capacity:.4g}")
    bins = int(np.clip(_BINS_EACH * len(weights), *_BINS))
    tight = max(room, 0.0)
    for _ in range(32):
        unit = tight / bins
        picked = _steps(weights, values, least, unit, bins)
        over = sum(float(w[i]) for w, i in zip(weights, picked, strict=True)) - capacity
        if over <= 1e-9 * abs(capacity):
            return picked
        tight = max(0.0, tight - 1.5 * over)  # rounding went down more than up: plan for less
    return [_best(w, v, float(w.min())) for w, v in zip(weights, values, strict=True)]


def _steps(
    weights: Sequence[np.ndarray], values: Sequence[np.ndarray], least: np.ndarray, unit: float, bins: int
) -> list[int]:
    best = np.zeros(bins + 1)  # least value with at most so many steps
    trace = np.zeros((len(weights), bins + 1), np.uint16)
    taken = []
    for item, (w, v) in enumerate(zip(weights, values, strict=True)):
        above = w - least[item]
        steps = np.where(above <= 0, 0, np.inf) if unit == 0 else np.rint(above / unit)
        after = np.full(bins + 1, np.inf)
        for i in np.flatnonzero(steps <= bins):
            s = int(steps[i])
            with_it = best[: bins + 1 - s] + v[i]
            better = with_it < after[s:]
            after[s:][better] = with_it[better]
            trace[item, s:][better] = i
        best = after
        taken.append(steps)
    picked = []
    at = bins
    for item in range(len(weights) - 1, -1, -1):
        choice = int(trace[item, at])
        picked.append(choice)
        at -= int(taken[item][choice])
    return picked[::-1]
