"""What notebooks show of a `Plan` and of a `TokenLayout`: a small picture and the numbers.

Text takes the notebook's colours and what causality leaves out is transparent, so both are legible on dark pages.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.layout import MODALITY_NAMES, TokenLayout
from . import raster
from .bands import coarse_runs, modality_ids, runs
from .masks import tones
from .snapshot import Snapshot, snapshot
from .style import FULL, MODALITY_COLOURS, PARTIAL, SKIPPED, rgb

if TYPE_CHECKING:
    from ..runtime.plan import Plan

PICTURES = 6
"""Heads shown, one of each pattern."""

_PIXELS, _BAND = 128, 4


def plan_html(plan: Plan | Snapshot) -> str:
    """Shapes, backend, launches, density, patterns; one picture for each pattern, where matplotlib is installed."""
    snap = snapshot(plan)
    head = (
        f"<b>Plan</b> of {snap.batch} x {snap.heads} heads on {snap.kv_heads} KV heads, {snap.queries:,} queries, "
        f"{snap.length:,} keys, head dimension {snap.q[3]}<br>"
        f"backend {escape(snap.backend)}, blocks of {snap.tile}, "
        f"<b>{snap.density.mean() if snap.density.size else 0.0:.1%}</b> of the causal pairs computed"
        + (f"<br>{escape(snap.note)}" if snap.note else "")
        + f"<br>launches: {', '.join(escape(launch.label) for launch in snap.launches) or 'none'}"
    )
    rows = []
    for i, (pattern, heads) in enumerate(snap.groups):
        share = snap.density[:, list(heads)].mean() if snap.density.size else 0.0
        cells = [_thumbnail(snap, heads[0]) if i < PICTURES else "", ranges(heads), escape(pattern), f"{share:.1%}"]
        rows.append("".join(f'<td style="text-align:left">{cell}</td>' for cell in cells))
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    names = "".join(f'<th style="text-align:left">{name}</th>' for name in ("", "heads", "pattern", "density"))
    tones_ = ((FULL, "full blocks"), (PARTIAL, "partial blocks"), (SKIPPED, "skipped"))
    legend = _legend(tones_) if rows and "<img" in table else ""
    return f"<div>{head}<table><tr>{names}</tr>{table}</table>{legend}</div>"


def layout_html(layout: TokenLayout) -> str:
    """A band of the modalities of each prompt (of the first eight), and their token counts."""
    lines = []
    for row in range(min(layout.batch_size, 8)):
        lines.append(_band_svg(modality_ids(layout, row)))
        lines.append(f"<div><small>{escape(layout.summary().splitlines()[row])}</small></div>")
    if layout.batch_size > 8:
        lines.append(f"<div><small>and {layout.batch_size - 8} more prompts</small></div>")
    count = {m: int(layout.of(m).sum()) for m in layout.modalities}
    padding = int((~layout.valid).sum())
    entries = [(MODALITY_COLOURS[m], f"{MODALITY_NAMES[m]} {n:,}") for m, n in count.items()]
    if padding:
        entries.append((MODALITY_COLOURS[-1], f"padding {padding:,}"))
    strides = {MODALITY_NAMES[m]: layout.frame_stride(m) for m in layout.modalities}
    frames = "".join(f", {stride:,} tokens from frame to frame ({name})" for name, stride in strides.items() if stride)
    prompts = f"{layout.batch_size} prompt{'s' * (layout.batch_size != 1)}"
    head = f"<b>TokenLayout</b> of {prompts}, {layout.length:,} tokens{frames}"
    return f"<div>{head}{''.join(lines)}{_legend(entries)}</div>"


def ranges(heads: Sequence[int]) -> str:
    """0-3, 7."""
    found = runs(np.asarray(heads) - np.arange(len(heads)))
    return ", ".join(
        str(heads[first]) if last - first == 1 else f"{heads[first]}-{heads[last - 1]}" for first, last, _ in found
    )


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    parts = (
        f'<span style="display:inline-block;width:0.8em;height:0.8em;background:{colour};border:1px solid #4a4f55">'
        f"</span> {escape(name)}"
        for colour, name in entries
    )
    return f"<div><small>{' &nbsp; '.join(parts)}</small></div>"


def _thumbnail(snap: Snapshot, head: int) -> str:
    """One head of the first prompt as an inline PNG; "" without matplotlib, or without tokens."""
    if not snap.queries or not snap.length or not snap.batch:
        return ""
    try:
        from matplotlib.image import imsave
    except ImportError:
        return ""
    found = raster.mask_raster(snap, head, 0, _PIXELS)
    height, width = found.pairs.shape
    opaque = np.dstack([tones(found), ~found.later])
    ids = modality_ids(snap.layout, 0)
    picture = np.zeros((height + _BAND, width + _BAND, 4))
    picture[_BAND:, :width] = opaque
    picture[: _BAND - 1, :width] = _colours(ids, width)
    picture[_BAND:, width + 1 :] = _colours(snap.query_tokens.take(ids), height)[:, None]
    file = io.BytesIO()
    plain: Any = {"Software": None}  # the same picture is the same file, whatever version drew it
    imsave(file, picture, format="png", metadata=plain)
    data = base64.b64encode(file.getvalue()).decode()
    shown = max(1, round(_PIXELS * (height + _BAND) / max(height, width)))
    return f'<img src="data:image/png;base64,{data}" height="{shown}" alt="mask of head {head}">'


def _colours(ids: np.ndarray, pixels: int) -> np.ndarray:
    """RGBA ``[pixels, 4]`` along a band."""
    at = ids[(np.arange(pixels) + 0.5).astype(int) * len(ids) // pixels]
    known = {m: (*rgb(colour)[0], 1.0) for m, colour in MODALITY_COLOURS.items()}
    return np.array([known[int(m)] for m in at])


def _band_svg(ids: np.ndarray, width: int = 640, height: int = 14) -> str:
    """Modalities of a prompt, a rectangle a run."""
    n = max(len(ids), 1)
    rectangles = "".join(
        f'<rect x="{a * width / n:.1f}" width="{(b - a) * width / n:.1f}" height="{height}" '
        f'fill="{MODALITY_COLOURS[m]}"/>'
        for a, b, m in coarse_runs(ids, width)
    )
    return (
        f'<div><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="modalities in order">{rectangles}</svg></div>'
    )
