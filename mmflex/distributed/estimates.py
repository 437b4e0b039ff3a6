"""Which queries of a prompt its patterns select by, so that every rank estimates from the same ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ir.layout import TokenLayout
from ..ir.pattern import Pattern, Scope, Tokens, View
from ..ir.queries import QueryTokens
from ..runtime.calls import TILE
from ..runtime.inputs import Spec
from .dealing import Dealing

LAST_QUERIES = 64
"""Queries for an estimator that does not say how many it looks at (``last_q``)."""


def estimate_tokens(
    patterns: tuple[Pattern, ...], layout: TokenLayout, dealing: Dealing, first: int = 0
) -> tuple[int, ...]:
    """The tokens, ascending, whose queries every rank needs to select what one process would (kept with the layout;
    empty where nothing is estimated): of every modality that a pattern is restricted to, the last ones of every prompt;
    and for patterns that score blocks of queries, those blocks that a border between chunks divides.

    Args:
        dealing: of the tokens that have a query, the first of which is token ``first`` of the layout.
    """

    def build() -> tuple[int, ...]:
        wanted: dict[int | None, int] = {}
        tokens: set[int] = set()
        all_queries = QueryTokens(((first, first + dealing.total),))
        for pattern, scope in _leaves(patterns, layout):
            estimator: Any = pattern.estimator()
            if estimator is None:
                continue
            last = int(getattr(estimator, "last_q", LAST_QUERIES))
            wanted[scope.query] = max(last, wanted.get(scope.query, 0))
            if hasattr(estimator, "query_block"):
                size = estimator.query_block(View(layout, scope, all_queries, TILE))
                tokens.update(_divided_blocks(layout, scope, dealing, first, size))
        for modality, many in wanted.items():
            for row in layout.of(modality):
                tokens.update((np.flatnonzero(row[first:])[-many:] + first).tolist())
        return tuple(sorted(tokens))

    return layout.once(("tokens to estimate from", patterns, dealing, first), build)


def estimates_from_values(patterns: tuple[Pattern, ...], layout: TokenLayout) -> bool:
    """Whether a pattern selects by values too, so that planning waits for them (kept with the layout)."""
    return layout.once(
        ("estimates from values", patterns),
        lambda: any(getattr(pattern.estimator(), "values", False) for pattern, _ in _leaves(patterns, layout)),
    )


def check_whole_layers(
    patterns: tuple[Pattern, ...], layout: TokenLayout, heads: int, kv_heads: int, ranks: int
) -> None:
    """ValueError for a pattern that estimates from more heads of a layer together than each of ``ranks`` has, which
    share its ``heads`` and ``kv_heads``: it would select other sets than in one process."""

    def build() -> str:
        for pattern, _ in _leaves(patterns, layout):
            estimator: Any = pattern.estimator()
            if not getattr(estimator, "whole_layer", False):
                continue
            together = min(getattr(estimator, "kv_heads", kv_heads), kv_heads)
            if kv_heads % ranks or kv_heads // ranks % together:
                return f"{pattern} estimates from the heads of {together} KV heads together"
        return ""

    problem = layout.once(("heads estimated together", patterns, kv_heads, ranks), build) if ranks > 1 else ""
    if problem:
        raise ValueError(
            f"{problem}, but {ranks} ranks share the {heads} query heads and {kv_heads} KV heads of a layer: use "
            'scheme="keys" without tensor parallelism, under which every rank has all heads, or let fewer KV heads '
            "be taken together"
        )


def patterns_of(spec: Spec) -> tuple[Pattern, ...]:
    """The patterns of a spec, each once."""
    return (spec,) if isinstance(spec, Pattern) else tuple(dict.fromkeys(spec))


def _divided_blocks(layout: TokenLayout, scope: Scope, dealing: Dealing, first: int, size: int) -> set[int]:
    """Tokens in scope whose block of ``size`` queries has tokens on both sides of a border between chunks."""
    borders = [end + first for runs in dealing.runs for _, end in runs]
    tokens: set[int] = set()
    for inside, coordinate in zip(layout.of(scope.query), layout.coordinate(scope.query) // size, strict=True):
        places = np.flatnonzero(inside[first:]) + first
        blocks = coordinate[places]
        for number in np.searchsorted(places, borders):
            if 0 < number < len(places) and blocks[number - 1] == blocks[number]:
                tokens.update(places[blocks == blocks[number]].tolist())
    return tokens


def _leaves(patterns: tuple[Pattern, ...], layout: TokenLayout) -> list[tuple[Pattern, Scope]]:
    """The patterns that select for themselves, and their scopes."""
    tokens = Tokens(layout, TILE)
    for pattern in dict.fromkeys(patterns):
        pattern.denote(tokens)
    return list(tokens.leaves.values())
