"""`plot_recall`: how much attention patterns keep, against how much they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..ir.layout import TokenLayout
from ..ir.pattern import Pattern
from . import raster
from .snapshot import family
from .style import FAMILIES, canvas, plain, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..runtime.plan import Plan


def attention_recall(q: torch.Tensor, k: torch.Tensor, plan: Plan, rows: int = 256) -> np.ndarray:
    """float [B, Hq]: the share of softmax attention that a plan keeps, over evenly spaced queries (and the last)."""
    m = q.shape[2]
    at = torch.linspace(0, m - 1, min(rows, m)).round().long().unique()
    kept = raster.allowed_rows(plan, at)
    position = torch.tensor(plan.layout.position)
    own = position[:, torch.as_tensor(plan.program.queries.numbers[at.numpy()]).long()]
    causal = (own[:, None, :, None] >= position[:, None, None]) & (position >= 0)[:, None, None]
    group = q.shape[1] // k.shape[1]
    out = np.zeros((q.shape[0], q.shape[1]))
    for h in range(q.shape[1]):
        scores = (q[:, h, at.to(q.device)].float() @ k[:, h // group].float().mT * plan.scale).cpu()
        weights = scores.masked_fill(~causal[:, 0], float("-inf")).softmax(-1).nan_to_num(0.0)
        out[:, h] = (weights * kept[:, h]).sum((-1, -2)) / weights.sum((-1, -2)).clamp(min=1e-30)
    return out


@styled
def plot_recall(
    q: torch.Tensor,
    k: torch.Tensor,
    patterns: Mapping[str, Sequence[Pattern]] | Sequence[Pattern],
    *,
    layout: TokenLayout | None = None,
    scale: float | None = None,
    rows: int = 256,
    v: torch.Tensor | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Recall against density of several patterns on the same q ``[B, Hq, M, D]`` and k ``[B, Hkv, N, D]``.

    Args:
        patterns: ``{"vertical-slash": [VerticalSlash(100, 512), VerticalSlash(1000, 2048)], ...}``, a curve for each;
            or a list of patterns, a curve for each family.
        rows: queries at which recall is measured, evenly spaced.
        v: for patterns that select by values as well.
    """
    from ..runtime.attention import plan as make_plan

    if not isinstance(patterns, Mapping):
        curves: dict[str, list[Pattern]] = {}
        for p in patterns:
            curves.setdefault(family(p), []).append(p)
    else:
        curves = {name: list(found) for name, found in patterns.items() if len(found)}
    if not curves:
        raise ValueError("patterns is empty: give at least one pattern, such as [VerticalSlash(1000, 2048)]")
    figure, ax = canvas(ax, 6.0, 4.2)
    lowest = 1.0
    used: set[str] = set()
    for i, (name, found) in enumerate(curves.items()):
        points = []
        for pattern in found:
            made = make_plan(q, k, pattern, layout=layout, scale=scale, backend="reference", v=v)
            points.append((made.density.total, float(attention_recall(q, k, made, rows).mean())))
        points.sort()
        lowest = min(lowest, points[0][0])
        kind = family(found[0])
        colour = FAMILIES[kind][1] if kind in FAMILIES and kind not in used else f"C{i}"
        used.add(kind)
        x, y = (100 * np.array(v) for v in zip(*points, strict=True))
        ax.plot(x, y, marker="osD^vPX*"[i % 8], color=colour, linestyle=("-", "--", "-.", ":")[i % 4], label=name,
                markeredgecolor="black", markeredgewidth=0.5)  # fmt: skip
    ax.plot([100], [100], marker="+", color="#808080", linestyle="none", markersize=10, label="dense", clip_on=False)
    ax.set_xscale("log")
    ax.set(xlabel="density (% of the causal pairs computed)", ylabel="recall (% of the attention kept)")
    low = max(0.01, 70 * lowest)
    ax.set_xlim(low, 130)
    ax.set_ylim(None, 102)
    whole = 10.0 ** np.arange(-2, 3)[:, None] * (np.array([1, 2, 5]) if low < 40 else np.arange(1, 11))
    ticks = [float(t) for t in np.unique(whole) if low <= t <= 100]
    ax.set_xticks(ticks, [plain(t) for t in ticks])
    ax.set_xticks([], minor=True)
    ax.grid(True, which="major", color="#b8bec6", linewidth=0.4)
    ax.set_axisbelow(True)
    ax.set_title(f"{q.shape[1]} heads, {k.shape[2]:,} tokens", loc="left")
    ax.legend(loc="best", frameon=True)
    return figure
