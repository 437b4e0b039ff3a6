"""Where a mask may reach: the walks over expressions that put together what their atoms say (`mmflex.ir.atoms`).

Three questions are asked, each with its own way to join answers under ``or`` and ``and``: at most how many key tiles a
query tile touches (index tables are that wide), how many it is expected to touch (prices), and until which position a
key is visible. Expressions of one side are answered here: they are bounds of a boolean on each tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, Generic, TypeVar

import numpy as np
import sympy
from sympy.logic.boolalg import Boolean

from ..ir import expr as x
from ..ir.atoms import Expectation, TileRange, atom_of
from .orders import NEVER
from .terms import CAUSAL, causality_in_ranks, terms
from .tiles import Tiles, chance_per_tile, count_at_most

Answer = TypeVar("Answer")


class _Question(Generic[Answer]):
    """What is asked of every atom, and how answers are joined."""

    name: str
    """Answers that follow from the layout alone are kept with the tiles under it."""

    def ask(self, expr: Boolean, tiles: Tiles) -> Answer:
        if isinstance(expr, sympy.Or):
            return self.any_of([self.ask(arg, tiles) for arg in expr.args])
        if isinstance(expr, sympy.And):
            return self.all_of([self.ask(arg, tiles) for arg in expr.args])
        if x.selected(expr):
            return self.of_atom(expr, tiles)
        return tiles.once((self.name, expr), lambda: self.of_atom(expr, tiles))

    def of_atom(self, expr: Boolean, tiles: Tiles) -> Answer:
        raise NotImplementedError

    def any_of(self, answers: Sequence[Answer]) -> Answer:
        raise NotImplementedError

    def all_of(self, answers: Sequence[Answer]) -> Answer:
        raise NotImplementedError


class _Alternatives(_Question[list[Any]]):
    """Answers are lists of alternatives: joined under ``or``, and each met with each under ``and``."""

    def any_of(self, answers: Sequence[list[Any]]) -> list[Any]:
        return [one for answer in answers for one in answer]

    def all_of(self, answers: Sequence[list[Any]]) -> list[Any]:
        return reduce(lambda these, those: [a.intersection(b) for a in these for b in those], answers)

    def together(self, exprs: Iterable[Boolean], tiles: Tiles) -> list[Any]:
        """The alternatives where all of several expressions hold."""
        return self.all_of([self.ask(expr, tiles) for expr in exprs])


class _AtMost(_Alternatives):
    """Ranges of key tiles that together hold every block where an expression may hold."""

    name = "at most"

    def of_atom(self, expr: Boolean, tiles: Tiles) -> list[TileRange]:
        last = tiles.key_tiles - 1
        if expr == sympy.false:
            return []
        if expr == sympy.true or isinstance(expr, sympy.Not):
            return [TileRange(0, last)]
        sides = x.sides(expr)
        if sides == {x.q}:
            if x.selected(expr):
                return [TileRange(0, last)]
            return [TileRange(0, np.where(tiles.bounds(expr)[1], last, -1))]
        if sides == {x.k}:
            if x.selected(expr):
                return [TileRange(0, last, count_at_most(expr, tiles.layout))]
            some = tiles.bounds(expr)[1] != 0
            first, final = some.argmax(1)[:, None], last - some[:, ::-1].argmax(1)[:, None]
            return [TileRange(first, np.where(some.any(1)[:, None], final, -1), some.sum(1)[:, None])]
        return atom_of(expr).at_most(tiles)


class _Expected(_Alternatives):
    """Where the alternatives of a mask are expected to hold: sets are taken as filled to their size."""

    name = "expected"

    def of_atom(self, expr: Boolean, tiles: Tiles) -> list[Expectation]:
        end = tiles.key_tiles - 1
        if expr == sympy.true:
            return [Expectation(0, end, 0, end)]
        if expr == sympy.false:
            return []
        if isinstance(expr, sympy.Not):
            inner = expr.args[0]
            if isinstance(inner, x.SetTest) and atom_of(inner).constant(tiles):
                left = max(0.0, 1 - float(inner.size) / max(1.0, tiles.mean_key_tiles))
                return [Expectation(0, end, 0, end, share=left)]
            return [Expectation(0, end, 1, 0)]
        sides = x.sides(expr)
        if sides == {x.q}:
            if x.selected(expr):
                return [Expectation(0, end, 1, 0, share=chance_per_tile(expr, x.q, tiles))]
            every, some = (b.astype(bool) for b in tiles.bounds(expr))
            return [Expectation(0, np.where(some, end, -1), 0, np.where(every, end, -1))]
        if sides == {x.k}:
            return [_of_keys(expr, tiles, end)]
        return atom_of(expr).expected(tiles)


def _of_keys(expr: Boolean, tiles: Tiles, end: int) -> Expectation:
    """What reads the key alone."""
    real = tiles.keys.occupied
    if x.selected(expr):
        share = float((chance_per_tile(expr, x.k, tiles) * real).sum() / max(1, real.sum()))
        return Expectation(0, end, 1, 0, share=share)
    every, some = (b.astype(bool) & real for b in tiles.bounds(expr))
    first, last = some.argmax(1)[:, None], end - some[:, ::-1].argmax(1)[:, None]
    last = np.where(some.any(1)[:, None], last, -1)
    count = some.sum(1)[:, None]
    share, inner = count / np.maximum(last - first + 1, 1), every.sum(1)[:, None] / np.maximum(count, 1)
    share, inner = (1.0 if (v == 1).all() else v for v in (share, inner))
    return Expectation(first, last, first, last, share=share, inner=inner)


class _LastVisible(_Question[np.ndarray | None]):
    """int [B or 1, key tiles or 1]: see `last_visible`."""

    name = "last visible"

    def any_of(self, answers: Sequence[np.ndarray | None]) -> np.ndarray | None:
        return _known(np.maximum, answers)

    def all_of(self, answers: Sequence[np.ndarray | None]) -> np.ndarray | None:
        return _known(np.minimum, answers)

    def ask(self, expr: Boolean, tiles: Tiles) -> np.ndarray | None:
        if isinstance(expr, (sympy.And, sympy.Or)):
            return super().ask(expr, tiles)
        return self.of_atom(expr, tiles)  # None is an answer too: nothing to keep

    def of_atom(self, expr: Boolean, tiles: Tiles) -> np.ndarray | None:
        if expr in (sympy.true, sympy.false):
            return np.array([[NEVER if expr == sympy.true else 0]])
        if x.selected(expr):
            return None
        if x.sides(expr) <= {x.k}:
            return np.where(tiles.bounds(expr)[0], NEVER, 0)
        if isinstance(expr, sympy.Not):
            return None
        return atom_of(expr).last_visible(tiles)


def _known(join: Any, answers: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [answer for answer in answers if answer is not None]
    return reduce(join, known) if len(known) == len(answers) else None


_at_most, _expected, _last_visible = _AtMost(), _Expected(), _LastVisible()


def touched_at_most(mask: Boolean, tiles: Tiles) -> np.ndarray:
    """[B, query tiles]: at most how many key tiles each query tile touches under a mask and causality."""
    total = np.zeros((1, tiles.row_tiles), np.int64)
    for term in terms(mask):
        for first, last, most in _at_most.together((term, CAUSAL, *causality_in_ranks(term)), tiles):
            total = total + np.clip(np.minimum(last - first + 1, most), 0, None)
    keys = int(tiles.keys.occupied.sum(1).max(initial=0))
    return np.asarray(np.where(tiles.rows.occupied, np.minimum(total, keys), 0))


def causal_tiles(tiles: Tiles) -> np.ndarray:
    """[B, query tiles]: key tiles that hold a key up to some query of the tile."""
    return tiles.once("causal", lambda: touched_at_most(sympy.true, tiles))


def expected_together(exprs: Iterable[Boolean], tiles: Tiles) -> list[Expectation]:
    """The alternatives where all of several expressions are expected to hold."""
    return _expected.together(exprs, tiles)


def last_visible(mask: Boolean, tiles: Tiles) -> np.ndarray | None:
    """Of masks that keep a key visible to one run of queries from the key on (sinks, local windows): where it ends.

    A gathered column that such a mask shows for a while leaves no hole in the main section: its own section shows it
    from where the mask ends. One comparison covers both, and no block of the window becomes partial.

    Args:
        mask: has one value on every block.

    Returns:
        int32 [B, key slots]: for each key the position from which on the mask holds for no query of the launch (0: for
        none, `NEVER`: it holds to the end). None where the queries that see a key are not one run from the key on.
    """
    ends = _last_visible.ask(mask, tiles)
    shape = len(tiles.keys.occupied), tiles.key_tiles
    return None if ends is None else np.broadcast_to(ends, shape).astype(np.int32).repeat(tiles.keys.tile, 1)
