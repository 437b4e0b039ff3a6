"""Two results of attention over disjoint sets of keys as one."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each and its log-sum-exp.

    Each output is weighed by its share of the softmax's denominator. A row that sees no key in one set has the result
    of the other; one that sees none at all is 0 and has -inf.

    Args:
        out, other: [..., M, D]. lse, other_lse: float32 [..., M], natural logarithms; -inf where a row sees no key.

    Returns:
        (like ``out``, float32 [..., M]); accumulated in float32.
    """
    total = torch.logaddexp(lse, other_lse)
    base = torch.where(total == float("-inf"), 0.0, total)
    mixed = out * (lse - base).exp()[..., None] + other * (other_lse - base).exp()[..., None]
    return mixed.to(out.dtype), total
