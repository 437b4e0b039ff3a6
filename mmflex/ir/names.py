"""Pattern classes by name: those of mmflex, those that packages offer, and those defined so far, in this order.

So neither a user's class called ``Dense`` nor a notebook cell that is run twice changes what was written before:
configs name the class that they were made with, and plans store selections by `label`.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .shown import shown

GROUP = "mmflex.patterns"
"""The entry point group of packages that offer patterns."""

_defined: list[weakref.ref[type]] = []
_labels: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()


def register(cls: type) -> None:
    """A class that was defined just now."""
    _defined[:] = [ref for ref in _defined if ref() is not None]
    _defined.append(weakref.ref(cls))


@lru_cache(maxsize=1)
def _offers() -> dict[str, list[EntryPoint]]:
    offers: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        offers.setdefault(point.name, []).append(point)
    return offers


def names() -> list[str]:
    """The names of all patterns that `find` knows."""
    live = {cls.__name__ for ref in _defined if (cls := ref()) is not None}
    return sorted({*_offers(), *(name for name in live if not name.startswith("_"))})


def find(name: str) -> Any:
    """The pattern class of a name, or of ``module:qualified.name``; the newest of several that are equal in that.

    Raises:
        ValueError: no such class, several packages that offer one, or a package that cannot be imported.
    """
    if name in _offers() and not name.startswith("_"):
        return _offered(name)
    live = [cls for ref in _defined if (cls := ref()) is not None]
    own = [cls for cls in live if cls.__name__ == name and cls.__module__.startswith("mmflex.ir.")]
    named = own or [cls for cls in live if name in (cls.__name__, _qualified(cls))]
    if not named or name.startswith("_"):
        raise ValueError(
            f"unknown pattern {shown(name)}: known are {', '.join(names())}; import the module that defines it"
        )
    return named[-1]


def _offered(name: str) -> type:
    points = _offers()[name]
    if len({point.value for point in points}) > 1:
        listed = ", ".join(sorted(point.value for point in points))
        raise ValueError(f"pattern {shown(name)} is offered by several packages: {listed}; uninstall all but one")
    try:
        return points[0].load()  # type: ignore[no-any-return]
    except Exception as error:  # whatever a package of somebody else does when it is imported
        raise ValueError(
            f"pattern {shown(name)} is offered as {points[0].value}, which cannot be loaded "
            f"({type(error).__name__}: {error}): install or fix the package that offers it"
        ) from error


def name_of(cls: type) -> str:
    """The shortest name for which `find` returns this very class."""
    try:
        return cls.__name__ if find(cls.__name__) is cls else _qualified(cls)
    except ValueError:
        return _qualified(cls)


def label(cls: type) -> str:
    """A name unique among living classes: it tells apart the sets and numbers of a plan."""
    known = vars(cls).get("_label")
    if known is None:
        name = base = name_of(cls)
        count = 1
        while _labels.setdefault(name, cls) is not cls:
            count += 1
            name = f"{base}~{count}"
        known = name
        type.__setattr__(cls, "_label", known)
    return str(known)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
