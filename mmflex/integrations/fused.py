"""A stack of equal layers under one `torch.compile`: norms, rotations, activations and residuals in few kernels.

Every layer of a stack runs the same code on weights of its own, so one compilation, with the number of tokens left
open, serves all of them ("regional" compilation). What a layer computes stays the same to rounding.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch_config

from mmflex.runtime import recorded
from mmflex.runtime.backends import UNCHECKED
from mmflex.runtime.caches import bounded

FUSED_ROWS = 16_384
"""Without a word from the user layers are compiled from this many rows (tokens) on: below, compiling takes longer than
it ever saves."""


def _layer_forward(layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    return type(layer).forward(layer, hidden, **kwargs)


_compiled = bounded(16)
"""Compiled functions by kind of layer: a model that is patched again, and another of its shape, are not compiled again.
"""


def _kind(layer: nn.Module) -> Any:
    """What layers must have in common to run the same compiled code."""
    weights = tuple((name, p.shape, p.dtype, p.device) for name, p in layer.named_parameters())
    return type(layer), weights


def compiled_for(layer: nn.Module) -> Callable[..., Any]:
    """``(module, hidden, kwargs) -> output``, compiled once for all modules of this kind."""
    return _compiled.once(_kind(layer), partial(_compile, f"mmflex_{type(layer).__name__}"))


def _compile(name: str) -> Callable[..., Any]:
    # Code of its own for every kind: PyTorch counts compilations by code, and gives up at the eighth. By the name logs
    # and traces tell layers from MLPs.
    function = types.FunctionType(_layer_forward.__code__.replace(co_name=name), globals(), name)
    return _compiled_once(torch.compile(function, dynamic=True, fullgraph=True))


def _compiled_once(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, which is compiled where PyTorch would compile it, and what is called in it, twice.

    Layers have numbers (an epsilon, a scale). With ``dynamic`` they become symbols that no graph can compute with: the
    whole graph is traced, thrown away and traced with constants. In the first call they are constants at once; layers
    whose numbers differ are compiled again, with symbols.

    The first run of a graph is watched for operators that return their inputs. What it calls, attention kernels and the
    compiled MLP, is then dispatched otherwise than in later runs, and compiled for both. So nothing is watched.
    """
    begun = False

    def run(*args: Any) -> Any:
        nonlocal begun
        constants = nullcontext() if begun else torch._dynamo.config.patch(specialize_float=True)
        with functorch_config.patch(**UNCHECKED), constants:
            result = compiled(*args)
        begun = True
        return result

    return run


def _plain(value: Any) -> Any:
    """Tensors that are no views (tuples of them too): graphs are guarded by what a view's base looks like, so the first
    layer, whose input often is one, would get a compilation of its own."""
    if isinstance(value, torch.Tensor):
        return value.data
    return tuple(_plain(part) for part in value) if type(value) is tuple else value


class FusedLayers:
    """Runs the layers of a stack through one compiled function; in place of each layer's ``forward``.

    Args:
        layers: modules of one class whose forward takes ``hidden [..., T, width]`` first and else keyword arguments.
        fuse: True compiles always, None on CUDA from `FUSED_ROWS` rows on, False never.

    A layer runs uncompiled with gradients, inside other compiled code and, after a notice, once compiling has failed.
    """

    def __init__(self, layers: Sequence[nn.Module], fuse: bool | None) -> None:
        self.fuse, self.broken = fuse, False
        self.compiled: Callable[..., Any] | None = None
        self.layers: list[_FusedLayer] = []
        if fuse is False or not layers:
            return
        reason = self.why_not(layers)
        if reason is None:
            self.layers = [_FusedLayer(self, layer) for layer in layers]
        elif fuse:
            warnings.warn(f"mmflex: {len(layers)} layers are not compiled: {reason}", stacklevel=2)

    def why_not(self, layers: Sequence[nn.Module]) -> str | None:
        """Why these layers cannot share compiled code; None if they can."""
        wrapped = [type(layer).__name__ for layer in layers if "forward" in vars(layer)]
        if wrapped:
            return f"{wrapped[0]} has a forward of another library"
        return None if len({type(layer) for layer in layers}) == 1 else "they are of several classes"

    @property
    def begun(self) -> bool:
        """Whether the last call has changed anything but its output, so that it cannot be made again."""
        return False

    def wanted(self, hidden: torch.Tensor) -> bool:
        """Whether a call on these rows goes through compiled code."""
        if self.broken or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        if recorded.current() is not None:  # nothing will be computed
            return False
        if torch._C._len_torch_dispatch_stack():  # a counter or tracer of operators, which compiled code would pass by
            return False
        rows = hidden.shape[:-1].numel()
        return hidden.shape[-2] > 1 and (bool(self.fuse) or (hidden.device.type == "cuda" and rows >= FUSED_ROWS))

    def run(self, layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """One layer, compiled; as it is where that fails."""
        try:
            return self.call(layer, hidden, kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways
            if self.begun:
                raise
            out = type(layer).forward(layer, hidden, **kwargs)  # raises what the layer itself raises
            self.broken = True
            reason = str(error).strip().splitlines() or [""]
            warnings.warn(
                f"mmflex: {type(layer).__name__} can't be compiled and runs as it is: {type(error).__name__}: "
                f"{reason[0][:300]}; mmflex.patch(model, spec, fuse=False) doesn't try",
                stacklevel=2,
            )
            return out

    def call(self, layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """One layer through compiled code."""
        if self.compiled is None:
            self.compiled = compiled_for(layer)
        return self.compiled(layer, _plain(hidden), {name: _plain(value) for name, value in kwargs.items()})

    def remove(self) -> None:
        """Give the layers their own forward back."""
        for layer in self.layers:
            vars(layer.module).pop("forward", None)
        self.layers = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": None}


class _FusedLayer:
    """A layer's ``forward``: a bound method, so that a copy of the model runs the weights of the copy."""

    def __init__(self, stack: FusedLayers, module: nn.Module) -> None:
        self.stack, self.module = stack, module
        self.inner = module.forward
        module.forward = self.forward  # type: ignore[method-assign]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or not self.stack.wanted(hidden_states):
            return self.inner(hidden_states, *args, **kwargs)
        return self.stack.run(self.module, hidden_states, kwargs)
