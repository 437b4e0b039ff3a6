"""Attention among runs of tokens by blocks, without holding the scores (XAttention's estimate).

One product of matrices: a program computes the scores of a tile of query runs with a tile of key runs, or with some
tiles in a row where vectors are short, and stores, of every row and key block, the logarithm of its sum of
exponentials. What the blocks hold of each row follows from those.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import use_triton
from .listing import device_of, jit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_ROWS, _COLUMNS, _HOPPER = 128, 128, 256
"""Runs of queries and of keys that one program takes; of keys on Hopper, which has room for them (of seven sizes the
best on H200: 505 TFLOP/s)."""
_NARROW = 128
"""Numbers of a vector that is held whole."""
_TILES = 64
"""Tiles of keys that pass by the queries of one program, where vectors are narrow (414 TFLOP/s on H200, with tiles of
128 x 128 in two stages: of 15 settings the best)."""
_BLOCKS = 64
"""Key blocks that a row's sums are taken of at a time."""

if triton is not None:

    @triton.jit
    def _queries(reach, rows, alike, ROWS: tl.constexpr):
        """Of a program: its head, counted over prompts, its rows, and the last run of keys that each of them sees."""
        head = tl.program_id(2).to(tl.int64)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        return head, row, tl.load(reach + head // alike * rows + row, mask=row < rows, other=-1)

    @triton.jit
    def _store_logs(score, target, there, block, blocks, COLUMNS: tl.constexpr, KEYS: tl.constexpr):
        """log2 of the sums of 2 to the scores [rows, COLUMNS] over blocks of KEYS; +inf for a row in which one is none
        (of which the maximum does not tell)."""
        top = tl.max(score, 1)
        base = tl.where(tl.abs(top) < float("inf"), top, 0.0)
        weight = tl.exp2(score - base[:, None])
        total = tl.sum(tl.reshape(weight, [score.shape[0], COLUMNS // KEYS, KEYS]), 2)
        real = (top < float("inf"))[:, None] & (total == total)
        total = tl.where(real, base[:, None] + tl.log2(total), float("inf"))
        block += tl.arange(0, COLUMNS // KEYS)
        tl.store(target[:, None] + block[None], total, mask=there[:, None] & (block < blocks)[None])

    @jit(do_not_specialize=["rows", "columns", "blocks"])
    def _scores(
        q, k, reach, sums, k_b, k_h, factor, rows, columns, blocks, heads, group, alike,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """The sums of one tile, whose vectors are read in parts."""
        head, row, last = _queries(reach, rows, alike, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        if tl.max(last) >= tl.program_id(1) * COLUMNS:
            part = tl.arange(0, PART)
            query = q + (head * rows + tl.minimum(row, rows - 1))[:, None] * WIDTH + part[None]
            key = k + head // heads * k_b + head % heads // group * k_h
            key += tl.minimum(column, columns - 1).to(tl.int64)[None] * WIDTH + part[:, None]
            score = tl.zeros([ROWS, COLUMNS], tl.float32)
            for _ in range(WIDTH // PART):
                score = tl.dot(tl.load(query), tl.load(key), score)
                query += PART
                key += PART
            score = tl.where(column[None] <= last[:, None], score * factor, float("-inf"))
            first = tl.program_id(1) * (COLUMNS // KEYS)
            _store_logs(score, sums + (head * rows + row) * blocks, row < rows, first, blocks, COLUMNS, KEYS)

    @jit(do_not_specialize=["rows", "columns", "blocks"])
    def _narrow_scores(
        q, k, reach, sums, k_b, k_h, factor, rows, columns, blocks, heads, group, alike,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
    ):  # fmt: skip
        """As `_scores`, of vectors that fit whole: the queries stay while the keys of some tiles pass."""
        head, row, last = _queries(reach, rows, alike, ROWS)
        part, column = tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
        first = tl.program_id(1) * TILES
        until = tl.minimum(first + TILES, tl.max(last) // COLUMNS + 1)
        seen = tl.minimum(until, (tl.min(last) + 1) // COLUMNS)  # tiles of which every query sees all keys
        if first < until:
            target = sums + (head * rows + row) * blocks
            query = tl.load(q + (head * rows + tl.minimum(row, rows - 1))[:, None] * WIDTH + part[None])
            key = k + head // heads * k_b + head % heads // group * k_h + part[:, None]
            for tile in range(first, seen):
                at = (tile * COLUMNS + column).to(tl.int64)
                score = tl.dot(query, tl.load(key + at[None] * WIDTH)) * factor
                _store_logs(score, target, row < rows, tile * (COLUMNS // KEYS), blocks, COLUMNS, KEYS)
            for tile in range(tl.maximum(first, seen), until):
                at = tl.minimum(tile * COLUMNS + column, columns - 1).to(tl.int64)
                score = tl.dot(query, tl.load(key + at[None] * WIDTH)) * factor
                score = tl.where((tile * COLUMNS + column)[None] <= last[:, None], score, float("-inf"))
                _store_logs(score, target, row < rows, tile * (COLUMNS // KEYS), blocks, COLUMNS, KEYS)

    @jit(do_not_specialize=["rows", "blocks"])
    def _shares(
        sums, reach, mass, rows, blocks, alike,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr, PEAK: tl.constexpr,
    ):  # fmt: skip
        """The mass of every key block for one query block: of all rows, or (``PEAK``) of the one that gives it most.
        Each row has a mass of 1, or none."""
        head = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        last = tl.load(reach + head // alike * rows + row)
        source = sums + (head * rows + row)[:, None] * blocks
        until = tl.max(last) // KEYS + 1  # -1 // KEYS is 0 or -1: one block of which nothing is seen, or none
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        for first in range(0, until, BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            seen = (block < blocks)[None] & (block[None] * KEYS <= last[:, None])
            part = tl.load(source + block[None], mask=seen, other=float("-inf"))
            new = tl.maximum(top, tl.max(part, 1))
            base = tl.where(tl.abs(new) < float("inf"), new, 0.0)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(part - base[:, None]), 1)
            top = new
        whole = top + tl.log2(total)
        real = tl.abs(top) < float("inf")
        whole = tl.where(real, whole, 0.0)
        target = mass + (head * (rows // QUERIES) + tl.program_id(0)) * blocks
        for first in range(0, blocks, BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            seen = (block < blocks)[None] & (block[None] * KEYS <= last[:, None]) & real[:, None]
            part = tl.load(source + block[None], mask=seen, other=float("-inf"))
            weight = tl.exp2(part - whole[:, None])
            tl.store(target + block, tl.max(weight, 0) if PEAK else tl.sum(weight, 0), mask=block < blocks)


def fused(q: Tensor, *per: int) -> bool:
    """Whether kernels run on runs [..., W] of which so many are a block, so that scores are not in memory. On a GPU not
    for float32: Triton unrolls exact products of such tiles, and compiles them for 40 s."""
    half = q.dtype != torch.float32 or device_of(q).type != "cuda"
    sizes = all(n in (1, 2, 4, 8, 16, 32, 64, 128) for n in per)
    return use_triton(q) and half and sizes and _part(q.shape[-1]) >= 16


def _part(width: int) -> int:
    """Of a vector, what is multiplied at a time."""
    return math.gcd(width, 64)


def run_mass(q: Tensor, k: Tensor, reach: Tensor, per: tuple[int, int], scale: float, peak: bool = False) -> Tensor:
    """Softmax of every run of queries over the runs of keys that it reaches, summed over blocks of ``per`` runs of
    queries and of keys: float32 [B, H, query blocks, key blocks]. A row without a key, or with a score that is not a
    number, has no mass.

    Args:
        q: [B, H, R, W]. k: [B, Hkv, C, W], the runs of a head contiguous.
        reach: int32 [B, 1|H, R], the last run of keys that each run of queries sees (-1: none).
        per: the first divides R, the second C.
        peak: summed over the keys of a block, the greatest of its runs of queries.
    """
    batch, heads, rows, width = q.shape
    kv_heads, columns = k.shape[1:3]
    if not fused(q, *per):
        return _twin(q, k, reach, per, scale, peak)
    assert triton is not None
    q, reach = q.contiguous(), reach.int().contiguous()
    blocks = columns // per[1]
    sums = torch.empty((batch, heads, rows, blocks), dtype=torch.float32, device=q.device)
    mass = torch.empty((batch, heads, rows // per[0], blocks), dtype=torch.float32, device=q.device)
    device = device_of(q)
    strides, factor = k.stride()[:2], scale * math.log2(math.e)
    alike = heads // reach.shape[1]  # heads in a row whose queries reach alike
    given = (q, k, reach, sums, *strides, factor, rows, columns, blocks, heads, heads // kv_heads, alike)
    if width <= _NARROW and width.bit_count() == 1:
        grid = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS * _TILES), batch * heads
        _narrow_scores[grid](
            *given, ROWS=_ROWS, COLUMNS=_COLUMNS, WIDTH=width, KEYS=per[1], TILES=_TILES, num_warps=8, num_stages=2
        )
    else:
        wide = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
        taken = _HOPPER if wide else _COLUMNS
        grid = triton.cdiv(rows, _ROWS), triton.cdiv(columns, taken), batch * heads
        _scores[grid](
            *given, ROWS=_ROWS, COLUMNS=taken, WIDTH=width, PART=_part(width), KEYS=per[1], num_warps=8, num_stages=3
        )
    _shares[(rows // per[0], batch * heads)](
        sums, reach, mass, rows, blocks, alike, QUERIES=per[0], KEYS=per[1], BLOCKS=_BLOCKS, PEAK=peak
    )
    return mass


def _twin(q: Tensor, k: Tensor, reach: Tensor, per: tuple[int, int], scale: float, peak: bool) -> Tensor:
    batch, heads = q.shape[:2]
    a, b = q.reshape(batch * k.shape[1], -1, q.shape[-1]), k.flatten(0, 1)
    half = a.dtype != torch.float32
    scores = torch.bmm(a, b.mT, out_dtype=torch.float32) if half else torch.bmm(a, b.mT)
    scores = scores.view(batch, heads, -1, k.shape[2])
    seen = torch.arange(k.shape[2], device=q.device) <= reach[..., None]
    torch.add(torch.where(seen, 0.0, float("-inf")), scores, alpha=scale, out=scores)
    mass = scores.softmax(-1).unflatten(-1, (-1, per[1])).sum(-1).nan_to_num_(0.0)
    rows = mass.unflatten(2, (-1, per[0]))
    return rows.amax(3) if peak else rows.sum(3)
