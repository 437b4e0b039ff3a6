"""Token orders: which token stands in which slot of a launch, so that wanted pairs lie in the same blocks.

An order is host data (it follows from the layout) and is aligned: a tile of slots holds a tile of coordinates. Orders
that depend on what selection found (gathered rows, residue classes) are built on the device: see
`mmflex.runtime.kernels.select`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from ..ir import expr as x
from ..ir.layout import MODALITY_NAMES, TokenLayout

BIG = 1 << 30
"""A position past every query: no query reaches a key slot with this limit."""


MODALITY_MAJOR = "modality-major"


def bucket(slots: int, tile: int) -> int:
    """Slots rounded up to whole tiles, and to five significant bits of tiles: lengths of one bucket share compiled
    kernels, at the cost of at most 1/16 more (empty) slots."""
    tiles = max(1, -(-slots // tile))
    step = 1 << max(0, tiles.bit_length() - 5)
    return -(-tiles // step) * step * tile


@dataclass(frozen=True, eq=False)
class Order:
    """Slots of one side of a launch.

    Attributes:
        label: what the picture and `explain()` call it.
        index: int32 [B, S], the token in each slot (-1: none).
        tokens: how many tokens there are to choose from (M queries or N keys).
        tile: block size; S is a multiple of it.
        origin: token number of the layout that index 0 means (N - M for queries).
    """

    label: str
    index: np.ndarray
    tokens: int
    tile: int
    origin: int = 0

    @property
    def slots(self) -> int:
        return self.index.shape[1]

    @cached_property
    def identity(self) -> bool:
        """Slot i holds token i, for all tokens: nothing needs to move."""
        return self.slots == self.tokens and bool((self.index == np.arange(self.tokens)).all())

    def in_place(self, layout: TokenLayout) -> bool:
        """Slot i holds the token at position i, for all tokens."""
        return self.label == "natural" and not self.origin and not layout.padded

    def stays(self, layout: TokenLayout, any_length: bool) -> bool:
        """Whether tokens are used as they stand: each is in its slot, and they fill all slots, or need not."""
        return self.identity or (any_length and self.in_place(layout))

    @cached_property
    def filled(self) -> np.ndarray:
        """The index, empty slots given the nearest token before (or after), so that they widen no block's bounds."""
        slot = np.where(self.index >= 0, np.arange(self.slots), -1)
        back = np.maximum.accumulate(slot, axis=1)
        first = np.where((self.index >= 0).any(axis=1), (self.index >= 0).argmax(axis=1), 0)[:, None]
        return np.maximum(np.take_along_axis(self.index, np.where(back < 0, first, back), axis=1), 0)

    @cached_property
    def inverse(self) -> np.ndarray:
        """int32 [B, tokens]: the slot of each token (-1: none)."""
        out = np.full((len(self.index), self.tokens + 1), -1, np.int32)
        np.put_along_axis(out, np.where(self.index < 0, self.tokens, self.index), np.arange(self.slots)[None], axis=1)
        return out[:, :-1]

    @cached_property
    def real(self) -> np.ndarray:
        """bool [B, tiles]: tiles that hold a token."""
        return np.asarray((self.index >= 0).reshape(len(self.index), -1, self.tile).any(-1))

    def on(self, name: str, device: torch.device) -> Tensor:
        """``index``, ``filled`` or ``inverse`` as an int64 tensor on a device (cached)."""
        cache: dict[Any, Tensor] = self.__dict__.setdefault("_on", {})
        if (name, device) not in cache:
            cache[name, device] = torch.tensor(getattr(self, name), dtype=torch.int64, device=device)
        return cache[name, device]

    def attribute(self, leaf: sympy.Basic, layout: TokenLayout) -> np.ndarray:
        """int32 [B, S]: an attribute of the tokens in the slots."""
        if not self.tokens:
            return np.zeros_like(self.index)
        value = attribute(leaf, layout)
        if self.label == MODALITY_MAJOR and isinstance(leaf, x.Rank):
            # Keys of other modalities are never asked for their rank in this one: ends of the scale keep it monotone,
            # and constant on their tiles.
            m = int(leaf.args[1])
            value = np.where(
                layout.modality == m, value, np.where(layout.modality < m, -1, layout.of(m).sum(1, keepdims=True))
            )
        return self.take(value, layout).astype(np.int32, copy=False)

    def take(self, value: np.ndarray, layout: TokenLayout) -> np.ndarray:
        """[B, S]: values [B, N] of all tokens in slot order; empty slots have those of the nearest token."""
        if self.in_place(layout):
            return np.concatenate([value, value[:, -1:].repeat(self.slots - self.tokens, 1)], 1)
        return np.take_along_axis(value, self.filled + self.origin, axis=1)


def _aligned(label: str, coordinate: np.ndarray, member: np.ndarray, tile: int, origin: int = 0) -> Order:
    """The members [B, T] in the order of a coordinate; queries (origin > 0) start at the tile of their first member."""
    batch, tokens = member.shape
    if not tokens:
        return Order(label, np.full((batch, tile), -1, np.int32), 0, tile, origin)
    first = np.where(member, coordinate, BIG).min(axis=1) // tile * tile
    first = np.where(member.any(axis=1) & (origin > 0), first, 0)[:, None]
    slot = np.where(member, coordinate - first, -1)
    slots = bucket(int(slot.max(initial=0)) + 1, tile)
    index = np.full((batch, slots + 1), -1, np.int32)
    np.put_along_axis(index, np.where(slot < 0, slots, slot), np.arange(tokens, dtype=np.int32)[None], axis=1)
    return Order(label, index[:, :-1], tokens, tile, origin)


def row_order(layout: TokenLayout, queries: int, tile: int, modality: int | None = None) -> Order:
    """The queries (the last ``queries`` tokens), all by position or those of a modality by rank."""

    def build() -> Order:
        tail = slice(layout.length - queries, None)
        label = "natural" if modality is None else f"{MODALITY_NAMES[modality]} queries"
        return _aligned(
            label, layout.coordinate(modality)[:, tail], layout.of(modality)[:, tail], tile, layout.length - queries
        )

    return layout._once(("row order", queries, tile, modality), build)


def key_order(layout: TokenLayout, tile: int, by_modality: bool = False) -> Order:
    """The keys by position, or modality by modality, each by rank from a whole tile on."""

    def build() -> Order:
        if not by_modality:
            return _aligned("natural", layout.coordinate(None), layout.valid, tile)
        coordinate, base = np.zeros(layout.modality.shape, np.int32), 0
        for m in layout.modalities:
            of_m = layout.of(m)
            coordinate = np.where(of_m, layout.coordinate(m) + base, coordinate)
            base += -(-int(of_m.sum(axis=1).max(initial=0)) // tile) * tile
        return _aligned(MODALITY_MAJOR, coordinate, layout.valid, tile)

    return layout._once(("key order", tile, by_modality), build)


def attribute(leaf: sympy.Basic, layout: TokenLayout) -> np.ndarray:
    """int32 [B, N]: an attribute of every token of a layout (cached there)."""
    build = _BUILDERS.get(type(leaf))
    if build is None:
        raise TypeError(f"{leaf} is not an attribute of a token: use those of mmflex.ir.expr")
    return layout._once(("attribute", type(leaf).__name__, *leaf.args[1:]), lambda: build(leaf, layout))


def _hull(leaf: sympy.Basic, layout: TokenLayout) -> np.ndarray:
    rows, keys, tile = (int(a) for a in leaf.args[1:])
    of_rows = layout.of(None if rows == x.ALL else rows)
    own = layout.coordinate(None if rows == x.ALL else rows) // tile
    stand = layout.coordinate(None if keys == x.ALL else keys) // tile
    lowest = isinstance(leaf, x.LastTile) is False
    out = np.zeros_like(own)
    for b in range(layout.batch_size):
        tiles = np.zeros(int(own[b].max(initial=0)) + 1, np.int32)
        step = -1 if lowest else 1  # both coordinates only grow, and what is assigned last stays
        tiles[own[b][of_rows[b]][::step]] = stand[b][of_rows[b]][::step]
        out[b] = np.where(of_rows[b], tiles[np.maximum(own[b], 0)], 0)
    return out


def _behind(leaf: sympy.Basic, layout: TokenLayout) -> np.ndarray:
    rows, tile = int(leaf.args[1]), int(leaf.args[2])
    modality = None if rows == x.ALL else rows
    last = (layout.coordinate(modality) // tile + 1) * tile - 1
    return np.maximum(layout.of(modality).sum(axis=1, keepdims=True) - 1 - last, 0).astype(np.int32)


_BUILDERS: dict[type, Callable[[sympy.Basic, TokenLayout], np.ndarray]] = {
    sympy.Symbol: lambda leaf, layout: layout.position,
    x.Rank: lambda leaf, layout: layout.coordinate(None if int(leaf.args[1]) == x.ALL else int(leaf.args[1])),
    x.Modality: lambda leaf, layout: layout.modality,
    x.SegmentOf: lambda leaf, layout: layout.segment,
    x.Frame: lambda leaf, layout: layout.frame,
    x.Cell: lambda leaf, layout: layout.cell,
    x.FirstTile: _hull,
    x.LastTile: _hull,
    x.Behind: _behind,
}
