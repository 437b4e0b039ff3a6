"""`plot_importance`: which rows of which heads a model's answers depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.layout import TokenLayout
from .bands import modality_ids, modality_swatches, strip
from .style import LATER, bar_colour, canvas, short, size_in_points, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

_MARKERS = "vsDXP"
_LEAST = 0.1
"""Shares below this part of an even one, 1 / N, have the lightest tone."""
_COLUMNS = 1200
"""Tokens that a picture has pixels for; of more, the heaviest of each so many is drawn."""


@styled
def plot_importance(
    weights: Mapping[int, Tensor],
    layout: TokenLayout | None = None,
    marks: Mapping[str, Sequence[int]] | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """How much a model's answers depend on what each head writes for each token, on a log scale: a row per head, layers
    from top to bottom, tokens to the right. A row holds the shares of its head's own importance; the bar at its end is
    the head's share of all.

    Args:
        weights: float [Hq, N] by layer, 0 or more, as `mmflex.integrations.importance.importance` gives it.
        layout: of the one prompt; its modalities are drawn as a band above.
        marks: token numbers to point at, by what they are: ``{"questions": [1500, 1502]}``; at most 5 kinds.

    Raises:
        ValueError: no layers, layers of different shapes, a layout or marks of another length, too many marks.
    """
    shares, ends = _shares(weights)
    heads, n = shares.shape[0] // len(weights), shares.shape[1]
    marks = marks or {}
    _check(n, layout, marks)
    own = ax is None
    figure, ax = canvas(ax, 9.4, 1.9 + max(1.6, min(9.0, 0.105 * len(shares))))
    if own:
        height = figure.get_size_inches()[1]
        figure.subplots_adjust(left=0.08, right=0.87, bottom=0.95 / height, top=1 - 0.72 / height)
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.lines import Line2D

    least = _LEAST / n
    edges = np.unique(np.linspace(0, n, min(n, _COLUMNS) + 1).astype(int))
    drawn = np.maximum.reduceat(shares, edges[:-1], axis=1)
    # straight in lightness from white to dark, so that it reads in grey
    tones = LinearSegmentedColormap.from_list("importance", [LATER, "#f6c667", "#c8643b", "#5a2a6e", "#0b1030"])
    image = ax.imshow(
        np.maximum(drawn, least),
        extent=(0, n, len(shares), 0), aspect="auto", interpolation="nearest", cmap=tones, norm=LogNorm(least, 1),
    )  # fmt: skip
    for y in range(heads, len(shares), heads):
        ax.axhline(y, color="#4a4f55", linewidth=0.6)
    ax.set_yticks((np.arange(len(weights)) + 0.5) * heads, [str(layer) for layer in weights])
    ax.set(xlabel="token", ylabel=f"layer, of {heads} heads each", xlim=(0, n))
    ax.xaxis.set_major_formatter(short)
    ax.tick_params(axis="y", length=0)
    height = size_in_points(ax)[1]

    side = ax.inset_axes((1.01, 0.0, 0.09, 1.0))
    side.barh(np.arange(len(ends)) + 0.5, ends, height=0.8, color=bar_colour(side))
    side.set(ylim=(len(ends), 0), xscale="log", xlim=(min(1e-3, float(ends[ends > 0].min()) / 2), 1), yticks=[])
    side.minorticks_off()
    side.set_xlabel("share of all", fontsize=8)
    scale = ax.inset_axes((1.12, 0.0, 0.018, 1.0))
    figure.colorbar(image, cax=scale, label="share of the head's importance")

    handles = []
    lift = 1.0 + 4 / height
    if layout is not None:
        strip(ax, (0.0, lift, 1.0, 9 / height), modality_ids(layout, 0), across=True)
        handles += modality_swatches(layout, 0)
        lift += 9 / height
    for i, (name, tokens) in enumerate(marks.items()):
        # a line of its own for each kind
        level = lift + (5 + 8 * i) / height
        style: dict[str, Any] = {"marker": _MARKERS[i], "color": bar_colour(ax), "linestyle": "none", "markersize": 4.5}
        ax.plot(np.asarray(tokens) + 0.5, np.full(len(tokens), level), transform=ax.get_xaxis_transform(),
                clip_on=False, markeredgewidth=0, **style)  # fmt: skip
        handles.append(Line2D([], [], label=name, **style))
    ax.set_title(f"{len(weights)} layers x {heads} heads, {n:,} tokens", loc="left",
                 pad=(lift - 1) * height + 8 * len(marks) + 5)  # fmt: skip
    if handles:
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -34 / height), ncols=len(handles),
                  borderaxespad=0, handlelength=1.1, handleheight=1.1)  # fmt: skip
    return figure


def _shares(weights: Mapping[int, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """float [layers * Hq, N]: each row's shares of its head; float [layers * Hq]: each head's share of all."""
    shapes = {layer: tuple(w.shape) for layer, w in weights.items()}
    if not shapes or len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"layers must be [heads, tokens], all of one shape, and one at least; got {shapes}")
    rows = np.concatenate([w.detach().double().cpu().numpy() for w in weights.values()])
    total = rows.sum(1)
    if not np.isfinite(rows).all() or (rows < 0).any() or not total.sum():
        raise ValueError("importance must be finite, 0 or more, and not all 0")
    return rows / np.maximum(total, 1e-300)[:, None], total / total.sum()


def _check(n: int, layout: TokenLayout | None, marks: Mapping[str, Sequence[int]]) -> None:
    if layout is not None and (layout.batch_size, layout.length) != (1, n):
        raise ValueError(
            f"the layout is of {layout.batch_size} prompts of {layout.length} tokens, the importance of one of {n}: "
            "give that prompt's"
        )
    if len(marks) > len(_MARKERS):
        raise ValueError(f"there are {len(marks)} kinds of marks: give at most {len(_MARKERS)}")
    for name, tokens in marks.items():
        wrong = [t for t in tokens if not 0 <= t < n]
        if wrong:
            raise ValueError(f"marks {name!r} has token {wrong[0]}: there are {n}, from 0 to {n - 1}")
