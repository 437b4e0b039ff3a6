"""Names for objects of ours by which a graph of torch.compile can refer to them while they live."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

_numbers = itertools.count()
_alive: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def new_serial(thing: Any) -> str:
    """A name for an object, unlike that of any other in this process."""
    name = f"mmflex-{next(_numbers)}"
    _alive[name] = thing
    return name


def by_serial(name: str) -> Any:
    """The object of a name. RuntimeError where nothing holds it any more."""
    try:
        return _alive[name]
    except KeyError:
        raise RuntimeError(
            f"the pattern or layout {name!r} of a compiled graph is gone: keep the spec and the layout as long as the "
            "compiled function is called"
        ) from None


def alive(kind: type) -> list[Any]:
    """All objects of a class that have a name."""
    return [thing for thing in list(_alive.values()) if isinstance(thing, kind)]
