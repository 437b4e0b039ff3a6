"""The layers of a language model under one compilation: norms, projections, rotations, activations and residuals.

A decoder layer also has what no compilation can share: its number, its part of the cache, its spec. So the compiled
code is given none of them. Attention with its cache is one closed operation in it, and so is the MLP, which runs in
chunks of rows (`long_prefill`) through compiled code of its own. See `closed`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .closed import INSIDE, running
from .fused import FusedLayers, compiled_for
from .long_prefill import RowChunks, is_mlp
from .prefill import attention_forward

_OWN = ("attention_mask", "past_key_values", "position_embeddings", "use_cache")
"""Arguments of a layer that its attention does not hand on to the attention function."""

_KEYWORDS = {None, "dropout", "scaling", "sliding_window", "position_ids"}
"""What an attention module may hand to the attention function besides the tensors; None stands for its ``**kwargs``."""


def why_not(layer: nn.Module, attention: nn.Module) -> str | None:
    """Why the layers of this class cannot run with attention and cache as one closed operation; None if they can.

    Read off their source: the cache must be touched in one place, right before attention, and attention must be told
    nothing that only the module knows.
    """
    try:
        outer, inner = (_function(type(module)) for module in (layer, attention))
    except (OSError, TypeError, SyntaxError):
        return f"the source of {type(layer).__name__} is not to be found"
    handed_on = [k.value for k in _nodes(outer, ast.keyword) if k.arg == "past_key_values"]
    if len(handed_on) != 1 or len(_named(outer, "past_key_values")) != 1:
        return f"{type(layer).__name__} uses its cache outside of attention"
    if outer.args.kwarg is None or inner.args.kwarg is None:
        return f"{type(layer).__name__} does not hand on further arguments"
    updates = [
        call for call in _nodes(inner, ast.Call)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "update"
        and isinstance(call.func.value, ast.Name) and call.func.value.id == "past_key_values"
    ]  # fmt: skip
    tests = [c for c in _nodes(inner, ast.Compare) if isinstance(c.left, ast.Name) and c.left.id == "past_key_values"]
    alone = len(_named(inner, "past_key_values")) == len(updates) + len(tests)
    if len(updates) != 1 or len(updates[0].args) != 3 or updates[0].keywords or not alone:
        return f"{type(attention).__name__} does more with its cache than to put keys and values in"
    if sum(node.attr == "layer_idx" for node in _nodes(inner, ast.Attribute)) != 1:
        return f"{type(attention).__name__} computes by its layer's number"
    calls = [
        call for call in _nodes(inner, ast.Call)
        if isinstance(call.func, ast.Name) and call.func.id == "attention_interface"
    ]  # fmt: skip
    if len(calls) != 1 or None not in {k.arg for k in calls[0].keywords}:
        return f"{type(attention).__name__} does not call one attention function with all arguments"
    extra = {k.arg for k in calls[0].keywords} - _KEYWORDS
    if extra:
        return f"{type(attention).__name__} tells the attention function {', '.join(map(str, sorted(map(str, extra))))}"
    return None


def _function(cls: type) -> ast.FunctionDef:
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(cls.forward))).body  # type: ignore[attr-defined]
    assert isinstance(function, ast.FunctionDef)
    return function


def _nodes(tree: ast.AST, kind: type) -> list[Any]:
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def _named(tree: ast.AST, name: str) -> list[Any]:
    return [node for node in _nodes(tree, ast.Name) if node.id == name]


class DecoderLayers(FusedLayers):
    """Runs a language model's layers through one compiled function.

    Args:
        layers: decoder layers. attention: the attention module of each. chunks: the patch's `RowChunks`.
        fuse: as in `FusedLayers`.
    """

    def __init__(
        self, layers: Sequence[nn.Module], attention: Sequence[nn.Module], chunks: Sequence[RowChunks],
        fuse: bool | None,
    ) -> None:  # fmt: skip
        self.attention, self.chunks = list(attention), list(chunks)
        self.attended = False
        super().__init__(layers, fuse)

    def why_not(self, layers: Sequence[nn.Module]) -> str | None:
        reason = super().why_not(layers)
        if reason is None and len(self.attention) != len(layers):
            reason = f"they have {len(self.attention)} attention modules"
        if reason is None and sum(is_mlp(child) for child in layers[0].children()) != 1:
            reason = f"{type(layers[0]).__name__} has no plain MLP"
        return why_not(layers[0], self.attention[0]) if reason is None else reason

    def call(self, layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        self.attended = False
        attention = next(a for a in self.attention if any(a is child for child in layer.children()))
        mlp = next(child for child in layer.children() if is_mlp(child))
        visible = {**kwargs, "attention_mask": None, "past_key_values": None, INSIDE: True}
        with running(_Call(self, attention, mlp, next((c for c in self.chunks if c.module is mlp), None), kwargs)):
            out = super().call(layer, hidden, visible)
        if not self.attended:
            raise RuntimeError(f"{type(attention).__name__} was not reached")
        return out

    @property
    def begun(self) -> bool:
        return self.attended  # the cache has its keys and values


class _Call:
    """One layer in one forward: what its closed operations do."""

    def __init__(
        self, stack: DecoderLayers, attention: nn.Module, mlp: nn.Module, chunks: RowChunks | None,
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        self.stack, self.attention, self.mlp_module, self.chunks, self.kwargs = stack, attention, mlp, chunks, kwargs

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        self.stack.attended = True
        module, cache = self.attention, self.kwargs.get("past_key_values")
        if cache is not None:
            key, value = cache.update(key, value, module.layer_idx)
        rest = {name: given for name, given in self.kwargs.items() if name not in _OWN}
        if hasattr(module, "sliding_window"):
            rest["sliding_window"] = module.sliding_window
        mask = self.kwargs.get("attention_mask")
        out, _ = attention_forward(module, query, key, value, mask, scaling=scaling, **rest)
        return out

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        assert self.chunks is not None
        flat = x.reshape(-1, x.shape[-1])  # one rank for all calls: one compilation
        return self.chunks.rows(flat, self.compiled_mlp).view(x.shape)

    def compiled_mlp(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:  # would be compiled for itself
            return type(self.mlp_module).forward(self.mlp_module, x)  # type: ignore[no-any-return]
        return compiled_for(self.mlp_module)(self.mlp_module, x, {})  # type: ignore[no-any-return]
