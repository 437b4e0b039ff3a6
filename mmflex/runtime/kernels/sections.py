"""Gathered columns: which tokens stand in a head's section, and the limits of its key slots."""

from __future__ import annotations

import torch
from torch import Tensor

from ...compiler.orders import NEVER
from . import STRETCHES_OF_A_MILLION, steps, use_triton
from .listing import jit
from .select import count_true, gathered

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_BLOCK = 4096
"""Key slots that one program goes through."""

if triton is not None:

    @jit(do_not_specialize=["position_b", "end_b", "token_b", "n", "slots", "capacity"])
    def _fill(
        chosen, counts, position, position_b, end, end_b, token, token_b, at_head, at_table, limit, table, low, high,
        fits, heads, heads_out, tables, n, slots, capacity,
        BLOCK: tl.constexpr, MANY: tl.constexpr, TILE: tl.constexpr, HOLES: tl.constexpr, TOKENS: tl.constexpr,
    ):  # fmt: skip
        """One stretch of key slots of one head."""
        chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        batch, head = row // heads, row % heads
        other = tl.arange(0, MANY)
        count = tl.load(counts + row * tl.num_programs(0) + other, mask=other < tl.num_programs(0), other=0)
        before = tl.sum(tl.where(other < chunk, count, 0), 0)
        if tl.sum(count, 0) > capacity:
            tl.store(fits, 0)
        slot = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = slot < n
        at = tl.load(position + batch * position_b + slot, mask=inside, other=1 << 30)
        true = tl.load(chosen + row * n + slot, mask=inside, other=0) != 0
        own, shown = at, at
        if HOLES:
            own = tl.where(true, 1 << 30, at)
        else:
            shown = tl.maximum(at, tl.load(end + batch * end_b + slot, mask=inside, other=0))
        mine = limit + (batch * heads_out + tl.load(at_head + head)) * slots
        tl.store(mine + slot, own, mask=inside)
        tile = chunk * (BLOCK // TILE) + tl.arange(0, BLOCK // TILE)
        tiled = tl.reshape(own, (BLOCK // TILE, TILE))
        tl.store(low + row * (n // TILE) + tile, tl.min(tiled, 1), mask=tile < n // TILE)
        tl.store(high + row * (n // TILE) + tile, tl.max(tiled, 1), mask=tile < n // TILE)
        place = before + tl.cumsum(true.to(tl.int32), 0) - 1
        section = tl.load(at_table + head).to(tl.int64)
        kept = true & (place < capacity)
        tl.store(mine + n + (section % ((slots - n) // capacity)) * capacity + place, shown, mask=kept)
        value = slot.to(tl.int64)
        if TOKENS:
            value = tl.load(token + batch * token_b + slot, mask=inside, other=0)
        tl.store(table + (batch * tables + section) * capacity + place, value, mask=kept)

    @jit(do_not_specialize=["n", "slots", "capacity"])
    def _ends(
        at_head, at_table, limit, low, high, heads, heads_out, n, slots, capacity, TILE: tl.constexpr
    ):  # fmt: skip
        """Least and greatest limit of one tile of one head's section."""
        tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        mine = limit + (row // heads * heads_out + tl.load(at_head + row % heads)) * slots + n
        section = tl.load(at_table + row % heads).to(tl.int64) % ((slots - n) // capacity)
        value = tl.load(mine + section * capacity + tile * TILE + tl.arange(0, TILE))
        tl.store(low + row * (capacity // TILE) + tile, tl.min(value, 0))
        tl.store(high + row * (capacity // TILE) + tile, tl.max(value, 0))


def fill_sections(
    chosen: Tensor,
    position: Tensor,
    end: Tensor | None,
    token: Tensor | None,
    at_head: Tensor,
    at_table: Tensor,
    limit: Tensor,
    table: Tensor,
    tile: int,
    fits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Puts the chosen keys of h heads into their sections.

    Args:
        chosen: bool [B, h, n], of the n slots of the main section. position: int32 [B, n], of their tokens.
        end: int32 [B, n], the position up to which the main section shows a key (`Part.visible_until`): the section
            shows it from there on. None: the section shows it always, and the main section not at all.
        token: int64 [B, n], the token in each slot; None: its number.
        at_head, at_table: int32 [h], the head in ``limit``, the section in ``table``.
        limit: int32 [B, H, slots], from which position on a slot is shown; written for these heads' main section and
            the places filled (the caller has put `NEVER` elsewhere). Sections follow the main one, each as long as a
            row of ``table``; a head's is number ``at_table`` modulo their count.
        table: int64 [B, sections of all KV heads, capacity]: written where filled.
        fits: int32 [1], becomes 0 where more keys are chosen than the capacity.

    Returns:
        The least and greatest limit of every main tile, int32 [B, h, tiles], and of the tiles of each head's section.
    """
    batch, heads, n = chosen.shape
    capacity = table.shape[-1]
    sections = (limit.shape[-1] - n) // capacity
    if use_triton(chosen):
        assert triton is not None
        chosen = chosen.contiguous()
        block = max(_BLOCK, tile)
        grid = (triton.cdiv(n, block), batch * heads)
        counts = count_true(chosen, block)
        low = torch.empty((batch, heads, n // tile), dtype=torch.int32, device=chosen.device)
        high = torch.empty_like(low)
        tail_low = torch.empty((batch, heads, capacity // tile), dtype=torch.int32, device=chosen.device)
        tail_high = torch.empty_like(tail_low)
        _fill[grid](
            chosen, counts, position, position.stride(0), end if end is not None else position,
            0 if end is None else end.stride(0), position if token is None else token,
            0 if token is None else token.stride(0), at_head, at_table, limit, table, low, high, fits, heads,
            limit.shape[1], table.shape[1], n, limit.shape[-1], capacity, BLOCK=block,
            MANY=steps(grid[0], STRETCHES_OF_A_MILLION), TILE=tile, HOLES=end is None, TOKENS=token is not None,
        )  # fmt: skip
        _ends[(capacity // tile, batch * heads)](
            at_head, at_table, limit, tail_low, tail_high, heads, limit.shape[1], n, limit.shape[-1], capacity,
            TILE=tile, num_warps=1,
        )  # fmt: skip
        return low, high, tail_low, tail_high
    index, counts = gathered(chosen, capacity, fits)
    filled = torch.arange(capacity, device=chosen.device) < counts[..., None]
    own = position[:, None].expand(chosen.shape)
    shown = own if end is None else own.maximum(end[:, None])
    own = torch.where(chosen, NEVER, own) if end is None else own
    limit[:, at_head.long(), :n] = own.int()
    tail = limit[..., n:].unflatten(-1, (sections, capacity))
    tail[:, at_head.long(), at_table.long() % sections] = torch.where(filled, shown.gather(-1, index), NEVER).int()
    found = index if token is None else token[:, None].expand(chosen.shape).gather(-1, index)
    table[:, at_table.long()] = torch.where(filled, found, -1)
    tiled = own.unflatten(-1, (-1, tile))
    ends = tail[:, at_head.long(), at_table.long() % sections].unflatten(-1, (-1, tile))
    return tiled.amin(-1).int(), tiled.amax(-1).int(), ends.amin(-1), ends.amax(-1)
