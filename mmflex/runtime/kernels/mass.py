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
_KEYS = 128
"""Keys a block."""
_BLOCKS = 8
"""Blocks of keys that one program of the first sweep goes through."""

if triton is not None:

    @triton.jit
    def _scores(
        q, k, limit, position, keys, row, dim, k_n, scale, n, L: tl.constexpr, K: tl.constexpr, D: tl.constexpr
    ):
        """float32 [L, K]: scores of the rows against a block of keys (token numbers), -inf where unseen or infinite."""
        d = tl.arange(0, D)
        query = tl.load(q + row[:, None] * dim + d[None], mask=(d < dim)[None], other=0.0)
        real = (keys >= 0) & (keys < n)
        key = tl.load(k + keys.to(tl.int64)[:, None] * k_n + d[None], mask=real[:, None] & (d < dim)[None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        at = tl.load(position + keys, mask=real, other=1 << 30)
        at = tl.where(at < 0, 1 << 30, at)
        seen = (at[None] <= tl.load(limit + row)[:, None]) & (tl.abs(score) < float("inf"))
        return tl.where(seen, score, float("-inf"))

    @triton.jit
    def _sum(
        q, k, limit, position, top, total, dim, k_b, k_h, k_n, p_b, scale, n, heads, group, chunks,
        L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """First sweep: greatest score and sum of exponentials of a chunk of keys, for the L rows of one head."""
        head = tl.program_id(0) % heads
        batch = tl.program_id(0) // heads
        chunk = tl.program_id(1)
        row = tl.arange(0, L)
        base = (batch * heads + head).to(tl.int64)
        own = q + base * L * dim
        k += batch.to(tl.int64) * k_b + (head // group).to(tl.int64) * k_h
        high = tl.full([L], float("-inf"), tl.float32)
        sums = tl.zeros([L], tl.float32)
        for block in range(BLOCKS):
            keys = (chunk * BLOCKS + block) * K + tl.arange(0, K)
            score = _scores(
                own, k, limit + batch * L, position + batch.to(tl.int64) * p_b, keys, row, dim, k_n, scale, n, L, K, D
            )  # fmt: skip
            new = tl.maximum(high, tl.max(score, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            sums = sums * tl.exp(high - safe) + tl.sum(tl.exp(score - safe[:, None]), 1)
            high = new
        tl.store(top + (base * chunks + chunk) * L + row, high)
        tl.store(total + (base * chunks + chunk) * L + row, sums)

    @triton.jit
    def _mass(
        q, k, limit, position, lse, stand, index, vertical, diagonal, diagonals, tiles, dim, k_b, k_h, k_n, p_b,
        scale, n, size, heads, group,
        L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
        GATHERED: tl.constexpr, DIAGONAL: tl.constexpr,
    ):  # fmt: skip
        """Second sweep: masses of one block of keys in scope, for one head."""
        head = tl.program_id(0) % heads
        batch = tl.program_id(0) // heads
        row = tl.arange(0, L)
        base = (batch * heads + head).to(tl.int64)
        query = q + base * L * dim
        k += batch.to(tl.int64) * k_b + (head // group).to(tl.int64) * k_h
        start = tl.program_id(1) * K
        place = start + tl.arange(0, K)
        if GATHERED:
            keys = tl.load(index + batch.to(tl.int64) * size + place, mask=place < size, other=-1)
        else:
            keys = tl.where(place < size, place, -1)
        score = _scores(
                query, k, limit + batch * L, position + batch.to(tl.int64) * p_b, keys, row, dim, k_n, scale, n, L, K, D
            )  # fmt: skip
        sums = tl.load(lse + base * L + row)
        mass = tl.exp(score - tl.where(sums == float("-inf"), 0.0, sums)[:, None])
        tl.store(vertical + base * size + place, tl.sum(mass, 0), mask=place < size)
        at = tl.load(stand + batch * L + row)  # -1: the row stands before every key, its mass is 0
        least = tl.min(tl.where(at < 0, 1 << 30, at), 0)
        first = least - start - (K - 1)  # the least distance of this block
        # Distances of a row to these keys lie in one tile of distances or two; sums of the mass and of the share that
        # spills over to the next block diagonal, for both and for the nearer one.
        away = tl.maximum(at[:, None] - place[None], 0)
        spill = (away % T).to(tl.float32) * (1.0 / T)
        own = tl.maximum(at - start, 0) // T  # of the farthest key: the greater of the two
        nearer = tl.where(away // T == own[:, None], 0.0, mass)
        all_mass, near_mass = tl.sum(mass, 1), tl.sum(nearer, 1)
        all_spill, near_spill = tl.sum(mass * spill, 1), tl.sum(nearer * spill, 1)
        far_mass, far_spill = all_mass - near_mass, all_spill - near_spill
        base_tile = tl.max(own, 0)
        for j in tl.static_range(S // T + 2):
            number = base_tile + 1 - j
            part = tl.where(own == number, far_mass - far_spill, 0.0) + tl.where(own + 1 == number, far_spill, 0.0)
            part += tl.where(own - 1 == number, near_mass - near_spill, 0.0) + tl.where(own == number, near_spill, 0.0)
            total = tl.sum(part, 0)
            tl.atomic_add(diagonals + base * tiles + number, total, mask=(number >= 0) & (number < tiles) & (total > 0))
        if DIAGONAL:
            distance = first + tl.arange(0, S)
            source = at[:, None] - distance[None] - start
            inside = (source >= 0) & (source < K) & (at >= 0)[:, None]
            moved = tl.gather(mass, tl.where(inside, source, 0), 1)
            part = tl.sum(tl.where(inside, moved, 0.0), 0)
            tl.atomic_add(
                diagonal + base * size + distance, part, mask=(distance >= 0) & (distance < size) & (part > 0)
            )


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
    width = max(16, triton.next_power_of_2(dim))
    q = q.contiguous()
    chunks = triton.cdiv(n, _KEYS * _BLOCKS)
    top = torch.empty((batch, heads, chunks, rows), device=q.device)
    total = torch.empty_like(top)
    p_b = position.stride(0) if position.shape[0] > 1 else 0
    shape = {"L": rows, "K": _KEYS, "D": width}
    _sum[(batch * heads, chunks)](
        q, k, limit, position, top, total, dim, k.stride(0), k.stride(1), k.stride(2), p_b, scale, n, heads, group,
        chunks, BLOCKS=_BLOCKS, **shape,
    )  # fmt: skip
    lse = torch.logsumexp(top + total.log(), 2)
    tiles = triton.cdiv(size, tile)
    vertical = torch.empty((batch, heads, size), device=q.device)
    diagonals = torch.zeros((batch, heads, tiles), device=q.device)
    diagonal = torch.zeros_like(vertical) if distances else None
    _mass[(batch * heads, triton.cdiv(size, _KEYS))](
        q, k, limit, position, lse, stand, position if index is None else index, vertical,
        vertical if diagonal is None else diagonal, diagonals, tiles, dim,
        k.stride(0), k.stride(1), k.stride(2), p_b, scale, n, size, heads, group,
        S=SPAN, T=tile, GATHERED=index is not None, DIAGONAL=distances, **shape,
    )  # fmt: skip
    return vertical, diagonal, diagonals
