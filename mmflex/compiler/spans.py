"""Where a mask is expected to hold: ranges of key tiles for every query tile, and how many of them are full."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from ..ir import expr as x
from ..ir.layout import TokenLayout
from . import cost

Counts = tuple[np.ndarray, np.ndarray]
"""Blocks of each query tile [B, tiles]: touched, and full among them."""

FAR = np.int64(1 << 40)
"""Past every key: where a tile holds none."""

STRIDE_GUESS = 4
"""A searched stride is expected at this many times the least one."""


def modulus(residue: sympy.Mod) -> int:
    s = residue.args[1]
    return max(1, int(s) if s.is_Integer else STRIDE_GUESS * int(getattr(s, "at_least", 1)))


# ---- one-sided sets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pool:
    """Tokens that may be chosen, as far as the layout tells, bool [B, N]; how many there are in a prompt on average."""

    may: np.ndarray
    total: float

    def held(self, token: sympy.Symbol, tiles: cost.Tiles) -> np.ndarray:
        """int [B, tiles]: how many of them each tile of one side holds."""

        def count() -> np.ndarray:
            order = tiles.rows if token == x.q else tiles.keys
            may = np.broadcast_to(self.may, (len(order.index), self.may.shape[1]))
            there = order.take(may, tiles.layout) & (order.index >= 0)
            return np.asarray(there.reshape(*order.real.shape, -1).sum(-1))

        return tiles.once(("held", self, token), count)


def population(term: Boolean, layout: TokenLayout) -> tuple[Pool, float]:
    """(the tokens that a term may choose, kept with the layout; how many it is expected to choose)."""
    known = tuple(e for e in x.conditions(term) if not x.selected(e))

    def find() -> Pool:
        may = reduce(operator.and_, (cost.holds(e, layout) for e in known), layout.valid)
        return Pool(may, float(may.sum(1).mean()))

    pool = layout._once(("pool", known), find)
    share, most = 1.0, float("inf")
    for e in x.conditions(term):
        if isinstance(e, x.Member):
            most = min(most, float(e.args[2]))
        elif isinstance(e, sympy.Eq) and isinstance(e.lhs, sympy.Mod) and x.selected(e):
            share /= modulus(e.lhs)
    return pool, min(most, pool.total * share)


def hits(expr: Boolean, token: sympy.Symbol, tiles: cost.Tiles) -> np.ndarray:
    """[B, tiles]: how likely each tile of one side holds a token that satisfies an expression over that side."""
    missed = np.ones((tiles.rows if token == x.q else tiles.keys).real.shape)
    for term in x.alternatives(expr):
        if term == sympy.false:
            continue
        pool, count = population(term, tiles.layout)
        rate, held = min(1.0, count / max(1.0, pool.total)), pool.held(token, tiles)
        regular = any(isinstance(e, sympy.Eq) and x.selected(e) for e in x.conditions(term))
        missed = missed * (1 - np.minimum(1.0, held * rate) if regular else (1 - rate) ** held)
    return 1 - missed


def _share(expr: Boolean, tiles: cost.Tiles) -> float:
    """Share of the key tiles that hold a key which satisfies an expression."""
    real = tiles.keys.real
    return float((hits(expr, x.k, tiles) * real).sum() / max(1, real.sum()))


# ---- two-sided expressions -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Span:
    """Where one alternative of a mask may hold: key tiles ``first .. last`` of every query tile, ``share`` of them, at
    most ``most``; and where it holds everywhere, of those: ``inner_first .. inner_last``, ``inner`` of them.
    ``chosen``: selection says which, and is taken to want the nearest. Arrays broadcast to [B, query tiles]."""

    first: Any
    last: Any
    inner_first: Any
    inner_last: Any
    share: Any = 1.0
    inner: Any = 1.0
    most: Any = float("inf")
    chosen: bool = False

    def __and__(self, other: Span) -> Span:
        return Span(
            np.maximum(self.first, other.first), np.minimum(self.last, other.last),
            np.maximum(self.inner_first, other.inner_first), np.minimum(self.inner_last, other.inner_last),
            self.share * other.share, self.inner * other.inner, np.minimum(self.most, other.most),
            self.chosen or other.chosen,
        )  # fmt: skip

    @property
    def solid(self) -> bool:
        """Whether it is a plain range."""
        return all(np.ndim(v) == 0 and v == most for v, most in ((self.share, 1), (self.inner, 1), (self.most, np.inf)))

    @property
    def inside(self) -> tuple[Any, Any]:
        return np.maximum(self.first, self.inner_first), np.minimum(self.last, self.inner_last)

    def counts(self) -> Counts:
        width = np.clip(self.last - self.first + 1, 0, None)
        touched = np.minimum(width * self.share, self.most)
        low, high = self.inside
        inside = np.clip(high - low + 1, 0, None)
        if self.chosen:
            return touched, np.clip(touched * self.inner - (width - inside), 0, None)
        return touched, touched * inside * self.inner / np.maximum(width, 1)


def spans(expr: Boolean, tiles: cost.Tiles) -> list[Span]:
    """The alternatives of a mask."""
    if isinstance(expr, sympy.Or):
        return [span for arg in expr.args for span in spans(arg, tiles)]
    if isinstance(expr, sympy.And):
        return together(expr.args, tiles)
    return _spans(expr, tiles) if x.selected(expr) else tiles.once(("spans", expr), lambda: _spans(expr, tiles))


def together(exprs: Iterable[Boolean], tiles: cost.Tiles) -> list[Span]:
    """The alternatives where all of several expressions hold."""
    out: list[Span] = []
    for number, expr in enumerate(exprs):
        found = spans(expr, tiles)
        out = [a & b for a in out for b in found] if number else found
    return out


def _spans(expr: Boolean, tiles: cost.Tiles) -> list[Span]:
    end = tiles.key_tiles - 1
    if expr == sympy.true:
        return [Span(0, end, 0, end)]
    if expr == sympy.false:
        return []
    somewhere = Span(0, end, 1, 0)
    if isinstance(expr, sympy.Not):
        inner = expr.args[0]
        if isinstance(inner, (x.Touches, x.Listed)) and cost.tile_constant(inner, tiles):
            width = float(tiles.keys.real.sum(1).mean())
            return [Span(0, end, 0, end, share=max(0.0, 1 - float(inner.args[-1]) / max(1.0, width)))]
        return [somewhere]
    sides = x.sides(expr)
    if sides == {x.q}:
        if x.selected(expr):
            return [Span(0, end, 1, 0, share=hits(expr, x.q, tiles))]
        all_, some = (b.astype(bool) for b in tiles.bounds(expr))
        return [Span(0, np.where(some, end, -1), 0, np.where(all_, end, -1))]
    if sides == {x.k}:
        return [_of_keys(expr, tiles, end)]
    if isinstance(expr, Relational):
        return [_relation(expr, tiles, end)]
    constant = cost.tile_constant(expr, tiles)
    inside = (0, end) if constant else (1, 0)
    if isinstance(expr, x.Touches):
        low, high = tiles.bounds(expr.args[0])[0], tiles.bounds(expr.args[1])[1]
        distances = max(1.0, float(tiles.keys.real.sum(1).mean()))
        share = np.minimum(1.0, float(expr.args[-1]) * (high - low + 1) / distances)
        return [Span(0, end, *inside, share=share, chosen=True)]
    if isinstance(expr, x.Listed):
        low, high = tiles.bounds(expr.args[0])
        spread = cost.spread(tiles, expr.args[1])
        return [Span(0, end, *inside, most=float(expr.args[-1]) * (high - low + 1) * spread, chosen=True)]
    return [somewhere]


def _of_keys(expr: Boolean, tiles: cost.Tiles, end: int) -> Span:
    if x.selected(expr):
        return Span(0, end, 1, 0, share=_share(expr, tiles))
    all_, some = (b.astype(bool) & tiles.keys.real for b in tiles.bounds(expr))
    first, last = some.argmax(1)[:, None], end - some[:, ::-1].argmax(1)[:, None]
    last = np.where(some.any(1)[:, None], last, -1)
    count = some.sum(1)[:, None]
    share, inner = count / np.maximum(last - first + 1, 1), all_.sum(1)[:, None] / np.maximum(count, 1)
    share, inner = (1.0 if (v == 1).all() else v for v in (share, inner))
    return Span(first, last, first, last, share=share, inner=inner)


def _relation(expr: Relational, tiles: cost.Tiles, end: int) -> Span:
    parts = x.separate(expr)
    if parts is None or x.selected(parts[0]) or x.selected(parts[2]):
        mods = [m for m in expr.atoms(sympy.Mod) if x.sides(m)]
        tile = tiles.rows.tile
        if isinstance(expr, sympy.Eq) and mods:
            return Span(0, end, 1, 0, share=min(1.0, (2 * tile - 1) / modulus(mods[0])))
        return Span(0, end, 1, 0)
    f, op, g = parts
    (f0, f1), (g0, g1) = tiles.bounds(f), tiles.bounds(g)
    if op is sympy.Ne:
        same = _relation(sympy.Eq(f, g, evaluate=False), tiles, end)
        return Span(0, end, 0, end, inner=1 - same.counts()[0] / (end + 1))
    real = tiles.keys.real
    batch = max(len(f0), len(g0))
    g0, g1 = (np.where(real, v, FAR) for v in (g0, g1))
    f0, f1, g0, g1, real = (np.broadcast_to(v, (batch, v.shape[1])) for v in (f0, f1, g0, g1, real))
    if (g0[:, 1:] >= g0[:, :-1]).all() and (g1[:, 1:] >= g1[:, :-1]).all():
        found = _monotone(op, f0, f1, g0, g1, end)
        if found is not None:
            return found
    # In another order: how many tiles, not which.
    low, high = (np.sort(v, 1) for v in (g0, g1))
    many = np.maximum(real.sum(1)[:, None], 1)

    def below(value: np.ndarray, bound: np.ndarray, side: Any) -> np.ndarray:
        return np.stack([np.searchsorted(b, v, side) for v, b in zip(value, bound, strict=True)])

    touched, sure = {
        sympy.GreaterThan: lambda: (below(f1, low, "right"), below(f0, high, "right")),
        sympy.StrictGreaterThan: lambda: (below(f1, low, "left"), below(f0, high, "left")),
        sympy.LessThan: lambda: (many - below(f0, high, "left"), many - below(f1, low, "left")),
        sympy.StrictLessThan: lambda: (many - below(f0, high, "right"), many - below(f1, low, "right")),
        sympy.Eq: lambda: (below(f1, low, "right") - below(f0, high, "left"), np.zeros_like(f0)),
    }[op]()
    if op is sympy.Eq and (f0 == f1).all() and (g0 == g1).all():
        sure = touched
    return Span(0, end, 0, end, share=touched / (end + 1), inner=sure / np.maximum(touched, 1))


def _monotone(
    op: type[Relational], f0: np.ndarray, f1: np.ndarray, g0: np.ndarray, g1: np.ndarray, end: int
) -> Span | None:
    """``f(q) op g(k)`` where g only grows from key tile to key tile."""

    def upto(value: np.ndarray, bound: np.ndarray, side: Any) -> np.ndarray:
        return np.stack([np.searchsorted(b, v, side) - 1 for v, b in zip(value, bound, strict=True)])

    def since(value: np.ndarray, bound: np.ndarray, side: Any) -> np.ndarray:
        return np.stack([np.searchsorted(b, v, side) for v, b in zip(value, bound, strict=True)])

    make: dict[Any, Callable[[], Span]] = {
        sympy.GreaterThan: lambda: Span(0, upto(f1, g0, "right"), 0, upto(f0, g1, "right")),
        sympy.StrictGreaterThan: lambda: Span(0, upto(f1, g0, "left"), 0, upto(f0, g1, "left")),
        sympy.LessThan: lambda: Span(since(f0, g1, "left"), end, since(f1, g0, "left"), end),
        sympy.StrictLessThan: lambda: Span(since(f0, g1, "right"), end, since(f1, g0, "right"), end),
    }
    if op in make:
        return make[op]()
    if op is sympy.Eq:
        inner_last = np.where(f0 == f1, upto(f0, g1, "right"), -1)
        return Span(since(f0, g1, "left"), upto(f1, g0, "right"), since(f1, g0, "left"), inner_last)
    return None


def union(ranges: list[tuple[Any, Any]], each: np.ndarray, tiles: cost.Tiles) -> np.ndarray:
    """[B, tiles]: the key tiles that lie in any of the ranges ``first .. last``, summed by ``each`` [B, key tiles]."""
    shape = np.broadcast_shapes(
        (len(each), tiles.row_tiles), *(np.shape(bound) for pair in ranges for bound in pair)
    )  # fmt: skip
    total, upto = np.zeros(shape), np.full(shape, -1)
    if not ranges:
        return total
    sums = np.concatenate([np.zeros((len(each), 1)), np.cumsum(each, 1)], 1)
    sums = np.broadcast_to(sums, (shape[0], sums.shape[1]))
    first, last = (np.stack([np.broadcast_to(pair[i], shape) for pair in ranges]) for i in (0, 1))
    order = first.argsort(0)
    for low, high in zip(np.take_along_axis(first, order, 0), np.take_along_axis(last, order, 0), strict=True):
        begin, end = np.maximum(low, upto + 1), np.maximum(high + 1, 0)
        begin = np.minimum(begin, end)
        total = total + np.take_along_axis(sums, end, 1) - np.take_along_axis(sums, begin, 1)
        upto = np.maximum(upto, high)
    return total
