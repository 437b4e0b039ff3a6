"""`recorded`: the plans of a model's layers, as they were made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.attention import Plan


@contextmanager
def recorded() -> Iterator[list[Plan]]:
    """Every plan that is made in a ``with`` block, in order: of a patched model, one per layer that its spec names. A
    plan holds its block lists, so record one prompt at a time.

    ::

        with mmflex.patched(model, spec), mmflex.plot.recorded() as plans:
            model(**inputs)
        mmflex.plot.plot_heads(plans)
    """
    from ..runtime import attention as runtime

    plans: list[Plan] = []
    make = runtime._planned

    def planned(*args: Any, **kwargs: Any) -> Plan:
        # kept for longer than one call: its tensors must not be those of a graph that the next layer replays
        plans.append(make(*args, **kwargs | {"once": False}))
        return plans[-1]

    runtime._planned = planned
    try:
        yield plans
    finally:
        runtime._planned = make
