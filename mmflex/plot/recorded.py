"""`recorded`: the plans of a model's layers, as they were made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..runtime.calls import observed

if TYPE_CHECKING:
    from ..runtime.plan import Plan


@contextmanager
def recorded() -> Iterator[list[Plan]]:
    """Every plan that is made in a ``with`` block, in order: of a patched model, one per layer that its spec names. A
    plan holds its block lists, so record one prompt at a time.

    ::

        with mmflex.patched(model, spec), mmflex.plot.recorded() as plans:
            model(**inputs)
        mmflex.plot.plot_heads(plans)
    """
    plans: list[Plan] = []
    with observed(plans.append):
        yield plans
