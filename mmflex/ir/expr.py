"""Mask expressions: sympy booleans over the attributes of a query token q and a key token k.

One expression is the whole truth about a head's mask. The compiler derives from it the mask_mod, the block classifier,
the dense oracle, the predicted cost and the text that `explain()` prints, so that they cannot disagree.

Leaves: the symbols ``q`` and ``k`` (positions), attributes of either (`Rank`, `Modality`, `Frame`, `Cell`, `SegmentOf`,
`FirstTile`, `LastTile`, `Behind`), integers, and what selection finds for a head: `Number` and the sets of
`mmflex.ir.atoms`. Causality and padding are implicit: every expression is meant under ``q >= k``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanFunction

from .segments import MODALITY_NAMES

q, k = sympy.symbols("q k", integer=True, nonnegative=True)

ALL = -1
"""Stands for "any modality" among the arguments of an expression."""


def _scope(modality: Any) -> str:
    return MODALITY_NAMES.get(int(modality), "all")


class _Attribute(sympy.Function):
    """An integer attribute of one token; prints as ``name(q)``."""

    is_integer = True
    is_real = True
    label = ""

    def _sympystr(self, printer: Any) -> str:
        return f"{self.label}({printer._print(self.args[0])})"

    def _latex(self, printer: Any) -> str:
        return rf"\mathrm{{{self.label}}}({printer._print(self.args[0])})"


class Modality(_Attribute):
    """Modality id of a token."""

    label = "modality"


class SegmentOf(_Attribute):
    """Segment of a token."""

    label = "segment"


class Frame(_Attribute):
    """Frame of a token within its segment, -1 for none."""

    label = "frame"


class Cell(_Attribute):
    """Cell of a token within its frame, -1 for none."""

    label = "cell"


class Rank(_Attribute):
    """``Rank(x, m)``: tokens of modality m up to and including x, less one (its rank, if x is of modality m)."""

    def _sympystr(self, printer: Any) -> str:
        return f"{printer._print(self.args[0])}_{_scope(self.args[1])}"

    def _latex(self, printer: Any) -> str:
        return rf"{printer._print(self.args[0])}_{{\mathrm{{{_scope(self.args[1])}}}}}"


class FirstTile(_Attribute):
    """``FirstTile(q, rows, keys, tile)``: the lowest key tile, counted in keys of modality ``keys``, at which a query
    of q's own tile stands; tiles of queries are counted in tokens of modality ``rows``. Constant over a query tile."""

    label = "first_tile"

    def _sympystr(self, printer: Any) -> str:
        return f"{self.label}_{_scope(self.args[1])}_{_scope(self.args[2])}({printer._print(self.args[0])})"

    def _latex(self, printer: Any) -> str:
        label, scopes = self.label.replace("_", r"\,"), ", ".join(map(_scope, self.args[1:-1]))
        return rf"\mathrm{{{label}}}_{{\mathrm{{{scopes}}}}}({printer._print(self.args[0])})"


class LastTile(FirstTile):
    """As `FirstTile`, the highest."""

    label = "last_tile"


class Behind(FirstTile):
    """``Behind(q, rows, tile)``: queries of modality ``rows`` that come after the last one of q's tile."""

    label = "behind"

    def _sympystr(self, printer: Any) -> str:
        return f"{self.label}_{_scope(self.args[1])}({printer._print(self.args[0])})"


class Tile(sympy.Function):
    """``Tile(x, t)``: x // t, rounded down."""

    is_integer = True
    is_real = True

    @classmethod
    def eval(cls, x: Any, t: Any) -> Any:
        if t == 1:
            return x
        return x // t if x.is_Integer else None

    def _sympystr(self, printer: Any) -> str:
        x = printer._print(self.args[0])
        return f"({x})//{self.args[1]}" if self.args[0].is_Add else f"{x}//{self.args[1]}"

    def _latex(self, printer: Any) -> str:
        return rf"\left\lfloor {printer._print(self.args[0])} / {self.args[1]} \right\rfloor"


def tiled(expr: sympy.Basic) -> sympy.Basic:
    """An expression with `Tile` where a pattern writes ``//`` by a number, which sympy makes a floor of fractions."""

    def whole(arg: sympy.Expr) -> sympy.Expr:
        shares = [term.as_coeff_Mul()[0] for term in sympy.Add.make_args(arg)]
        if not all(share.is_Rational for share in shares):
            return sympy.floor(arg)
        n = sympy.ilcm(*(share.q for share in shares)) if len(shares) > 1 else shares[0].q
        return Tile(sympy.expand(arg * n), n) if n > 1 else sympy.floor(arg)

    return expr.replace(sympy.floor, whole)


class Number(sympy.Symbol):
    """An integer that selection finds for every head (a stride, a phase)."""

    at_least: int

    def __new__(cls, name: str, at_least: int = 0) -> Number:
        self = sympy.Symbol.__xnew__(cls, name, integer=True)  # not the cached one: its bound may be another
        self.at_least = at_least
        return self

    def _hashable_content(self) -> tuple[Any, ...]:
        return (*super()._hashable_content(), self.at_least)

    def __getnewargs_ex__(self) -> Any:
        return ((self.name, self.at_least), {})

    def _latex(self, printer: Any) -> str:
        return rf"\mathrm{{{short(self.name)}}}"


class SetTest(BooleanFunction):
    """A test of tokens against a set that selection fills for every head: ``(coordinates ..., name, n)``, at most n
    members. The concrete tests are in `mmflex.ir.atoms`."""

    @property
    def coordinates(self) -> tuple[sympy.Expr, ...]:
        """What is looked up in the set."""
        return self.args[:-2]  # type: ignore[return-value]

    @property
    def set_name(self) -> str:
        return str(self.args[-2])

    @property
    def size(self) -> int:
        """At most how many members the set has (of a table: in a row)."""
        return int(self.args[-1])


def short(name: str) -> str:
    """A set's name without the pattern that it belongs to."""
    return name.split("@")[0].split("[")[0]


@lru_cache(maxsize=4096)
def sides(expr: sympy.Basic) -> frozenset[sympy.Symbol]:
    """Which of q and k an expression reads."""
    return frozenset({expr}) if expr in (q, k) else frozenset().union(*map(sides, expr.args))


@lru_cache(maxsize=4096)
def selected(expr: sympy.Basic) -> bool:
    """Whether an expression reads anything that selection finds (else it follows from the layout alone)."""
    return isinstance(expr, (Number, SetTest)) or any(map(selected, expr.args))


any_of, all_of = lru_cache(maxsize=4096)(sympy.Or), lru_cache(maxsize=4096)(sympy.And)
"""``Or`` and ``And`` of several expressions, kept: sympy looks for simplifications each time."""


def alternatives(expr: Boolean) -> tuple[Boolean, ...]:
    """The arguments of an Or, in sympy's order; else the expression alone."""
    return expr.args if isinstance(expr, sympy.Or) else (expr,)  # type: ignore[return-value]


def conditions(expr: Boolean) -> tuple[Boolean, ...]:
    """The arguments of an And, in sympy's order; else the expression alone."""
    return expr.args if isinstance(expr, sympy.And) else (expr,)  # type: ignore[return-value]


def mod(value: sympy.Expr, modulus: sympy.Expr) -> sympy.Expr:
    """``value`` mod ``modulus``, as `sympy.Mod` writes it. Not evaluated where it reads a selected number:
    sympy would spend milliseconds looking for bounds that do not exist."""
    return sympy.Mod(value, modulus, evaluate=not (selected(value) or selected(modulus)))


def is_leaf(expr: sympy.Basic) -> bool:
    """Whether ``expr`` is an attribute of a token, a token's position or a selected number."""
    return isinstance(expr, (_Attribute, sympy.Symbol))


@lru_cache(maxsize=4096)
def separate(relation: Relational) -> tuple[sympy.Expr, type[Relational], sympy.Expr] | None:
    """A relation as ``f(q) op g(k)``, or None where q and k do not come apart.

    Sums come apart term by term. ``(a(q) - b(k)) mod s == c`` is ``(a(q) - c) mod s == b(k) mod s``.
    """
    op = relation.func
    difference = relation.lhs - relation.rhs
    if op in (sympy.Eq, sympy.Ne):
        for this, other in ((relation.lhs, relation.rhs), (relation.rhs, relation.lhs)):
            if isinstance(this, sympy.Mod) and sides(this) == {q, k} and not sides(other):
                inner = _split(this.args[0])
                if inner is not None:
                    s = this.args[1]
                    return mod(inner[0] - other, s), op, mod(-inner[1], s)
    parts = _split(difference)
    return None if parts is None else (parts[0], op, -parts[1])


def _split(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """``expr`` as (terms without k, terms with k alone)."""
    of_q, of_k = sympy.Integer(0), sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(expr)):
        found = sides(term)
        if found == {q, k}:
            return None
        if found == {k}:
            of_k += term
        else:
            of_q += term
    return of_q, of_k


OPERATOR = {
    sympy.Eq: "==",
    sympy.Ne: "!=",
    sympy.StrictLessThan: "<",
    sympy.LessThan: "<=",
    sympy.StrictGreaterThan: ">",
    sympy.GreaterThan: ">=",
}
"""Relation class -> Python operator."""


def source(expr: sympy.Basic, leaf: Callable[[sympy.Basic], str]) -> str:
    """Python source of an expression for tensors or arrays; ``leaf`` writes leaves, integers and set tests."""

    def write(e: sympy.Basic) -> str:
        if e in (sympy.true, sympy.false):
            return str(bool(e))
        if isinstance(e, (sympy.Integer, SetTest)) or is_leaf(e):
            return leaf(e)
        if isinstance(e, sympy.Add):
            return "(" + " + ".join(write(a) for a in e.args) + ")"
        if isinstance(e, sympy.Mul):
            return "(" + " * ".join(write(a) for a in e.args) + ")"
        if isinstance(e, sympy.Mod):
            return f"({write(e.args[0])} % {write(e.args[1])})"
        if isinstance(e, Tile):
            return f"({write(e.args[0])} // {int(e.args[1])})"
        if isinstance(e, Relational):
            return f"({write(e.lhs)} {OPERATOR[e.func]} {write(e.rhs)})"
        if isinstance(e, sympy.And):
            return "(" + " & ".join(write(a) for a in e.args) + ")"
        if isinstance(e, sympy.Or):
            return "(" + " | ".join(write(a) for a in e.args) + ")"
        if isinstance(e, sympy.Not):
            return f"(~{write(e.args[0])})"
        raise TypeError(
            f"a mask expression cannot hold {type(e).__name__} ({e}): use + - * mod // by whole numbers, comparisons "
            "and & | ~"
        )

    return write(expr)


@lru_cache(maxsize=4096)
def compiled(expr: sympy.Basic) -> tuple[Any, tuple[tuple[str, sympy.Basic], ...]]:
    """(code for `eval`, what it reads by name: leaves and set tests) of an expression over tensors or arrays."""
    reads: dict[sympy.Basic, str] = {}

    def write(leaf: sympy.Basic) -> str:
        if isinstance(leaf, sympy.Integer):
            return str(int(leaf))
        return reads.setdefault(leaf, f"v{len(reads)}")

    code = compile(source(expr, write), "<mmflex expression>", "eval")  # our own source
    return code, tuple((name, leaf) for leaf, name in reads.items())
