"""TriangleMix: dense lower layers, and a tri-shape in the others (arXiv 2507.21526)."""

from __future__ import annotations

from mmflex.ir.pattern import Dense, Pattern

from .a_shape import TriShape

UPPER = TriShape(sink=8, local=512, last=128)
"""What the paper gives the upper layers: their middle rows look at nothing far that the answer needs."""


def triangle_mix(
    layers: int, first: int | None = None, *, lower: Pattern | None = None, upper: Pattern = UPPER
) -> dict[int, Pattern]:
    """A spec of all layers: ``mmflex.patch(model, triangle_mix(28, 20))``. It estimates nothing.

    In the upper layers of a trained model attention between far tokens in the middle of a prompt hardly changes the
    answer; what stays is the sink, a window, and the last rows (TriangleMix, arXiv 2507.21526).

    Args:
        layers: of the model.
        first: the first layer with ``upper``, the others below it; None: half of them, as the paper has it for
            Llama-3.1-8B (16 of 32); for Qwen2.5-7B 20 of 28.
        lower: the pattern of the layers below; None: dense. The paper also takes MInference's patterns there.
        upper: the pattern of the others; the paper's `TriShape(8, 512, 128)`, rounded outwards to tiles.

    Returns:
        ``{layer: pattern}``, for `mmflex.patch`, `mmflex.Config.of` and whatever takes a spec by layers.

    Raises:
        ValueError: ``layers`` below 1, or ``first`` not between 0 and ``layers``.
    """
    if layers < 1:
        raise ValueError(f"triangle_mix is for a model of {layers} layers: give 1 or more")
    first = (layers + 1) // 2 if first is None else first
    if not 0 <= first <= layers:
        raise ValueError(
            f"triangle_mix: the first layer with the upper pattern is {first} of {layers}: use 0 to {layers}"
        )
    lower = Dense() if lower is None else lower
    return {layer: lower if layer < first else upper for layer in range(layers)}
