"""How far the values of a block stand out: what attention to it can add to the output (Stem, arXiv 2603.06274)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmflex.ir.pattern import View
from mmflex.runtime.device import array_constant

RUN = 8
"""Tokens of which the greatest norm counts."""

_SMALLEST = 1e-6
"""Norms below it count as this: their logarithm is finite."""


def block_prominence(view: View, size: int) -> Tensor:
    """float32 [B, Hkv, key blocks], of `View.values`: the mean over a block's runs of ``relu(z)``, where z is the
    logarithm of the greatest norm in the run, standardised over all runs of the head.

    Runs are of 8 keys in scope, the last one of a block of fewer. Norms that are not finite count as next to nothing.
    """
    v = view.values
    assert v is not None
    batch, heads = v.shape[:2]
    run, count = _runs(view, size)
    norm = torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32)
    norm = torch.where(norm < float("inf"), norm, 0.0).clamp(min=_SMALLEST)
    slots = count.shape[1]
    index = array_constant(run, v.device).long().expand(batch, -1)
    index = torch.where(index < 0, slots, index)[:, None].expand(-1, heads, -1)
    most = norm.new_zeros((batch, heads, slots + 1)).scatter_reduce_(2, index, norm, "amax")[..., :-1]
    real = array_constant(count, v.device).expand(batch, -1)[:, None] > 0
    z = torch.where(real, most, 1.0).log()
    number = real.sum(-1, keepdim=True).clamp(min=1)
    z = torch.where(real, z - torch.where(real, z, 0.0).sum(-1, keepdim=True) / number, 0.0)
    spread = (z.square().sum(-1, keepdim=True) / number).sqrt()
    lifted = (z / spread.clamp(min=_SMALLEST)).clamp(min=0.0).unflatten(-1, (-1, -(-size // RUN)))
    per_block = real.unflatten(-1, (-1, -(-size // RUN))).sum(-1)
    return lifted.sum(-1) / per_block.clamp(min=1)


def _runs(view: View, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Host data: the run of each key, int [B, N] (-1: out of scope), and the keys of each run, int [B, runs]."""
    layout, scope = view.layout, view.scope

    def build() -> tuple[np.ndarray, np.ndarray]:
        position, per_block = layout.coordinate(scope.key), -(-size // RUN)
        run = np.where(layout.of(scope.key), position // size * per_block + position % size // RUN, -1)
        slots = -(-view.size // size) * per_block
        count = np.stack([np.bincount(row[row >= 0], minlength=slots) for row in run])
        return run, count

    return layout.once(("value runs", scope, size), build)
