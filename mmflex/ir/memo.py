"""A bounded dictionary for what is computed once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from threading import RLock
from typing import Any


class Memo(OrderedDict[Any, Any]):
    """Keeps the ``size`` entries that were used last; uses count once it is half full. Safe to share between threads:
    comparing keys may run Python code, in which another thread may come by, and OrderedDict does not survive that.
    Look-ups are those of dict, which does, and take no lock: every call of attention makes two."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.lock = size, RLock()

    def recall(self, key: Any, default: Any = None) -> Any:
        """The entry, marked as used; ``default`` where there is none."""
        value = self.get(key, default)
        if value is not default and 2 * len(self) > self.size:
            with self.lock, suppress(KeyError):  # dropped by another thread
                self.move_to_end(key)
        return value

    def keep(self, key: Any, value: Any) -> Any:
        """Adds an entry, drops what was used longest ago beyond the bound; the value."""
        with self.lock:
            self[key] = value
            while len(self) > self.size:
                self.popitem(last=False)
        return value

    def once(self, key: Any, build: Callable[[], Any]) -> Any:
        """What ``build`` returns, kept; None is an entry like any other."""
        value = self.recall(key, self)
        return self.keep(key, build()) if value is self else value

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy starts empty: what is kept belongs to its owner."""
        return type(self), (self.size,)
