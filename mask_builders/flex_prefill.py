"""FlexPrefill: every head decides for itself between blocks and lines, and how many (arXiv 2502.20766)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.nn.functional import pad

from mmflex.ir.pattern import Pattern, Tokens, View, check_counts
from mmflex.ir.shown import shown
from mmflex.runtime.device import array_constant
from mmflex.runtime.kernels.rows import take_rows

from .estimate import LastMass, LastQueries, Pooled, PooledBlocks, _last, mean_products
from .near import NEAR, with_room
from .shares import Shortlist, check_share, fewest, top_share
from .vertical_slash import always, columns_of, diagonals_of

_SCORES = 1 << 26
"""Block scores held at a time."""


@dataclass(frozen=True)
class SwitchMass(LastMass):
    """`LastMass`, the pooled blocks, and how far pooling is from the truth.

    Attributes:
        pooled: mean-pooled queries and keys.
        distance: float32 [B, H], square root of the Jensen-Shannon divergence (natural logarithm, so at most 0.83)
            between the last queries' attention per key block as pooling has it and as it is.
    """

    pooled: Pooled
    distance: Tensor


@dataclass(frozen=True)
class Switch:
    """Estimator: attention of the last ``last_q`` queries in scope, pooled blocks of ``block_size`` and their distance
    (FlexPrefill, algorithm 2)."""

    last_q: int
    block_size: int
    near: int = NEAR

    def scored(self, view: View) -> float:
        """Query-key products for one head and prompt."""
        return LastQueries(self.last_q).scored(view) + PooledBlocks(self.block_size).scored(view)

    def __call__(self, q: Tensor, k: Tensor, view: View, scale: float) -> SwitchMass:
        """q [B, H, M, D], k [B, Hkv, N, D] -> `SwitchMass`."""
        mass = LastQueries(self.last_q)(q, k, view, scale)
        pooled = PooledBlocks(self.block_size, self.near)(q, k, view, scale)
        blocks, size = pooled.k.shape[2], view.block_size(self.block_size)
        truth = pad(mass.vertical, (0, blocks * size - view.size)).unflatten(2, (blocks, -1)).sum(-1)
        truth = truth / truth.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return SwitchMass(
            mass.vertical, mass.diagonal, mass.block_diagonals, view, pooled,
            _distance(truth, self._guess(q, pooled, view, scale)),
        )  # fmt: skip

    def _guess(self, q: Tensor, pooled: Pooled, view: View, scale: float) -> Tensor:
        """float32 [B, H, key blocks]: softmax of the mean of the last queries with the mean keys."""
        q, queries = view.last_queries(q)
        last = _last(view, self.last_q, queries)
        rows, stand = array_constant(last.rows, q.device), array_constant(last.stand, q.device).amax(-1)
        query = take_rows(q, rows[:, None].expand(len(q), q.shape[1], -1)).float().nan_to_num(0.0).sum(2)
        query = query * scale / (rows >= 0).sum(-1).clamp(min=1)[:, None, None]
        reach = (stand // view.block_size(self.block_size))[:, None, None]
        scores = mean_products(query[:, :, None], pooled.k)[:, :, 0]
        hidden = torch.arange(scores.shape[-1], device=q.device) > reach
        return scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of distributions [..., n]."""
    middle = ((p + q) / 2).clamp(min=torch.finfo(torch.float32).tiny)
    both = torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)
    return (both.sum(-1) / 2).clamp(min=0.0).sqrt()


@dataclass(frozen=True)
class FlexPrefill(Pattern):
    """Blocks for heads whose attention mean-pooling can predict, columns and diagonals for all others; of either, as
    few as hold the share ``gamma`` of the mass (FlexPrefill, arXiv 2502.20766).

    The switch, for every prompt and head (query-aware sparse pattern determination, algorithm 2): attention of the last
    ``last_q`` queries, summed over key blocks of ``block_size`` tokens, against the softmax of their mean with the
    blocks' mean keys. A square root of the Jensen-Shannon divergence below ``tau`` makes the head query-aware; a tau
    of 0 never does, a tau of 1 always.

    Query-aware heads (algorithm 4): a softmax of mean queries and mean keys for every query block, then the fewest
    entries of the *whole map* (flattened, as in the paper: a flat row gets more blocks than a peaked one) that hold
    gamma of it. The first key block is always kept, and those that hold the ``near`` nearest keys of every query.

    Vertical-slash heads (algorithm 3): the fewest key columns that hold gamma of the last queries' mass, and the fewest
    diagonals that do. The first 30 keys are always kept, and the diagonals that hold the ``near`` nearest keys of every
    query. As in `VerticalSlash`, diagonals are whole block diagonals, by the mass that each would hold.

    ``minimum`` tokens are kept in any case: that many columns, that many tokens of diagonals, and that many tokens of
    key blocks for each query block, the heaviest of each.

    What the paper does not have are bounds: at most ``vertical`` columns, ``slash`` tokens of diagonals, and ``blocks``
    key blocks of a query block; a bound that has no room for what is always kept grows. Where one of them binds, the
    heaviest within it are kept (forced ones count and come first, also before ``minimum``), and lines hold less than
    gamma. Of the map, rows that reach ``blocks`` leave their
    share to the other rows: the set is the smallest with at most ``blocks`` in a row, and holds less than gamma only
    where every row is full. Index tables are wide enough for both kinds of head, and both selections are made for
    every head: the switch is a mask on the device. Of equals, the lower index wins.

    Other differences from the authors' code: it counts the keys that hold gamma and takes that many ``/ 128 + 1`` whole
    key blocks and block diagonals, mmflex single columns, gathered, and block diagonals by what they would hold (finer,
    and sparser). It forces key block 0 and block diagonal 0, mmflex 30 keys and the ``near``. It drops the entry that
    crosses gamma in the map, mmflex keeps it. Its minimum is also given to query-aware heads as columns and diagonals,
    mmflex's as the heaviest blocks of a row. Its defaults are a gamma of 0.9 or 0.95 and no minimum, 512 or 1024 by
    experiment; it has no bounds, and neither chunks of a prompt nor batches.
    """

    gamma: float = 0.95
    tau: float = 0.1
    vertical: int = 2048
    slash: int = 4096
    blocks: int = 64
    minimum: int = 1024
    block_size: int = 128
    last_q: int = 128
    near: int = NEAR
    as_needed: ClassVar[bool] = True
    budgets: ClassVar[tuple[str, ...]] = ("vertical", "slash", "blocks", "minimum")

    def __post_init__(self) -> None:
        check_share(self, "gamma")
        check_counts(self, "vertical", "slash", "blocks", "block_size", "last_q", minimum=1)
        check_counts(self, "minimum", "near")
        if not isinstance(self.tau, (int, float)) or isinstance(self.tau, bool):
            raise TypeError(f"FlexPrefill.tau is a distance of distributions, got {shown(self.tau)}: use a float")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(
                f"FlexPrefill.tau is {shown(self.tau)}: use 0 (no head is query-aware) to 1 (every head is)"
            )

    def estimator(self) -> Switch:
        return Switch(self.last_q, self.block_size, self.near)

    def select(self, estimate: SwitchMass, view: View) -> Mapping[str, Tensor]:
        aware = (estimate.distance < self.tau)[..., None]
        sink, near = always(view, self.near, aware.device)
        columns, diagonals = columns_of(self.vertical), diagonals_of(self.slash, self.near, view.tile)
        least = -(-self.minimum // view.tile)
        return {
            "columns": top_share(estimate.vertical, self.gamma, columns, sink, self.minimum) & ~aware,
            "diagonals": top_share(estimate.block_diagonals, self.gamma, diagonals, near, least) & ~aware,
            "blocks": self._table(estimate.pooled, view) & aware[..., None],
        }

    def _table(self, pooled: Pooled, view: View) -> Tensor:
        """bool [B, H, query blocks, key blocks] of query-aware heads."""
        batch, heads, rows, _ = pooled.q.shape
        keys = pooled.k.shape[2]
        number, room = torch.arange(keys, device=pooled.k.device), self._room(view)
        step = max(1, _SCORES // max(1, batch * heads * keys))
        parts = []
        for first in range(0, rows, step):
            part = slice(first, first + step)
            mass = pooled.scores(part).softmax(-1).nan_to_num(0.0)
            forced = (number == 0) | pooled.near.mask(part, number)
            parts.append(Shortlist.of_blocks(mass, pooled.reach[:, part], self.blocks, forced, room))
        listed = Shortlist.join(parts)
        least = listed.at_least(-(-self.minimum // self.block_size))
        kept = fewest(listed.mass.flatten(2), self.gamma * listed.total.sum(2), least.flatten(2))
        return listed.spread(kept.view_as(least), keys)

    def _room(self, seen: Tokens | View) -> int:
        return with_room(seen, self.blocks, self.block_size, self.near)

    def mask(self, t: Tokens) -> Boolean:
        diagonals = t.diagonals("diagonals", diagonals_of(self.slash, self.near, t.tile))
        lines = t.columns("columns", columns_of(self.vertical)) | diagonals
        return lines | t.blocks("blocks", self._room(t), self.block_size)

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return tuple(cls(gamma) for gamma in (0.9, 0.95))
