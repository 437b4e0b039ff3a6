"""Compaction of block classes into FlexAttention's index tables."""

from __future__ import annotations

import torch
from torch import Tensor

from ...compiler.blocks import compact
from . import use_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton; the twin runs there
    triton = None


if triton is not None:

    @triton.jit
    def _compact(
        classes, table, counts, place, shift, rows, width, tiles, main_tiles, heads_in, heads_out,
        BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    ):  # fmt: skip
        """One query tile of one head: its partial (1) and full (2) tiles, ascending, into table[kind]."""
        row = tl.program_id(0).to(tl.int64)
        tile = row % rows
        head = (row // rows) % heads_in
        batch = row // rows // heads_in
        out = (batch * heads_out + tl.load(place + head)) * rows + tile
        moved = tl.load(shift + head)
        all_rows = (tl.num_programs(0).to(tl.int64) // heads_in) * heads_out
        partial, full = 0, 0
        for chunk in range(CHUNKS):
            at = chunk * BLOCK + tl.arange(0, BLOCK)
            kind = tl.load(classes + row * tiles + at, mask=at < tiles, other=0)
            number = tl.where(at >= main_tiles, at + moved, at)
            is_partial, is_full = (kind == 1).to(tl.int32), (kind == 2).to(tl.int32)
            slot = partial + tl.cumsum(is_partial, 0) - 1
            tl.store(table + out * width + slot, number, mask=(kind == 1) & (slot < width))
            slot = full + tl.cumsum(is_full, 0) - 1
            tl.store(table + (all_rows + out) * width + slot, number, mask=(kind == 2) & (slot < width))
            partial += tl.sum(is_partial, 0)
            full += tl.sum(is_full, 0)
        tl.store(counts + out, partial)
        tl.store(counts + all_rows + out, full)


def compact_into(
    classes: Tensor, table: Tensor, counts: Tensor, place: Tensor, shift: Tensor, main_tiles: int
) -> None:
    """Lists the partial (1) and full (2) tiles of classes int8 [B, h, Q, T] into ``table`` int32 [2, B, H, Q, W] and
    ``counts`` int32 [2, B, H, Q], at heads ``place`` int32 [h]. Tiles from ``main_tiles`` on are numbered ``shift`` int32
    [h] higher. Entries past a count keep what they hold; counts may pass W, which the caller checks.
    """
    batch, heads, rows, tiles = classes.shape
    width = table.shape[-1]
    if use_triton(classes):
        assert triton is not None
        block = min(1024, triton.next_power_of_2(tiles))
        _compact[(batch * heads * rows,)](
            classes, table, counts, place, shift, rows, width, tiles, main_tiles, heads, table.shape[2],
            BLOCK=block, CHUNKS=triton.cdiv(tiles, block),
        )  # fmt: skip
        return
    for kind in (1, 2):
        count, index = compact(classes == kind, width)
        index = torch.where(index >= main_tiles, index + shift[:, None, None], index)
        table[kind - 1][:, place.long()] = index
        counts[kind - 1][:, place.long()] = count
