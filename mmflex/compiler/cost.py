"""What an expression may touch, before any input is seen: at most how many key blocks of a query tile, from the layout
and the budgets alone. These numbers bound the width of the index tables; what to expect is in `expected`, what it costs
in `predict`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from ..ir import expr as x
from ..ir.layout import TokenLayout
from .orders import Order, attribute

CAUSAL = sympy.Ge(x.q, x.k, evaluate=False)

HELD = 128
"""Two orders keep so many results that follow from the layout alone: patterns have terms in common."""


@dataclass(eq=False)
class Tiles:
    """Both sides of a launch as the cost model sees them: bounds of layout attributes per tile."""

    layout: TokenLayout
    rows: Order
    keys: Order
    memo: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def between(cls, layout: TokenLayout, rows: Order, keys: Order) -> Tiles:
        """Those of two orders, kept with the layout."""
        return layout._once(("tiles", rows, keys), lambda: cls(layout, rows, keys))

    def once(self, key: Any, build: Callable[[], Any]) -> Any:
        """What ``build`` returns, kept for up to `HELD` keys."""
        found = self.memo.get(key)
        if found is None:
            if len(self.memo) >= HELD:
                self.memo.clear()
            found = self.memo[key] = build()
        return found

    @property
    def row_tiles(self) -> int:
        return self.rows.slots // self.rows.tile

    @property
    def key_tiles(self) -> int:
        return self.keys.slots // self.keys.tile

    def bounds(self, e: sympy.Basic) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest value of an expression over one side's layout attributes per tile, int [B, tiles]; kept
        with the order."""
        order = self.rows if x.q in x.sides(e) else self.keys
        held: dict[sympy.Basic, tuple[np.ndarray, np.ndarray]] = order.__dict__.setdefault("_tile_bounds", {})
        if e not in held:
            value = evaluate(e, lambda leaf: order.attribute(leaf, self.layout))
            tiled = np.broadcast_to(value, order.index.shape).reshape(*order.real.shape, order.tile)
            held[e] = tiled.min(-1), tiled.max(-1)
        return held[e]

    def constant(self, e: sympy.Basic) -> bool:
        """Whether an expression of one side follows from the layout and is constant on every tile."""

        def find() -> bool:
            low, high = self.bounds(e)
            return bool((low == high).all())

        return not x.selected(e) and self.once(("constant", e), find)


def evaluate(e: sympy.Basic, leaf: Callable[[sympy.Basic], np.ndarray]) -> np.ndarray:
    """An expression over arrays; ``leaf`` gives those of its leaves."""
    code, reads = x.compiled(e)
    return np.asarray(eval(code, {name: leaf(read) for name, read in reads}))


def tile_constant(expr: Boolean, tiles: Tiles) -> bool:
    """Whether the expression has one value on every block: it then costs no mask, only block lists."""
    for atom in x.atoms(expr):
        if isinstance(atom, Relational):
            parts = x.separate(atom)
            if parts is None or not all(tiles.constant(e) for e in (parts[0], parts[2])):
                return False
        elif isinstance(atom, x.Member) or not all(tiles.constant(e) for e in atom.args[:-2]):
            return False
    return True


def holds(expr: Boolean, layout: TokenLayout) -> np.ndarray:
    """bool [B, N]: the valid tokens that satisfy an expression over one token that follows from the layout."""
    return np.asarray(layout.valid & evaluate(expr, lambda leaf: attribute(leaf, layout)))


def count(expr: Boolean, layout: TokenLayout) -> int:
    """At most how many tokens of a prompt satisfy an expression over one token."""
    if isinstance(expr, sympy.And):
        return min(count(arg, layout) for arg in expr.args)
    if not x.selected(expr) and not isinstance(expr, sympy.Or):
        return layout._once(("count", expr), lambda: int(holds(expr, layout).sum(axis=1).max(initial=0)))
    n = count(sympy.true, layout)
    if isinstance(expr, sympy.Or):
        return min(n, sum(count(arg, layout) for arg in expr.args))
    if isinstance(expr, x.Member):
        return min(n, int(expr.args[2]))
    if isinstance(expr, sympy.Eq) and isinstance(expr.lhs, sympy.Mod):
        stride = expr.lhs.args[1]
        least = getattr(stride, "at_least", None) or (int(stride) if stride.is_Integer else 1)
        return min(n, -(-n // max(1, least)))
    return n


Bound = Any
"""An integer, or integers that broadcast to [B, row tiles]."""

Range = tuple[Bound, Bound, Bound]
"""Key tiles ``first .. last`` of every query tile, and at most how many of them."""

_MANY = 1 << 40


def ranges(expr: Boolean, tiles: Tiles) -> list[Range]:
    """Ranges of key tiles that together hold every block where the expression may hold."""
    if isinstance(expr, sympy.Or):
        return [r for arg in expr.args for r in ranges(arg, tiles)]
    if isinstance(expr, sympy.And):
        return together(expr.args, tiles)
    return _ranges(expr, tiles) if x.selected(expr) else tiles.once(("ranges", expr), lambda: _ranges(expr, tiles))


def together(exprs: Iterable[Boolean], tiles: Tiles) -> list[Range]:
    """`ranges` where all of several expressions may hold."""
    out: list[Range] = [(0, tiles.key_tiles - 1, _MANY)]
    for expr in exprs:
        other = ranges(expr, tiles)
        out = [(np.maximum(a, d), np.minimum(b, e), np.minimum(c, f)) for a, b, c in out for d, e, f in other]
    return out


def _ranges(expr: Boolean, tiles: Tiles) -> list[Range]:
    last = tiles.key_tiles - 1
    everywhere = [(0, last, _MANY)]
    if expr == sympy.false:
        return []
    if expr == sympy.true or isinstance(expr, sympy.Not):
        return everywhere
    sides = x.sides(expr)
    if sides == {x.q}:
        return everywhere if x.selected(expr) else [(0, np.where(tiles.bounds(expr)[1], last, -1), _MANY)]
    if sides == {x.k}:
        if x.selected(expr):
            return [(0, last, count(expr, tiles.layout))]
        some = tiles.bounds(expr)[1] != 0
        first, final = some.argmax(1)[:, None], last - some[:, ::-1].argmax(1)[:, None]
        return [(first, np.where(some.any(1)[:, None], final, -1), some.sum(1)[:, None])]
    if isinstance(expr, Relational):
        return [(*_relation(expr, tiles), _MANY)]
    most, key = int(expr.args[-1]), expr.args[-3]
    if any(x.selected(e) for e in expr.args[:-2]):
        return everywhere
    low, high = tiles.bounds(expr.args[0])
    high = tiles.bounds(expr.args[1])[1] if isinstance(expr, x.Touches) else high
    bound = most * (high - low + 1).astype(np.int64) * spread(tiles, key)
    if isinstance(expr, x.Listed):
        # The classifier looks up corners only: a tile that holds more than two blocks may list anything.
        key_low, key_high = tiles.bounds(key)
        wide = (high - low > 1) | bool((key_high - key_low > 1).any())
        bound = np.where(wide, _MANY, bound)
    return [(0, last, bound)]


def spread(tiles: Tiles, key: sympy.Expr) -> int:
    """In how many key tiles a value of a key coordinate may occur."""

    def find() -> int:
        low, high = (v.astype(np.int64) for v in tiles.bounds(key))
        least, most = int(low.min()), 0
        holds = np.broadcast_to(tiles.keys.real, low.shape)
        for a, b, there in zip(low - least, high - least, holds, strict=True):
            edges = np.zeros(int(b.max()) + 2, np.int64)
            np.add.at(edges, a[there], 1)
            np.add.at(edges, b[there] + 1, -1)
            most = max(most, int(edges.cumsum().max()))
        return most

    return tiles.once(("spread", key), find)


def _relation(expr: Relational, tiles: Tiles) -> tuple[Bound, Bound]:
    low: Bound = 0
    high: Bound = tiles.key_tiles - 1
    parts = x.separate(expr)
    if parts is None or x.selected(parts[0]) or x.selected(parts[2]):
        return low, high
    (f0, f1), (g0, g1) = tiles.bounds(parts[0]), tiles.bounds(parts[2])
    batch = max(len(f0), len(g0))
    f0, f1, g0, g1 = (np.broadcast_to(v, (batch, v.shape[1])) for v in (f0, f1, g0, g1))
    op = parts[1]
    if (np.diff(g0, axis=1) >= 0).all() and op in (sympy.GreaterThan, sympy.StrictGreaterThan, sympy.Eq):
        side: Literal["left", "right"] = "left" if op is sympy.StrictGreaterThan else "right"
        high = np.stack([np.searchsorted(g0[b], f1[b], side) - 1 for b in range(batch)])
    if (np.diff(g1, axis=1) >= 0).all() and op in (sympy.LessThan, sympy.StrictLessThan, sympy.Eq):
        side = "right" if op is sympy.StrictLessThan else "left"
        low = np.stack([np.searchsorted(g1[b], f0[b], side) for b in range(batch)])
    return np.maximum(low, 0), np.minimum(high, tiles.key_tiles - 1)


def touched(mask: Boolean, tiles: Tiles) -> np.ndarray:
    """[B, row tiles]: at most how many key tiles each query tile touches under a mask and causality.

    Causality is also said in ranks where keys are of one modality: they are monotone in modality-major order where
    positions are not.
    """
    total = np.zeros((1, tiles.row_tiles), np.int64)
    for term in terms(mask):
        for first, last, most in together((term, CAUSAL, *_ranked(term)), tiles):
            total = total + np.clip(np.minimum(last - first + 1, most), 0, None)
    keys = int(tiles.keys.real.sum(1).max(initial=0))
    return np.asarray(np.where(tiles.rows.real, np.minimum(total, keys), 0))


def causal(tiles: Tiles) -> np.ndarray:
    """[B, row tiles]: key tiles that hold a key up to some query of the tile."""
    return tiles.once("causal", lambda: touched(sympy.true, tiles))


@lru_cache(maxsize=1024)
def terms(expr: Boolean) -> tuple[Boolean, ...]:
    """Alternatives of an expression: what an And asks of all of an Or's arguments is asked of each."""
    if expr == sympy.false:
        return ()
    out: list[Boolean] = []
    for term in x.alternatives(expr):
        inner = next((arg for arg in x.conditions(term) if isinstance(arg, sympy.Or)), None)
        if inner is None:
            out.append(term)
        else:
            rest = [arg for arg in x.conditions(term) if arg is not inner]
            out += [t for arg in inner.args for t in terms(x.all_of(arg, *rest))]
    return tuple(out)


@lru_cache(maxsize=1024)
def _ranked(term: Boolean) -> tuple[Boolean, ...]:
    """Causality in ranks, where the keys of a term are of one modality."""
    found = [e.rhs for e in x.conditions(term) if isinstance(e, sympy.Eq) and e.lhs == x.Modality(x.k)]
    return tuple(sympy.Ge(x.Rank(x.q, m), x.Rank(x.k, m), evaluate=False) for m in found)


def causally(term: Boolean) -> tuple[Boolean, ...]:
    """A term and causality, said in one way only, so that shares are not multiplied twice."""
    return (term, *(_ranked(term) or (CAUSAL,)))


@lru_cache(maxsize=1024)
def class_pair(term: Boolean) -> tuple[sympy.Expr, sympy.Expr] | None:
    """(f, g) of a term that asks for ``f(q) == g(k)`` with residues f and g."""
    for atom in x.conditions(term):
        if isinstance(atom, sympy.Eq) and x.sides(atom) == {x.q, x.k}:
            parts = x.separate(atom)
            if parts is not None and isinstance(parts[0], sympy.Mod) and isinstance(parts[2], sympy.Mod):
                return parts[0], parts[2]
    return None
