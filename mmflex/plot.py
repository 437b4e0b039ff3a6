"""Pictures of masks, orders, estimates and heads (needs matplotlib: ``pip install 'mmflex[plot]'``).

Every function returns the matplotlib Figure and takes ``ax=`` to draw into one of yours. Tones differ in lightness as
well as in colour, so they hold in grey and for colour-blind eyes; figures made here are light in any notebook theme.

    plan = mmflex.plan(q, k, spec, layout=layout)
    mmflex.plot.plot_mask(plan, head=3).savefig("mask.png")
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import raster
from .ir.layout import MODALITY_NAMES, TokenLayout
from .ir.pattern import Pattern, Restricted, _Pair
from .raster import Raster

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .compiler.plan import Launch
    from .runtime.attention import Plan
    from .tuning.config import Config

__all__ = ["plot_config", "plot_estimate", "plot_heads", "plot_mask", "plot_masks", "plot_orders", "plot_recall"]

FULL, PARTIAL, SKIPPED, LATER = "#10305c", "#ef9b20", "#e6e9ee", "#ffffff"
"""Tones of blocks, from dark to light; LATER: keys after the query."""

MODALITY_COLOURS = {0: "#5f6770", 1: "#0072b2", 2: "#7cc4ea", 3: "#cc79a7", -1: "#ffffff"}
"""Bands along the axes (-1: padding)."""

FAMILIES = {
    "Dense": ("D", "#3b3b3b"),
    "AShape": ("A", "#56b4e9"),
    "TriShape": ("T", "#0072b2"),
    "VerticalSlash": ("V", "#e69f00"),
    "Grid": ("G", "#009e73"),
    "BlockTopK": ("K", "#f0e442"),
    "QBoundary": ("Q", "#cc79a7"),
    "Boundary2D": ("B", "#8e4585"),
    "Strided": ("S", "#d55e00"),
    "StridedFixed": ("F", "#b08968"),
    "Dilated": ("I", "#9aa5b1"),
}
"""Pattern families: the letter and the colour they have in overviews."""

TOKEN_LEVEL = 1 << 20
"""Up to this many pairs of a query and a key ``level="auto"`` draws tokens."""

_STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#4a4f55",
    "axes.labelcolor": "#22262a",
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.grid": False,
    "text.color": "#22262a",
    "xtick.color": "#4a4f55",
    "ytick.color": "#4a4f55",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.facecolor": "white",
    "font.family": ["DejaVu Sans"],
    "hatch.linewidth": 0.6,
}


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Own, light colours for a figure made here; the caller's style where it gave an ax."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        try:
            import matplotlib
        except ImportError:
            raise ImportError("mmflex.plot draws with matplotlib: pip install 'mmflex[plot]'") from None
        with matplotlib.rc_context({} if kwargs.get("ax") is not None else _STYLE):
            return draw(*args, **kwargs)

    return styled


def _canvas(ax: Axes | None, width: float, height: float) -> tuple[Any, Axes]:
    """(figure, ax): the caller's, or new ones in inches."""
    if ax is not None:
        return ax.figure, ax
    import matplotlib
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height), dpi=120)
    backend = matplotlib.get_backend().lower()
    if "inline" in backend or backend in ("agg", "svg", "pdf"):
        plt.close(figure)  # a notebook shows the returned figure, and not a second time by itself; nothing piles up
    return figure, figure.add_subplot()


# ---- masks ----------------------------------------------------------------------------------------------------------


@_styled
def plot_mask(
    plan: Plan,
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
        level: "token": pairs that are attended to, pairs that are computed but masked, and pairs that are skipped, for
            small N (it holds queries x keys). "block": full, partial and skipped blocks, from the block lists alone, at
            any N; where one pixel stands for many blocks its tone is their share. "auto": tokens up to 1024 x 1024.
        title: instead of the head's pattern and density.
    """
    if level not in ("auto", "token", "block"):
        raise ValueError(f"level is {level!r}: use 'auto', 'token' or 'block'")
    raster.check_head(plan, head, batch)
    m, n = plan.program.queries, plan.layout.length
    if level == "auto":
        level = "token" if m * n <= TOKEN_LEVEL else "block"
    figure, ax = _canvas(ax, 5.4, 5.8)
    if level == "token":
        picture, names = _token_picture(plan, head, batch), ("attended to", "computed, masked", "skipped")
    else:
        found = raster.mask_raster(plan, head, batch, _pixels(ax))
        picture, names = _tones(found), ("full blocks", "partial blocks", "skipped")
    ax.imshow(picture, extent=(0, n, n, n - m), aspect="equal" if m == n else "auto", interpolation="antialiased")
    _axes(ax, range(n), range(n - m, n))
    ax.set(xlabel="key (token)", ylabel="query (token)")
    _bands(ax, plan.layout, batch % plan.layout.batch_size, n - m)
    ax.set_title(_mask_title(plan, head, batch) if title is None else title, loc="left", pad=22, fontsize=9.5)
    if legend:
        _mask_legend(ax, names, plan.layout, batch % plan.layout.batch_size)
    return figure


def _pixels(ax: Axes) -> int:
    """Device pixels along a square picture in these axes: one pixel of the raster for each."""
    box = ax.get_window_extent()
    return int(min(max(min(box.width, box.height), 200), raster.PIXELS))


def _mask_title(plan: Plan, head: int, batch: int) -> str:
    name = textwrap.shorten(f"head {head}: {pattern_of(plan, head)}", 60, placeholder=" …")
    full, partial = raster.head_counts(plan, head, batch)
    blocks = f"{full:,} full, {partial:,} partial" if full + partial else "dense kernel"
    return f"{name}\n{plan.density.heads[batch, head]:.1%} of the causal pairs are in listed blocks: {blocks}"


def _token_picture(plan: Plan, head: int, batch: int) -> np.ndarray:
    """RGB [M, N, 3] at one pixel a pair."""
    m, n = plan.program.queries, plan.layout.length
    allowed = plan.dense_mask()[batch, head].cpu().numpy()
    computed = raster.mask_raster(plan, head, batch, pixels=max(m, n))
    kind = np.where(allowed, 0, np.where(computed.share > 0, 1, np.where(computed.later, 3, 2)))
    return _rgb(FULL, PARTIAL, SKIPPED, LATER)[kind]


def _tones(found: Raster) -> np.ndarray:
    """RGB of a raster. A pixel's tone is the share of its pairs that is computed, raised so that thin lines show."""
    full, partial, skipped, later = _rgb(FULL, PARTIAL, SKIPPED, LATER)
    share = found.share
    depth = np.where(share > 0, np.maximum(share**0.4, 0.25), 0.0)[..., None]
    whole = (found.full / np.maximum(found.full + found.partial, 1e-9))[..., None]
    ground = np.where(found.later[..., None], later, skipped)
    return ground * (1 - depth) + (full * whole + partial * (1 - whole)) * depth


def _rgb(*colours: str) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.array([to_rgb(colour) for colour in colours])


def _mask_legend(ax: Axes, tones: Sequence[str], layout: TokenLayout, row: int) -> None:
    """Tones and modalities, in the corner that causality leaves empty."""
    from matplotlib.patches import Patch

    ids = [*layout.modalities, *([-1] if not layout.valid[row].all() else [])]
    entries = list(zip((FULL, PARTIAL, SKIPPED), tones, strict=True))
    entries += [(MODALITY_COLOURS[m], MODALITY_NAMES.get(m, "padding") + " (bands)") for m in ids]
    handles = [Patch(facecolor=colour, edgecolor="#4a4f55", linewidth=0.4, label=name) for colour, name in entries]
    ax.legend(
        handles=handles, loc="upper right", handlelength=1.1, handleheight=1.1, borderaxespad=0.8, fontsize=8,
        labelspacing=0.4,
    )  # fmt: skip


def _short(value: float, _: Any = None) -> str:
    """16384 -> 16k, 1048576 -> 1M (powers of two as people say them); other numbers as they are."""
    value = round(value)
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit and value % (unit // 4) == 0:
            return f"{value / unit:g}{name}"
    return f"{value:,}"


def _plain(value: float, _: Any = None) -> str:
    return f"{value:g}"


def _axes(ax: Axes, keys: range, rows: range) -> None:
    """Limits of a picture, and a few ticks at round numbers along both sides."""
    for axis, span in ((ax.xaxis, keys), (ax.yaxis, rows)):
        step = 1 << max(0, (len(span) // 3).bit_length() - 1)
        if len(span) < 512:
            step = max(1, round(len(span) / 40) * 10 if len(span) > 40 else len(span) // 4)
        first = -(-span.start // step) * step
        axis.set_ticks(np.arange(first, span.stop + 1, step))
        axis.set_major_formatter(_short)
    ax.set_xlim(keys.start, keys.stop)
    ax.set_ylim(rows.stop, rows.start)


@_styled
def plot_masks(
    plan: Plan,
    heads: Sequence[int],
    batch: int = 0,
    level: str = "auto",
    *,
    titles: Sequence[str] | None = None,
    columns: int = 3,
) -> Figure:
    """`plot_mask` of several heads side by side, under one legend; ``titles`` instead of patterns and densities."""
    if titles is not None and len(titles) != len(heads):
        raise ValueError(f"there are {len(titles)} titles for {len(heads)} heads: give one for each")
    wide = max(1, min(columns, len(heads)))
    rows = -(-len(heads) // wide)
    figure, host = _canvas(None, 4.6 * wide, 5.15 * rows)
    host.remove()
    for i, head in enumerate(heads):
        ax = figure.add_subplot(rows, wide, i + 1)
        if titles is None:
            name = textwrap.fill(f"head {head}: {pattern_of(plan, head)}", 56, max_lines=2, placeholder=" …")
            title = f"{name}\n{plan.density.heads[batch, head]:.1%} of the causal pairs"
        else:
            title = titles[i]
        plot_mask(plan, head, batch, level, title=title, legend=i == 0, ax=ax)
        if i % wide:
            ax.set_ylabel("")
        if i < len(heads) - wide:
            ax.set_xlabel("")
    figure.tight_layout(h_pad=3.4, w_pad=1.6)
    return figure


# ---- modality bands -------------------------------------------------------------------------------------------------


def _runs(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, past the last, value) of every run."""
    edges = np.flatnonzero(np.diff(values)) + 1
    starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(values)]])
    return [(int(a), int(b), int(values[a])) for a, b in zip(starts, ends, strict=True) if b > a]


def _bands(ax: Axes, layout: TokenLayout, row: int, first_query: int) -> None:
    """Modalities along the top (keys) and the right (queries), with ticks at frames."""
    ids = np.where(layout.valid[row], layout.modality[row], -1)
    n = len(ids)
    top = ax.inset_axes((0.0, 1.012, 1.0, 0.028))
    side = ax.inset_axes((1.012, 0.0, 0.028, 1.0))
    _strip(top, ids, across=True)
    _strip(side, ids, across=False)
    top.set_xlim(ax.get_xlim())
    side.set_ylim(ax.get_ylim())
    frames = _frame_starts(layout, row)
    for strip, span, put in ((top, n, "x"), (side, n - first_query, "y")):
        strip.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
        shown = frames[:: max(1, -(-len(frames) * n // max(1, span) // 60))] if len(frames) else frames
        for at, _ in shown:
            if put == "x":
                strip.axvline(at, color="white", linewidth=0.45)
            elif at >= first_query:
                strip.axhline(at, color="white", linewidth=0.45)
        for spine in strip.spines.values():
            spine.set_visible(False)
    named = _spaced(frames, n)
    if named:
        top.xaxis.tick_top()
        top.set_xticks([at for at, _ in named], [f"{'frame ' if i == 0 else ''}{f}" for i, (_, f) in enumerate(named)])
        top.tick_params(axis="x", top=True, labeltop=True, length=2, pad=1, labelsize=6.5)


def _strip(ax: Axes, ids: np.ndarray, across: bool) -> None:
    ax.set_facecolor("none")
    runs = _runs(ids)
    if len(runs) > 2000:  # more than there are pixels: one image
        ids = ids[:: max(1, len(ids) // 2000)]
        runs = [(int(a), int(b), m) for a, b, m in _runs(ids)]
    for first, last, modality in runs:
        put = ax.axvspan if across else ax.axhspan
        put(first, last, facecolor=MODALITY_COLOURS.get(modality, "#000000"), edgecolor="none")


def _frame_starts(layout: TokenLayout, row: int) -> list[tuple[int, int]]:
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


# ---- orders ---------------------------------------------------------------------------------------------------------


@_styled
def plot_orders(plan: Plan, head: int, batch: int = 0, *, ax: Axes | None = None) -> Figure:
    """One head before and after its permutation: in token order on the left, then every launch as its kernel has it,
    with the section of gathered columns apart. Bands show which modality stands in a slot."""
    raster.check_head(plan, head, batch)
    launches = [(n, p) for n, p in raster.launches_of(plan, head) if plan.program.launches[n].kind != "dense"]
    panels = 1 + max(1, len(launches))
    figure, host = _canvas(ax, 5.2 * panels, 5.9)
    if ax is None:
        figure.subplots_adjust(left=0.32 / panels / 2, right=1 - 0.08 / panels, bottom=0.12, top=0.77)
    host.axis("off")
    gap = 0.28 / panels
    width = (1 - gap * (panels - 1)) / panels
    places = [host.inset_axes((i * (width + gap), 0.0, width, 1.0)) for i in range(panels)]
    plot_mask(plan, head, batch, "block", title="token order\nevery computed pair at its tokens", ax=places[0])
    if not launches:
        places[1].axis("off")
        places[1].text(0.5, 0.5, "runs dense:\nno order is changed", ha="center", va="center")
    for panel, (number, place) in zip(places[1:], launches, strict=False):
        _launch_panel(panel, plan, head, number, place, batch)
    host.set_title(_mask_title(plan, head, batch), loc="left", pad=66, fontsize=11)
    return figure


def _launch_panel(ax: Axes, plan: Plan, head: int, number: int, place: int, batch: int) -> None:
    launch, tile = plan.program.launches[number], plan.program.tile
    main, own = raster.launch_raster(plan, head, number, batch, _pixels(ax))
    slots = raster.slot_tokens(plan, number, place, batch)
    layout_row = batch % plan.layout.batch_size
    modality = np.append(plan.layout.modality[layout_row], -1)
    origin = plan.layout.length - plan.program.queries
    of_rows = modality[np.where(slots.rows >= 0, slots.rows + origin, -1)]  # the last entry stands for nothing
    main_slots, own_slots = raster.section_slots(plan, head, number)
    ax.axis("off")
    share = 0.0 if own is None else min(0.4, max(0.12, len(own_slots or ()) / (main_slots.stop + len(own_slots or ()))))
    parts = [(main, main_slots, 0.0, 1.0 - share - (0.04 if own else 0.0), _key_label(launch))]
    if own is not None and own_slots is not None:
        parts.append((own, own_slots, 1.0 - share, share, "gathered\ncolumns"))
    for i, (found, span, left, width, name) in enumerate(parts):
        box = ax.inset_axes((left, 0.0, width, 1.0))
        box.imshow(_tones(found), extent=(0, len(span), launch.row_slots, 0), aspect="auto", interpolation="nearest")
        box.set_xlabel(name)
        _axes(box, range(len(span)), range(launch.row_slots))
        if i:
            box.set_xticks([0, len(span)])
        top = box.inset_axes((0.0, 1.012, 1.0, 0.028), sharex=box)
        _strip(top, modality[slots.keys[span.start : span.stop]], True)
        if i == 0:
            box.set_ylabel(_row_label(launch))
        else:
            box.tick_params(left=False, labelleft=False)
        strips = [top]
        if i == len(parts) - 1:
            side = box.inset_axes((1 + 0.012 / width, 0.0, 0.028 / width, 1.0), sharey=box)
            _strip(side, of_rows, False)
            strips.append(side)
        for strip in strips:
            strip.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
            for spine in strip.spines.values():
                spine.set_visible(False)
    full, partial = (round(sum(getattr(r, f).sum() for r in (main, own) if r is not None)) for f in ("full", "partial"))
    ax.set_title(
        f"launch {number}: {launch.label}\n{full // tile**2:,} full, {partial // tile**2:,} partial blocks",
        loc="left",
        pad=22,
        fontsize=9.5,
    )


def _key_label(launch: Launch) -> str:
    return "key slot, by residue" if launch.kind == "classes" else f"key slot, {launch.keys.label} order"


def _row_label(launch: Launch) -> str:
    if launch.kind == "main":
        return "query slot" + ("" if launch.rows.label == "natural" else f", {launch.rows.label}")
    return "query slot, by residue" if launch.kind == "classes" else "gathered query slot"


# ---- estimates ------------------------------------------------------------------------------------------------------


@_styled
def plot_estimate(plan: Plan, head: int, batch: int = 0, *, ax: Axes | None = None) -> Figure:
    """What a head's patterns selected from, and what they selected: the attention of the last queries per key, per
    distance and, where there is a stride, per phase; or pooled block scores.

    Raises:
        ValueError: the head's pattern estimates nothing (windows and sinks, or everything given as numbers).
    """
    raster.check_head(plan, head, batch)
    leaves = [
        (name, leaf) for name, leaf in plan.program.leaves.items() if head in leaf.heads and _estimate(plan, leaf)
    ]
    if not leaves:
        ran = f" ({plan.note})" if plan.note else ""
        raise ValueError(
            f"head {head} estimates nothing: {pattern_of(plan, head)}{ran}; "
            "try a pattern that selects, such as VerticalSlash"
        )
    figure, host = _canvas(ax, 11.0, 0.9 + 2.5 * len(leaves))
    if ax is None:
        figure.subplots_adjust(left=0.06, right=0.985, bottom=0.2 / len(leaves) + 0.02, top=1 - 0.26 / len(leaves))
    host.axis("off")
    height = (1.0 - 0.42 * (len(leaves) - 1) / len(leaves)) / len(leaves)
    for i, (name, leaf) in enumerate(leaves):
        bottom = 1.0 - height - i * (1.0 - height) / max(1, len(leaves) - 1) if len(leaves) > 1 else 0.0
        result, places = _estimate(plan, leaf)
        place = places[head]
        found = {
            key.split("@", 1)[0]: table[batch, leaf.heads.index(head)].cpu()
            for key, table in plan.state.found.items()
            if key.split("@", 1)[1] == name
        }
        where = f", {str(leaf.scope).replace('>', ' queries on ')} keys" if str(leaf.scope) else ""
        label = textwrap.shorten(f"head {head}: {leaf.pattern}{where}", 120, placeholder=" …")
        if hasattr(result, "scores"):
            scores = result.scores(slice(None))[batch, place].cpu()
            _pooled_panel(host, bottom, height, scores, found, label)
        else:
            _mass_panels(
                host, bottom, height, result, batch, place, found, label, int(getattr(leaf.pattern, "last_q", 0))
            )
    return figure


def _estimate(plan: Plan, leaf: Any) -> Any:
    return plan.state.estimates.get((leaf.pattern.estimator(), leaf.scope))


def _mass_panels(
    host: Axes,
    bottom: float,
    height: float,
    mass: Any,
    batch: int,
    place: int,
    found: Mapping[str, Any],
    label: str,
    last: int,
) -> None:
    vertical, diagonal = (t[batch, place].float().cpu().numpy() for t in (mass.vertical, mass.diagonal))
    total = max(float(vertical.sum()), 1e-30)
    stride = int(found["stride"]) if "stride" in found else None
    panels = 3 if stride else 2
    gap = 0.075
    width = (1 - gap * (panels - 1)) / panels
    axes = [host.inset_axes((i * (width + gap), bottom, width, height)) for i in range(panels)]
    unit = f"mass of the last {last} queries (%)" if last else "attention mass (%)"
    columns = found.get("columns")
    _mass(axes[0], 100 * vertical / total, "key", unit)
    if columns is not None:
        kept = np.flatnonzero(columns.numpy())
        _rug(axes[0], kept)
        held = vertical[kept].sum() / total
        axes[0].set_title(f"per key: {len(kept):,} columns selected, {held:.1%} of the mass", loc="left", fontsize=8.5)
    elif stride:
        kept = np.arange(int(found["phase"]), len(vertical), stride)
        _rug(axes[0], kept)
        share = vertical[kept].sum() / total
        axes[0].set_title(
            f"per key: phase {int(found['phase'])} mod {stride}, {share:.1%} of it", loc="left", fontsize=8.5
        )
    _mass(axes[1], 100 * diagonal / total, "distance from query to key", "mass (%)")
    if "diagonals" in found:
        tile = mass.view.tile
        kept = np.flatnonzero(found["diagonals"].numpy())
        spans = [(a * tile, (b - a) * tile) for a, b in _steps(kept)]
        bottom_, top = axes[1].get_ylim()
        axes[1].broken_barh(spans, (bottom_, top - bottom_), facecolor=PARTIAL, alpha=0.35, zorder=0, label="selected")
        axes[1].set_ylim(bottom_, top)
        axes[1].legend(loc="upper right")
        axes[1].set_title(f"per distance: {len(kept)} block diagonals selected", loc="left", fontsize=8.5)
    else:
        axes[1].set_title("per distance", loc="left", fontsize=8.5)
    if stride:
        phase = int(found["phase"])
        fold = np.bincount(np.arange(len(vertical)) % stride, vertical, minlength=stride) * 100 / total
        axes[2].fill_between(np.arange(stride), fold, step="mid", color=FULL, linewidth=0)
        axes[2].plot(
            [phase], [fold[phase]], marker="v", color=PARTIAL, markeredgecolor="black", markersize=8, clip_on=False
        )
        axes[2].set(xlabel=f"phase (key mod {stride})", ylabel="mass (%)", xlim=(0, stride), ylim=(0, None))
        axes[2].set_title(f"per phase of stride {stride}: {phase} selected", loc="left", fontsize=8.5)
    axes[0].annotate(label, (0, 1), (0, 20), xycoords="axes fraction", textcoords="offset points", fontsize=10)


def _steps(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Runs of consecutive numbers as (first, past the last)."""
    if not len(numbers):
        return []
    cut = np.flatnonzero(np.diff(numbers) > 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, cut)]


def _mass(ax: Axes, value: np.ndarray, label: str, unit: str, bins: int = 1200) -> None:
    """Mass per token on a log scale; per bin the heaviest token where there are more tokens than pixels."""
    n = len(value)
    edges = np.unique(np.linspace(0, n, min(n, bins) + 1).astype(int))
    top = np.maximum.reduceat(value, edges[:-1]) if n else value
    positive = top[top > 0]
    floor = max(float(np.quantile(positive, 0.02)) / 3 if len(positive) else 1e-6, float(top.max(initial=0)) * 1e-6)
    ax.fill_between(edges[:-1], np.maximum(top, floor), floor, step="post", color=FULL, linewidth=0)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(_plain)
    ax.yaxis.set_minor_formatter(_plain if float(top.max(initial=0)) < 8 * floor else lambda value, _: "")
    ax.set_ylim(floor, max(floor * 10, float(top.max(initial=0)) * 2))
    ax.set_xlim(0, n)
    step = 1 << max(0, (n // 3).bit_length() - 1)
    ax.set_xticks(np.arange(0, n + 1, step))
    ax.xaxis.set_major_formatter(_short)
    ax.set_xlabel(f"{label} (token{', heaviest of ' + str(-(-n // bins)) if n > bins else ''})")
    ax.set_ylabel(unit)


def _rug(ax: Axes, at: np.ndarray) -> None:
    """Selected tokens as ticks along the top."""
    from matplotlib.transforms import blended_transform_factory

    mixed = blended_transform_factory(ax.transData, ax.transAxes)
    ax.vlines(at, 0.93, 1.0, transform=mixed, color=PARTIAL, linewidth=0.7 if len(at) < 400 else 0.3, label="selected")
    ax.legend(loc="upper right", bbox_to_anchor=(1.0, 0.94))


def _pooled_panel(
    host: Axes, bottom: float, height: float, score: torch.Tensor, found: Mapping[str, torch.Tensor], label: str
) -> None:
    axes = [host.inset_axes((x, bottom, 0.44, height)) for x in (0.0, 0.56)]
    seen = score > float("-inf")
    values = np.where(seen.numpy(), score.numpy(), np.nan)
    image = axes[0].imshow(values, cmap="cividis", aspect="auto", interpolation="nearest")
    host.figure.colorbar(image, ax=axes[0], label="pooled score", shrink=0.9)
    chosen = found["blocks"].numpy()
    kind = np.where(~seen.numpy(), 2, np.where(chosen, 0, 1))
    axes[1].imshow(_rgb(FULL, SKIPPED, LATER)[kind], aspect="auto", interpolation="nearest")
    axes[1].set_title(f"selected: {int(chosen.sum()):,} of {int(seen.sum()):,} blocks (dark)", loc="left", fontsize=8.5)
    for ax in axes:
        ax.set(xlabel="key block", ylabel="query block")
    axes[0].annotate(label, (0, 1), (0, 20), xycoords="axes fraction", textcoords="offset points", fontsize=10)


# ---- heads ----------------------------------------------------------------------------------------------------------


def family(pattern: Pattern) -> str:
    """A pattern's family: its class, that of what a restriction restricts, or the families that a composition joins."""
    if isinstance(pattern, Restricted):
        inner = (getattr(pattern, field.name) for field in dataclasses.fields(pattern))
        return family(next(value for value in inner if isinstance(value, Pattern)))
    if isinstance(pattern, _Pair):
        left, right = family(pattern.left), family(pattern.right)
        return left if left == right else f"{left} {pattern.sign} {right}"
    return type(pattern).__name__


def look(name: str, known: Sequence[str] = ()) -> tuple[str, str]:
    """(letters, colour) of a family; compositions have the letters of their parts and a colour of their own."""
    if name in FAMILIES:
        return FAMILIES[name]
    letters = "".join(FAMILIES[part][0] if part in FAMILIES else part[:2] for part in name.split())
    others = [n for n in known if n not in FAMILIES]
    spare = ("#7f3c8d", "#11a579", "#3969ac", "#f2b701", "#80ba5a", "#e68310")
    return letters, spare[others.index(name) % len(spare)] if name in others else spare[0]


def pattern_of(plan: Plan, head: int) -> Pattern:
    """The pattern that a plan runs for a head (`Dense` where the cost model decided so)."""
    return next(group.pattern for group in plan.program.groups if head in group.heads)


@_styled
def plot_heads(plan: Plan, batch: int = 0, *, ax: Axes | None = None) -> Figure:
    """The heads of a plan: family as colour and letter, density (computed over causal pairs); a row per KV head."""
    raster.check_head(plan, 0, batch)
    heads, kv_heads = plan.program.heads, plan.program.kv_heads
    wide = heads // kv_heads
    if wide < 4 and heads > 4:  # many KV heads: fill rows of eight instead
        wide = 8
    names = [family(pattern_of(plan, h)) for h in range(heads)]
    density = plan.density.heads[batch]
    rows = -(-heads // wide)
    figure, ax = _canvas(ax, 1.1 + 0.95 * wide, 1.1 + 0.8 * rows)
    known = list(dict.fromkeys(names))
    for h, name in enumerate(names):
        x, y = h % wide, h // wide
        letters, colour = look(name, known)
        _cell(ax, x, y, colour)
        ink = _ink(colour)
        ax.text(x + 0.07, y + 0.22, f"{h}", fontsize=6.5, color=ink, va="center")
        ax.text(x + 0.5, y + 0.45, letters, fontsize=11, weight="bold", color=ink, ha="center", va="center")
        ax.text(x + 0.5, y + 0.78, f"{density[h]:.1%}", fontsize=7.5, color=ink, ha="center", va="center")
    ax.set(xlim=(0, wide), ylim=(rows, 0), xticks=[])
    by_kv = wide == heads // kv_heads
    ax.set_yticks(np.arange(rows) + 0.5, [f"KV {i}" if by_kv else f"{i * wide}–" for i in range(rows)])
    _frameless(ax)
    ax.set_title(f"{heads} heads, {density.mean():.1%} of the causal pairs computed", loc="left")
    _family_legend(ax, names, known)
    return figure


@_styled
def plot_config(config: Config, *, ax: Axes | None = None) -> Figure:
    """The pattern family of every head of a model: layers down, heads to the right. Hatched layers keep the model's own
    attention."""
    named = {layer: [family(p) for p in patterns] for layer, patterns in config.patterns.items()}
    names = [name for row in named.values() for name in row]
    known = list(dict.fromkeys(names))
    figure, ax = _canvas(ax, 1.4 + 0.24 * config.heads + 1.6, 1.5 + 0.24 * config.layers)
    for layer in range(config.layers):
        if layer not in named:
            ax.axhspan(layer, layer + 1, facecolor="#f4f4f4", edgecolor="#b8bec6", hatch="////", linewidth=0)
        for head, name in enumerate(named.get(layer, [])):
            letters, colour = look(name, known)
            _cell(ax, head, layer, colour)
            ax.text(
                head + 0.5, layer + 0.52, letters, fontsize=6.5 if len(letters) == 1 else 4.5, color=_ink(colour),
                ha="center", va="center",
            )  # fmt: skip
    for side, count, label in (("x", config.heads, "head"), ("y", config.layers, "layer")):
        step = 1 if count <= 16 else 4
        getattr(ax, f"set_{side}ticks")(np.arange(0, count, step) + 0.5, [str(i) for i in range(0, count, step)])
        getattr(ax, f"set_{side}label")(label)
    ax.set(xlim=(0, config.heads), ylim=(config.layers, 0))
    _frameless(ax)
    ax.set_title(f"{config.model or 'config'}: {config.layers} layers x {config.heads} heads", loc="left")
    _family_legend(ax, names, known, config.layers - len(named))
    return figure


def _cell(ax: Axes, x: float, y: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, facecolor=colour, edgecolor="none"))


def _frameless(ax: Axes) -> None:
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _ink(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = _rgb(colour)[0]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _family_legend(ax: Axes, names: Sequence[str], known: Sequence[str], own: int = 0) -> None:
    from matplotlib.patches import Patch

    handles = []
    for name in known:
        letters, colour = look(name, known)
        handles.append(Patch(facecolor=colour, label=f"{letters}  {name} ({names.count(name)})"))
    if own:
        handles.append(
            Patch(
                facecolor="#f4f4f4",
                edgecolor="#b8bec6",
                hatch="////",
                label=f"own attention ({own} layer{'s' * (own > 1)})",
            )
        )
    height = max(1.0, ax.get_window_extent().height / ax.figure.dpi)
    ax.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.0, -(0.5 if ax.get_xlabel() else 0.25) / height),
        ncols=min(3, len(handles)), borderaxespad=0, handlelength=1.1, handleheight=1.1,
    )  # fmt: skip


# ---- recall ---------------------------------------------------------------------------------------------------------


def attention_recall(q: torch.Tensor, k: torch.Tensor, plan: Plan, rows: int = 256) -> np.ndarray:
    """float [B, Hq]: the share of softmax attention that a plan keeps, over evenly spaced queries (and the last)."""
    m, n = q.shape[2], k.shape[2]
    at = torch.linspace(0, m - 1, min(rows, m)).round().long().unique()
    kept = raster.allowed_rows(plan, at)
    position = torch.as_tensor(plan.layout.position)
    own = position[:, n - m :][:, at]
    causal = (own[:, None, :, None] >= position[:, None, None]) & (position >= 0)[:, None, None]
    group = q.shape[1] // k.shape[1]
    out = np.zeros((q.shape[0], q.shape[1]))
    for h in range(q.shape[1]):
        scores = (q[:, h, at.to(q.device)].float() @ k[:, h // group].float().mT * plan.scale).cpu()
        weights = scores.masked_fill(~causal[:, 0], float("-inf")).softmax(-1).nan_to_num(0.0)
        out[:, h] = (weights * kept[:, h]).sum((-1, -2)) / weights.sum((-1, -2)).clamp(min=1e-30)
    return out


@_styled
def plot_recall(
    q: torch.Tensor,
    k: torch.Tensor,
    patterns: Mapping[str, Sequence[Pattern]] | Sequence[Pattern],
    *,
    layout: TokenLayout | None = None,
    scale: float | None = None,
    rows: int = 256,
    ax: Axes | None = None,
) -> Figure:
    """Recall against density of several patterns on the same q ``[B, Hq, M, D]`` and k ``[B, Hkv, N, D]``.

    Args:
        patterns: ``{"vertical-slash": [VerticalSlash(100, 512), VerticalSlash(1000, 2048)], ...}``, a curve for each;
            or a list of patterns, a curve for each family.
        rows: queries at which recall is measured, evenly spaced.
    """
    from .runtime.attention import plan as make_plan

    if not isinstance(patterns, Mapping):
        curves: dict[str, list[Pattern]] = {}
        for p in patterns:
            curves.setdefault(family(p), []).append(p)
    else:
        curves = {name: list(found) for name, found in patterns.items()}
    if not any(curves.values()):
        raise ValueError("patterns is empty: give at least one pattern, such as [VerticalSlash(1000, 2048)]")
    figure, ax = _canvas(ax, 6.0, 4.2)
    lowest = 1.0
    for i, (name, found) in enumerate(curves.items()):
        points = []
        for pattern in found:
            made = make_plan(q, k, pattern, layout=layout, scale=scale, backend="reference")
            points.append((made.density.total, float(attention_recall(q, k, made, rows).mean())))
        points.sort()
        lowest = min(lowest, points[0][0])
        colour = FAMILIES[family(found[0])][1] if family(found[0]) in FAMILIES else f"C{i}"
        x, y = (100 * np.array(v) for v in zip(*points, strict=True))
        ax.plot(x, y, marker="osD^vPX*"[i % 8], color=colour, linestyle=("-", "--", "-.", ":")[i % 4], label=name,
                markeredgecolor="black", markeredgewidth=0.5)  # fmt: skip
    ax.plot([100], [100], marker="+", color="black", linestyle="none", markersize=10, label="dense")
    ax.set_xscale("log")
    ax.set(xlabel="density (% of causal pairs computed)", ylabel="recall (% of attention kept)", ylim=(None, 102))
    ax.set_xlim(max(0.01, 70 * lowest), 130)
    for format_ticks in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        format_ticks(_plain)
    ax.grid(True, which="both", color="#d9dde2", linewidth=0.5)
    ax.set_title(f"{q.shape[1]} heads, {k.shape[2]:,} tokens", loc="left")
    ax.legend(loc="lower right")
    return figure
