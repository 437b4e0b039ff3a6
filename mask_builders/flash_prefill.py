"""FlashPrefill: blocks by every query's weight of their mean keys, cut relative to the heaviest (arXiv 2603.06199),
with a second look at blocks whose keys lie far apart (RBS, arXiv 2609.20971)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts
from mmflex.ir.shown import shown
from mmflex.runtime.device import array_constant
from mmflex.runtime.kernels.blocks import block_sums, fused
from mmflex.runtime.kernels.listing import device_of

from .block_mass import BlockMass, arranged, finite_rows
from .estimate import block_means, blocks_of
from .near import NearBlocks, with_room
from .shares import Shortlist, check_share, check_weight

_STRIP = 1 << 26
"""Numbers in memory at a time: scores, or where a kernel keeps none, what is left of them and copies of queries."""
_LIFT = 0.9
"""The greatest share of a block's radius by which its score is lifted."""


@dataclass(frozen=True)
class BlockCuts(BlockMass):
    """The heaviest key blocks of every query block, as shares of the heaviest one.

    Attributes:
        rescued: likewise by lifted scores, over the same rows (None unless asked for).
    """

    rescued: Shortlist | None = None


@dataclass(frozen=True)
class KeyBlocks:
    """Estimator: what every query makes of the blocks' mean keys, summed over the queries of a block (FlashPrefill).

    A query weighs the blocks of which it sees every key: ``exp(scale * q . mean)``. A block of queries has the sums
    over its queries, without a softmax for each of them, so that queries with great scores decide, as shares of the
    greatest sum. Listed are the ``blocks`` heaviest; the first ``sink`` tokens and those of the ``near`` nearest keys
    always come first. One product for each query and key block, in float32 (of halves, mean keys are rounded to them on
    a GPU).

    ``rescue``: a second list, by scores to which ``scale * |q| * lift * radius`` is added (RBS). A block's radius is
    the distance of the farthest key from the mean, which hides a single key as far away as that. ``lift`` runs from 0
    at the head's median radius to 0.9 at its 90th percentile and beyond.
    """

    block_size: int
    blocks: int
    near: int
    sink: int
    rescue: bool = False

    def scored(self, view: View) -> float:
        """Query-key products for one head and prompt: of every query with every block of keys before it."""
        return view.rows * (view.size / self.block_size) / 2

    def query_block(self, view: View) -> int:
        """Queries of a block, all of which are needed to weigh for it."""
        return view.block_size(self.block_size)

    def __call__(self, q: Tensor, k: Tensor, view: View, scale: float) -> BlockCuts:
        """q [B, H, M, D], k [B, Hkv, N, D] -> `BlockCuts`."""
        batch, heads, _, dim = q.shape
        device = q.device
        size = self.query_block(view)
        q, view = view.whole_blocks(q, size)
        cells, key_block = arranged(view, 1, size), blocks_of(view, size)[1]
        queries, block_reach = (array_constant(a, device).expand(batch, -1) for a in (cells.queries, cells.block_reach))
        weighed = array_constant(_weighed(view, size), device).expand(batch, -1)
        rows, keys = cells.block_reach.shape[1], -(-view.size // size)
        means = block_means(k, key_block, keys, size).nan_to_num_(0.0, 0.0, 0.0)
        bound = _lifted_radius(k, means, view, key_block, size, abs(scale)) if self.rescue else None
        means = means.to(q.dtype) if device_of(q).type == "cuda" else means
        near, room = NearBlocks.of(view, size, self.near, device), self.room(view)
        sink = min(-(-self.sink // size), keys)
        numbers = max(keys, size * dim // 2) if fused(q, size) else size * keys  # of a query block
        step = max(1, _STRIP // max(1, batch * heads * numbers))
        parts: list[tuple[Shortlist, ...]] = []
        for first in range(0, rows, step):
            part = slice(first, min(rows, first + step))
            some = 1 + max(0, int(cells.block_reach[:, part].max()))  # later blocks are after all these queries
            slots = slice(part.start * size, part.stop * size)
            query = finite_rows(q, queries[:, slots, None].mT.expand(-1, heads, -1))
            shares = block_sums(
                query, means[:, :, :some].contiguous(), weighed[:, slots], scale, size,
                None if bound is None else bound[:, :, :some],
            )  # fmt: skip
            number = torch.arange(some, device=device)
            forced = near.mask(slice(part.start + cells.skipped, part.stop + cells.skipped), number) | (number < sink)
            parts.append(
                tuple(
                    Shortlist.of_blocks(share, block_reach[:, part], self.blocks, forced, room)
                    for share in shares
                    if share is not None
                )
            )
        lists = [Shortlist.join(some) for some in zip(*parts, strict=True)]
        return BlockCuts(lists[0], cells.skipped, keys, lists[1] if self.rescue else None)

    def room(self, seen: Tokens | View) -> int:
        """At most how many blocks of a row are listed."""
        return with_room(seen, self.blocks, self.block_size, self.near, -(-self.sink // self.block_size))


def _weighed(view: View, size: int) -> np.ndarray:
    """Host data: int [B, query blocks x size], the last block of which a query sees every key (-1: none, or no
    query)."""
    layout = view.layout

    def build() -> np.ndarray:
        cells = arranged(view, 1, size)
        count = layout.of(view.scope.key).sum(axis=1)[:, None]
        whole = np.where(cells.reach == count - 1, -(-count // size), (cells.reach + 1) // size)
        return np.where(cells.queries >= 0, whole - 1, -1)

    return layout.once(("weighed", view.scope, view.queries, size), build)


def _lifted_radius(k: Tensor, means: Tensor, view: View, key_block: np.ndarray, size: int, scale: float) -> Tensor:
    """float32 [B, Hkv, key blocks]: ``scale * lift * radius`` of every block."""
    batch, heads, keys, _ = means.shape
    block = array_constant(key_block, k.device).long().expand(batch, -1)
    inside, block = block >= 0, block.clamp(min=0)
    radius = means.new_zeros((batch, heads, keys))
    for head in range(heads):  # a head at a time: distances are in float32
        center = means[:, head].gather(1, block[..., None].expand(-1, -1, means.shape[-1]))
        far = torch.linalg.vector_norm(k[:, head].float() - center, dim=-1)
        far = torch.where(inside & (far < float("inf")), far, 0.0)
        radius[:, head].scatter_reduce_(1, block, far, "amax")
    count = (view.counts(k.device) + size - 1) // size  # blocks of each prompt
    count = count.expand(batch)[:, None]
    real = (torch.arange(keys, device=k.device) < count)[:, None]
    ordered = torch.where(real, radius, float("inf")).sort(-1).values
    middle, high = (_quantile(ordered, count, share) for share in (0.5, 0.9))
    place = (radius - middle) / (high - middle).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(real, scale * place.clamp(0.0, _LIFT) * radius, 0.0)


def _quantile(ordered: Tensor, count: Tensor, share: float) -> Tensor:
    """[B, H, 1]: a quantile of the first ``count`` [B, 1] of ascending numbers [B, H, n], between two of them."""
    place = (count - 1).clamp(min=0)[:, None].expand(-1, ordered.shape[1], -1) * share
    low = place.long()
    high = torch.minimum(low + 1, (count - 1).clamp(min=0)[:, None])
    below, above = ordered.gather(-1, low), ordered.gather(-1, high)
    return torch.where(below < float("inf"), below + (above - below) * (place - low), 0.0)


@dataclass(frozen=True)
class FlashPrefill(Pattern):
    """For every block of ``block_size`` queries the key blocks whose weight is at least ``alpha`` of the heaviest
    block's (FlashPrefill, arXiv 2603.06199). `KeyBlocks` says what weighs how much. No share of the mass is asked for,
    so that a row with one heavy block is cut short however its tail adds up.

    The first ``sink`` keys and the ``near`` nearest keys of every query, both rounded outwards to blocks, are always
    kept, and the last ``last`` queries, rounded outwards to tiles, see everything. At most ``blocks`` key blocks are
    kept for a query block, forced ones counted (more where that has no room for them): where that binds, the heaviest
    are. Of equals, the lower index wins. Blocks of the tile size (128) are cheapest.

    ``rescue`` above 0 adds a second branch, at most ``blocks`` as well: blocks that weigh at least ``rescue`` of the
    heaviest once their scores are lifted by how far apart their keys lie (after RBS, arXiv 2609.20971; where it leaves
    numbers open, they are mmflex's).

    Differences from the authors' code: it bounds nothing and needs whole prompts; an alpha per model (0.18 for
    Llama-3.1-8B, 0.08 for Qwen2.5, 0.12 for Qwen3, 0.1 and 0.22 for two Qwen vision models).
    """

    alpha: float = 0.1
    blocks: int = 64
    rescue: float = 0.0
    near: int = 384
    sink: int = 256
    last: int = 129
    block_size: int = 128
    as_needed: ClassVar[bool] = True
    budgets: ClassVar[tuple[str, ...]] = ("blocks",)

    def __post_init__(self) -> None:
        check_share(self, "alpha")
        check_weight(self, "rescue")
        if self.rescue > 1:
            raise ValueError(f"FlashPrefill.rescue is {shown(self.rescue)}: use 0 (off) or a share of at most 1")
        check_counts(self, "blocks", "block_size", minimum=1)
        check_counts(self, "near", "sink", "last")

    def estimator(self) -> KeyBlocks:
        return KeyBlocks(self.block_size, self.blocks, self.near, self.sink, self.rescue > 0)

    def select(self, estimate: BlockCuts, view: View) -> Mapping[str, Tensor]:
        table = estimate.table(estimate.listed.above(self.alpha))
        if estimate.rescued is not None:
            rescued = BlockMass(estimate.rescued, estimate.skipped, estimate.keys)
            table |= rescued.table(rescued.listed.above(self.rescue))
        return {"blocks": table}

    def mask(self, t: Tokens) -> Boolean:
        at_most = self.estimator().room(t) * (2 if self.rescue else 1)
        return t.blocks("blocks", at_most, self.block_size) | t.last(self.last)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return (cls(0.05), cls(0.1), cls(0.2), cls(0.1, rescue=0.3))
