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
from typing import Any, ClassVar, Protocol

import sympy
import torch
from sympy.logic.boolalg import Boolean

from . import expr as x
from . import names
from .identity import new_serial
from .layout import TokenLayout
from .names import find, name_of
from .segments import modality_id
from .shown import clipped, shown
from .tokens import Tokens, denoted
from .view import EstimateFrom, Scope, SharedQueries, View

__all__ = [
    "Dense", "Difference", "EstimateFrom", "Estimator", "Intersection", "Pattern", "Restricted", "Scope",
    "SharedQueries", "Tokens", "Union",
    "View", "among", "check_counts", "check_flags", "check_nesting", "denoted", "find", "from_json", "union",
]  # fmt: skip
"""What patterns are written with is imported from here, wherever it is defined."""

VERSION = 1
"""Version of the JSON form."""

LONGEST_INTEGER = 1024
"""Bits of a budget: any more are beyond every prompt, and Python refuses to print thousands of digits."""

DEEPEST, MOST = 100, 1000
"""Limits on compositions, nesting depth and patterns in all: hashing, printing and building masks visit every one."""


class Estimator(Protocol):
    """Estimates once what several heads' patterns select from. Equal estimators are run once for all heads.

    Optional, besides being called:

    ``scored(view) -> float``: the query-key products that it takes for one head and prompt. The cost model prices
    them, and `mmflex eval` reports them beside what a pattern computes.
    ``matrices = True``: they are one product of matrices, at the rate of attention's own, where those of a few queries
    with all keys wait for memory.
    ``values = True``: it reads `View.values`. A plan that is made without v is then an error.
    ``whole_layer = True``: it is called with all heads of the layer, whichever of them have the pattern. ``kv_heads``:
    how many consecutive KV heads it then looks at together, if not all of them: where processes split the heads, each
    needs a multiple of it.
    ``query_block(view) -> int``: it scores blocks of so many queries in scope, and needs them complete
    (`View.whole_blocks`): where processes split the queries, those of a block that straddles a border are shared.
    """

    def __call__(self, q: torch.Tensor, k: torch.Tensor, view: View, scale: float) -> Any:
        """q [B, H, M, D], k [B, Hkv, N, D] -> whatever `Pattern.select` takes; leading dimensions [B, H]."""
        ...


class _Signature:
    """What `inspect.signature`, and so help and notebooks, show of a pattern: its fields, not ``__new__``."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        found = inspect.signature(owner.__init__)  # type: ignore[misc]
        return found.replace(parameters=list(found.parameters.values())[1:], return_annotation=found.empty)


class Pattern:
    """What a head may see. Subclass it as a frozen dataclass and write `mask`; with `estimator` and `select` it adapts
    to the input. Patterns compose with ``|``, ``&``, ``-`` and `on`."""

    budgets: ClassVar[tuple[str, ...]] = ()
    """Integer fields that say how much is kept, in tokens or blocks: what `scaled` multiplies."""
    least: ClassVar[Mapping[str, int]] = {}
    """Lower bounds that `scaled` respects, by budget (a budget below its bound stays): a neighbourhood stays one."""
    levels: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    """Values of a field at which a search tries the pattern as it is, instead of scaled: a share of the mass costs each
    head what that head needs, and under a bound that binds all blocks of queries get alike."""
    as_needed: ClassVar[bool] = False
    """Whether how much is computed depends on what a head attends to (a share of the mass, a cut), within budgets."""
    serial: str
    """Names this object among all patterns and layouts alive, for graphs of torch.compile to refer to."""
    __signature__: ClassVar[Any] = _Signature()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if not dataclasses.is_dataclass(cls) or cls.__hash__ is None:
            raise TypeError(f"{cls.__name__} must be a frozen dataclass: put @dataclass(frozen=True) on it")
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
        if "serial" in inspect.get_annotations(cls):
            raise TypeError(f"{cls.__name__} has a field 'serial', by which mmflex tells patterns apart: rename it")
        names.register(cls)

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
        names, least = set(type(self).budgets), type(self).least
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        scaled = {
            name: _rounded(value, factor, least.get(name, 1)) if name in names else _scaled(value, factor)
            for name, value in fields
        }
        return dataclasses.replace(self, **scaled)  # type: ignore[type-var]

    def on(self, query: str | int | None = None, key: str | int | None = None) -> Pattern:
        """This pattern restricted to queries and keys of a modality; it then counts in ranks within that modality."""
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

    def identity(self) -> str:
        """A text that only equal patterns share: the class by its unique label, and the fields that differ from their
        defaults."""
        fields = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        told = ", ".join(f"{f.name}={_identity(value)}" for f, value in fields if not _same(value, f.default))
        return f"{names.label(type(self))}({told})"

    def to_json(self) -> dict[str, Any]:
        """``{"pattern": class name, "version": 1, field: value, ...}``; `from_json` reads it back. A class whose name
        another one has is named with its module."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"pattern": name_of(type(self)), "version": VERSION, **fields}

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


def from_json(data: Any) -> Pattern:
    """The pattern of its JSON form; ValueError for anything else, and unknown versions, fields and patterns by name.
    The data is untrusted: any exception that a class raises over its fields becomes a ValueError too."""
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
    fields = sorted(f.name for f in dataclasses.fields(cls))
    unknown = [field for field in data if field not in ("pattern", "version", *fields)]
    if unknown:
        listed = ", ".join(clipped(field) for field in unknown[:4])
        raise ValueError(f"{name} has no field {listed}: its fields are {', '.join(fields)}")
    given = {field: _rich(value, depth) for field, value in data.items() if field not in ("pattern", "version")}
    try:
        return cls(**given)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: {clipped(error)}; its fields are {', '.join(fields)}") from None


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, Pattern):
        return value.scaled(factor)
    return tuple(_scaled(v, factor) for v in value) if isinstance(value, tuple) else value


def _rounded(value: int, factor: float, least: int) -> int:
    if not value:
        return value
    exact = Fraction(factor) if max(value, factor) >= 1 << 53 else factor  # products of floats may be infinite
    step = 1 << max(0, int(value * exact).bit_length() - 5)
    return max(min(value, least), round(value * exact / step) * step)


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _identity(value: Any) -> str:
    if isinstance(value, Pattern):
        return value.identity()
    return f"({', '.join(map(_identity, value))},)" if isinstance(value, tuple) else repr(value)


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
