"""`plot_heads` and `plot_config`: which head has which pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .snapshot import Snapshot, family, snapshot
from .style import FAMILIES, canvas, frameless, ink, look, size_in_points, styled, swatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..runtime.plan import Plan
    from ..tuning.config import Config

_HATCH = "////"


@styled
def plot_heads(
    plan: Plan | Snapshot | Sequence[Plan | Snapshot] | Mapping[int, Plan | Snapshot],
    batch: int = 0,
    *,
    ax: Axes | None = None,
) -> Figure:
    """The heads of a plan: family as colour and letter, density (computed over causal pairs) as text; a row per KV
    head.

    Plans of several layers (a list, or ``{layer: plan}``) are drawn layers down, heads to the right.
    """
    if isinstance(plan, Mapping):
        return _layers({layer: snapshot(p) for layer, p in plan.items()}, batch, ax)
    if isinstance(plan, Sequence):
        return _layers({layer: snapshot(p) for layer, p in enumerate(plan)}, batch, ax)
    snap = snapshot(plan)
    snap.check(0, batch)
    heads, group = snap.heads, snap.heads // snap.kv_heads
    wide = group
    if group < 4 and heads > 4:  # many KV heads: fill rows of eight instead
        wide = 8
    density = snap.density[batch]
    rows = -(-heads // wide)
    figure, ax = canvas(ax, 1.1 + 0.95 * wide, 1.3 + 0.8 * rows)
    known = list(dict.fromkeys(snap.families))
    for h, name in enumerate(snap.families):
        x, y = h % wide, h // wide
        letters, colour = look(name, known)
        _cell(ax, x, y, name, colour)
        _text(ax, x + 0.07, y + 0.2, f"{h}", colour, name, 6.5, ha="left")
        _text(ax, x + 0.5, y + 0.45, letters, colour, name, 11, weight="bold")
        _text(ax, x + 0.5, y + 0.78, f"{density[h]:.1%}", colour, name, 7.5)
    ax.set(xlim=(0, wide), ylim=(rows, 0), xticks=[])
    labels = [f"KV {i}" if wide == group else f"{i * wide}–{min(heads, (i + 1) * wide) - 1}" for i in range(rows)]
    ax.set_yticks(np.arange(rows) + 0.5, labels)
    frameless(ax)
    ax.set_title(f"{heads} heads, {density.mean():.1%} of the causal pairs computed", loc="left")
    _family_legend(ax, snap.families, known)
    return figure


def _layers(plans: Mapping[int, Snapshot], batch: int, ax: Axes | None) -> Figure:
    """Layers down, heads to the right; density in percent under the letter."""
    if not plans:
        raise ValueError("there are no plans: give one per layer, such as {0: plan}")
    for snap in plans.values():
        snap.check(0, batch)
    names = {layer: list(snap.families) for layer, snap in plans.items()}
    shares = {layer: [f"{share:.0%}" for share in snap.density[batch]] for layer, snap in plans.items()}
    mean = np.mean([snap.density[batch].mean() for snap in plans.values()])
    heads = max(snap.heads for snap in plans.values())
    title = f"{len(plans)} layers x {heads} heads, {mean:.1%} of the causal pairs computed"
    return _overview(ax, list(plans), heads, names, shares, title)


@styled
def plot_config(config: Config, values: str | None = None, *, ax: Axes | None = None) -> Figure:
    """The pattern family of every head of a model: layers down, heads to the right. Dotted layers keep the model's own
    attention.

    Args:
        values: a number of every head to write under its letter, of those that a search stored in the config's
            provenance: "error" of the attention output, "recall", "density", or "ms".
    """
    per_head = config.provenance.get("per_head", {})
    if values is not None and values not in per_head:
        has = (
            f"those it has are {', '.join(map(repr, per_head))}" if per_head else "it has none: mmflex.search adds them"
        )
        raise ValueError(f"this config has no {values!r} per head; {has}")
    names = {layer: [family(p) for p in patterns] for layer, patterns in config.patterns.items()}
    notes = None
    title = f"{config.model or 'config'}: {config.layers} layers x {config.heads} heads"
    if values is not None:
        unit = ".3g" if values == "ms" else ".1%"
        notes = {int(layer): [f"{value:{unit}}" for value in row] for layer, row in per_head[values].items()}
        title += f", {'output error' if values == 'error' else values} of each"
    return _overview(ax, range(config.layers), config.heads, names, notes, title)


def _overview(
    ax: Axes | None,
    layers: Sequence[int],
    heads: int,
    names: Mapping[int, Sequence[str]],
    notes: Mapping[int, Sequence[str]] | None,
    title: str,
) -> Figure:
    """A cell for each head: the letter of its family, and a note under it; layers without names are dotted."""
    every = [name for row in names.values() for name in row]
    known = list(dict.fromkeys(every))
    cell = 0.24 if notes is None else 0.42
    figure, ax = canvas(ax, 1.6 + max(cell * heads, 3.0), 1.5 + cell * len(layers))
    width, height = size_in_points(ax)
    room = min(width / heads, height / max(len(layers), 1))
    size = max(4.5, min(11.0, 0.42 * room))
    for y, layer in enumerate(layers):
        if layer not in names:
            ax.axhspan(y + 0.03, y + 0.97, facecolor="#f4f4f4", edgecolor="#8c949e", hatch="....", linewidth=0)
        for x, name in enumerate(names.get(layer, ())):
            letters, colour = look(name, known)
            _cell(ax, x, y, name, colour)
            letter_size = size * (1 if len(letters) == 1 else 0.7)
            _text(ax, x + 0.5, y + (0.52 if notes is None else 0.36), letters, colour, name, letter_size)
            if notes is not None:
                _text(ax, x + 0.5, y + 0.77, notes[layer][x], colour, name, min(7.5, 0.24 * room))
    _numbers(ax, "x", range(heads), "head")
    _numbers(ax, "y", layers, "layer")
    ax.set(xlim=(0, heads), ylim=(len(layers), 0))
    frameless(ax)
    ax.set_title(title, loc="left")
    _family_legend(ax, every, known, len(layers) - len(names))
    return figure


def _numbers(ax: Axes, side: str, numbers: Sequence[int], label: str) -> None:
    """Ticks in the middle of cells: all of up to 16, every fourth of more."""
    step = 1 if len(numbers) <= 16 else 4
    getattr(ax, f"set_{side}ticks")(np.arange(0, len(numbers), step) + 0.5, [str(i) for i in numbers[::step]])
    getattr(ax, f"set_{side}label")(label)


def _cell(ax: Axes, x: float, y: float, name: str, colour: str) -> None:
    from matplotlib.patches import Rectangle

    hatch = None if name in FAMILIES else _HATCH
    ax.add_patch(
        Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, facecolor=colour, edgecolor="#ffffff55", hatch=hatch, lw=0)
    )


def _text(
    ax: Axes,
    x: float,
    y: float,
    text: str,
    colour: str,
    name: str,
    size: float,
    *,
    ha: str = "center",
    weight: str = "",
) -> None:
    """Text in a cell, with a rim of the cell's colour where that is hatched."""
    from matplotlib.patheffects import withStroke

    rim = [] if name in FAMILIES else [withStroke(linewidth=1.5, foreground=colour)]
    ax.text(
        x, y, text, color=ink(colour), fontsize=size, ha=ha, va="center", weight=weight or "normal", path_effects=rim
    )


def _family_legend(ax: Axes, names: Sequence[str], known: Sequence[str], own: int = 0) -> None:
    handles = []
    for name in known:
        letters, colour = look(name, known)
        hatch = None if name in FAMILIES else _HATCH
        line = "#4a4f55" if hatch is None else "white"
        handles.append(swatch(colour, f"{letters}  {name} ({names.count(name)})", hatch, line))
    if own:
        handles.append(swatch("#f4f4f4", f"own attention ({own} layer{'s' * (own > 1)})", "....", "#8c949e"))
    box = ax.get_window_extent()
    height = max(1.0, box.height / ax.figure.dpi)
    longest = max(len(handle.get_label()) for handle in handles)
    columns = int(max(1, min(3, len(handles), box.width / ax.figure.dpi / (0.35 + 0.055 * longest))))
    ax.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.0, -(0.5 if ax.get_xlabel() else 0.15) / height),
        ncols=columns, borderaxespad=0, handlelength=1.1, handleheight=1.1,
    )  # fmt: skip
