"""What a user waits for before the first token: reading frames, the processor, the vision tower, the language model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

READING, PROCESSOR, TOWER, PREFILL, TOKEN = STAGES = (
    "reading frames",
    "processor",
    "vision tower",
    "language model",
    "first token",
)
"""In the order in which they happen. The last one is everything else of the call that gives the first token: positions,
embeddings, logits and their choice."""

MODEL_STAGES = (TOWER, PREFILL, TOKEN)
"""Those that the model takes: reading and the processor are the same, sparse or dense."""


class Timeline:
    """Seconds of every stage::

        timeline = Timeline(model)
        with timeline.stage(READING):
            frames = read()
        with timeline.stage(PROCESSOR):
            inputs = processor(...)
        with timeline.first_token():
            model.generate(**inputs, max_new_tokens=1)
        timeline.seconds

    Args:
        model: a transformers model on one device, patched or not. On CUDA events are timed, so that watching does not
            make the host wait between stages.

    Attributes:
        seconds: by name of `STAGES`, those that happened; of the last `first_token`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seconds: dict[str, float] = {}
        self.device = next(model.parameters()).device
        self.watched = [(module, name) for name, module in _parts(model).items()]
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a ``with`` block."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = time.perf_counter() - start

    @contextmanager
    def first_token(self) -> Iterator[None]:
        """Times a ``with`` block that runs the model up to its first token, and the stages in it."""
        self._spans.clear()
        handles = []
        for module, name in self.watched:
            handles.append(module.register_forward_pre_hook(_Mark(self, name), prepend=True))
            handles.append(module.register_forward_hook(_Mark(self, name, end=True)))
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._wait()
        whole = time.perf_counter() - start
        for stage in MODEL_STAGES:
            self.seconds.pop(stage, None)
        for stage in (TOWER, PREFILL):
            spans = [(first, last) for first, last in self._spans.get(stage, []) if last is not None]
            if spans:
                self.seconds[stage] = sum(self._between(first, last) for first, last in spans)
        inside = sum(self.seconds.get(stage, 0.0) for stage in (TOWER, PREFILL))
        self.seconds[TOKEN] = max(0.0, whole - inside)

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last) / 1000 if self.device.type == "cuda" else last - first)


class _Mark:
    """A hook that notes the begin or the end of a module's forward."""

    def __init__(self, timeline: Timeline, name: str, end: bool = False) -> None:
        self.timeline, self.name, self.end = timeline, name, end

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        spans = self.timeline._spans.setdefault(self.name, [])
        if not self.end:
            spans.append((self.timeline._now(), None))
        elif spans:
            spans[-1] = (spans[-1][0], self.timeline._now())


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """The language model and, where there is one, the vision tower: the outermost module of ``vision_config``."""
    from .transformers import _language_model

    config = getattr(model, "config", None)
    vision = getattr(config, "vision_config", None)
    tower = next((m for m in model.modules() if vision is not None and getattr(m, "config", None) is vision), None)
    found = {PREFILL: _language_model(model)[2]}
    return {TOWER: tower, **found} if tower is not None else found
