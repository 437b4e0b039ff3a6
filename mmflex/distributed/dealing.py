"""Which rank holds which tokens of a prompt, and the way from the ranks' shares back to the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ir.queries import QueryTokens
from ..runtime.calls import TILE

Runs = tuple[tuple[int, int], ...]
"""``(first, end)`` of runs of consecutive tokens."""


@dataclass(frozen=True)
class Dealing:
    """Tokens 0 to n - 1 dealt out to ranks, each token to one.

    Attributes:
        runs: of every rank, in the order in which the rank holds them.
    """

    runs: tuple[Runs, ...]

    @classmethod
    def head_tail(cls, tokens: int, ranks: int) -> Dealing:
        """Chunks r and 2 P - 1 - r of 2 P for rank r of P: under a causal mask early tokens see little and late ones
        much, so that every rank has the same work. Chunks are whole tiles of 128 tokens, and differ by one at most.

        Raises:
            ValueError: fewer tiles than chunks; both are named.
        """
        return _head_tail(tokens, ranks)

    @property
    def ranks(self) -> int:
        return len(self.runs)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens of every rank."""
        return tuple(sum(end - first for first, end in runs) for runs in self.runs)

    @cached_property
    def most(self) -> int:
        """Tokens of the rank that has most: what every rank's share is padded to when shares are exchanged."""
        return max(self.counts)

    @cached_property
    def total(self) -> int:
        return sum(self.counts)

    def queries(self, rank: int, first: int = 0) -> QueryTokens:
        """A rank's tokens (held in ascending order), counted from ``first``."""
        return _queries(self.runs[rank], first)

    def take(self, whole: Tensor, rank: int, dim: int) -> Tensor:
        """A rank's share of a tensor of all tokens, which lie along ``dim``; a view where the share is one run."""
        parts = [whole.narrow(dim, first, end - first) for first, end in self.runs[rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def padded(self, share: Tensor, dim: int) -> Tensor:
        """A rank's share with zeros behind, up to `most` tokens along ``dim``."""
        missing = self.most - share.shape[dim]
        return pad(share, (0, 0) * (share.dim() - 1 - dim % share.dim()) + (0, missing)) if missing else share

    def restore(self, shares: Tensor, dim: int) -> Tensor:
        """The tensor of all tokens along ``dim``, from everybody's padded share stacked along a new first dimension."""
        parts = [shares[rank].narrow(dim, begin, end - first) for first, end, rank, begin in self._in_order]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    @cached_property
    def _in_order(self) -> list[tuple[int, int, int, int]]:
        """(first, end, rank, where the rank holds it) of every run, by token."""
        pieces = []
        for rank, runs in enumerate(self.runs):
            begin = 0
            for first, end in runs:
                pieces.append((first, end, rank, begin))
                begin += end - first
        return sorted(piece for piece in pieces if piece[0] < piece[1])

    def tokens_from(self, rank: int, first: int) -> list[int]:
        """A rank's tokens from number ``first`` on."""
        return [token for begin, end in self.runs[rank] for token in range(max(begin, first), end)]

    def followed_by(self, other: Dealing) -> Dealing:
        """With the tokens of another dealing behind these: every rank holds its new tokens after its old ones."""
        return Dealing(tuple(_joined(own, new, self.total) for own, new in zip(self.runs, other.runs, strict=True)))

    def with_owner(self, tokens: int) -> Dealing:
        """With ``tokens`` more, one by one, each given to a single rank: the ranks take turns of `TILE` tokens."""
        runs = list(self.runs)
        for token in range(self.total, self.total + tokens):
            rank = token // TILE % self.ranks
            runs[rank] = _joined(runs[rank], ((token, token + 1),), 0)
        return Dealing(tuple(runs))


@lru_cache(maxsize=256)
def _head_tail(tokens: int, ranks: int) -> Dealing:
    tiles, chunks = -(-tokens // TILE), 2 * ranks
    if tiles < chunks:
        raise ValueError(
            f"{tokens} tokens are {tiles} tiles of {TILE}, but {ranks} ranks need {chunks}, two chunks of one or more "
            f"each: use {max(1, tiles // 2)} ranks or fewer, or run such a prompt on one"
        )
    ends = [min(tokens, tiles * (i + 1) // chunks * TILE) for i in range(chunks)]
    pieces = list(zip([0, *ends[:-1]], ends, strict=True))
    return Dealing(tuple(_joined((pieces[r],), (pieces[-1 - r],), 0) for r in range(ranks)))


@lru_cache(maxsize=1024)
def _queries(runs: Runs, first: int) -> QueryTokens:
    return QueryTokens(tuple((begin + first, end + first) for begin, end in runs if begin < end))


def _joined(runs: Sequence[tuple[int, int]], more: Sequence[tuple[int, int]], offset: int) -> Runs:
    """Runs, and behind them others moved by ``offset``; runs that touch become one."""
    out = list(runs)
    for first, end in more:
        if out and out[-1][1] == first + offset:
            out[-1] = (out[-1][0], end + offset)
        else:
            out.append((first + offset, end + offset))
    return tuple(out)
