"""Every key before the query."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from mmflex.ir.pattern import Pattern, Tokens


@dataclass(frozen=True)
class Dense(Pattern):
    """Plain causal attention: all keys up to the query."""

    def mask(self, t: Tokens) -> Boolean:
        return sympy.true
