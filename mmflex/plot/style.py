"""How pictures look: tones, colours, the canvas, ticks and legends.

Tones differ in lightness as well as in colour, bands are hatched and heads carry letters, so that pictures hold for
colour-blind eyes and in black and white. A figure made here is light in any notebook theme; on axes of the caller's
own, text takes the caller's colours, and only what stands on a white ground is dark.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FULL, PARTIAL, SKIPPED, LATER = "#10305c", "#ef9b20", "#e6e9ee", "#ffffff"
"""Tones of blocks, from dark to light; LATER: keys after the query."""

INK = "#22262a"
"""Text on a white ground."""

MODALITY_COLOURS = {0: "#4a4f55", 1: "#4ea3d8", 2: "#b5def5", 3: "#d489b3", -1: "#ffffff"}
"""Bands along the axes (-1: padding)."""

MODALITY_HATCHES = {1: "\\\\\\\\\\", 3: "||||||", -1: "xxxxx"}
"""Their hatches, for print in black and white."""

FAMILIES = {
    "Dense": ("D", "#3b3b3b"),
    "AShape": ("A", "#56b4e9"),
    "TriShape": ("T", "#0072b2"),
    "VerticalSlash": ("V", "#e69f00"),
    "Grid": ("G", "#009e73"),
    "BlockTopK": ("K", "#f0e442"),
    "BlockPeaks": ("M", "#c9b458"),
    "QBoundary": ("Q", "#cc79a7"),
    "Boundary2D": ("B", "#8e4585"),
    "Strided": ("S", "#d55e00"),
    "StridedFixed": ("F", "#b08968"),
    "Dilated": ("I", "#9aa5b1"),
    "FlexPrefill": ("P", "#bfe3c0"),
    "XAttention": ("X", "#5d2e8c"),
    "Prism": ("R", "#c44e52"),
    "FlashPrefill": ("L", "#8da0cb"),
    "ProxyAttn": ("Y", "#a6761d"),
}
"""Pattern families: the letter and the colour they have in overviews."""

SPARE = ("#332288", "#44aa99", "#999933", "#882255", "#661100", "#dd77aa")
"""Colours of compositions and of families of other packages, hatched."""

_STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#4a4f55",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "text.color": INK,
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


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Own, light colours for a figure made here; the caller's style where it gave an ax."""

    @functools.wraps(draw)
    def in_style(*args: Any, **kwargs: Any) -> Figure:
        try:
            import matplotlib.style
        except ImportError:
            raise ImportError("mmflex.plot draws with matplotlib: pip install 'mmflex[plot]'") from None
        if kwargs.get("ax") is not None:
            return draw(*args, **kwargs)
        # Some dark styles have savefig paint the figure dark whatever its colour: then it needs a ground of its own.
        overruled = matplotlib.rcParams["savefig.facecolor"] != "auto"
        with matplotlib.style.context(["default", _STYLE]):
            figure = draw(*args, **kwargs)
            if overruled:
                from matplotlib.patches import Rectangle

                ground = Rectangle((-1, -1), 3, 3, transform=figure.transFigure, facecolor="white", zorder=-10)
                ground.set_in_layout(False)
                figure.add_artist(ground)
            interactive = matplotlib.is_interactive()
        # The first figure loads a notebook's backend, which turns this on: without it no later figure would be shown.
        matplotlib.interactive(interactive)
        return figure

    return in_style


def canvas(ax: Axes | None, width: float, height: float) -> tuple[Any, Axes]:
    """(figure, ax): the caller's, or new ones in inches."""
    if ax is not None:
        return ax.figure, ax
    import matplotlib
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height), dpi=100)
    backend = matplotlib.get_backend().lower()
    if "inline" in backend or backend in ("agg", "svg", "pdf"):
        plt.close(figure)  # a notebook shows the returned figure, and not a second time by itself; nothing piles up
    return figure, figure.add_subplot()


def rgb(*colours: str) -> np.ndarray:
    """float [colours, 3], 0 to 1, of ``#rrggbb``."""
    return np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours])


def ink(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    return "black" if rgb(colour)[0] @ (0.299, 0.587, 0.114) > 0.5 else "white"


def bar_colour(ax: Axes) -> str:
    """What bars have: the darkest tone, or a light one on dark axes of the caller's."""
    from matplotlib.colors import to_hex

    return FULL if ink(to_hex(ax.get_facecolor())) == "black" else "#9cc3f0"


def short(value: float, _: Any = None) -> str:
    """16384 -> 16k, 1048576 -> 1M (powers of two as people say them); other numbers as they are."""
    value = round(value)
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit and value % (unit // 4) == 0:
            return f"{value / unit:g}{name}"
    return f"{value:,}"


def plain(value: float, _: Any = None) -> str:
    """Ticks of a log scale as numbers."""
    return f"{value:g}"


def size_in_points(ax: Axes) -> tuple[float, float]:
    """Width and height of axes."""
    box = ax.get_window_extent()
    return box.width * 72 / ax.figure.dpi, box.height * 72 / ax.figure.dpi


def limits(ax: Axes, keys: range, rows: range) -> None:
    """Limits of a picture, and a few ticks at round numbers along both sides."""
    for axis, span in ((ax.xaxis, keys), (ax.yaxis, rows)):
        step = 1 << max(0, (len(span) // 3).bit_length() - 1)
        if len(span) < 512:
            step = max(1, round(len(span) / 40) * 10 if len(span) > 40 else len(span) // 4)
        first = -(-span.start // step) * step
        axis.set_ticks(np.arange(first, span.stop + 1, step))
        axis.set_major_formatter(short)
    ax.set_xlim(keys.start, keys.stop)
    ax.set_ylim(rows.stop, rows.start)


def frameless(ax: Axes) -> None:
    """No ticks' lines and no frame."""
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def swatch(colour: str, label: str, hatch: str | None = None, line: str = "#4a4f55") -> Any:
    """A legend's entry: a small square."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor=line, linewidth=0.4, hatch=hatch, label=label)


def look(name: str, known: Sequence[str] = ()) -> tuple[str, str]:
    """(letters, colour) of a family; compositions have the letters of their parts and a colour of their own."""
    if name in FAMILIES:
        return FAMILIES[name]
    letters = "".join(FAMILIES[part][0] if part in FAMILIES else part[:2] for part in name.split())
    others = [n for n in known if n not in FAMILIES]
    return letters, SPARE[others.index(name) % len(SPARE)] if name in others else SPARE[0]
