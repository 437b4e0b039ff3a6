"""Patterns: what a head may see, before any input is known. Their algebra, their denotation and their JSON."""

from __future__ import annotations

import dataclasses
import inspect
import operator
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol

import sympy
import torch
from sympy.logic.boolalg import Boolean

from . import expr as x
from .layout import MODALITY_NAMES, TokenLayout, enlist, modality_id
from .shown import clipped, shown
from .validate import check_mask, check_type

VERSION = 1
"""Version of the JSON form."""

LARGEST_TABLE = 1 << 28
"""Entries of a table of blocks for one head: blocks of 64 for a million tokens."""

LONGEST_INTEGER = 1024
"""Bits of a budget: any more are beyond every prompt, and Python refuses to print thousands of digits."""

DEEPEST, MOST = 100, 1000
"""Levels of patterns within patterns, and patterns in all: hashes, texts and masks of compositions go through each."""


@dataclass(frozen=True)
class Scope:
    """The tokens that a pattern is restricted to: a query modality and a key modality (None: all)."""

    query: int | None = None
    key: int | None = None

    def __str__(self) -> str:
        names = [MODALITY_NAMES.get(m, "") if m is not None else "" for m in (self.query, self.key)]
        return "" if not any(names) else f"{names[0] or 'all'}>{names[1] or 'all'}"


@dataclass(frozen=True, eq=False)
class View:
    """What selection knows of a prompt: its layout seen through a scope. All of it is host data.

    Attributes:
        layout: the layout of the N keys.
        scope: whose queries and keys.
        queries: M, the number of query tokens (the last M of the N).
        tile: block size in tokens.
    """

    layout: TokenLayout
    scope: Scope
    queries: int
    tile: int

    @property
    def size(self) -> int:
        """Keys in scope (of the longest prompt of the batch): the length of per-key masses and bitmaps."""
        return self.layout.most(self.scope.key)

    @property
    def tiles(self) -> int:
        """Key tiles in scope."""
        return -(-self.size // self.tile)

    @property
    def rows(self) -> int:
        """Tokens of the query modality (of the longest prompt): queries are counted from the first of them."""
        return self.layout.most(self.scope.query)

    def block_size(self, n: int) -> int:
        """Blocks of ``n`` tokens as `Tokens.blocks` counts them: no larger than the prompt (or a tile)."""
        return min(n, max(self.layout.length, self.tile))

    def counts(self, device: torch.device) -> torch.Tensor:
        """int64 [B]: keys in scope of each prompt, on a device (copied there once)."""
        return self.layout._once(
            ("counts", self.scope.key, device),
            lambda: torch.tensor(self.layout.of(self.scope.key).sum(axis=1), device=device),
        )

    @property
    def frame_stride(self) -> int | None:
        """Tokens from frame to frame in the key coordinate; None without frames."""
        return self.layout.frame_stride(self.scope.key)


class Estimator(Protocol):
    """Estimates once what several heads' patterns select from. Equal estimators are run once for all heads.

    A method ``scored(view) -> float``, the query-key products that it takes for one head and prompt, is welcome: the
    cost model prices them, and `mmflex eval` reports them beside what a pattern computes.
    """

    def __call__(self, q: torch.Tensor, k: torch.Tensor, view: View, scale: float) -> Any:
        """q [B, H, M, D], k [B, Hkv, N, D] -> whatever `Pattern.select` takes; leading dimensions [B, H]."""
        ...


class Tokens:
    """What a pattern builds its expression from: the tokens q and k as seen through a scope.

    ``t.q`` and ``t.k`` are positions, or ranks within the key modality where the pattern is restricted to one;
    ``t.row`` is q's place among the queries in scope. `sink`, `local`, `last` and the set tests round outwards to whole
    tiles, which is what makes blocks full and costs nothing: the blocks are touched anyway. For token-exact masks
    compare ``t.q`` and ``t.k`` yourself.
    """

    def __init__(self, layout: TokenLayout, tile: int, scope: Scope | None = None, leaves: dict | None = None) -> None:
        self.layout, self.tile, self.scope = layout, tile, scope or Scope()
        self.leaves: dict[str, tuple[Pattern, Scope]] = {} if leaves is None else leaves
        self._leaf = ""

    def restrict(self, query: int | None, key: int | None) -> Tokens:
        """The same tokens through a narrower scope."""
        scope = Scope(self.scope.query if query is None else query, self.scope.key if key is None else key)
        return Tokens(self.layout, self.tile, scope, self.leaves)

    def leaf(self, pattern: Pattern) -> Boolean:
        """The expression of a pattern that selects for itself; equal patterns in equal scopes share their sets."""
        t = Tokens(self.layout, self.tile, self.scope, self.leaves)
        t._leaf = f"{pattern}" + (f"[{self.scope}]" if str(self.scope) else "")
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
        """First and last key tile at which the queries of q's tile stand."""
        if self.scope.query == self.scope.key:
            return x.Tile(self.q, self.tile), x.Tile(self.q, self.tile)
        rows, keys = (x.ALL if m is None else m for m in (self.scope.query, self.scope.key))
        return x.FirstTile(x.q, rows, keys, self.tile), x.LastTile(x.q, rows, keys, self.tile)

    # ---- parts, rounded outwards to tiles ---------------------------------------------------------------------------

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
        return x.Member(self.k, self._name(name), self.capped(at_most))

    def diagonals(self, name: str, at_most: int) -> Boolean:
        """Block diagonals (tile of q less tile of k) in ``name``: a bool tensor [B, H, `View.tiles`]."""
        first, last = self._hull()
        return x.Touches(first, last, x.Tile(self.k, self.tile), self._name(name), self.capped(at_most))

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
        return x.Listed(x.Tile(self.row, size), x.Tile(self.k, size), self._name(name), self.capped(at_most))

    def number(self, name: str, at_least: int = 0) -> sympy.Expr:
        """A selected integer per head, ``name``: an int tensor [B, H]."""
        return x.Number(str(self._name(name)), min(_whole(at_least, "at_least"), max(1, self.layout.length)))

    def _name(self, name: str) -> sympy.Symbol:
        if not isinstance(name, str) or not name or set(name) & set("@["):
            raise ValueError(f"{self._leaf}: a set or number is named {shown(name)}: use a word without '@' and '['")
        return sympy.Symbol(f"{name}@{self._leaf}")


def denoted(pattern: Pattern, t: Tokens) -> Boolean:
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


class _Signature:
    """What `inspect.signature`, and so help and notebooks, show of a pattern: its fields, not ``__new__``."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        found = inspect.signature(owner.__init__)  # type: ignore[misc]
        return found.replace(parameters=list(found.parameters.values())[1:], return_annotation=found.empty)


class Pattern:
    """What a head may see. Subclass it as a frozen dataclass and write `mask`; with `estimator` and `select` it adapts
    to the input. Patterns compose with ``|``, ``&``, ``-`` and `on`."""

    known: ClassVar[dict[str, type[Pattern]]] = {}
    budgets: ClassVar[tuple[str, ...]] = ()
    """Integer fields that say how much is kept, in tokens or blocks: what `scaled` multiplies."""
    serial: str
    """Names this object among all patterns and layouts alive, for graphs of torch.compile to refer to."""
    __signature__: ClassVar[Any] = _Signature()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if not dataclasses.is_dataclass(cls) or cls.__hash__ is None:
            raise TypeError(
                f"{cls.__name__} is no frozen dataclass, as patterns are: put @dataclass(frozen=True) on it"
            )
        self = super().__new__(cls)
        object.__setattr__(self, "serial", enlist(self))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """All but the serial: a copy gets its own, and that of another process may name something else here."""
        return {name: value for name, value in vars(self).items() if name != "serial"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        taken = sorted({"pattern", "version"} & set(inspect.get_annotations(cls)))
        if taken:
            raise TypeError(f"{cls.__name__} has a field {taken[0]!r}, which its JSON form needs for itself: rename it")
        Pattern.known[cls.__name__] = cls

    def estimator(self) -> Estimator | None:
        """What to estimate for `select`; None for nothing."""
        return None

    def select(self, estimate: Any, view: View) -> Mapping[str, torch.Tensor]:
        """The sets and numbers that `mask` names, from the estimate. Must not read a device value back."""
        return {}

    def mask(self, t: Tokens) -> Boolean:
        """The expression; causality and padding go without saying."""
        raise NotImplementedError(f"{type(self).__name__} needs a mask(t) method that returns a mask expression")

    def denote(self, t: Tokens) -> Boolean:
        """The expression in a scope. Only compositions override it."""
        return t.leaf(self)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        """What a search should try of this family."""
        return ()

    def scaled(self, factor: float) -> Pattern:
        """This pattern with its `budgets` multiplied, those of the patterns that it is composed of included: a search
        brings candidates to equal cost with it. Rounded to five significant bits; what is not 0 stays at least 1."""
        if not isinstance(factor, (int, float)) or not 0 < factor <= sys.float_info.max:
            raise ValueError(f"budgets are scaled by {shown(factor)}: use a finite number above 0")
        if factor == 1:
            return self
        names = set(type(self).budgets)
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return dataclasses.replace(
            self,  # type: ignore[type-var]
            **{name: _rounded(value, factor) if name in names else _scaled(value, factor) for name, value in fields},
        )

    def on(self, query: str | int | None = None, key: str | int | None = None) -> Pattern:
        """This pattern for the queries and keys of a modality alone; its lines then run in ranks within it."""
        ids = (m if m is None else modality_id(m) for m in (query, key))
        return Restricted(self, *ids)

    def __or__(self, other: Pattern) -> Pattern:
        return Union(self, other) if isinstance(other, Pattern) else NotImplemented

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection(self, other) if isinstance(other, Pattern) else NotImplemented

    def __sub__(self, other: Pattern) -> Pattern:
        return Difference(self, other) if isinstance(other, Pattern) else NotImplemented

    def __str__(self) -> str:
        values = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{n}={v}' for n, v, default in values if v != default)})"

    def to_json(self) -> dict[str, Any]:
        """``{"pattern": class name, "version": 1, field: value, ...}``; `from_json` reads it back."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"pattern": type(self).__name__, "version": VERSION, **fields}

    from_json: ClassVar[Any] = staticmethod(lambda data: from_json(data))


@dataclass(frozen=True)
class _Pair(Pattern):
    left: Pattern
    right: Pattern
    sign: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for side in (self.left, self.right):
            if not isinstance(side, Pattern):
                raise TypeError(f"{type(self).__name__} joins patterns, got {shown(side)}")
        check_nesting(self, (self.left, self.right))

    def denote(self, t: Tokens) -> Boolean:
        return getattr(operator, {"|": "or_", "&": "and_", "-": "sub"}[self.sign])(
            self.left.denote(t), self.right.denote(t)
        )

    def __str__(self) -> str:
        return f"({self.left} {self.sign} {self.right})"


@dataclass(frozen=True)
class Union(_Pair):
    """Pairs that either allows."""

    sign: ClassVar[str] = "|"


@dataclass(frozen=True)
class Intersection(_Pair):
    """Pairs that both allow."""

    sign: ClassVar[str] = "&"


@dataclass(frozen=True)
class Difference(_Pair):
    """Pairs of the left that the right does not allow."""

    sign: ClassVar[str] = "-"

    def denote(self, t: Tokens) -> Boolean:
        return self.left.denote(t) & ~self.right.denote(t)


@dataclass(frozen=True)
class Restricted(Pattern):
    """A pattern for queries and keys of one modality (see `Pattern.on`)."""

    inner: Pattern
    query: int | None = None
    key: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Pattern):
            raise TypeError(f"Restricted restricts a pattern, got {shown(self.inner)}")
        for name in ("query", "key"):
            modality = getattr(self, name)
            if modality is not None:
                object.__setattr__(self, name, modality_id(modality))
        check_nesting(self, (self.inner,))

    def denote(self, t: Tokens) -> Boolean:
        for asked, held in ((self.query, t.scope.query), (self.key, t.scope.key)):
            if asked is not None and held is not None and asked != held:
                return sympy.false
        return (
            among(x.q, self.query, t.layout)
            & among(x.k, self.key, t.layout)
            & self.inner.denote(t.restrict(self.query, self.key))
        )

    def __str__(self) -> str:
        return f"{self.inner}.on({Scope(self.query, self.key)})"


def check_nesting(pattern: Pattern, parts: Iterable[Pattern]) -> None:
    """ValueError where a pattern that is composed of ``parts`` is too deep or too large to be worked with."""
    depths, counts = zip((0, 0), *(getattr(part, "nesting", (1, 1)) for part in parts), strict=True)
    depth, count = 1 + max(depths), 1 + sum(counts)
    if depth > DEEPEST or count > MOST:
        raise ValueError(
            f"{type(pattern).__name__} composes {count} patterns, {depth} deep: {MOST} patterns and {DEEPEST} levels "
            "are the most; unite many in pairs, then pairs of pairs"
        )
    object.__setattr__(pattern, "nesting", (depth, count))


def among(token: sympy.Symbol, modality: int | None, layout: TokenLayout) -> Boolean:
    """The token is of a modality; plainly true or false where the layout leaves no other."""
    if modality is None or layout.modalities == (modality,):
        return sympy.true
    return sympy.Eq(x.Modality(token), modality) if modality in layout.modalities else sympy.false


def union(patterns: list[Pattern]) -> Pattern:
    """All of them joined with ``|``."""
    return reduce(operator.or_, patterns)


def find(name: str) -> type[Pattern]:
    """The pattern class of a name: from the entry points of group ``mmflex.patterns``, or any class defined so far."""
    if name not in Pattern.known:
        for point in entry_points(group="mmflex.patterns"):
            if point.name == name:
                try:
                    point.load()
                except Exception as error:  # whatever a package of somebody else does when it is imported
                    raise ValueError(
                        f"pattern {shown(name)} is offered as {point.value}, which cannot be loaded "
                        f"({type(error).__name__}: {error}): install or mend the package that offers it"
                    ) from error
    if name not in Pattern.known or name.startswith("_"):
        offered = {point.name for point in entry_points(group="mmflex.patterns")}
        names = sorted(offered | {n for n in Pattern.known if not n.startswith("_")})
        raise ValueError(
            f"unknown pattern {shown(name)}: known are {', '.join(names)}; import the module that defines it"
        )
    return Pattern.known[name]


def from_json(data: Any) -> Pattern:
    """The pattern of its JSON form; ValueError for anything else, and unknown versions, fields and patterns by name.
    It may come from strangers: whatever a class says of its fields is a ValueError too."""
    return _built(data, 1)


def _built(data: Any, depth: int) -> Pattern:
    if not isinstance(data, Mapping) or "pattern" not in data:
        raise ValueError(f'a pattern is an object with a "pattern" field, got {shown(data)}')
    name = data["pattern"]
    if not isinstance(name, str):
        raise ValueError(f'the "pattern" field is the name of a pattern, got {shown(name)}')
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{clipped(name)} has version {shown(version)}; this mmflex reads version {VERSION}")
    cls = find(name)
    names = sorted(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
    unknown = [field for field in data if field not in ("pattern", "version", *names)]
    if unknown:
        listed = ", ".join(clipped(field) for field in unknown[:4])
        raise ValueError(f"{name} has no field {listed}: its fields are {', '.join(names)}")
    given = {field: _rich(value, depth) for field, value in data.items() if field not in ("pattern", "version")}
    try:
        return cls(**given)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: {clipped(error)}; its fields are {', '.join(names)}") from None


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, Pattern):
        return value.scaled(factor)
    return tuple(_scaled(v, factor) for v in value) if isinstance(value, tuple) else value


def _rounded(value: int, factor: float) -> int:
    if not value:
        return value
    exact = Fraction(factor) if max(value, factor) >= 1 << 53 else factor  # products of floats may be infinite
    step = 1 << max(0, int(value * exact).bit_length() - 5)
    return max(1, round(value * exact / step) * step)


def _plain(value: Any) -> Any:
    if isinstance(value, Pattern):
        return value.to_json()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _rich(value: Any, depth: int) -> Any:
    """A field's value from JSON: objects are patterns, lists are tuples."""
    if not isinstance(value, (Mapping, list)):
        return value
    if depth > DEEPEST:
        raise ValueError(f"patterns and lists in them are nested more than {DEEPEST} deep: that is the most")
    if isinstance(value, Mapping):
        return _built(value, depth + 1)
    return tuple(_rich(v, depth + 1) for v in value)


def check_counts(pattern: Pattern, *names: str, minimum: int = 0) -> None:
    """TypeError, ValueError unless the named fields are integers of at least ``minimum``."""
    for name in names:
        value = getattr(pattern, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{type(pattern).__name__}.{name} is a number of tokens, got {shown(value)}: use an int")
        if value < minimum or value.bit_length() > LONGEST_INTEGER:
            most = "" if value < minimum else f", and at most {LONGEST_INTEGER} bits"
            raise ValueError(f"{type(pattern).__name__}.{name} is {shown(value)}: use {minimum} or more{most}")


def check_flags(pattern: Pattern, *names: str) -> None:
    """TypeError unless the named fields are true or false."""
    for name in names:
        value = getattr(pattern, name)
        if not isinstance(value, bool):
            raise TypeError(f"{type(pattern).__name__}.{name} is on or off, got {shown(value)}: use True or False")
