"""`intercept`: attention modules that are watched, and what becomes of their calls."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from mmflex.ir.layout import TokenLayout
from mmflex.ir.pattern import Pattern
from mmflex.runtime.backends import BACKENDS
from mmflex.tuning.config import Config, Spec, per_layer

from ..fallback import DenseFallback
from ..latent import widened
from ..notice import MostlyDense
from ..prompts import LayoutUnknown, checked_layout
from .calls import Attention, long_call
from .heads import KVGroups
from .masks import MaskReader
from .models import attention_modules, config_of, query_heads, takes_patch
from .reasons import Unfit

_MARK = "_mmflex_intercept"
_RECENT = 4
_notices: WeakKeyDictionary[nn.Module, dict[frozenset[int], MostlyDense]] = WeakKeyDictionary()
"""For a model and its layers with a spec: it is said once, not in every `with` block."""


@runtime_checkable
class LayoutReader(Protocol):
    """What reads the layout of the prompt that a model is running: see `integrations.video_models`."""

    def start(self) -> None:
        """Begin to watch the model."""

    def stop(self) -> None:
        """Leave the model as it was."""

    def layout(self, batch: int, tokens: int) -> TokenLayout:
        """The layout ``[batch or 1, tokens]`` of the prompt that was joined last; LayoutUnknown where it is not
        known."""


class Interception:
    """The attention of one model while a ``with mmflex.intercept(...) as seen:`` block runs, and what became of it.

    Attributes:
        taken: how many calls of each layer ran through mmflex, ``{layer: calls}``.
        left: how many ran as they were, ``{(layer, reason): calls}``.
        layout: which token is what; may be set to that of the next prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Spec | Config,
        layout: TokenLayout | LayoutReader | None,
        layers: Sequence[nn.Module] | None,
        chunks: bool,
        backend: str,
    ) -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: use 'auto', {', '.join(map(repr, BACKENDS))}")
        if layout is not None and not isinstance(layout, (TokenLayout, LayoutReader)):
            raise TypeError(
                f"layout is {type(layout).__name__}: give a mmflex.TokenLayout, or a reader: read_llava_video(model)"
            )
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.chunks, self.backend = chunks, backend
        self.layout = layout
        self.modules = attention_modules(self.model, layers)
        first = self.modules[0][1]
        self.spec = _Spec(spec, [n for n, _ in self.modules], query_heads(first, config_of(self.model, first)))
        numbers = frozenset(self.spec.patterns)
        notice = MostlyDense(type(self.model).__name__, numbers)
        self.mostly_dense = _notices.setdefault(self.model, {}).setdefault(numbers, notice)
        self.taken: Counter[int] = Counter()
        self.left: Counter[tuple[int, str]] = Counter()
        self.details: dict[str, str] = {}
        self.prompt = _Pass()
        self.masks = MaskReader()
        self.recent: dict[Any, TokenLayout] = {}
        self.layers: list[_Layer] = []
        self.undo = ExitStack()

    # ---- the block -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Interception:
        chosen = [(number, module) for number, module in self.modules if number in self.spec]
        name = type(self.model).__name__
        for number, module in chosen:
            if _MARK in vars(module):
                raise ValueError(f"layer {number} of {name} is intercepted already: leave that `with` block first")
            if "_mmflex" in vars(module):
                raise ValueError(f"{name} is patched: call mmflex.unpatch(model) first, or leave out mmflex.intercept")
        if takes_patch(self.model):
            warnings.warn(
                f"mmflex.intercept: {name} goes through transformers' attention interface, for which there is "
                "mmflex.patch(model, spec): it reads layouts by itself and needs no mask tensors",
                stacklevel=2,
            )
        with ExitStack() as undo:
            if self.layout is not None and not isinstance(self.layout, TokenLayout):
                self.layout.start()
                undo.callback(self.layout.stop)
            self.layers = [_Layer(self, number, module) for number, module in chosen]
            for layer in self.layers:
                layer.watch()
                undo.callback(layer.release)
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo.close()
        self.masks.forget()

    # ---- what became of it -----------------------------------------------------------------------------------------

    @property
    def reasons(self) -> dict[str, int]:
        """How many calls were left as they were, by reason."""
        counts: Counter[str] = Counter()
        for (_, reason), calls in self.left.items():
            counts[reason] += calls
        return dict(counts)

    def __str__(self) -> str:
        lines = [f"mmflex: {sum(self.taken.values())} calls of attention in {len(self.taken)} layers"]
        for reason, calls in self.reasons.items():
            layers = sorted(layer for layer, why in self.left if why == reason)
            detail = f" ({self.details[reason]})" if self.details[reason] else ""
            lines.append(f"as they were: {calls} calls in layers {', '.join(map(str, layers))}: {reason}{detail}")
        return "\n".join(lines)

    def leave(self, layer: int, why: Unfit) -> None:
        """Count a call that runs as it was, and warn once per reason."""
        first = why.reason not in self.details
        self.details.setdefault(why.reason, why.detail)
        self.left[layer, why.reason] += 1
        if first and why.notice:
            message = f"mmflex: layer {layer} of {type(self.model).__name__} runs its own attention: {why}"
            warnings.warn(message, DenseFallback, stacklevel=3)

    # ---- one call --------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def run(self, layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A long call of an attention module."""
        if layer.number <= self.prompt.layer:
            self.prompt = _Pass()
            self.masks.forget()
        self.prompt.layer = layer.number
        redirect = _Redirect(functools.partial(self.attend, layer))
        with redirect:
            result = layer.inner(*args, **kwargs)
        if not redirect.called:
            name = type(layer.module).__name__
            self.leave(
                layer.number,
                Unfit(
                    "no call of scaled_dot_product_attention",
                    f'{name} attends by flash, eager or other code: load the model with attn_implementation="sdpa"',
                ),
            )
        return result

    def attend(self, layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A call of `scaled_dot_product_attention` within an attention module."""
        try:
            call = Attention.of(*args, **kwargs)
            call.check(layer.module)
            valid = call.padding(self.masks)
            layout = self._layout(len(call.q), call.k.shape[2], valid)
        except Unfit as why:
            self.leave(layer.number, why)
            return scaled_dot_product_attention(*args, **kwargs)
        out = layer.attention(call, self.spec.of(layer.number, call.q.shape[1]), layout, self.backend)
        self.taken[layer.number] += 1
        return out

    def _layout(self, batch: int, keys: int, valid: np.ndarray | None) -> TokenLayout:
        """The layout of the keys of a call."""
        if self.prompt.keys is None:
            self.prompt.keys = keys
        key = (batch, keys, None if valid is None else valid.tobytes())
        if key not in self.prompt.layouts:
            try:
                self.prompt.layouts[key] = self._checked(batch, keys, valid)
            except Unfit as why:
                self.prompt.layouts[key] = why
        layout = self.prompt.layouts[key]
        if isinstance(layout, Unfit):
            raise layout
        return layout

    def _checked(self, batch: int, keys: int, valid: np.ndarray | None) -> TokenLayout:
        given = self.layout
        if given is None:
            if valid is None:
                return TokenLayout.text(keys)
            return self._same(TokenLayout.from_modality_ids(np.zeros(valid.shape, np.int32), valid=valid))
        if keys != self.prompt.keys:
            raise Unfit("tokens that were dropped between layers", f"{self.prompt.keys} in earlier layers, {keys} here")
        if not isinstance(given, TokenLayout):
            try:
                given = given.layout(batch, keys)
            except LayoutUnknown as error:
                raise Unfit("a prompt whose layout could not be read", str(error)) from error
        if given.length != keys and not (self.chunks and given.length > keys):
            hint = "; give chunks=True if this is a part of it" if given.length > keys else ""
            raise Unfit("a layout of another length", f"{given.length} tokens, the call has {keys} keys{hint}")
        if valid is None and given.padded:
            valid = _right_padding(given)
        self._same(given)  # so that it is the one that is taken, and what is planned outlives the block
        return self._same(checked_layout(given, batch, valid, keys, name="the layout"))

    def _same(self, layout: TokenLayout) -> TokenLayout:
        """An equal layout of before, if there is one: plans are kept with their layout."""
        known = self.recent.pop(layout.fingerprint, layout)
        self.recent[layout.fingerprint] = known
        if len(self.recent) > _RECENT:
            del self.recent[next(iter(self.recent))]
        return known


class _Pass:
    """What the layers of one forward pass have in common."""

    def __init__(self) -> None:
        self.layer = -1
        self.keys: int | None = None
        self.layouts: dict[Any, TokenLayout | Unfit] = {}


class _Layer:
    """One attention module, watched in place of its ``forward``.

    Not by forward hooks: those are skipped by callers of ``forward`` itself, make every decode step take torch's slow
    path, and do not run when a prefill is interrupted from the keyboard, which would leave the mode on.
    """

    def __init__(self, interception: Interception, number: int, module: nn.Module) -> None:
        self.interception, self.number, self.module = interception, number, module
        self.inner: Callable[..., Any] = module.forward
        self.before = vars(module).get("forward")
        self.groups = KVGroups(module, config_of(interception.model, module))

    def watch(self) -> None:
        self.module.forward = self.forward  # type: ignore[method-assign]
        vars(self.module)[_MARK] = self

    def release(self) -> None:
        vars(self.module).pop(_MARK, None)
        if self.before is None:
            vars(self.module).pop("forward", None)
        else:
            self.module.forward = self.before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not long_call(args, kwargs):
            return self.inner(*args, **kwargs)
        return self.interception.run(self, args, kwargs)

    def attention(self, call: Attention, spec: tuple[Pattern, ...], layout: TokenLayout, backend: str) -> Tensor:
        """``[B, Hq, M, Dv]`` by mmflex."""
        from mmflex.runtime.attention import attention

        q, k, v = call.q, call.k, call.v
        group = self.groups.of(k, v) if k.shape[1] == q.shape[1] else 1
        if group > 1:
            # contiguous: kernels count elements in 32 bits, and a view's last one is far away
            k, v = k[:, ::group].contiguous(), v[:, ::group].contiguous()
        width = max(q.shape[3], v.shape[3])  # latent attention has narrower values
        scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
        q, k, padded = (widened(x, width) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            out = attention(q, k, padded, spec, layout=layout, scale=scale, backend=backend)
        if backend == "auto":
            self.interception.mostly_dense.ran(self.number, tuple(spec), layout)
        return out[..., : v.shape[3]]


class _Redirect(TorchFunctionMode):
    """While it is on, `scaled_dot_product_attention` is answered by a function."""

    def __init__(self, answer: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.answer, self.called = answer, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.called = True
            return self.answer(args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Spec:
    """A spec by layer and head; the number of heads is that of the first call where the model does not tell it."""

    def __init__(self, spec: Spec | Config, layers: list[int], heads: int | None) -> None:
        self.spec, self.layers = spec, layers
        if isinstance(spec, Config):
            self.patterns: dict[int, tuple[Pattern, ...]] = spec.for_model(len(layers), heads or spec.heads)
        else:
            self.patterns = per_layer(spec, layers, heads or _heads_named(spec))
        self.certain = heads is not None or isinstance(spec, Config)

    def __contains__(self, layer: int) -> bool:
        return layer in self.patterns

    def of(self, layer: int, heads: int) -> tuple[Pattern, ...]:
        patterns = self.patterns[layer]
        if len(patterns) != heads:
            if self.certain or isinstance(self.spec, Config):
                raise ValueError(
                    f"layer {layer} computes {heads} query heads but its spec has {len(patterns)} patterns: give one "
                    "pattern, or one per query head"
                )
            self.patterns, self.certain = per_layer(self.spec, self.layers, heads), True
            patterns = self.patterns[layer]
        return patterns


def _heads_named(spec: Spec) -> int:
    """The number of heads that a spec is written for; 1 where it says nothing of heads."""
    if isinstance(spec, Pattern):
        return 1
    values = spec.values() if hasattr(spec, "values") else [spec]
    return next((len(v) for v in values if not isinstance(v, Pattern) and hasattr(v, "__len__")), 1)


def _right_padding(layout: TokenLayout) -> np.ndarray | None:
    """The layout's own padding where all of it is behind the prompts: there a causal mask hides it without naming
    it."""
    valid = layout.valid
    return valid if not (valid[:, 1:] & ~valid[:, :-1]).any() else None
