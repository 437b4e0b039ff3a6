"""A few queries, the same on every rank, on keys of which every rank holds a share: merged by log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.kernels.splits import attend_splits, fits
from ..runtime.merge import merge_splits
from .ranks import Ranks

_SCORES = 1 << 28
"""Scores held at a time."""


def attend_shares(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, ranks: Ranks) -> Tensor:
    """Attention of queries that all ranks have to keys that are dealt out to them: the same result on every rank.

    Args:
        q: [B, Hq, M, D], equal on all ranks. k, v: [B, Hkv, L, D], this rank's share, which may be empty.
        seen: bool, broadcastable to [B, 1, M, L]: which of them a query sees; None for all.

    Returns:
        [B, Hq, M, Dv] like q; 0 where a query sees no key on any rank.
    """
    if fits(q, k):
        out, lse = merge_splits(*attend_splits(q, k, v, seen, scale))
    else:
        out, lse = _attend(q, k, v, seen, scale)
    everybody = ranks.all_gather(torch.cat([out, lse[..., None]], -1)).finish()
    return merge_splits(everybody[..., :-1], everybody[..., -1])[0].to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(output [B, Hq, M, Dv], log-sum-exp [B, Hq, M]) over these keys: float32, on a CPU float64 for float32."""
    batch, heads, queries, _ = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    wide = torch.float32 if q.is_cuda or q.dtype != torch.float32 else torch.float64
    out = q.new_zeros((batch, heads, queries, v.shape[3]), dtype=wide)
    lse = out.new_full((batch, heads, queries), float("-inf"))
    if not length:
        return out, lse
    step = max(1, _SCORES // (batch * heads * length))
    for first in range(0, queries, step):
        rows = slice(first, first + step)
        query = q[:, :, rows].unflatten(1, (kv_heads, -1)).flatten(2, 3)
        scores = _product(query, k.mT, wide).unflatten(2, (heads // kv_heads, -1)) * scale
        if seen is not None:
            scores.masked_fill_(~seen[:, :, None, rows if seen.shape[2] > 1 else slice(None)], float("-inf"))
        sums = scores.logsumexp(-1)
        weights = (scores - torch.where(sums == float("-inf"), 0.0, sums)[..., None]).exp()
        part = _product(weights.flatten(2, 3).to(v.dtype if v.is_cuda else wide), v, wide)
        out[:, :, rows] = part.unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)
        lse[:, :, rows] = sums.flatten(1, 2)
    return out, lse


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """``a @ b`` of [B, H, ...], accumulated and returned in the wide type."""
    if a.is_cuda and a.dtype != wide:
        product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=wide)
        return product.unflatten(0, a.shape[:2])
    return a.to(wide) @ b.to(wide)
