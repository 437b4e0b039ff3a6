"""A default spec, for those who have searched none: the same for every head, and adapting to each head and prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..ir.pattern import Pattern, find
from .config import Config, Spec

Quality = Literal["high", "balanced", "fast"]
NAME = "default"
"""What the default is called where specs are text: "default", "default:high", "default:fast"."""


@dataclass(frozen=True)
class _Cut:
    """The share of a query's attention at which it keeps a block (at 4,096 keys), the stride of the estimate, and at
    most how many key blocks."""

    peak: float
    stride: int
    blocks: int


_QUALITIES: dict[str, _Cut] = {
    "high": _Cut(0.03, 8, 96),
    "balanced": _Cut(0.05, 16, 64),
    "fast": _Cut(0.08, 16, 32),
}


def default_spec(quality: Quality = "balanced") -> Pattern:
    """The spec that `mmflex.patch` takes where none is given: blocks that stand out to a query, and dense last rows.

    Every query block of 128 has the key blocks to which some query of it gives a share of its attention (`BlockPeaks`);
    the first key block and the 100 nearest keys of every query are always among them. The last tile of queries, where
    the question is, sees everything. So a head that looks at few places computes little, and one that looks at all
    alike as well; one whose queries search is nearly dense. On short prompts it computes much of dense attention, and
    ``backend="auto"`` runs dense instead; at most ``blocks`` key blocks a row bound what long prompts take.

    ==============  =====  ======  ======
    quality         peak   stride  blocks
    ==============  =====  ======  ======
    ``"high"``      0.03   8       96
    ``"balanced"``  0.05   16      64
    ``"fast"``      0.08   16      32
    ==============  =====  ======  ======

    Raises:
        ValueError: another quality.
    """
    if quality not in _QUALITIES:
        raise ValueError(f"quality is {quality!r}: use {', '.join(map(repr, _QUALITIES))}")
    cut = _QUALITIES[quality]
    blocks = find("BlockPeaks")(peak=cut.peak, stride=cut.stride, blocks=cut.blocks)
    return blocks | find("TriShape")(sink=128, local=128, last=128)


def chosen_spec(spec: Spec | Config | None, quality: Quality | None) -> Spec | Config:
    """The spec that was given, or the default. ValueError for both a spec and a quality."""
    if spec is None:
        return default_spec("balanced" if quality is None else quality)
    if quality is not None:
        raise ValueError(f"quality is {quality!r}, which is of the default spec, but a spec is given: leave one out")
    return spec


def default_named(text: str) -> Pattern | None:
    """The spec of "default" or "default:QUALITY"; None for other text. ValueError for another quality."""
    name, colon, quality = text.partition(":")
    if name != NAME:
        return None
    return default_spec(quality if colon else "balanced")  # type: ignore[arg-type]
