"""Pictures of an evaluation on real weights (need matplotlib: ``pip install 'mmflex[plot]'``): a row of panels for
every text and length, and one for the needle tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...plot.style import styled
from ..pictures import GIVEN, LOOKS, drawable
from ..report import replaced
from .report import Method, NeedleRow, Report, TextRow
from .score import FIRST

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def plot_report(report: Report) -> Figure:
    """Increase of perplexity and KL divergence against what attention computes, KL by the place of a query in its tile,
    and right answers against what attention computes. ValueError for a report without rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys((row.text, row.tokens) for row in report.texts))
    tasks = list(dict.fromkeys((row.task, row.tokens) for row in report.needles))
    rows = len(cells) + -(-len(tasks) // 3)
    if not rows:
        raise ValueError("this report has no rows: evaluate at least one text")
    figure = Figure(figsize=(12.5, 0.5 + 2.9 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 3, squeeze=False)
    handles: dict[str, Any] = {}
    for line, cell in zip(axes, cells, strict=False):
        _text_panels(line, [row for row in report.texts if (row.text, row.tokens) == cell], handles)
    below = axes[len(cells) :].ravel()
    for ax, task in zip(below, tasks, strict=False):
        _needle_panel(ax, [row for row in report.needles if (row.task, row.tokens) == task], handles)
    for ax in below[len(tasks) :]:
        ax.axis("off")
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


def save_picture(report: Report, path: str | Path) -> None:
    """Draws `plot_report` to a file (PNG, SVG, PDF), which is complete or untouched. ValueError for another format."""
    drawable(path)
    replaced(path, lambda part: plot_report(report).savefig(part, bbox_inches="tight"))


def _look(method: Method) -> dict[str, Any]:
    colour, marker = LOOKS.get(method.method, GIVEN)
    return {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.2}


def _by_label(rows: Sequence[Any]) -> dict[str, list[Any]]:
    curves: dict[str, list[Any]] = {}
    for row in sorted(rows, key=lambda r: r.method.ran):
        curves.setdefault(row.method.label, []).append(row)
    return curves


def _text_panels(line: Sequence[Any], rows: Sequence[TextRow], handles: dict[str, Any]) -> None:
    excess, kl, offsets = line
    for label, curve in _by_label(rows).items():
        x, look = [100 * row.method.ran for row in curve], _look(curve[0].method)
        for ax, name, by in ((excess, "excess", 100.0), (kl, "kl", 1.0)):
            values = [getattr(row.scores, name) for row in curve]
            y = np.array([by * v.value for v in values])
            reach = np.array([[by * v.value - by * v.low, by * v.high - by * v.value] for v in values]).T
            handles[label] = ax.errorbar(x, y, yerr=np.nan_to_num(np.abs(reach)), elinewidth=0.6, capsize=2, **look)
        sparsest = curve[0]
        places = [FIRST * (i + 0.5) for i in range(len(sparsest.scores.offsets))]
        offsets.plot(places, sparsest.scores.offsets, **look)
    excess.set_title(f"{rows[0].text}, {rows[0].tokens:,} tokens", loc="left")
    excess.set_ylabel("perplexity over dense (%)")
    kl.set_ylabel("KL to dense, all rows (nats)")
    offsets.set_ylabel("the same, sparsest setting (nats)")
    for ax in (excess, kl):
        ax.set_xlabel("pairs computed (% of dense attention)")
        ax.set_xlim(0, 104)
    offsets.set_xlabel("place of the query in its tile of 128")
    for ax in (kl, offsets):
        ax.set_yscale("log")
    for ax in line:
        ax.grid(True, color="#d9dde2", linewidth=0.5)


def _needle_panel(ax: Any, rows: Sequence[NeedleRow], handles: dict[str, Any]) -> None:
    for label, curve in _by_label(rows).items():
        x, look = [100 * row.method.ran for row in curve], _look(curve[0].method)
        y = np.array([100 * row.score.accuracy for row in curve])
        bounds = 100 * np.array([row.score.interval for row in curve]).T
        handles[label] = ax.errorbar(x, y, yerr=np.abs(bounds - y), elinewidth=0.6, capsize=2, **look)
    ax.axhline(100 * rows[0].dense.accuracy, color="black", linewidth=0.6, linestyle=":")
    ax.set_title(f"{rows[0].task}, {rows[0].tokens:,} tokens", loc="left")
    ax.set_xlabel("pairs computed (% of dense attention)")
    ax.set_ylabel("right answers (%; dotted: dense)")
    ax.set_xlim(0, 104)
    ax.set_ylim(-3, 103)
    ax.grid(True, color="#d9dde2", linewidth=0.5)
