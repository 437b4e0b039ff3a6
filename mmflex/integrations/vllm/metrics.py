"""Counters of what was accelerated: in this process, and in vLLM's ``/metrics`` where its client library is there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass
class Counters:
    """Sums since the start of the process.

    Attributes:
        prefills: requests' steps of which at least one layer was accelerated. tokens: their new tokens.
        layers: of those prefills, accelerated. standard: layers of long prefills that ran the standard attention.
        exported: whether they are in ``/metrics`` too: of the ranks that share a layer, one counts.
    """

    prefills: int = 0
    tokens: int = 0
    layers: int = 0
    standard: int = 0
    exported: bool = True

    def add(self, name: str, amount: int = 1) -> None:
        """Adds to one of the sums."""
        setattr(self, name, getattr(self, name) + amount)
        counter = _exported().get(name) if self.exported else None
        if counter is not None:
            counter.inc(amount)


_EXPORTED = {
    "prefills": "Prefills (a request's tokens in one step) of which mmflex accelerated layers",
    "tokens": "New tokens of those prefills",
    "layers": "Layers of prefills that mmflex accelerated",
    "standard": "Layers of long prefills that ran the standard attention",
}


@lru_cache(maxsize=1)
def _exported() -> dict[str, Any]:
    """The Prometheus counters ``mmflex:*``. vLLM's server shows those of its workers where workers live in the server's
    process, or where PROMETHEUS_MULTIPROC_DIR names a folder for all of them."""
    try:
        from prometheus_client import Counter
    except ImportError:
        return {}
    try:
        return {name: Counter(f"mmflex:{name}", what) for name, what in _EXPORTED.items()}
    except ValueError:  # somebody has registered these names
        return {}
