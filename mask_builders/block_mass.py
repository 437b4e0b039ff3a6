"""What estimators of whole blocks have in common: where tokens stand in blocks, and the heaviest blocks of every
row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from mmflex.ir.pattern import View
from mmflex.runtime.kernels.listing import device_of
from mmflex.runtime.kernels.rows import take_rows

from .shares import Shortlist


@dataclass(frozen=True)
class BlockMass:
    """The heaviest key blocks of every query block.

    Attributes:
        listed: over rows of query blocks [B, H, rows].
        skipped: query blocks before the first row (they hold no query of this chunk of the prompt).
        keys: key blocks.
    """

    listed: Shortlist
    skipped: int
    keys: int

    def table(self, kept: Tensor) -> Tensor:
        """bool [B, H, query blocks, key blocks] from ``kept`` bool like the list."""
        out = self.listed.spread(kept, self.keys)
        return pad(out, (0, 0, self.skipped, 0)) if self.skipped else out

    def scores(self, rows: slice) -> Tensor:
        """float32 [B, H, query blocks, key blocks]: the mass of the listed blocks, -inf elsewhere."""
        mass = self.listed.mass.masked_fill(self.listed.mass < 0, float("-inf"))
        out = mass.new_full((*mass.shape[:-1], self.keys), float("-inf"))
        out = out.scatter_reduce(-1, self.listed.index, mass, "amax")
        return pad(out, (0, 0, self.skipped, 0), value=float("-inf"))[:, :, rows]


@dataclass(frozen=True, eq=False)
class Arranged:
    """Tokens in scope by their place in blocks, host data; -1 for none.

    Attributes:
        queries: int [B, query blocks x block size], from the first query block with a query on.
        keys: int [B, key blocks x block size], every run of ``stride`` reversed (a stride of 1: in order).
        reach: int [B, query blocks x block size / stride], the last run of keys that a run of queries reaches.
        block_reach: int [B, query blocks], likewise in blocks.
        skipped: query blocks before those.
    """

    queries: np.ndarray
    keys: np.ndarray
    reach: np.ndarray
    block_reach: np.ndarray
    skipped: int


def arranged(view: View, stride: int, size: int) -> Arranged:
    """The queries and keys of a scope in blocks of ``size`` and runs of ``stride`` tokens."""
    layout, scope, take = view.layout, view.scope, view.queries.take

    def build() -> Arranged:
        inside, row = take(layout.of(scope.query)), take(layout.coordinate(scope.query))
        place = take(layout.coordinate(scope.key))
        skipped = int(row[inside].min(initial=view.rows - 1)) // size
        row = row - skipped * size
        slots = (-(-view.rows // size) - skipped) * size
        queries = np.full((layout.batch_size, slots), -1)
        keys = np.full((layout.batch_size, -(-view.size // size) * size), -1)
        reach = np.full((layout.batch_size, slots // stride), -1)
        for b in range(layout.batch_size):
            query = np.flatnonzero(inside[b])
            queries[b, row[b, query]] = query
            np.maximum.at(reach[b], row[b, query] // stride, place[b, query] // stride)
            key = np.flatnonzero(layout.of(scope.key)[b])
            number = np.arange(len(key))
            keys[b, number - number % stride + stride - 1 - number % stride] = key
        per = size // stride
        block_reach = reach.reshape(len(reach), -1, per).max(-1) // per
        return Arranged(queries, keys, reach, block_reach, skipped)

    return layout.once(("arranged", scope, view.queries, stride, size), build)


def finite_rows(t: Tensor, index: Tensor) -> Tensor:
    """As `take_rows`, what is not finite as zero; in float32 where a product of halves cannot give it."""
    rows = take_rows(t, index, finite=True)
    return rows if device_of(t).type == "cuda" else rows.float()
