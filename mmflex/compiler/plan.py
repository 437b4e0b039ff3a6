"""The program of a spec: which launches compute it, in which orders, from which sections, and why.

A program follows from (spec, layout, M, tile, what the backend can do) alone, is built once and kept with the layout.
What the input decides (sets, numbers, gathered rows and columns, block lists) is filled in by the runtime, step by step
along the program's graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import networkx as nx
import numpy as np
import sympy
from sympy.logic.boolalg import Boolean

from ..ir import expr as x
from ..ir.layout import MODALITY_NAMES, TokenLayout
from ..ir.pattern import Pattern, Scope, Tokens, denoted
from ..ir.shown import shown
from . import cost, predict
from .constants import GENERIC, Constants
from .orders import Order, bucket, key_order, row_order
from .until import until

INLINE_TILES = 1 << 18
"""Dense rows stay in the main launch while its block table has at most this many entries a head."""


@dataclass(frozen=True, eq=False)
class HeadMap:
    """Query heads of a launch, the same number for each of its KV heads (-1: none, an empty head)."""

    kv_heads: tuple[int, ...]
    heads: tuple[int, ...]

    @classmethod
    def of(cls, heads: Sequence[int], group: int) -> HeadMap:
        """The heads, padded so that every KV head they use serves equally many."""
        by_kv: dict[int, list[int]] = {}
        for h in sorted(heads):
            by_kv.setdefault(h // group, []).append(h)
        most = max(map(len, by_kv.values()))
        return cls(tuple(by_kv), tuple(h for found in by_kv.values() for h in found + [-1] * (most - len(found))))

    @property
    def group(self) -> int:
        return len(self.heads) // len(self.kv_heads)

    @cached_property
    def place(self) -> dict[int, int]:
        """Head -> its number in the launch."""
        return {h: i for i, h in enumerate(self.heads) if h >= 0}

    def all(self, heads: int) -> bool:
        """Whether these are all heads in order: q and k are used as they are."""
        return self.heads == tuple(range(heads))


@dataclass(frozen=True, eq=False)
class Part:
    """What one group of heads computes in a launch.

    Attributes:
        heads: query heads with the same expression.
        mask: which pairs, beside ``q >= k``, in the main section.
        columns: keys gathered into a section of their own, seen by every later query; false for none.
        until: int32 [B, key slots], the position up to which the main section shows a key (`until.until`): its section
            shows it from there on. None: what a head gathers, its main section does not show.
        chosen: queries gathered into rows of their own ("rows" launches), else true.
        classes: (f, g), the residue class of a query and of a key ("classes" launches), else None.
    """

    heads: tuple[int, ...]
    mask: Boolean
    columns: Boolean = sympy.false
    until: np.ndarray | None = None
    chosen: Boolean = sympy.true
    classes: tuple[sympy.Expr, sympy.Expr] | None = None


Kind = Literal["main", "rows", "classes", "dense"]

BESIDE = 1 << 15
"""Keys from which on work runs beside other work: the host takes longer to arrange less."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One call of the attention kernel.

    Attributes:
        kind: "main"; "rows": gathered queries that see everything and replace their output rows; "classes": both sides
            in residue-major order, merged by log-sum-exp; "dense": plain SDPA.
        rows, keys: the order of the queries and of the main key section.
        parts: what its heads compute.
        compare: every mask is the one comparison ``row >= limit``; else the part's mask is looked up as well.
        section: slots of a section of gathered columns (0: none).
        capacity: slots for gathered rows ("rows" launches).
        width: bound on the key blocks of a query block.
        cost: predicted, in full blocks over all heads.
    """

    kind: Kind
    rows: Order
    keys: Order
    parts: tuple[Part, ...]
    heads: HeadMap
    compare: bool
    section: int
    capacity: int
    width: int
    cost: float

    @property
    def label(self) -> str:
        names = {"main": "blocks", "rows": "gathered rows", "classes": "residue-major", "dense": "dense"}
        where = (
            "" if self.rows.label == self.keys.label == "natural" else f", {self.rows.label} x {self.keys.label} keys"
        )
        return names[self.kind] + where

    @cached_property
    def section_slot(self) -> dict[int, int]:
        """Head -> which of its KV head's sections is its own."""
        slot: dict[int, int] = {}
        group = self.heads.group
        with_columns = {h for part in self.parts if part.columns != sympy.false for h in part.heads}
        for first in range(0, len(self.heads.heads), group):
            own = [h for h in self.heads.heads[first : first + group] if h in with_columns]
            slot.update({h: i for i, h in enumerate(own)})
        return slot

    @cached_property
    def sections(self) -> int:
        """Sections of each KV head."""
        return 1 + max(self.section_slot.values(), default=-1)

    @cached_property
    def table_slot(self) -> dict[int, int]:
        """Head -> its section among those of all KV heads."""
        place, group = self.heads.place, self.heads.group
        return {h: place[h] // group * self.sections + slot for h, slot in self.section_slot.items()}

    def beside(self, length: int) -> bool:
        """Whether it runs beside the others, on a device that can, for that many keys: few queries that see much leave
        most of a device idle."""
        return self.kind == "rows" and length >= BESIDE

    @property
    def key_slots(self) -> int:
        return self.keys.slots + self.sections * self.section

    @property
    def row_slots(self) -> int:
        return self.capacity if self.kind == "rows" else self.rows.slots


@dataclass(frozen=True, eq=False)
class Group:
    """Heads with one pattern: its expression, and the lowerings that were weighed."""

    heads: tuple[int, ...]
    pattern: Pattern
    expr: Boolean
    weighed: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A pattern that selects for itself in a scope, for all heads that use it."""

    name: str
    pattern: Pattern
    scope: Scope
    heads: tuple[int, ...]


@dataclass(eq=False)
class Program:
    """See the module's docstring. ``graph``: steps as nodes ``(op, key)``, edges from what they need."""

    layout: TokenLayout
    queries: int
    heads: int
    kv_heads: int
    tile: int
    groups: tuple[Group, ...]
    leaves: dict[str, Leaf]
    launches: tuple[Launch, ...]
    graph: nx.DiGraph
    dense_cost: float
    memo: dict[Any, Any] = field(default_factory=dict)
    constants: Constants = GENERIC

    @property
    def cost(self) -> float:
        """Predicted cost in full blocks, over all heads."""
        return sum(launch.cost for launch in self.launches)

    def steps(self, stage: str) -> list[tuple[str, Any]]:
        """Steps of a stage ("plan" or "attend") in an order that respects the graph (cached)."""
        if stage not in self.memo:
            order = nx.lexicographical_topological_sort(self.graph, key=str)
            self.memo[stage] = [n for n in order if self.graph.nodes[n]["stage"] == stage]
        return self.memo[stage]


def build(
    spec: Sequence[Pattern],
    layout: TokenLayout,
    queries: int,
    kv_heads: int,
    tile: int,
    *,
    lse: bool,
    full_width: bool,
    constants: Constants = GENERIC,
) -> Program:
    """Lowers a spec (one pattern per query head).

    Args:
        lse: the backend returns log-sum-exp, so a head may be computed by two launches and merged.
        full_width: the backend wants index tables as wide as there are key blocks.
        constants: what blocks, launches and copies cost: orders are weighed by it.
    """
    group_size = len(spec) // kv_heads
    by_expr: dict[Boolean, tuple[Pattern, list[int]]] = {}
    leaves: dict[str, tuple[Pattern, Scope]] = {}
    for pattern in dict.fromkeys(spec):
        t = Tokens(layout, tile, leaves=leaves)
        expr = denoted(pattern, t)
        by_expr.setdefault(expr, (pattern, []))[1].extend(h for h, p in enumerate(spec) if p == pattern)
    groups: list[Group] = []
    pieces: list[Launch] = []
    for expr, (pattern, heads) in by_expr.items():
        options = _lowerings(expr, tuple(sorted(heads)), layout, queries, group_size, tile, lse, constants)
        label, best = min(options, key=lambda option: sum(piece.cost for piece in option[1]))
        weighed = [(label, sum(piece.cost for piece in found)) for label, found in options]
        weighed.sort(key=lambda entry: entry[0] != label)
        groups.append(Group(tuple(sorted(heads)), pattern, expr, tuple(weighed)))
        pieces.extend(best)
    launches = tuple(_finish(launch, full_width) for launch in _merge(pieces, group_size, constants))
    used = {
        name: Leaf(name, pattern, scope, tuple(h for g in groups if name in _leaves_of(g.expr) for h in g.heads))
        for name, (pattern, scope) in leaves.items()
        if any(name in _leaves_of(g.expr) for g in groups)
    }
    natural = cost.Tiles.between(layout, row_order(layout, queries, tile), key_order(layout, tile))
    dense = float(cost.causal(natural).sum() / max(1, layout.batch_size)) * len(spec) * constants.dense / constants.full
    program = Program(
        layout, queries, len(spec), kv_heads, tile, tuple(groups), used, launches, nx.DiGraph(), dense,
        constants=constants,
    )  # fmt: skip
    _link(program)
    return program


@lru_cache(maxsize=4096)
def names_of(expr: sympy.Basic) -> frozenset[str]:
    """Sets and numbers that an expression reads."""
    if isinstance(expr, x.Number):
        return frozenset({str(expr)})
    own = {x.set_name(expr)} if isinstance(expr, x.SETS) else ()
    return frozenset(own).union(*map(names_of, expr.args))


@lru_cache(maxsize=1024)
def _leaves_of(*exprs: sympy.Basic) -> frozenset[str]:
    return frozenset(name.split("@", 1)[1] for expr in exprs for name in names_of(expr))


def _link(program: Program) -> None:
    """Adds the steps: estimate -> select -> gather (and list) -> attend (and merge). Equal steps are one node."""
    graph = program.graph
    for name, leaf in program.leaves.items():
        graph.add_node(("select", name), stage="plan")
        estimator = leaf.pattern.estimator()
        if estimator is not None:
            if not callable(estimator) or type(estimator).__hash__ is None:
                raise TypeError(
                    f"{name}: estimator() returned {shown(estimator)}: return a frozen dataclass with a __call__ of "
                    "(q, k, view, scale), or None"
                )
            step = ("estimate", (estimator, leaf.scope))
            shared = graph.nodes[step]["heads"].heads if step in graph else ()
            heads = HeadMap.of(sorted({h for h in (*shared, *leaf.heads) if h >= 0}), program.heads // program.kv_heads)
            graph.add_node(step, stage="plan", heads=heads)
            graph.add_edge(step, ("select", name))
    for i, launch in enumerate(program.launches):
        graph.add_node(("attend", i), stage="attend")
        if i:  # merging and replacing rows come after what they merge with
            graph.add_edge(("attend", i - 1), ("attend", i))
        if launch.kind == "dense":
            continue
        graph.add_node(("gather", i), stage="plan")
        graph.add_edge(("gather", i), ("attend", i))
        read = [_leaves_of(part.mask, part.columns, part.chosen, *(part.classes or ())) for part in launch.parts]
        graph.add_edges_from((("select", name), ("gather", i)) for name in program.leaves if name in set().union(*read))


# ---- lowering one expression ---------------------------------------------------------------------------------------


def _lowerings(
    expr: Boolean,
    heads: tuple[int, ...],
    layout: TokenLayout,
    queries: int,
    group: int,
    tile: int,
    lse: bool,
    constants: Constants,
) -> list[tuple[str, list[Launch]]]:
    """The ways to compute an expression: rows and keys in natural or modality-major order."""
    natural = row_order(layout, queries, tile)
    if expr == sympy.true:
        tiles = cost.Tiles.between(layout, natural, key_order(layout, tile))
        return [("dense", [_launch("dense", tiles, Part(heads, expr), group, constants)])]
    mentioned = _mentioned(expr)
    row_choices, key_choices = ([False, True] if token in mentioned else [False] for token in (x.q, x.k))
    options = []
    for by_rows in row_choices:
        for by_keys in key_choices:
            tail = slice(layout.length - queries, None)
            present = [m for m in layout.modalities if layout.of(m)[:, tail].any()] if by_rows else [None]
            pieces = []
            for m in present:
                order = row_order(layout, queries, tile, m)
                tiles = cost.Tiles.between(layout, order, key_order(layout, tile, by_keys))
                inner = expr if m is None else _assume(expr, x.q, m)
                pieces += _pieces(inner, heads, tiles, group, lse, constants)
            label = f"{'modality-major' if by_rows else 'natural'} queries, "
            options.append((label + f"{'modality-major' if by_keys else 'natural'} keys", pieces))
    return options


@lru_cache(maxsize=1024)
def _mentioned(expr: Boolean) -> frozenset[sympy.Symbol]:
    """Which of q and k an expression asks for what modality-major order has side by side."""
    return frozenset().union(*map(x.sides, expr.atoms(x.Modality, x.Rank, x.FirstTile)))


@lru_cache(maxsize=1024)
def _assume(expr: Boolean, token: sympy.Symbol, modality: int) -> Boolean:
    """The expression where a token is known to be of a modality."""
    found = expr.atoms(sympy.Eq)
    known = {e: sympy.true if e.rhs == modality else sympy.false for e in found if e.lhs == x.Modality(token)}
    return expr.xreplace(known)


def _pieces(
    expr: Boolean, heads: tuple[int, ...], tiles: cost.Tiles, group: int, lse: bool, constants: Constants
) -> list[Launch]:
    """Launches that together compute an expression with these rows."""
    layout, tile, n = tiles.layout, tiles.rows.tile, tiles.layout.length
    columns, rows, classes, rest = [], [], [], []
    for term in cost.terms(expr):
        side = x.sides(term)
        fixed = cost.tile_constant(term, tiles)
        if side == {x.k} and not fixed and cost.count(term, layout) <= n // 2:
            columns.append(term)
        elif side == {x.q} and not (fixed and tiles.row_tiles * tiles.key_tiles <= INLINE_TILES):
            rows.append(term)
        elif lse and cost.class_pair(term) is not None:
            classes.append(term)
        else:
            rest.append(term)
    out = []
    if rows and cost.count(x.any_of(*rows), layout) > max(tile, tiles.rows.tokens // 2):
        rest, rows = rest + rows, []
    gathered = x.any_of(*columns)
    if classes and _class_cost(classes, tiles, constants) > _looked_up_cost(classes, tiles, constants):
        rest, classes = rest + classes, []
    main = x.any_of(*rest)
    if main != sympy.false or columns:
        out.append(_main(Part(heads, main, gathered), tiles, group, constants))
    if rows:
        out.append(_rows(Part(heads, sympy.true, chosen=x.any_of(*rows)), tiles, group, constants))
    done: list[Boolean] = [main, gathered]
    for term in classes:
        pair = cost.class_pair(term)
        assert pair is not None
        part = Part(heads, x.all_of(term, ~x.any_of(*done)), classes=pair)
        out.append(_launch("classes", tiles, part, group, constants, width=_class_width(pair, tiles), compare=False))
        done.append(term)
    return out


def _launch(
    kind: Kind,
    tiles: cost.Tiles,
    part: Part,
    group: int,
    constants: Constants,
    width: int = 0,
    compare: bool = True,
    section: int = 0,
    capacity: int = 0,
) -> Launch:
    heads = HeadMap.of(part.heads, group)
    launch = Launch(kind, tiles.rows, tiles.keys, (part,), heads, compare, section, capacity, width, 0.0)
    return replace(launch, cost=predict.blocks(launch, tiles.layout, constants))


def _main(part: Part, tiles: cost.Tiles, group: int, constants: Constants) -> Launch:
    tile = tiles.rows.tile
    compare = cost.tile_constant(part.mask, tiles)
    section = 0
    if part.columns != sympy.false:
        part = replace(part, until=until(part.mask, tiles) if compare else None)
        section = bucket(cost.count(part.columns, tiles.layout), tile)
    width = int(cost.touched(part.mask, tiles).max(initial=0)) + section // tile
    return _launch("main", tiles, part, group, constants, width, compare=compare, section=section)


def _rows(part: Part, tiles: cost.Tiles, group: int, constants: Constants) -> Launch:
    tile = tiles.rows.tile
    count = min(cost.count(part.chosen, tiles.layout), tiles.rows.tokens)
    capacity = bucket(count, tile)
    return _launch("rows", tiles, part, group, constants, tiles.key_tiles, capacity=capacity)


def _stride(residue: sympy.Mod) -> int:
    """The least value that a modulus may take."""
    s = residue.args[1]
    return max(1, int(s) if s.is_Integer else int(getattr(s, "at_least", 1)))


def _class_width(pair: tuple[sympy.Expr, sympy.Expr], tiles: cost.Tiles) -> int:
    """At most how many key tiles a tile of queries meets in residue-major order.

    A tile of t of M queries holds up to t * s / M + 2 classes of ``N / s + 1`` keys each, side by side: that many keys
    are bounded whatever the stride s turns out to be. It takes both sides to run without gaps; else all tiles.
    """
    tile, m, n = tiles.rows.tile, tiles.rows.tokens, tiles.keys.tokens
    for residue, token, order in zip(pair, (x.q, x.k), (tiles.rows, tiles.keys), strict=True):
        if _gaps(next(iter(residue.atoms(x.Rank)), token), order, tiles):
            return tiles.key_tiles
    met = tile * n // max(1, m) + 2 * n // _stride(pair[1]) + tile + 2
    return min(tiles.key_tiles, -(-met // tile) + 1)


def _gaps(leaf: sympy.Basic, order: Order, tiles: cost.Tiles) -> bool:
    """Whether a coordinate does not count all tokens of an order one by one."""

    def find() -> bool:
        value, real = order.attribute(leaf, tiles.layout), order.index >= 0
        steps = np.diff(value, axis=1)[real[:, 1:] & real[:, :-1]]
        return bool((steps != 1).any() or real.sum(1).min() < order.tokens)

    return tiles.once(("gaps", leaf), find)


def _class_cost(terms: list[Boolean], tiles: cost.Tiles, prices: Constants) -> float:
    """Milliseconds of residue classes in launches of their own, for one head."""
    total = 0.0
    for term in terms:
        pair = cost.class_pair(term)
        assert pair is not None
        per_class = tiles.keys.tokens / _stride(pair[1]) / tiles.rows.tile
        copied = 2 * tiles.key_tiles + 5 * tiles.row_tiles
        total += tiles.row_tiles * (per_class / 2 * prices.looked_full + 2 * prices.lookup) + copied * prices.moved
        total += 2 * prices.launch
    return total


def _looked_up_cost(terms: list[Boolean], tiles: cost.Tiles, prices: Constants) -> float:
    """Of the same in the main launch, where about every block that they touch is partial."""
    share = 0.0
    for term in terms:
        pair = cost.class_pair(term)
        assert pair is not None
        share += (2 * tiles.rows.tile - 1) / _stride(pair[1])
    blocks = int(tiles.rows.real.sum()) * int(tiles.keys.real.sum(1).max(initial=0))
    return min(1.0, share) * blocks / 2 * prices.lookup


# ---- joining launches ----------------------------------------------------------------------------------------------


def _merge(pieces: list[Launch], group: int, constants: Constants) -> list[Launch]:
    """Launches of the same kind, orders and a mask of one comparison become one; so do the dense heads."""
    out: dict[Any, list[Launch]] = {}
    for i, piece in enumerate(pieces):
        alone = None if piece.compare else i
        out.setdefault((piece.kind, id(piece.rows), id(piece.keys), alone), []).append(piece)
    merged = []
    for found in out.values():
        parts = tuple(part for piece in found for part in piece.parts)
        heads = HeadMap.of([h for part in parts for h in part.heads], group)
        widest = {f: max(getattr(piece, f) for piece in found) for f in ("section", "capacity", "width")}
        price = sum(piece.cost for piece in found) - constants.launch / constants.full * (len(found) - 1)
        merged.append(replace(found[0], parts=parts, heads=heads, cost=price, **widest))
    order = {"main": 0, "dense": 1, "classes": 2, "rows": 3}
    return sorted(merged, key=lambda launch: order[launch.kind])


def _finish(launch: Launch, full_width: bool) -> Launch:
    """Widths rounded up so that like inputs share kernels."""
    tiles = launch.key_slots // launch.rows.tile
    width = tiles if full_width else min(tiles, bucket(max(1, launch.width), 1))
    return replace(launch, width=width)


def describe_modalities(layout: TokenLayout) -> str:
    """Modalities of a layout with their token counts, for people."""
    count = {MODALITY_NAMES[m]: int(np.sum(layout.of(m))) for m in layout.modalities}
    return ", ".join(f"{n} {name}" for name, n in count.items()) or "no tokens"
