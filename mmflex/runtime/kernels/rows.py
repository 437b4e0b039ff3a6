"""Moving rows of q, k, v and out between token order and slot order."""

from __future__ import annotations

import torch
from torch import Tensor

from . import use_triton
from .listing import jit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @jit(do_not_specialize=["index_b", "index_h", "slots"])
    def _take(
        src, index, heads_at, out, src_b, src_h, src_n, out_b, out_h, out_n, index_b, index_h, group, heads, slots, dim,
        BLOCK: tl.constexpr, DIM: tl.constexpr, CHOSEN: tl.constexpr, FINITE: tl.constexpr,
    ):  # fmt: skip
        """A block of slots of one head."""
        slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        head = tl.program_id(1) % heads
        batch = (tl.program_id(1) // heads).to(tl.int64)
        inside = slot < slots
        row = tl.load(index + batch * index_b + head.to(tl.int64) * index_h + slot, mask=inside, other=-1).to(tl.int64)
        d = tl.arange(0, DIM)
        keep = inside[:, None] & (d < dim)[None]
        own = (head // group).to(tl.int64)
        if CHOSEN:
            own = tl.load(heads_at + head)
        source = src + batch * src_b + own * src_h + row[:, None] * src_n + d[None]
        value = tl.load(source, mask=keep & (row >= 0)[:, None], other=0.0)
        if FINITE:
            value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
        target = out + batch * out_b + head.to(tl.int64) * out_h + slot.to(tl.int64)[:, None] * out_n + d[None]
        tl.store(target, value, mask=keep)


def take_rows(
    src: Tensor, index: Tensor, out: Tensor | None = None, heads_at: Tensor | None = None, finite: bool = False
) -> Tensor:
    """``out[b, h, s] = src[b, heads_at[h], index[b, h, s]]``, zero where the index is negative.

    src [B, Hs, N, D], index int [B, H, S] (any strides but the last), out [B, H, S, D] (last dimension contiguous),
    heads_at int64 [H] (None: ``h * Hs // H``). ``finite``: zero also for numbers that are not finite.
    """
    batch, heads, slots = index.shape
    dim = src.shape[-1]
    if out is None:
        out = src.new_empty((batch, heads, slots, dim))
    group = max(1, heads // src.shape[1])
    if use_triton(src) and src.stride(-1) == 1 and out.stride(-1) == 1:
        assert triton is not None
        grid = (triton.cdiv(slots, 64), batch * heads)
        _take[grid](
            src, index, index if heads_at is None else heads_at, out, *src.stride()[:3], *out.stride()[:3],
            index.stride(0), index.stride(1), group, heads, slots, dim, BLOCK=64, DIM=triton.next_power_of_2(dim),
            CHOSEN=heads_at is not None, FINITE=finite,
        )  # fmt: skip
        return out
    if heads_at is not None:
        src = src.index_select(1, heads_at)
    elif group > 1:
        src = src[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
    at = index.long().clamp(min=0)[..., None].expand(-1, -1, -1, dim)
    out.copy_(src.gather(2, at).masked_fill((index < 0)[..., None], 0))
    return out.nan_to_num_(0.0, 0.0, 0.0) if finite else out


if triton is not None:

    @jit(do_not_specialize=["table_b", "table_h", "tokens", "main", "first", "last"])
    def _fill(
        k, v, out_k, out_v, source, table, k_b, k_h, k_n, v_b, v_h, v_n, out_k_b, out_k_h, out_v_b, out_v_h, table_b,
        table_h, heads, tokens, main, first, last, dim_k, dim_v,
        BLOCK: tl.constexpr, DIM: tl.constexpr, GATHERED: tl.constexpr,
    ):  # fmt: skip
        """A block of slots of one KV head: of the keys, or (in the second half of the grid) of the values."""
        head = (tl.program_id(1) % heads).to(tl.int64)
        batch = (tl.program_id(1) // heads).to(tl.int64)
        own = tl.load(source + head)
        d = tl.arange(0, DIM)[None]
        slot = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = slot < last
        row = tl.where((slot < main) & (slot < tokens), slot, -1).to(tl.int64)
        if GATHERED:
            at = table + batch * table_b + head * table_h + (slot - main)
            row = tl.where(slot < main, row, tl.load(at, mask=inside & (slot >= main), other=-1))
        real, to = inside & (row >= 0), slot.to(tl.int64)[:, None]
        if tl.program_id(2) == 0:
            value = tl.load(
                k + batch * k_b + own * k_h + row[:, None] * k_n + d, mask=real[:, None] & (d < dim_k), other=0.0
            )
            tl.store(
                out_k + batch * out_k_b + head * out_k_h + to * dim_k + d, value, mask=inside[:, None] & (d < dim_k)
            )
        else:
            value = tl.load(
                v + batch * v_b + own * v_h + row[:, None] * v_n + d, mask=real[:, None] & (d < dim_v), other=0.0
            )
            tl.store(
                out_v + batch * out_v_b + head * out_v_h + to * dim_v + d, value, mask=inside[:, None] & (d < dim_v)
            )


def fill_slots(
    k: Tensor, v: Tensor, out_k: Tensor, out_v: Tensor, source: Tensor, main: int, table: Tensor | None, first: int = 0
) -> None:
    """Slots from ``first`` on of keys and values: ``out[b, h, s] = src[b, source[h], s]`` below ``main``, from there on
    ``src[b, source[h], table[b, h, s - main]]``; zero past the last token, and where the table is negative.

    k, v [B, Hs, N, D], D of either; out_k, out_v [B, H, slots, D], contiguous; source int64 [H]; table int64 [B, H, S]
    (None: nothing is gathered).
    """
    last = out_k.shape[2]
    if use_triton(k) and k.stride(-1) == v.stride(-1) == 1 and (table is None or table.stride(-1) == 1):
        assert triton is not None
        batch, heads = out_k.shape[:2]
        _fill[(triton.cdiv(last - first, 64), batch * heads, 2)](
            k, v, out_k, out_v, source, source if table is None else table, *k.stride()[:3], *v.stride()[:3],
            *out_k.stride()[:2], *out_v.stride()[:2], *((0, 0) if table is None else table.stride()[:2]), heads,
            k.shape[2], main, first, last, k.shape[3], v.shape[3],
            BLOCK=64, DIM=triton.next_power_of_2(max(k.shape[3], v.shape[3])), GATHERED=table is not None,
        )  # fmt: skip
        return
    end, own = min(main, last), min(k.shape[2], main, last)
    for src, out in ((k.index_select(1, source), out_k), (v.index_select(1, source), out_v)):
        if first < end:
            out[:, :, first:own].copy_(src[:, :, first:own])
            out[:, :, max(first, own) : end].zero_()
        if table is not None and last > main:
            take_rows(src, table, out[:, :, main:last])


if triton is not None:

    @jit(do_not_specialize=["slots"])
    def _put(
        src, index, count, heads_at, out, src_b, src_h, src_n, out_b, out_h, out_n, heads, slots, dim,
        BLOCK: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        head = tl.program_id(1) % heads
        batch = (tl.program_id(1) // heads).to(tl.int64)
        own = batch * heads + head
        to_head = tl.load(heads_at + head).to(tl.int64)
        real = (slot < tl.load(count + own)) & (to_head >= 0)
        row = tl.load(index + own * slots + slot, mask=real & (slot < slots), other=-1).to(tl.int64)
        real = real & (row >= 0)
        d = tl.arange(0, DIM)
        keep = real[:, None] & (d < dim)[None]
        source = src + batch * src_b + head.to(tl.int64) * src_h + slot.to(tl.int64)[:, None] * src_n + d[None]
        target = out + batch * out_b + to_head * out_h + row[:, None] * out_n + d[None]
        tl.store(target, tl.load(source, mask=keep, other=0.0), mask=keep)


def put_rows(src: Tensor, index: Tensor, count: Tensor, heads: Tensor, out: Tensor) -> None:
    """``out[b, heads[h], index[b, h, s]] = src[b, h, s]`` for s below count int64 [b, h] with an index from 0 on;
    nothing where ``heads[h]`` is -1.

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
    if out.is_meta:  # there is nothing to write, nor to read back
        return
    there = heads >= 0  # a few entries, and on the CPU: reading them back is cheap
    if not there.all():
        src, index, count, heads = src[:, there], index[:, there], count[:, there], heads[there]
    real = (torch.arange(slots, device=src.device) < count[..., None]) & (index >= 0)
    tokens = out.shape[2]
    at = torch.where(real, index, tokens)[..., None].expand(src.shape)  # the rest goes to a row that is cut off again
    part = torch.nn.functional.pad(out.index_select(1, heads), (0, 0, 0, 1)).scatter_(2, at, src)
    out.index_copy_(1, heads, part[:, :, :tokens])
