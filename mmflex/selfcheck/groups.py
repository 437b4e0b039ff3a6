"""The groups of checks. A new one is a module with ``jobs`` and ``run`` (`jobs.Group`), listed here."""

from __future__ import annotations

from . import in_a_row, long_prompts, lowerings, not_finite, segments
from .jobs import Group

GROUPS: dict[str, Group] = {
    "lowerings": lowerings,  # type: ignore[dict-item]
    "not finite": not_finite,  # type: ignore[dict-item]
    "in a row": in_a_row,  # type: ignore[dict-item]
    "segments": segments,  # type: ignore[dict-item]
    "long": long_prompts,  # type: ignore[dict-item]
}
