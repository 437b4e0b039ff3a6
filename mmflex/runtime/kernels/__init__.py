"""Triton kernels, each beside its launch code and its torch twin. On a device without Triton the twins run.

Numbers that follow from the length of a prompt are not specialised: Triton compiles a kernel once more for multiples of
16, and a served prompt of another length would wait for it. Sizes of tiles that have to be constants come in few steps
(`steps`), for the same reason.
"""

from __future__ import annotations

import os

import torch

from .listing import device_of

STRETCHES_OF_A_MILLION = 256
"""Stretches of 4096 entries in a row of a million tokens. Tiles with one number for every stretch have at least that
size, so that all shorter rows share a kernel."""


def use_triton(t: torch.Tensor) -> bool:
    """Whether Triton kernels run on this tensor: CUDA, or the CPU under ``TRITON_INTERPRET=1`` (tests)."""
    return device_of(t).type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def steps(n: int, *sizes: int) -> int:
    """The least of a few ascending powers of two that holds ``n``; beyond the last the next power of two."""
    return next((size for size in sizes if n <= size), 1 << max(0, n - 1).bit_length())
