"""Constants on a device, and the tensors that a captured graph shares with what runs before it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .caches import bounded

_constants = bounded(512)
_indices = bounded(4096)
_captured: dict[Any, Tensor] = {}
_used: ContextVar[list[Tensor] | None] = ContextVar("mmflex constants used", default=None)


def device_constant(key: Any, device: torch.device, make: Callable[[torch.device], Tensor]) -> Tensor:
    """A tensor that follows from ``key`` alone, on a device, made once.

    Args:
        key: hashable, unlike those of other constants: begin it with a name.
        make: makes the tensor on the CPU. The copy to the device is waited for, so that it is there for every stream.

    While somebody else captures a CUDA graph (not within `constants_used`), the tensor is made in that graph, which
    then depends on nothing of ours.
    """
    used, key = _used.get(), (key, device)
    if used is None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make(device)
    constant = _constants.recall(key)
    if constant is None:
        constant = _constants.keep(key, make(torch.device("cpu")).to(device))
    if used is not None:
        used.append(constant)
    return constant


def index_constant(values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Whole numbers [n] as a constant. No graph may copy them from the host, so somebody else's graph reads those of an
    earlier call, which are kept from then on: a few bytes each."""
    key = ("index", values, dtype, device)
    constant = _indices.recall(key)
    if constant is None:
        constant = _indices.keep(key, torch.tensor(values, dtype=dtype, device=device))
    used = _used.get()
    if used is not None:
        used.append(constant)
    elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[key] = constant
    return constant


_of_arrays: dict[tuple[int, torch.device], tuple[weakref.ref, Tensor]] = {}


def array_constant(array: np.ndarray, device: torch.device) -> Tensor:
    """An int32 copy of a host array on a device, made once in the array's life. For estimates, which run outside our
    graphs: nothing is told that it was used."""
    key = (id(array), device)
    if key not in _of_arrays or _of_arrays[key][0]() is not array:
        tensor = torch.tensor(array, dtype=torch.int32, device=device)
        _of_arrays[key] = (weakref.ref(array, lambda _: _of_arrays.pop(key, None)), tensor)
    return _of_arrays[key][1]


@contextmanager
def constants_used() -> Iterator[list[Tensor]]:
    """The constants that are used in a ``with`` block: a graph that is captured there reads them when it is replayed,
    and has to hold them."""
    used: list[Tensor] = []
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


_offered: ContextVar[list[Tensor] | None] = ContextVar("mmflex tensors offered", default=None)


@contextmanager
def writing_to(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Offers tensors to `estimate_result`, in order, for the length of a ``with`` block."""
    token = _offered.set(list(tensors))
    try:
        yield
    finally:
        _offered.reset(token)


def estimate_result(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 of any content, for what an estimate finds: where a graph reads it, if one will (`writing_to`)."""
    offered = _offered.get()
    if offered:
        first = offered[0]
        if (first.shape, first.dtype, first.device) == (shape, torch.float32, device):
            return offered.pop(0)
        offered.clear()  # others have been found in between: which is which is not known any more
    return torch.empty(shape, dtype=torch.float32, device=device)
