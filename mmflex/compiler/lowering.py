"""`Lowering`: a way to compute a spec, chosen by hand instead of by the cost model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class Lowering:
    """How a spec is computed. What is left at its default is decided by the cost model, as without a lowering.

    The token mask is the same whatever is chosen here, and so is the result to rounding: this is for tests, which must
    reach what the cost model would not take, and for seeing (`Plan.explain`) or measuring the alternatives. Where an
    expression does not have the alternative asked for (modality-major order, but it reads no modality), it is lowered
    in the one way that it has. With a lowering given, ``backend="auto"`` does not run a spec dense.

    Attributes:
        queries, keys: token order of the main launch. Modality-major queries are one launch for each modality.
        rows: terms that read the query alone, as gathered rows in a launch of their own, or in the main launch.
        residues: terms of equal residues, in a residue-major launch that is merged by log-sum-exp (not where the
            backend returns none), or looked up pair by pair in the main launch.
        log_sum_exp: False: nothing is merged, as on a backend that returns no log-sum-exp.
        full_width: True: index tables are as wide as there are key blocks, as FlexAttention on the CPU wants them.
    """

    queries: Literal["natural", "modality-major"] | None = None
    keys: Literal["natural", "modality-major"] | None = None
    rows: Literal["gathered", "main"] | None = None
    residues: Literal["residue-major", "main"] | None = None
    log_sum_exp: bool = True
    full_width: bool = False

    def __post_init__(self) -> None:
        known: dict[str, tuple[str | bool | None, ...]] = {
            "queries": (None, "natural", "modality-major"),
            "keys": (None, "natural", "modality-major"),
            "rows": (None, "gathered", "main"),
            "residues": (None, "residue-major", "main"),
            "log_sum_exp": (True, False),
            "full_width": (True, False),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            if not any(value is choice or (isinstance(value, str) and value == choice) for choice in known[field.name]):
                raise ValueError(f"Lowering.{field.name} is {value!r}: use one of {known[field.name]}")

    def orders(self, side: Literal["queries", "keys"], by_modality: bool) -> list[bool]:
        """The orders to weigh for one side; False: natural, True: modality-major (only if ``by_modality``)."""
        chosen = getattr(self, side)
        if chosen is None:
            return [False, True] if by_modality else [False]
        return [by_modality and chosen == "modality-major"]


CHEAPEST = Lowering()
"""Everything as the cost model decides."""
