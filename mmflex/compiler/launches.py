"""Launches: the calls of the attention kernel that a program makes. Four kinds, each of which says here what it holds
and what it is expected to do; how it gathers, attends and merges stands in `mmflex.runtime.launches`.

=================  =====================================================================================================
`BlockLaunch`      query tiles against listed key tiles, with keys gathered into sections behind the others
`GatheredRows`     the few queries that see every key, gathered; their rows replace those of other launches
`ResidueLaunch`    both sides sorted by residue, so that ``q = k (mod s)`` is near the diagonal; merged by log-sum-exp
`DenseLaunch`      heads that see everything: PyTorch's own attention
=================  =====================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import sympy
from sympy.logic.boolalg import Boolean

from ..ir import expr as x
from ..ir.atoms import UNBOUNDED, Expectation, expected_modulus
from ..ir.layout import TokenLayout
from .orders import NEVER, TokenOrder
from .reach import causal_tiles, expected_together
from .terms import causal_once, residue_pair, terms
from .tiles import Tiles, chance_per_tile, population

SIDE_STREAM_KEYS = 1 << 15
"""Keys from which on a launch that leaves the device idle runs on a side stream: below, host overhead exceeds the
gain."""

Counts = tuple[np.ndarray, np.ndarray]
"""Blocks of each query tile [B, tiles]: touched, and full among them."""


@dataclass(frozen=True, eq=False)
class HeadMap:
    """The query heads of a launch, the same number for each of its KV heads.

    Kernels expect equally many consecutive query heads for every KV head, so KV heads that serve fewer are padded with
    empty ones. An empty head lists no block and costs next to nothing: where it saves a copy of q, k and v, a launch
    takes a range of heads as it lies in memory and leaves those of other launches empty.

    Attributes:
        kv_heads: KV heads of the layer that take part.
        heads: query heads of the layer in launch order, those of the first KV head first; -1 for an empty one.
    """

    kv_heads: tuple[int, ...]
    heads: tuple[int, ...]

    @classmethod
    def of(cls, heads: Sequence[int], group: int) -> HeadMap:
        """The map of some heads of a layer whose KV heads serve ``group`` query heads each, with as few empty ones as
        possible."""
        by_kv: dict[int, list[int]] = {}
        for h in sorted(heads):
            by_kv.setdefault(h // group, []).append(h)
        most = max(map(len, by_kv.values()))
        return cls(tuple(by_kv), tuple(h for own in by_kv.values() for h in own + [-1] * (most - len(own))))

    @classmethod
    def span(cls, heads: Sequence[int], group: int, kv_heads: int | None = None) -> HeadMap:
        """The map of some heads that keeps them at their places in the layer: over all ``kv_heads``, or (None) from
        their first KV head to their last."""
        first, end = (min(heads) // group, max(heads) // group + 1) if kv_heads is None else (0, kv_heads)
        own = set(heads)
        return cls(tuple(range(first, end)), tuple(h if h in own else -1 for h in range(first * group, end * group)))

    @property
    def group(self) -> int:
        """Query heads per KV head of the launch, empty ones included."""
        return len(self.heads) // len(self.kv_heads)

    @cached_property
    def real(self) -> tuple[int, ...]:
        """The query heads, without empty ones, in launch order."""
        return tuple(h for h in self.heads if h >= 0)

    @cached_property
    def slot_of(self) -> dict[int, int]:
        """Query head of the layer -> its number in the launch."""
        return {h: i for i, h in enumerate(self.heads) if h >= 0}

    def all(self, heads: int) -> bool:
        """Whether these are all ``heads`` of the layer in order."""
        return self.heads == tuple(range(heads))

    def in_place(self, heads: int) -> bool:
        """Whether every one of the ``heads`` of the layer keeps its place, so that q and the output need no copy."""
        return len(self.heads) == heads and all(h in (-1, i) for i, h in enumerate(self.heads))


def view_of(heads: tuple[int, ...], count: int) -> slice | None:
    """Some of the ``count`` heads of a layer as a slice, if they are a view of them: equally far apart. Empty ones may
    be any."""
    real = [(i, h) for i, h in enumerate(heads) if h >= 0]
    if not real:
        return None
    (first, low), (last, high) = real[0], real[-1]
    step = (high - low) // (last - first) if last > first else 1
    start = low - first * step
    stop = start + (len(heads) - 1) * step + 1
    if step < 1 or start < 0 or stop > count or any(h != start + i * step for i, h in real):
        return None
    return slice(start, stop, step)


@dataclass(frozen=True, eq=False)
class Part:
    """What one group of heads, which share an expression, computes in a launch.

    Attributes:
        heads: query heads of the layer.
        mask: which pairs, beside ``q >= k``, among the keys in the main section.
        gathered_keys: keys gathered into a section of their own, which every later query sees; false for none.
        visible_until: int32 [B, key slots], the position up to which the main section shows a key
            (`reach.last_visible`): the gathered section shows it from there on. None: what a head gathers, its main
            section does not show at all.
        gathered_queries: queries gathered into rows of their own (`GatheredRows`), else true.
        residues: (f, g), the residue of a query and of a key by which a `ResidueLaunch` sorts them; else None.
    """

    heads: tuple[int, ...]
    mask: Boolean
    gathered_keys: Boolean = sympy.false
    visible_until: np.ndarray | None = None
    gathered_queries: Boolean = sympy.true
    residues: tuple[sympy.Expr, sympy.Expr] | None = None

    @property
    def exprs(self) -> tuple[sympy.Basic, ...]:
        """Everything that has to be evaluated for it."""
        return (self.mask, self.gathered_keys, self.gathered_queries, *(self.residues or ()))


@dataclass(frozen=True)
class Work:
    """What a launch does, over all its heads; expected for one prompt, or counted from block lists.

    Attributes:
        full, partial: blocks. looked_up: whether partial blocks evaluate the mask expression.
        tiles: query tiles. longest: blocks of the query tile that has most of them.
        moved: tiles of rows copied. copies: whether any are.
        dense: causal block pairs of plain attention.
    """

    full: float = 0.0
    partial: float = 0.0
    looked_up: bool = False
    tiles: float = 0.0
    longest: float = 0.0
    moved: float = 0.0
    copies: bool = False
    dense: float = 0.0

    def times(self, batch: int) -> Work:
        """The same for several prompts; the longest query tile is as long as before."""
        grown = {name: batch * getattr(self, name) for name in ("full", "partial", "tiles", "moved", "dense")}
        return replace(self, **grown)


@dataclass(frozen=True, eq=False)
class Launch:
    """One call of the attention kernel.

    Attributes:
        rows, keys: the token order of the queries and of the main key section.
        parts: what its heads compute, head group by head group.
        heads: all of them, and their KV heads.
        width: bound on the key blocks that any query block lists: index tables are that wide. It follows from the
            budgets of the spec, before any input is seen; a selection that passes it is an error.
        cost: predicted, in full blocks over all heads.
    """

    rows: TokenOrder
    keys: TokenOrder
    parts: tuple[Part, ...]
    heads: HeadMap
    width: int = 0
    cost: float = 0.0

    name: ClassVar[str] = ""
    turn: ClassVar[int] = 0
    """Launches merge into the output in ascending turns: rows that replace others come last."""
    merges: ClassVar[bool] = False
    """Whether its rows are merged with what is there by log-sum-exp; else they are written over it."""
    lists_blocks: ClassVar[bool] = True
    """Whether FlexAttention runs it on lists of blocks; else its execution has an `attend` of its own."""

    @property
    def label(self) -> str:
        """What `explain()` and pictures call it."""
        natural = self.rows.natural and self.keys.natural
        return self.name + ("" if natural else f", {self.rows.label} x {self.keys.label} keys")

    @property
    def compares(self) -> bool:
        """Whether every mask is the one comparison ``row >= limit``; else the part's expression is evaluated as
        well."""
        return True

    @property
    def row_slots(self) -> int:
        """Query slots of each head."""
        return self.rows.slots

    @property
    def key_slots(self) -> int:
        """Key slots of each KV head."""
        return self.keys.slots

    @classmethod
    def map_heads(cls, heads: Sequence[int], rows: TokenOrder, group: int, kv_heads: int) -> HeadMap:
        """The places of some heads of a layer in a launch with these queries."""
        return HeadMap.of(heads, group)

    def underfills(self, length: int) -> bool:
        """Whether, for prompts of ``length`` keys, the launch has too few queries that see too much: alone it would
        leave most of the device idle, so it runs on a side stream."""
        return False

    def tiles(self, layout: TokenLayout) -> Tiles:
        return Tiles.between(layout, self.rows, self.keys)

    def expected_counts(self, part: Part, tiles: Tiles) -> Counts:
        """Blocks that a head of the part is expected to compute."""
        raise NotImplementedError

    def moved_tiles(self, layout: TokenLayout, heads: int | None, any_length: bool) -> float:
        """Tiles of rows that it copies: queries in, keys and values, output back (read and written once each)."""
        raise NotImplementedError

    def _moved(self, layout: TokenLayout, heads: int | None, any_length: bool, gathers: bool = False) -> float:
        """Where queries and keys are used as they stand if they can be."""
        tile, out = self.rows.tile, 0.0
        if not self.rows.stays(any_length):
            out += 2.0 * len(self.heads.heads) * (self.row_slots // tile)
        elif heads is not None and not self.heads.in_place(heads):
            ways = 2.0 if view_of(self.heads.heads, heads) is None else 1.0  # only the output has to be put there
            out += ways * len(self.heads.heads) * (self.row_slots // tile)
        if gathers or not self._keys_stay(layout, any_length):
            out += 2.0 * len(self.heads.kv_heads) * (self.key_slots // tile)
        return out

    def _keys_stay(self, layout: TokenLayout, any_length: bool) -> bool:
        """Whether k and v are used as they stand."""
        kv = self.heads.kv_heads
        return view_of(kv, max(kv) + 1) is not None and self.keys.stays(any_length)

    def expected_work(self, layout: TokenLayout, heads: int | None = None, any_length: bool = False) -> Work:
        """For one prompt of a batch.

        Args:
            heads: of the layer; a launch of some of them picks its rows out. None: as if all were here.
            any_length: the kernel takes tokens that fill no whole tiles.
        """
        full = partial = longest = 0.0
        for part in self.parts:
            sure, rest, most = self._counts(part, layout)
            full, partial = full + sure * len(part.heads), partial + rest * len(part.heads)
            longest = max(longest, most)
        moved = self.moved_tiles(layout, heads, any_length)
        query_tiles = self.row_slots // self.rows.tile * len(self.heads.heads)
        return Work(full, partial, not self.compares, query_tiles, longest, moved, moved > 0)

    def _counts(self, part: Part, layout: TokenLayout) -> tuple[float, float, float]:
        """Full and partial blocks of a head, and blocks of its longest query tile; kept with the part, which belongs to
        one launch, or to several of the same tiles."""
        memo = part.__dict__
        if "_counts" not in memo:
            touched, sure = self.expected_counts(part, self.tiles(layout))
            touched = np.maximum(touched, 0.0)
            sure = np.clip(sure, 0.0, touched)
            partial = float((touched - sure).mean(0).sum())
            memo["_counts"] = float(sure.mean(0).sum()), partial, float(touched.max(initial=0.0))
        return memo["_counts"]


@dataclass(frozen=True, eq=False)
class DenseLaunch(Launch):
    """Heads that see every key before them: PyTorch's own causal attention."""

    name = "dense"
    turn = 1
    lists_blocks = False

    def moved_tiles(self, layout: TokenLayout, heads: int | None, any_length: bool) -> float:
        alone = (heads is None or self.heads.all(heads)) and not layout.padded
        return 0.0 if alone else self._moved(layout, heads, any_length)

    def expected_work(self, layout: TokenLayout, heads: int | None = None, any_length: bool = False) -> Work:
        blocks = float(causal_tiles(self.tiles(layout)).sum() / max(1, layout.batch_size)) * len(self.heads.real)
        moved = self.moved_tiles(layout, heads, False)
        return Work(dense=blocks, moved=moved, copies=moved > 0)


@dataclass(frozen=True, eq=False)
class BlockLaunch(Launch):
    """Query tiles against the key tiles that each lists.

    The key slots are a *main section*, all keys in the launch's order, and behind it *gathered sections*: for every KV
    head as many as its query heads need, one query head's gathered keys each. A head lists tiles of the main section
    and of its own gathered section alone.

    Attributes:
        section: slots of a gathered section (0: nothing is gathered).
        tile_constant: the masks have one value on every block of the main section, so that the only mask left within a
            block is ``row >= limit``: causality, holes where a key was gathered away, and where a gathered key begins.
    """

    section: int = 0
    tile_constant: bool = True

    name = "blocks"
    turn = 0

    @classmethod
    def map_heads(cls, heads: Sequence[int], rows: TokenOrder, group: int, kv_heads: int) -> HeadMap:
        if rows.natural and 2 * len(heads) >= group * kv_heads:
            return HeadMap.span(heads, group, kv_heads)
        return HeadMap.of(heads, group)

    @property
    def compares(self) -> bool:
        return self.tile_constant

    @property
    def key_slots(self) -> int:
        return self.keys.slots + self.sections * self.section

    @cached_property
    def section_slot(self) -> dict[int, int]:
        """Query head -> which of its KV head's gathered sections is its own."""
        slot: dict[int, int] = {}
        gathering = {h for part in self.parts if part.gathered_keys != sympy.false for h in part.heads}
        for first in range(0, len(self.heads.heads), self.heads.group):
            own = [h for h in self.heads.heads[first : first + self.heads.group] if h in gathering]
            slot.update({h: i for i, h in enumerate(own)})
        return slot

    @cached_property
    def sections(self) -> int:
        """Gathered sections of each KV head."""
        return (1 + max(self.section_slot.values(), default=-1)) if self.section else 0

    @cached_property
    def table_slot(self) -> dict[int, int]:
        """Query head -> its gathered section among those of all KV heads."""
        slot_of, group = self.heads.slot_of, self.heads.group
        return {h: slot_of[h] // group * self.sections + slot for h, slot in self.section_slot.items()}

    def moved_tiles(self, layout: TokenLayout, heads: int | None, any_length: bool) -> float:
        return self._moved(layout, heads, any_length and self.compares, gathers=self.section > 0)

    def expected_counts(self, part: Part, tiles: Tiles) -> Counts:
        alternatives = [one for term in terms(part.mask) for one in expected_together(causal_once(term), tiles)]
        causal = np.clip(causal_tiles(tiles), 0, None)
        each = np.ones((len(tiles.keys.index), tiles.key_tiles))
        # What is gathered leaves a hole, unless the section takes over where the main section leaves off.
        holes = part.gathered_keys != sympy.false and part.visible_until is None
        whole = each - chance_per_tile(part.gathered_keys, x.k, tiles) if holes else each
        ranges = [one for one in alternatives if one.solid]
        touched = _covered([(one.first, one.last) for one in ranges], each, tiles)
        sure = _covered([one.inside for one in ranges], whole, tiles)
        free = 1 - touched / np.maximum(causal, 1)  # selection may take what is there already
        for one in alternatives:
            if not one.solid:
                some, every = _counts_with_holes(one, each, whole, tiles) if holes else one.counts()
                touched, sure = touched + some * free, sure + every * free
        over = np.maximum(1.0, touched / np.maximum(causal, 1))
        touched, sure = touched / over, np.minimum(sure / over, causal)
        if part.gathered_keys != sympy.false:
            low, high = _gathered_seen(part, tiles)
            touched, sure = touched + np.ceil(high / tiles.rows.tile), sure + np.floor(low / tiles.rows.tile)
        occupied = tiles.rows.occupied
        return np.where(occupied, touched, 0), np.where(occupied, sure, 0)


def _counts_with_holes(one: Expectation, each: np.ndarray, whole: np.ndarray, tiles: Tiles) -> Counts:
    some, every = one.counts()
    kept = _covered([one.inside], whole, tiles) / np.maximum(_covered([one.inside], each, tiles), 1)
    return some, every * kept


def _covered(ranges: list[tuple[np.ndarray, np.ndarray]], each: np.ndarray, tiles: Tiles) -> np.ndarray:
    """[B, query tiles]: the key tiles that lie in any of the ranges ``first .. last``, summed by ``each`` [B, key
    tiles]."""
    shape = np.broadcast_shapes((len(each), tiles.row_tiles), *(np.shape(bound) for pair in ranges for bound in pair))
    total, upto = np.zeros(shape), np.full(shape, -1)
    if not ranges:
        return total
    sums = np.concatenate([np.zeros((len(each), 1)), np.cumsum(each, 1)], 1)
    sums = np.broadcast_to(sums, (shape[0], sums.shape[1]))
    first, last = (np.stack([np.broadcast_to(pair[i], shape) for pair in ranges]) for i in (0, 1))
    order = first.argsort(0)
    for low, high in zip(np.take_along_axis(first, order, 0), np.take_along_axis(last, order, 0), strict=True):
        begin, end = np.maximum(low, upto + 1), np.maximum(high + 1, 0)
        begin = np.minimum(begin, end)
        total = total + np.take_along_axis(sums, end, 1) - np.take_along_axis(sums, begin, 1)
        upto = np.maximum(upto, high)
    return total


def _gathered_seen(part: Part, tiles: Tiles) -> Counts:
    """Gathered keys that all queries of a tile see, and that some do, expected, [B, query tiles]."""
    layout = tiles.layout
    start = layout.position
    if part.visible_until is not None:  # the main section shows a key for a while
        slot = tiles.keys.inverse
        until = np.broadcast_to(part.visible_until, (len(slot), tiles.keys.slots))
        start = np.maximum(start, np.where(slot >= 0, np.take_along_axis(until, np.maximum(slot, 0), 1), NEVER))
    first, last = tiles.bounds(x.q)
    low, high = np.zeros((2, len(layout.valid), tiles.row_tiles))
    for term in x.alternatives(part.gathered_keys):
        whole, count = population(term, layout)
        for b, may in enumerate(whole.may):
            begin = np.sort(start[b % len(start)][may], kind="stable")  # fast where sorted already
            rate = count / max(1, len(begin))
            low[b] += rate * np.searchsorted(begin, first[b % len(first)], "right")
            high[b] += rate * np.searchsorted(begin, last[b % len(last)], "right")
    return low, high


@dataclass(frozen=True, eq=False)
class GatheredRows(Launch):
    """Queries that see every key before them, gathered from all over the prompt; they replace their output rows.

    Attributes:
        capacity: slots for them.
    """

    capacity: int = 0

    name = "gathered rows"
    turn = 3

    @classmethod
    def map_heads(cls, heads: Sequence[int], rows: TokenOrder, group: int, kv_heads: int) -> HeadMap:
        return HeadMap.span(heads, group)

    @property
    def row_slots(self) -> int:
        return self.capacity

    def underfills(self, length: int) -> bool:
        return length >= SIDE_STREAM_KEYS

    def moved_tiles(self, layout: TokenLayout, heads: int | None, any_length: bool) -> float:
        tile = self.rows.tile
        keys = 0 if self._keys_stay(layout, any_length) else 2 * len(self.heads.kv_heads) * (self.key_slots // tile)
        return 2.0 * len(self.heads.real) * (self.row_slots // tile) + keys

    def expected_counts(self, part: Part, tiles: Tiles) -> Counts:
        """Key tiles between those of the first and of the last row of a query tile are partial."""
        tile, layout = tiles.rows.tile, tiles.layout
        first, last = (np.sort(np.where(tiles.keys.occupied, b, np.int64(UNBOUNDED)), 1) for b in tiles.bounds(x.k))
        counts = [self._of_prompt(part, tiles, b, first[b % len(first)], last[b % len(last)], tile)
                  for b in range(len(layout.valid))]  # fmt: skip
        most = max(len(touched) for touched, _ in counts)
        padded = [[np.pad(t.astype(float), (0, most - len(t))) for t in pair] for pair in counts]
        return np.stack([p[0] for p in padded]), np.stack([p[1] for p in padded])

    def _of_prompt(self, part: Part, tiles: Tiles, b: int, first: np.ndarray, last: np.ndarray, tile: int) -> Counts:
        layout, order = tiles.layout, tiles.rows
        index = order.index[b % len(order.index)]
        queries = order.queries.numbers if order.queries is not None else np.arange(order.tokens)
        is_query = np.zeros(layout.length, bool)
        is_query[queries[index[index >= 0]]] = True
        places: list[np.ndarray] = []
        for term in x.alternatives(part.gathered_queries):
            whole, count = population(term, layout)
            may = whole.may[b % len(whole.may)]
            own = layout.position[b][may & is_query]
            count = min(count * len(own) / max(1, int(may.sum())), len(own))
            places.append(own[np.linspace(0, len(own) - 1, round(count)).astype(int)] if len(own) else own)
        place = np.unique(np.concatenate(places)) if places else np.zeros(0, int)
        low, high = place[::tile], np.append(place[tile - 1 :: tile], place[-1:] if len(place) % tile else [])
        touched, sure = np.searchsorted(first, high, "right"), np.searchsorted(last, low, "right")
        if len(place) % tile:  # slots without a row spoil the last tile
            sure[-1] = 0
        return touched, sure


@dataclass(frozen=True, eq=False)
class ResidueLaunch(Launch):
    """Both sides sorted by residue, then by position: pairs of equal residue lie in blocks along the diagonal."""

    name = "residue-major"
    turn = 2
    merges = True

    @property
    def compares(self) -> bool:
        return False

    def moved_tiles(self, layout: TokenLayout, heads: int | None, any_length: bool) -> float:
        # Sorted keys for every query head; merging reads and writes both outputs.
        tile = self.rows.tile
        return len(self.heads.heads) * (2.0 * (self.key_slots // tile) + 5.0 * (self.row_slots // tile))

    def expected_counts(self, part: Part, tiles: Tiles) -> Counts:
        """A tile of queries sees the keys of its residues that come before."""
        assert part.residues is not None
        tile, stride = tiles.rows.tile, expected_modulus(part.residues[1])
        rows, keys = (order.tokens / stride / tile for order in (tiles.rows, tiles.keys))  # tiles of one residue
        others = x.all_of(*(e for e in x.conditions(part.mask) if residue_pair(e) != part.residues))
        causal = float(causal_tiles(tiles).sum())
        wanted = sum(float(one.counts()[0].sum()) for term in terms(others)
                     for one in expected_together(causal_once(term), tiles))  # fmt: skip
        before = min(1.0, wanted / max(1.0, causal)) * keys / 2
        both = min(1.0, 1 / max(rows, 1e-9))  # of the tiles: those with the end of a residue and the start of the next
        touched = (1 - both) * (before + 2) + both * (2 * max(keys, 1.0) + 1)
        occupied = np.asarray(tiles.rows.occupied, float)
        return touched * occupied, (1 - both) * max(before - 1, 0.0) * occupied
