"""The nearest keys of every query, which selections hold before anything else.

A budget of one block diagonal, or of the query's own block, is no neighbourhood for the first rows of a tile: they see
a few keys of it. So what is forced is counted in tokens, from each query, and covers as many blocks as that takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmflex.ir.layout import TokenLayout
from mmflex.ir.pattern import Scope, Tokens, View
from mmflex.runtime.device import array_constant

NEAR = 100
"""Nearest keys that every query sees, its own included, unless a pattern is told otherwise (MInference's number)."""

MORE_THAN_A_TILE = 2
"""The least window that a search may shrink one to: rounded outwards to tiles, it reaches into the tile before the
query's own, so that every query sees 128 keys before itself. A window of 1 is the query's own tile."""


def near_diagonals(near: int, tile: int) -> int:
    """Block diagonals, from the first on, that hold the ``near`` nearest keys of every query of a tile."""
    return 1 + -(-(near - 1) // tile) if near else 0


@dataclass(frozen=True)
class NearBlocks:
    """The key blocks that hold the nearest keys of the queries of a block, as runs of consecutive blocks.

    Queries of one block stand next to each other, so that there is one run, unless keys are counted within a modality
    or the call leaves queries out.

    Attributes:
        first, last: int32 [B|1, query blocks, runs]; first > last for no run.
    """

    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, view: View, size: int, near: int, device: torch.device) -> NearBlocks:
        """For blocks of ``size`` tokens, each query's ``near`` nearest keys, for the queries of the call."""
        layout, scope, queries = view.layout, view.scope, view.queries
        near = min(near, layout.length)
        runs = layout.once(("near", scope, queries, size, near), lambda: _runs(layout, scope, queries.take, size, near))
        return cls(array_constant(runs[0], device), array_constant(runs[1], device))

    def mask(self, rows: slice, number: Tensor) -> Tensor:
        """bool [B|1, 1, rows, key blocks], for some query blocks and the numbers [key blocks] of the key blocks."""
        first, last = self.first[:, rows, :, None], self.last[:, rows, :, None]
        out = (number >= first[:, :, 0]) & (number <= last[:, :, 0])
        for run in range(1, first.shape[2]):
            out |= (number >= first[:, :, run]) & (number <= last[:, :, run])
        return out[:, None]


def with_room(seen: Tokens | View, blocks: int, size: int, near: int, sink: int = 1) -> int:
    """The budget of key blocks for a query block, grown where it has no room for the first ``sink`` blocks and those of
    the nearest keys: at most so many are listed, whichever tokens have queries."""
    layout, scope = seen.layout, seen.scope
    size, near = min(size, max(layout.length, seen.tile)), min(near, layout.length)
    sink = min(sink, -(-layout.length // size))

    def most() -> int:
        first, last = _runs(layout, scope, lambda values: values, size, near)
        blocks = np.clip(last - first + 1, 0, None).sum(-1)
        early = np.clip(np.minimum(last, sink - 1) - first + 1, 0, None).sum(-1)
        return int((blocks - early).max(initial=0)) + sink

    return max(blocks, layout.once(("most near", scope, size, near, sink), most))


def _runs(
    layout: TokenLayout, scope: Scope, take: Callable[[np.ndarray], np.ndarray], size: int, near: int
) -> tuple[np.ndarray, np.ndarray]:
    """(first, last) int32 [B, query blocks, runs], of the queries that ``take`` picks from all tokens."""
    inside = take(layout.of(scope.query)) & (near > 0)
    query_block, kv_position = take(layout.coordinate(scope.query)) // size, take(layout.coordinate(scope.key))
    runs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for b in range(layout.batch_size):
        queries = np.flatnonzero(inside[b] & (kv_position[b] >= 0))
        row, position = query_block[b, queries], kv_position[b, queries]
        first, last = np.maximum(position - (near - 1), 0) // size, position // size
        # Queries are in order, and so are the blocks of their nearest keys: a run ends where the next one begins
        # beyond it, or where the query block ends.
        new = np.ones(len(queries), bool)
        new[1:] = (np.diff(row) > 0) | (first[1:] > last[:-1] + 1)
        begins = np.flatnonzero(new)
        ends = np.append(begins[1:], len(queries))[: len(begins)] - 1
        runs.append((row[begins], first[begins], last[ends]))
    number = [np.arange(len(row)) - np.searchsorted(row, row) for row, _, _ in runs]  # of a run within its block
    shape = layout.batch_size, -(-layout.most(scope.query) // size), 1 + max(int(n.max(initial=0)) for n in number)
    out = np.ones(shape, np.int32), np.zeros(shape, np.int32)
    for b, (row, first, last) in enumerate(runs):
        out[0][b, row, number[b]], out[1][b, row, number[b]] = first, last
    return out
