"""A model's own sliding window, as a pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmflex.ir.pattern import Pattern, Tokens, check_counts


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """The last ``width`` keys up to and including the query itself, exact to the token: ``q - k < width``.

    What a sliding-window layer of a model means, to which `mmflex.patch` keeps; for a window of one's own choice,
    `AShape` rounds to tiles and is cheaper.
    """

    width: int

    def __post_init__(self) -> None:
        check_counts(self, "width", minimum=1)

    def mask(self, t: Tokens) -> Any:
        return t.q - t.k < self.width
