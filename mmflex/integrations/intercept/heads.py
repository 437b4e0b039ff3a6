"""KV heads that a model repeated before it called `scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 64
"""Tokens by which heads are compared: copies agree everywhere, projections of their own nowhere."""


class KVGroups:
    """How many query heads of one attention module share a KV head. Found at its first long call by comparing a few
    tokens, which waits for the device once; what the config says is tried first."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.declared = _declared(module, config)
        self.known: int | None = None

    def of(self, k: Tensor, v: Tensor) -> int:
        """Query heads per KV head, of k and v ``[B, Hq, N, D]`` that may hold every KV head that many times in a
        row."""
        if self.known is not None:
            return self.known
        number, certain = _compared(k, v, self.declared)
        if certain:
            self.known = number
        return number


def _declared(module: nn.Module, config: Any) -> int | None:
    value = getattr(module, "num_key_value_groups", None)
    if isinstance(value, int):
        return value
    heads, kv_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    return heads // kv_heads if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads else None


def _compared(k: Tensor, v: Tensor, declared: int | None) -> tuple[int, bool]:
    """(repetitions of every head, whether that may be relied on for other inputs)."""
    heads, step = k.shape[1], max(1, k.shape[2] // _SAMPLED)
    both = torch.cat([k[:, :, ::step].flatten(2), v[:, :, ::step].flatten(2)], dim=2)
    copies = (both[:, 1:] == both[:, :-1]).all(2).all(0)
    # Heads of zeros, or of values that are not finite, say nothing.
    telling = (both != 0).any(2).all() & both.isfinite().all()
    *copy, tells = torch.cat([copies, telling[None]]).tolist()
    if not tells:
        return 1, False
    candidates = [declared] if declared is not None else []
    candidates += [n for n in range(heads, 1, -1) if n != declared]
    for number in candidates:
        if number > 1 and heads % number == 0 and all(copy[i] for i in range(heads - 1) if (i + 1) % number):
            return number, True
    return 1, True
