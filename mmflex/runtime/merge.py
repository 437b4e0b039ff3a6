"""Results of attention over disjoint sets of keys as one."""

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
    (share, other_share), total = _shares(torch.stack([lse, other_lse]))
    return (out * share + other * other_share).to(out.dtype), total


def merge_splits(outs: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge_attention`, over S sets: outputs [S, ..., D] in the type to accumulate in, log-sum-exps [S, ...]."""
    shares, total = _shares(sums)
    return (outs * shares).sum(0), total


def _shares(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Of log-sum-exps [S, ...]: each set's share of the denominator [S, ..., 1], and the log-sum-exp of all [...]."""
    total = sums.logsumexp(0)
    base = torch.where(total == float("-inf"), 0.0, total)
    return (sums - base).exp()[..., None], total
