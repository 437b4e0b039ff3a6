"""Pictures in text, for terminals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import raster
from .snapshot import Snapshot, snapshot

if TYPE_CHECKING:
    from ..runtime.plan import Plan

UNICODE = "█▒░· "
"""Mostly in full blocks, computed, lines, skipped, after the query."""

ASCII = "#+:. "
"""The same where a terminal has no more than that."""


def mask_text(
    plan: Plan | Snapshot, head: int, batch: int = 0, *, width: int = 64, characters: str = UNICODE
) -> list[str]:
    """One head in text, ``width`` characters wide and about half as many lines (a character is twice as high as wide).

    Queries down, keys to the right. A character is of the first tone where at least half of its pairs are in full
    blocks, of the second where an eighth is computed, of the third where anything is, of the fourth where nothing is.
    """
    snap = snapshot(plan)
    snap.check(head, batch)
    width = max(1, min(width, snap.length))
    lines = max(1, round(width * snap.queries / max(snap.length, 1) / 2))
    found = raster.mask_raster(snap, head, batch, pixels=width, rows=lines)
    # of the pairs that causality leaves: half a square on the diagonal
    causal = np.maximum(_causal(snap, *found.pairs.shape), 1)
    computed = found.full + found.partial
    kind = np.select([found.later, found.full >= causal / 2, computed >= causal / 8, computed > 0], [4, 0, 1, 2], 3)
    return ["".join(characters[i] for i in row) for row in kind]


def _causal(snap: Snapshot, height: int, width: int) -> np.ndarray:
    """Pairs with the key at or before the query, about, per pixel."""
    m, n = snap.queries, snap.length
    last = n - m + (np.arange(height) + 0.5) / height * m
    first, size = np.arange(width) / width * n, n / max(width, 1)
    return np.clip((last[:, None] - first) / size, 0, 1) * size * (m / max(height, 1))


def side_by_side(pictures: list[list[str]], gap: int = 3) -> list[str]:
    """Blocks of lines next to each other."""
    heights, widths = [len(p) for p in pictures], [max(map(len, p), default=0) for p in pictures]
    return [
        (" " * gap).join((p[i] if i < len(p) else "").ljust(w) for p, w in zip(pictures, widths, strict=True)).rstrip()
        for i in range(max(heights, default=0))
    ]
