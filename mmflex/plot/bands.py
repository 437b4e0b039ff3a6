"""Modality bands along the sides of a picture, with ticks at frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.layout import MODALITY_NAMES, TokenLayout
from .style import LATER, MODALITY_COLOURS, MODALITY_HATCHES, swatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 0.028
"""Of the picture."""

_PIXELS = 1200
"""Runs of tokens that a band can show, about one per pixel."""


def runs(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, past the last, value) of every run."""
    edges = np.flatnonzero(np.diff(values)) + 1
    starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(values)]])
    return [(int(a), int(b), int(values[a])) for a, b in zip(starts, ends, strict=True) if b > a]


def coarse_runs(ids: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """`runs`; where there are more than ``most``, of the commonest value in each of so many parts."""
    found = runs(ids)
    if len(found) <= most:
        return found
    edges = np.linspace(0, len(ids), most + 1).astype(int)
    kinds = np.unique(ids)
    count = np.stack([np.add.reduceat((ids == kind).astype(int), edges[:-1]) for kind in kinds])
    return [(int(edges[a]), int(edges[b]), m) for a, b, m in runs(kinds[count.argmax(0)])]


def modality_ids(layout: TokenLayout, row: int) -> np.ndarray:
    """int ``[N]``: modalities of a prompt, -1 for padding."""
    return np.where(layout.valid[row], layout.modality[row], -1)


def modality_swatches(layout: TokenLayout, row: int) -> list[Any]:
    """Legend entries of the modalities that a prompt has."""
    ids = [*layout.modalities, *([-1] if not layout.valid[row].all() else [])]
    return [
        swatch(MODALITY_COLOURS[m], MODALITY_NAMES.get(m, "padding") + " (bands)", MODALITY_HATCHES.get(m)) for m in ids
    ]


def strip(ax: Axes, place: tuple[float, float, float, float], ids: np.ndarray, across: bool) -> Axes:
    """A band of modality ids at ``place`` of the axes, with their limits; -2 stays blank."""
    from matplotlib.collections import PolyCollection

    band = ax.inset_axes(place)
    band.set_facecolor("none")
    band.set_navigate(False)
    found = coarse_runs(ids, _PIXELS)
    for modality in sorted({m for *_, m in found} - {-2}):
        spans = [(a, b) for a, b, m in found if m == modality]
        corners = np.array([[(a, 0), (b, 0), (b, 1), (a, 1)] for a, b in spans], float)
        hatch = MODALITY_HATCHES.get(modality) if len(spans) < 100 else None
        band.add_collection(
            PolyCollection(
                list(corners if across else corners[..., ::-1]),
                facecolors=MODALITY_COLOURS.get(modality, "#000000"),
                hatch=hatch,
                edgecolors=LATER if modality >= 0 else "#9aa5b1",
                linewidths=0,
            ),
            autolim=False,
        )
    if across:
        band.set(xlim=ax.get_xlim(), ylim=(0, 1))
    else:
        band.set(xlim=(0, 1), ylim=ax.get_ylim())
    band.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    for spine in band.spines.values():
        spine.set_visible(False)
    return band


def bands(ax: Axes, layout: TokenLayout, row: int, first_query: int) -> bool:
    """Bands along the top (keys) and the right (queries); returns whether frames are named above."""
    ids = modality_ids(layout, row)
    n = len(ids)
    top = strip(ax, (0.0, 1.012, 1.0, WIDTH), ids, across=True)
    side = strip(ax, (1.012, 0.0, WIDTH, 1.0), ids, across=False)
    frames = frame_starts(layout, row)
    for band, span, first in ((top, n, 0), (side, n - first_query, first_query)):
        every = max(1, -(-len(frames) * n // max(1, span) // 60))
        for at, _ in frames[::every]:
            if at >= first:
                (band.axvline if band is top else band.axhline)(at, color=LATER, linewidth=0.45)
    named = _spaced(frames, n)
    if named:
        top.xaxis.tick_top()
        top.set_xticks([at for at, _ in named], [f"{'frame ' if i == 0 else ''}{f}" for i, (_, f) in enumerate(named)])
        top.tick_params(axis="x", top=True, labeltop=True, length=2, pad=1, labelsize=6.5)
    return bool(named)


def frame_starts(layout: TokenLayout, row: int) -> list[tuple[int, int]]:
    """(token, frame) where a frame of a segment with several begins."""
    frame, segment = layout.frame[row], layout.segment[row]
    at = np.flatnonzero((layout.cell[row] == 0) & (frame >= 0))
    several = {int(s) for s, count in zip(*np.unique(segment[at], return_counts=True), strict=True) if count > 1}
    return [(int(i), int(frame[i])) for i in at if int(segment[i]) in several]


def _spaced(frames: list[tuple[int, int]], n: int, most: int = 7) -> list[tuple[int, int]]:
    """Frames to name: numbers a power of two apart, at most ``most`` of them, none close to another."""
    if not frames:
        return []
    step = 1
    while len([f for _, f in frames if f % step == 0]) > most:
        step *= 2
    out: list[tuple[int, int]] = []
    for at, f in frames:
        if f % step == 0 and (not out or at - out[-1][0] > n / 10):
            out.append((at, f))
    return out
