"""The atoms of mask expressions, each with everything that the compiler asks about it.

An expression is built of atoms with ``and``, ``or`` and ``not``. An atom compares the two tokens (`Comparison`, around
a sympy relation) or tests whether they lie in a set that selection filled (`Member`, `Touches`, `Listed`). Whoever adds
an atom writes one class here; the walks over expressions (`mmflex.compiler.reach`, `mmflex.runtime.classify`,
`mmflex.runtime.masks`) ask it:

====================  ==================================================================================================
``constant(tiles)``   whether it has one value on every block: it then costs no mask, only list entries
``at_most(tiles)``    ranges of key tiles that hold every block where it may hold: widths of index tables rest on them
``expected(tiles)``   where it is expected to hold before any input is seen: prices rest on it
``last_visible``      for each key, the position from which on it holds for no query (for masks that hold in one run)
``classify(writer)``  source of "somewhere" and "everywhere" in a block, from bounds of its sides
``on_tokens(values)`` its value for tokens, as a tensor
``look_up(writer)``   source of its value within a mask_mod
``places(...)``       of a set test: how many values each coordinate may take, of so many queries and keys in scope; the
                      table that selection returns has the shape ``table_shape(places)``
====================  ==================================================================================================

The arguments belong to the compiler and the runtime, of which this module knows only what it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from . import expr as x

UNBOUNDED = 1 << 40
"""More key tiles than any prompt has, and past every key."""

STRIDE_GUESS = 4
"""A searched stride is expected at this many times the least one."""


class TileRange(NamedTuple):
    """Key tiles ``first .. last`` of every query tile, and at most how many of them: integers, or integers that
    broadcast to [B, query tiles]."""

    first: Any
    last: Any
    most: Any = UNBOUNDED

    def intersection(self, other: TileRange) -> TileRange:
        return TileRange(
            np.maximum(self.first, other.first), np.minimum(self.last, other.last), np.minimum(self.most, other.most)
        )


@dataclass(frozen=True, eq=False)
class Expectation:
    """Where one alternative of a mask is expected to hold. Arrays broadcast to [B, query tiles].

    Attributes:
        first, last: key tiles between which it may hold somewhere. share: the fraction of them where it does. most: a
            bound on their number.
        inner_first, inner_last: key tiles between which it may hold everywhere. inner: the share of them where it does.
        selected: selection says which, and is assumed nearest-first.
    """

    first: Any
    last: Any
    inner_first: Any
    inner_last: Any
    share: Any = 1.0
    inner: Any = 1.0
    most: Any = float("inf")
    selected: bool = False

    def intersection(self, other: Expectation) -> Expectation:
        return Expectation(
            np.maximum(self.first, other.first), np.minimum(self.last, other.last),
            np.maximum(self.inner_first, other.inner_first), np.minimum(self.inner_last, other.inner_last),
            self.share * other.share, self.inner * other.inner, np.minimum(self.most, other.most),
            self.selected or other.selected,
        )  # fmt: skip

    @property
    def solid(self) -> bool:
        """Whether it is a plain range of tiles."""
        return all(np.ndim(v) == 0 and v == most for v, most in ((self.share, 1), (self.inner, 1), (self.most, np.inf)))

    @property
    def inside(self) -> tuple[Any, Any]:
        """First and last key tile that may be full."""
        return np.maximum(self.first, self.inner_first), np.minimum(self.last, self.inner_last)

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of each query tile: touched, and full among them."""
        width = np.clip(self.last - self.first + 1, 0, None)
        touched = np.minimum(width * self.share, self.most)
        low, high = self.inside
        inside = np.clip(high - low + 1, 0, None)
        if self.selected:
            return touched, np.clip(touched * self.inner - (width - inside), 0, None)
        return touched, touched * inside * self.inner / np.maximum(width, 1)


def expected_modulus(residue: sympy.Mod) -> int:
    """The modulus of a residue, or what a searched one is expected to be."""
    s = residue.args[1]
    return max(1, int(s) if s.is_Integer else STRIDE_GUESS * int(getattr(s, "at_least", 1)))


# ---- comparisons -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A sympy relation between the two tokens, taken apart as ``f(q) op g(k)`` where it can be."""

    relation: Relational

    @property
    def apart(self) -> tuple[sympy.Expr, type[Relational], sympy.Expr] | None:
        return x.separate(self.relation)

    def _known(self) -> tuple[sympy.Expr, type[Relational], sympy.Expr] | None:
        """`apart`, where both sides follow from the layout."""
        apart = self.apart
        return None if apart is None or x.selected(apart[0]) or x.selected(apart[2]) else apart

    def constant(self, tiles: Any) -> bool:
        apart = self.apart
        return apart is not None and all(tiles.constant(side) for side in (apart[0], apart[2]))

    def at_most(self, tiles: Any) -> list[TileRange]:
        low: Any = 0
        high: Any = tiles.key_tiles - 1
        known = self._known()
        if known is None:
            return [TileRange(low, high)]
        (f0, f1), (g0, g1) = tiles.bounds(known[0]), tiles.bounds(known[2])
        batch = max(len(f0), len(g0))
        f0, f1, g0, g1 = (np.broadcast_to(v, (batch, v.shape[1])) for v in (f0, f1, g0, g1))
        op = known[1]
        if (np.diff(g0, axis=1) >= 0).all() and op in (sympy.GreaterThan, sympy.StrictGreaterThan, sympy.Eq):
            high = _search(g0, f1, "left" if op is sympy.StrictGreaterThan else "right") - 1
        if (np.diff(g1, axis=1) >= 0).all() and op in (sympy.LessThan, sympy.StrictLessThan, sympy.Eq):
            low = _search(g1, f0, "right" if op is sympy.StrictLessThan else "left")
        return [TileRange(np.maximum(low, 0), np.minimum(high, tiles.key_tiles - 1))]

    def expected(self, tiles: Any) -> list[Expectation]:
        end = tiles.key_tiles - 1
        known = self._known()
        if known is None:
            residues = [m for m in self.relation.atoms(sympy.Mod) if x.sides(m)]
            if isinstance(self.relation, sympy.Eq) and residues:
                share = min(1.0, (2 * tiles.rows.tile - 1) / expected_modulus(residues[0]))
                return [Expectation(0, end, 1, 0, share=share)]
            return [Expectation(0, end, 1, 0)]
        f, op, g = known
        if op is sympy.Ne:
            (same,) = Comparison(sympy.Eq(f, g, evaluate=False)).expected(tiles)
            return [Expectation(0, end, 0, end, inner=1 - same.counts()[0] / (end + 1))]
        (f0, f1), (g0, g1) = tiles.bounds(f), tiles.bounds(g)
        occupied = tiles.keys.occupied
        batch = max(len(f0), len(g0))
        g0, g1 = (np.where(occupied, v, np.int64(UNBOUNDED)) for v in (g0, g1))
        f0, f1, g0, g1, occupied = (np.broadcast_to(v, (batch, v.shape[1])) for v in (f0, f1, g0, g1, occupied))
        if (g0[:, 1:] >= g0[:, :-1]).all() and (g1[:, 1:] >= g1[:, :-1]).all():
            return [_where_keys_ascend(op, f0, f1, g0, g1, end)]
        return [_how_many(op, f0, f1, g0, g1, np.maximum(occupied.sum(1)[:, None], 1), end)]

    def last_visible(self, tiles: Any) -> np.ndarray | None:
        known = self._known()
        if known is None or x.sides(self.relation) != {x.q, x.k}:
            return None
        if known[1] not in (sympy.LessThan, sympy.StrictLessThan):
            return None
        values, of_k, (positions, last) = tiles.bounds(known[0])[0], tiles.bounds(known[2])[0], tiles.bounds(x.q)
        side: Literal["left", "right"] = "left" if known[1] is sympy.StrictLessThan else "right"
        out = []
        for real, value, position, end, key in zip(tiles.rows.occupied, values, positions, last, of_k, strict=True):
            value, position = value[real], position[real]
            if (np.diff(value) < 0).any() or (position[1:] <= end[real][:-1]).any():
                return None  # the queries that see a key are not one run
            out.append(np.append(position, tiles.never)[np.searchsorted(value, key, side)])
        return np.stack(out)

    def classify(self, writer: Any) -> tuple[str, str]:
        apart = self.apart
        if apart is None:
            return "True", "False"
        f, op, g = apart
        (f0, f1), (g0, g1), sign = writer.bounds(f), writer.bounds(g), x.OPERATOR[op]
        if op in (sympy.GreaterThan, sympy.StrictGreaterThan):
            return f"({f1} {sign} {g0})", f"({f0} {sign} {g1})"
        if op in (sympy.LessThan, sympy.StrictLessThan):
            return f"({f0} {sign} {g1})", f"({f1} {sign} {g0})"
        some, every = f"(({f0} <= {g1}) & ({g0} <= {f1}))", f"(({f0} == {f1}) & ({g0} == {g1}) & ({f0} == {g0}))"
        return (some, every) if op is sympy.Eq else (f"(~{every})", f"(~{some})")


def _search(bounds: np.ndarray, values: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
    """``searchsorted`` prompt by prompt: int [B, query tiles]."""
    return np.stack([np.searchsorted(b, v, side) for b, v in zip(bounds, values, strict=True)])


def _where_keys_ascend(
    op: type[Relational], f0: np.ndarray, f1: np.ndarray, g0: np.ndarray, g1: np.ndarray, end: int
) -> Expectation:
    """``f(q) op g(k)`` where g only grows from key tile to key tile: which tiles."""
    make: dict[Any, Callable[[], Expectation]] = {
        sympy.GreaterThan: lambda: Expectation(0, _search(g0, f1, "right") - 1, 0, _search(g1, f0, "right") - 1),
        sympy.StrictGreaterThan: lambda: Expectation(0, _search(g0, f1, "left") - 1, 0, _search(g1, f0, "left") - 1),
        sympy.LessThan: lambda: Expectation(_search(g1, f0, "left"), end, _search(g0, f1, "left"), end),
        sympy.StrictLessThan: lambda: Expectation(_search(g1, f0, "right"), end, _search(g0, f1, "right"), end),
        sympy.Eq: lambda: Expectation(
            _search(g1, f0, "left"), _search(g0, f1, "right") - 1,
            _search(g0, f1, "left"), np.where(f0 == f1, _search(g1, f0, "right") - 1, -1),
        ),
    }  # fmt: skip
    return make[op]()


def _how_many(
    op: type[Relational], f0: np.ndarray, f1: np.ndarray, g0: np.ndarray, g1: np.ndarray, many: np.ndarray, end: int
) -> Expectation:
    """The same with keys in any order: how many tiles (of ``many``), not which."""
    low, high = np.sort(g0, 1), np.sort(g1, 1)
    make: dict[Any, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        sympy.GreaterThan: lambda: (_search(low, f1, "right"), _search(high, f0, "right")),
        sympy.StrictGreaterThan: lambda: (_search(low, f1, "left"), _search(high, f0, "left")),
        sympy.LessThan: lambda: (many - _search(high, f0, "left"), many - _search(low, f1, "left")),
        sympy.StrictLessThan: lambda: (many - _search(high, f0, "right"), many - _search(low, f1, "right")),
        sympy.Eq: lambda: (_search(low, f1, "right") - _search(high, f0, "left"), np.zeros_like(f0)),
    }
    touched, sure = make[op]()
    if op is sympy.Eq and (f0 == f1).all() and (g0 == g1).all():
        sure = touched
    return Expectation(0, end, 0, end, share=touched / (end + 1), inner=sure / np.maximum(touched, 1))


# ---- sets that selection fills ---------------------------------------------------------------------------------------


class Member(x.SetTest):
    """``Member(x, name, n)``: x is in the head's set ``name`` of at most n elements (a bitmap over x).

    It reads one token alone, as columns do, so block lists rest on its bounds over tiles and on how many tokens it can
    hold for (`mmflex.compiler.tiles`)."""

    def constant(self, tiles: Any) -> bool:
        return False

    def places(self, rows: int, keys: int, tile: int) -> tuple[int, ...]:
        return (keys,)

    def table_shape(self, places: tuple[int, ...]) -> tuple[int, ...]:
        return places

    def on_tokens(self, values: Any) -> Any:
        if self.args[0] == x.k:
            bitmap = values.bitmap_of_keys(self.set_name)
            if bitmap is not None:  # key slots are positions: nothing to look up
                return bitmap
        return values.test(self, values.of(self.args[0]))

    def look_up(self, writer: Any) -> str:
        # Ranks may be -1 (before the first of a modality) or the size: tables start one early and end one late.
        index = writer.source(self.args[0])
        return f"({writer.bitmap(self.set_name)}[b, h, {index} + 1] == 1)"

    def _sympystr(self, printer: Any) -> str:
        return f"({printer._print(self.args[0])} in {self.args[1]})"

    def _latex(self, printer: Any) -> str:
        return rf"{printer._print(self.args[0])} \in \mathrm{{{x.short(self.set_name)}}}"


class _OfBlocks(x.SetTest):
    """Sets of pairs of tiles."""

    def constant(self, tiles: Any) -> bool:
        return all(tiles.constant(e) for e in self.coordinates)

    def _reads_selection(self) -> bool:
        return any(x.selected(e) for e in self.coordinates)

    def last_visible(self, tiles: Any) -> np.ndarray | None:
        return None


class Touches(_OfBlocks):
    """``Touches(first, last, key, name, n)``: one of ``first - key ... last - key`` is in the head's set ``name`` of at
    most n block diagonals. ``first == last`` for tiles of the same coordinate."""

    def places(self, rows: int, keys: int, tile: int) -> tuple[int, ...]:
        return (-(-keys // tile),) * 3

    def table_shape(self, places: tuple[int, ...]) -> tuple[int, ...]:
        return places[:1]

    def at_most(self, tiles: Any) -> list[TileRange]:
        end = tiles.key_tiles - 1
        if self._reads_selection():
            return [TileRange(0, end)]
        low, high = tiles.bounds(self.args[0])[0], tiles.bounds(self.args[1])[1]
        diagonals = self.size * (high - low + 1).astype(np.int64)
        return [TileRange(0, end, diagonals * tiles.tiles_per_value(self.args[2]))]

    def expected(self, tiles: Any) -> list[Expectation]:
        low, high = tiles.bounds(self.args[0])[0], tiles.bounds(self.args[1])[1]
        share = np.minimum(1.0, float(self.size) * (high - low + 1) / max(1.0, tiles.mean_key_tiles))
        return [_of_selected_blocks(self, tiles, share=share)]

    def classify(self, writer: Any) -> tuple[str, str]:
        (a0, a1), (b0, b1), (k0, k1) = (writer.bounds(e) for e in self.coordinates)
        below = [writer.count_below(self.set_name, i) for i in (f"{b1} - {k0} + 1", f"{a0} - {k1}")]
        some = f"({below[0]} > {below[1]})"
        return some, f"({some} & ({a0} == {a1}) & ({b0} == {b1}) & ({k0} == {k1}))"

    def on_tokens(self, values: Any) -> Any:
        first, last, key = (values.of(e) for e in self.coordinates)
        return values.test(self, first - key, last - key)

    def look_up(self, writer: Any) -> str:
        first, last, key = (writer.source(e) for e in self.coordinates)
        counts, reach = writer.counts_below(self.set_name)
        low, high = f"({first} - {key} + {reach})", f"({last} - {key} + {reach + 1})"
        return f"({counts}[b, h, {high}] > {counts}[b, h, {low}])"

    def _sympystr(self, printer: Any) -> str:
        first, last, key, name, _ = self.args
        if first == last:
            return f"({printer._print(first - key)} in {name})"
        return f"({printer._print(first - key)} .. {printer._print(last - key)} meets {name})"

    def _latex(self, printer: Any) -> str:
        first, last, key, *_ = self.args
        chosen = rf"\mathrm{{{x.short(self.set_name)}}}"
        if first == last:
            return rf"{printer._print(first - key)} \in {chosen}"
        distances = rf"{printer._print(first - key)}, \ldots, {printer._print(last - key)}"
        return rf"\left\{{{distances}\right\}} \cap {chosen} \neq \emptyset"


class Listed(_OfBlocks):
    """``Listed(a, b, name, n)``: the head's block table ``name`` names key tile b for query tile a (at most n each)."""

    def _sizes(self) -> list[int]:
        """Tokens of a block of queries and of keys."""
        return [int(e.args[1]) if isinstance(e, x.Tile) else 1 for e in self.coordinates]  # type: ignore[arg-type]

    def places(self, rows: int, keys: int, tile: int) -> tuple[int, ...]:
        of_queries, of_keys = self._sizes()
        return -(-rows // of_queries), -(-keys // of_keys)

    def table_shape(self, places: tuple[int, ...]) -> tuple[int, ...]:
        return places

    def at_most(self, tiles: Any) -> list[TileRange]:
        end = tiles.key_tiles - 1
        if self._reads_selection():
            return [TileRange(0, end)]
        low, high = tiles.bounds(self.args[0])
        most = self.size * (high - low + 1).astype(np.int64) * tiles.tiles_per_value(self.args[1])
        # The classifier looks up corners only: a tile that holds more than two blocks may list anything.
        key_low, key_high = tiles.bounds(self.args[1])
        wide = (high - low > 1) | bool((key_high - key_low > 1).any())
        return [TileRange(0, end, np.where(wide, UNBOUNDED, most))]

    def expected(self, tiles: Any) -> list[Expectation]:
        low, high = tiles.bounds(self.args[0])
        most = float(self.size) * (high - low + 1) * tiles.tiles_per_value(self.args[1])
        return [_of_selected_blocks(self, tiles, most=most)]

    def table_entries(self, queries: int, keys: int) -> float:
        """Entries of its table for one head and prompt: what planning pays for."""
        rows, columns = self._sizes()
        return queries / rows * keys / columns

    def classify(self, writer: Any) -> tuple[str, str]:
        (a0, a1), (b0, b1) = (writer.bounds(e) for e in self.coordinates)
        corners = [writer.entry(self.set_name, a, b) for a in (a0, a1) for b in (b0, b1)]
        close = f"(({a1} - {a0} <= 1) & ({b1} - {b0} <= 1))"
        return f"({' | '.join(corners)} | ~{close})", f"({' & '.join(corners)} & {close})"

    def on_tokens(self, values: Any) -> Any:
        return values.test(self, *(values.of(e) for e in self.coordinates))

    def look_up(self, writer: Any) -> str:
        a, b = (writer.source(e) for e in self.coordinates)
        return f"({writer.table(self.set_name)}[b, h, {a} + 1, {b} + 1] == 1)"

    def _sympystr(self, printer: Any) -> str:
        a, b, name, _ = self.args
        return f"(({printer._print(a)}, {printer._print(b)}) in {name})"

    def _latex(self, printer: Any) -> str:
        a, b, *_ = self.args
        return rf"({printer._print(a)}, {printer._print(b)}) \in \mathrm{{{x.short(self.set_name)}}}"


def _of_selected_blocks(atom: _OfBlocks, tiles: Any, share: Any = 1.0, most: Any = float("inf")) -> Expectation:
    end = tiles.key_tiles - 1
    first, last = (0, end) if atom.constant(tiles) else (1, 0)
    return Expectation(0, end, first, last, share=share, most=most, selected=True)


def atom_of(expr: Boolean) -> Any:
    """What answers for an atom of an expression: the atom itself, or the `Comparison` of a relation."""
    return Comparison(expr) if isinstance(expr, Relational) else expr


def atoms(expr: Boolean) -> Iterator[Any]:
    """The atoms of an expression, in its order. TypeError for what is none and holds none: a mask must not get lost."""
    if isinstance(expr, (Relational, x.SetTest)):
        yield atom_of(expr)
    elif isinstance(expr, (sympy.And, sympy.Or, sympy.Not)):
        for arg in expr.args:
            yield from atoms(arg)
    elif expr not in (sympy.true, sympy.false):
        raise TypeError(f"{type(expr).__name__} is not an atom of masks: see `atom_of`")
