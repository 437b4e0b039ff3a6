"""The house: which folder imports which, from the imports themselves.

    python -m docs.tools.house          # arrows, circles and sizes as text
    python -m docs.tools.house --draw   # docs/pictures/house.png

Type-only imports count: a reader follows them too.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmflex", "mask_builders")
ROOMS = ("ir", "compiler", "runtime", "distributed", "tuning", "plot", "integrations", "evaluation", "selfcheck", "cli")
"""Folders of mmflex, each of which may import those to its left."""

_LODGERS = {"mmflex.version": "ir", "mmflex.demo": "cli"}
"""Modules at the top and where they belong by what they import."""


def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    out = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            out |= {n if n in known else module for n in names}
    return {module for module in out if module in known} - {name}


def arrows() -> nx.DiGraph:
    """Modules and who imports whom."""
    known = modules()
    graph = nx.DiGraph()
    graph.add_nodes_from(known)
    for name, path in known.items():
        graph.add_edges_from((name, other) for other in imported(name, path, known))
    return graph


def room(module: str) -> str:
    """The folder of a module, as a room of the house."""
    parts = module.split(".")
    if parts[0] != "mmflex":
        return parts[0]
    if module in _LODGERS:
        return _LODGERS[module]
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "top"


def between_rooms(graph: nx.DiGraph) -> nx.DiGraph:
    """Rooms and how many imports go from one to another."""
    counts = Counter((room(a), room(b)) for a, b in graph.edges if room(a) != room(b))
    out = nx.DiGraph()
    out.add_weighted_edges_from((a, b, n) for (a, b), n in counts.items())
    return out


def circles(graph: nx.DiGraph) -> list[list[str]]:
    """Groups of modules that import each other in a circle."""
    return sorted((sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1), key=len)


def sizes() -> dict[str, tuple[int, int, int]]:
    """Room -> files, lines, functions."""
    out: dict[str, list[int]] = {}
    for name, path in modules().items():
        text = path.read_text()
        found = sum(isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(ast.parse(text)))
        sums = out.setdefault(room(name), [0, 0, 0])
        for i, n in enumerate((1, text.count("\n"), found)):
            sums[i] += n
    return {name: (a, b, c) for name, (a, b, c) in out.items()}


def draw(graph: nx.DiGraph, path: Path) -> None:
    """Rooms from the ground up. Arrows go from those that import; those that follow from others are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rooms, size = between_rooms(graph), sizes()
    height = {name: i for i, name in enumerate((*ROOMS, "top"))} | {"mask_builders": 3}
    place = {name: (0.0 if name != "mask_builders" else 1.6, float(height[name])) for name in rooms.nodes}
    figure, ax = plt.subplots(figsize=(6.5, 7.0))
    for a, b in nx.transitive_reduction(rooms).edges:
        bend = 0.5 if place[a][0] == place[b][0] and abs(place[a][1] - place[b][1]) > 1 else 0.0
        arrow = {"arrowstyle": "->", "color": "0.45", "shrinkA": 22, "shrinkB": 22}
        ax.annotate("", place[b], place[a], arrowprops=arrow | {"connectionstyle": f"arc3,rad={bend}"})
    for name, (x, y) in place.items():
        files, lines, _ = size[name]
        label = f"{'mmflex' if name == 'top' else name}\n{files} files, {lines:,} lines"
        ax.text(
            x, y, label, ha="center", va="center", fontsize=9, bbox={"boxstyle": "round", "fc": "#dde8f4", "ec": "0.4"}
        )
    ax.set(xlim=(-1.8, 2.6), ylim=(-0.6, len(ROOMS) + 0.6))
    ax.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    graph = arrows()
    for name, (files, lines, functions) in sizes().items():
        print(f"{name:14} {files:4} files {lines:6} lines {functions:5} functions")
    for a, b, count in sorted(between_rooms(graph).edges(data="weight")):
        print(f"{a:14} -> {b:14} {count:4}")
    print("circles:", [len(group) for group in circles(graph)] or "none")
    for group in circles(graph):
        print("  ", ", ".join(group))
    if args.draw:
        draw(graph, ROOT / "docs" / "pictures" / "house.png")


if __name__ == "__main__":
    main()
