"""Token orders: which token stands in which slot of a launch, so that wanted pairs lie in the same blocks.

An order is host data (it follows from the layout) and is aligned: a tile of slots holds a tile of coordinates. Orders
that depend on a selection (gathered rows, residue classes) are built on the device: see `mmflex.runtime.launches`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal

import numpy as np
import sympy
import torch
from torch import Tensor

from ..ir import expr as x
from ..ir.layout import MODALITY_NAMES, TokenLayout
from ..ir.queries import QueryTokens

NEVER = 1 << 30
"""A position past every query: no query sees a key slot with this limit."""


class Arrangement(Enum):
    """How the tokens of an order follow one another."""

    NATURAL = "natural"
    """By position."""
    ONE_MODALITY = "one modality"
    """The queries of one modality alone, by rank."""
    MODALITY_MAJOR = "modality-major"
    """Modality by modality, each by rank."""
    GIVEN = "given"
    """As listed by the caller; masks are evaluated on them, no launch uses them."""


def bucket(slots: int, tile: int) -> int:
    """Slots rounded up to whole tiles, and to five significant bits of tiles: lengths of one bucket share compiled
    kernels, at the cost of at most 1/16 more (empty) slots."""
    tiles = max(1, -(-slots // tile))
    step = 1 << max(0, tiles.bit_length() - 5)
    return -(-tiles // step) * step * tile


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """Slots of one side of a launch.

    Attributes:
        arrangement: how tokens follow one another.
        index: int32 [B, S], which query (of M) or key (of N) stands in each slot; -1 for an empty slot.
        tokens: M or N.
        tile: block size; S is a multiple of it.
        queries: which tokens of the layout the M queries are; None for keys, which are all N.
        modality: of an order of one modality alone.
    """

    arrangement: Arrangement
    index: np.ndarray
    tokens: int
    tile: int
    queries: QueryTokens | None = None
    modality: int | None = None

    @property
    def label(self) -> str:
        """What `explain()` and pictures call it."""
        if self.modality is not None:
            return f"{MODALITY_NAMES[self.modality]} queries"
        return self.arrangement.value

    @property
    def natural(self) -> bool:
        return self.arrangement is Arrangement.NATURAL

    @property
    def slots(self) -> int:
        return self.index.shape[1]

    @property
    def first_token(self) -> int:
        """The token number of query (or key) 0."""
        return 0 if self.queries is None else self.queries.first

    @cached_property
    def identity(self) -> bool:
        """Slot i holds query (or key) i, for all of them: nothing needs to move."""
        return self.slots == self.tokens and bool((self.index == np.arange(self.tokens)).all())

    def slots_are_positions(self, layout: TokenLayout) -> bool:
        """Slot i holds the token at position i, for all tokens."""
        consecutive = self.queries is None or self.queries.consecutive
        return self.natural and consecutive and not self.first_token and not layout.padded

    @cached_property
    def in_place(self) -> bool:
        """Slot i holds query (or key) i, for all of them; the slots behind are empty."""
        return self.slots >= self.tokens and bool((self.index[:, : self.tokens] == np.arange(self.tokens)).all())

    def stays(self, any_length: bool) -> bool:
        """Whether tokens are used as they stand: each is in its slot, and they fill all slots, or need not."""
        return self.identity or (any_length and self.in_place)

    @cached_property
    def filled(self) -> np.ndarray:
        """The index, empty slots given the nearest token before (or after): that keeps the bounds of tiles tight."""
        slot = np.where(self.index >= 0, np.arange(self.slots), -1)
        before = np.maximum.accumulate(slot, axis=1)
        first = np.where((self.index >= 0).any(axis=1), (self.index >= 0).argmax(axis=1), 0)[:, None]
        return np.maximum(np.take_along_axis(self.index, np.where(before < 0, first, before), axis=1), 0)

    @cached_property
    def inverse(self) -> np.ndarray:
        """int32 [B, tokens]: the slot of each token (-1: none)."""
        out = np.full((len(self.index), self.tokens + 1), -1, np.int32)
        np.put_along_axis(out, np.where(self.index < 0, self.tokens, self.index), np.arange(self.slots)[None], axis=1)
        return out[:, :-1]

    @cached_property
    def occupied(self) -> np.ndarray:
        """bool [B, tiles]: tiles that hold a token."""
        return np.asarray((self.index >= 0).reshape(len(self.index), -1, self.tile).any(-1))

    def on(self, name: Literal["index", "filled", "inverse"], device: torch.device) -> Tensor:
        """One of these tables as an int64 tensor on a device (kept with the order)."""
        cache: dict[Any, Tensor] = self.__dict__.setdefault("_on", {})
        if (name, device) not in cache:
            cache[name, device] = torch.tensor(getattr(self, name), dtype=torch.int64, device=device)
        return cache[name, device]

    def attribute(self, leaf: sympy.Basic, layout: TokenLayout) -> np.ndarray:
        """int32 [B, S]: an attribute of the tokens in the slots."""
        if not self.tokens:
            return np.zeros_like(self.index)
        value = attribute(leaf, layout)
        if self.arrangement is Arrangement.MODALITY_MAJOR and isinstance(leaf, x.Rank):
            # Keys of other modalities are never asked for their rank in this one: ends of the scale keep it monotone,
            # and constant on their tiles.
            m = int(leaf.args[1])
            value = np.where(
                layout.modality == m, value, np.where(layout.modality < m, -1, layout.of(m).sum(1, keepdims=True))
            )
        return self.take(value, layout).astype(np.int32, copy=False)

    def take(self, value: np.ndarray, layout: TokenLayout) -> np.ndarray:
        """[B, S]: values [B, N] of all tokens in slot order; empty slots have those of the nearest token."""
        if self.queries is not None:
            value = self.queries.take(value)
        if self.slots_are_positions(layout):
            value = value[:, : self.tokens]
            return np.concatenate([value, value[:, -1:].repeat(self.slots - self.tokens, 1)], 1)
        return np.take_along_axis(value, self.filled, axis=1)

    def token_numbers(self, index: Tensor) -> Tensor:
        """Token numbers of queries (or keys) by their index, an int64 tensor of any shape."""
        if self.queries is None or self.queries.consecutive:
            return index + self.first_token if self.first_token else index
        cache: dict[Any, Tensor] = self.__dict__.setdefault("_on", {})
        key = ("numbers", index.device)
        if key not in cache:
            cache[key] = torch.tensor(self.queries.numbers, dtype=torch.int64, device=index.device)
        return cache[key][index]


def _aligned(
    arrangement: Arrangement,
    coordinate: np.ndarray,
    member: np.ndarray,
    tile: int,
    queries: QueryTokens | None = None,
    modality: int | None = None,
) -> TokenOrder:
    """The members [B, T] in the order of a coordinate, a tile of slots for a tile of coordinates. Queries begin with
    the tile of their first member; where they are not consecutive, each prompt's empty tiles are left out."""
    batch, tokens = member.shape
    if not tokens:
        return TokenOrder(arrangement, np.full((batch, tile), -1, np.int32), 0, tile, queries, modality)
    starts_late = queries is not None and queries.first > 0
    first = np.where(member, coordinate, NEVER).min(axis=1) // tile * tile
    first = np.where(member.any(axis=1) & starts_late, first, 0)[:, None]
    slot = np.where(member, coordinate - first, -1)
    if queries is not None and not queries.consecutive:
        slot = _without_gaps(slot, tile)
    slots = bucket(int(slot.max(initial=0)) + 1, tile)
    index = np.full((batch, slots + 1), -1, np.int32)
    np.put_along_axis(index, np.where(slot < 0, slots, slot), np.arange(tokens, dtype=np.int32)[None], axis=1)
    return TokenOrder(arrangement, index[:, :-1], tokens, tile, queries, modality)


def _without_gaps(slot: np.ndarray, tile: int) -> np.ndarray:
    """Slots [B, T] with every prompt's empty tiles taken out (-1 stays -1)."""
    out = slot.copy()
    for b, row in enumerate(slot):
        tiles = np.unique(row[row >= 0] // tile)
        out[b] = np.where(row < 0, -1, np.searchsorted(tiles, row // tile) * tile + row % tile)
    return out


def row_order(layout: TokenLayout, queries: QueryTokens, tile: int, modality: int | None = None) -> TokenOrder:
    """The queries: all by position, or those of a modality by rank. Kept with the layout."""

    def build() -> TokenOrder:
        arrangement = Arrangement.NATURAL if modality is None else Arrangement.ONE_MODALITY
        coordinate, member = queries.take(layout.coordinate(modality)), queries.take(layout.of(modality))
        return _aligned(arrangement, coordinate, member, tile, queries, modality)

    return layout.once(("row order", queries, tile, modality), build)


def key_order(layout: TokenLayout, tile: int, by_modality: bool = False) -> TokenOrder:
    """The keys by position, or modality by modality, each by rank from a whole tile on. Kept with the layout."""

    def build() -> TokenOrder:
        if not by_modality:
            return _aligned(Arrangement.NATURAL, layout.coordinate(None), layout.valid, tile)
        coordinate, base = np.zeros(layout.modality.shape, np.int32), 0
        for m in layout.modalities:
            of_m = layout.of(m)
            coordinate = np.where(of_m, layout.coordinate(m) + base, coordinate)
            base += -(-int(of_m.sum(axis=1).max(initial=0)) // tile) * tile
        return _aligned(Arrangement.MODALITY_MAJOR, coordinate, layout.valid, tile)

    return layout.once(("key order", tile, by_modality), build)


def given_order(tokens: np.ndarray, count: int, batch: int = 1, queries: QueryTokens | None = None) -> TokenOrder:
    """Some of ``count`` tokens, int [S], as listed: to evaluate masks on, for every prompt alike."""
    index = np.tile(np.asarray(tokens, np.int32), (batch, 1))
    return TokenOrder(Arrangement.GIVEN, index, count, 1, queries)


# ---- attributes of tokens --------------------------------------------------------------------------------------------


def attribute(leaf: sympy.Basic, layout: TokenLayout) -> np.ndarray:
    """int32 [B, N]: an attribute of every token of a layout (kept there)."""
    build = _BUILDERS.get(type(leaf))
    if build is None:
        raise TypeError(f"{leaf} is not an attribute of a token: use those of mmflex.ir.expr")
    return layout.once(("attribute", type(leaf).__name__, *leaf.args[1:]), lambda: build(leaf, layout))


def _modality(argument: Any) -> int | None:
    return None if int(argument) == x.ALL else int(argument)


def _key_tile_of_query_tile(leaf: sympy.Basic, layout: TokenLayout) -> np.ndarray:
    """`expr.FirstTile` and `expr.LastTile`: the key tile at which the first (last) query of a query's tile stands."""
    rows, keys, tile = _modality(leaf.args[1]), _modality(leaf.args[2]), int(leaf.args[3])
    of_rows = layout.of(rows)
    row_tile, key_tile = layout.coordinate(rows) // tile, layout.coordinate(keys) // tile
    lowest = not isinstance(leaf, x.LastTile)
    out = np.zeros_like(row_tile)
    for b in range(layout.batch_size):
        of_tile = np.zeros(int(row_tile[b].max(initial=0)) + 1, np.int32)
        step = -1 if lowest else 1  # both coordinates only grow, and what is assigned last stays
        of_tile[row_tile[b][of_rows[b]][::step]] = key_tile[b][of_rows[b]][::step]
        out[b] = np.where(of_rows[b], of_tile[np.maximum(row_tile[b], 0)], 0)
    return out


def _queries_after_tile(leaf: sympy.Basic, layout: TokenLayout) -> np.ndarray:
    """`expr.Behind`: queries in scope that come after the last one of a query's tile."""
    modality, tile = _modality(leaf.args[1]), int(leaf.args[2])
    last = (layout.coordinate(modality) // tile + 1) * tile - 1
    return np.maximum(layout.of(modality).sum(axis=1, keepdims=True) - 1 - last, 0).astype(np.int32)


_BUILDERS: dict[type, Callable[[sympy.Basic, TokenLayout], np.ndarray]] = {
    sympy.Symbol: lambda leaf, layout: layout.position,
    x.Rank: lambda leaf, layout: layout.coordinate(_modality(leaf.args[1])),
    x.Modality: lambda leaf, layout: layout.modality,
    x.SegmentOf: lambda leaf, layout: layout.segment,
    x.Frame: lambda leaf, layout: layout.frame,
    x.Cell: lambda leaf, layout: layout.cell,
    x.FirstTile: _key_tile_of_query_tile,
    x.LastTile: _key_tile_of_query_tile,
    x.Behind: _queries_after_tile,
}
