"""Why a call of attention is left as it was."""

from __future__ import annotations


class Unfit(Exception):
    """A call that mmflex leaves as it was.

    Args:
        reason: one of a few fixed sentences, by which calls are counted.
        detail: the values of this call.
        notice: whether the user is warned, once per reason.
    """

    def __init__(self, reason: str, detail: str = "", *, notice: bool = True) -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail, self.notice = reason, detail, notice
