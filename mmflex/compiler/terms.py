"""The terms of a mask expression: the alternatives of its ``or``, each of which finds its own way into a launch."""

from __future__ import annotations

from functools import lru_cache

import sympy
from sympy.logic.boolalg import Boolean

from ..ir import expr as x
from ..ir.atoms import Comparison

CAUSAL = sympy.Ge(x.q, x.k, evaluate=False)


@lru_cache(maxsize=1024)
def terms(expr: Boolean) -> tuple[Boolean, ...]:
    """The alternatives of an expression, every And distributed over its Ors."""
    if expr == sympy.false:
        return ()
    out: list[Boolean] = []
    for term in x.alternatives(expr):
        inner = next((arg for arg in x.conditions(term) if isinstance(arg, sympy.Or)), None)
        if inner is None:
            out.append(term)
        else:
            rest = [arg for arg in x.conditions(term) if arg is not inner]
            out += [t for arg in inner.args for t in terms(x.all_of(arg, *rest))]
    return tuple(out)


@lru_cache(maxsize=1024)
def causality_in_ranks(term: Boolean) -> tuple[Boolean, ...]:
    """``q >= k`` in ranks, where the keys of a term are of one modality: in modality-major order ranks ascend,
    positions do not."""
    modalities = [e.rhs for e in x.conditions(term) if isinstance(e, sympy.Eq) and e.lhs == x.Modality(x.k)]
    return tuple(sympy.Ge(x.Rank(x.q, m), x.Rank(x.k, m), evaluate=False) for m in modalities)


def causal_once(term: Boolean) -> tuple[Boolean, ...]:
    """A term and causality, stated once, so that its share is not counted twice."""
    return (term, *(causality_in_ranks(term) or (CAUSAL,)))


@lru_cache(maxsize=1024)
def residue_pair(term: Boolean) -> tuple[sympy.Expr, sympy.Expr] | None:
    """(f, g) of a term that asks for ``f(q) == g(k)`` with residues f and g."""
    for atom in x.conditions(term):
        if isinstance(atom, sympy.Eq) and x.sides(atom) == {x.q, x.k}:
            apart = Comparison(atom).apart
            if apart is not None and isinstance(apart[0], sympy.Mod) and isinstance(apart[2], sympy.Mod):
                return apart[0], apart[2]
    return None


@lru_cache(maxsize=1024)
def by_modality(expr: Boolean) -> frozenset[sympy.Symbol]:
    """Which of q and k benefits from modality-major order: the expression reads its modality or rank."""
    return frozenset().union(*map(x.sides, expr.atoms(x.Modality, x.Rank, x.FirstTile)))


@lru_cache(maxsize=1024)
def assume_modality(expr: Boolean, token: sympy.Symbol, modality: int) -> Boolean:
    """The expression where a token is known to be of a modality."""
    tests = (e for e in expr.atoms(sympy.Eq) if e.lhs == x.Modality(token))
    return expr.xreplace({e: sympy.true if e.rhs == modality else sympy.false for e in tests})


@lru_cache(maxsize=4096)
def selected_names(expr: sympy.Basic) -> frozenset[str]:
    """Names of the sets and numbers that an expression reads."""
    if isinstance(expr, x.Number):
        return frozenset({str(expr)})
    own = {expr.set_name} if isinstance(expr, x.SetTest) else ()
    return frozenset(own).union(*map(selected_names, expr.args))


@lru_cache(maxsize=1024)
def selecting_leaves(*exprs: sympy.Basic) -> frozenset[str]:
    """Names of the leaves (`program.Leaf`) whose selections expressions read."""
    return frozenset(name.split("@", 1)[1] for expr in exprs for name in selected_names(expr))
