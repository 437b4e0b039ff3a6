"""The token layout of the prompt that a patched model is running, read while it runs.

Three sources, the first that knows wins: `token_layout` (given by the caller), what the model's own inputs tell
(`layouts.layout_for` on ids and grids), and multimodal rotary positions. Later chunks of one prompt, and later turns on
one cache, extend the layout of the tokens before them.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn

from mmflex.ir.layout import TokenLayout

from .layouts import call_arguments, geometry, layout_for, layout_from_positions, repeat_layout

_given: ContextVar[TokenLayout | None] = ContextVar("mmflex_token_layout", default=None)

_FEATURES = ("get_image_features", "get_video_features")
_TOKENS = ("input_ids", "inputs_embeds", "mm_token_type_ids")
_FIELDS = ("modality", "segment", "frame", "cell")


@contextmanager
def token_layout(layout: TokenLayout) -> Iterator[None]:
    """Say which token is what, for every patched model that runs inside::

        with mmflex.token_layout(layout):
            model.generate(inputs_embeds=embeds)

    For models whose inputs don't show it: those fed ``inputs_embeds`` by their own code, and chunked prefill of images.
    The layout covers the whole prompt (of every batch entry, padding included); a chunk takes its part of it, beams
    repeat it, and decode steps do not need it.

    Raises:
        TypeError: something else than a TokenLayout.
    """
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"token_layout takes a mmflex.TokenLayout, got {type(layout).__name__}: build one first")
    token = _given.set(layout)
    try:
        yield
    finally:
        _given.reset(token)


class LayoutUnknown(Exception):
    """The inputs do not tell which token is what; the message says why."""


class _NotedCall:
    """``model.get_image_features``, noting grids and sizes. An object, so that copies of the model keep it."""

    def __init__(self, function: Callable[..., Any], prompt: Prompt) -> None:
        functools.update_wrapper(self, function)
        self.__signature__ = inspect.signature(function)
        self.function, self.prompt = function, prompt

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        prompt = self.prompt
        if prompt.depth == 0:
            prompt.note(self.function, args, kwargs)
        prompt.depth += 1  # such functions call each other under other names
        try:
            return self.function(*args, **kwargs)
        finally:
            prompt.depth -= 1


class Prompt:
    """What is known of the tokens of one patched model's running forward pass.

    Args:
        root: the model that users call (it sees ids and pixels).
        text_model: its language model (it sees positions and the cache).
    """

    def __init__(self, root: nn.Module, text_model: nn.Module, on_embeds: Callable[[], None]) -> None:
        self.config: Any = getattr(root, "config", text_model.config)
        self.multimodal = bool(getattr(self.config, "sub_configs", None)) or self.config is not text_model.config
        self.on_embeds = on_embeds
        self.notes: dict[str, Any] = {}
        self.seen: dict[str, Any] = {}
        self.text: dict[str, Any] = {}
        self.queries = 0  # tokens of the language model's running forward; over ranks its tensors get shorter
        self.running, self.depth = False, 0
        self.history: tuple[weakref.ref[Any], TokenLayout] | None = None
        self.whole: TokenLayout | None = None
        self.memo: dict[Any, Any] = {}
        self.recent: dict[str, TokenLayout] = {}
        self.wrapped: list[tuple[nn.Module, str, Any]] = []
        for module in root.modules():
            for name in _FEATURES:
                if callable(getattr(type(module), name, None)):
                    self.wrapped.append((module, name, module.__dict__.get(name)))
                    setattr(module, name, _NotedCall(getattr(module, name), self))
        self.handles = [
            root.register_forward_pre_hook(self.enter_root, with_kwargs=True, prepend=True),
            root.register_forward_hook(self.leave_root, always_call=True),
            text_model.register_forward_pre_hook(self.enter_text, with_kwargs=True, prepend=True),
            text_model.register_forward_hook(self.leave_text, always_call=True),
        ]

    def remove(self) -> None:
        """Undo what the constructor did to the model."""
        for handle in self.handles:
            handle.remove()
        for module, name, own in self.wrapped:
            module.__dict__.pop(name, None)
            if own is not None:
                setattr(module, name, own)

    # ---- hooks: they look at host data, so they are outside of compiled graphs; decode steps skip them -------------

    @torch.compiler.disable
    def note(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """A call of ``get_image_features`` or the like; generate() may make it ahead of the forward."""
        try:
            found = geometry(call_arguments(function, args, kwargs))
        except TypeError:
            return  # the call itself raises it, with the model's own message
        if self.running:  # the forward's own arguments are the better witness
            found = {name: value for name, value in found.items() if name not in self.seen and name not in self.notes}
        elif any(name in self.notes for name in found):
            self.notes.clear()  # left over from a prompt that did not get to its language model
        self.notes.update(found)

    def enter_root(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not decodes(args, kwargs):
            self._enter_root(module, args, kwargs)

    @torch.compiler.disable
    def _enter_root(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.running, self.depth = True, 0
        try:
            inputs = call_arguments(module.forward, args, kwargs)
        except TypeError:
            return
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is not None and tokens.shape[1] > 1:
            self.seen = {name: inputs[name] for name in _TOKENS if inputs.get(name) is not None}
            self.seen.update(geometry(inputs))

    def leave_root(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.running:
            self._leave_root()

    @torch.compiler.disable
    def _leave_root(self) -> None:
        self.running = False

    def enter_text(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not decodes(args, kwargs):
            self._enter_text(module, args, kwargs)

    @torch.compiler.disable
    def _enter_text(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.memo.clear()
        try:
            inputs = call_arguments(module.forward, args, kwargs)
        except TypeError:
            return
        self.text = {name: inputs.get(name) for name in ("position_ids", "past_key_values", *_TOKENS)}
        given = [self.text[name] for name in ("inputs_embeds", "input_ids") if self.text[name] is not None]
        self.queries = int(given[0].shape[1]) if given else 0

    def leave_text(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.text:
            self._leave_text(output)

    @torch.compiler.disable
    def _leave_text(self, output: Any) -> None:
        self.notes.clear()
        self.seen = {}
        cache = getattr(output, "past_key_values", None)
        if self.whole is not None and cache is not None:
            self.history = (weakref.ref(cache), self.whole)
        self.whole = None
        self.text, self.queries = {}, 0
        self.memo.clear()

    # ---- what attention asks ---------------------------------------------------------------------------------------

    def plain(self, padding: torch.Tensor | None, first: int, end: int) -> TokenLayout:
        """Keys ``first .. end`` as text: all that a mask without modalities needs. LayoutUnknown where tokens are
        masked out in the middle, so that a place in the prompt is not a distance."""
        valid = self._valid(padding, end)
        if valid is not None:
            starts = np.diff(np.pad(valid, ((0, 0), (1, 1))).astype(np.int8), axis=1) > 0
            if starts.sum(axis=1).max() > 1:
                raise LayoutUnknown("the attention mask has holes, and the layer has a sliding window")
        return self.as_text(padding, first, end)

    def as_text(self, padding: torch.Tensor | None, first: int, end: int) -> TokenLayout:
        """Keys ``first .. end`` as text, those that are masked out as padding, wherever they are."""

        def build() -> TokenLayout:
            valid = self._valid(padding, end)
            if valid is None:
                return TokenLayout.text(end - first)
            valid = valid[:, first:]
            return TokenLayout.from_modality_ids(np.zeros(valid.shape, np.int32), valid=valid)

        return self._once(("text", first, end), build)

    def layout(self, batch: int, padding: torch.Tensor | None, first: int, past: int, end: int) -> TokenLayout:
        """The layout of keys ``first .. end`` of a forward over tokens ``past .. end``.

        Raises:
            LayoutUnknown: the inputs do not tell.
            ValueError: `token_layout` contradicts the inputs; both values are named.
        """

        def build() -> TokenLayout:
            whole = self._layout(batch, padding, past, end)
            found = whole if (first, end) == (0, whole.length) else whole[first:end]
            # Plans are kept with their layout, so an equal prompt should meet the same object.
            known = self.recent.pop(found.fingerprint, found)
            self.recent[known.fingerprint] = known
            if len(self.recent) > 4:
                del self.recent[next(iter(self.recent))]
            return known

        return self._once(("layout", first, past, end), build)

    def _layout(self, batch: int, padding: torch.Tensor | None, past: int, end: int) -> TokenLayout:
        valid = self._valid(padding, end)
        given = _given.get()
        if given is not None:
            if self.queries not in (0, end - past):
                raise LayoutUnknown(
                    f"the language model was given {self.queries} tokens but attention sees {end - past} new ones "
                    "(dropped between layers?), so token_layout no longer says which is which"
                )
            whole = checked_layout(given, batch, valid, end)
        else:
            whole = self._after(past, self._new(batch, valid, past, end))
            if valid is not None:
                fields = {n: np.broadcast_to(getattr(whole, n), valid.shape) for n in _FIELDS}
                whole = TokenLayout.from_modality_ids(fields.pop("modality"), valid=valid, **fields)
        self.whole = whole
        return whole

    def _valid(self, padding: torch.Tensor | None, end: int) -> np.ndarray | None:
        """bool [B, end] on the host; None where nothing is padded."""

        def build() -> np.ndarray | None:
            if padding is None:
                return None
            valid = padding.detach().cpu().numpy().astype(bool)[:, :end]
            valid = np.pad(valid, ((0, 0), (0, end - valid.shape[1])))
            return None if valid.all() else valid

        return self._once(("valid", end), build)

    def _new(self, batch: int, valid: np.ndarray | None, past: int, end: int) -> TokenLayout:
        """The layout ``[B, end - past]`` of this forward's own tokens."""
        inputs = {**self.notes, **self.seen}
        if "input_ids" not in inputs and self.text.get("input_ids") is not None:
            inputs["input_ids"] = self.text["input_ids"]
        if "input_ids" not in inputs and "inputs_embeds" not in inputs and self.text.get("inputs_embeds") is not None:
            inputs["inputs_embeds"] = self.text["inputs_embeds"]
        inputs.pop("attention_mask", None)
        if valid is not None:
            inputs["attention_mask"] = valid[:, past:]
        kinds = inputs.get("mm_token_type_ids")
        if kinds is not None:
            inputs["mm_token_type_ids"] = kinds[:, -(end - past) :]
        try:
            new = layout_for(self.config, inputs)
        except ValueError as error:
            new = self._from_positions(inputs, error)
        else:
            if "input_ids" not in inputs:
                self.on_embeds()
        if new.length != end - past:
            raise LayoutUnknown(f"the inputs show {new.length} tokens but attention sees {end - past} new ones")
        return _rows(new, batch)

    def _from_positions(self, inputs: dict[str, Any], error: ValueError) -> TokenLayout:
        positions = self.text.get("position_ids")
        if positions is None or positions.ndim != 3:
            raise LayoutUnknown(str(error)) from error
        kinds, valid = inputs.get("mm_token_type_ids"), inputs.get("attention_mask")
        try:
            return layout_from_positions(positions, modality=kinds, valid=valid)
        except ValueError:
            raise LayoutUnknown(str(error)) from error

    def _after(self, past: int, new: TokenLayout) -> TokenLayout:
        """``new`` behind the ``past`` tokens that the cache holds."""
        if past == 0:
            return new
        cache = self.text.get("past_key_values")
        before = None
        if self.history is not None and cache is not None and self.history[0]() is cache:
            before = self.history[1][:past]
        elif self.multimodal:
            raise LayoutUnknown(f"the cache holds {past} tokens that this patched model has not seen")
        if before is None or before.length < past:
            # what was generated since, or all of a text model's past, is text
            rest = TokenLayout.text(past - (before.length if before is not None else 0))
            before = rest if before is None else _join(before, rest)
        return _join(before, new)

    def _once(self, key: Any, build: Callable[[], Any]) -> Any:
        if key not in self.memo:
            try:
                self.memo[key] = build()
            except LayoutUnknown as error:
                self.memo[key] = error
        if isinstance(self.memo[key], LayoutUnknown):
            raise self.memo[key]
        return self.memo[key]


def decodes(args: Any, kwargs: Any) -> bool:
    """Whether a forward is of a single token."""
    for tokens in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), args[0] if args else None):
        if isinstance(tokens, torch.Tensor):
            return tokens.ndim > 1 and tokens.shape[1] == 1
    return False


def _rows(layout: TokenLayout, batch: int) -> TokenLayout:
    """A layout for ``batch`` prompts: as it is, or every prompt repeated as beam search does."""
    if layout.batch_size in (1, batch):
        return layout
    if batch % layout.batch_size:
        raise ValueError(
            f"the layout has {layout.batch_size} prompts but the model runs {batch}: give a layout per prompt "
            "(TokenLayout.batch), or one for all"
        )
    return repeat_layout(layout, batch // layout.batch_size)


def checked_layout(
    given: TokenLayout, batch: int, valid: np.ndarray | None, end: int, *, name: str = "token_layout"
) -> TokenLayout:
    """The first ``end`` tokens of a layout that a user gave under ``name``, for ``batch`` prompts; ValueError unless
    its padding is where the attention mask has it (``valid`` bool ``[B, end]``, None without a mask)."""
    if given.length < end:
        raise ValueError(
            f"{name} has {given.length} tokens but the model is at token {end}: give the layout of the "
            "whole prompt, padding included"
        )
    layout = _rows(given, batch)[:end]
    want = np.ones((1, end), bool) if valid is None else valid
    if (layout.valid != want).any():
        row = int((layout.valid != want).any(axis=1).argmax())
        counts = [int(np.broadcast_to(x, (batch, end))[row].sum()) for x in (layout.valid, want)]
        raise ValueError(
            f"{name} has {counts[0]} tokens in prompt {row} (or other places for its padding) but attention_mask "
            f"{counts[1]}: build it with TokenLayout.batch(layouts, side=...), padded as the tokenizer pads"
        )
    return layout


def _join(before: TokenLayout, after: TokenLayout) -> TokenLayout:
    """Two layouts one after the other."""
    batch = max(before.batch_size, after.batch_size)

    def both(name: str) -> np.ndarray:
        sides = [getattr(x, name) for x in (before, after)]
        if name == "segment":
            sides[1] = sides[1] + (int(sides[0].max(initial=-1)) + 1)
        return np.concatenate([np.broadcast_to(x, (batch, x.shape[1])) for x in sides], axis=1)

    return TokenLayout.from_modality_ids(
        both("modality"), segment=both("segment"), frame=both("frame"), cell=both("cell"), valid=both("valid")
    )
