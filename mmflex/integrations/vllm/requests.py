"""Which request is which row of a step, and which of its tokens is what.

An attention backend sees rows of tokens, nothing more. Prompts and the grids of their images and videos pass by in the
scheduler's output, so the model runner's ``execute_model`` is wrapped: both of vLLM's runners have it. The order of the
rows is in the runner's batch (`Step.names`).
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmflex.integrations.layouts import FAMILIES, PixelShapes, layout_for
from mmflex.integrations.layouts.families import GRIDS
from mmflex.integrations.layouts.inputs import host, setting
from mmflex.ir.layout import TokenLayout

LAYOUTS = 8
"""Layouts kept for prompts that come again; what was compiled for one goes with it."""

FEATURES = 4096
"""Images and videos whose sizes are remembered, because vLLM does not send again what it has cached."""

Notice = Callable[[str], None]


# ---- which token is what ---------------------------------------------------------------------------------------------


@dataclass
class Features:
    """The sizes of images and videos, by vLLM's hash of them."""

    seen: OrderedDict[str, dict[str, Any]] = field(default_factory=OrderedDict)

    def read(self, feature: Any) -> dict[str, Any]:
        """Small entries of a `MultiModalFeatureSpec` and the shapes of its pixels, by the processor's names."""
        name = getattr(feature, "mm_hash", None) or feature.identifier
        data = feature.data
        if data is None:
            return self.seen.get(name, {})
        found: dict[str, Any] = {}
        for key, element in dict(data).items():
            value = getattr(element, "data", element)
            if value is None:
                continue
            if "pixel_values" in key:
                found[key] = tuple(int(n) for n in value.shape) if hasattr(value, "shape") else ()
            elif key in _SMALL:
                found[key] = host(value)
        self.seen[name] = found
        self.seen.move_to_end(name)
        while len(self.seen) > FEATURES:
            self.seen.popitem(last=False)
        return found


_SMALL = frozenset(name for family in FAMILIES.values() for name in family.reads if "pixel_values" not in name)

_ROWS = frozenset({*GRIDS, "image_sizes"})
"""Entries that are a row of numbers for every image or video."""


@dataclass
class Prompt:
    """A request as far as its tokens are concerned.

    Attributes:
        ids: of the prompt; None where vLLM was given embeddings.
        features: of every image and video in the order of the prompt, its entries by the processor's names.
        layout: of the whole prompt, once asked for.
        carried: layer -> what earlier chunks left for the estimates of later ones (`backend`).
    """

    ids: Sequence[int] | None
    features: list[dict[str, Any]]
    layout: TokenLayout | None = None
    carried: dict[int, Any] = field(default_factory=dict)

    def inputs(self) -> dict[str, Any]:
        """What the model's processor returned for it, as far as `layout_for` reads it."""
        inputs: dict[str, Any] = {"input_ids": np.asarray(self.ids)[None]}
        for name in sorted({name for entries in self.features for name in entries}):
            values = [entries[name] for entries in self.features if name in entries]
            if "pixel_values" in name:
                inputs[name] = PixelShapes(tuple(values))
            elif name in _ROWS:
                inputs[name] = np.concatenate([value.reshape(-1, value.shape[-1]) for value in values])
            elif values[0].ndim < 2:
                inputs[name] = np.concatenate([value.reshape(-1) for value in values])
            else:
                inputs[name] = np.stack(values)
        return inputs


class Layouts:
    """Token layouts of prompts. Equal ones are one object: programs and plans are kept with it."""

    def __init__(self, config: Any, notice: Notice) -> None:
        self.config, self.notice = config, notice
        self.kept: OrderedDict[Any, TokenLayout] = OrderedDict()

    def until(self, prompt: Prompt | None, end: int) -> TokenLayout:
        """The first ``end`` tokens of a prompt and what was generated after it; text where nothing tells."""
        if prompt is None or prompt.ids is None or not self._multimodal(prompt):
            return self._one(("text", end), lambda: TokenLayout.from_segments([("text", end)]))
        if prompt.layout is None:
            prompt.layout = self._read(prompt)
        whole = prompt.layout
        if end > whole.length:
            whole = _with_text(whole, end - whole.length)
        cut = whole if end == whole.length else whole[:end]
        return self._one(cut.fingerprint, lambda: cut)

    def _multimodal(self, prompt: Prompt) -> bool:
        return bool(prompt.features)

    def _read(self, prompt: Prompt) -> TokenLayout:
        try:
            return layout_for(self.config, prompt.inputs())
        except (ValueError, KeyError, IndexError, TypeError) as error:
            self.notice(f"the prompt's images and videos are taken as text: {error}")
            return TokenLayout.from_segments([("text", len(prompt.ids or ()))])

    def _one(self, key: Any, build: Callable[[], TokenLayout]) -> TokenLayout:
        layout = self.kept.pop(key, None)
        self.kept[key] = layout = build() if layout is None else layout
        while len(self.kept) > LAYOUTS:
            self.kept.popitem(last=False)[1].forget()
        return layout


def _with_text(layout: TokenLayout, more: int) -> TokenLayout:
    """A layout of one prompt with ``more`` tokens of text behind it, as a segment of their own."""
    fields = {
        name: np.pad(getattr(layout, name), ((0, 0), (0, more)), constant_values=fill)
        for name, fill in (("modality", 0), ("frame", -1), ("cell", -1))
    }
    segment = np.pad(layout.segment, ((0, 0), (0, more)), constant_values=int(layout.segment.max(initial=-1)) + 1)
    return TokenLayout.from_modality_ids(fields.pop("modality"), segment=segment, **fields)


def holds_images(config: Any) -> bool:
    """Whether a model's prompts may hold images, videos or sound."""
    return any(setting(config, name) is not None for name in ("vision_config", "audio_config", "image_token_id"))


# ---- which request is which row --------------------------------------------------------------------------------------


class Requests:
    """The prompts of a model runner's requests, from the scheduler's output of every step."""

    def __init__(self) -> None:
        self.prompts: dict[str, Prompt] = {}
        self.features = Features()

    def follow(self, scheduled: Any) -> None:
        """Takes in the requests that are new in a step; drops those that are over."""
        for name in scheduled.finished_req_ids:
            self.prompts.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            features = sorted(new.mm_features or (), key=lambda feature: feature.mm_position.offset)
            self.prompts[new.req_id] = Prompt(new.prompt_token_ids, [self.features.read(one) for one in features])


@dataclass
class Step:
    """The step that a model runner is executing.

    Attributes:
        requests: the runner's. counts: new tokens of every request.
        runner: the model runner. order: names of the requests in the order of rows, where the runner told.
    """

    requests: Requests
    counts: Mapping[str, int]
    runner: Any
    order: Sequence[str] | None = None

    def names(self, lengths: Iterable[int]) -> list[str | None]:
        """The name of the request in every row; None where the number of its tokens contradicts the scheduler."""
        order = self.order
        if order is None:
            order = getattr(getattr(self.runner, "input_batch", None), "req_ids", None) or ()
        found: list[str | None] = []
        for row, length in enumerate(lengths):
            name = order[row] if row < len(order) else None
            found.append(name if name is not None and self.counts.get(name) == length else None)
        return found


_current: ContextVar[Step | None] = ContextVar("mmflex step of vLLM", default=None)
_requests: weakref.WeakKeyDictionary[Any, Requests] = weakref.WeakKeyDictionary()


def current_step() -> Step | None:
    """The step that is being executed; None outside of one, and in runs that vLLM makes up for itself."""
    return _current.get()


def follow_runner(runner: type) -> None:
    """Has a model runner class tell which requests it runs. Done twice, it is done once.

    A runner without ``input_batch`` (vLLM's second one) tells the order of its rows in ``prepare_attn``.
    """
    if "_mmflex_followed" in vars(runner):
        return
    runner._mmflex_followed = True  # type: ignore[attr-defined]
    execute = runner.execute_model  # type: ignore[attr-defined]

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        requests = _requests.get(self)
        if requests is None:
            requests = _requests[self] = Requests()
        requests.follow(scheduler_output)
        token = _current.set(Step(requests, scheduler_output.num_scheduled_tokens, self))
        try:
            return execute(self, scheduler_output, *args, **kwargs)
        finally:
            _current.reset(token)

    runner.execute_model = execute_model  # type: ignore[attr-defined]
    prepare = getattr(runner, "prepare_attn", None)
    if prepare is None:
        return

    @functools.wraps(prepare)
    def prepare_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        step = _current.get()
        if step is not None:
            step.order = list(input_batch.req_ids)
        return prepare(self, input_batch, *args, **kwargs)

    runner.prepare_attn = prepare_attn  # type: ignore[attr-defined]
