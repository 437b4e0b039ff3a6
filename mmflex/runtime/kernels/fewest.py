"""Selection by a share of the mass ("top-p"): the fewest entries of a row that hold enough of it.

No sort and no value read back: what is kept is the part of a ranking above a threshold, and the threshold is bisected.
Ranks are those of `select.heaviest` (23 significant bits, of equals the lower index), so both agree where they meet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import steps, use_triton
from .listing import jit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_TOP = 1 << 30
"""Above the rank of every number."""
_STEPS = 30
"""Bisections until two thresholds are neighbours."""
_BLOCK = 8192
"""Entries that a program looks at together."""

if triton is not None:

    @triton.jit
    def _ranked(mass, always, at, n, FORCED: tl.constexpr):
        """Masses of some entries of a row, and their ranks: -1 for what is never kept."""
        value = tl.load(mass + at, mask=at < n, other=-1.0)
        rank = tl.where(value < 0, -1, value.to(tl.int32, bitcast=True) >> 1)
        if FORCED:
            rank = tl.where(tl.load(always + at, mask=at < n, other=0) != 0, 1 << 30, rank)
        return value, rank

    @jit(do_not_specialize=["n"])
    def _fewest(mass, wanted, always, keep, n, STEPS: tl.constexpr, BLOCK: tl.constexpr, FORCED: tl.constexpr):
        """One row."""
        row = tl.program_id(0).to(tl.int64)
        want = tl.load(wanted + row)
        mass += row * n
        always += row * n
        keep += row * n
        low, high = tl.full([], 0, tl.int32), tl.full([], 1 << 30, tl.int32)
        for _ in range(STEPS):  # ranks from `low` on hold enough (or low is 0), ranks from `high` on do not
            middle = (low + high) >> 1
            held = tl.full([], 0.0, tl.float64)
            for first in range(0, n, BLOCK):
                value, rank = _ranked(mass, always, first + tl.arange(0, BLOCK), n, FORCED)
                held += tl.sum(tl.where(rank >= middle, value, 0.0).to(tl.float64), 0)
            low, high = tl.where(held >= want, middle, low), tl.where(held >= want, high, middle)
        held = tl.full([], 0.0, tl.float64)  # by those above the threshold, then also by its equals that came before
        for first in range(0, n, BLOCK):
            value, rank = _ranked(mass, always, first + tl.arange(0, BLOCK), n, FORCED)
            held += tl.sum(tl.where(rank > low, value, 0.0).to(tl.float64), 0)
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            value, rank = _ranked(mass, always, at, n, FORCED)
            equal = (rank == low) & (low > 0)
            share = tl.where(equal, value, 0.0).to(tl.float64)
            before = held + tl.cumsum(share, 0) - share
            tl.store(keep + at, (rank > low) | (equal & (before < want)), mask=at < n)
            held += tl.sum(share, 0)


def fewest(mass: Tensor, wanted: Tensor, always: Tensor | None = None) -> Tensor:
    """bool like ``mass`` float32 [..., n]: the fewest entries that together hold ``wanted`` float64 [..., 1].

    ``always`` bool [..., n] come first and count; then the heaviest, of equals the lower index. Where all of them
    hold less than wanted, all that hold any mass are kept. Entries below 0 never are; masses are finite.
    """
    mass = mass.float().contiguous()
    if not use_triton(mass) or not mass.numel():
        return _twin(mass, wanted, always)
    assert triton is not None
    n = mass.shape[-1]
    keep = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    wanted = wanted.double().expand(*mass.shape[:-1], 1).contiguous()
    forced = keep if always is None else always.expand(mass.shape).contiguous()
    block = min(_BLOCK, steps(n, 128, 1024))
    _fewest[(mass.numel() // n,)](
        mass, wanted, forced, keep, n, STEPS=_STEPS, BLOCK=block, FORCED=always is not None,
        num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip
    return keep


def _twin(mass: Tensor, wanted: Tensor, always: Tensor | None) -> Tensor:
    rank = (mass.view(torch.int32) >> 1).masked_fill(mass < 0, -1)
    if always is not None:
        rank = rank.masked_fill(always, _TOP)

    def held(chosen: Tensor) -> Tensor:
        return torch.where(chosen, mass, 0.0).sum(-1, keepdim=True, dtype=torch.float64)

    low = torch.zeros_like(rank[..., :1])
    high = torch.full_like(low, _TOP)
    for _ in range(_STEPS):  # as in the kernel
        middle = (low + high) >> 1
        enough = held(rank >= middle) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    above, equal = rank > low, (rank == low) & (low > 0)
    share = torch.where(equal, mass, 0.0).double()
    before = held(above) + share.cumsum(-1) - share
    return above | (equal & (before < wanted))
