"""What runs on a text: specs as they are given, and methods brought to a density."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ...ir.pattern import Pattern
from ...runtime.plan import Plan
from ...tuning.config import Config, Spec
from .. import methods as table
from ..methods import Method
from ..report import Skipped
from ..trace import Trace, drawn, errors_at
from .progress import Progress

ERROR_ROWS = 256
"""Queries of a text at which output errors are measured, drawn at all offsets within a tile."""


SIZED_LAYERS = 8
"""Layers on which settings are sized, evenly spread over the model."""


@dataclass(eq=False)
class SampledTrace(Trace):
    """Some layers of a trace, whose output errors are those of `ERROR_ROWS` drawn queries: a setting is chosen without
    running it.

    Attributes:
        whole: the trace with all layers.
    """

    whole: Trace | None = None

    @classmethod
    def of(cls, trace: Trace) -> SampledTrace:
        numbers = sorted(trace.layers)
        chosen = {numbers[round(i * (len(numbers) - 1) / (SIZED_LAYERS - 1))] for i in range(SIZED_LAYERS)}
        return cls({n: trace.layers[n] for n in sorted(chosen)}, trace.backend, whole=trace)

    @property
    def depth(self) -> int:
        return self.whole.depth if self.whole is not None else super().depth

    def per_layer(self, spec: Spec | Config) -> dict[int, tuple[Pattern, ...]]:
        """A spec written out for the layers that are here."""
        every = super().per_layer(spec) if self.whole is None else self.whole.per_layer(spec)
        return {layer: patterns for layer, patterns in every.items() if layer in self.layers}

    def errors(self, layer: int, made: Plan) -> Tensor:
        """float32 [Hq]: relative error of a plan's output at some queries, per head."""
        seen = self.layers[layer]
        return errors_at(seen, made, drawn(seen.q.shape[2], ERROR_ROWS))


@dataclass(frozen=True)
class Entry:
    """A row of the tables.

    Attributes:
        method: its name; ``label`` in tables. setting: what it was brought to.
        target: density that it was brought to; None for a spec that runs as it was given.
        planned: density on what it was sized on, `SIZED_LAYERS` layers of the text's first window. over: even the
            smallest setting computes more than the target.
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
    kept: Progress

    def __post_init__(self) -> None:
        self.skipped: list[Skipped] = []
        self.ladder: dict[tuple[str, float], int] = {}
        self.prepared: dict[str, Config | None] = {}

    def entries(self, trace: Callable[[], Trace], text: str, *key: Any) -> list[Entry]:
        """The specs as given and every method at its densities, sized on a trace, which is made when it is needed.
        ``key``: what the trace is of. A method that cannot run is noted."""
        needed = _Once(trace)
        entries = [self._given(name, spec, needed, key) for name, spec in self.given.items()]
        for method in self.methods:
            for target in sorted(self.densities):
                try:
                    entries.append(self._sized(method, target, needed, key))
                except ValueError as error:
                    note = Skipped(method.name, text, str(error))
                    self.skipped += [] if note in self.skipped else [note]
        return entries

    def _given(self, name: str, spec: Any, trace: _Once, key: tuple[Any, ...]) -> Entry:
        measured = trace.sampled.measure(spec)
        return Entry(name, name, "as given", spec, None, measured.density, False, measured.error)

    def _sized(self, method: Method, target: float, trace: _Once, key: tuple[Any, ...]) -> Entry:
        """Of patterns alone it is kept: resized configs are made anew."""
        known = self.kept.get_text("sized", method.name, target, *key)
        if known is not None:
            data = json.loads(known)
            self.ladder[method.name, target] = data.pop("ladder")
            return Entry(**{**data, "spec": Pattern.from_json(data["spec"])})
        if method.name not in self.prepared:
            self.prepared[method.name] = method.prepare(trace.sampled.whole or trace.sampled, self.config)
        ladders = method.ladders(trace.sampled, self.prepared[method.name])
        if (method.name, target) not in self.ladder:
            self.ladder[method.name, target] = table.choose(ladders, target, trace.sampled)
        number = self.ladder[method.name, target]
        fitted = table.fit(ladders[number], target, trace.sampled)
        entry = Entry(
            method.name, method.label, fitted.setting.text, fitted.setting.spec, target, fitted.measured.density,
            fitted.over, fitted.measured.error,
        )  # fmt: skip
        if isinstance(entry.spec, Pattern):
            data = {**vars(entry), "spec": entry.spec.to_json(), "ladder": number}
            self.kept.put_text(json.dumps(data), "sized", method.name, target, *key)
        return entry


class _Once:
    """A trace that is made when it is first asked for."""

    def __init__(self, make: Callable[[], Trace]) -> None:
        self.make = make

    @cached_property
    def sampled(self) -> SampledTrace:
        return SampledTrace.of(self.make())
