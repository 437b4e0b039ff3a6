"""Fixed, strided and dilated attention: the papers' baselines (Sparse Transformer; MMInference, table 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import sympy
from sympy.logic.boolalg import Boolean

from mmflex.ir.expr import Tile
from mmflex.ir.pattern import Pattern, Tokens, check_counts

from .grid import Grid


def _stride(stride: int | str, t: Tokens) -> int:
    return Grid(stride)._stride(t.layout.frame_stride(t.scope.key))  # type: ignore[arg-type]


@dataclass(frozen=True)
class StridedFixed(Pattern):
    """SF-fixed: the query's own run of ``stride`` tokens ("frame": one frame) and the first ``first`` tokens of every
    run. Token-exact."""

    stride: int | Literal["frame"] = "frame"
    first: int = 8

    def __post_init__(self) -> None:
        check_counts(self, "first")
        if self.stride != "frame":
            check_counts(self, "stride", minimum=1)

    def mask(self, t: Tokens) -> Boolean:
        stride = max(1, t.capped(_stride(self.stride, t)))
        own = sympy.Eq(Tile(t.q, stride), Tile(t.k, stride))
        return own | (sympy.Mod(t.k, stride) < t.capped(self.first))


@dataclass(frozen=True)
class Strided(Pattern):
    """SF-strided: the last ``stride`` keys ("frame": one frame) and every ``stride``-th before. Token-exact."""

    stride: int | Literal["frame"] = "frame"

    def __post_init__(self) -> None:
        if self.stride != "frame":
            check_counts(self, "stride", minimum=1)

    def mask(self, t: Tokens) -> Boolean:
        stride = _stride(self.stride, t)
        return (t.q - t.k < t.capped(stride)) | t.residue(t.q - t.k, stride)


@dataclass(frozen=True)
class Dilated(Pattern):
    """The first ``sink`` keys, and every ``dilation``-th of the last ``local`` keys. Token-exact."""

    sink: int = 128
    local: int = 4096
    dilation: int = 2
    budgets: ClassVar[tuple[str, ...]] = ("local",)

    def __post_init__(self) -> None:
        check_counts(self, "sink", "local")
        check_counts(self, "dilation", minimum=1)

    def mask(self, t: Tokens) -> Boolean:
        near = (t.q - t.k < t.capped(self.local)) & t.residue(t.q - t.k, self.dilation)
        return (t.k < t.capped(self.sink)) | near
