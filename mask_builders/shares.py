"""Selection by a share of the mass ("top-p"), within a bound: of the heaviest entries, the fewest that hold enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmflex.ir.shown import shown
from mmflex.runtime.kernels.fewest import fewest
from mmflex.runtime.kernels.select import gathered, heaviest

SHARES = (0.65, 0.78, 0.84, 0.9, 0.95)
"""Shares of the mass that a search tries."""


def heaviest_of_rows(mass: Tensor, budget: Tensor, at_most: int) -> Tensor:
    """bool like ``mass`` float32 [..., n]: the ``budget`` int [..., 1] heaviest of each row, ``at_most`` in any row. Of
    equals, the lower index; entries of -inf never."""
    n = mass.shape[-1]
    index, count = gathered(heaviest(mass, at_most), min(at_most, n))
    listed = mass.gather(-1, index)
    real = (torch.arange(listed.shape[-1], device=mass.device) < count[..., None]) & (listed > float("-inf"))
    return _spread(index, real & _ranked(listed.masked_fill(~real, float("-inf")), budget), count, n)


def _ranked(mass: Tensor, budget: Tensor) -> Tensor:
    """bool [..., s]: whether an entry's rank in its row is below a budget [..., 1]."""
    order = mass.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1) < budget


def _spread(index: Tensor, kept: Tensor, count: Tensor, n: int) -> Tensor:
    """bool [..., n] from ``kept`` bool [..., s] at ``index``, of which the first ``count`` [...] are real."""
    last = (count[..., None] - 1).clamp(min=0)
    real = torch.arange(kept.shape[-1], device=kept.device) < count[..., None]
    # Empty slots point at some index too: they write what its real slot writes (nothing, where there is none).
    slot = torch.arange(kept.shape[-1], device=kept.device).minimum(last)
    index, kept = index.gather(-1, slot), (kept & real).gather(-1, slot)
    return torch.zeros((*kept.shape[:-1], n), dtype=torch.bool, device=kept.device).scatter_(-1, index, kept)


@dataclass(frozen=True)
class Shortlist:
    """The heaviest entries of rows of masses, so that the search for a threshold is over few.

    Attributes:
        index: int64 [..., s], ascending; empty slots repeat the last one.
        mass: float32 [..., s], -1 in empty slots.
        first: bool [..., s], entries that are kept in any case.
        total: float64 [..., 1], the mass of all entries of the row, listed or not.
    """

    index: Tensor
    mass: Tensor
    first: Tensor
    total: Tensor

    @classmethod
    def of(cls, mass: Tensor, at_most: int, first: Tensor, room: int = 0) -> Shortlist:
        """``mass`` float32 [..., n], below 0 for entries that do not exist; ``first`` bool, broadcastable. The
        ``first`` come first and count towards ``at_most``; where they are more, up to ``room``, they are all listed."""
        first = (first & (mass >= 0)).expand(mass.shape)
        ranked = mass.masked_fill(first, float("inf"))
        chosen = heaviest(ranked, at_most) & (mass >= 0)
        size = min(max(at_most, room), mass.shape[-1])
        index, count = gathered(chosen | first if room > at_most else chosen, size)
        real = torch.arange(size, device=mass.device) < count[..., None]
        kept = torch.where(real, mass.gather(-1, index), -1.0)
        total = mass.clamp(min=0.0).sum(-1, keepdim=True, dtype=torch.float64)
        return cls(index, kept, first.gather(-1, index) & real, total)

    @classmethod
    def of_blocks(cls, mass: Tensor, reach: Tensor, at_most: int, first: Tensor, room: int) -> Shortlist:
        """For ``mass`` [B, H, query blocks, key blocks] and the last key block that each query block sees, ``reach``
        int [B|1, query blocks] (-1: none)."""
        number = torch.arange(mass.shape[-1], device=mass.device)
        return cls.of(mass.masked_fill(number > reach[:, None, :, None], -1.0), at_most, first, room)

    @classmethod
    def join(cls, parts: Sequence[Shortlist]) -> Shortlist:
        """Lists of consecutive rows as one (along the dimension before the last)."""
        size = max(part.index.shape[-1] for part in parts)

        def joined(name: str, value: int = 0) -> Tensor:
            rows = [getattr(part, name) for part in parts]
            return torch.cat([pad(r, (0, size - r.shape[-1]), value=value) for r in rows], -2)

        total = torch.cat([part.total for part in parts], -2)
        return cls(joined("index"), joined("mass", -1), joined("first"), total)

    def at_least(self, count: int) -> Tensor:
        """bool [..., s]: the ``first``, and the heaviest up to ``count`` of the row in all."""
        ranked = self.mass.masked_fill(self.first, float("inf"))
        return self.first | (heaviest(ranked, count) & (self.mass >= 0))

    def above(self, least: float) -> Tensor:
        """bool [..., s]: the ``first``, and those with a mass of ``least`` or more."""
        return self.first | (self.mass >= least)

    def best(self, budget: Tensor) -> Tensor:
        """bool [..., s]: the ``first``, and the heaviest up to ``budget`` int [..., 1] of the row in all."""
        ranked = self.mass.masked_fill(self.first, float("inf"))
        return self.first | (_ranked(ranked, budget) & (self.mass >= 0))

    def spread(self, kept: Tensor, n: int) -> Tensor:
        """bool [..., n] from ``kept`` bool [..., s]."""
        return _spread(self.index, kept, (self.mass >= 0).sum(-1), n)


def top_share(mass: Tensor, share: float, at_most: int, first: Tensor, least: int = 0) -> Tensor:
    """bool like ``mass`` float32 [..., n]: the fewest entries that hold ``share`` of its sum; ``first`` bool [n] and
    the heaviest up to ``least`` in any case, and never more than ``at_most``, which has room for the first."""
    listed = Shortlist.of(mass, at_most, first)
    kept = fewest(listed.mass, share * listed.total, listed.at_least(least))
    return listed.spread(kept, mass.shape[-1])


def check_share(pattern: object, *names: str) -> None:
    """TypeError, ValueError unless the named fields are shares of mass, above 0 and at most 1."""
    for name in names:
        value = getattr(pattern, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{type(pattern).__name__}.{name} is a share of the mass, got {shown(value)}: use a float")
        if not 0.0 < value <= 1.0:
            raise ValueError(f"{type(pattern).__name__}.{name} is {shown(value)}: use a share above 0 and at most 1")


HEAVIEST = 1e6
"""A weight, at most: scores that it multiplies are float32."""


def check_weight(pattern: object, *names: str) -> None:
    """TypeError, ValueError unless the named fields are numbers from 0 to `HEAVIEST`."""
    for name in names:
        value = getattr(pattern, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{type(pattern).__name__}.{name} is a weight, got {shown(value)}: use a float")
        if not 0.0 <= value <= HEAVIEST:
            raise ValueError(f"{type(pattern).__name__}.{name} is {shown(value)}: use 0 (off) to {HEAVIEST:g}")
