"""The binding to vLLM's CPU backend."""

from __future__ import annotations

from functools import partial

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from .backend import Platform, accelerated_backend
from .pages import ProbedPages
from .runners import engage, tensor_parallel_rank

# Kernels on the CPU are compiled for one length each: the profiling run's would serve no other.
PLATFORM = Platform(tensor_parallel_rank, get_current_vllm_config, ProbedPages, partial(engage, "cpu"), warms=False)

Backend = accelerated_backend(CPUAttentionBackend, PLATFORM, __name__)
"""What `plugin` registers as CPU_ATTN."""
