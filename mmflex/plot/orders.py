"""`plot_orders`: one head before and after its permutation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import raster
from .bands import WIDTH, modality_ids, strip
from .masks import mask_title, pixels_of, plot_mask, tones
from .raster import Raster
from .snapshot import LaunchInfo, Snapshot, snapshot
from .style import canvas, limits, size_in_points, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..runtime.plan import Plan

GAP = 0.24
"""Between panels, in widths of a panel."""


@styled
def plot_orders(plan: Plan | Snapshot, head: int, batch: int = 0, *, ax: Axes | None = None) -> Figure:
    """One head before and after its permutation: in token order on the left, then every launch as its kernel has it,
    with the section of gathered columns apart (the paper's figure 3, for this input). Bands show which modality stands
    in a slot; blank parts of a band are empty slots."""
    snap = snapshot(plan)
    snap.check(head, batch)
    launches = [(n, p) for n, p in snap.launches_of(head) if snap.launches[n].kind != "dense"]
    panels = 1 + max(1, len(launches))
    figure, host = canvas(ax, 4.6 * panels + 0.9, 5.6)
    if ax is None:
        edge = 0.65 / (4.6 * panels + 0.9)
        figure.subplots_adjust(left=edge, right=1 - 0.6 * edge, bottom=0.12, top=0.75)
    host.axis("off")
    width = 1 / (panels + GAP * (panels - 1))
    places = [host.inset_axes((i * (1 + GAP) * width, 0.0, width, 1.0)) for i in range(panels)]
    title = "token order:\nevery computed pair at the tokens it joins"
    plot_mask(snap, head, batch, "block", title=title, ax=places[0])
    if not launches:
        places[1].axis("off")
        places[1].text(0.5, 0.5, "runs dense:\nno order is changed", ha="center", va="center")
    for panel, (number, place) in zip(places[1:], launches, strict=False):
        _launch_panel(panel, snap, head, number, place, batch)
    room, height = size_in_points(host)
    host.set_title(mask_title(snap, head, batch, int(room / 6)), loc="left", pad=0.04 * height + 52, fontsize=11)
    return figure


def _launch_panel(ax: Axes, snap: Snapshot, head: int, number: int, place: int, batch: int) -> None:
    launch, tile = snap.launches[number], snap.tile
    main, own = raster.launch_raster(snap, head, number, batch, pixels_of(ax))
    slots = snap.reader.tokens(number, place, batch)
    modality = np.append(modality_ids(snap.layout, batch % snap.layout.batch_size), -2)  # the last: an empty slot
    numbers = np.append(snap.query_tokens.numbers, -1)
    of_rows = modality[np.where(slots.rows >= 0, numbers[slots.rows], -1)]
    ax.axis("off")
    parts: list[tuple[Raster, int, np.ndarray, str]] = [
        (main, launch.main_slots, modality[slots.keys], _key_label(launch))
    ]
    if own is not None and slots.own is not None:
        parts.append((own, len(slots.own), modality[slots.own], "gathered\ncolumns"))
    share = min(0.4, max(0.14, launch.section / (launch.main_slots + launch.section))) if len(parts) > 1 else 0.0
    widths = [1.0 - share - 0.05, share] if share else [1.0]
    for i, ((found, count, ids, name), width) in enumerate(zip(parts, widths, strict=True)):
        box = ax.inset_axes((1.0 - width if i else 0.0, 0.0, width, 1.0))
        box.imshow(tones(found), extent=(0, count, launch.row_slots, 0), aspect="auto", interpolation="nearest")
        box.set_xlabel(name)
        limits(box, range(count), range(launch.row_slots))
        if i:
            box.set_xticks([0, count])
            box.tick_params(left=False, labelleft=False)
        else:
            box.set_ylabel(_row_label(launch))
        strip(box, (0.0, 1.012, 1.0, WIDTH), ids, True)
        if i == len(parts) - 1:
            strip(box, (1 + 0.012 / width, 0.0, WIDTH / width, 1.0), of_rows, False)
    full, partial = (round(sum(getattr(r, f).sum() for r in (main, own) if r is not None)) for f in ("full", "partial"))
    height = size_in_points(ax)[1]
    ax.set_title(
        f"launch {number}: {launch.label}\n{full // tile**2:,} full, {partial // tile**2:,} partial blocks",
        loc="left",
        pad=0.04 * height + 5,
        fontsize=9.5,
    )


def _key_label(launch: LaunchInfo) -> str:
    return "key slot, by residue" if launch.kind == "classes" else f"key slot, {launch.keys} order"


def _row_label(launch: LaunchInfo) -> str:
    if launch.kind == "main":
        return "query slot" + ("" if launch.rows == "natural" else f", {launch.rows}")
    return "query slot, by residue" if launch.kind == "classes" else "gathered query slot"
