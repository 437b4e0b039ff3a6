"""Work beside other work: a second CUDA stream for every stream that attention runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_second: dict[Any, torch.cuda.Stream] = {}


class Beside:
    """Work on the second stream of the current one, for the length of a ``with`` block. Off CUDA it is simply done.

    At the end the current stream waits for all of it, whatever happened in between, and the second for the current one:
    so what the work reads may be let go, and what it has allocated is not given out again while it is being read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._going: list[torch.cuda.Event] = []
        self._second: torch.cuda.Stream | None = None

    def run(self, work: Callable[[], T]) -> Callable[[], T]:
        """Begins the work after all that the current stream holds by now. Returns a function that lets the current
        stream wait for it, and gives its result."""
        if self.device.type != "cuda":
            result = work()
            return lambda: result
        current = torch.cuda.current_stream(self.device)
        key = (self.device, current.cuda_stream)
        if key not in _second:
            # Preferred: else a launch whose blocks wait for a place would only begin when all others have theirs.
            _second[key] = torch.cuda.Stream(self.device, priority=-1)
        second = self._second = _second[key]
        second.wait_event(current.record_event())
        try:
            with torch.cuda.stream(second):
                result = work()
        finally:
            done = second.record_event()
            self._going.append(done)

        def get() -> T:
            current.wait_event(done)
            return result

        return get

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._second is not None:
            current = torch.cuda.current_stream(self.device)
            for done in self._going:
                current.wait_event(done)
            if not torch.cuda.is_current_stream_capturing():  # a capture must end where it began
                self._second.wait_event(current.record_event())
