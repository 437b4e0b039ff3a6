"""Pictures of an evaluation: the papers' heat map (prompt length x depth of the needle), and accuracy and output error
against attention FLOPs (need matplotlib: ``pip install 'mmflex[plot]'``).

    report = mmflex.evaluation.evaluate(model, task="v-niah")
    mmflex.evaluation.plot_report(report).savefig("evaluation.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plot.style import FAMILIES, SKIPPED, SPARE, frameless, short, styled
from .methods import SEARCHED
from .report import Report, Row, replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_curves", "plot_heat", "plot_report", "save_picture"]

LOOKS = {
    "dense": ("black", "+"),
    "a-shape": (FAMILIES["AShape"][1], "^"),
    "tri-shape": (FAMILIES["TriShape"][1], "v"),
    "sf-fixed": (FAMILIES["StridedFixed"][1], "s"),
    "sf-strided": (FAMILIES["Strided"][1], "D"),
    "minference": (FAMILIES["VerticalSlash"][1], "P"),
    "block-topk": (FAMILIES["BlockTopK"][1], ">"),
    "stem": (SPARE[2], "1"),
    "flexprefill": (SPARE[1], "X"),
    "xattention": (SPARE[0], "<"),
    "prism": (FAMILIES["Prism"][1], "p"),
    "flashprefill": (FAMILIES["FlashPrefill"][1], "h"),
    "proxyattn": (FAMILIES["ProxyAttn"][1], "d"),
    "triangle-mix": (SPARE[3], "2"),
    "mminference-intra": (FAMILIES["QBoundary"][1], "o"),
    "mminference": (FAMILIES["Boundary2D"][1], "*"),
    SEARCHED: (FAMILIES["Boundary2D"][1], "."),
}
"""Colour and marker of a method."""

GIVEN = ("#4a4f55", "x")
"""Colour and marker of specs that ran as they were given."""


@styled
def plot_heat(report: Report) -> Figure:
    """Accuracy by prompt length and depth of the needle, a panel per task and method; each method at the largest share
    of FLOPs that it was brought to. Numbers are %."""
    columns = max(len(_columns(report, task)) for task in _tasks(report))
    figure = _figure(1.5 + 1.35 * columns, 0.9 + 1.9 * len(report.tasks))
    _heat(figure, report)
    return figure


@styled
def plot_curves(report: Report) -> Figure:
    """Accuracy (with its 95% interval) and output error against attention FLOPs, a curve per method and a row of panels
    per task, at the length where all targets were run."""
    figure = _figure(10.5, 0.6 + 2.9 * len(_tasks(report)))
    _curves(figure, report)
    return figure


@styled
def plot_report(report: Report) -> Figure:
    """`plot_heat` above `plot_curves`."""
    tasks = _tasks(report)
    columns = max(len(_columns(report, task)) for task in tasks)
    heights = [0.9 + 1.9 * len(tasks), 0.6 + 2.9 * len(tasks)]
    figure = _figure(max(10.5, 1.5 + 1.35 * columns), sum(heights))
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    _heat(above, report)
    _curves(below, report)
    return figure


def save_picture(report: Report, path: str | Path) -> None:
    """Draws `plot_report` to a file (PNG, SVG, PDF), which is complete or untouched. ValueError for another format."""
    drawable(path)
    replaced(path, lambda part: plot_report(report).savefig(part, bbox_inches="tight"))


def drawable(path: str | Path) -> None:
    """ValueError for a file name that is not of a picture; ImportError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install 'mmflex[plot]'") from None
    known = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix.lower().lstrip(".") not in known:
        raise ValueError(f"{path} has no suffix of a picture: use one of {', '.join(sorted(known))}")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tasks(report: Report) -> list[str]:
    if not report.rows:
        raise ValueError("this report has no rows: evaluate at least one length")
    return report.tasks


# ---- heat map ------------------------------------------------------------------------------------------------------


def _columns(report: Report, task: str) -> dict[str, dict[int, Row]]:
    """{label: {tokens: row}}, of each method the row with the largest target."""
    found: dict[str, dict[int, Row]] = {}
    for row in sorted(report.at(task), key=lambda r: r.target or 0.0):
        found.setdefault(row.label, {})[row.tokens] = row
    order = list(dict.fromkeys(r.label for r in report.at(task)))
    return {label: found[label] for label in order}


def _heat(host: Any, report: Report) -> None:
    from matplotlib import colormaps

    tasks = _tasks(report)
    panels = {task: _columns(report, task) for task in tasks}
    wide = max(map(len, panels.values()))
    axes = host.subplots(len(tasks), wide, squeeze=False)
    colours = colormaps["cividis"].with_extremes(bad=SKIPPED)
    image = None
    for line, task in zip(axes, tasks, strict=True):
        for ax in line[len(panels[task]) :]:
            ax.axis("off")
        for ax, (label, rows) in zip(line, panels[task].items(), strict=False):
            lengths = sorted(rows)
            values = np.array([[score.accuracy for score in rows[n].depths] for n in lengths]).T
            image = ax.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            for y, x in np.argwhere(~np.isnan(values)):
                tone = "black" if values[y, x] > 0.55 else "white"
                ax.text(x, y, f"{100 * values[y, x]:.0f}", ha="center", va="center", fontsize=6, color=tone)
            ticks = [short(n) + "*" * rows[n].over for n in lengths]
            ax.set_xticks(range(len(lengths)), ticks, fontsize=6.5)
            bins = len(values)
            ax.set_yticks([-0.5, bins / 2 - 0.5, bins - 0.5], ["0", "50", "100"] if ax is line[0] else ["", "", ""])
            frameless(ax)
            ax.set_title(_wrapped(label), fontsize=7.5)
        line[0].set_ylabel(f"{task}\ndepth (%)")
        for ax in line[: len(panels[task])]:
            ax.set_xlabel("tokens", fontsize=7)
    top = max((r.target for r in report.rows if r.target is not None), default=None)
    limit = "" if top is None else f", methods at no more than {100 * top:g}% of the dense attention FLOPs"
    limit += " (*: no setting computes so little)" if any(r.over for r in report.rows) else ""
    host.suptitle(f"answers that are right (%) by prompt length and depth of the needle{limit}", fontsize=10)
    host.colorbar(image, ax=axes, shrink=0.8, fraction=0.02, label="accuracy")


def _wrapped(label: str) -> str:
    import textwrap

    return textwrap.fill(textwrap.shorten(label, 40, placeholder=" …"), 14)


# ---- curves --------------------------------------------------------------------------------------------------------


def _curves(host: Any, report: Report) -> None:
    tasks = _tasks(report)
    axes = host.subplots(len(tasks), 2, squeeze=False)
    handles: dict[str, Any] = {}
    for line, task in zip(axes, tasks, strict=True):
        tokens = _swept(report.at(task))
        curves: dict[str, list[Row]] = {}
        for row in report.at(task, tokens):
            curves.setdefault(row.label, []).append(row)
        for label, rows in curves.items():
            points = {(r.ran, r.settings): r for r in sorted(rows, key=lambda r: r.ran)}
            handles[label] = _curve(line, list(points.values()))
        for ax, what in zip(line, ("accuracy (%)", "output error against dense"), strict=True):
            ax.set_xlabel("attention FLOPs (% of dense)")
            ax.set_ylabel(what)
            ax.grid(True, color="#d9dde2", linewidth=0.5)
            ax.set_xlim(0, 104)
        line[0].set_ylim(-3, 103)
        line[1].set_ylim(0, None)
        line[0].set_title(f"{task}, {tokens:,} tokens", loc="left")
    host.legend(handles.values(), handles.keys(), loc="outside right upper")


def _swept(rows: Sequence[Row]) -> int:
    """The length with the most targets; of equals the longest."""
    return max({r.tokens for r in rows}, key=lambda n: (len({r.target for r in rows if r.tokens == n}), n))


def _curve(line: Sequence[Any], rows: list[Row]) -> Any:
    colour, marker = LOOKS.get(rows[0].method, GIVEN)
    x = 100 * np.array([r.ran for r in rows])
    y = 100 * np.array([r.score.accuracy for r in rows])
    reach = 100 * np.array([r.score.interval for r in rows]).T
    style = {"color": colour, "marker": marker, "markeredgecolor": colour, "markersize": 6, "linewidth": 1.2}
    line[0].errorbar(x, y, yerr=np.abs(reach - y), elinewidth=0.6, capsize=2, **style)
    if rows[0].method == "dense":
        line[0].axhline(y[0], color=colour, linewidth=0.6, linestyle=":")
    (drawn,) = line[1].plot(x, [r.error for r in rows], **style)
    return drawn
