"""Choosing patterns: configs, which say what each head of a model may see, and what patterns cost."""

from .cost import predict, program_of

__all__ = ["predict", "program_of"]
