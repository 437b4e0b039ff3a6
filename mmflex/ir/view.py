"""What selection knows of a prompt: its layout, seen through the scope of a pattern."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    q: torch.Tensor
    queries: QueryTokens


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
