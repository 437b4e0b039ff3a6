"""A bounded dictionary for what is computed once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Memo(OrderedDict[Any, Any]):
    """Keeps the ``size`` entries that were used last; uses count once it is half full. Safe to share between threads:
    each step is one of OrderedDict's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def recall(self, key: Any, default: Any = None) -> Any:
        """The entry, marked as used; ``default`` where there is none."""
        value = self.get(key, default)
        if 2 * len(self) > self.size and value is not default:
            with suppress(KeyError):  # dropped by another thread in between
                self.move_to_end(key)
        return value

    def keep(self, key: Any, value: Any) -> Any:
        """Adds an entry, drops what was used longest ago beyond the bound; the value."""
        self[key] = value
        while len(self) > self.size:
            try:
                self.popitem(last=False)
            except KeyError:  # another thread was at it
                break
        return value

    def once(self, key: Any, build: Callable[[], Any]) -> Any:
        """What ``build`` returns, kept; None is an entry like any other."""
        value = self.recall(key, self)
        return self.keep(key, build()) if value is self else value

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy starts empty: what is kept belongs to its owner."""
        return type(self), (self.size,)
