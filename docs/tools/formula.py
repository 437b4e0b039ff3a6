"""Mask expressions as LaTeX, a line for each alternative."""

from __future__ import annotations

from typing import Any

import sympy
from sympy.printing.latex import LatexPrinter

from mmflex.ir import expr as x
from mmflex.ir.atoms import Listed, Member, Touches
from mmflex.ir.layout import MODALITY_NAMES


class _Printer(LatexPrinter):
    """As sympy's, with q before k in differences, and modalities by name."""

    def _as_ordered_terms(self, expr: sympy.Expr, order: Any = None) -> list[sympy.Expr]:
        terms = super()._as_ordered_terms(expr, order=order)
        return sorted(terms, key=lambda term: (term.could_extract_minus_sign(), x.k in term.free_symbols))

    def _print_Equality(self, expr: sympy.Eq) -> str:
        left, right = expr.args
        if isinstance(left, x.Modality):
            return rf"{self._print(left)} = \mathrm{{{MODALITY_NAMES[int(right)]}}}"
        return self._print_Relational(expr)


_NESTED = (sympy.And, sympy.Or)


def _lines(expr: sympy.Basic, indent: str = "") -> list[str]:
    """An expression in lines; what stands in brackets over several lines is indented."""
    if isinstance(expr, sympy.Or):
        parts = [_lines(arg, indent) for arg in _sorted(expr.args)]
        rest = [line for part in parts[1:] for line in (indent + r"\vee\; " + part[0][len(indent) :], *part[1:])]
        return parts[0] + rest
    if isinstance(expr, sympy.And):
        simple = [arg for arg in _sorted(expr.args) if not isinstance(_inner(arg), _NESTED)]
        head = r" \wedge ".join(_Printer().doprint(arg) for arg in simple)
        out = [indent + head]
        for arg in _sorted(expr.args):
            if arg not in simple:
                join = r" \wedge " if out != [indent] else ""
                sign = r"\neg" if isinstance(arg, sympy.Not) else ""
                inner = _lines(_inner(arg), indent + r"\quad ")
                out[-1] += rf"{join}{sign}\bigl("
                out += [*inner[:-1], inner[-1] + r"\bigr)"]
        return out
    return [indent + _Printer().doprint(expr)]


def _inner(expr: sympy.Basic) -> sympy.Basic:
    return expr.args[0] if isinstance(expr, sympy.Not) else expr


def _sorted(args: tuple[sympy.Basic, ...]) -> list[sympy.Basic]:
    """As people say them: modality of the query, of the key, sink, window, lines, what was selected, the compound."""

    def rank(arg: sympy.Basic) -> tuple[Any, ...]:
        compound = isinstance(_inner(arg), _NESTED)
        kind = bool(arg.atoms(x.Modality)), not arg.atoms(sympy.Mod), not arg.atoms(Member, Touches, Listed)
        both = len(arg.free_symbols & {x.q, x.k}) - 1 if not arg.atoms(x.Modality) else x.q not in arg.free_symbols
        return compound, not kind[0], not kind[1], not kind[2], both, str(arg)

    return sorted(args, key=rank)


def latex(expr: sympy.Basic) -> str:
    """The mask of an expression with its causality, as a LaTeX display."""
    if expr == sympy.true:
        return r"q \ge k"
    lines = _lines(expr)
    if not isinstance(expr, sympy.Or):
        lines[0] = r"\wedge\; " + lines[0]
        return "\n".join([r"\begin{aligned}", r"q \ge k \;&" + " \\\\\n&".join(lines), r"\end{aligned}"])
    lines[0], lines[-1] = r"\bigl(" + lines[0], lines[-1] + r"\bigr)"
    return "\n".join([r"\begin{aligned}", r"q \ge k \;\wedge\; &" + " \\\\\n&".join(lines), r"\end{aligned}"])
