"""Overlap on a side stream: a second CUDA stream for every stream that attention runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .caches import bounded

T = TypeVar("T")

_side_of = bounded(64)


class SideStream:
    """Work on the side stream of the current one, for the length of a ``with`` block. Off CUDA it is simply done.

    At the end the current stream waits for all of it, whatever happened in between, and the side stream for the current
    one: so the inputs of the work may be freed, and its allocations are not reused while they are being read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ends: list[torch.cuda.Event] = []
        self._side: torch.cuda.Stream | None = None

    def run(self, work: Callable[[], T]) -> Callable[[], T]:
        """Starts the work after everything queued on the current stream so far. Returns a function that makes the
        current stream wait for it, and returns its result."""
        if self.device.type != "cuda":
            result = work()
            return lambda: result
        current = torch.cuda.current_stream(self.device)
        # High priority: otherwise its blocks would wait until all those of earlier launches are scheduled.
        side = _side_of.once((self.device, current.cuda_stream), lambda: torch.cuda.Stream(self.device, priority=-1))
        self._side = side
        side.wait_event(current.record_event())
        try:
            with torch.cuda.stream(side):
                result = work()
        finally:
            end = side.record_event()
            self._ends.append(end)

        def get() -> T:
            current.wait_event(end)
            return result

        return get

    def __enter__(self) -> SideStream:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._side is not None:
            current = torch.cuda.current_stream(self.device)
            for end in self._ends:
                current.wait_event(end)
            if not torch.cuda.is_current_stream_capturing():  # a capture must end where it began
                self._side.wait_event(current.record_event())
