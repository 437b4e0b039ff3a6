"""One call of `scaled_dot_product_attention`: what mmflex needs of it, or why it is left as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .masks import MaskReader
from .reasons import Unfit

LONG = 64
"""Queries from which on a call is a prefill: fewer are decoding, and patterns are estimated from this many."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Attention:
    """The arguments of a call.

    Attributes:
        q: ``[B, Hq, M, D]``. k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``; Hkv is Hq where the model repeats heads.
        mask: bool or additive, broadcast to ``[B, Hq, M, N]``; None for none.
        dropout, causal, scale, grouped: ``dropout_p``, ``is_causal``, ``scale``, ``enable_gqa``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Attention:
        """From what `torch.nn.functional.scaled_dot_product_attention` takes, in autocast's type where that is on."""
        q, k, v = (_autocast(x) for x in (query, key, value))
        return cls(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def check(self, module: nn.Module) -> None:
        """Unfit where this is no causal prefill that mmflex computes; masks are left to `padding`."""
        q, k, v = self.q, self.k, self.v
        if any(type(x) is not Tensor and type(x) is not nn.Parameter for x in (q, k, v)):
            raise Unfit("tensors of a type of their own", ", ".join(type(x).__name__ for x in (q, k, v)))
        if any(x.dim() != 4 for x in (q, k, v)):
            raise Unfit("tensors that are not [batch, heads, tokens, width]", f"{q.dim()} dimensions")
        if q.shape[2] < LONG:
            raise Unfit(f"fewer than {LONG} queries", notice=False)
        if module.training:
            raise Unfit("training", "call model.eval()")
        if self.dropout > 0:
            raise Unfit("dropout", f"dropout_p is {self.dropout}")
        if q.dtype not in _DTYPES or {k.dtype, v.dtype} != {q.dtype}:
            raise Unfit("tensors that are not float32, bfloat16 or float16", f"{q.dtype}, {k.dtype}, {v.dtype}")
        if not q.device == k.device == v.device or k.shape[:3] != v.shape[:3] or len(q) != len(k):
            raise Unfit("tensors that do not go together", f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
        if q.shape[3] != k.shape[3] or not 16 <= max(q.shape[3], v.shape[3]) <= 256:
            raise Unfit("a head dimension that is not between 16 and 256", f"{q.shape[3]}, values {v.shape[3]}")
        if not k.shape[1] or q.shape[1] % k.shape[1] or (q.shape[1] != k.shape[1] and not self.grouped):
            raise Unfit("heads that do not go together", f"{q.shape[1]} query heads on {k.shape[1]}")
        if self.mask is not None and self.causal:
            raise Unfit("a mask beside is_causal")

    def padding(self, reader: MaskReader) -> np.ndarray | None:
        """Which keys are tokens: bool ``[B, N]``, or None where all are. Unfit where pairs are allowed otherwise than
        causally from the bottom right."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        if self.mask is not None:
            return reader.padding(self.mask, queries, keys)
        if not self.causal:
            raise Unfit("neither a mask nor is_causal", "every query sees every key, as in cross attention and towers")
        if queries != keys:
            # PyTorch aligns it to the top left: the first query sees the first key alone.
            raise Unfit("is_causal with fewer queries than keys", f"{queries} queries, {keys} keys")
        return None


def _autocast(x: Tensor) -> Tensor:
    """As `scaled_dot_product_attention` casts its arguments under autocast: after the place where it is intercepted."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def long_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an attention module is called on `LONG` tokens or more: by its first tensor, ``[B, M, ...]``."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            shape = value.shape  # every decode step comes by: the cheap question first
            return len(shape) > 1 and shape.numel() >= LONG * shape[-1] and max(shape[:-1]) >= LONG
    return False
