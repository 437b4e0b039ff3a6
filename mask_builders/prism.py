"""Prism: pooled blocks, scored by two bands of rotary frequencies (arXiv 2602.08426)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts
from mmflex.ir.shown import shown
from mmflex.runtime.device import index_constant

from .estimate import Pooled, PooledBlocks, mean_products
from .near import NEAR, with_room
from .shares import SHARES, Shortlist, check_share, fewest

_SCORES = 1 << 26
"""Scores held at a time."""

_SMALLEST = 1e-30
"""Keeps a share of nothing from being no number."""


@dataclass(frozen=True)
class Prism(Pattern):
    """For every block of ``block_size`` queries the key blocks that hold the share ``threshold`` of the pooled
    attention in the high band of rotary frequencies, or in the low one (Prism, arXiv 2602.08426).

    Rotary embedding turns pairs of channels by angles that grow with the position. A mean over a block keeps the slow
    pairs and cancels the fast ones, so that a plain pooled score hardly knows where a block is. So each band is scored
    on its own, at a temperature that makes up for what pooling took from it: with block means ``q`` and ``k`` of a
    head, the scores of band z are ``scale * (q_z . k_z) * D / (D_z * loss_z)``, where ``loss_z`` is the root mean
    square of ``q_z`` over that of ``q``, times the same of ``k``, over all blocks. For each band the fewest key blocks
    that hold the threshold of the softmax over the key blocks up to the query block's own are kept, the one that
    crosses it included; a block that either band keeps is kept.

    Of the pairs of ``rotary_dim`` channels (None: all; those beyond are not rotated and count as slowest), the high
    band is the faster half, the low band the slower three quarters. ``pairs``: "halves" for channels i and i +
    rotary_dim / 2 (as in Llama, Qwen), "interleaved" for channels 2i and 2i + 1.

    The first key block and those that hold the ``near`` nearest keys of every query are kept in any case. At most
    ``blocks`` key blocks are kept for each band (more where that has no room for the first): where that binds, a row
    holds less than the threshold. Of equals, the lower index wins. Blocks of the tile size (128) are cheapest.

    Differences from the authors' code: it bounds nothing, forces the first block and the query's own alone
    (``near=1``), divides the sum over a last block that is not full by the whole block size, and pools in the model's
    dtype (mmflex in float32). Its thresholds are 0.95, for some tasks 0.92 or 0.93.
    """

    threshold: float = 0.95
    blocks: int = 64
    block_size: int = 128
    rotary_dim: int | None = None
    pairs: Literal["halves", "interleaved"] = "halves"
    near: int = NEAR
    as_needed: ClassVar[bool] = True
    budgets: ClassVar[tuple[str, ...]] = ("blocks",)
    levels: ClassVar[Mapping[str, tuple[float, ...]]] = {"threshold": SHARES}

    def __post_init__(self) -> None:
        check_share(self, "threshold")
        check_counts(self, "blocks", "block_size", minimum=1)
        check_counts(self, "near")
        if self.rotary_dim is not None:
            check_counts(self, "rotary_dim", minimum=4)
        if not isinstance(self.pairs, str) or self.pairs not in ("halves", "interleaved"):
            raise ValueError(f'Prism.pairs is {shown(self.pairs)}: use "halves" (Llama, Qwen) or "interleaved"')

    def estimator(self) -> PooledBlocks:
        return PooledBlocks(self.block_size, self.near)

    def bands(self, dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Channels of the high band and of the low one, of a head dimension; they overlap."""
        rotary = dim if self.rotary_dim is None else min(self.rotary_dim, dim)
        count = rotary // 2

        def channels(first: int, last: int) -> tuple[int, ...]:
            if self.pairs == "halves":
                return tuple(c + half for half in (0, count) for c in range(first, last))
            return tuple(range(2 * first, 2 * last))

        return channels(0, count // 2), (*channels(count // 4, count), *range(2 * count, dim))

    def select(self, estimate: Pooled, view: View) -> Mapping[str, Tensor]:
        batch, heads, rows, dim = estimate.q.shape
        keys, device = estimate.k.shape[2], estimate.q.device
        bands = [self._band(estimate, index_constant(channels, device)) for channels in self.bands(dim)]
        table = torch.zeros((batch, heads, rows, keys), dtype=torch.bool, device=device)
        number, room = torch.arange(keys, device=device), with_room(view, self.blocks, self.block_size, self.near)
        step = max(1, _SCORES // max(1, batch * heads * keys))
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            forced = (number == 0) | estimate.near.mask(part, number)
            hidden = number > estimate.reach[:, None, part, None]
            for q, k in bands:
                scores = mean_products(q[:, :, part], k).masked_fill_(hidden, float("-inf"))
                mass = scores.softmax(-1).nan_to_num_(0.0)
                listed = Shortlist.of_blocks(mass, estimate.reach[:, part], self.blocks, forced, room)
                kept = listed.first | fewest(listed.mass, self.threshold * listed.total)
                table[:, :, part] |= listed.spread(kept, keys)
        return {"blocks": table}

    def _band(self, pooled: Pooled, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, query blocks, Dz], made up for the band's loss, and keys [B, Hkv, key blocks, Dz]."""
        q, k = pooled.q.index_select(-1, channels), pooled.k.index_select(-1, channels)
        group, share = q.shape[1] // k.shape[1], len(channels) / pooled.q.shape[-1]
        loss = _norm(q) / _norm(pooled.q) * (_norm(k) / _norm(pooled.k)).repeat_interleave(group, 1) / share
        return q / (share * loss).clamp(min=_SMALLEST), k

    def mask(self, t: Tokens) -> Boolean:
        at_most = 2 * with_room(t, self.blocks, self.block_size, self.near)
        return t.blocks("blocks", at_most, self.block_size)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return (cls(0.9), cls(0.95))


def _norm(x: Tensor) -> Tensor:
    """float32 [B, H, 1, 1]: the norm of all that a head has; what is not finite counts as 0."""
    return x.nan_to_num(0.0, 0.0, 0.0).square().sum((2, 3), keepdim=True).sqrt().clamp(min=_SMALLEST)
