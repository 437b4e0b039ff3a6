"""The attention function that patched vision towers call: once a layer, with ``cu_seqlens``.

transformers hands packed sequences over whole where the attention's name says "flash", and splits them into one call
for every window and frame where it does not. So the function is registered under a name with "flash" in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmflex.runtime.varlen import Segments, varlen_attention, varlen_attention_op

from ..masks import dense_function, previous_implementation

VISION_NAME = "mmflex_vision_flash"
"""The name under which the function is registered with transformers."""


def vision_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Exact attention within the segments of ``cu_seq_lens_q [segments + 1]``, not causal: query [1, H, T, D], key and
    value [1, Hkv, T, D] -> ([1, T, H, D], None). Calls without segments go to the tower's previous attention.

    Raises:
        NotImplementedError: in training.
    """
    if cu_seq_lens_q is None:
        previous = previous_implementation(module.config) or "sdpa"
        function = dense_function(module, previous)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if module.training or dropout > 0:
        raise NotImplementedError(
            f"mmflex can't train {type(module).__name__} (there is no backward pass): call model.eval(), or "
            "mmflex.patch(model, spec, vision=False)"
        )
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = float(q.shape[-1] ** -0.5 if scaling is None else scaling)
    if torch.compiler.is_compiling():
        return varlen_attention_op(q, k, v, cu_seq_lens_q, scale)[None], None
    return varlen_attention(q, k, v, Segments.of(cu_seq_lens_q), scale)[None], None


def register() -> None:
    """Make the name known to transformers."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(VISION_NAME, vision_attention_forward)
