"""Attention mass of a few queries over all keys, per key and per distance, without holding the scores.

Two sweeps over K: the first for the log-sum-exp of every query, the second for the masses. float32 throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device import estimate_result
from .listing import jit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SPAN = 256
"""Distances that the rows and keys of one block may span for the kernel (else the twin runs)."""


_KEYS = 64
"""Keys a block."""
_BLOCKS = 16
"""Blocks of keys that one program goes through."""
_SUM: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "maxnreg": 128}
_MASS: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "maxnreg": 168}
"""Measured best on H200: registers for several programs on a multiprocessor. Only the guarded loops spill, and few
programs go through them."""
_DISTANCES: dict[str, Any] = {"num_warps": 4, "num_stages": 2}

if triton is not None:

    @triton.jit
    def _load(k, keys, real, k_n, D: tl.constexpr, DIM: tl.constexpr, GUARDED: tl.constexpr):
        """A block of keys, [K, D]; ``GUARDED``: only those that are ``real``."""
        d = tl.arange(0, D)
        at = k + keys[:, None] * k_n + d[None]
        if GUARDED:
            return tl.load(at, mask=real[:, None] & (d < DIM)[None], other=0.0)
        if D == DIM:
            return tl.load(at)
        return tl.load(at, mask=(d < DIM)[None], other=0.0)

    @triton.jit
    def _queries(q, rows, batch, head, q_b, q_h, q_n, r_b, L: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
        """The rows of one head, [L, D]; zero where the index is negative."""
        at = tl.load(rows + batch * r_b + tl.arange(0, L)).to(tl.int64)[:, None]
        d = tl.arange(0, D)[None]
        source = q + batch * q_b + head.to(tl.int64) * q_h + at * q_n + d
        return tl.load(source, mask=(at >= 0) & (d < DIM), other=0.0)

    @triton.jit
    def _free(limit):
        """The position up to which every row sees (rows that see nothing apart)."""
        return tl.min(tl.where(limit < 0, 1 << 30, limit), 0)

    @jit(do_not_specialize=["r_b", "p_b", "n", "chunks"])
    def _sum(
        q, rows, k, limit, position, top, total, q_b, q_h, q_n, r_b, k_b, k_h, k_n, p_b, factor, n, heads, group,
        chunks,
        L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """First sweep: a base and the sum of exponentials over it of a chunk of keys, for the L rows of one head."""
        head = tl.program_id(0) % heads
        batch = (tl.program_id(0) // heads).to(tl.int64)
        own = batch * heads + head
        row, j = tl.arange(0, L), tl.arange(0, K)
        query = _queries(q, rows, batch, head, q_b, q_h, q_n, r_b, L, D, DIM)
        reach = tl.load(limit + batch * L + row)
        first = tl.program_id(1) * BLOCKS * K
        last = first + BLOCKS * K - 1
        position += batch * p_b
        k += batch * k_b + (head // group).to(tl.int64) * k_h + first.to(tl.int64) * k_n
        low = tl.load(position + first)
        high = tl.load(position + last, mask=last < n, other=1 << 30)
        base = tl.full([L], float("-inf"), tl.float32)
        sums = tl.full([L], float("inf"), tl.float32)
        # Every row sees every key of nearly every chunk: no mask, and the greatest score of the first block as base for
        # all. A sum that becomes too large or NaN this way (infinite scores) is computed again below.
        if (low >= 0) & (high - low == last - first) & (high <= _free(reach)):
            key = _load(k, j, True, k_n, D, DIM, False)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
            base = tl.max(tl.where(tl.abs(score) < float("inf"), score, float("-inf")), 1)
            safe = tl.where(base == float("-inf"), 0.0, base)
            part = tl.exp2(score - safe[:, None])
            for block in range(1, BLOCKS):
                key = _load(k + block * (K * k_n), j, True, k_n, D, DIM, False)
                score = tl.dot(query, tl.trans(key), input_precision="ieee")
                part += tl.exp2(score * factor - safe[:, None])
            sums = tl.where(base == float("-inf"), float("inf"), tl.sum(part, 1))
        if tl.max(tl.where(sums < 1e18, 0, 1), 0) > 0:
            base = tl.full([L], float("-inf"), tl.float32)
            sums = tl.zeros([L], tl.float32)
            for block in range(BLOCKS):
                keys = block * K + j
                real = first + keys < n
                key = _load(k, keys, real, k_n, D, DIM, True)
                score = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
                at = tl.load(position + first + keys, mask=real, other=-1)
                seen = (at >= 0)[None] & (at[None] <= reach[:, None]) & (tl.abs(score) < float("inf"))
                score = tl.where(seen, score, float("-inf"))
                new = tl.maximum(base, tl.max(score, 1))
                safe = tl.where(new == float("-inf"), 0.0, new)
                sums = sums * tl.exp2(base - safe) + tl.sum(tl.exp2(score - safe[:, None]), 1)
                base = new
        at = (own * chunks + tl.program_id(1)) * L + row
        tl.store(top + at, base)
        tl.store(total + at, sums)

    @jit(do_not_specialize=["tiles", "chunks"])
    def _join(top, total, limit, lse, diagonals, tiles, chunks, heads, L: tl.constexpr):
        """log2 of the sums of exponentials of one head's rows over all chunks; +inf for rows that see nothing. Sets the
        head's block diagonals to 0, to which the second sweep adds."""
        own = tl.program_id(0).to(tl.int64)
        first = 0
        while first < tiles:
            at = first + tl.arange(0, 512)
            tl.store(diagonals + own * tiles + at, tl.zeros([512], tl.float32), mask=at < tiles)
            first += 512
        row = tl.arange(0, L)
        high = tl.full([L], float("-inf"), tl.float32)
        sums = tl.zeros([L], tl.float32)
        for some in range(tl.cdiv(chunks, 64)):
            chunk = some * 64 + tl.arange(0, 64)
            at = ((own * chunks + chunk) * L)[:, None] + row[None]
            other = tl.load(top + at, mask=(chunk < chunks)[:, None], other=float("-inf"))
            new = tl.maximum(high, tl.max(other, 0))
            safe = tl.where(new == float("-inf"), 0.0, new)
            part = tl.load(total + at, mask=(chunk < chunks)[:, None], other=0.0) * tl.exp2(other - safe[None])
            sums = sums * tl.exp2(high - safe) + tl.sum(part, 0)
            high = new
        found = high + tl.log2(tl.maximum(sums, 1e-38))
        none = (high == float("-inf")) | (tl.load(limit + own // heads * L + row) < 0)
        tl.store(lse + own * L + row, tl.where(none, float("inf"), found))

    @triton.jit
    def _block(
        shares, query, k, position, index, vertical, diagonal, reach, sums, at, stand, most, start, first, size, k_n,
        factor,
        K: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, S: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
        GATHERED: tl.constexpr, DIAGONAL: tl.constexpr, WIDE: tl.constexpr, GUARDED: tl.constexpr,
    ):  # fmt: skip
        """Masses of one block of keys: stored per key, added per distance, and to ``shares`` [K, W] per block diagonal:
        of diagonal ``x``, in column ``most // T + 1 - x`` where ``most`` is the distance of the farthest row to the
        first key of all blocks."""
        j = tl.arange(0, K)
        real = start + j < size
        if GATHERED:
            keys = tl.load(index + start + j, mask=real, other=-1).to(tl.int64)
            real = keys >= 0
            key = _load(k, keys, real, k_n, D, DIM, GUARDED)
        else:
            keys = start + j
            key = _load(k + start.to(tl.int64) * k_n, j, real, k_n, D, DIM, GUARDED)
        mass = tl.exp2(tl.dot(key, query, input_precision="ieee") * factor - sums[None])
        if GUARDED:
            place = tl.load(position + keys, mask=real, other=-1)
            mass = tl.where((place >= 0)[:, None] & (place[:, None] <= reach[None]), mass, 0.0)
        if GUARDED or DIAGONAL:  # what is finite is 1 at most, but for rounding
            mass = tl.where(mass < 2.0, mass, 0.0)
        whole = tl.sum(mass, 1)
        tl.store(vertical + start + j, whole, mask=start + j < size)
        # A share (distance mod T) / T of a key's mass spills over to the next block diagonal. That is linear in the
        # distance but for a kink at every multiple of T, of which a block spans at most one (two, if ``WIDE``): sums of
        # mass, of mass times distance and of mass times distance from the kink are enough.
        x = tl.maximum(most - (start - first), 0) // T
        away = at[None] - (x * T + (start - first) + j).to(tl.float32)[:, None]
        signed, bent = tl.sum(mass * away, 1), tl.sum(mass * tl.abs(away), 1)
        before, after = (bent + signed) * (0.5 / T), (bent - signed) * (0.5 / T)
        column, w = most // T + 1 - x, tl.arange(0, W)[None]
        if WIDE:
            second = tl.sum(mass * tl.abs(away + T), 1)
            beyond = (second - signed - whole * T) * (0.5 / T)
            after = before - 2 * beyond - signed * (1.0 / T)
            whole -= beyond
            shares += tl.where(w == column + 2, beyond[:, None], 0.0)
        shares += tl.where(w == column - 1, before[:, None], 0.0)
        shares += tl.where(w == column, (whole - before - after)[:, None], 0.0)
        shares += tl.where(w == column + 1, after[:, None], 0.0)
        if DIAGONAL:
            least = tl.min(tl.where(stand < 0, 1 << 30, stand), 0) - start - (K - 1)  # the least distance here
            distance = least + tl.arange(0, S)
            source = stand[None] - distance[:, None] - start
            found = (source >= 0) & (source < K) & (stand >= 0)[None]
            moved = tl.gather(mass, tl.where(found, source, 0), 0)
            part = tl.sum(tl.where(found, moved, 0.0), 1)
            there = (distance >= 0) & (distance < size) & (part > 0)
            tl.atomic_add(diagonal + distance, part, mask=there, sem="relaxed")
        return shares

    @jit(do_not_specialize=["tiles", "r_b", "p_b", "n", "size"])
    def _mass(
        q, rows, k, limit, position, lse, stand, index, vertical, diagonal, diagonals, tiles, q_b, q_h, q_n, r_b, k_b,
        k_h, k_n, p_b, factor, n, size, heads, group,
        L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
        W: tl.constexpr, BLOCKS: tl.constexpr, GATHERED: tl.constexpr, DIAGONAL: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """Second sweep: masses of some blocks of keys in scope, for one head."""
        head = tl.program_id(0) % heads
        batch = (tl.program_id(0) // heads).to(tl.int64)
        own = batch * heads + head
        row = tl.arange(0, L)
        query = tl.trans(_queries(q, rows, batch, head, q_b, q_h, q_n, r_b, L, D, DIM))
        reach = tl.load(limit + batch * L + row)
        sums = tl.load(lse + own * L + row)
        stand += batch * L
        at = tl.load(stand + row)  # -1: the row stands before every key, its mass is 0
        k += batch * k_b + (head // group).to(tl.int64) * k_h
        position += batch * p_b
        index += batch * size
        vertical += own * size
        diagonal += own * size
        first = tl.program_id(1) * BLOCKS * K
        last = first + BLOCKS * K - 1
        most = tl.maximum(tl.max(at, 0) - first, 0)
        near = (at - first).to(tl.float32)
        shares = tl.zeros([K, W], tl.float32)
        total = tl.full([W], float("inf"), tl.float32)
        # Keys in scope are in order: where the last one of a chunk is seen by every row, so are the others.
        if GATHERED:
            low = tl.load(index + last, mask=last < size, other=-1)
            high = tl.load(position + low, mask=low >= 0, other=1 << 30)
        else:
            low = tl.load(position + first)
            high = tl.load(position + last, mask=last < size, other=1 << 30)
            low = tl.where(high - low == last - first, low, -1)
        if (low >= 0) & (high <= _free(reach)):
            for block in range(BLOCKS):
                shares = _block(
                    shares, query, k, position, index, vertical, diagonal, reach, sums, near, at, most,
                    first + block * K, first, size, k_n, factor,
                    K, D, DIM, S, T, W, GATHERED, DIAGONAL, WIDE, False,
                )  # fmt: skip
            total = tl.sum(shares, 0)
        if tl.max(tl.where(tl.abs(total) < float("inf"), 0, 1), 0) > 0:  # some keys are unseen, or a score was infinite
            shares = tl.zeros([K, W], tl.float32)
            for block in range(BLOCKS):
                shares = _block(
                    shares, query, k, position, index, vertical, diagonal, reach, sums, near, at, most,
                    first + block * K, first, size, k_n, factor,
                    K, D, DIM, S, T, W, GATHERED, DIAGONAL, WIDE, True,
                )  # fmt: skip
            total = tl.sum(shares, 0)
        x = most // T + 1 - tl.arange(0, W)
        there = (x >= 0) & (x < tiles) & (total > 0)
        tl.atomic_add(diagonals + own * tiles + x, total, mask=there, sem="relaxed")


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
    q: Tensor, rows: Tensor, k: Tensor, scale: float, limit: Tensor, position: Tensor, stand: Tensor,
    index: Tensor | None, size: int, tile: int, distances: bool, spread: int = SPAN - 128,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Softmax mass of L queries, summed: per key in scope [B, H, size], per distance (if ``distances``) likewise, per
    block diagonal (`block_diagonals`) [B, H, ceil(size / tile)]; float32.

    Args:
        q: [B, H, M, D], k: [B, Hkv, N, D].
        rows: int32 [B|1, L], the queries (-1: none), L a power of two of at least 16.
        limit: int32 [B, L], the position up to which each query sees (-1: none). position: int32 [B|1, N], of the keys.
        stand: int32 [B, L], where each query stands in keys in scope (-1: before the first); all within ``spread`` keys
            of each other, ``SPAN - 128`` at most. tile: 128 or a multiple.
        index: int32 [B, size], tokens in scope in order (then -1: none), or None for the first ``size`` tokens.
    """
    assert triton is not None
    batch, heads, _, dim = q.shape
    n, group, count = k.shape[2], heads // k.shape[1], rows.shape[1]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    chunks, tiles = triton.cdiv(n, _KEYS * _BLOCKS), triton.cdiv(size, tile)
    top = torch.empty((batch, heads, chunks, count), dtype=torch.float32, device=q.device)
    total, lse = torch.empty_like(top), torch.empty((batch, heads, count), dtype=torch.float32, device=q.device)
    vertical = estimate_result((batch, heads, size), q.device)
    diagonal = estimate_result((batch, heads, size), q.device).zero_() if distances else None
    diagonals = estimate_result((batch, heads, tiles), q.device)
    strides = (*q.stride()[:3], rows.stride(0) if len(rows) > 1 else 0, *k.stride()[:3])
    numbers = (*strides, position.stride(0) if position.shape[0] > 1 else 0, scale * 1.4426950408889634, n)
    shape = {"L": count, "K": _KEYS, "D": max(16, triton.next_power_of_2(dim)), "DIM": dim, "BLOCKS": _BLOCKS}
    _sum[(batch * heads, chunks)](
        q, rows, k, limit, position, top, total, *numbers, heads, group, chunks, **shape, **_SUM
    )  # fmt: skip
    _join[(batch * heads,)](top, total, limit, lse, diagonals, tiles, chunks, heads, L=count)
    _mass[(batch * heads, triton.cdiv(size, _KEYS * _BLOCKS))](
        q, rows, k, limit, position, lse, stand, position if index is None else index, vertical,
        vertical if diagonal is None else diagonal, diagonals, tiles, *numbers, size, heads, group,
        S=triton.next_power_of_2(spread + _KEYS), T=tile, W=triton.next_power_of_2((_BLOCKS - 1) * _KEYS // tile + 5),
        GATHERED=index is not None, DIAGONAL=distances, WIDE=spread + _KEYS > tile, **shape,
        **(_DISTANCES if distances else _MASS),
    )  # fmt: skip
    return vertical, diagonal, diagonals
