"""Scores of every query with every key, or with every block's mean key, reduced to one number for each pair of blocks.

The scores themselves are never in memory: one program computes those of a block of queries with a tile of keys and
stores what is left of them. float32 but for products of halves, which are accumulated in float32.
"""

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

_ROWS = (16, 32, 64, 128)
"""Queries that one program takes."""
_KEYS = 64
"""Mean keys a tile of `block_sums`."""

if triton is not None:

    @triton.jit
    def _store_sums(score, seen, sums, tops, at, tile, number, blocks):
        """Column sums of exponentials over the greatest score of a tile, and that score."""
        score = tl.where(seen, score, float("-inf"))
        top = tl.max(score)
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.where(seen, tl.exp(score - base), 0.0)
        tl.store(sums + at * blocks + number, tl.sum(weight, 0), mask=number < blocks)
        tl.store(tops + at * tl.num_programs(1) + tile, top)

    @jit(do_not_specialize=["blocks"])
    def _sums(
        q, means, limit, bound, sums, tops, bound_sums, bound_tops, scale, blocks, heads, group,
        ROWS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BOUND: tl.constexpr,
    ):  # fmt: skip
        """A block of queries and a tile of K mean keys of one head."""
        i, tile, own = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        batch, kv = own // heads, own // heads * (heads // group) + own % heads // group
        row, d, number = tl.arange(0, ROWS), tl.arange(0, D), tile * K + tl.arange(0, K)
        slots = tl.num_programs(0) * ROWS
        last = tl.load(limit + batch * slots + i * ROWS + row)
        channel = (d < DIM)[None]
        query = tl.load(q + (own * slots + i * ROWS + row)[:, None] * DIM + d[None], mask=channel, other=0.0)
        real = number < blocks
        key = tl.load(means + (kv * blocks + number)[:, None] * DIM + d[None], mask=real[:, None] & channel, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (number[None] <= last[:, None]) & (tl.abs(score) < float("inf"))
        at = own * tl.num_programs(0) + i
        _store_sums(score, seen, sums, tops, at, tile, number, blocks)
        if BOUND:
            norm = tl.sqrt(tl.sum(query.to(tl.float32) * query.to(tl.float32), 1))
            more = tl.load(bound + kv * blocks + number, mask=real, other=0.0)
            _store_sums(score + norm[:, None] * more[None], seen, bound_sums, bound_tops, at, tile, number, blocks)

    @jit(do_not_specialize=["keys", "blocks", "rows"])
    def _maxima(
        q, k, limit, maxima, lse, scale, keys, blocks, heads, rows,
        ROWS: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        """Some queries of one head over all keys up to the last that any of them sees."""
        row, own = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
        d, j = tl.arange(0, D), tl.arange(0, SIZE)
        there, channel = row < rows, (d < DIM)[None]
        last = tl.load(limit + own // heads * rows + row, mask=there, other=-1)
        at = (own * rows + row)[:, None]
        query = tl.load(q + at * DIM + d[None], mask=there[:, None] & channel, other=0.0)
        base = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for block in range(tl.max(last, 0) // SIZE + 1):
            number = block * SIZE + j
            real = number < keys
            key = tl.load(k + (own * keys + number)[:, None] * DIM + d[None], mask=real[:, None] & channel, other=0.0)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            seen = (number[None] <= last[:, None]) & (tl.abs(score) < float("inf"))
            score = tl.where(seen, score, float("-inf"))
            greatest = tl.max(score, 1)
            tl.store(maxima + (own * rows + row) * blocks + block, greatest, mask=there)
            top = tl.maximum(base, greatest)
            safe = tl.where(top == float("-inf"), 0.0, top)
            total = total * tl.exp(base - safe) + tl.sum(tl.exp(score - safe[:, None]), 1)
            base = top
        tl.store(lse + own * rows + row, base + tl.log(tl.maximum(total, 1e-38)), mask=there)


def fused(t: Tensor, size: int) -> bool:
    """Whether kernels run on this tensor for blocks of this size, so that scores are not in memory."""
    return use_triton(t) and size in _ROWS


def block_sums(
    q: Tensor, means: Tensor, limit: Tensor, scale: float, size: int, bound: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Every query against the mean keys of the blocks that it may weigh, summed over the queries of each block: float32
    [B, H, query blocks, key blocks], the sums of exponentials over the greatest sum of the row (0: no query).

    Args:
        q: [B, H, query blocks x size, D], contiguous. means: [B, Hkv, key blocks, D], contiguous, same dtype.
        limit: int32 [B, query blocks x size], the last key block that each query weighs (-1: none).
        bound: float32 [B, Hkv, key blocks]; the same once more for scores to which the query's norm times this is added
            (else None is returned for it).
    """
    batch, heads, slots, dim = q.shape
    kv_heads, blocks, rows = means.shape[1], means.shape[2], slots // size
    if not fused(q, size):
        return _sums_twin(q, means, limit, scale, size, bound)
    assert triton is not None
    tiles = triton.cdiv(blocks, _KEYS)
    sums, tops = (torch.empty((batch, heads, rows, n), dtype=torch.float32, device=q.device) for n in (blocks, tiles))
    more = (sums, tops) if bound is None else (torch.empty_like(sums), torch.empty_like(tops))
    _sums[(rows, tiles, batch * heads)](
        q, means, limit.contiguous(), sums if bound is None else bound.contiguous(), sums, tops, *more, scale, blocks,
        heads, heads // kv_heads, ROWS=size, K=_KEYS, D=max(16, triton.next_power_of_2(dim)), DIM=dim,
        BOUND=bound is not None, num_warps=4 if size <= 64 else 8,
    )  # fmt: skip
    return _relative(sums, tops, _KEYS), None if bound is None else _relative(*more, _KEYS)


def _relative(sums: Tensor, tops: Tensor, keys: int) -> Tensor:
    """Sums over the greatest score of their tile [..., tiles] as shares of the greatest sum of the row."""
    top = tops.amax(-1, keepdim=True)
    level = torch.where(tops > float("-inf"), tops - top, float("-inf")).exp()
    sums = sums * level.repeat_interleave(keys, -1)[..., : sums.shape[-1]]
    return sums / sums.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _sums_twin(
    q: Tensor, means: Tensor, limit: Tensor, scale: float, size: int, bound: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    group = q.shape[1] // means.shape[1]
    scores = (q.float().unflatten(1, (-1, group)).flatten(2, 3) @ means.float().mT * scale).unflatten(2, (group, -1))
    scores = scores.flatten(1, 2)
    seen = torch.arange(means.shape[2], device=q.device) <= limit[..., None]
    seen = seen[:, None] & (scores.abs() < float("inf"))

    def shares(scores: Tensor) -> Tensor:
        scores = scores.masked_fill(~seen, float("-inf")).unflatten(2, (-1, size))
        top = scores.amax((3, 4), keepdim=True)
        sums = (scores - torch.where(top > float("-inf"), top, 0.0)).exp().sum(3)
        return sums / sums.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    if bound is None:
        return shares(scores), None
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True, dtype=torch.float32)
    return shares(scores), shares(scores + norm * bound.repeat_interleave(group, 1)[:, :, None])


def block_maxima(q: Tensor, k: Tensor, limit: Tensor, scale: float, size: int) -> tuple[Tensor, Tensor]:
    """The greatest score of every query in every block of ``size`` keys, float32 [B, H, rows, key blocks] (-inf: none),
    and the log-sum-exp of its scores [B, H, rows] (of a query without keys any number).

    Args:
        q: [B, H, rows, D], contiguous. k: [B, H, keys, D], contiguous, same dtype.
        limit: int32 [B, rows], the last key that each query sees (-1: none).
    """
    batch, heads, rows, dim = q.shape
    keys, blocks = k.shape[2], -(-k.shape[2] // size)
    if not fused(q, size):
        return _maxima_twin(q, k, limit, scale, size)
    assert triton is not None
    maxima = torch.full((batch, heads, rows, blocks), float("-inf"), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    _maxima[(triton.cdiv(rows, 64), batch * heads)](
        q, k, limit.contiguous(), maxima, lse, scale, keys, blocks, heads, rows,
        ROWS=64, SIZE=size, D=max(16, triton.next_power_of_2(dim)), DIM=dim, num_warps=4,
        num_stages=3 if q.element_size() == 2 else 1,
    )  # fmt: skip
    return maxima, lse


def _maxima_twin(q: Tensor, k: Tensor, limit: Tensor, scale: float, size: int) -> tuple[Tensor, Tensor]:
    keys = k.shape[2]
    scores = q.float() @ k.float().mT * scale
    seen = torch.arange(keys, device=q.device) <= limit[..., None]
    scores = scores.masked_fill(~(seen[:, None] & (scores.abs() < float("inf"))), float("-inf"))
    padded = torch.nn.functional.pad(scores, (0, -keys % size), value=float("-inf"))
    return padded.unflatten(-1, (-1, size)).amax(-1), scores.logsumexp(-1)
