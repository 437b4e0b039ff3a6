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
        self.said = False
        self.prompt = ""
        self.reasons: dict[int, str] = {}

    def ran(self, layer: int, spec: tuple[Any, ...], layout: TokenLayout) -> None:
        """After a layer has run by "auto"; with each layout in turn it is looked at once."""
        if self.said:
            return
        if layout.fingerprint != self.prompt:
            self.prompt, self.reasons = layout.fingerprint, {}
        if layer in self.reasons:
            return
        reason = "" if all(isinstance(pattern, Dense) for pattern in spec) else why_dense(layout, spec)
        self.reasons[layer] = reason
        if 2 * sum(map(bool, self.reasons.values())) > len(self.layers):
            self.said = True
            warnings.warn(
                f"mmflex: {self.name} runs most layers of this prompt of {layout.length} tokens dense, which "
                f'backend="auto" predicts to be faster (layer {layer}: {reason}). Longer prompts run sparse; to run '
                "the spec at any length, name a backend",
                stacklevel=2,
            )
