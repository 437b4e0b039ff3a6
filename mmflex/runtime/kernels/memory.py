"""Tensors that a captured graph shares with what runs before it: constants, and what estimates find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_kept: dict[Any, Tensor] = {}
_used: ContextVar[list[Tensor] | None] = ContextVar("mmflex used", default=None)


def kept(key: Any, device: torch.device, make: Callable[[torch.device], Tensor]) -> Tensor:
    """A constant on a device, made once (256 are kept). ``make`` runs on the CPU: the copy is waited for, so that it is
    there for every stream. In somebody else's CUDA graph (not within `using`) it is made by the graph itself, which
    holds nothing of ours."""
    used, key = _used.get(), (key, device)
    if used is None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make(device)
    found = _kept.get(key)
    if found is None:
        found = make(torch.device("cpu")).to(device)
        if len(_kept) >= 256:
            _kept.clear()
        _kept[key] = found
    if used is not None:
        used.append(found)
    return found


@contextmanager
def using() -> Iterator[list[Tensor]]:
    """The constants that are used in a ``with`` block: a graph that is captured there reads them when it is replayed,
    and has to hold them."""
    used: list[Tensor] = []
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


_offered: ContextVar[list[Tensor] | None] = ContextVar("mmflex offered", default=None)


@contextmanager
def writing_to(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Offers tensors to `result`, in order, for the length of a ``with`` block."""
    token = _offered.set(list(tensors))
    try:
        yield
    finally:
        _offered.reset(token)


def result(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 of any content, for what an estimate finds: where a graph reads it, if one will (`writing_to`)."""
    offered = _offered.get()
    if offered:
        first = offered[0]
        if (first.shape, first.dtype, first.device) == (shape, torch.float32, device):
            return offered.pop(0)
        offered.clear()  # others have been found in between: which is which is not known any more
    return torch.empty(shape, dtype=torch.float32, device=device)
