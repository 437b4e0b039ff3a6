"""The eager reference: what a launch means, block list by block list, without a kernel. The oracle of the lowering."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .masks import MaskMod

_SCORES = 1 << 25
"""Scores held at a time: bounds the memory of the reference at any length."""


def slot_mask(
    mask_mod: MaskMod, lists: tuple[Tensor, Tensor, Tensor, Tensor], keys: int, tile: int, first: int = 0
) -> Tensor:
    """bool [B, H, Q, KV]: pairs of slots that a kernel computes: full blocks whole, partial ones under the mask_mod.
    ``first``: the query slot at which the lists begin."""
    partial, full = (_table(count, index, keys // tile) for count, index in (lists[:2], lists[2:]))
    batch, heads, rows, _ = partial.shape
    b, h, q, kv = (torch.arange(n, device=partial.device) for n in (batch, heads, rows * tile, keys))
    allowed = mask_mod(b[:, None, None, None], h[:, None, None], first + q[:, None], kv)
    partial, full = (t.repeat_interleave(tile, 2).repeat_interleave(tile, 3) for t in (partial, full))
    return full | (partial & allowed)


def _table(count: Tensor, index: Tensor, tiles: int) -> Tensor:
    """bool [..., tiles] from a block list."""
    real = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    listed = torch.zeros((*count.shape, tiles + 1), dtype=torch.bool, device=index.device)
    return listed.scatter_(-1, torch.where(real, index, tiles).long(), True)[..., :-1]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, H, M, D], k, v [B, Hkv, N, D], mask bool [B, H, M, N] -> out like q, lse float32 [B, H, M].

    In float64 for float32 inputs and in float32 for half precision; rows without a key give 0 and -inf. What is not
    finite in a key or value reaches the rows that see it, and no other.
    """
    wide = torch.float64 if q.dtype in (torch.float32, torch.float64) else torch.float32
    group = q.shape[1] // k.shape[1]
    kr, vr = (t.to(wide).repeat_interleave(group, 1) for t in (k, v))
    scores = (q.to(wide) @ kr.mT * scale).masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp().masked_fill(~mask, 0.0)
    return _weighted(weights, vr, mask).to(q.dtype), lse.float()


def _weighted(weights: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``weights @ v``, where a weight of 0 outside the mask hides a value that is not finite."""
    finite = v.isfinite()
    if finite.all():
        return weights @ v
    out = weights @ torch.where(finite, v, 0.0)
    nan = mask.to(v.dtype) @ v.isnan().to(v.dtype) > 0
    for infinity in (float("inf"), float("-inf")):
        seen = weights @ (v == infinity).to(v.dtype) > 0
        out = torch.where(seen, out + infinity, out)  # of both signs: not a number
    return torch.where(nan, float("nan"), out)


def in_strips(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Callable[[int, int], Tensor], step: int = 1
) -> tuple[Tensor, Tensor]:
    """`softmax_attention` some rows at a time: ``mask(first, last)`` gives bool [B, H, last - first, N]. ``step``: rows
    that are not split."""
    batch, heads, m, n = *q.shape[:3], k.shape[2]
    out, lse = (
        q.new_empty((batch, heads, m, v.shape[3])),
        torch.empty(q.shape[:3], dtype=torch.float32, device=q.device),
    )
    for first, last in _strips(m, n * batch * heads, step):
        rows = slice(first, last)
        out[:, :, rows], lse[:, :, rows] = softmax_attention(q[:, :, rows], k, v, mask(first, last), scale)
    return out, lse


def _strips(rows: int, scores: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, last) of strips of rows, each of so many scores, that hold `_SCORES` at most where ``step`` allows."""
    many = max(1, _SCORES // max(1, scores * step)) * step
    return ((first, min(first + many, rows)) for first in range(0, rows, many))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of the last M of N positions, and its log-sum-exp."""
    m, n = q.shape[2], k.shape[2]
    number = torch.arange(n, device=q.device)

    def mask(first: int, last: int) -> Tensor:
        return (number <= number[n - m + first : n - m + last, None]).expand(*q.shape[:2], -1, -1)

    return in_strips(q, k, v, scale, mask)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_mod: MaskMod,
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
    tile: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One launch, eagerly, some query tiles at a time. See `backends.attend`."""

    def mask(first: int, last: int) -> Tensor:
        num, index, full_num, full_index = (t[:, :, first // tile : -(-last // tile)] for t in lists)
        return slot_mask(mask_mod, (num, index, full_num, full_index), k.shape[2], tile, first)

    return in_strips(q, k, v, scale, mask, tile)
