"""What runs on a text: specs as they are given, and methods brought to a density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.plan import Plan
from ...runtime.reference import softmax_attention
from ...tuning.config import Config, Spec
from .. import methods as table
from ..methods import Method
from ..report import Skipped
from ..trace import Trace, relative

ERROR_ROWS = 256
"""Queries of a text at which output errors are measured, drawn at all offsets within a tile."""


class SampledTrace(Trace):
    """A trace whose output errors are those of `ERROR_ROWS` drawn queries: no sparse kernel is run to choose a
    setting."""

    def errors(self, layer: int, made: Plan) -> Tensor:
        """float32 [Hq]: relative error of a plan's output at some queries, per head."""
        seen = self.layers[layer]
        queries = seen.q.shape[2]
        generator = torch.Generator().manual_seed(queries)
        rows = torch.randperm(queries, generator=generator)[:ERROR_ROWS].sort().values
        at = rows.to(seen.q.device)
        out, _ = softmax_attention(seen.q[:, :, at], seen.k, seen.v, made.dense_mask(rows.tolist()), seen.scale)
        dense = seen.out[:, :, at]
        return torch.stack([relative(out[:, h], dense[:, h]) for h in range(out.shape[1])])


@dataclass(frozen=True)
class Entry:
    """A row of the tables.

    Attributes:
        method: its name; ``label`` in tables. setting: what it was brought to.
        target: density that it was brought to; None for a spec that runs as it was given.
        planned: density on the text it was sized on. over: even the smallest setting computes more than the target.
        error: relative output error there, given the dense model's queries, keys and values.
    """

    method: str
    label: str
    setting: str
    spec: Any
    target: float | None
    planned: float
    over: bool
    error: float


@dataclass(eq=False)
class Sizing:
    """Entries for one length: which of a method's ladders is taken is decided on the first text."""

    methods: Sequence[Method]
    given: Mapping[str, Spec | Config]
    config: Config | None
    densities: Sequence[float]

    def __post_init__(self) -> None:
        self.skipped: list[Skipped] = []
        self.ladder: dict[tuple[str, float], int] = {}
        self.prepared: dict[str, Config | None] = {}

    def entries(self, trace: Trace, text: str) -> list[Entry]:
        """The specs as given and every method at its densities, sized on a trace. A method that cannot run is noted."""
        found = []
        for name, spec in self.given.items():
            measured = trace.measure(spec)
            found.append(Entry(name, name, "as given", spec, None, measured.density, False, measured.error))
        for method in self.methods:
            for target in sorted(self.densities):
                try:
                    found.append(self._sized(method, target, trace))
                except ValueError as error:
                    note = Skipped(method.name, text, str(error))
                    self.skipped += [] if note in self.skipped else [note]
        return found

    def _sized(self, method: Method, target: float, trace: Trace) -> Entry:
        if method.name not in self.prepared:
            self.prepared[method.name] = method.prepare(trace, self.config)
        ladders = method.ladders(trace, self.prepared[method.name])
        key = method.name, target
        if key not in self.ladder:
            self.ladder[key] = table.choose(ladders, target, trace)
        fitted = table.fit(ladders[self.ladder[key]], target, trace)
        measured = fitted.measured
        return Entry(
            method.name, method.label, fitted.setting.text, fitted.setting.spec, target, measured.density, fitted.over,
            measured.error,
        )  # fmt: skip
