"""The steps of a program as a graph: what needs what, from which follow the order of execution, what may run on a side
stream, and what is done once for several launches.

==================  ====================================================================================================
step                what it does
==================  ====================================================================================================
``estimate``        runs an estimator, once for all heads whose patterns ask for an equal one
``select``          lets a pattern choose its sets and numbers, once for all heads that have it
``gather``          decides which keys or queries a launch gathers, and where they stand
``list``            classifies the blocks of a launch and lists them
``keys``            puts k and v into the key slots of one launch, or of several that want them alike
``queries``         puts q into the query slots of a launch
``attend``          runs the kernel of a launch
``merge``           puts its rows into the output: after those of all launches that it shares heads with and that come
                    in an earlier turn (`Launch.turn`)
==================  ====================================================================================================

The first four are planning, and know nothing of v; the last four attend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import networkx as nx

from ..ir.layout import TokenLayout
from .launches import BlockLaunch, Launch, ResidueLaunch
from .terms import selecting_leaves

PLANNING = ("estimate", "select", "gather", "list")
ATTENDING = ("keys", "queries", "attend", "merge")


class Step(NamedTuple):
    """A node. ``of``: an (estimator, scope), a leaf's name, a launch's number, or what a set of keys is shared by."""

    op: str
    of: Any


class PlanGraph:
    """The graph of a program, a networkx ``DiGraph`` of `Step` with edges from what a step needs.

    Attributes:
        graph: the nodes have an attribute ``stream``, "main" or "side".
    """

    def __init__(self, launches: Sequence[Launch], leaves: Mapping[str, Any], layout: TokenLayout) -> None:
        self.graph = nx.DiGraph()
        self.launches = launches
        for name, leaf in leaves.items():
            self._add("select", name)
            if leaf.estimator is not None:
                self._add("estimate", (leaf.estimator, leaf.scope))
                self._need("select", name, Step("estimate", (leaf.estimator, leaf.scope)))
        for number, launch in enumerate(launches):
            self._plan(number, launch, leaves)
        alone = len(launches) == 1
        for number, launch in enumerate(launches):
            self._attend(number, launch, "side" if launch.underfills(layout.length) and not alone else "main")
        self._merge()

    def _add(self, op: str, of: Any, stream: str = "main") -> None:
        self.graph.add_node(Step(op, of), stream=stream)

    def _need(self, op: str, of: Any, *steps: Step) -> None:
        self.graph.add_edges_from((step, Step(op, of)) for step in steps)

    def _plan(self, number: int, launch: Launch, leaves: Mapping[str, Any]) -> None:
        if not launch.lists_blocks:
            return
        self._add("gather", number)
        self._add("list", number)
        self._need("list", number, Step("gather", number))
        gathers: set[str] = set()
        lists: set[str] = set()
        for part in launch.parts:
            lists |= selecting_leaves(part.mask)
            gathers |= selecting_leaves(part.gathered_keys, part.gathered_queries, *(part.residues or ()))
        for step, names in (("gather", gathers), ("list", lists)):
            self._need(step, number, *(Step("select", name) for name in leaves if name in names))

    def _attend(self, number: int, launch: Launch, stream: str) -> None:
        self._add("attend", number, stream)
        if not launch.lists_blocks:
            return
        keys = Step("keys", self.keys_of(number))
        if keys not in self.graph:
            self._add(*keys, stream)
        elif stream == "main":
            self.graph.nodes[keys]["stream"] = "main"
        self._add("queries", number, stream)
        needed = [Step("gather", number)]
        self._need(*keys, *needed)
        self._need("queries", number, *needed)
        self._need("attend", number, keys, Step("queries", number), Step("list", number))

    def keys_of(self, number: int) -> tuple[Any, ...]:
        """Equal for launches that read the same k and v: of one order and KV heads, gathering nothing themselves."""
        launch = self.launches[number]
        gathers = isinstance(launch, ResidueLaunch) or (isinstance(launch, BlockLaunch) and launch.section > 0)
        order = next(i for i, other in enumerate(self.launches) if other.keys is launch.keys)
        return (order, launch.heads.kv_heads, launch.compares, number if gathers else None)

    def launch_of_keys(self, step: Step) -> int:
        """The first of the launches that read a step's k and v."""
        return min(user.of for user in self.graph.successors(step))

    def _merge(self) -> None:
        for number, launch in enumerate(self.launches):
            self._add("merge", number)
            self._need("merge", number, Step("attend", number))
            for other, before in enumerate(self.launches):
                if other != number and self._comes_before(other, before, number, launch):
                    self._need("merge", number, Step("merge", other))

    def _comes_before(self, other: int, before: Launch, number: int, launch: Launch) -> bool:
        shared = set(before.heads.real) & set(launch.heads.real)
        return bool(shared) and (before.turn, other) < (launch.turn, number)

    # ---- what follows ----------------------------------------------------------------------------------------------

    @cached_property
    def order(self) -> tuple[Step, ...]:
        """All steps, each after what it needs; what leads to a side stream as early as it can."""
        early = {step for step, data in self.graph.nodes(data=True) if data["stream"] == "side"}
        early = early.union(*(nx.ancestors(self.graph, step) for step in early)) if early else early

        def key(step: Step) -> tuple[int, int, int, str]:
            turn = self.launches[step.of].turn if isinstance(step.of, int) else 0
            number = step.of if isinstance(step.of, int) else 0
            ops = PLANNING + ATTENDING
            return (step not in early, 0 if step.op in PLANNING else turn, number, f"{ops.index(step.op)} {step.of}")

        return tuple(nx.lexicographical_topological_sort(self.graph, key=key))

    @cached_property
    def planning(self) -> tuple[Step, ...]:
        """Steps that need no v."""
        return tuple(step for step in self.order if step.op in PLANNING)

    @cached_property
    def attending(self) -> tuple[Step, ...]:
        """Steps from k and v in slots to the output."""
        return tuple(step for step in self.order if step.op in ATTENDING)

    def stream(self, step: Step) -> str:
        """ "main" or "side"."""
        return self.graph.nodes[step]["stream"]

    def needs(self, step: Step) -> tuple[Step, ...]:
        return tuple(self.graph.predecessors(step))

    @cached_property
    def users(self) -> dict[Step, int]:
        """Step -> how many steps need it: its result may be let go after the last."""
        return dict(self.graph.out_degree())

    def lines(self) -> list[str]:
        """The graph for people, a line a step: what it is of, where it runs, what it needs."""
        name = {step: f"{step.op} {i}" for i, step in enumerate(self.order)}
        out = []
        for step in self.order:
            needs = ", ".join(name[other] for other in self.order if other in set(self.needs(step)))
            where = ", on a side stream" if self.stream(step) == "side" else ""
            out.append(f"{name[step]}: {self._of(step)}{where}" + (f" <- {needs}" if needs else ""))
        return out

    def _of(self, step: Step) -> str:
        if step.op == "estimate":
            return str(step.of[0])
        if step.op == "keys":
            launches = sorted(other.of for other in self.graph.successors(step))
            return f"launch{'es' if len(launches) > 1 else ''} {', '.join(map(str, launches))}"
        return f"launch {step.of}" if isinstance(step.of, int) else str(step.of)
