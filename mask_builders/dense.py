"""Every key before the query."""

from mmflex.ir.pattern import Dense

__all__ = ["Dense"]
