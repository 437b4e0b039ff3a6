"""Moving rows of q, k, v and out between token order and slot order."""

from __future__ import annotations

import torch
from torch import Tensor

from . import use_triton

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def _take(
        src, index, out, src_b, src_h, src_n, out_b, out_h, out_n, index_b, index_h, group, heads, slots, dim,
        BLOCK: tl.constexpr, DIM: tl.constexpr, IDENTITY: tl.constexpr,
    ):  # fmt: skip
        """A block of slots of one head."""
        slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        head = tl.program_id(1) % heads
        batch = (tl.program_id(1) // heads).to(tl.int64)
        inside = slot < slots
        if IDENTITY:
            row = tl.where(inside, slot, -1).to(tl.int64)
        else:
            row = tl.load(index + batch * index_b + head.to(tl.int64) * index_h + slot, mask=inside, other=-1).to(
                tl.int64
            )
        d = tl.arange(0, DIM)
        keep = inside[:, None] & (d < dim)[None]
        source = src + batch * src_b + (head // group).to(tl.int64) * src_h + row[:, None] * src_n + d[None]
        value = tl.load(source, mask=keep & (row >= 0)[:, None], other=0.0)
        target = out + batch * out_b + head.to(tl.int64) * out_h + slot.to(tl.int64)[:, None] * out_n + d[None]
        tl.store(target, value, mask=keep)


def take_rows(src: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """``out[b, h, s] = src[b, h * Hs // H, index[b, h, s]]``, zero where the index is negative.

    src [B, Hs, N, D], index int [B, H, S] (any strides but the last), out [B, H, S, D] (last dimension contiguous).
    """
    batch, heads, slots = index.shape
    dim = src.shape[-1]
    if out is None:
        out = src.new_empty((batch, heads, slots, dim))
    group = heads // src.shape[1]
    if use_triton(src) and src.stride(-1) == 1 and out.stride(-1) == 1:
        assert triton is not None
        grid = (triton.cdiv(slots, 64), batch * heads)
        _take[grid](
            src, index, out, *src.stride()[:3], *out.stride()[:3], index.stride(0), index.stride(1), group, heads,
            slots, dim, BLOCK=64, DIM=triton.next_power_of_2(dim), IDENTITY=False,
        )  # fmt: skip
        return out
    if group > 1:
        src = src[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
    at = index.long().clamp(min=0)[..., None].expand(-1, -1, -1, dim)
    out.copy_(src.gather(2, at).masked_fill((index < 0)[..., None], 0))
    return out


def copy_rows(src: Tensor, out: Tensor) -> None:
    """``out[:] = src`` for [B, H, N, D] of any strides but the last (torch's copy of a strided slice is slower)."""
    if use_triton(src) and src.stride(-1) == 1 and out.stride(-1) == 1:
        assert triton is not None
        batch, heads, slots, dim = src.shape
        _take[(triton.cdiv(slots, 64), batch * heads)](
            src, src, out, *src.stride()[:3], *out.stride()[:3], 0, 0, 1, heads, slots, dim,
            BLOCK=64, DIM=triton.next_power_of_2(dim), IDENTITY=True,
        )  # fmt: skip
        return
    out.copy_(src)


if triton is not None:

    @triton.jit
    def _put(
        src, index, count, heads_at, out, src_b, src_h, src_n, out_b, out_h, out_n, heads, slots, dim,
        BLOCK: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        head = tl.program_id(1) % heads
        batch = (tl.program_id(1) // heads).to(tl.int64)
        own = batch * heads + head
        real = slot < tl.load(count + own)
        row = tl.load(index + own * slots + slot, mask=real & (slot < slots), other=-1).to(tl.int64)
        real = real & (row >= 0)
        d = tl.arange(0, DIM)
        keep = real[:, None] & (d < dim)[None]
        source = src + batch * src_b + head.to(tl.int64) * src_h + slot.to(tl.int64)[:, None] * src_n + d[None]
        target = out + batch * out_b + tl.load(heads_at + head).to(tl.int64) * out_h + row[:, None] * out_n + d[None]
        tl.store(target, tl.load(source, mask=keep, other=0.0), mask=keep)


def put_rows(src: Tensor, index: Tensor, count: Tensor, heads: Tensor, out: Tensor) -> None:
    """``out[b, heads[h], index[b, h, s]] = src[b, h, s]`` for s below count int64 [b, h] with an index from 0 on.

    src [B, h, S, D], index int64 [B, h, S] without repeats among those, heads int64 [h], out [B, H, N, D].
    """
    batch, n_heads, slots, dim = src.shape
    if use_triton(src) and src.stride(-1) == 1 and out.stride(-1) == 1:
        assert triton is not None
        _put[(triton.cdiv(slots, 64), batch * n_heads)](
            src, index.contiguous(), count.contiguous(), heads, out, *src.stride()[:3], *out.stride()[:3], n_heads,
            slots, dim, BLOCK=64, DIM=triton.next_power_of_2(dim),
        )  # fmt: skip
        return
    real = (torch.arange(slots, device=src.device) < count[..., None]) & (index >= 0)
    tokens = out.shape[2]
    at = torch.where(real, index, tokens)[..., None].expand(src.shape)  # the rest goes to a row that is cut off again
    part = torch.nn.functional.pad(out.index_select(1, heads), (0, 0, 0, 1)).scatter_(2, at, src)
    out.index_copy_(1, heads, part[:, :, :tokens])
