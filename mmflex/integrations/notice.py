"""That ``backend="auto"`` runs a prompt mostly dense: foretold from a config, and noticed as it happens."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch

from mmflex.ir.layout import TokenLayout
from mmflex.ir.pattern import Dense, Pattern
from mmflex.runtime.calls import Request, decided, why_dense

from .shape import head_dim_of, kv_heads_of, sees_all


def predicted_dense(
    config: Any,
    spec: Mapping[int, tuple[Pattern, ...]],
    layout: TokenLayout,
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[int, str]:
    """Layer -> why ``backend="auto"`` will run it dense for a prompt, "" where it will run its spec; without a model.

    Layers that the cost model does not decide about (linear attention, windows shorter than the prompt) are left out.

    Args:
        config: of the language model. spec: patterns by layer. layout: of the whole prompt.
        device, dtype: of the weights.

    Raises:
        ValueError: a pattern that makes no sense with the prompt (frames, but no video).
    """
    heads, width = int(config.num_attention_heads), head_dim_of(config) or 128
    row = torch.empty((1, 1, 1, width), dtype=dtype, device=device)
    q, k = (row.expand(1, number, layout.length, width) for number in (heads, kv_heads_of(config)))
    reasons = {}
    for layer, patterns in spec.items():
        if sees_all(config, layer, layout.length):
            asked = all(isinstance(pattern, Dense) for pattern in patterns)
            note = "" if asked else decided(q, k, patterns, layout, Request(width**-0.5))[1]
            reasons[layer] = note.removeprefix("dense: ")
    return reasons


def mostly(reasons: Mapping[int, str], layers: int) -> bool:
    """Whether more than half of the layers with a spec run dense, by the reasons of those that are known."""
    return 2 * sum(map(bool, reasons.values())) > layers


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
        if mostly(self.reasons, len(self.layers)):
            self.said = True
            warnings.warn(
                f"mmflex: {self.name} runs most layers of this prompt of {layout.length} tokens dense, which "
                f'backend="auto" predicts to be faster (layer {layer}: {reason}). Longer prompts run sparse; to run '
                "the spec at any length, name a backend",
                stacklevel=2,
            )
