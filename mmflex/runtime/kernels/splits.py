"""Attention of a few queries to many keys, in splits of the keys side by side (a decode step on a long cache)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import use_triton
from .listing import jit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_SPLIT = 2048
"""Keys of a split."""
_BYTES = 1 << 14
"""Of keys that a program takes at a time; as many values."""
_ROWS = 64
"""Queries of a group of heads, at most."""

if triton is not None:

    @jit(do_not_specialize=["seen_b", "seen_m", "seen_n", "length", "queries"])
    def _split(
        q, k, v, seen, out, lse, q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, seen_b, seen_m, seen_n, scale, length,
        queries, heads, group, dim, width,
        ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
        MASKED: tl.constexpr,
    ):  # fmt: skip
        """The queries of the heads that share a KV head, over one split: output [rows, W] and log-sum-exp."""
        kv = (tl.program_id(1) % (heads // group)).to(tl.int64)
        batch = (tl.program_id(1) // (heads // group)).to(tl.int64)
        row, d, w = tl.arange(0, ROWS), tl.arange(0, D)[None], tl.arange(0, W)[None]
        inside = row < group * queries
        head, m = kv * group + row // queries, row % queries
        at = q + batch * q_b + head[:, None] * q_h + m[:, None] * q_m + d
        query = tl.load(at, mask=inside[:, None] & (d < dim), other=0.0)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, W], tl.float32)
        for block in range(SPLIT // KEYS):
            number = tl.program_id(0) * SPLIT + block * KEYS + tl.arange(0, KEYS)
            real = number < length
            place = number.to(tl.int64)[:, None]
            key = tl.load(k + batch * k_b + kv * k_h + place * k_n + d, mask=real[:, None] & (d < dim), other=0.0)
            value = tl.load(v + batch * v_b + kv * v_h + place * v_n + w, mask=real[:, None] & (w < width), other=0.0)
            visible = inside[:, None] & real[None]
            if MASKED:
                mask = seen + batch * seen_b + m[:, None] * seen_m + number[None] * seen_n
                visible = visible & (tl.load(mask, mask=visible, other=0) != 0)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            score = tl.where(visible, score, float("-inf"))
            new = tl.maximum(top, tl.max(score, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            weight, old = tl.exp2(score - base[:, None]), tl.exp2(top - base)
            sums = sums * old[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            total = total * old + tl.sum(weight, 1)
            top = new
        sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        own = ((tl.program_id(0) * (tl.num_programs(1) // (heads // group)) + batch) * heads + head) * queries + m
        tl.store(out + own[:, None] * width + w, sums, mask=inside[:, None] & (w < width))
        tl.store(lse + own, (top + tl.log2(total)) * 0.6931471805599453, mask=inside)


def fits(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel takes q [B, Hq, M, D] and k [B, Hkv, N, D]."""
    few = q.shape[2] * (q.shape[1] // max(1, k.shape[1])) <= _ROWS
    return use_triton(q) and few and min(q.numel(), k.numel()) > 0


def attend_splits(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to every split of the keys by itself: outputs float32 [S, B, Hq, M, Dv], log-sum-exp float32
    [S, B, Hq, M], 0 and -inf where a query sees no key of a split. To be merged.

    Args:
        q: [B, Hq, M, D]; k: [B, Hkv, N, D], v: [B, Hkv, N, Dv], the last dimension contiguous; see `fits`.
        seen: bool, broadcastable to [B, 1, M, N]; None: all.
    """
    assert triton is not None
    batch, heads, queries, dim = q.shape
    kv_heads, length, width = k.shape[1], k.shape[2], v.shape[3]
    group, splits = heads // kv_heads, triton.cdiv(length, _SPLIT)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = torch.empty((splits, batch, heads, queries, width), dtype=torch.float32, device=q.device)
    lse = torch.empty(out.shape[:-1], dtype=torch.float32, device=q.device)
    mask = 0, 0, 0
    if seen is not None:
        seen = seen.expand(batch, 1, queries, length)
        mask = seen.stride(0), seen.stride(2), seen.stride(3)
    wide = max(16, triton.next_power_of_2(dim))
    _split[(splits, batch * kv_heads)](
        q, k, v, q if seen is None else seen, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask,
        scale * math.log2(math.e), length, queries, heads, group, dim, width,
        ROWS=max(16, triton.next_power_of_2(group * queries)), KEYS=min(64, _BYTES // (wide * q.element_size())),
        SPLIT=_SPLIT, D=wide, W=max(16, triton.next_power_of_2(width)), MASKED=seen is not None, num_warps=4,
        num_stages=2,
    )  # fmt: skip
    return out, lse
