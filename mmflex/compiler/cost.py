"""What an expression may touch, before any input is seen: at most how many key blocks of a query tile, from the layout
and the budgets alone. These numbers bound the width of the index tables; what to expect is in `expected`, what it costs
in `predict`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from ..ir import expr as x
from ..ir.layout import TokenLayout
from .constants import GENERIC, Constants
from .orders import Order, attribute


@dataclass(eq=False)
class Tiles:
    """Both sides of a launch as the cost model sees them: bounds of layout attributes per tile, and prices."""

    layout: TokenLayout
    rows: Order
    keys: Order
    constants: Constants = GENERIC

    @property
    def row_tiles(self) -> int:
        return self.rows.slots // self.rows.tile

    @property
    def key_tiles(self) -> int:
        return self.keys.slots // self.keys.tile

    def value(self, e: sympy.Basic) -> np.ndarray:
        """int [B, S]: an expression over one side's layout attributes, in slot order."""
        order = self.rows if x.q in e.free_symbols else self.keys
        value = evaluate(e, lambda leaf: order.attribute(leaf, self.layout))
        return np.broadcast_to(value, order.index.shape)

    def bounds(self, e: sympy.Basic) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest per tile, [B, tiles]; kept with the order."""
        order = self.rows if x.q in e.free_symbols else self.keys
        held: dict[sympy.Basic, tuple[np.ndarray, np.ndarray]] = order.__dict__.setdefault("_tile_bounds", {})
        if e not in held:
            tiled = self.value(e).reshape(len(order.index), -1, order.tile)
            held[e] = tiled.min(-1), tiled.max(-1)
        return held[e]

    def constant(self, e: sympy.Basic) -> bool:
        """Whether an expression of one side follows from the layout and is constant on every tile."""
        if x.selected(e):
            return False
        low, high = self.bounds(e)
        return bool((low == high).all())


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


def count(expr: Boolean, token: sympy.Symbol, layout: TokenLayout) -> int:
    """At most how many tokens of a prompt satisfy an expression over one token."""
    n = int(layout.valid.sum(axis=1).max(initial=0))
    if isinstance(expr, sympy.And):
        return min(count(arg, token, layout) for arg in expr.args)
    if isinstance(expr, sympy.Or):
        return min(n, sum(count(arg, token, layout) for arg in expr.args))
    if isinstance(expr, x.Member):
        return min(n, int(expr.args[2]))
    if not x.selected(expr):
        true = evaluate(expr, lambda leaf: attribute(leaf, layout))
        return int((layout.valid & true).sum(axis=1).max(initial=0))
    if isinstance(expr, sympy.Eq) and isinstance(expr.lhs, sympy.Mod):
        stride = expr.lhs.args[1]
        least = getattr(stride, "at_least", None) or (int(stride) if stride.is_Integer else 1)
        return min(n, -(-n // max(1, least)))
    return n


Range = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Key tiles ``first .. last`` of every query tile [B, row tiles], and at most how many of them."""

_MANY = 1 << 40


def ranges(expr: Boolean, tiles: Tiles) -> list[Range]:
    """Ranges of key tiles that together hold every block where the expression may hold."""
    shape, last = (max(len(tiles.rows.index), len(tiles.keys.index)), tiles.row_tiles), tiles.key_tiles - 1

    def span(low: np.ndarray | int = 0, high: np.ndarray | int = last, most: np.ndarray | int = _MANY) -> list[Range]:
        a, b, c = (np.broadcast_to(np.asarray(v, np.int64), shape) for v in (low, high, most))
        return [(np.maximum(a, 0), np.minimum(b, last), c)]

    if expr == sympy.true:
        return span()
    if expr == sympy.false:
        return []
    if isinstance(expr, sympy.Or):
        return [r for arg in expr.args for r in ranges(arg, tiles)]
    if isinstance(expr, sympy.And):
        out = span()
        for arg in expr.args:
            other = ranges(arg, tiles)
            out = [(np.maximum(a, d), np.minimum(b, e), np.minimum(c, f)) for a, b, c in out for d, e, f in other]
        return out
    if isinstance(expr, sympy.Not):
        return span()
    if x.sides(expr) == {x.q}:
        return span() if x.selected(expr) else span(high=np.where(tiles.bounds(expr)[1], last, -1))
    if x.sides(expr) == {x.k}:
        if x.selected(expr):
            return span(most=count(expr, x.k, tiles.layout))
        some = tiles.bounds(expr)[1] != 0
        first, final = some.argmax(1)[:, None], last - some[:, ::-1].argmax(1)[:, None]
        return span(first, np.where(some.any(1)[:, None], final, -1), some.sum(1)[:, None])
    if isinstance(expr, Relational):
        return _relation(expr, tiles, span)
    most, key = int(expr.args[-1]), expr.args[-3]
    if any(x.selected(e) for e in expr.args[:-2]):
        return span()
    low, high = tiles.bounds(expr.args[0])
    high = tiles.bounds(expr.args[1])[1] if isinstance(expr, x.Touches) else high
    bound = most * (high - low + 1).astype(np.int64) * spread(tiles, key)
    if isinstance(expr, x.Listed):
        # The classifier looks up corners only: a tile that holds more than two blocks may list anything.
        key_low, key_high = tiles.bounds(key)
        wide = (high - low > 1) | bool((key_high - key_low > 1).any())
        bound = np.where(wide, _MANY, bound)
    return span(most=bound)


def spread(tiles: Tiles, key: sympy.Expr) -> int:
    """In how many key tiles a value of a key coordinate may occur."""
    low, high = (v.astype(np.int64) for v in tiles.bounds(key))
    least, most = int(low.min()), 0
    holds = np.broadcast_to(real(tiles.keys), low.shape)
    for a, b, there in zip(low - least, high - least, holds, strict=True):
        edges = np.zeros(int(b.max()) + 2, np.int64)
        np.add.at(edges, a[there], 1)
        np.add.at(edges, b[there] + 1, -1)
        most = max(most, int(edges.cumsum().max()))
    return most


def real(order: Order) -> np.ndarray:
    """bool [B, tiles]: tiles that hold a token."""
    return np.asarray((order.index >= 0).reshape(len(order.index), -1, order.tile).any(-1))


def _relation(expr: Relational, tiles: Tiles, span: object) -> list[Range]:
    parts = x.separate(expr)
    if parts is None or x.selected(parts[0]) or x.selected(parts[2]):
        return span()  # type: ignore[operator]
    (f0, f1), (g0, g1) = tiles.bounds(parts[0]), tiles.bounds(parts[2])
    batch = max(len(f0), len(g0))
    f0, f1, g0, g1 = (np.broadcast_to(v, (batch, v.shape[1])) for v in (f0, f1, g0, g1))
    op = parts[1]
    low, high = np.zeros_like(f0), np.full_like(f0, tiles.key_tiles - 1)
    if (np.diff(g0, axis=1) >= 0).all() and op in (sympy.GreaterThan, sympy.StrictGreaterThan, sympy.Eq):
        side: Literal["left", "right"] = "left" if op is sympy.StrictGreaterThan else "right"
        high = np.stack([np.searchsorted(g0[b], f1[b], side) - 1 for b in range(batch)])
    if (np.diff(g1, axis=1) >= 0).all() and op in (sympy.LessThan, sympy.StrictLessThan, sympy.Eq):
        side = "right" if op is sympy.StrictLessThan else "left"
        low = np.stack([np.searchsorted(g1[b], f0[b], side) for b in range(batch)])
    return span(low, high)  # type: ignore[operator]


def touched(expr: Boolean, tiles: Tiles) -> np.ndarray:
    """[B, row tiles]: at most how many key tiles each query tile touches."""
    total = np.zeros((1, tiles.row_tiles), np.int64)
    for first, last, most in ranges(expr, tiles):
        total = total + np.clip(np.minimum(last - first + 1, most), 0, None)
    keys = int(real(tiles.keys).sum(1).max(initial=0))
    return np.asarray(np.where(real(tiles.rows), np.minimum(total, keys), 0))


def causal(tiles: Tiles) -> np.ndarray:
    """[B, row tiles]: key tiles that hold a key up to some query of the tile."""
    return touched(sympy.Ge(x.q, x.k, evaluate=False), tiles)


def terms(expr: Boolean) -> list[Boolean]:
    """Alternatives of an expression: what an And asks of all of an Or's arguments is asked of each."""
    out: list[Boolean] = []
    for term in sympy.Or.make_args(expr):
        inner = next((arg for arg in sympy.And.make_args(term) if isinstance(arg, sympy.Or)), None)
        if inner is None:
            out.append(term)
        else:
            rest = [arg for arg in sympy.And.make_args(term) if arg is not inner]
            out += [t for arg in inner.args for t in terms(sympy.And(arg, *rest))]
    return out


def causally(term: Boolean) -> Boolean:
    """A term with causality spelled out, for the cost model: also in ranks where its keys are of one modality, which is
    monotone in modality-major order where positions are not."""
    return sympy.And(term, sympy.Ge(x.q, x.k, evaluate=False), *_ranked(term))


def _ranked(term: Boolean) -> list[Boolean]:
    """Causality in ranks, where the keys of a term are of one modality."""
    found = [e.rhs for e in term.atoms(sympy.Eq) if e.lhs == x.Modality(x.k) and e in sympy.And.make_args(term)]
    return [sympy.Ge(x.Rank(x.q, m), x.Rank(x.k, m), evaluate=False) for m in found]


def causally_once(term: Boolean) -> Boolean:
    """As `causally`, said in one way only, so that shares are not multiplied twice."""
    return sympy.And(term, *(_ranked(term) or [sympy.Ge(x.q, x.k, evaluate=False)]))


def class_pair(term: Boolean) -> tuple[sympy.Expr, sympy.Expr] | None:
    """(f, g) of a term that asks for ``f(q) == g(k)`` with residues f and g."""
    for atom in sympy.And.make_args(term):
        if isinstance(atom, sympy.Eq) and x.sides(atom) == {x.q, x.k}:
            parts = x.separate(atom)
            if parts is not None and isinstance(parts[0], sympy.Mod) and isinstance(parts[2], sympy.Mod):
                return parts[0], parts[2]
    return None
