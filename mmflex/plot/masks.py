"""`plot_mask` and `plot_masks`: what heads compute, in token order."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import raster
from .bands import bands, modality_swatches
from .raster import Raster
from .snapshot import Snapshot, snapshot
from .style import FULL, INK, LATER, PARTIAL, SKIPPED, canvas, limits, rgb, size_in_points, styled, swatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..runtime.plan import Plan

TOKEN_LEVEL = 1 << 20
"""Up to this many pairs of a query and a key ``level="auto"`` draws tokens."""

BLOCK_TONES = ("full blocks", "partial blocks", "skipped")
TOKEN_TONES = ("attended to", "computed, masked", "skipped")


@styled
def plot_mask(
    plan: Plan | Snapshot,
    head: int,
    batch: int = 0,
    level: str = "auto",
    *,
    title: str | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """What one head computes, in token order: queries down, keys to the right.

    Where the plan moved tokens (gathered columns or rows, modality-major or residue-major orders) every computed pair
    is drawn at the tokens it joins; `plot_orders` shows the blocks as the kernel has them.

    Args:
        plan: a plan, or what `load_plan` read.
        level: "token": pairs that are attended to, pairs that are computed but masked, and pairs that are skipped, for
            small N (it holds queries x keys). "block": full, partial and skipped blocks, from the block lists alone, at
            any N; where one pixel stands for many blocks its tone is their share. "auto": tokens up to 1024 x 1024.
        title: instead of the head's pattern and density.
    """
    if level not in ("auto", "token", "block"):
        raise ValueError(f"level is {level!r}: use 'auto', 'token' or 'block'")
    snap = snapshot(plan)
    snap.check(head, batch)
    m, n, row = snap.queries, snap.length, batch % snap.layout.batch_size
    first = snap.query_tokens.first
    if level == "auto":
        level = "token" if m * n <= TOKEN_LEVEL else "block"
    own = ax is None
    figure, ax = canvas(ax, 5.4, 5.8)
    if own:
        figure.subplots_adjust(left=0.13, right=0.93, top=0.81, bottom=0.10)
    if level == "token":
        picture, names = token_picture(snap, head, batch), TOKEN_TONES
    else:
        picture, names = tones(raster.mask_raster(snap, head, batch, pixels_of(ax))), BLOCK_TONES
    ax.imshow(
        picture, extent=(0, n, first + m, first), aspect="equal" if m == n else "auto", interpolation="antialiased"
    )
    limits(ax, range(n), range(first, first + m))
    ax.set(xlabel="key (token)", ylabel="query (token)")
    framed = bands(ax, snap.layout, row, first)
    width, height = size_in_points(ax)
    title = mask_title(snap, head, batch, int(width / 5.1)) if title is None else title
    ax.set_title(title, loc="left", pad=0.04 * height + (17 if framed else 5), fontsize=9.5)
    if legend:
        _legend(ax, names, snap, row)
    return figure


def _legend(ax: Axes, names: Sequence[str], snap: Snapshot, row: int) -> None:
    """Tones and modalities: in the corner that causality leaves empty, or below where queries are a part."""
    handles = [swatch(colour, name) for colour, name in zip((FULL, PARTIAL, SKIPPED), names, strict=True)]
    handles += modality_swatches(snap.layout, row)
    if 2 * snap.queries > snap.length:
        ax.legend(
            handles=handles, loc="upper right", handlelength=1.1, handleheight=1.1, borderaxespad=0.8, fontsize=8,
            labelspacing=0.4, labelcolor=INK, frameon=False,
        )  # fmt: skip
    else:
        below = -40 / size_in_points(ax)[1]
        ax.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, below), ncols=3, borderaxespad=0, handlelength=1.1,
            handleheight=1.1, fontsize=8,
        )  # fmt: skip


def pixels_of(ax: Axes) -> int:
    """Device pixels along a square picture in these axes: one pixel of the raster for each."""
    box = ax.get_window_extent()
    return int(min(max(min(box.width, box.height), 200), raster.PIXELS))


def mask_title(snap: Snapshot, head: int, batch: int, width: int = 60) -> str:
    """Head, pattern, density and blocks, in lines of so many characters."""
    name = textwrap.fill(f"head {head}: {snap.patterns[head]}", width, max_lines=2, placeholder=" …")
    full, partial = snap.counts(head, batch)
    blocks = f"{full:,} full, {partial:,} partial blocks" if full + partial else "dense kernel"
    share = f"{snap.density[batch, head]:.1%} of causal pairs: {blocks}"
    return name + "\n" + textwrap.fill(share, width)


def token_picture(snap: Snapshot, head: int, batch: int) -> np.ndarray:
    """RGB [M, N, 3] at one pixel a pair."""
    m, n = snap.queries, snap.length
    allowed = snap.reader.allowed(head, batch)
    if allowed is None:
        raise ValueError(
            f"this saved plan has no token masks ({m:,} x {n:,} pairs a head; up to {TOKEN_LEVEL:,} are kept): "
            "use level='block', or draw the plan itself"
        )
    computed = raster.mask_raster(snap, head, batch, pixels=max(m, n))
    kind = np.where(allowed, 0, np.where(computed.share > 0, 1, np.where(computed.later, 3, 2)))
    return rgb(FULL, PARTIAL, SKIPPED, LATER)[kind]


def tones(found: Raster) -> np.ndarray:
    """RGB of a raster. A pixel's tone is the share of its pairs that is computed, raised so that thin lines show."""
    full, partial, skipped, later = rgb(FULL, PARTIAL, SKIPPED, LATER)
    share = found.share
    depth = np.where(share > 0, np.maximum(share**0.4, 0.25), 0.0)[..., None]
    whole = (found.full / np.maximum(found.full + found.partial, 1e-9))[..., None]
    ground = np.where(found.later[..., None], later, skipped)
    return ground * (1 - depth) + (full * whole + partial * (1 - whole)) * depth


@styled
def plot_masks(
    plan: Plan | Snapshot,
    heads: Sequence[int],
    batch: int = 0,
    level: str = "auto",
    *,
    titles: Sequence[str] | None = None,
    columns: int = 3,
    ax: Axes | None = None,
) -> Figure:
    """`plot_mask` of several heads side by side, under one legend; ``titles`` instead of patterns and densities."""
    snap = snapshot(plan)
    if not heads:
        raise ValueError("heads is empty: give the numbers of the heads to draw")
    if titles is not None and len(titles) != len(heads):
        raise ValueError(f"there are {len(titles)} titles for {len(heads)} heads: give one for each")
    wide = max(1, min(columns, len(heads)))
    rows = -(-len(heads) // wide)
    figure, host = canvas(ax, 4.6 * wide, 5.15 * rows)
    if ax is None:
        figure.subplots_adjust(left=0.16 / wide, right=1 - 0.06 / wide, top=1 - 0.17 / rows, bottom=0.1 / rows)
    host.axis("off")
    # panels in the host's coordinates, with room for bands and labels between them
    width, height = 1 / (wide + 0.22 * (wide - 1)), 1 / (rows + 0.36 * (rows - 1))
    for i, head in enumerate(heads):
        place = (i % wide * 1.22 * width, 1 - height - i // wide * 1.36 * height, width, height)
        panel = host.inset_axes(place)
        if titles is None:
            room = int(size_in_points(panel)[0] / 5.1)
            name = textwrap.fill(f"head {head}: {snap.patterns[head]}", room, max_lines=2, placeholder=" …")
            title = f"{name}\n{snap.density[batch, head]:.1%} of the causal pairs"
        else:
            title = titles[i]
        plot_mask(snap, head, batch, level, title=title, legend=i == 0, ax=panel)
        if i % wide:
            panel.set_ylabel("")
        if i < len(heads) - wide:
            panel.set_xlabel("")
    return figure
