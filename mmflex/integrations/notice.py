"""The notice that ``backend="auto"`` runs a prompt mostly dense."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from mmflex.ir.layout import TokenLayout
from mmflex.ir.pattern import Dense
from mmflex.runtime.calls import why_dense


class MostlyDense:
    """Says once that most layers of a prompt with a sparse spec ran dense, because the cost model predicts less time
    for that: who measures or relies on a spec should know.

    Attributes:
        name: of the model. layers: those with a spec.
    """

    def __init__(self, name: str, layers: Collection[int]) -> None:
        self.name, self.layers = name, frozenset(layers)
        self.reasons: dict[int, str] = {}
        self.said = False
        self.judged = ""

    def ran(self, layer: int, spec: tuple[Any, ...], layout: TokenLayout) -> None:
        """After a layer has run by "auto". Prompts are judged at the last layer, each layout only while it is new."""
        if self.said or layout.fingerprint == self.judged:
            return
        reason = "" if all(isinstance(pattern, Dense) for pattern in spec) else why_dense(layout, spec)
        if reason:
            self.reasons[layer] = reason
        else:
            self.reasons.pop(layer, None)
        if layer != max(self.layers):
            return
        self.judged = layout.fingerprint
        if 2 * len(self.reasons) > len(self.layers):
            self.said = True
            number, reason = max(self.reasons.items())
            warnings.warn(
                f"mmflex: {self.name} runs {len(self.reasons)} of {len(self.layers)} layers of this prompt of "
                f'{layout.length} tokens dense under backend="auto", which is predicted to be faster (layer {number}: '
                f"{reason}). Longer prompts run sparse; to run the spec at any "
                "length, name a backend",
                stacklevel=2,
            )
