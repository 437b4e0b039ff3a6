"""The warning that a spec was not honoured."""

from __future__ import annotations


class DenseFallback(UserWarning):
    """A layer ran the model's own attention although its spec asked for less; the message says why."""
