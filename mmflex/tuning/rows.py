"""On which query rows the error of a pattern is measured, and how much each of them counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..ir.layout import TokenLayout

LAST_QUERIES = 64
"""Queries that patterns are estimated from: the least that a sample may have."""


@dataclass(frozen=True)
class Rows:
    """Sampled query rows. The error of a head on row r needs dense attention of that row alone, so a few hundred rows
    tell what all of them would.

    Attributes:
        count: rows of every query modality, one at a random place in each of so many equal stretches of it; None: all.
        last: the last rows of the prompt are measured as well: that is where the question stands. A whole tile of them,
            because a pattern may serve the rows of a tile unalike: the last 64 are the second half of one at many
            lengths.
        even: every query modality and the last rows count alike, however many tokens they have; else every token
            counts alike, and the last ones no more than others.
        seed: of the random places.
    """

    count: int | None = 512
    last: int = 128
    even: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.count is not None and self.count < 1) or self.last < 0:
            raise ValueError(
                f"Rows(count={self.count}, last={self.last}): use a count of 1 or more (None: all), last >= 0"
            )

    def groups(self, layout: TokenLayout, importance: Tensor | None = None) -> tuple[Group, ...]:
        """The sampled rows of the (one) prompt of a layout, by query modality.

        Args:
            importance: float [H, N]; the rows where the heads have the most of it, up to ``count`` in all, are measured
                besides, and the random ones stand for the rest.
        """
        generator = np.random.default_rng(self.seed)
        tail = np.zeros(layout.length, bool)
        there = np.flatnonzero(layout.valid[0])
        tail[there[max(0, len(there) - self.last) :]] = True
        top = np.zeros(layout.length, bool)
        if importance is not None and self.count is not None:
            most = (importance / importance.sum(1, keepdim=True).clamp(min=1e-30)).sum(0)
            top[most.topk(min(self.count, len(most))).indices.cpu().numpy()] = True
        found = []
        for m in layout.modalities:
            every = np.flatnonzero(layout.of(m)[0])
            first, own = every[top[every]], every[~top[every]]
            picked = own
            if self.count is not None and self.count < len(own):
                places = (np.arange(self.count) + generator.random(self.count)) * len(own) / self.count
                picked = own[np.unique(np.minimum(places.astype(np.int64), len(own) - 1))]
            rows = np.union1d(np.union1d(picked, every[tail[every]]), first)
            share = np.isin(rows, picked) * (len(own) / max(1, len(picked))) + np.isin(rows, first)
            found.append((m, rows, share))
        if not self.even:
            return tuple(Group(m, rows, share[None], share) for m, rows, share in found)
        out = []
        for i, (m, rows, share) in enumerate(found):
            strata = np.zeros((len(found) + (self.last > 0), len(rows)))
            strata[i] = share
            if self.last:
                strata[-1] = tail[rows]
            out.append(Group(m, rows, strata, share))
        return tuple(out)


@dataclass(frozen=True, eq=False)
class Group:
    """Sampled rows of one query modality.

    Attributes:
        modality: its id.
        rows: int64 [R], token numbers, ascending.
        share: float64 [strata, R], how many tokens of each stratum a row stands for.
        tokens: float64 [R], how many of all.
    """

    modality: int
    rows: np.ndarray
    share: np.ndarray
    tokens: np.ndarray
