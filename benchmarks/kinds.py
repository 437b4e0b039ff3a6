"""Time on a device by kind of work, from the names of kernels in a profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ORDER = {
    "attention": ("flash", "fmha", "sdpa", "attention", "mha"),
    "compiled": ("triton",),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk", "addmm", "::mm", "bmm"),
    "convolution": ("conv", "cudnn"),
    "norms, reductions": ("reduce", "norm"),
    "gather, copy": ("index", "gather", "copy", "cat", "memcpy", "memset"),
    "elementwise": ("elementwise", "vectorized", "unrolled"),
}
"""Parts of kernel names; the first kind with a part in the name counts. "compiled" is what Inductor made but for
matrix products and attention."""
OWN = "planning, rows"
"""Kernels of mmflex in Triton, which have the names of their functions."""


def on_gpu(name: str, device: Any) -> bool:
    """Whether an event of a profile is a kernel or a copy; ranges that PyTorch marks are on the device, too."""
    return device == torch.autograd.DeviceType.CUDA and not name.startswith(("##", "Torch-Compiled", "Profiler"))


def kind_of(kernel: str) -> str:
    if kernel.startswith("_") and not kernel.startswith("_Z"):  # _Z: a mangled name of C++
        return OWN
    name = kernel.lower()
    return next((kind for kind, parts in ORDER.items() if any(part in name for part in parts)), "other")


def profiled(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """``kinds`` and the longest ``kernels`` (seconds, calls) of some work that waits for the device at its end; on a
    CPU, of operators."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
        work()
    kinds: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    for event in trace.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent <= 0 or (cuda and not on_gpu(event.key, event.device_type)):
            continue
        kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + spent / 1e6
        known = kernels.setdefault(event.key[:100], [0.0, 0])
        known[0], known[1] = known[0] + spent / 1e6, known[1] + event.count
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:14]
    return {"kinds": kinds, "kernels": dict(longest)}
