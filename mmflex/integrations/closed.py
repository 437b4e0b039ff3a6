"""Operations that stay closed inside compiled layers: attention with its cache, and an MLP in chunks of rows.

What they compute follows from the prompt and from Python objects (a cache, a spec, a layer's number), which a compiled
graph would be guarded by, layer by layer. So the graph holds one operation, and whoever runs the graph says beforehand
whose it is: `running`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch

INSIDE = "mmflex_inside"
"""The keyword by which a layer's attention learns that it is traced inside a compiled layer."""


class Running(Protocol):
    """The layer that a compiled graph is run for."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """query [B, Hq, M, D], the new keys and values [B, Hkv, M, D | Dv] -> [B, M, Hq, Dv]."""

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width]."""


_running: ContextVar[Running | None] = ContextVar("mmflex_running", default=None)

tracing = False
"""Whether compiled layers are being run, and so perhaps traced. Read by traced code, which a `ContextVar` cannot be."""


@contextmanager
def running(layer: Running) -> Iterator[None]:
    """Compiled layers called in the block are those of ``layer``."""
    global tracing
    before, token = tracing, _running.set(layer)
    tracing = True
    try:
        yield
    finally:
        tracing = before
        _running.reset(token)


def running_layer() -> Running | None:
    """The layer whose compiled graph runs; None outside of one."""
    return _running.get()


def _now() -> Running:
    layer = running_layer()
    if layer is None:
        raise RuntimeError("a layer compiled by mmflex was called by other code: call the patched model instead")
    return layer


@torch.library.custom_op("mmflex::layer_attention", mutates_args=())
def layer_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of the running layer, `Running.attend`."""
    return _now().attend(query, key, value, scaling)


@layer_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


@torch.library.custom_op("mmflex::layer_mlp", mutates_args=())
def layer_mlp(x: torch.Tensor) -> torch.Tensor:
    """The MLP of the running layer, `Running.mlp`."""
    return _now().mlp(x)


@layer_mlp.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)
