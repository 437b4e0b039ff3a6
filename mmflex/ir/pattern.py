"""Patterns: what a head may see, before any input is known. Their algebra, their denotation and their JSON."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol

import numpy as np
import sympy
import torch
from sympy.logic.boolalg import Boolean

from . import expr as x
from .atoms import Listed, Member, Touches
from .identity import new_serial
from .layout import MODALITY_NAMES, TokenLayout, modality_id
from .queries import QueryTokens

VERSION = 1
"""Version of the JSON form."""


@dataclass(frozen=True)
class Scope:
    """The tokens that a pattern is restricted to: a query modality and a key modality (None: all)."""

    query: int | None = None
    key: int | None = None

    def __str__(self) -> str:
        names = [MODALITY_NAMES.get(m, "") if m is not None else "" for m in (self.query, self.key)]
        return "" if not any(names) else f"{names[0] or 'all'}>{names[1] or 'all'}"


@dataclass(frozen=True, eq=False)
class EstimateFrom:
    """Queries to estimate with, where they are not those of the call: for a chunk, the last ones of the whole prompt.

    Attributes:
        q: [B, Hq, L, D]. queries: which tokens they are.
        shared: where several processes hold the queries of a prompt, each those of its own call; else None.
    """

    q: torch.Tensor
    queries: QueryTokens
    shared: SharedQueries | None = None


@dataclass(frozen=True, eq=False)
class SharedQueries:
    """The queries of a prompt that several processes hold together, each in a call of its own.

    Attributes:
        queries: which tokens they are, those of all calls.
        sum: adds up a tensor of every process, over all of them.
    """

    queries: QueryTokens
    sum: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class View:
    """What selection knows of a prompt: its layout seen through a scope. Host data, but for the last two.

    Attributes:
        layout: the layout of the N keys.
        scope: whose queries and keys.
        queries: which of the N tokens the M queries are.
        tile: block size in tokens.
        group: query heads that share a KV head.
        estimate_from: queries that estimates go by instead, if any (`last_queries`).
        values: v [B, Hkv, N, Dv], for estimators that ask for it.
    """

    layout: TokenLayout
    scope: Scope
    queries: QueryTokens
    tile: int
    group: int = 1
    estimate_from: EstimateFrom | None = None
    values: torch.Tensor | None = None

    def last_queries(self, q: torch.Tensor) -> tuple[torch.Tensor, QueryTokens]:
        """(queries [B, H, L, D], which tokens they are) for estimators that look at the last ones: those of the call,
        q, or those that were given for it."""
        given = self.estimate_from
        return (q, self.queries) if given is None else (given.q, given.queries)

    @property
    def shared(self) -> SharedQueries | None:
        """Where other processes hold the prompt's other queries: what all of them are, and how to add up over them."""
        return None if self.estimate_from is None else self.estimate_from.shared

    @property
    def shared_queries(self) -> View:
        """The prompt as seen with the queries of all processes; this view where no others hold any."""
        return self if self.shared is None else dataclasses.replace(self, queries=self.shared.queries)

    def whole_blocks(self, q: torch.Tensor, size: int) -> tuple[torch.Tensor, View]:
        """(queries [B, H, L, D], the view with them) for estimators that score blocks of ``size`` queries in scope:
        those of the call, q, and of those that were given for it the ones that make its blocks whole."""
        given = self.estimate_from
        if given is None:
            return q, self

        def build() -> tuple[np.ndarray, np.ndarray, QueryTokens] | None:
            block = np.where(self.layout.of(self.scope.query), self.layout.coordinate(self.scope.query) // size, -1)
            mine, others = self.queries.numbers, np.setdiff1d(given.queries.numbers, self.queries.numbers)
            wanted = np.zeros(len(others), bool)
            for row in block:
                wanted |= np.isin(row[others], np.unique(row[mine])) & (row[others] >= 0)
            if not wanted.any():
                return None
            tokens = np.concatenate([mine, others[wanted]])
            source = np.searchsorted(given.queries.numbers, others[wanted])
            return source, tokens.argsort(kind="stable"), QueryTokens.listed(np.sort(tokens))

        key = ("whole blocks", self.scope, self.queries, given.queries, size)
        more = self.layout.once(key, build)
        if more is None:
            return q, self
        source, order = (torch.as_tensor(index).to(q.device) for index in more[:2])
        every = torch.cat([q, given.q.index_select(2, source)], 2).index_select(2, order)
        return every, dataclasses.replace(self, queries=more[2])

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
        return self.layout.once(
            ("counts", self.scope.key, device),
            lambda: torch.as_tensor(self.layout.of(self.scope.key).sum(axis=1)).to(device),
        )

    @property
    def frame_stride(self) -> int | None:
        """Tokens from frame to frame in the key coordinate; None without frames."""
        return self.layout.frame_stride(self.scope.key)


class Estimator(Protocol):
    """Estimates once what several heads' patterns select from. Equal estimators are run once for all heads.

    Optional, besides being called:

    ``scored(view) -> float``: the query-key products that it takes for one head and prompt. The cost model prices
    them, and `mmflex eval` reports them beside what a pattern computes.
    ``values = True``: it reads `View.values`. A plan that is made without v is then an error.
    ``whole_layer = True``: it is called with all heads of the layer, whichever of them have the pattern. ``kv_heads``:
    how many KV heads in a row it then takes together, if not all of them: processes that have some of the heads each
    need a multiple of it.
    ``query_block(view) -> int``: it scores blocks of so many queries in scope, and takes them whole
    (`View.whole_blocks`): where several processes hold the queries, those of a block on a border are shared.
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
        expr = pattern.mask(t)
        if isinstance(expr, bool):
            raise TypeError(
                f"{type(pattern).__name__}.mask returned {expr}: == and != compare the expressions themselves, write "
                "sympy.Eq(a, b) and sympy.Ne(a, b) (sympy.true and sympy.false for everything and nothing)"
            )
        return x.tiled(sympy.sympify(expr))

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
        return min(n, self.layout.length)

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
        size = self.tile if size is None else min(size, max(self.layout.length, self.tile))
        return Listed(x.Tile(self.row, size), x.Tile(self.k, size), self._name(name), self.capped(at_most))

    def number(self, name: str, at_least: int = 0) -> sympy.Expr:
        """A selected integer per head, ``name``: an int tensor [B, H]."""
        return x.Number(str(self._name(name)), self.capped(at_least))

    def _name(self, name: str) -> sympy.Symbol:
        return sympy.Symbol(f"{name}@{self._leaf}")


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
    least: ClassVar[Mapping[str, int]] = {}
    """What `scaled` leaves of a budget at least, where it is no less to begin with: a neighbourhood stays one."""
    serial: str
    """Names this object among all patterns and layouts alive, for graphs of torch.compile to refer to."""
    __signature__: ClassVar[Any] = _Signature()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if not dataclasses.is_dataclass(cls) or cls.__hash__ is None:
            raise TypeError(
                f"{cls.__name__} is no frozen dataclass, as patterns are: put @dataclass(frozen=True) on it"
            )
        self = super().__new__(cls)
        object.__setattr__(self, "serial", new_serial(self))
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
        if factor == 1:
            return self
        names, least = set(type(self).budgets), type(self).least
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        scaled = {
            name: _rounded(value, factor, least.get(name, 1)) if name in names else _scaled(value, factor)
            for name, value in fields
        }
        return dataclasses.replace(self, **scaled)  # type: ignore[type-var]

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
class Dense(Pattern):
    """Plain causal attention: all keys up to the query."""

    def mask(self, t: Tokens) -> Boolean:
        return sympy.true


@dataclass(frozen=True)
class _Pair(Pattern):
    left: Pattern
    right: Pattern
    sign: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for side in (self.left, self.right):
            if not isinstance(side, Pattern):
                raise TypeError(f"{type(self).__name__} joins patterns, got {side!r}")

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
            raise TypeError(f"Restricted restricts a pattern, got {self.inner!r}")
        for modality in (self.query, self.key):
            if modality is not None:
                modality_id(modality)

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
                point.load()
    if name not in Pattern.known:
        offered = {point.name for point in entry_points(group="mmflex.patterns")}
        names = sorted(offered | {n for n in Pattern.known if not n.startswith("_")})
        raise ValueError(f"unknown pattern {name!r}: known are {', '.join(names)}; import the module that defines it")
    return Pattern.known[name]


def from_json(data: Any) -> Pattern:
    """The pattern of its JSON form; unknown versions, fields and patterns are refused by name."""
    if not isinstance(data, Mapping) or "pattern" not in data:
        raise ValueError(f'a pattern is an object with a "pattern" field, got {data!r}')
    if not isinstance(data["pattern"], str):
        raise ValueError(f'the "pattern" field is the name of a pattern, got {data["pattern"]!r}')
    version = data.get("version")
    if version != VERSION:
        raise ValueError(f"{data['pattern']} has version {version!r}; this mmflex reads version {VERSION}")
    cls = find(data["pattern"])
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given = {name: _rich(value) for name, value in data.items() if name not in ("pattern", "version")}
    unknown = sorted(set(given) - names)
    if unknown:
        raise ValueError(
            f"{data['pattern']} has no field {', '.join(unknown)}: its fields are {', '.join(sorted(names))}"
        )
    try:
        return cls(**given)
    except TypeError as error:
        raise ValueError(f"{data['pattern']}: {error}; its fields are {', '.join(sorted(names))}") from None


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, Pattern):
        return value.scaled(factor)
    return tuple(_scaled(v, factor) for v in value) if isinstance(value, tuple) else value


def _rounded(value: int, factor: float, least: int) -> int:
    if not value:
        return value
    step = 1 << max(0, int(value * factor).bit_length() - 5)
    return max(min(value, least), round(value * factor / step) * step)


def _plain(value: Any) -> Any:
    if isinstance(value, Pattern):
        return value.to_json()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _rich(value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_json(value)
    return tuple(_rich(v) for v in value) if isinstance(value, list) else value


def check_counts(pattern: Pattern, *names: str, minimum: int = 0) -> None:
    """ValueError unless the named fields are integers of at least ``minimum``."""
    for name in names:
        value = getattr(pattern, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{type(pattern).__name__}.{name} is a number of tokens, got {value!r}: use an int")
        if value < minimum:
            raise ValueError(f"{type(pattern).__name__}.{name} is {value}: use {minimum} or more")
