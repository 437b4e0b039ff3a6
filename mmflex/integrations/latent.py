"""Latent attention, whose values are narrower than its keys."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def widened(x: Tensor, width: int) -> Tensor:
    """Queries, keys or values [..., D] as [..., width], with zeros, which change neither scores nor sums."""
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))
