"""The patterns: what heads of language and vision-language models look at. One file per family."""

from .a_shape import AShape, TriShape
from .block_peaks import BlockPeaks
from .block_topk import BlockTopK
from .dense import Dense
from .flash_prefill import FlashPrefill
from .flex_prefill import FlexPrefill
from .grid import Grid
from .permuted_modality import Boundary2D, QBoundary
from .prism import Prism
from .proxy_attn import ProxyAttn
from .strided import Dilated, Strided, StridedFixed
from .triangle_mix import triangle_mix
from .vertical_slash import VerticalSlash
from .x_attention import XAttention

__all__ = [
    "AShape",
    "BlockPeaks",
    "BlockTopK",
    "Boundary2D",
    "Dense",
    "Dilated",
    "FlashPrefill",
    "FlexPrefill",
    "Grid",
    "Prism",
    "ProxyAttn",
    "QBoundary",
    "Strided",
    "StridedFixed",
    "TriShape",
    "VerticalSlash",
    "XAttention",
    "triangle_mix",
]
