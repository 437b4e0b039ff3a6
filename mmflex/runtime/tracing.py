"""Tracing of flash-attn-4's kernels, which takes longer than compiling them: without what it does in vain."""

from __future__ import annotations

import gc
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_OPERATIONS = "cutlass.base_dsl._mlir_helpers.op"
"""The module of nvidia-cutlass-dsl that asks for the place of every operation in the source."""


@contextmanager
def quick_tracing() -> Iterator[None]:
    """For the length of a ``with`` block, kernels of nvidia-cutlass-dsl are traced in about two thirds of the time.
    They stay the same.

    An operation is named after the line that it stands in. The module `inspect` looks for that line on disk, three
    times for each of 32,000 operations of a kernel, which stand in 600 places. And the objects of a trace all live to
    its end, so that collecting garbage finds nothing, each time among more of them.
    """
    collecting = gc.isenabled()
    module: Any = sys.modules.get(_OPERATIONS)
    replaced = module is not None and getattr(module, "inspect", None) is inspect
    try:
        gc.disable()
        if replaced:
            module.inspect = _with_known_places()
        yield
    finally:
        if replaced:
            module.inspect = inspect
        if collecting:
            gc.enable()


def _with_known_places() -> types.ModuleType:
    """`inspect`, with a ``getframeinfo`` that reads each place of the source once."""
    module = types.ModuleType(inspect.__name__)
    vars(module).update(vars(inspect))
    vars(module)["getframeinfo"] = known_places()
    return module


def known_places() -> Callable[..., inspect.Traceback]:
    """``getframeinfo`` for frames that stand in few places."""
    known: dict[tuple[int, int, int], tuple[inspect.Traceback, types.CodeType]] = {}

    def getframeinfo(frame: types.FrameType, context: int = 1) -> inspect.Traceback:
        code = frame.f_code
        key = id(code), frame.f_lasti, context
        place = known.get(key)
        if place is None:  # the code is remembered with it, so that no other gets its number
            place = known[key] = inspect.getframeinfo(frame, context), code
        return place[0]

    return getframeinfo
