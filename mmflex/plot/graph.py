"""`plot_graph`: the steps of a plan, what each needs, and what runs on a side stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import networkx as nx

from ..compiler.graph import PLANNING
from .style import FULL, PARTIAL, canvas, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..compiler.graph import Step
    from ..runtime.plan import Plan


@styled
def plot_graph(plan: Plan, *, ax: Axes | None = None) -> Figure:
    """The graph of a plan's program, from estimates at the left to merged outputs at the right. Steps that several
    launches share are one box. Steps on a side stream are orange.

    Args:
        plan: of `mmflex.plan`; a saved plan has no graph.

    Raises:
        ValueError: a saved plan.
    """
    program = getattr(plan, "program", None)
    if program is None:
        raise ValueError("a saved plan holds no program: call plot_graph on the plan itself")
    from matplotlib.lines import Line2D

    graph = program.graph
    place = _places(graph.graph)
    rows = 1 + max(y for _, y in place.values())
    figure, ax = canvas(ax, 11.0, 0.8 + 0.5 * rows)
    for a, b in graph.graph.edges:
        (x0, y0), (x1, y1) = place[a], place[b]
        bend = 0.3 if x1 == x0 else 0.0
        arrow = {"arrowstyle": "-|>", "color": "0.5", "lw": 0.8, "shrinkA": 26, "shrinkB": 26,
                 "connectionstyle": f"arc3,rad={bend}"}  # fmt: skip
        ax.annotate("", (x1, -y1), (x0, -y0), arrowprops=arrow)
    for step, (x, y) in place.items():
        kind = "side" if graph.stream(step) == "side" else "planning" if step.op in PLANNING else "attending"
        colour = _COLOURS[kind]
        box = {"boxstyle": "round,pad=0.35", "fc": "white", "ec": colour, "lw": 1.6}
        ax.text(x, -y, f"{step.op}\n{_of(step)}", ha="center", va="center", fontsize=7.5, bbox=box)
    ax.set(xlim=(-0.6, 5.6), ylim=(-rows + 0.4, 0.6), title="Steps of the plan")
    ax.axis("off")
    names = {"planning": "planning, without v", "attending": "attending", "side": "attending, on a side stream"}
    handles = [Line2D([], [], marker="s", ls="", color=_COLOURS[kind], label=name) for kind, name in names.items()]
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    return figure


_COLOURS = {"planning": "0.6", "attending": FULL, "side": PARTIAL}
_COLUMN = {"estimate": 0, "select": 1, "gather": 2, "list": 3, "keys": 3, "queries": 3, "attend": 4, "merge": 5}
_LANE = {"keys": 0, "queries": 1, "list": 2}
_LANES = 3


def _places(graph: nx.DiGraph) -> Mapping[Step, tuple[float, float]]:
    """Step -> (column, row): a column for each kind of step, three rows for each launch; what serves several stands
    between them."""
    row: dict[Step, float] = {}
    for step in reversed(list(nx.lexicographical_topological_sort(graph, key=str))):
        if isinstance(step.of, int):
            row[step] = step.of * _LANES + _LANE.get(step.op, 1)
        else:
            after = [row[other] for other in graph.successors(step)]
            row[step] = min(after) - 1 if step.op == "keys" else sum(after) / len(after)
    for column in (0, 1):  # steps of one column do not cover each other
        last = float("-inf")
        for step in sorted((s for s in row if _COLUMN[s.op] == column), key=lambda s: (row[s], str(s))):
            last = row[step] = max(row[step], last + 1)
    return {step: (float(_COLUMN[step.op]), y) for step, y in row.items()}


def _of(step: Step) -> str:
    if isinstance(step.of, int):
        return f"launch {step.of}"
    if step.op == "keys":
        return "k and v"
    text = str(step.of[0] if isinstance(step.of, tuple) else step.of)
    return text if len(text) <= 22 else text[:21] + "…"
