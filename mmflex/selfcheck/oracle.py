"""What fixed patterns mean, pair by pair, in plain numpy: written from their docstrings, without the compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from ..ir.layout import MODALITIES, TokenLayout

TILE = 128
"""Tokens of a block: sinks, windows and last queries are rounded outwards to whole ones."""


class Prompt:
    """One prompt of N tokens, padding included. Coordinates broadcast to [N queries, N keys].

    Attributes:
        q, k: positions of the query and of the key.
    """

    def __init__(self, layout: TokenLayout, row: int) -> None:
        row = row % len(layout.modality)
        self.valid, self._modality = layout.position[row] >= 0, layout.modality[row]
        position = np.cumsum(self.valid) - 1
        self.q, self.k = position[:, None], position[None]

    @cached_property
    def causal(self) -> np.ndarray:
        """bool [N, N]: a key at or before the query, neither of them padding."""
        return (self.q >= self.k) & self.valid[:, None] & self.valid

    def among(self, modality: str) -> np.ndarray:
        """bool [N]: tokens of a modality."""
        return self.valid & (self._modality == MODALITIES[modality])

    def rank(self, modality: str) -> np.ndarray:
        """int [N]: tokens of a modality up to and including each token, less one."""
        return np.cumsum(self.among(modality)) - 1

    def pair(self, query: str, key: str) -> np.ndarray:
        """bool [N, N]: a query of one modality and a key of another."""
        return self.among(query)[:, None] & self.among(key)


Meaning = Callable[[Prompt], np.ndarray]
"""The pairs that a pattern allows, bool [N, N] or broadcastable to it; causality and padding left out."""


def token_mask(meanings: Sequence[Meaning], layout: TokenLayout, batch: int, queries: np.ndarray) -> np.ndarray:
    """bool [B, Hq, M, N]: one meaning per head, for the tokens that are queries."""
    prompts = [Prompt(layout, b) for b in range(batch)]
    out = np.empty((batch, len(meanings), len(queries), layout.length), bool)
    for b, prompt in enumerate(prompts):
        for h, meaning in enumerate(meanings):
            out[b, h] = (np.broadcast_to(meaning(prompt), prompt.causal.shape) & prompt.causal)[queries]
    return out


def tiles(tokens: int) -> int:
    """Tiles that so many tokens touch."""
    return -(-tokens // TILE)


def sink(tokens: int) -> Meaning:
    """The first keys."""
    return lambda p: p.k // TILE < tiles(tokens)


def local(tokens: int) -> Meaning:
    """The last keys up to the query."""
    return lambda p: (p.q // TILE - p.k // TILE <= tiles(tokens - 1)) & (tokens > 0)


def local_of(modality: str, tokens: int) -> Meaning:
    """The last keys up to a query of one modality, whose tiles are counted among its own queries: all of a tile see
    what the first of them sees."""

    def meaning(p: Prompt) -> np.ndarray:
        own, rank, position = p.among(modality), p.rank(modality) // TILE, p.q[:, 0] // TILE
        first = np.array([position[own & (rank == r)].min(initial=position.max()) for r in range(rank.max() + 1)])
        return first[np.maximum(rank, 0)][:, None] - p.k // TILE <= tiles(tokens - 1)

    return meaning


def last(tokens: int) -> Meaning:
    """The last queries."""
    return lambda p: p.q // TILE >= (p.q.max() + 1 - tokens) // TILE


def either(*meanings: Meaning) -> Meaning:
    """Pairs that one of them allows."""

    def meaning(p: Prompt) -> np.ndarray:
        out = meanings[0](p)
        for other in meanings[1:]:
            out = out | other(p)
        return out

    return meaning
