"""vLLM's model runners, which know the requests behind the rows of a step."""

from __future__ import annotations

import sys

from vllm.distributed import get_tensor_model_parallel_rank

from .plugin import untested
from .requests import follow_runner

_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
"""Modules with a class GPUModelRunner: the first runner (the CPU's too) and the second."""


def tensor_parallel_rank() -> int:
    """Which share of every layer's heads this process has."""
    return int(get_tensor_model_parallel_rank())


def engage(platform: str) -> str | None:
    """Has the model runner of this process tell which requests it runs: it is loaded before a model is. What is to be
    said of vLLM's version, or None."""
    for name in _RUNNERS:
        runner = getattr(sys.modules.get(name), "GPUModelRunner", None)
        if runner is not None:
            follow_runner(runner)
    return untested(platform)
