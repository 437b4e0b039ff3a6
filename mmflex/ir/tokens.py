"""What patterns build their mask expressions from: the tokens of a query and of a key, seen through a scope."""

from __future__ import annotations

import operator
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from . import expr as x
from .atoms import Listed, Member, Touches
from .layout import TokenLayout
from .shown import clipped, shown
from .validate import check_mask, check_type
from .view import Scope

LARGEST_TABLE = 1 << 28
"""Most entries of one head's block table: enough for blocks of 64 at a million tokens."""


class Tokens:
    """What a pattern builds its expression from: the tokens q and k as seen through a scope.

    ``t.q`` and ``t.k`` are positions, or ranks within the key modality where the pattern is restricted to one;
    ``t.row`` is q's rank among the queries in scope. `sink`, `local`, `last`, `diagonals` and `blocks` round outwards
    to whole tiles, which makes blocks full and costs nothing: the blocks are touched anyway. `columns` and `residue`
    are token-exact; for other token-exact masks compare ``t.q`` and ``t.k`` yourself.
    """

    def __init__(self, layout: TokenLayout, tile: int, scope: Scope | None = None, leaves: dict | None = None) -> None:
        self.layout, self.tile, self.scope = layout, tile, scope or Scope()
        self.leaves: dict[str, tuple[Any, Scope]] = {} if leaves is None else leaves
        self._leaf = ""

    def restrict(self, query: int | None, key: int | None) -> Tokens:
        """The same tokens through a narrower scope."""
        scope = Scope(self.scope.query if query is None else query, self.scope.key if key is None else key)
        return Tokens(self.layout, self.tile, scope, self.leaves)

    def leaf(self, pattern: Any) -> Boolean:
        """The expression of a leaf, a pattern that is no composition; equal leaves in equal scopes share their sets."""
        t = Tokens(self.layout, self.tile, self.scope, self.leaves)
        t._leaf = pattern.identity() + (f"[{self.scope}]" if str(self.scope) else "")
        self.leaves[t._leaf] = (pattern, self.scope)
        try:
            expr = pattern.mask(t)
        except ZeroDivisionError as error:
            raise ValueError(f"{clipped(pattern)}: its mask divides by zero ({error}): use 1 or more") from None
        if isinstance(expr, bool):
            raise TypeError(
                f"{type(pattern).__name__}.mask returned {expr}: == and != compare the expressions themselves, write "
                "sympy.Eq(a, b) and sympy.Ne(a, b) (sympy.true and sympy.false for everything and nothing)"
            )
        return x.tiled(check_type(expr, clipped(pattern)))

    # ---- coordinates ----------------------------------------------------------------------------------------------

    @property
    def q(self) -> sympy.Expr:
        """Where the query stands, counted in keys in scope."""
        return x.q if self.scope.key is None else x.Rank(x.q, self.scope.key)

    @property
    def k(self) -> sympy.Expr:
        """The key, counted in keys in scope."""
        return x.k if self.scope.key is None else x.Rank(x.k, self.scope.key)

    @property
    def row(self) -> sympy.Expr:
        """The query, counted in queries in scope."""
        return x.q if self.scope.query is None else x.Rank(x.q, self.scope.query)

    @property
    def q_cell(self) -> sympy.Expr:
        return x.Cell(x.q)

    @property
    def k_cell(self) -> sympy.Expr:
        return x.Cell(x.k)

    @property
    def q_frame(self) -> sympy.Expr:
        return x.Frame(x.q)

    @property
    def k_frame(self) -> sympy.Expr:
        return x.Frame(x.k)

    @property
    def q_segment(self) -> sympy.Expr:
        return x.SegmentOf(x.q)

    @property
    def k_segment(self) -> sympy.Expr:
        return x.SegmentOf(x.k)

    def _hull(self) -> tuple[sympy.Expr, sympy.Expr]:
        """The first and the last key tile that the queries of q's tile fall into."""
        if self.scope.query == self.scope.key:
            return x.Tile(self.q, self.tile), x.Tile(self.q, self.tile)
        rows, keys = (x.ALL if m is None else m for m in (self.scope.query, self.scope.key))
        return x.FirstTile(x.q, rows, keys, self.tile), x.LastTile(x.q, rows, keys, self.tile)

    # ---- parts, most of them rounded outwards to tiles -------------------------------------------------------------

    def capped(self, n: int) -> int:
        """``n``, at most the prompt's length: a larger budget selects no more, and need not fit the kernels' int32."""
        return min(_whole(n, "a budget of tokens"), self.layout.length)

    def residue(self, value: sympy.Expr, stride: int | sympy.Expr, phase: int | sympy.Expr = 0) -> Boolean:
        """``value = phase (mod stride)`` of a position, a rank or a distance. Token-exact."""
        if isinstance(stride, int) and isinstance(phase, int):
            phase, reach = phase % stride, self.layout.length
            if phase > reach:
                return sympy.false
            # Beyond twice the prompt's length a stride meets each residue at most once, whatever it is.
            stride = min(stride, 2 * reach + 2)
        return sympy.Eq(x.mod(value - phase, sympy.sympify(stride)), 0)

    def sink(self, n: int) -> Boolean:
        """The first n keys, and the rest of their last tile."""
        return x.Tile(self.k, self.tile) < -(-self.capped(n) // self.tile)

    def local(self, n: int) -> Boolean:
        """The last n keys up to the query itself, and the rest of the tiles that hold them for a query of its tile."""
        if n == 0:
            return sympy.false
        return self._hull()[0] - x.Tile(self.k, self.tile) <= -(-(self.capped(n) - 1) // self.tile)

    def last(self, n: int) -> Boolean:
        """The last n queries in scope, and the rest of the tiles that hold them."""
        scope = x.ALL if self.scope.query is None else self.scope.query
        return x.Behind(x.q, scope, self.tile) < self.capped(n)

    def columns(self, name: str, at_most: int) -> Boolean:
        """Keys that selection put into ``name``: a bool tensor [B, H, `View.size`]."""
        return Member(self.k, self._name(name), self.capped(at_most))

    def diagonals(self, name: str, at_most: int) -> Boolean:
        """Block diagonals (tile of q less tile of k) in ``name``: a bool tensor [B, H, `View.tiles`]."""
        first, last = self._hull()
        return Touches(first, last, x.Tile(self.k, self.tile), self._name(name), self.capped(at_most))

    def blocks(self, name: str, at_most: int, size: int | None = None) -> Boolean:
        """Blocks of ``size`` (the tile) in the table ``name``, a bool tensor [B, H, query blocks, key blocks] counted
        from the first query and key in scope; at most ``at_most`` key blocks for a query block."""
        size = self.tile if size is None else min(_whole(size, "a block size", 1), max(self.layout.length, self.tile))
        rows, keys = (-(-self.layout.most(m) // size) for m in (self.scope.query, self.scope.key))
        if rows * keys > LARGEST_TABLE:
            raise ValueError(
                f"{self._leaf}: blocks of {size} make a table of {rows} x {keys} for each head, {LARGEST_TABLE} "
                "entries are the most: use larger blocks"
            )
        return Listed(x.Tile(self.row, size), x.Tile(self.k, size), self._name(name), self.capped(at_most))

    def number(self, name: str, at_least: int = 0) -> sympy.Expr:
        """A selected integer per head, ``name``: an int tensor [B, H]."""
        return x.Number(str(self._name(name)), min(_whole(at_least, "at_least"), max(1, self.layout.length)))

    def _name(self, name: str) -> sympy.Symbol:
        if not isinstance(name, str) or not name or set(name) & set("@["):
            raise ValueError(f"{self._leaf}: a set or number is named {shown(name)}: use a word without '@' and '['")
        return sympy.Symbol(f"{name}@{self._leaf}")


def denoted(pattern: Any, t: Tokens) -> Boolean:
    """The expression of a pattern, checked: see `mmflex.ir.validate`."""
    return check_mask(pattern.denote(t), clipped(pattern), t.layout, t.tile, t.leaves)


def _whole(value: Any, what: str, least: int = 0) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} is {shown(value)}: use a whole number") from None
    if number < least:
        raise ValueError(f"{what} is {shown(number)}: use {least} or more")
    return number
