"""What a pattern costs a head, by planning it: kernel time and density from its block lists."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..compiler.constants import constants_for
from ..compiler.lower import lower
from ..compiler.prices import attend_ms, expected_work, moving_ms, overlaps
from ..compiler.program import Program
from ..ir.layout import TokenLayout
from ..ir.pattern import Dense, Pattern
from ..ir.queries import QueryTokens
from ..runtime import backends
from ..runtime.kernels.lists import listed_eagerly
from ..runtime.planning import prepare
from ..runtime.state import PlanState
from .cost import listed
from .probe import Layer

_STEADY = 0.2
"""A pattern whose heads differ less than this from their mean has that mean as its price, in all layers."""


@dataclass(frozen=True, eq=False)
class Price:
    """float64 [H] twice: predicted milliseconds of each head's share of the layer's kernels, and its density (pairs in
    computed blocks over causal pairs).

    Planning is left out: the heads of a layer share it, and it does not grow with the prompt as kernels do.
    """

    ms: np.ndarray
    density: np.ndarray


def price(state: PlanState) -> Price:
    """What each head costs, from the block lists of a plan's state (reads their lengths back)."""
    program, tile = state.program, state.program.tile
    constants, layout = program.constants, program.layout
    ms, pairs = np.zeros((2, program.heads))
    causal = float((program.queries.take(layout.position[0]) + 1.0).clip(min=0).sum())
    expected = expected_work(program, 1)
    for number, launch in enumerate(program.launches):
        heads = np.array(launch.heads.heads)
        own = heads >= 0
        if not launch.lists_blocks:
            tiles = -(-program.queries.count // tile)
            each, blocks = np.full(len(heads), causal), tiles * (tiles + 1) / 2
            work = replace(expected[number], dense=blocks * own.sum())
        else:
            lists = state.prepared[number].lists
            work = listed(expected[number], lists)
            each = (lists.partial_count + lists.full_count)[0].sum(-1).cpu().numpy() * float(tile * tile)
        aside = overlaps(launch, layout, constants)
        total = attend_ms(work, constants, tile, aside) + moving_ms(work, constants, tile)
        share = each[own] / each[own].sum() if each[own].any() else 1.0 / own.sum()
        ms[heads[own]] += total * share
        pairs[heads[own]] += each[own]
    return Price(ms, pairs / max(causal, 1.0))


@dataclass(eq=False)
class Prices:
    """Prices of patterns for all heads of a layer.

    Most cost the same in every layer and are priced on the first one. Those whose cost depends on what heads attend to
    (`Pattern.as_needed`, searched strides) are priced anew on every layer that `move_to` names: the heads of the first
    layer, often all diffuse, do not tell what such a pattern costs in others.
    """

    layer: Layer
    backend: str
    dense: Price = field(init=False)
    _layout: TokenLayout = field(init=False)
    _steady: dict[Pattern, Price] = field(default_factory=dict)
    _here: dict[Pattern, Price] = field(default_factory=dict)
    _programs: dict[Pattern, Program] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = self.layer.layout  # programs stay with their layout: give those of candidates one of their own
        self._layout = TokenLayout(own.position, own.modality, own.segment, own.frame, own.cell)
        self.dense = self.of(Dense())

    def move_to(self, layer: Layer) -> None:
        """Price for another layer of the same model and prompt from here on."""
        if layer is not self.layer:
            self.layer, self._here = layer, {}

    def of(self, pattern: Pattern) -> Price:
        """What the pattern costs each head. ValueError where it makes no sense with the layout."""
        if pattern in self._steady:
            return self._steady[pattern]
        if pattern not in self._here:
            program = self._programs.pop(pattern, None) or self._built(pattern)
            found = price(self._listed(program))
            mean = max(float(found.density.mean()), 1e-12)
            as_needed = any(leaf.pattern.as_needed for leaf in program.leaves.values())
            if not as_needed and float(np.abs(found.density - mean).max()) <= _STEADY * mean:
                even = Price(*(np.full(len(x), x.mean()) for x in (found.ms, found.density)))
                self._steady[pattern] = even
                return even
            self._here[pattern], self._programs[pattern] = found, program
        return self._here[pattern]

    def _built(self, pattern: Pattern) -> Program:
        layer, q = self.layer, self.layer.q
        runs = backends.resolve(self.backend, q.device, q.shape[3], q.dtype)
        constants = constants_for(q.device, runs.name, q.dtype, q.shape[3])
        queries = QueryTokens.last(q.shape[2], self._layout.length)
        can: Any = {"lse": runs.lse, "full_width": runs.full_width, "constants": constants}
        return lower((pattern,) * layer.heads, self._layout, queries, layer.kv_heads, layer.tile, **can)

    def _listed(self, program: Program) -> PlanState:
        """Block lists, from the layer's own estimates and selections."""
        state = PlanState(program, self.layer.q.device, 1)
        self.layer.select({name: (leaf.pattern, leaf.scope) for name, leaf in program.leaves.items()})
        state.selections = {
            name: table for name, table in self.layer.found.items() if name.split("@", 1)[1] in program.leaves
        }
        with listed_eagerly():
            prepare(state)
        return state
