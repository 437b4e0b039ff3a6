"""What outlives a call and belongs to no layout or program: bounded, in one place, and forgotten on request."""

from __future__ import annotations

import sys
from typing import Any

from ..ir.layout import layouts_alive
from ..ir.memo import Memo

_memos: list[Memo] = []


def bounded(size: int) -> Memo:
    """A `Memo` that `clear_caches` empties: for the length of the process, of at most ``size`` entries."""
    memo = Memo(size)
    _memos.append(memo)
    return memo


def clear_caches() -> None:
    """Forget everything that mmflex keeps between calls: programs, plans and captured graphs of all layouts, compiled
    attention kernels, constants on devices, streams, and what was derived from expressions.

    Results do not change; the next calls take as long as first calls do. What Inductor, Triton and flash-attn-4 keep on
    disk stays there. Do not call this while another thread or a compiled graph is in a call.
    """
    for memo in _memos:
        memo.clear()
    for layout in layouts_alive():
        layout.forget()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("mmflex", "mask_builders"):
            for value in list(vars(module).values()):
                _clear_function(value)


def _clear_function(value: Any) -> None:
    """Empties a function's `functools.lru_cache`."""
    if callable(getattr(value, "cache_clear", None)):
        value.cache_clear()
