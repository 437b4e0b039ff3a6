"""Selection without sorting: the heaviest entries of a row, and the indices of the chosen ones."""

from __future__ import annotations

import torch
from torch import Tensor

from . import STRETCHES_OF_A_MILLION, steps, use_triton
from .listing import jit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_SHORT, _BLOCK = 1024, 4096
"""Entries that one program goes through, of short rows and of others."""

if triton is not None:

    @triton.jit
    def _threshold(histograms, row, budget, passes):
        """(high bits of the least kept entry, how many to keep among equals) after some 8-bit passes."""
        bins = tl.arange(0, 256)
        prefix, left = 0, budget
        for digit in range(passes):
            histogram = tl.load(histograms + (row * 4 + digit) * 256 + bins)
            above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)  # entries with a greater digit
            chosen = tl.max(tl.where(above + histogram >= left, bins, 0), 0)
            left -= tl.sum(tl.where(bins == chosen, above, 0), 0)
            prefix = prefix * 256 + chosen
        return prefix, left

    @jit(do_not_specialize=["n", "budget", "digit"])
    def _count(mass, always, histograms, n, budget, digit, BLOCK: tl.constexpr, FORCED: tl.constexpr):
        """One pass of radix selection: a histogram of the next 8 bits of those that share the bits so far."""
        row = tl.program_id(0).to(tl.int64)
        prefix, _ = _threshold(histograms, row, budget, digit)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        key = _key(mass, always, row, at, n, FORCED)
        shift = 24 - 8 * digit
        same = (at < n) & ((key >> shift >> 8) == prefix)
        if tl.max(same.to(tl.int32), 0) > 0:
            histogram = tl.histogram((key >> shift) & 255, 256, mask=same)
            tl.atomic_add(histograms + (row * 4 + digit) * 256 + tl.arange(0, 256), histogram, mask=histogram > 0)

    @jit(do_not_specialize=["n", "budget"])
    def _equals(mass, always, histograms, equals, n, budget, BLOCK: tl.constexpr, FORCED: tl.constexpr):
        """How many entries of a block equal the least kept one."""
        row = tl.program_id(0).to(tl.int64)
        prefix, _ = _threshold(histograms, row, budget, 4)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        key = _key(mass, always, row, at, n, FORCED)
        found = tl.sum(((at < n) & (key == prefix)).to(tl.int32), 0)
        tl.store(equals + row * tl.num_programs(1) + tl.program_id(1), found)

    @jit(do_not_specialize=["n", "budget"])
    def _keep(
        mass, always, histograms, equals, keep, n, budget, BLOCK: tl.constexpr, MANY: tl.constexpr,
        FORCED: tl.constexpr,
    ):  # fmt: skip
        """Greater than the threshold, or equal and among the first of the equals."""
        row = tl.program_id(0).to(tl.int64)
        prefix, left = _threshold(histograms, row, budget, 4)
        other = tl.arange(0, MANY)
        before = tl.load(equals + row * tl.num_programs(1) + other, mask=other < tl.program_id(1), other=0)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        key = _key(mass, always, row, at, n, FORCED)
        equal = ((at < n) & (key == prefix)).to(tl.int32)
        place = tl.sum(before, 0) + tl.cumsum(equal, 0)
        tl.store(keep + row * n + at, (key > prefix) | ((equal != 0) & (place <= left)), mask=at < n)

    @jit(do_not_specialize=["n", "budget"])
    def _heaviest(mass, always, keep, n, budget, BLOCK: tl.constexpr, FORCED: tl.constexpr):
        """All passes for a row that one program holds."""
        row = tl.program_id(0).to(tl.int64)
        bins = tl.arange(0, 256)
        at = tl.arange(0, BLOCK)
        key = _key(mass, always, row, at, n, FORCED)
        prefix, left = 0, budget
        for digit in range(4):
            shift = 24 - 8 * digit
            same = (at < n) & ((key >> shift >> 8) == prefix)
            histogram = tl.histogram((key >> shift) & 255, 256, mask=same)
            above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
            chosen = tl.max(tl.where(above + histogram >= left, bins, 0), 0)
            left -= tl.sum(tl.where(bins == chosen, above, 0), 0)
            prefix = prefix * 256 + chosen
        equal = ((at < n) & (key == prefix)).to(tl.int32)
        tl.store(keep + row * n + at, (key > prefix) | ((equal != 0) & (tl.cumsum(equal, 0) <= left)), mask=at < n)

    @triton.jit
    def _key(mass, always, row, at, n, FORCED: tl.constexpr):
        """Masses as integers of the same order, from 0 on; what is forced comes above all."""
        value = tl.load(mass + row * n + at, mask=at < n, other=0.0)
        bits = value.to(tl.int32, bitcast=True)
        # Half of the order is enough: float bits without the last one, so that keys stay positive.
        key = tl.where(bits < 0, (~bits) >> 1, (bits >> 1) + (1 << 30))
        key = tl.where(value != value, 0, key)
        if FORCED:
            key = tl.where(tl.load(always + at, mask=at < n, other=0) != 0, 0x7FFFFFFF, key)
        return key

    @jit(do_not_specialize=["n"])
    def _count_true(chosen, counts, n, BLOCK: tl.constexpr):
        """How many entries of a stretch of a row are true."""
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        true = tl.load(chosen + row * n + at, mask=at < n, other=0) != 0
        tl.store(counts + row * tl.num_programs(1) + tl.program_id(1), tl.sum(true.to(tl.int32), 0))

    @jit(do_not_specialize=["n", "capacity", "most", "pieces"])
    def _indices(
        chosen, counts, index, count, fits, n, capacity, most, pieces, BLOCK: tl.constexpr, MANY: tl.constexpr
    ):
        """One stretch of a row: indices of its true entries; the rest of the row repeats the last of all."""
        chunk, row = tl.program_id(1), tl.program_id(0).to(tl.int64)
        other = tl.arange(0, MANY)
        found = tl.load(counts + row * tl.num_programs(1) + other, mask=other < tl.num_programs(1), other=0)
        before, total = tl.sum(tl.where(other < chunk, found, 0), 0), tl.sum(found, 0)
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        true = tl.load(chosen + row * n + at, mask=at < n, other=0) != 0
        slot = before + tl.cumsum(true.to(tl.int32), 0) - 1
        tl.store(index + row * capacity + slot, at.to(tl.int64), mask=true & (slot < capacity))
        if chunk == tl.max(tl.where(found > 0, other, 0), 0):  # where the last one is; the first, if there is none
            last = tl.max(tl.where(true, at, 0), 0)
            for piece in range(pieces):
                slot = piece * BLOCK + tl.arange(0, BLOCK)
                rest = (slot >= total) & (slot < capacity)
                tl.store(index + row * capacity + slot, tl.zeros([BLOCK], tl.int64) + last, mask=rest)
            tl.store(count + row, total)
            if total > most:
                tl.store(fits, 0)


def count_true(chosen: Tensor, block: int) -> Tensor:
    """int32 [..., stretches]: true entries of each stretch of ``block`` entries of bool ``chosen`` [..., n], contiguous
    and on a device with Triton."""
    assert triton is not None
    n = chosen.shape[-1]
    counts = torch.empty((*chosen.shape[:-1], triton.cdiv(n, block)), dtype=torch.int32, device=chosen.device)
    _count_true[(counts.numel() // counts.shape[-1], counts.shape[-1])](chosen, counts, n, BLOCK=block)
    return counts


def _key_twin(mass: Tensor) -> Tensor:
    bits = mass.float().contiguous().view(torch.int32)
    key = torch.where(bits < 0, (~bits) >> 1, (bits >> 1) + (1 << 30))
    return torch.where(mass.isnan(), 0, key)


def heaviest(mass: Tensor, budget: int, always: Tensor | None = None) -> Tensor:
    """bool like ``mass`` float32 [..., n]: the ``budget`` heaviest of the last dimension (all, if there are fewer).
    By radix selection, 8 bits a pass.

    ``always`` bool [n] (or like mass) come first and count towards the budget. Masses are compared to 23 significant
    bits; of equals, the lower index is kept.
    """
    n = mass.shape[-1]
    budget = min(budget, n)
    if budget == 0:
        return torch.zeros_like(mass, dtype=torch.bool)
    if use_triton(mass) and (always is None or always.dim() == 1):
        assert triton is not None
        mass = mass.float().contiguous()
        rows = mass.numel() // n
        keep = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
        forced = keep if always is None else always.contiguous()
        block = _SHORT if n <= _SHORT else _BLOCK
        if n <= block:
            _heaviest[(rows,)](
                mass, forced, keep, n, budget, BLOCK=block, FORCED=always is not None, num_warps=block // 256
            )  # fmt: skip
            return keep
        grid = (rows, triton.cdiv(n, block))
        histograms = torch.zeros((rows, 4, 256), dtype=torch.int32, device=mass.device)
        shape = {"BLOCK": block, "FORCED": always is not None}
        for digit in range(4):
            _count[grid](mass, forced, histograms, n, budget, digit, **shape)
        equals = torch.empty(grid, dtype=torch.int32, device=mass.device)
        _equals[grid](mass, forced, histograms, equals, n, budget, **shape)
        _keep[grid](
            mass, forced, histograms, equals, keep, n, budget, MANY=steps(grid[1], STRETCHES_OF_A_MILLION), **shape
        )  # fmt: skip
        return keep
    key = _key_twin(mass)
    if always is not None:
        key = key.masked_fill(always, 0x7FFFFFFF)
    least = key.topk(budget, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = key > least, key == least
    room = budget - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def gathered(chosen: Tensor, capacity: int, fits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices of the true entries of ``chosen`` [..., n] in order: (int64 [..., capacity], counts int64 [...]).

    Slots past the count repeat the last index found (0 where there is none). ``fits`` int32 [1] becomes 0 where there
    are more than the capacity.
    """
    n = chosen.shape[-1]
    if use_triton(chosen):
        assert triton is not None
        chosen = chosen.contiguous()
        block = _SHORT if n <= _SHORT else _BLOCK
        counts = count_true(chosen, block)
        index = torch.empty((*chosen.shape[:-1], capacity), dtype=torch.int64, device=chosen.device)
        count = torch.empty(chosen.shape[:-1], dtype=torch.int64, device=chosen.device)
        grid = (count.numel(), counts.shape[-1])
        unchecked = fits is None
        _indices[grid](
            chosen, counts, index, count, count if unchecked else fits, n, capacity, n if unchecked else capacity,
            triton.cdiv(capacity, block), BLOCK=block, MANY=steps(grid[1], STRETCHES_OF_A_MILLION),
        )  # fmt: skip
        return index, count
    place = chosen.cumsum(-1) - 1
    index = torch.zeros((*chosen.shape[:-1], capacity + 1), dtype=torch.int64, device=chosen.device)
    token = torch.arange(n, device=chosen.device).expand(chosen.shape)
    index.scatter_(-1, torch.where(chosen & (place < capacity), place, capacity), token)
    count = place[..., -1] + 1
    if fits is not None:
        fits.mul_((count <= capacity).all())
    return index[..., :-1].cummax(-1).values, count
