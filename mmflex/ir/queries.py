"""Which tokens of a prompt the queries are: all of them, the last few, one chunk, or several chunks at once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .shown import shown


@dataclass(frozen=True)
class QueryTokens:
    """The token numbers of M queries among the N tokens of a prompt, as runs of consecutive tokens.

    A token number counts the columns of k and of the layout, padding included. One object serves every prompt of a
    batch.

    Attributes:
        runs: ``(first, end)`` of every run, ascending, none empty or touching the next; ``()`` for no queries.
    """

    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        before = None
        for run in self.runs:
            first, end = map(operator.index, run)
            if first >= end or (before is not None and before >= first):
                raise ValueError(
                    f"query runs {shown(self.runs)} must be ascending (first, end) pairs of tokens, none touching "
                    "the next: use QueryTokens.listed"
                )
            before = end

    @classmethod
    def last(cls, m: int, n: int) -> QueryTokens:
        """The last m of n tokens: what FlexAttention and decoders with a cache mean by fewer queries than keys."""
        return cls(((n - m, n),) if m else ())

    @classmethod
    def listed(cls, positions: Sequence[int] | np.ndarray) -> QueryTokens:
        """From the token number of every query, ascending."""
        return cls(_runs(positions))

    @classmethod
    def of(cls, positions: Positions, m: int, n: int) -> QueryTokens:
        """From any form in which a caller may give them.

        Args:
            positions: None for the last m tokens; an int for m consecutive tokens from that one on; or the token number
                of every query, ascending.
            m: queries. n: tokens.

        Raises:
            ValueError: not m of them, not ascending, or beyond the n tokens.
            TypeError: not whole numbers.
        """
        if positions is None:
            return cls.last(m, n)
        if isinstance(positions, QueryTokens):
            queries = positions
        elif isinstance(positions, (int, np.integer)) and not isinstance(positions, bool):
            queries = cls(((int(positions), int(positions) + m),) if m else ())
        else:
            queries = cls.listed(positions)  # type: ignore[arg-type]
        if queries.count != m:
            raise ValueError(f"query positions name {queries.count} tokens for {m} queries: give one for each")
        if queries.runs and (queries.first < 0 or queries.end > n):
            raise ValueError(
                f"query positions run from {shown(queries.first)} to {shown(queries.end - 1)}, but k has {n} tokens: "
                f"they number tokens of k from 0 to {n - 1}"
            )
        return queries

    @cached_property
    def count(self) -> int:
        """M."""
        return sum(end - first for first, end in self.runs)

    @property
    def first(self) -> int:
        """The first query's token number (0 without queries)."""
        return self.runs[0][0] if self.runs else 0

    @property
    def end(self) -> int:
        """One more than the last query's token number: keys from here on are seen by none."""
        return self.runs[-1][1] if self.runs else 0

    @property
    def consecutive(self) -> bool:
        """Whether query i is token ``first + i``."""
        return len(self.runs) <= 1

    @cached_property
    def numbers(self) -> np.ndarray:
        """int32 [M], the token number of every query."""
        parts = [np.arange(first, end, dtype=np.int32) for first, end in self.runs]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def take(self, values: np.ndarray) -> np.ndarray:
        """The queries' entries [..., M] of values [..., N] of all tokens; a view where queries are consecutive."""
        return values[..., self.first : self.end] if self.consecutive else values[..., self.numbers]

    def __str__(self) -> str:
        runs = ", ".join(f"{first} to {end - 1}" for first, end in self.runs[:4])
        return (runs or "none") + (f", ... ({len(self.runs)} runs)" if len(self.runs) > 4 else "")


def _runs(positions: Any) -> tuple[tuple[int, int], ...]:
    """Runs of consecutive numbers; TypeError, ValueError for what is not ascending whole numbers."""
    try:
        numbers = positions.cpu().numpy() if hasattr(positions, "cpu") else np.asarray(positions)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"query positions are {shown(positions)}: give token numbers, whole and ascending") from None
    if numbers.dtype.kind not in "iu" and numbers.size:
        raise TypeError(f"query positions hold {numbers.dtype}: give token numbers, whole and ascending")
    if numbers.ndim != 1:
        raise ValueError(f"query positions have shape {numbers.shape}: give one token number per query, [M]")
    if not len(numbers):
        return ()
    steps = np.diff(numbers.astype(np.int64))
    if (steps <= 0).any():
        i = int((steps <= 0).argmax())
        raise ValueError(
            f"query positions must ascend, but {numbers[i + 1]} follows {numbers[i]}: sort queries by token"
        )
    edges = np.flatnonzero(steps > 1) + 1
    firsts, lasts = numbers[np.r_[0, edges]], numbers[np.r_[edges - 1, len(numbers) - 1]]
    return tuple((operator.index(a), operator.index(b) + 1) for a, b in zip(firsts, lasts, strict=True))


Positions = int | Sequence[int] | np.ndarray | QueryTokens | None
"""How a caller may say where queries are: see `QueryTokens.of`."""
