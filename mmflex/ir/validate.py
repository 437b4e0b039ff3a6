"""What a mask expression may be, checked before anything is made of it: kernels compute in int32 and look up tables
without bounds checks.

`check_mask` goes through an expression once, with the least and greatest value that each part of it can take for the
layout at hand. `set_shape` says what selection has to return for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanAtom

from . import expr as x
from .layout import TokenLayout
from .segments import MODALITY_NAMES
from .shown import shown
from .view import Scope, View

INT32 = (1 << 31) - 1

NUMBER = 1 << 29
"""Assumed bound on the magnitude of a number that selection finds; `check_selected` enforces it."""

ALTERNATIVES = 512
"""Terms that an expression may come apart into, see `alternatives`: the compiler looks at each of them."""

NODES, DEPTH = 20_000, 100
"""Limits on an expression: symbols, numbers and operators in all, and nesting depth."""


class Interval(NamedTuple):
    """Least and greatest value."""

    low: int
    high: int

    @property
    def reach(self) -> int:
        """The greatest magnitude."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class _Walk:
    """One expression being checked.

    Attributes:
        named: whose it is, for messages. leaves: the patterns that select for themselves, by name.
    """

    named: str
    layout: TokenLayout
    tile: int
    leaves: Mapping[str, tuple[Any, Scope]]
    kinds: dict[str, Any] = field(default_factory=dict)

    # ---- conditions --------------------------------------------------------------------------------------------------

    def condition(self, e: sympy.Basic) -> None:
        if isinstance(e, BooleanAtom):
            return
        if isinstance(e, (sympy.And, sympy.Or, sympy.Not)):
            for arg in e.args:
                self.condition(arg)
        elif isinstance(e, Relational) and e.func in x.OPERATOR:
            self.relation(e)
        elif isinstance(e, x.SetTest):
            self.set_test(e)
        elif isinstance(e, sympy.Symbol):
            raise TypeError(f"{self.named}: its mask is made of {shown(e)}, a name that has no meaning here")
        else:
            raise self.foreign(e)

    def relation(self, e: Relational) -> None:
        for side in e.args:
            self.value(side)
        apart = x.separate(e)
        if apart is not None:  # the compiler moves terms from side to side
            self.value(apart[0]), self.value(apart[2])

    def set_test(self, e: x.SetTest) -> None:
        name, size = e.args[-2:]
        if not isinstance(name, sympy.Symbol) or not isinstance(size, sympy.Integer) or size < 0:
            raise TypeError(f"{self.named}: {shown(e)} is not a set: use t.columns, t.diagonals or t.blocks")
        asked = _places(e, self.layout, self.scope_of(e.set_name), self.tile)
        self.named_once(e.set_name, (type(e), asked))
        for coordinate, places in zip(e.coordinates, asked, strict=True):
            low, high = self.value(coordinate)
            if low < -1 or high > places:
                raise ValueError(
                    f"{self.named}: {shown(coordinate)} runs from {low} to {high}, and the set that it is looked up in "
                    f"has the places 0 to {places - 1}: use t.columns, t.diagonals or t.blocks"
                )

    def scope_of(self, name: str) -> Scope:
        """The scope that a set or number is selected in."""
        _, _, leaf = name.partition("@")
        if leaf not in self.leaves:
            raise ValueError(
                f"{self.named}: nothing selects {shown(name)}: name sets and numbers by t.columns, t.diagonals, "
                "t.blocks and t.number"
            )
        return self.leaves[leaf][1]

    def named_once(self, name: str, kind: Any) -> None:
        """ValueError where one name stands for two kinds of sets or numbers."""
        if self.kinds.setdefault(name, kind) != kind:
            raise ValueError(
                f"{self.named}: its mask uses the name {x.short(name)!r} for different sets or numbers: give each one "
                "of its own"
            )

    # ---- values ------------------------------------------------------------------------------------------------------

    def value(self, e: sympy.Basic) -> Interval:
        """The interval of an integer expression."""
        if isinstance(e, sympy.Integer):
            return self.fits(e, Interval(int(e), int(e)))
        if isinstance(e, x.Number):
            self.scope_of(str(e))
            self.named_once(str(e), (x.Number, e.at_least))
            return Interval(-NUMBER, NUMBER)
        if e in (x.q, x.k):
            return Interval(-1, self.layout.most(None) - 1)
        if isinstance(e, sympy.Symbol):
            raise ValueError(
                f"{self.named}: {shown(e)} is neither t.q nor t.k nor a number from t.number(...): masks are made of "
                "those, of attributes of tokens and of whole numbers"
            )
        if isinstance(e, x._Attribute):
            return self.attribute(e)
        if isinstance(e, sympy.Add):
            return self.sum_of(e.args, [self.value(arg) for arg in e.args])
        if isinstance(e, sympy.Mul):
            return self.product_of(e, [self.value(arg) for arg in e.args])
        if isinstance(e, sympy.Mod):
            return self.residue(e)
        if isinstance(e, x.Tile):
            (low, high), size = self.value(e.args[0]), self.divisor(e, e.args[1])
            return Interval(low // size, high // size)
        raise self.foreign(e)

    def attribute(self, e: x._Attribute) -> Interval:
        token, *scopes = e.args
        known = {x.ALL, *MODALITY_NAMES}
        tiled = isinstance(e, x.FirstTile)  # and what derives from it: their last argument is a size
        if token not in (x.q, x.k) or any(m not in known for m in (scopes[:-1] if tiled else scopes)):
            raise ValueError(
                f"{self.named}: {shown(e)} is not an attribute of t.q or t.k: use t.q, t.k, t.row and those of Tokens"
            )
        field = {x.Modality: "modality", x.SegmentOf: "segment", x.Frame: "frame", x.Cell: "cell"}.get(type(e))
        if field is not None:
            return _range(getattr(self.layout, field))
        counted = scopes[1] if type(e) in (x.FirstTile, x.LastTile) else scopes[0]
        most = self.layout.most(None if counted == x.ALL else int(counted))
        size = self.divisor(e, scopes[-1]) if tiled else 1
        return Interval(-1, most if isinstance(e, (x.Rank, x.Behind)) else (most - 1) // size)

    def residue(self, e: sympy.Mod) -> Interval:
        value, modulus = e.args
        self.value(value)
        if isinstance(modulus, x.Number):
            self.value(modulus)
            if modulus.at_least < 1:
                raise ValueError(
                    f"{self.named}: {shown(e)} divides by {x.short(modulus.name)!r}, which may be 0: "
                    "write t.number(name, at_least=1)"
                )
            return Interval(0, NUMBER)
        return Interval(0, self.divisor(e, modulus) - 1)

    def divisor(self, e: sympy.Basic, value: sympy.Basic) -> int:
        if not isinstance(value, sympy.Integer) or value < 1:
            raise ValueError(f"{self.named}: {shown(e)} divides by {shown(value)}: use a whole number, 1 or more")
        return self.fits(e, Interval(0, int(value))).high

    def sum_of(self, terms: tuple[Any, ...], values: list[Interval]) -> Interval:
        """In any order, and with any signs."""
        reach = sum(value.reach for value in values)
        self.fits(terms, Interval(-reach, reach))
        return Interval(sum(value.low for value in values), sum(value.high for value in values))

    def product_of(self, e: sympy.Basic, values: list[Interval]) -> Interval:
        low, high = 1, 1
        for value in values:
            corners = [a * b for a in (low, high) for b in value]
            low, high = min(corners), max(corners)
        reach = prod(max(1, value.reach) for value in values)
        self.fits(e, Interval(-reach, reach))
        return Interval(low, high)

    def fits(self, e: Any, value: Interval) -> Interval:
        if value.reach > INT32:
            what = " and ".join(map(shown, e)) if isinstance(e, tuple) else shown(e)
            raise ValueError(
                f"{self.named}: with {self.layout.length} tokens, {what} may reach {shown(value.reach)}, and kernels "
                f"compute in int32, up to {INT32}: use smaller numbers"
            )
        return value

    def foreign(self, e: sympy.Basic) -> TypeError:
        return TypeError(
            f"{self.named}: a mask expression cannot hold {type(e).__name__} ({shown(e)}): use + - * mod // by whole "
            "numbers, comparisons and & | ~"
        )


def check_mask(
    expr: Any, named: str, layout: TokenLayout, tile: int, leaves: Mapping[str, tuple[Any, Scope]]
) -> Boolean:
    """The expression; TypeError, ValueError where it is not a mask expression, is too large to compile, or may overflow
    int32 with this layout.

    Args:
        named: whose it is, for messages. tile: block size. leaves: what selects for itself, by name.
    """
    nodes, depth = _size(check_type(expr, named))
    if nodes > NODES or depth > DEPTH:
        raise ValueError(
            f"{named}: its mask has more than {nodes - 1} parts, nested {depth} deep: {NODES} parts and {DEPTH} levels "
            "are the most that can be compiled"
        )
    _Walk(named, layout, tile, leaves).condition(expr)
    count = alternatives(expr)
    if count > ALTERNATIVES:
        raise ValueError(
            f"{named}: its mask comes apart into {shown(count)} alternatives, {ALTERNATIVES} are the most that can be "
            "compiled: intersections multiply those of both sides; intersect before you unite"
        )
    return expr


def check_type(expr: Any, named: str) -> Boolean:
    """The expression; TypeError where it is none."""
    if not isinstance(expr, Boolean):
        raise TypeError(
            f"{named}: its mask is {shown(expr)}, not a mask expression: return a condition such as t.q - t.k < 9 "
            "(sympy.true and sympy.false for everything and nothing)"
        )
    return expr


def _size(expr: sympy.Basic) -> tuple[int, int]:
    """(nodes, depth) of an expression, counted no further than what is allowed."""
    nodes, deepest, todo = 0, 0, [(expr, 1)]
    while todo and nodes <= NODES and deepest <= DEPTH:
        e, depth = todo.pop()
        nodes, deepest = nodes + 1, max(deepest, depth)
        todo += [(arg, depth + 1) for arg in e.args]
    return nodes, deepest


def alternatives(expr: sympy.Basic) -> int:
    """How many terms an expression has once every And is distributed over its Ors."""
    if isinstance(expr, sympy.Or):
        return sum(map(alternatives, expr.args))
    if isinstance(expr, sympy.And):
        return prod(map(alternatives, expr.args))
    return 1


def _range(values: np.ndarray) -> Interval:
    return Interval(int(values.min(initial=0)), int(values.max(initial=0)))


# ---- what selection returns ------------------------------------------------------------------------------------------


def _places(test: Any, layout: TokenLayout, scope: Scope, tile: int) -> tuple[int, ...]:
    """How many places each coordinate of a set test has: see `mmflex.ir.atoms`."""
    return test.places(layout.most(scope.query), layout.most(scope.key), tile)


@lru_cache(maxsize=1024)
def _reads(expr: sympy.Basic) -> Mapping[str, sympy.Basic]:
    """Name -> the set test or number of that name."""
    tests = {test.set_name: test for test in expr.atoms(x.SetTest)}
    return tests | {str(number): number for number in expr.atoms(x.Number)}


def reader(exprs: Iterable[sympy.Basic], name: str) -> sympy.Basic | None:
    """The set test or number in masks that reads what selection returns as ``name``; None where nothing does."""
    return next((_reads(expr)[name] for expr in exprs if name in _reads(expr)), None)


def set_shape(read: sympy.Basic, view: View) -> tuple[int, ...]:
    """The shape of what a set test or number reads, without [B, H]."""
    if isinstance(read, x.Number):
        return ()
    assert isinstance(read, x.SetTest)
    return read.table_shape(_places(read, view.layout, view.scope, view.tile))  # type: ignore[attr-defined]
