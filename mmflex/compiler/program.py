"""The program of a spec: what will be computed, before any input is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sympy.logic.boolalg import Boolean

from ..ir.layout import TokenLayout
from ..ir.memo import Memo
from ..ir.pattern import Estimator, Pattern, Scope
from ..ir.queries import QueryTokens
from ..ir.shown import shown
from .constants import GENERIC, Constants
from .graph import PlanGraph
from .launches import DenseLaunch, HeadMap, Launch


@dataclass(frozen=True, eq=False)
class Alternative:
    """One way to compute a group of heads: its label and its predicted cost in full blocks."""

    label: str
    cost: float


@dataclass(frozen=True, eq=False)
class Group:
    """Query heads with one expression.

    Attributes:
        heads: of the layer. pattern: one that denotes the expression.
        expr: which pairs they see, beside ``q >= k`` and padding: the whole truth about them.
        alternatives: the orders that were weighed, the chosen one first.
    """

    heads: tuple[int, ...]
    pattern: Pattern
    expr: Boolean
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A pattern that selects for itself, in a scope, for all heads that use it.

    Its sets and numbers are named ``"<name in the mask>@<name of the leaf>"`` in expressions.
    """

    name: str
    pattern: Pattern
    scope: Scope
    heads: tuple[int, ...]

    @cached_property
    def estimator(self) -> Estimator | None:
        """TypeError for what cannot be called, or not be told from others: equal ones are run once."""
        estimator = self.pattern.estimator()
        if estimator is None:
            return None
        if not callable(estimator) or type(estimator).__hash__ is None or estimator != self.pattern.estimator():
            raise TypeError(
                f"{self.name}: estimator() returned {shown(estimator)}: return a frozen dataclass with a __call__ of "
                "(q, k, view, scale), or None"
            )
        return estimator


@dataclass(eq=False)
class Program:
    """The launches that compute a spec, and the steps that lead to them.

    A program follows from the spec, the layout, which tokens the queries are, the block size and what the backend can
    do; never from tensors. It is built once and kept with the layout. What the input decides (sets and numbers,
    gathered rows and keys, block lists) is filled in by the runtime, step by step along the graph.

    Slots, sections, limits
        A launch sees tokens in *slots*: the query slots of a head and the key slots of a KV head, in whole tiles. Key
        slots are the main section (all keys in the launch's order) and behind it the gathered sections. Every key slot
        has a *limit*, the position from which on queries see it: the key's own position in the main section, or
        `orders.NEVER` where this head has gathered the key elsewhere or the slot is empty. ``position of the query >=
        limit[key slot]`` is then causality, holes and gathered keys in one comparison.

    Attributes:
        layout: the tokens. queries: which of them have a query.
        heads, kv_heads: of the layer. tile: block size in tokens.
        groups: heads by expression. leaves: by name, the patterns that select.
        launches: in the order in which their rows enter the output.
        graph: the steps.
        dense_cost: predicted cost of all heads dense, in full blocks.
        constants: prices by which orders were weighed.
        memo: what follows from the program and is kept: constants on devices, captured graphs.
    """

    layout: TokenLayout
    queries: QueryTokens
    heads: int
    kv_heads: int
    tile: int
    groups: tuple[Group, ...]
    leaves: dict[str, Leaf]
    launches: tuple[Launch, ...]
    dense_cost: float
    constants: Constants = GENERIC
    memo: Memo = field(default_factory=lambda: Memo(1024))
    graph: PlanGraph = field(init=False)
    estimates: tuple[tuple[Estimator, Scope, HeadMap], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.graph = PlanGraph(self.launches, self.leaves, self.layout)
        heads: dict[tuple[Estimator, Scope], set[int]] = {}
        for leaf in self.leaves.values():
            if leaf.estimator is not None:
                whole = getattr(leaf.estimator, "whole_layer", False)
                heads.setdefault((leaf.estimator, leaf.scope), set()).update(range(self.heads) if whole else leaf.heads)
        self.estimates = tuple(
            (estimator, scope, _estimated(tuple(own), self.heads // self.kv_heads))
            for (estimator, scope), own in heads.items()
        )

    @property
    def cost(self) -> float:
        """Predicted cost in full blocks, over all heads."""
        return sum(launch.cost for launch in self.launches)

    @cached_property
    def is_dense(self) -> bool:
        """Whether all heads are dense: every launch is PyTorch's own attention."""
        return all(isinstance(launch, DenseLaunch) for launch in self.launches)

    def once(self, key: Any, build: Callable[[], Any]) -> Any:
        """What ``build`` returns, kept in `memo`."""
        return self.memo.once(key, build)


def _estimated(heads: tuple[int, ...], group: int) -> HeadMap:
    """The heads that an estimator looks at: neighbours of them too, where q and k are then views and it is little
    more."""
    few, neighbours = HeadMap.of(heads, group), HeadMap.span(heads, group)
    return neighbours if len(neighbours.heads) <= 2 * len(few.heads) else few
