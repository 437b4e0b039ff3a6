"""`plot_estimate`: what a head's patterns selected from, and what they selected."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..ir.pattern import Pattern
from .snapshot import snapshot
from .style import FULL, INK, LATER, PARTIAL, SKIPPED, bar_colour, canvas, plain, rgb, short, styled, swatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..runtime.plan import Plan


@styled
def plot_estimate(plan: Plan, head: int, batch: int = 0, *, ax: Axes | None = None) -> Figure:
    """What a head's patterns selected from, and what they selected: the attention of the last queries per key, per
    distance and, where there is a stride, per phase; or pooled block scores. A row of panels for each pattern.

    Raises:
        ValueError: the head's pattern estimates nothing (windows and sinks, or everything given as numbers); a saved
            plan, which holds no estimates.
    """
    snap = snapshot(plan)
    snap.check(head, batch)
    live = snap.live
    if live is None:
        raise ValueError("a saved plan holds no estimates: call plot_estimate on the plan itself")
    mine = [(name, leaf) for name, leaf in live.program.leaves.items() if head in leaf.heads]
    leaves = [(name, leaf) for name, leaf in mine if _drawable(_estimate(live, leaf))]
    if not leaves:
        ran = f" ({snap.note})" if snap.note else ""
        raise ValueError(
            f"head {head} estimates nothing: {snap.patterns[head]}{ran}; "
            "try a pattern that selects, such as VerticalSlash"
        )
    count = len(leaves)
    figure, host = canvas(ax, 11.0, 0.4 + 2.9 * count)
    if ax is None:
        whole = 0.4 + 2.9 * count
        figure.subplots_adjust(left=0.07, right=0.985, bottom=0.55 / whole, top=1 - 0.62 / whole)
    host.axis("off")
    height = 1.0 / (1 + 1.58 * (count - 1))
    for i, (name, leaf) in enumerate(leaves):
        bottom = 1.0 - height - i * 1.58 * height
        result, places = _estimate(live, leaf)
        found = {
            key.split("@", 1)[0]: table[batch, leaf.heads.index(head)].cpu()
            for key, table in live.selections.items()
            if key.split("@", 1)[1] == name
        }
        where = f", {str(leaf.scope).replace('>', ' queries on ')} keys" if str(leaf.scope) else ""
        label = textwrap.shorten(f"head {head}: {leaf.pattern}{where}", 120, placeholder=" …")
        if hasattr(result, "scores"):
            scores = result.scores(slice(None))[batch, places[head]].float().cpu()
            first = _pooled_panels(host, bottom, height, scores, found)
        else:
            first = _mass_panels(host, bottom, height, result, batch, places[head], found, leaf.pattern)
        first.annotate(label, (0, 1), (0, 20), xycoords="axes fraction", textcoords="offset points", fontsize=10)
    return figure


def _estimate(plan: Plan, leaf: Any) -> Any:
    return plan.state.estimates.get((leaf.pattern.estimator(), leaf.scope))


def _drawable(estimate: Any) -> bool:
    """(an estimate, place of each head) of attention mass or of block scores."""
    return estimate is not None and (hasattr(estimate[0], "scores") or hasattr(estimate[0], "block_diagonals"))


# ---- attention of the last queries -----------------------------------------------------------------------------------


def _mass_panels(
    host: Axes,
    bottom: float,
    height: float,
    mass: Any,
    batch: int,
    place: int,
    found: Mapping[str, Any],
    pattern: Pattern,
) -> Axes:
    """Panels per key, per distance and, where there is a stride, per phase."""
    last = int(getattr(pattern, "last_q", 0))
    vertical = mass.vertical[batch, place].float().cpu().numpy()
    total = max(float(vertical.sum()), 1e-30)
    stride = int(found["stride"]) if "stride" in found else None
    panels = 2 + bool(stride)
    gap = 0.27 if stride else 0.19
    width = 1 / (panels + gap * (panels - 1))
    axes = [host.inset_axes((i * (1 + gap) * width, bottom, width, height)) for i in range(panels)]
    unit = f"mass of last {last} queries (%)" if last else "attention mass (%)"
    _per_key(axes[0], vertical, total, stride, found, unit)
    tile = mass.view.tile
    if mass.diagonal is not None:
        _mass(axes[1], 100 * mass.diagonal[batch, place].float().cpu().numpy() / total, "distance")
    else:
        blocks = 100 * mass.block_diagonals[batch, place].float().cpu().numpy() / total
        _mass(axes[1], blocks, "distance", scale=tile)
    axes[1].set_ylabel("mass (%)" if mass.diagonal is not None else f"mass per {tile} distances (%)")
    words = "per distance"
    if "diagonals" in found:
        kept = np.flatnonzero(found["diagonals"].numpy())
        spans = [(a * tile, (b - a) * tile) for a, b in _steps(kept)]
        low, top = axes[1].get_ylim()
        axes[1].broken_barh(
            spans,
            (low, top - low),
            facecolor=PARTIAL,
            alpha=0.4,
            edgecolor="#8a5200",
            hatch="///",
            linewidth=0,
            zorder=0,
        )
        axes[1].set_ylim(low, top)
        words += f": {len(kept)} block diagonals"
        _selected(axes[1])
    axes[1].set_title(words, loc="left", fontsize=8.5)
    if stride:
        phase = int(found["phase"])
        key = np.arange(len(vertical))
        # what is chosen anyway says nothing about the phase: the pattern leaves it out as well
        window = int(mass.view.counts(torch.device("cpu"))[batch % mass.view.layout.batch_size]) - last
        inside = (key >= getattr(pattern, "sink", 0)) & (key < window - getattr(pattern, "local", 0))
        fold = np.bincount(key % stride, vertical * inside, minlength=stride) * 100 / total
        axes[2].fill_between(np.arange(stride), fold, step="mid", color=bar_colour(axes[2]), linewidth=0)
        axes[2].plot(
            [phase], [fold[phase]], marker="v", color=PARTIAL, markeredgecolor="black", markersize=8, clip_on=False
        )
        axes[2].set(
            xlabel=f"key mod {stride}, sink and window left out", ylabel="mass (%)", xlim=(0, stride), ylim=(0, None)
        )
        axes[2].set_title(f"per phase of stride {stride}: {phase}", loc="left", fontsize=8.5)
    return axes[0]


def _per_key(
    ax: Axes, vertical: np.ndarray, total: float, stride: int | None, found: Mapping[str, Any], unit: str
) -> None:
    _mass(ax, 100 * vertical / total, "key")
    ax.set_ylabel(unit)
    kept, words = None, "per key"
    if found.get("columns") is not None:
        kept = np.flatnonzero(found["columns"].numpy())
        words = f"{len(kept):,} columns"
    elif stride:
        kept = np.arange(int(found["phase"]), len(vertical), stride)
        words = f"phase {int(found['phase'])} mod {stride}"
    if kept is not None:
        from matplotlib.transforms import blended_transform_factory

        mixed = blended_transform_factory(ax.transData, ax.transAxes)
        ax.vlines(kept, 0.93, 1.0, transform=mixed, color=PARTIAL, linewidth=0.8 if len(kept) < 400 else 0.3)
        words = f"{'' if stride else 'per key: '}{words}, {vertical[kept].sum() / total:.1%}"
        _selected(ax)
    ax.set_title(words, loc="left", fontsize=8.5)


def _selected(ax: Axes) -> None:
    """The legend: above the panel, at its right."""
    ax.legend(
        handles=[swatch(PARTIAL, "selected", line="#8a5200")], loc="lower right", bbox_to_anchor=(1.0, 0.985),
        borderaxespad=0, handlelength=1.0, handleheight=1.0, frameon=False,
    )  # fmt: skip


def _steps(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Runs of consecutive numbers as (first, past the last)."""
    if not len(numbers):
        return []
    cut = np.flatnonzero(np.diff(numbers) > 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, cut)]


def _mass(ax: Axes, value: np.ndarray, label: str, bins: int = 1200, scale: int = 1) -> None:
    """Mass per token (or per ``scale`` tokens) on a log scale; of more than there are pixels the heaviest."""
    n = len(value)
    edges = np.unique(np.linspace(0, n, min(n, bins) + 1).astype(int))
    top = np.maximum.reduceat(value, edges[:-1]) if n else value
    positive = top[top > 0]
    highest = float(top.max(initial=0))
    floor = max(float(np.quantile(positive, 0.02)) / 3 if len(positive) else 1e-6, highest * 1e-6)
    drawn = np.maximum(np.append(top, top[-1:]), floor)
    ax.fill_between(edges * scale, drawn, floor, step="post", color=bar_colour(ax), linewidth=0)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(plain)
    ax.yaxis.set_minor_formatter(plain if highest < 8 * floor else lambda value, _: "")
    ax.set_ylim(floor, max(floor * 10, highest * 2))
    n *= scale
    ax.set_xlim(0, n)
    step = 1 << max(0, (n // 3).bit_length() - 1)
    ax.set_xticks(np.arange(0, n + 1, step))
    ax.xaxis.set_major_formatter(short)
    heaviest = f", heaviest of {-(-n // bins)}" if n > bins and scale == 1 else ""
    ax.set_xlabel(f"{label} (tokens{heaviest})")


# ---- pooled scores ---------------------------------------------------------------------------------------------------


def _pooled_panels(
    host: Axes, bottom: float, height: float, score: torch.Tensor, found: Mapping[str, torch.Tensor]
) -> Axes:
    axes = [host.inset_axes((x, bottom, 0.4, height)) for x in (0.0, 0.6)]
    seen = score > float("-inf")
    values = np.where(seen.numpy(), score.numpy(), np.nan)
    image = axes[0].imshow(values, cmap="cividis", aspect="auto", interpolation="nearest")
    host.figure.colorbar(image, cax=axes[0].inset_axes((1.02, 0.0, 0.03, 1.0)), label="pooled score")
    chosen = found["blocks"].numpy()
    kind = np.where(~seen.numpy(), 2, np.where(chosen, 0, 1))
    axes[1].imshow(rgb(FULL, SKIPPED, LATER)[kind], aspect="auto", interpolation="nearest")
    axes[1].legend(
        handles=[swatch(FULL, "selected"), swatch(SKIPPED, "not selected")], loc="upper right", labelcolor=INK,
        handlelength=1.1, handleheight=1.1, frameon=False,
    )  # fmt: skip
    axes[1].set_title(f"{int(chosen.sum()):,} of {int(seen.sum()):,} blocks", loc="left", fontsize=8.5)
    for ax in axes:
        ax.set(xlabel="key block", ylabel="query block")
    return axes[0]
