"""ProxyAttn: heads that share keys rank blocks together, and each keeps as many as it needs (arXiv 2509.24745)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.nn.functional import pad

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts
from mmflex.runtime.device import array_constant
from mmflex.runtime.kernels.blocks import block_maxima, fused

from .block_mass import BlockMass, arranged, finite_rows
from .estimate import LastQueries
from .near import NEAR, NearBlocks, with_room
from .shares import Shortlist, check_share

_STRIP = 1 << 26
"""Numbers in memory at a time: scores, or where a kernel keeps none of them, the greatest one of each block."""


@dataclass(frozen=True)
class ProxyPeaks(BlockMass):
    """The key blocks of every query block with the greatest attention of a proxy, over [B, proxies, rows].

    Attributes:
        vertical: float32 [B, H, key blocks], mass of each head's own last queries.
        reach: int32 [B|1, rows], the last key block that the queries of a block stand at (-1: none).
        heads: query heads of each proxy.
    """

    vertical: Tensor
    reach: Tensor
    heads: int

    def scores(self, rows: slice) -> Tensor:
        """float32 [B, H, query blocks, key blocks]: each head's proxy's, -inf where a block is not listed."""
        return super().scores(rows).repeat_interleave(self.heads, 1)[:, : self.vertical.shape[1]]


@dataclass(frozen=True)
class Proxies:
    """Estimator: greatest attention weights of blocks for proxies of several heads, and each head's own last queries.

    The heads of ``kv_heads`` KV heads in a row (the last ones may be fewer) have one proxy: the mean of their queries
    against the mean of their keys. Of every ``stride`` queries in a row one is taken, the first that the call has, and
    its softmax over all keys in scope up to itself; a pair of blocks has the greatest weight of its pairs. Listed are
    the ``blocks`` greatest; the first block and those of the ``near`` nearest keys always come first.

    Whichever heads have the pattern, proxies are of all heads of the layer.
    """

    stride: int
    kv_heads: int
    block_size: int
    blocks: int
    near: int
    last_q: int
    whole_layer: ClassVar[bool] = True

    def scored(self, view: View) -> float:
        """Query-key products for one head and prompt: its share of the proxy's, and of its own last queries."""
        proxy = view.rows / self.stride * view.size / 2 / (view.group * self.kv_heads)
        return proxy + LastQueries(self.last_q).scored(view)

    def query_block(self, view: View) -> int:
        """Queries of a block, of which the sampled ones are needed."""
        return view.block_size(self.block_size)

    def __call__(self, q: Tensor, k: Tensor, view: View, scale: float) -> ProxyPeaks:
        """q [B, H, M, D], k [B, Hkv, N, D], all heads of the layer -> `ProxyPeaks`."""
        batch, heads, device = q.shape[0], q.shape[1], q.device
        size, kv_heads = self.query_block(view), min(self.kv_heads, k.shape[1])
        q, view = view.whole_blocks(q, size)
        cells, sample = arranged(view, 1, size), _sampled(view, size, min(self.stride, size))
        sampled = sample[0].shape[1] // cells.block_reach.shape[1]  # queries of a block
        queries, limit, reach = (array_constant(a, device).expand(batch, -1) for a in (*sample, cells.block_reach))
        order = array_constant(cells.keys, device).expand(batch, -1)
        key = _means(finite_rows(k, order[:, None].expand(-1, k.shape[1], -1)), kv_heads)
        group = heads // k.shape[1] * kv_heads  # query heads of a proxy
        rows, keys = cells.block_reach.shape[1], key.shape[2] // size
        near, room = NearBlocks.of(view, size, self.near, device), with_room(view, self.blocks, size, self.near)
        numbers = sampled * (keys if fused(q, size) else key.shape[2])  # of a query block
        step = max(1, _STRIP // max(1, batch * key.shape[1] * numbers))
        parts = []
        for first in range(0, rows, step):
            part = slice(first, min(rows, first + step))
            slots = slice(part.start * sampled, part.stop * sampled)
            query = _means(finite_rows(q, queries[:, slots, None].mT.expand(-1, heads, -1)), group)
            some = 1 + max(0, int(cells.block_reach[:, part].max()))  # later blocks are after all these queries
            peaks, lse = block_maxima(query, key[:, :, : some * size].contiguous(), limit[:, slots], scale, size)
            weight = torch.where(peaks > float("-inf"), peaks - lse[..., None], float("-inf"))
            mass = weight.unflatten(2, (-1, sampled)).amax(3).exp()
            number = torch.arange(some, device=device)
            forced = (number == 0) | near.mask(slice(part.start + cells.skipped, part.stop + cells.skipped), number)
            parts.append(Shortlist.of_blocks(mass, reach[:, part], self.blocks, forced, room))
        mass = LastQueries(self.last_q)(q, k, view, scale).vertical
        vertical = pad(mass, (0, keys * size - view.size)).unflatten(2, (keys, -1)).sum(-1)
        return ProxyPeaks(Shortlist.join(parts), cells.skipped, keys, vertical, reach, group)


def _means(t: Tensor, group: int) -> Tensor:
    """Means over ``group`` heads in a row of t [B, H, S, D], the last ones of fewer; contiguous."""
    if group == 1:
        return t.contiguous()
    parts = [part.mean(1, dtype=torch.float32) for part in t.split(group, 1)]
    return torch.stack(parts, 1).to(t.dtype)


def _sampled(view: View, size: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Host data, int [B, query blocks x samples]: of every ``stride`` places of a block the first query (-1: none), and
    the last key in scope that it sees."""
    layout = view.layout

    def build() -> tuple[np.ndarray, np.ndarray]:
        cells = arranged(view, 1, size)
        runs = -(-size // stride)

        def by_run(values: np.ndarray) -> np.ndarray:
            blocks = values.reshape(len(values), -1, size)
            blocks = np.pad(blocks, ((0, 0), (0, 0), (0, runs * stride - size)), constant_values=-1)
            return blocks.reshape(len(values), -1, stride)

        queries, reach = by_run(cells.queries), by_run(cells.reach)
        first = (queries >= 0).argmax(-1)[..., None]
        taken = np.take_along_axis(queries, first, -1)[..., 0]
        return taken, np.where(taken >= 0, np.take_along_axis(reach, first, -1)[..., 0], -1)

    return layout.once(("sampled", view.scope, view.queries, size, stride), build)


@dataclass(frozen=True)
class ProxyAttn(Pattern):
    """For every block of ``block_size`` queries the key blocks with the greatest attention weights, ranked by a proxy
    that heads share; how many, every head decides by its own last queries (ProxyAttn, arXiv 2509.24745).

    Ranking: `Proxies` says how. The greatest single weight decides, not the sum: a needle of one key counts as much as
    it weighs, however little the rest of its block does.

    Budgets: of each head, the least share of the key blocks that holds ``gamma`` of the attention of its last
    ``last_q`` queries. Every query block has that share of the key blocks up to its own, rounded up, and at least
    ``minimum`` tokens. The first key block and those that hold the ``near`` nearest keys of every query come first and
    count. At most ``blocks`` key blocks are kept for a query block (more where that has no room for the first). Of
    equals, the lower index wins. Blocks of the tile size (128) are cheapest.

    ``kv_heads``: KV heads that share a proxy (the paper: all of a Llama-3.1-8B layer, one for each of Qwen2.5-7B's).
    The larger, the cheaper. Of what the paper leaves open: queries are sampled, not keys; the first blocks and the
    nearest are forced; there is a bound.
    """

    gamma: float = 0.95
    blocks: int = 128
    minimum: int = 2048
    stride: int = 4
    kv_heads: int = 1
    last_q: int = 128
    block_size: int = 128
    near: int = NEAR
    as_needed: ClassVar[bool] = True
    budgets: ClassVar[tuple[str, ...]] = ("blocks", "minimum")

    def __post_init__(self) -> None:
        check_share(self, "gamma")
        check_counts(self, "blocks", "stride", "kv_heads", "last_q", "block_size", minimum=1)
        check_counts(self, "minimum", "near")

    def estimator(self) -> Proxies:
        return Proxies(self.stride, self.kv_heads, self.block_size, self.blocks, self.near, self.last_q)

    def select(self, estimate: ProxyPeaks, view: View) -> Mapping[str, Tensor]:
        listed, heads = estimate.listed, estimate.vertical.shape[1]

        def of_heads(t: Tensor) -> Tensor:
            return t.repeat_interleave(estimate.heads, 1)[:, :heads]

        own = Shortlist(*(of_heads(t) for t in (listed.index, listed.mass, listed.first, listed.total)))
        budget = self._budgets(estimate, view)
        spread = ProxyPeaks(own, estimate.skipped, estimate.keys, estimate.vertical, estimate.reach, estimate.heads)
        return {"blocks": spread.table(own.best(budget))}

    def _budgets(self, estimate: ProxyPeaks, view: View) -> Tensor:
        """int64 [B, H, rows, 1]: key blocks of every query block."""
        size = view.block_size(self.block_size)
        mass = estimate.vertical.sort(-1, descending=True).values.double()
        before = mass.cumsum(-1) - mass
        needed = (before < self.gamma * mass.sum(-1, keepdim=True)).sum(-1)  # blocks of each head
        count = (view.counts(mass.device)[:, None] + size - 1) // size
        visible = (estimate.reach.long() + 1)[:, None]
        share = -(-needed[..., None] * visible // count.clamp(min=1)[..., None])
        least = min(-(-self.minimum // size), estimate.keys)
        return share.clamp(min=max(1, least), max=min(self.blocks, estimate.keys))[..., None]

    def mask(self, t: Tokens) -> Boolean:
        return t.blocks("blocks", with_room(t, self.blocks, self.block_size, self.near), self.block_size)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return (cls(0.9), cls(0.95))
