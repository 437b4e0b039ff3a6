"""mmflex: a block-mask compiler for attention on PyTorch FlexAttention."""

from .ir.layout import Segment, TokenLayout
from .ir.pattern import Pattern, Tokens, View
from .runtime.attention import Plan, attention, plan
from .runtime.backends import why_not

__version__ = "0.1.0"
__all__ = ["Pattern", "Plan", "Segment", "TokenLayout", "Tokens", "View", "attention", "plan", "why_not"]
