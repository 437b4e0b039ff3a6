"""Plots of ``benchmarks/results/*.json`` as inline SVG: what a file lacks is left out; no data, no plot.

python -m docs.tools.plots    # docs/pictures/stages.svg, which the README shows
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

from . import results
from .examples import PICTURES

OTHERS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8e4585", "#b08968")
MARKERS = "osD^vP*X"


def attention_times() -> str:
    """Milliseconds of one layer's attention over length: the best dense kernel, and every pattern."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, data in results.load("attention-h200.json"):
        for row in data.get("rows", []):
            if row.get("backend") != "flash" or "total_ms" not in row:
                continue
            dense = [v for v in row.get("dense_ms", {}).values() if isinstance(v, (int, float))]
            if dense:
                lines.setdefault("best dense kernel", []).append((row["tokens"], min(dense)))
            lines.setdefault(row.get("spec", name), []).append((row["tokens"], row["total_ms"]))
    several = {label: line for label, line in lines.items() if len({tokens for tokens, _ in line}) > 2}
    return _over_length(several, "milliseconds, one layer", "Milliseconds of one layer's attention over prompt length")


def prefill_times() -> str:
    """Seconds to the first token of a language model over length."""
    return _over_length(_prefill("seconds"), "seconds to the first token", "Seconds to the first token over length")


def prefill_memory() -> str:
    """Peak gigabytes of a prefill over length."""
    title = "Peak memory of a prefill over prompt length"
    return _over_length(_prefill("peak_gb"), "peak memory, GB", title, scale="linear")


def _prefill(field: str) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for _, data in results.load("prefill-h200.json"):
        for row in data.get("rows", []):
            for method, result in row.get("methods", {}).items():
                if isinstance(result.get(field), (int, float)):
                    label = results.DENSE.get(method, method)
                    lines.setdefault(label, []).append((row["tokens"], result[field]))
    return {label: line for label, line in lines.items() if len(line) > 2}


def stages() -> str:
    """Seconds of vision tower and language model, dense and sparse, as stacked bars."""
    bars: dict[int, list[tuple[str, float, float]]] = {}
    for _, data in results.load("prefill*.json"):
        if not data.get("settings", {}).get("whole"):
            continue
        for row in sorted(data.get("rows", []), key=lambda row: row["tokens"]):
            for method, result in sorted(row.get("methods", {}).items(), reverse=True):
                if isinstance(result.get("seconds"), (int, float)) and isinstance(result.get("vision_s"), (int, float)):
                    stages = result["vision_s"], result["seconds"] - result["vision_s"]
                    bars.setdefault(row["tokens"], []).append((results.DENSE.get(method, method), *stages))
    if not bars:
        return ""

    def draw(axes: Any) -> None:
        figure = axes.figure
        axes.remove()
        panels = figure.subplots(1, len(bars), squeeze=False)[0]  # a scale for each: times differ by a factor of 300
        for panel, (prompt, methods) in zip(panels, bars.items(), strict=True):
            labels, tower, rest = zip(*methods, strict=True)
            panel.bar(range(len(labels)), tower, color="#4ea3d8", label="vision tower")
            panel.bar(range(len(labels)), rest, bottom=tower, color="#d55e00", label="language model")
            for place, seconds in enumerate(map(sum, zip(tower, rest, strict=True))):
                panel.annotate(f"{seconds:.3g}", (place, seconds), ha="center", va="bottom", fontsize=7)
            panel.set_xticks(range(len(labels)), labels, fontsize=7)
            panel.tick_params("y", labelsize=7)
            panel.margins(y=0.12)
            panel.set_title(f"{prompt:,} tokens", fontsize=8)
        panels[0].set_ylabel("seconds to the first token", fontsize=8)
        marks = panels[0].get_legend_handles_labels()
        figure.legend(*marks, loc="outside lower center", ncols=2, frameon=False, fontsize=8)

    return _figure(draw, "Seconds of vision tower and language model, dense and sparse")


def quality() -> str:
    """Perplexity over the dense model's against density, on models that were not trained here."""
    points: dict[str, list[tuple[float, float]]] = {}
    for _, data in results.load("real-*.json"):
        for row in data.get("texts", []):
            excess, ran = row["scores"]["excess"]["value"], row["method"]["ran"]
            if isinstance(excess, (int, float)) and isinstance(ran, (int, float)):
                points.setdefault(row["method"]["label"], []).append((ran, 100 * excess))
    if not points:
        return ""

    def draw(axes: Any) -> None:
        for i, (label, line) in enumerate(points.items()):
            x, y = zip(*sorted(line), strict=True)
            axes.scatter(x, y, s=18, marker=MARKERS[(i + i // 8) % 8], color=OTHERS[i % 8], label=label)
        axes.set_xlabel("share of the causal pairs that were computed")
        axes.set_ylabel("perplexity over dense, %")
        axes.legend(frameon=False, fontsize=7)

    return _figure(draw, "Perplexity over the dense model's against density")


def _over_length(lines: dict[str, list[tuple[float, float]]], unit: str, title: str, scale: str = "log") -> str:
    if not lines:
        return ""

    def draw(axes: Any) -> None:
        marks = sorted({tokens for line in lines.values() for tokens, _ in line})
        for i, (label, line) in enumerate(lines.items()):
            x, y = zip(*sorted(dict(line).items()), strict=True)
            dense = label == "best dense kernel" or label in results.DENSE.values()
            style: dict[str, Any] = {"color": OTHERS[i % 8], "markersize": 4}
            if dense:  # hollow: what is as much as dense stays in sight
                style = {"color": "#6a7078", "linestyle": "--", "markersize": 7, "markerfacecolor": "none"}
            axes.plot(x, y, marker=MARKERS[i % 8], linewidth=1.5, label=label, **style)
        axes.set_xscale("log")
        axes.set_yscale(scale)
        if scale == "linear":
            axes.set_ylim(bottom=0)
        axes.set_xticks(marks, [results.tokens(int(n)) for n in marks], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel(unit)
        axes.legend(frameon=False, fontsize=7)

    return _figure(draw, title)


def _figure(draw: Callable[[Any], None], title: str) -> str:
    """A block of raw HTML with the picture; on a white ground, which holds in light and dark pages."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # the same picture from the same data: no date, no random names
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.S)
    svg = re.sub(r"\n\s*\n", "\n", svg).strip()
    label = html.escape(title, quote=True)
    shown = f"{svg}\n<figcaption>{html.escape(title)}</figcaption>"
    return f'```{{raw}} html\n<figure class="plot" role="img" aria-label="{label}">\n{shown}\n</figure>\n```'


PLOTS: dict[str, Callable[[], str]] = {
    "attention_times": attention_times,
    "prefill_times": prefill_times,
    "prefill_memory": prefill_memory,
    "stages": stages,
    "quality": quality,
}


def main() -> None:
    """Writes the README's plot as a file of its own."""
    found = re.search(r"<svg.*</svg>", stages(), re.S)
    assert found, "no result of a whole model"
    path = PICTURES / "stages.svg"
    path.write_text(found[0] + "\n", "utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
