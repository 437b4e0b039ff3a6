"""Both sides of a launch, tile by tile, as far as the layout and the budgets tell: what the compiler knows before any
input is seen."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import numpy as np
import sympy
from sympy.logic.boolalg import Boolean

from ..ir import expr as x
from ..ir.atoms import Member, atoms, expected_modulus
from ..ir.layout import TokenLayout
from .orders import NEVER, TokenOrder, attribute

_MEMO = 128
"""Results kept for a pair of orders: patterns have terms in common."""


@dataclass(eq=False)
class Tiles:
    """The query tiles and key tiles of a launch: bounds of layout attributes, kept with their orders and with this.

    Atoms (`mmflex.ir.atoms`) query it.
    """

    layout: TokenLayout
    rows: TokenOrder
    keys: TokenOrder
    memo: dict[Any, Any] = field(default_factory=dict)

    never = NEVER

    @classmethod
    def between(cls, layout: TokenLayout, rows: TokenOrder, keys: TokenOrder) -> Tiles:
        """Those of two orders, kept with the layout."""
        return layout.once(("tiles", rows, keys), lambda: cls(layout, rows, keys))

    def once(self, key: Any, build: Callable[[], Any]) -> Any:
        """What ``build`` returns, kept for up to `_MEMO` keys."""
        value = self.memo.get(key)
        if value is None:
            if len(self.memo) >= _MEMO:
                self.memo.clear()
            value = self.memo[key] = build()
        return value

    @property
    def row_tiles(self) -> int:
        return self.rows.slots // self.rows.tile

    @property
    def key_tiles(self) -> int:
        return self.keys.slots // self.keys.tile

    @cached_property
    def mean_key_tiles(self) -> float:
        """Key tiles that hold a key, on average over the prompts."""
        return float(self.keys.occupied.sum(1).mean())

    def bounds(self, e: sympy.Basic) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest value of an expression over one side's layout attributes per tile, int [B, tiles]; kept
        with the order."""
        order = self.rows if x.q in x.sides(e) else self.keys
        memo: dict[sympy.Basic, tuple[np.ndarray, np.ndarray]] = order.__dict__.setdefault("_tile_bounds", {})
        if e not in memo:
            value = evaluate(e, lambda leaf: order.attribute(leaf, self.layout))
            tiled = np.broadcast_to(value, order.index.shape).reshape(*order.occupied.shape, order.tile)
            memo[e] = tiled.min(-1), tiled.max(-1)
        return memo[e]

    def constant(self, e: sympy.Basic) -> bool:
        """Whether an expression of one side follows from the layout and is constant on every tile."""

        def check() -> bool:
            low, high = self.bounds(e)
            return bool((low == high).all())

        return not x.selected(e) and self.once(("constant", e), check)

    def constant_on_blocks(self, expr: Boolean) -> bool:
        """Whether an expression has one value on every block: it then costs no mask, only block lists."""
        return all(atom.constant(self) for atom in atoms(expr))

    def tiles_per_value(self, key: sympy.Expr) -> int:
        """In at most how many key tiles a value of a key coordinate occurs."""

        def count() -> int:
            low, high = (v.astype(np.int64) for v in self.bounds(key))
            least, most = int(low.min()), 0
            occupied = np.broadcast_to(self.keys.occupied, low.shape)
            for a, b, real in zip(low - least, high - least, occupied, strict=True):
                edges = np.zeros(int(b.max()) + 2, np.int64)
                np.add.at(edges, a[real], 1)
                np.add.at(edges, b[real] + 1, -1)
                most = max(most, int(edges.cumsum().max()))
            return most

        return self.once(("tiles per value", key), count)

    def has_gaps(self, leaf: sympy.Basic, order: TokenOrder) -> bool:
        """Whether a coordinate has gaps over the tokens of an order, or the order leaves out some."""

        def check() -> bool:
            value, real = order.attribute(leaf, self.layout), order.index >= 0
            steps = np.diff(value, axis=1)[real[:, 1:] & real[:, :-1]]
            return bool((steps != 1).any() or real.sum(1).min() < order.tokens)

        return self.once(("gaps", leaf), check)


def evaluate(e: sympy.Basic, leaf: Callable[[sympy.Basic], np.ndarray]) -> np.ndarray:
    """An expression over arrays; ``leaf`` gives those of its leaves."""
    code, reads = x.compiled(e)
    return np.asarray(eval(code, {name: leaf(read) for name, read in reads}))


# ---- how many tokens satisfy an expression over one token ------------------------------------------------------------


def satisfying(expr: Boolean, layout: TokenLayout) -> np.ndarray:
    """bool [B, N]: the valid tokens that satisfy an expression over one token that follows from the layout."""
    return np.asarray(layout.valid & evaluate(expr, lambda leaf: attribute(leaf, layout)))


def count_at_most(expr: Boolean, layout: TokenLayout) -> int:
    """At most how many tokens of a prompt satisfy an expression over one token."""
    if isinstance(expr, sympy.And):
        return min(count_at_most(arg, layout) for arg in expr.args)
    if not x.selected(expr) and not isinstance(expr, sympy.Or):
        return layout.once(("count", expr), lambda: int(satisfying(expr, layout).sum(axis=1).max(initial=0)))
    n = count_at_most(sympy.true, layout)
    if isinstance(expr, sympy.Or):
        return min(n, sum(count_at_most(arg, layout) for arg in expr.args))
    if isinstance(expr, Member):
        return min(n, expr.size)
    if isinstance(expr, sympy.Eq) and isinstance(expr.lhs, sympy.Mod):
        return min(n, -(-n // least_modulus(expr.lhs)))
    return n


def least_modulus(residue: sympy.Mod) -> int:
    """The least value that a modulus may take."""
    s = residue.args[1]
    return max(1, int(s) if s.is_Integer else int(getattr(s, "at_least", 1)))


@dataclass(frozen=True, eq=False)
class Population:
    """Tokens that may be selected, as far as the layout tells, bool [B, N]; how many there are in a prompt on
    average."""

    may: np.ndarray
    total: float

    def per_tile(self, token: sympy.Symbol, tiles: Tiles) -> np.ndarray:
        """int [B, tiles]: how many of them each tile of one side holds."""

        def count() -> np.ndarray:
            order = tiles.rows if token == x.q else tiles.keys
            may = np.broadcast_to(self.may, (len(order.index), self.may.shape[1]))
            inside = order.take(may, tiles.layout) & (order.index >= 0)
            return np.asarray(inside.reshape(*order.occupied.shape, -1).sum(-1))

        return tiles.once(("population", self, token), count)


def population(term: Boolean, layout: TokenLayout) -> tuple[Population, float]:
    """(the tokens that a term may select, kept with the layout; how many it is expected to select)."""
    known = tuple(e for e in x.conditions(term) if not x.selected(e))

    def build() -> Population:
        may = reduce(operator.and_, (satisfying(e, layout) for e in known), layout.valid)
        return Population(may, float(may.sum(1).mean()))

    whole = layout.once(("population", known), build)
    share, most = 1.0, float("inf")
    for e in x.conditions(term):
        if isinstance(e, Member):
            most = min(most, float(e.size))
        elif isinstance(e, sympy.Eq) and isinstance(e.lhs, sympy.Mod) and x.selected(e):
            share /= expected_modulus(e.lhs)
    return whole, min(most, whole.total * share)


def chance_per_tile(expr: Boolean, token: sympy.Symbol, tiles: Tiles) -> np.ndarray:
    """[B, tiles]: how likely each tile of one side holds a token that satisfies an expression over that side."""
    missed = np.ones((tiles.rows if token == x.q else tiles.keys).occupied.shape)
    for term in x.alternatives(expr):
        if term == sympy.false:
            continue
        whole, count = population(term, tiles.layout)
        rate, inside = min(1.0, count / max(1.0, whole.total)), whole.per_tile(token, tiles)
        regular = any(isinstance(e, sympy.Eq) and x.selected(e) for e in x.conditions(term))
        missed = missed * (1 - np.minimum(1.0, inside * rate) if regular else (1 - rate) ** inside)
    return 1 - missed
