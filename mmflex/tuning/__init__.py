"""Choosing patterns: configs, which say what each head of a model may see, and what patterns cost."""

from .cost import Link, predict, program_of

__all__ = ["Link", "predict", "program_of"]
