"""Attention mass of a few queries over all keys, per key and per distance, without holding the scores.

Two sweeps over K: the first for the log-sum-exp of every query, the second for the masses. float32 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SPAN = 256
"""Distances that the rows and keys of one block may span for the kernel (else the twin runs)."""


_KEYS = 64
"""Keys a block: 64 x 64 scores leave room in registers for what is summed from them."""
_BLOCKS = 16
"""Blocks of keys that one program goes through."""

if triton is not None:

    @triton.jit
    def _scores(query, k, limit, position, keys, dim, k_n, scale, n, D: tl.constexpr):
        """float32 [L, K]: scores (times log2 e) of the rows against a block of keys (token numbers), -inf where unseen
        or infinite."""
        d = tl.arange(0, D)
        real = (keys >= 0) & (keys < n)
        key = tl.load(k + keys.to(tl.int64)[:, None] * k_n + d[None], mask=real[:, None] & (d < dim)[None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * 1.4426950408889634)
        at = tl.load(position + keys, mask=real, other=1 << 30)
        at = tl.where(at < 0, 1 << 30, at)
        seen = (at[None] <= limit[:, None]) & (tl.abs(score) < float("inf"))
        return tl.where(seen, score, float("-inf"))

    @triton.jit
    def _sum(
        q, k, limit, position, top, total, dim, k_b, k_h, k_n, p_b, scale, n, heads, group, chunks,
        L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """First sweep: greatest score and sum of exponentials of a chunk of keys, for the L rows of one head."""
        head = tl.program_id(0) % heads
        batch = (tl.program_id(0) // heads).to(tl.int64)
        own = batch * heads + head
        row, d = tl.arange(0, L), tl.arange(0, D)
        query = tl.load(q + (own * L + row)[:, None] * dim + d[None], mask=(d < dim)[None], other=0.0)
        reach = tl.load(limit + batch * L + row)
        k += batch * k_b + (head // group).to(tl.int64) * k_h
        high = tl.full([L], float("-inf"), tl.float32)
        sums = tl.zeros([L], tl.float32)
        for block in range(BLOCKS):
            keys = (tl.program_id(1) * BLOCKS + block) * K + tl.arange(0, K)
            score = _scores(query, k, reach, position + batch * p_b, keys, dim, k_n, scale, n, D)
            new = tl.maximum(high, tl.max(score, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            sums = sums * tl.exp2(high - safe) + tl.sum(tl.exp2(score - safe[:, None]), 1)
            high = new
        at = (own * chunks + tl.program_id(1)) * L + row
        tl.store(top + at, high)
        tl.store(total + at, sums)

    @triton.jit
    def _join(top, total, lse, chunks, L: tl.constexpr, MANY: tl.constexpr):
        """log2 of the sums of exponentials of one head's rows over all chunks; +inf for rows that see nothing."""
        own = tl.program_id(0).to(tl.int64)
        row = tl.arange(0, L)
        high = tl.full([L], float("-inf"), tl.float32)
        sums = tl.zeros([L], tl.float32)
        for some in range(MANY):
            chunk = some * 64 + tl.arange(0, 64)
            at = ((own * chunks + chunk) * L)[:, None] + row[None]
            other = tl.load(top + at, mask=(chunk < chunks)[:, None], other=float("-inf"))
            new = tl.maximum(high, tl.max(other, 0))
            safe = tl.where(new == float("-inf"), 0.0, new)
            part = tl.load(total + at, mask=(chunk < chunks)[:, None], other=0.0) * tl.exp2(other - safe[None])
            sums = sums * tl.exp2(high - safe) + tl.sum(part, 0)
            high = new
        found = high + tl.log2(tl.maximum(sums, 1e-38))
        tl.store(lse + own * L + row, tl.where(high == float("-inf"), float("inf"), found))

    @triton.jit
    def _mass(
        q, k, limit, position, lse, stand, index, vertical, diagonal, diagonals, tiles, dim, k_b, k_h, k_n, p_b,
        scale, n, size, heads, group,
        L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
        BLOCKS: tl.constexpr, GATHERED: tl.constexpr, DIAGONAL: tl.constexpr,
    ):  # fmt: skip
        """Second sweep: masses of some blocks of keys in scope, for one head."""
        head = tl.program_id(0) % heads
        batch = (tl.program_id(0) // heads).to(tl.int64)
        own = batch * heads + head
        row, d = tl.arange(0, L), tl.arange(0, D)
        query = tl.load(q + (own * L + row)[:, None] * dim + d[None], mask=(d < dim)[None], other=0.0)
        reach = tl.load(limit + batch * L + row)
        k += batch * k_b + (head // group).to(tl.int64) * k_h
        sums = tl.load(lse + own * L + row)
        at = tl.load(stand + batch * L + row)  # -1: the row stands before every key, its mass is 0
        j = tl.arange(0, K)
        for block in range(BLOCKS):
            start = (tl.program_id(1) * BLOCKS + block) * K
            place = start + j
            if GATHERED:
                keys = tl.load(index + batch * size + place, mask=place < size, other=-1)
            else:
                keys = tl.where(place < size, place, -1)
            score = _scores(query, k, reach, position + batch * p_b, keys, dim, k_n, scale, n, D)
            mass = tl.exp2(score - sums[:, None])
            tl.store(vertical + own * size + place, tl.sum(mass, 0), mask=place < size)
            # Distances of a row to these keys lie in one tile of distances or two: the first ``edge + 1`` keys in the
            # farther one. A share (distance mod T) / T of a key's mass spills over to the next block diagonal, which
            # is linear in the key's number, so sums of mass and of mass times number are enough.
            tile = tl.maximum(at - start, 0) // T
            edge = at - start - tile * T
            number = j.to(tl.float32)[None]
            far = tl.where(j[None] <= edge[:, None], mass, 0.0)
            far_mass, far_moment = tl.sum(far, 1), tl.sum(far * number, 1)
            near_mass, near_moment = tl.sum(mass, 1) - far_mass, tl.sum(mass * number, 1) - far_moment
            away = edge.to(tl.float32)
            far_spill = (away * far_mass - far_moment) * (1.0 / T)
            near_spill = ((away + T) * near_mass - near_moment) * (1.0 / T)
            most = tl.max(tile, 0) + 1
            for i in tl.static_range(S // T + 2):
                share = tl.where(tile == most - i, far_mass - far_spill + near_spill, 0.0)
                share += tl.where(tile + 1 == most - i, far_spill, 0.0)
                share += tl.where(tile - 1 == most - i, near_mass - near_spill, 0.0)
                total = tl.sum(share, 0)
                there = (most - i >= 0) & (most - i < tiles) & (total > 0)
                tl.atomic_add(diagonals + own * tiles + most - i, total, mask=there)
            if DIAGONAL:
                least = tl.min(tl.where(at < 0, 1 << 30, at), 0) - start - (K - 1)  # the least distance of this block
                distance = least + tl.arange(0, S)
                source = at[:, None] - distance[None] - start
                found = (source >= 0) & (source < K) & (at >= 0)[:, None]
                moved = tl.gather(mass, tl.where(found, source, 0), 1)
                part = tl.sum(tl.where(found, moved, 0.0), 0)
                there = (distance >= 0) & (distance < size) & (part > 0)
                tl.atomic_add(diagonal + own * size + distance, part, mask=there)


def block_diagonals(diagonal: Tensor, tile: int) -> Tensor:
    """float32 [..., tiles]: mass that each block diagonal would hold, if what is seen at a distance held for queries at
    every place in a tile. Of a distance ``j * tile + r``, (tile - r) of the tile's queries see it on block diagonal j
    and the other r on j + 1."""
    tiles = -(-diagonal.shape[-1] // tile)
    mass = torch.nn.functional.pad(diagonal, (0, tiles * tile - diagonal.shape[-1])).unflatten(-1, (tiles, tile))
    spill = (mass * (torch.arange(tile, device=mass.device, dtype=mass.dtype) / tile)).sum(-1)
    own = mass.sum(-1) - spill
    own[..., 1:] += spill[..., :-1]
    return own


def last_mass(
    q: Tensor, k: Tensor, scale: float, limit: Tensor, position: Tensor, stand: Tensor, index: Tensor | None, size: int,
    tile: int, distances: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Softmax mass of L queries, summed: per key in scope [B, H, size], per distance (if ``distances``) likewise, per
    block diagonal (`block_diagonals`) [B, H, ceil(size / tile)]; float32.

    Args:
        q: [B, H, L, D], L a power of two of at least 16. k: [B, Hkv, N, D].
        limit: int32 [B, L], the position up to which each query sees (-1: none). position: int32 [B|1, N], of the keys.
        stand: int32 [B, L], where each query stands in keys in scope (-1: before the first); all within ``SPAN - 128``
            keys of each other. tile: 128 or a multiple.
        index: int32 [B, size], tokens in scope (-1: none), or None for the first ``size`` tokens.
    """
    assert triton is not None
    batch, heads, rows, dim = q.shape
    n, group = k.shape[2], heads // k.shape[1]
    q = q.contiguous()
    chunks, tiles = triton.cdiv(n, _KEYS * _BLOCKS), triton.cdiv(size, tile)
    top = torch.empty((batch, heads, chunks, rows), device=q.device)
    total, lse = torch.empty_like(top), torch.empty((batch, heads, rows), device=q.device)
    vertical = torch.empty((batch, heads, size), device=q.device)
    diagonals = torch.zeros((batch, heads, tiles), device=q.device)
    diagonal = torch.zeros_like(vertical) if distances else None
    numbers = (dim, *k.stride()[:3], position.stride(0) if position.shape[0] > 1 else 0, scale, n)
    shape = {"L": rows, "K": _KEYS, "D": max(16, triton.next_power_of_2(dim)), "BLOCKS": _BLOCKS}
    _sum[(batch * heads, chunks)](q, k, limit, position, top, total, *numbers, heads, group, chunks, **shape)
    many = triton.next_power_of_2(triton.cdiv(chunks, 64))
    _join[(batch * heads,)](top, total, lse, chunks, L=rows, MANY=many)
    _mass[(batch * heads, triton.cdiv(size, _KEYS * _BLOCKS))](
        q, k, limit, position, lse, stand, position if index is None else index, vertical,
        vertical if diagonal is None else diagonal, diagonals, tiles, *numbers, size, heads, group,
        S=SPAN, T=tile, GATHERED=index is not None, DIAGONAL=distances, **shape,
    )  # fmt: skip
    return vertical, diagonal, diagonals
