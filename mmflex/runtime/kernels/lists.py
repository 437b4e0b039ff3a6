"""Block lists: every block of a launch classified and listed in one kernel, written from the mask expression."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..classify import BlockTest, Extremes, classify, compact
from . import steps, use_triton
from .listing import jit

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton; the twin runs there
    triton = None

_CHUNK = 64
"""Key tiles that are tested together first."""
_ROWS = 2
"""Query tiles that one program lists: neighbours have blocks in the same chunks. One warp needs no barriers; measured
best on H200 (one to eight tiles, one or four warps)."""

_HEADER = "table, counts, fits, place, shift, row_low, row_high, low, high, chunk_low, tail_low, tail_high"
_NUMBERS = "heads, heads_out, rows, main_tiles, tail_tiles, chunks, pieces, width, row_b, row_h"

_KERNEL = """
def kernel({arguments}, BLOCK: tl.constexpr, MANY: tl.constexpr, ROWS: tl.constexpr):
    # Some query tiles of one head: their partial and full key tiles, ascending, into table[0] and table[1].
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = row < rows
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    own = batch * heads + head
    out = (batch * heads_out + tl.load(place + head)) * rows + row
    half = (tl.num_programs(1).to(tl.int64) // heads) * heads_out * rows
    at_row = batch * row_b + head * row_h + row
    least = tl.load(row_low + at_row, mask=inside, other=-1)
    most = tl.load(row_high + at_row, mask=inside, other=-1)
{scalars}
    # The same test on the bounds of whole chunks of tiles: most chunks hold nothing for these rows.
    number = tl.arange(0, MANY)[None]
    there = inside & (number < chunks)
    near = tl.load(chunk_low + own * chunks + number, mask=number < chunks, other=1 << 30)
{coarse}
    wanted = tl.max((there & (most >= near) & {some_coarse}).to(tl.int32), 0)
    number = tl.arange(0, MANY)
    partial, full = tl.zeros([ROWS, 1], tl.int32), tl.zeros([ROWS, 1], tl.int32)
    chunk = tl.min(tl.where(wanted != 0, number, MANY), 0)
    while chunk < MANY:
        at = (chunk * BLOCK + tl.arange(0, BLOCK))[None]
        real = at < main_tiles
        some = inside & real & (most >= tl.load(low + own * main_tiles + at, mask=real, other=1 << 30))
        every = least >= tl.load(high + own * main_tiles + at, mask=real, other=1 << 30)
{vectors}
        some = some & {some}
        every = every & some & {every}
        kind = some & (every == 0)
        slot = partial + tl.cumsum(kind.to(tl.int32), 1) - 1
        tl.store(table + out * width + slot, at, mask=kind & (slot < width))
        partial += tl.sum(kind.to(tl.int32), 1, keep_dims=True)
        slot = full + tl.cumsum(every.to(tl.int32), 1) - 1
        tl.store(table + (half + out) * width + slot, at, mask=every & (slot < width))
        full += tl.sum(every.to(tl.int32), 1, keep_dims=True)
        chunk = tl.min(tl.where((wanted != 0) & (number > chunk), number, MANY), 0)
    moved = tl.load(shift + head) + main_tiles
    for piece in range(pieces):
        at = (piece * BLOCK + tl.arange(0, BLOCK))[None]
        real = inside & (at < tail_tiles)
        some = real & (most >= tl.load(tail_low + own * tail_tiles + at, mask=at < tail_tiles, other=1 << 30))
        every = some & (least >= tl.load(tail_high + own * tail_tiles + at, mask=at < tail_tiles, other=1 << 30))
        kind = some & (every == 0)
        slot = partial + tl.cumsum(kind.to(tl.int32), 1) - 1
        tl.store(table + out * width + slot, at + moved, mask=kind & (slot < width))
        partial += tl.sum(kind.to(tl.int32), 1, keep_dims=True)
        slot = full + tl.cumsum(every.to(tl.int32), 1) - 1
        tl.store(table + (half + out) * width + slot, at + moved, mask=every & (slot < width))
        full += tl.sum(every.to(tl.int32), 1, keep_dims=True)
    tl.store(counts + out, partial, mask=inside)
    tl.store(counts + half + out, full, mask=inside)
    if tl.max(tl.maximum(partial, full)) > width:
        tl.store(fits, 0)
"""


@lru_cache(maxsize=256)
def _kernel(
    some: str, every: str, names: tuple[tuple[str, str, bool], ...], tables: tuple[tuple[str, int], ...]
) -> Any:
    """The kernel of a classifier. names: (name, "row" | "key" | "one", boolean); tables: (name, dimensions)."""
    arguments, varied = [_HEADER, _NUMBERS], ["rows", "main_tiles", "tail_tiles", "chunks", "pieces", "width"]
    varied += ["row_b", "row_h"]
    scalars, vectors, coarse = [], [], []
    for name, side, boolean in names:
        arguments.append(f"{name}_p, {name}_b, {name}_h")
        varied += [f"{name}_b", f"{name}_h"]
        base = f"{name}_p + batch * {name}_b + head * {name}_h"
        cast = " != 0" if boolean else ""
        if side == "key":
            arguments.append(f"{name}_c, {name}_cb, {name}_ch")
            varied += [f"{name}_cb", f"{name}_ch"]
            vectors.append(f"        {name} = tl.load({base} + at, mask=real, other=0){cast}")
            base = f"{name}_c + batch * {name}_cb + head * {name}_ch"
            coarse.append(f"    c{name} = tl.load({base} + number, mask=number < chunks, other=0){cast}")
        else:
            where = " + row, mask=inside, other=0" if side == "row" else ""
            scalars.append(f"    {name} = tl.load({base}{where}){cast}")
    for name, dims in tables:
        sizes = [f"{name}_n{i}" for i in range(dims)]
        arguments.append(", ".join([f"{name}_p", *sizes]))
        varied += sizes
        size = " * ".join(sizes)
        scalars.append(f"    {name} = {name}_p + own * {size}")
    keys = [name for name, side, _ in names if side == "key"]
    some_coarse = re.sub(r"\bt\d+\b", lambda m: f"c{m[0]}" if m[0] in keys else m[0], some)
    constant = {"True": "real", "False": "(at < 0)"}
    text = _KERNEL.format(
        arguments=", ".join(arguments),
        scalars="\n".join(scalars),
        vectors="\n".join(vectors),
        coarse="\n".join(coarse),
        some=constant.get(some, some),
        every=constant.get(every, every),
        some_coarse={"True": "there", "False": "(number < 0)"}.get(some, some_coarse),
    )
    filename = f"<mmflex lists {hash(text):x}>"
    # Triton reads a kernel's source through linecache, which takes generated code too, and keeps its own copy.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"tl": tl}
    exec(compile(text, filename, "exec"), namespace)  # our own source, from a sympy expression
    try:
        return jit(do_not_specialize=varied)(namespace["kernel"])
    finally:
        del linecache.cache[filename]


def list_blocks(
    test: BlockTest, ends: Extremes, table: Tensor, counts: Tensor, fits: Tensor, place: Tensor, shift: Tensor
) -> None:
    """Lists the partial and full tiles of h heads into ``table`` int32 [2, B, H, Q, W] and ``counts`` int32
    [2, B, H, Q], at heads ``place`` int32 [h]. Section tiles are numbered after the main ones, ``shift`` int32 [h]
    higher. Entries past a count keep what they hold; where a count passes W, ``fits`` int32 [1] becomes 0.
    """
    main, width = ends.low.shape[-1], table.shape[-1]
    if not test.triton:
        classes = classify(test, ends)
        for kind in (1, 2):
            count, index = compact(classes == kind, width)
            table[kind - 1][:, place.long()] = torch.where(index >= main, index + shift[:, None, None], index)
            counts[kind - 1][:, place.long()] = count
            fits.mul_((count <= width).all())
        return
    assert triton is not None
    batch, heads, _ = ends.low.shape
    rows = table.shape[3]
    chunks = triton.cdiv(main, _CHUNK)
    names, values = [], []
    for i, (name, t) in enumerate(test.bounds.items()):
        # A side of a single tile looks like a constant, and is one.
        side = "row" if t.shape[2] > 1 else "key" if t.shape[3] > 1 else "one"
        names.append((name, side, t.dtype == torch.bool))
        for value in (t, _coarse_bounds(t, low=i % 2 == 0)) if side == "key" else (t,):
            step = value.shape[2] * value.shape[3]
            batch_step = step * value.shape[1] if value.shape[0] > 1 else 0
            values += [value.contiguous(), batch_step, step if value.shape[1] > 1 else 0]
    tables = []
    for name, t in test.tables.items():
        t = t.expand(batch, heads, *t.shape[2:]).contiguous()
        tables.append((name, t.dim() - 2))
        values += [t, *t.shape[2:]]
    low, high, row_low, row_high = (t.contiguous() for t in (ends.low, ends.high, ends.row_low, ends.row_high))
    tail_low, tail_high, tail = low, high, 0
    if ends.gathered_low is not None and ends.gathered_high is not None:
        tail_low, tail_high, tail = (
            ends.gathered_low.contiguous(),
            ends.gathered_high.contiguous(),
            ends.gathered_low.shape[-1],
        )
    row_h = rows if row_low.shape[1] > 1 else 0
    row_b = row_low.shape[1] * rows if row_low.shape[0] > 1 else 0
    kernel = _kernel(test.some, test.every, tuple(names), tuple(tables))
    kernel[(triton.cdiv(rows, _ROWS), batch * heads)](
        table, counts, fits, place, shift, row_low, row_high, low, high, _coarse(low, low=True), tail_low,
        tail_high, heads, table.shape[2], rows, main, tail, chunks, triton.cdiv(tail, _CHUNK), width, row_b, row_h,
        *values, BLOCK=_CHUNK, MANY=steps(chunks, 64, 256), ROWS=_ROWS, num_warps=1,
    )  # fmt: skip


def _coarse(t: Tensor, low: bool) -> Tensor:
    """Least or greatest entry of each `_CHUNK` entries of the last dimension."""
    short = -t.shape[-1] % _CHUNK
    if short:
        t = torch.cat([t, t[..., -1:].expand(*t.shape[:-1], short)], -1)
    t = t.unflatten(-1, (-1, _CHUNK))
    return (t.amin(-1) if low else t.amax(-1)).contiguous()


def _coarse_bounds(t: Tensor, low: bool) -> Tensor:
    """`_coarse` of bounds [B, H, 1, tiles], kept with them: those of the layout serve many plans."""
    held = t.__dict__.setdefault("_mmflex_coarse", {})
    if low not in held:
        held[low] = _coarse(t[:, :, 0], low)[:, :, None]
    return held[low]


_eager: ContextVar[bool] = ContextVar("mmflex eager lists", default=False)


@contextmanager
def listed_eagerly() -> Iterator[None]:
    """Lists blocks by tensor operations for the length of a ``with`` block: for many masks that are listed once each, a
    kernel compiled for each is not worth it."""
    token = _eager.set(True)
    try:
        yield
    finally:
        _eager.reset(token)


def writes_triton(t: Tensor) -> bool:
    """Whether classifiers of launches on this device are to be written for Triton."""
    return triton is not None and use_triton(t) and not _eager.get()
