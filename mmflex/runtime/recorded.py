"""Calls of `mmflex.attention` that are written down instead of made, so that another process can compile for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ir.layout import TokenLayout
from .calls import Request, decided, listed
from .inputs import Spec
from .kernels.listing import ListedKernel


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A call without its numbers; can be pickled if its patterns can.

    Attributes:
        tensors: q, k, v on "meta". device: where they were. spec, layout, request: as given.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    device: torch.device
    spec: Spec
    layout: TokenLayout | None
    request: Request

    def kernels(self) -> list[ListedKernel]:
        """`calls.listed`."""
        return listed(*self.tensors, self.device, self.spec, self.layout, self.request)


@dataclass(eq=False)
class Recording:
    """The calls of a `recording`, equal ones once."""

    by_key: dict[Any, RecordedCall] = field(default_factory=dict)

    def add(self, q: Tensor, k: Tensor, v: Tensor, spec: Spec, layout: TokenLayout | None, request: Request) -> Any:
        """Notes a call, and returns what it would, of any content. Raises what it would for its arguments."""
        decided(q, k, spec, layout, request)  # others ask what the cost model said
        shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (q, k, v))
        patterns = tuple(spec) if isinstance(spec, list) else spec
        key = shapes, patterns, None if layout is None else layout.fingerprint, request
        meta = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (q, k, v)]
        self.by_key.setdefault(key, RecordedCall((meta[0], meta[1], meta[2]), q.device, spec, layout, request))
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        return (out, q.new_empty(q.shape[:3], dtype=torch.float32)) if request.lse else out


_recording: ContextVar[Recording | None] = ContextVar("mmflex recording of calls", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """In the block calls of `mmflex.attention` are noted, not made; what they return has any content."""
    calls = Recording()
    token = _recording.set(calls)
    try:
        yield calls
    finally:
        _recording.reset(token)


def current() -> Recording | None:
    """What calls are noted in; None where they are made."""
    return _recording.get()
