"""Grid: evenly spaced columns, rows and diagonals, as video heads have them (MMInference, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import sympy
import torch
from sympy.logic.boolalg import Boolean

from mmflex.ir.layout import TokenLayout
from mmflex.ir.pattern import Pattern, Tokens, View, check_counts, check_flags
from mmflex.ir.shown import shown

from .estimate import LastMass, LastQueries, comb_excess, combed, likely_strides
from .near import MORE_THAN_A_TILE

_TRIED = 8
"""Strides that a search looks at closely."""


def _longest(layout: TokenLayout) -> int:
    """A stride that meets each residue of a prompt at most once, as every longer one does: the same lines, without
    masses for each of its phases."""
    return 2 * layout.length + 2


@dataclass(frozen=True)
class Grid(Pattern):
    """Lines every ``stride`` tokens, with a sink and a local window (in tokens, rounded outwards to tiles).

    columns: keys ``k = phase (mod stride)``; rows: queries ``q = phase (mod stride)`` see everything; slash:
    ``q = k (mod stride)``. Positions count from the first token, or from the first of the modality it is restricted to.

    ``stride="frame"`` takes the distance from frame to frame from the layout. ``"search"`` finds, for every head, the
    stride between ``shortest`` and ``longest`` in the attention of the last ``last_q`` queries: the 8 lags at which the
    mass resembles itself most, and of those the comb that holds the most mass *beyond an even share*
    (`estimate.comb_excess`), summed over the lines that the pattern has. ``phase="search"`` takes the best comb in the
    vertical mass (0 where only the slash is on). Sink and window are left out of the search.
    """

    stride: int | Literal["frame", "search"] = "frame"
    columns: bool = True
    rows: bool = False
    slash: bool = False
    local: int = 1024
    sink: int = 128
    phase: int | Literal["search"] = "search"
    last_q: int = 64
    shortest: int = 64
    longest: int = 2048
    budgets: ClassVar[tuple[str, ...]] = ("local",)
    least: ClassVar[Mapping[str, int]] = {"local": MORE_THAN_A_TILE}

    def __post_init__(self) -> None:
        check_counts(self, "local", "sink")
        check_counts(self, "last_q", "shortest", "longest", minimum=1)
        check_flags(self, "columns", "rows", "slash")
        if isinstance(self.stride, str) and self.stride not in ("frame", "search"):
            raise TypeError(f'Grid.stride is {shown(self.stride)}: use "frame", "search" or a number of tokens')
        if self.stride not in ("frame", "search"):
            check_counts(self, "stride", minimum=1)
        if self.phase != "search":
            check_counts(self, "phase")
        if self.longest < self.shortest:
            raise ValueError(
                f"Grid searches strides from {shown(self.shortest)} to {shown(self.longest)}: the range is empty"
            )

    @property
    def _searches_phase(self) -> bool:
        return self.phase == "search" and (self.columns or self.rows)

    def estimator(self) -> LastQueries | None:
        return (
            LastQueries(self.last_q, distances=self.slash) if self.stride == "search" or self._searches_phase else None
        )

    def _stride(self, frame_stride: int | None) -> int:
        """The stride, where it does not depend on attention."""
        if self.stride != "frame":
            return int(self.stride)
        if frame_stride is None:
            raise ValueError(
                'Grid(stride="frame") needs a layout with at least two frames in scope, this one has none: '
                'pass layout=TokenLayout.from_segments(...), stride="search" or a number of tokens'
            )
        return frame_stride

    def select(self, estimate: LastMass, view: View) -> Mapping[str, torch.Tensor]:
        if self.estimator() is None:
            return {}
        vertical, device = estimate.vertical, estimate.vertical.device
        sink, local, last_q = (min(n, view.size) for n in (self.sink, self.local, self.last_q))
        first, last = sink, view.size - local - last_q
        if self.stride == "search" or view.layout.batch_size > 1:  # prompts end at different places
            place = torch.arange(view.size, device=device)
            end = view.counts(device)[:, None, None] - local - last_q
            vertical = vertical * ((place >= first) & (place < end))
        if self.stride != "search":
            stride = min(self._stride(view.frame_stride), _longest(view.layout))
            phase = combed(vertical, stride, first, last).argmax(-1).int()
            return {"stride": torch.full_like(phase, stride), "phase": phase}
        diagonal = None if estimate.diagonal is None else estimate.diagonal * (place >= local)
        mass = [vertical] if self.columns or self.rows or diagonal is None else []
        mass += [] if diagonal is None else [diagonal]
        shortest, longest = (min(n, view.layout.length) for n in (self.shortest, self.longest))
        strides = torch.cat([likely_strides(m, shortest, longest, _TRIED) for m in mass], -1)
        score, phases = comb_excess(vertical, strides, longest).max(-1)
        if not (self.columns or self.rows):
            score = torch.zeros_like(score)
        if diagonal is not None:
            score = score + comb_excess(diagonal, strides, longest)[..., 0]
        best = score.argmax(-1, keepdim=True)
        return {"stride": strides.gather(-1, best)[..., 0].int(), "phase": phases.gather(-1, best)[..., 0].int()}

    def mask(self, t: Tokens) -> Boolean:
        stride: int | sympy.Expr
        phase: int | sympy.Expr
        if self.stride == "search":
            stride = t.number("stride", at_least=self.shortest)
        else:
            stride = self._stride(t.layout.frame_stride(t.scope.key))
        if self._searches_phase:
            phase, stride = t.number("phase"), stride if self.stride == "search" else min(stride, _longest(t.layout))
        else:
            phase = 0 if self.phase == "search" else self.phase
        out = t.sink(self.sink) | t.local(self.local)
        if self.columns:
            out |= t.residue(t.k, stride, phase)
        if self.rows:
            out |= t.residue(t.row, stride, phase)
        if self.slash:
            out |= t.residue(t.q - t.k, stride)
        return out

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        lines = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1)]  # rows, columns, slash
        return tuple(
            cls(stride, columns=bool(c), rows=bool(r), slash=bool(s))
            for stride in ("frame", "search")
            for r, c, s in lines
        )
