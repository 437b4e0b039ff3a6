"""Reading an attention mask tensor: is it causal plus padding, and which keys are padding?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention.bias import CausalBias, CausalVariant

from .reasons import Unfit

FORBIDDEN = -1e4
"""Additive values from here down forbid a pair: softmax makes 0 of them. Masks hold -inf, the least number of their
dtype, or in older code -10000; whatever is between this and 0 is a bias."""

_CHECKED_AT_ONCE = 1 << 24
"""Entries of a mask that are compared in one go: temporaries of some 50 MB, however long the prompt."""


@dataclass(frozen=True)
class _Identity:
    """Which tensor a mask is. Layers are handed views of one tensor, a new object each, so the storage tells: by a weak
    reference, because a storage that is gone may be followed by another in the same place."""

    storage: StorageWeakRef
    rest: tuple[Any, ...]

    @classmethod
    def of(cls, mask: Tensor) -> _Identity:
        version = None if mask.is_inference() else mask._version
        place = (mask.storage_offset(), tuple(mask.shape), mask.stride(), mask.dtype, version)
        return cls(StorageWeakRef(mask.untyped_storage()), place)

    def same(self, other: _Identity) -> bool:
        alive = not self.storage.expired()
        return alive and self.storage.cdata == other.storage.cdata and self.rest == other.rest


class MaskReader:
    """Reads masks; the layers of one forward pass are handed the same one, which is read once."""

    def __init__(self) -> None:
        self.recent: tuple[_Identity, tuple[int, int], np.ndarray | Unfit | None] | None = None

    def forget(self) -> None:
        """Another forward pass: its mask may be the same tensor with other contents."""
        self.recent = None

    def padding(self, mask: Tensor, queries: int, keys: int) -> np.ndarray | None:
        """Which keys are tokens.

        Args:
            mask: bool (True: allowed) or additive, up to four dimensions, broadcast to ``[B, H, queries, keys]``.

        Returns:
            bool ``[B, keys]`` (B = 1: the same for all prompts); None where all are.

        Raises:
            Unfit: the mask is not causal from the bottom right plus padding.
        """
        if isinstance(mask, CausalBias):
            if mask.variant == CausalVariant.LOWER_RIGHT or queries == keys:
                return None
            raise Unfit("a causal mask aligned to the top left", f"{queries} queries, {keys} keys")
        identity, size = _Identity.of(mask), (queries, keys)
        if self.recent is None or self.recent[1] != size or not self.recent[0].same(identity):
            try:
                self.recent = (identity, size, _read(mask, queries, keys))
            except Unfit as reason:
                self.recent = (identity, size, reason)
        padding = self.recent[2]
        if isinstance(padding, Unfit):
            raise padding
        return padding


def _read(mask: Tensor, queries: int, keys: int) -> np.ndarray | None:
    if mask.dim() > 4 or mask.shape[-2:] != (queries, keys) or queries > keys:
        raise Unfit(
            "a mask of another shape than queries x keys", f"{tuple(mask.shape)} for {queries} queries and {keys} keys"
        )
    if mask.requires_grad:
        raise Unfit("a mask that is learned")
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if mask.stride(1) == 0:
        mask = mask[:, :1]  # an expanded mask says the same for every head
    valid = _allowed(mask[:, :, -1])  # the last query sees every key that is a token
    number = torch.arange(keys, device=mask.device)
    rows = max(1, _CHECKED_AT_ONCE // max(1, mask.shape[0] * mask.shape[1] * keys))
    plain = torch.ones(2, dtype=torch.bool, device=mask.device)
    for start in range(0, queries, rows):
        part = mask[:, :, start : start + rows]
        query = number[keys - queries + start :][: part.shape[2]]
        allowed = _allowed(part)
        as_wanted = (allowed == ((number <= query[:, None]) & valid[:, :, None])).all(-1)
        # A query that is padding may see nothing, or everything: on CUDA transformers unmasks rows without a key.
        # Seeing something else, it is no padding but a token of another of several packed prompts.
        trivial = ~valid[..., query] & (~allowed.any(-1) | allowed.all(-1))
        plain[0] &= (as_wanted | trivial).all()
        if part.dtype != torch.bool:
            plain[1] &= ((allowed | (part <= FORBIDDEN)).all(-1) | trivial).all()
    same_heads = (valid == valid[:, :1]).all()
    causal, unbiased, alike = torch.cat([plain, same_heads[None]]).tolist()  # the one time that the host waits
    if not unbiased:
        raise Unfit("a mask that adds a bias to the scores", "it holds finite values other than 0")
    if not (causal and alike):
        raise Unfit("a mask that is not causal plus padding", "a window, a prefix, packed prompts or something else")
    tokens = valid[:, 0].cpu().numpy()
    return None if tokens.all() else tokens


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0
