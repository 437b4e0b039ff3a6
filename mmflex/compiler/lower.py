"""From a spec to a program: which launches compute each head's expression, in which orders, and which are joined.

A head's expression comes apart into terms (`mmflex.compiler.terms`), and each term goes where it is cheapest:

- a term that reads the key alone is a set of *gathered keys*, a section behind the others;
- one that reads the query alone is a set of *gathered rows*, in a launch of their own that replaces output rows;
- one that asks for equal residues of query and key gets a launch in residue-major order, if launches can be merged;
- the rest stays in the main section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy
from sympy.logic.boolalg import Boolean

from ..ir import expr as x
from ..ir.layout import MODALITY_NAMES, TokenLayout
from ..ir.pattern import Pattern, Scope, Tokens, denoted
from ..ir.queries import QueryTokens
from ..ir.shown import shown
from .constants import GENERIC, Constants
from .launches import BlockLaunch, DenseLaunch, GatheredRows, HeadMap, Launch, Part, ResidueLaunch
from .orders import TokenOrder, bucket, key_order, row_order
from .prices import cost_in_blocks
from .program import Alternative, Group, Leaf, Program
from .reach import causal_tiles, last_visible, touched_at_most
from .terms import assume_modality, by_modality, residue_pair, selecting_leaves, terms
from .tiles import Tiles, count_at_most, least_modulus

INLINE_ENTRIES = 1 << 18
"""Rows that see everything stay in the main launch while its block table has at most this many entries a head."""


@dataclass(frozen=True)
class Lowering:
    """Which of the exact ways to compute a spec is taken, for tests and experts; by default what the cost model
    prefers.

    Attributes:
        queries, keys: "natural" or "modality-major" order, where the expression has a use for the latter; None: the
            cheapest.
        gather_rows: rows that see everything are always gathered, if they are few. None: where they are cheaper so.
        residue_launches: equal residues always (True) or never (False) get a launch of their own. None: where it is
            cheaper. They need a backend with log-sum-exp.
    """

    queries: str | None = None
    keys: str | None = None
    gather_rows: bool | None = None
    residue_launches: bool | None = None

    def __post_init__(self) -> None:
        for side in ("queries", "keys"):
            value = getattr(self, side)
            if value not in (None, "natural", "modality-major"):
                raise ValueError(
                    f"Lowering.{side} is {shown(value)}: use 'natural', 'modality-major' or None for the cheapest"
                )

    def orders(self, side: str, benefits: bool) -> tuple[bool, ...]:
        """Whether tokens of a side stand modality by modality: the choices."""
        wanted = getattr(self, side)
        if not benefits:
            return (False,)
        return (False, True) if wanted is None else (wanted == "modality-major",)


@dataclass(frozen=True)
class _Context:
    """What lowering one expression goes by."""

    layout: TokenLayout
    queries: QueryTokens
    group: int
    kv_heads: int
    tile: int
    lse: bool
    constants: Constants
    lowering: Lowering

    def places(self, kind: type[Launch], heads: Sequence[int], rows: TokenOrder) -> HeadMap:
        return kind.map_heads(heads, rows, self.group, self.kv_heads)

    def priced(self, launch: Launch) -> Launch:
        return replace(launch, cost=cost_in_blocks(launch, self.layout, self.constants))


def lower(
    spec: Sequence[Pattern],
    layout: TokenLayout,
    queries: QueryTokens,
    kv_heads: int,
    tile: int,
    *,
    lse: bool,
    full_width: bool,
    constants: Constants = GENERIC,
    lowering: Lowering | None = None,
) -> Program:
    """The program of a spec.

    Args:
        spec: one pattern per query head.
        layout: the N tokens. queries: which of them the M queries are.
        kv_heads: of the layer. tile: block size in tokens.
        lse: the backend returns log-sum-exp, so a head may be computed by two launches and merged.
        full_width: the backend wants index tables as wide as there are key blocks.
        constants: what blocks, launches and copies cost: orders are weighed by it.
        lowering: which orders and launches to take, whatever they cost.
    """
    context = _Context(layout, queries, len(spec) // kv_heads, kv_heads, tile, lse, constants, lowering or Lowering())
    heads_of: dict[Boolean, tuple[Pattern, list[int]]] = {}
    selecting: dict[str, tuple[Pattern, Scope]] = {}
    for pattern in dict.fromkeys(spec):
        expr = denoted(pattern, Tokens(layout, tile, leaves=selecting))
        heads_of.setdefault(expr, (pattern, []))[1].extend(h for h, p in enumerate(spec) if p == pattern)
    groups: list[Group] = []
    launches: list[Launch] = []
    for expr, (pattern, members) in heads_of.items():
        heads = tuple(sorted(members))
        ways = _ways(expr, heads, context)
        costs = [sum(launch.cost for launch in way) for _, way in ways]
        best = int(np.argmin(costs))
        order = sorted(range(len(ways)), key=lambda i: i != best)
        groups.append(Group(heads, pattern, expr, tuple(Alternative(ways[i][0], costs[i]) for i in order)))
        launches.extend(ways[best][1])
    joined = tuple(_with_width(launch, full_width) for launch in _joined(launches, context))
    leaves = {}
    for name, (pattern, scope) in selecting.items():
        users = tuple(h for group in groups if name in selecting_leaves(group.expr) for h in group.heads)
        if users:
            leaves[name] = Leaf(name, pattern, scope, users)
    natural = Tiles.between(layout, row_order(layout, queries, tile), key_order(layout, tile))
    causal = float(causal_tiles(natural).sum() / max(1, layout.batch_size))
    dense_cost = causal * len(spec) * constants.dense / constants.full
    return Program(
        layout, queries, len(spec), kv_heads, tile, tuple(groups), leaves, joined, dense_cost, constants
    )  # fmt: skip


# ---- one expression --------------------------------------------------------------------------------------------------


def _ways(expr: Boolean, heads: tuple[int, ...], context: _Context) -> list[tuple[str, list[Launch]]]:
    """(label, launches) of the ways to compute an expression: queries and keys in natural or modality-major order."""
    layout, queries, tile = context.layout, context.queries, context.tile
    if expr == sympy.true:
        rows, keys = row_order(layout, queries, tile), key_order(layout, tile)
        launch = DenseLaunch(rows, keys, (Part(heads, expr),), context.places(DenseLaunch, heads, rows))
        return [("dense", [context.priced(launch)])]
    benefits = by_modality(expr)
    ways = []
    for rows_by_modality in context.lowering.orders("queries", x.q in benefits):
        for keys_by_modality in context.lowering.orders("keys", x.k in benefits):
            scopes: list[int | None] = [None]
            if rows_by_modality:
                scopes = [m for m in layout.modalities if queries.take(layout.of(m)).any()]
            launches: list[Launch] = []
            for m in scopes:
                order = row_order(layout, queries, tile, m)
                tiles = Tiles.between(layout, order, key_order(layout, tile, keys_by_modality))
                launches += _launches(expr if m is None else assume_modality(expr, x.q, m), heads, tiles, context)
            names = ["modality-major" if yes else "natural" for yes in (rows_by_modality, keys_by_modality)]
            ways.append((f"{names[0]} queries, {names[1]} keys", launches))
    return ways


def _launches(expr: Boolean, heads: tuple[int, ...], tiles: Tiles, context: _Context) -> list[Launch]:
    """Launches that together compute an expression with these orders."""
    layout, lowering = tiles.layout, context.lowering
    gathered_keys, rows, residues, rest = [], [], [], []
    for term in terms(expr):
        side, constant = x.sides(term), tiles.constant_on_blocks(term)
        if side == {x.k} and not constant and count_at_most(term, layout) <= layout.length // 2:
            gathered_keys.append(term)
        elif side == {x.q} and not (constant and _inlines_rows(tiles, lowering)):
            rows.append(term)
        elif context.lse and lowering.residue_launches is not False and residue_pair(term) is not None:
            residues.append(term)
        else:
            rest.append(term)
    if rows and count_at_most(x.any_of(*rows), layout) > max(tiles.rows.tile, tiles.rows.tokens // 2):
        rest, rows = rest + rows, []
    if residues and not _residues_pay(residues, tiles, context):
        rest, residues = rest + residues, []
    main, columns = x.any_of(*rest), x.any_of(*gathered_keys)
    out: list[Launch] = []
    if main != sympy.false or gathered_keys:
        out.append(_blocks(Part(heads, main, columns), tiles, context))
    if rows:
        out.append(_gathered_rows(Part(heads, sympy.true, gathered_queries=x.any_of(*rows)), tiles, context))
    computed: list[Boolean] = [main, columns]
    for term in residues:
        pair = residue_pair(term)
        part = Part(heads, x.all_of(term, ~x.any_of(*computed)), residues=pair)
        out.append(_residue(part, tiles, context))
        computed.append(term)
    return out


def _inlines_rows(tiles: Tiles, lowering: Lowering) -> bool:
    """Whether rows that see everything, in whole tiles, may stay in the main launch."""
    return not lowering.gather_rows and tiles.row_tiles * tiles.key_tiles <= INLINE_ENTRIES


def _blocks(part: Part, tiles: Tiles, context: _Context) -> Launch:
    tile_constant, section = tiles.constant_on_blocks(part.mask), 0
    if part.gathered_keys != sympy.false:
        part = replace(part, visible_until=last_visible(part.mask, tiles) if tile_constant else None)
        section = bucket(count_at_most(part.gathered_keys, tiles.layout), context.tile)
    width = int(touched_at_most(part.mask, tiles).max(initial=0)) + section // context.tile
    heads = context.places(BlockLaunch, part.heads, tiles.rows)
    return context.priced(
        BlockLaunch(tiles.rows, tiles.keys, (part,), heads, width, section=section, tile_constant=tile_constant)
    )


def _gathered_rows(part: Part, tiles: Tiles, context: _Context) -> Launch:
    count = min(count_at_most(part.gathered_queries, tiles.layout), tiles.rows.tokens)
    heads, capacity = context.places(GatheredRows, part.heads, tiles.rows), bucket(count, context.tile)
    return context.priced(GatheredRows(tiles.rows, tiles.keys, (part,), heads, tiles.key_tiles, capacity=capacity))


# ---- residues --------------------------------------------------------------------------------------------------------


def _residue(part: Part, tiles: Tiles, context: _Context) -> Launch:
    assert part.residues is not None
    heads, width = context.places(ResidueLaunch, part.heads, tiles.rows), _residue_width(part.residues, tiles)
    return context.priced(ResidueLaunch(tiles.rows, tiles.keys, (part,), heads, width))


def _residue_width(pair: tuple[sympy.Expr, sympy.Expr], tiles: Tiles) -> int:
    """At most how many key tiles a tile of queries meets in residue-major order.

    A tile of t of M queries holds up to t * s / M + 2 residues, of ``N / s + 1`` keys each, side by side: a bound
    that holds whatever the stride s turns out to be. Both sides must run without gaps; else all tiles.
    """
    tile, m, n = tiles.rows.tile, tiles.rows.tokens, tiles.keys.tokens
    for residue, token, order in zip(pair, (x.q, x.k), (tiles.rows, tiles.keys), strict=True):
        if tiles.has_gaps(next(iter(residue.atoms(x.Rank)), token), order):
            return tiles.key_tiles
    met = tile * n // max(1, m) + 2 * n // least_modulus(pair[1]) + tile + 2
    return min(tiles.key_tiles, -(-met // tile) + 1)


def _residues_pay(residues: list[Boolean], tiles: Tiles, context: _Context) -> bool:
    """Whether, for one head, separate launches are cheaper than looking residues up in the main launch, where nearly
    every block that they touch is partial."""
    if context.lowering.residue_launches is not None:
        return context.lowering.residue_launches
    prices, own, share = context.constants, 0.0, 0.0
    for term in residues:
        pair: Any = residue_pair(term)
        stride = least_modulus(pair[1])
        of_residue = tiles.keys.tokens / stride / tiles.rows.tile
        copied = 2 * tiles.key_tiles + 5 * tiles.row_tiles
        own += tiles.row_tiles * (of_residue / 2 * prices.looked_full + 2 * prices.lookup) + copied * prices.moved
        own += 2 * prices.launch
        share += (2 * tiles.rows.tile - 1) / stride
    blocks = int(tiles.rows.occupied.sum()) * int(tiles.keys.occupied.sum(1).max(initial=0))
    return own <= min(1.0, share) * blocks / 2 * prices.lookup


# ---- joining launches ------------------------------------------------------------------------------------------------


def _joined(launches: list[Launch], context: _Context) -> list[Launch]:
    """Joins launches of one kind with the same orders whose masks are one comparison (those of dense heads
    included)."""
    alike: dict[Any, list[Launch]] = {}
    for i, launch in enumerate(launches):
        alone = None if launch.compares else i
        alike.setdefault((type(launch), id(launch.rows), id(launch.keys), alone), []).append(launch)
    out = []
    for members in alike.values():
        parts = tuple(part for launch in members for part in launch.parts)
        heads = context.places(type(members[0]), [h for part in parts for h in part.heads], members[0].rows)
        saved = context.constants.launch / context.constants.full * (len(members) - 1)
        facts: dict[str, Any] = {"width": max(launch.width for launch in members)}
        for name in ("section", "capacity"):
            sizes = [getattr(launch, name) for launch in members if hasattr(launch, name)]
            facts |= {name: max(sizes)} if sizes else {}
        cost = sum(launch.cost for launch in members) - saved
        out.append(replace(members[0], parts=parts, heads=heads, cost=cost, **facts))
    return sorted(out, key=lambda launch: launch.turn)


def _with_width(launch: Launch, full_width: bool) -> Launch:
    """Widths rounded up so that like inputs share kernels."""
    tiles = launch.key_slots // launch.rows.tile
    return replace(launch, width=tiles if full_width else min(tiles, bucket(max(1, launch.width), 1)))


def modality_counts(layout: TokenLayout) -> str:
    """Modalities of a layout with their token counts, for people."""
    counts = {MODALITY_NAMES[m]: int(np.sum(layout.of(m))) for m in layout.modalities}
    return ", ".join(f"{n} {name}" for name, n in counts.items()) or "no tokens"
