"""The eager reference: what a launch means, block list by block list, without a kernel. The oracle of the lowering."""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import MaskMod


def slot_mask(mask_mod: MaskMod, lists: tuple[Tensor, Tensor, Tensor, Tensor], keys: int, tile: int) -> Tensor:
    """bool [B, H, Q, KV]: pairs of slots that a kernel computes: full blocks whole, partial ones under the mask_mod."""
    partial, full = (_table(count, index, keys // tile) for count, index in (lists[:2], lists[2:]))
    batch, heads, rows, _ = partial.shape
    b, h, q, kv = (torch.arange(n, device=partial.device) for n in (batch, heads, rows * tile, keys))
    allowed = mask_mod(b[:, None, None, None], h[:, None, None], q[:, None], kv)
    partial, full = (t.repeat_interleave(tile, 2).repeat_interleave(tile, 3) for t in (partial, full))
    return full | (partial & allowed)


def _table(count: Tensor, index: Tensor, tiles: int) -> Tensor:
    """bool [..., tiles] from a block list."""
    real = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    listed = torch.zeros((*count.shape, tiles + 1), dtype=torch.bool, device=index.device)
    return listed.scatter_(-1, torch.where(real, index, tiles).long(), True)[..., :-1]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, H, M, D], k, v [B, Hkv, N, D], mask bool [B, H, M, N] -> out like q, lse float32 [B, H, M].

    In float64 for float32 inputs and in float32 for half precision; rows without a key give 0 and -inf.
    """
    wide = torch.float64 if q.dtype in (torch.float32, torch.float64) else torch.float32
    group = q.shape[1] // k.shape[1]
    kr, vr = (t.to(wide).repeat_interleave(group, 1) for t in (k, v))
    scores = (q.to(wide) @ kr.mT * scale).masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp().masked_fill(~mask, 0.0)
    return (weights @ vr).to(q.dtype), lse.float()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_mod: MaskMod,
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
    tile: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One launch, eagerly. See `backends.Backend.attend`."""
    return softmax_attention(q, k, v, slot_mask(mask_mod, lists, k.shape[2], tile), scale)
