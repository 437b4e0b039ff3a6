"""The patterns: what heads of language and vision-language models look at. One file per family."""

from .a_shape import AShape, TriShape
from .block_topk import BlockTopK
from .dense import Dense
from .flex_prefill import FlexPrefill
from .grid import Grid
from .permuted_modality import Boundary2D, QBoundary
from .strided import Dilated, Strided, StridedFixed
from .vertical_slash import VerticalSlash
from .x_attention import XAttention

__all__ = [
    "AShape",
    "BlockTopK",
    "Boundary2D",
    "Dense",
    "Dilated",
    "FlexPrefill",
    "Grid",
    "QBoundary",
    "Strided",
    "StridedFixed",
    "TriShape",
    "VerticalSlash",
    "XAttention",
]
