"""The binding to vLLM's FlashAttention backend on CUDA."""

from __future__ import annotations

from functools import partial

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from .backend import Platform, accelerated_backend
from .pages import StridedPages
from .runners import engage, tensor_parallel_rank

PLATFORM = Platform(tensor_parallel_rank, get_current_vllm_config, StridedPages, partial(engage, "cuda"), warms=True)

Backend = accelerated_backend(FlashAttentionBackend, PLATFORM, __name__)
"""What `plugin` registers as FLASH_ATTN."""
