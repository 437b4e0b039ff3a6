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
class _Share:
    """Of the attention mass of a query block, the share to keep as antidiagonals of a stride tell it, and at most how
    many key blocks."""

    threshold: float
    stride: int
    blocks: int


_QUALITIES: dict[str, _Share] = {
    "high": _Share(0.95, 8, 96),
    "balanced": _Share(0.9, 8, 64),
    "fast": _Share(0.8, 16, 32),
}


def default_spec(quality: Quality = "balanced") -> Pattern:
    """The spec that `mmflex.patch` takes where none is given: XAttention's blocks, and dense last rows.

    Every query block of 128 has the fewest key blocks that hold a share of its attention mass, judged by antidiagonals
    of a stride; the first key block and the 100 nearest keys of every query are always among them. The last tile of
    queries, where the question is, sees everything. So a head that looks at little computes little, and one that looks
    at everything is nearly dense. On short prompts it computes most of dense attention, and ``backend="auto"`` runs
    dense instead; at most ``blocks`` key blocks a row bound what long prompts take.

    ==============  =====  ======  ======
    quality         share  stride  blocks
    ==============  =====  ======  ======
    ``"high"``      0.95   8       96
    ``"balanced"``  0.9    8       64
    ``"fast"``      0.8    16      32
    ==============  =====  ======  ======

    Raises:
        ValueError: another quality.
    """
    if quality not in _QUALITIES:
        raise ValueError(f"quality is {quality!r}: use {', '.join(map(repr, _QUALITIES))}")
    keep = _QUALITIES[quality]
    blocks = find("XAttention")(stride=keep.stride, threshold=keep.threshold, blocks=keep.blocks)
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
