"""What selection knows of a prompt: its layout, seen through the scope of a pattern."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .layout import TokenLayout
from .queries import QueryTokens
from .segments import MODALITY_NAMES


@dataclass(frozen=True)
class Scope:
    """The tokens that a pattern is restricted to: a query modality and a key modality (None: all)."""

    query: int | None = None
    key: int | None = None

    def __str__(self) -> str:
        names = [MODALITY_NAMES.get(m, "") if m is not None else "" for m in (self.query, self.key)]
        return "" if not any(names) else f"{names[0] or 'all'}>{names[1] or 'all'}"


@dataclass(frozen=True, eq=False)
class EstimateFrom:
    """Queries to estimate with, where they are not those of the call: for a chunk, the last ones of the whole prompt.

    Attributes:
        q: [B, Hq, L, D]. queries: which tokens they are.
        shared: where several processes hold the queries of a prompt, each those of its own call; else None.
    """

    q: torch.Tensor
    queries: QueryTokens
    shared: SharedQueries | None = None


@dataclass(frozen=True, eq=False)
class SharedQueries:
    """The queries of a prompt that several processes hold together, each in a call of its own.

    Attributes:
        queries: which tokens they are, those of all calls.
        sum: adds up a tensor of every process, over all of them.
    """

    queries: QueryTokens
    sum: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class View:
    """What selection knows of a prompt: its layout seen through a scope. Host data, but for the last two.

    Attributes:
        layout: the layout of the N keys.
        scope: whose queries and keys.
        queries: which of the N tokens the M queries are.
        tile: block size in tokens.
        group: query heads that share a KV head.
        estimate_from: queries that estimates go by instead, if any (`last_queries`).
        values: v [B, Hkv, N, Dv], for estimators that ask for it.
    """

    layout: TokenLayout
    scope: Scope
    queries: QueryTokens
    tile: int
    group: int = 1
    estimate_from: EstimateFrom | None = None
    values: torch.Tensor | None = None

    def last_queries(self, q: torch.Tensor) -> tuple[torch.Tensor, QueryTokens]:
        """(queries [B, H, L, D], which tokens they are) for estimators that look at the last ones: those of the call,
        q, or those that were given for it."""
        given = self.estimate_from
        return (q, self.queries) if given is None else (given.q, given.queries)

    @property
    def shared(self) -> SharedQueries | None:
        """Where other processes hold the prompt's other queries: what all of them are, and how to add up over them."""
        return None if self.estimate_from is None else self.estimate_from.shared

    @property
    def shared_queries(self) -> View:
        """The prompt as seen with the queries of all processes; this view where no others hold any."""
        return self if self.shared is None else dataclasses.replace(self, queries=self.shared.queries)

    def whole_blocks(self, q: torch.Tensor, size: int) -> tuple[torch.Tensor, View]:
        """(queries [B, H, L, D], the view with them) for estimators that score blocks of ``size`` queries in scope:
        the call's own, q, and those of `estimate_from` that complete its blocks."""
        given = self.estimate_from
        if given is None:
            return q, self

        def build() -> tuple[np.ndarray, np.ndarray, QueryTokens] | None:
            block = np.where(self.layout.of(self.scope.query), self.layout.coordinate(self.scope.query) // size, -1)
            mine, others = self.queries.numbers, np.setdiff1d(given.queries.numbers, self.queries.numbers)
            wanted = np.zeros(len(others), bool)
            for row in block:
                wanted |= np.isin(row[others], np.unique(row[mine])) & (row[others] >= 0)
            if not wanted.any():
                return None
            tokens = np.concatenate([mine, others[wanted]])
            source = np.searchsorted(given.queries.numbers, others[wanted])
            return source, tokens.argsort(kind="stable"), QueryTokens.listed(np.sort(tokens))

        key = ("whole blocks", self.scope, self.queries, given.queries, size)
        more = self.layout.once(key, build)
        if more is None:
            return q, self
        source, order = (torch.as_tensor(index).to(q.device) for index in more[:2])
        every = torch.cat([q, given.q.index_select(2, source)], 2).index_select(2, order)
        return every, dataclasses.replace(self, queries=more[2])

    @property
    def size(self) -> int:
        """Keys in scope (of the longest prompt of the batch): the length of per-key masses and bitmaps."""
        return self.layout.most(self.scope.key)

    @property
    def tiles(self) -> int:
        """Key tiles in scope."""
        return -(-self.size // self.tile)

    @property
    def rows(self) -> int:
        """Tokens of the query modality (of the longest prompt): queries are counted from the first of them."""
        return self.layout.most(self.scope.query)

    def block_size(self, n: int) -> int:
        """Blocks of ``n`` tokens as `Tokens.blocks` counts them: no larger than the prompt (or a tile)."""
        return min(n, max(self.layout.length, self.tile))

    def counts(self, device: torch.device) -> torch.Tensor:
        """int64 [B]: keys in scope of each prompt, on a device (copied there once)."""
        return self.layout.once(
            ("counts", self.scope.key, device),
            lambda: torch.tensor(self.layout.of(self.scope.key).sum(axis=1), device=device),
        )

    @property
    def frame_stride(self) -> int | None:
        """Tokens from frame to frame in the key coordinate; None without frames."""
        return self.layout.frame_stride(self.scope.key)
