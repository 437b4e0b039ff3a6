"""Values of any kind in error messages: short, whatever they are."""

from __future__ import annotations

import reprlib
from typing import Any

LONGEST = 120
"""Characters that a message spends on a value."""

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 4, LONGEST - 40, LONGEST - 40, 40


def clipped(text: object) -> str:
    """A text as it is, its middle left out where it is longer than a few lines."""
    whole = str(text)
    return whole if len(whole) <= 3 * LONGEST else f"{whole[:LONGEST]} ... {whole[-LONGEST:]}"


def shown(value: Any) -> str:
    """``repr(value)`` for people, cut to `LONGEST` characters; never an error. Files and callers may hold megabytes,
    nest without end or have a ``__repr__`` that raises."""
    try:
        text = _repr.repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."
