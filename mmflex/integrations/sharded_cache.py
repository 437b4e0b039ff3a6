"""A layer of transformers' KV cache of which every rank holds its own tokens."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from mmflex.distributed.dealing import Dealing
from mmflex.distributed.ranks import Ranks

SPARE = 1024
"""Tokens that a layer has room for beyond those that it holds, so that a decode step copies one token, not all."""


class ShardedLayer(CacheLayerMixin):
    """Keys and values of this rank's tokens; lengths that models ask for are those of all tokens.

    Attributes:
        dealing: which rank holds which of all tokens so far.
        keys, values: [B, Hkv, own tokens, D].
    """

    is_sliding = False

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.dealing = Dealing(((),) * ranks.size)
        self.room: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.room = [t.new_empty((*t.shape[:2], 0, t.shape[3])) for t in (key_states, value_states)]
        self.is_initialized = True
        self._show(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tokens that every rank has computed: one rank keeps each. Returns what this rank holds."""
        before = self.dealing.total
        self.dealing = _with_owner(self.dealing, key_states.shape[2])
        own = [token - before for token in self.dealing.tokens_from(self.ranks.rank, before)]
        if len(own) < key_states.shape[2]:
            index = torch.tensor(own, dtype=torch.int64, device=key_states.device)
            key_states, value_states = (t.index_select(2, index) for t in (key_states, value_states))
        return self._append(key_states, value_states)

    def append_shares(self, keys: Tensor, values: Tensor, dealing: Dealing) -> None:
        """Tokens that are dealt out to the ranks: this rank's share [B, Hkv, M, D]."""
        self.dealing = self.dealing.followed_by(dealing)
        self._append(keys, values)

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        held, new = self._held, keys.shape[2]
        if held + new > self.room[0].shape[2]:
            grown = [t.new_empty((*t.shape[:2], held + new + SPARE, t.shape[3])) for t in self.room]
            for old, bigger in zip(self.room, grown, strict=True):
                bigger[:, :, :held] = old[:, :, :held]
            self.room = grown
        for t, added in zip(self.room, (keys, values), strict=True):
            t[:, :, held : held + new] = added
        return self._show(held + new)

    @property
    def _held(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def _show(self, held: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (t[:, :, :held] for t in self.room)
        return self.keys, self.values

    def columns(self, device: torch.device) -> Tensor:
        """int64 [own tokens]: which of all tokens this rank holds."""
        return _columns(self.dealing, self.ranks.rank, device)

    # ---- what transformers asks of a layer -------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.dealing.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.dealing.total + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.dealing = Dealing(((),) * self.ranks.size)
        self.room, self.keys, self.values, self.is_initialized = [], None, None, False

    def _over_prompts(self, change: Any) -> None:
        if self.keys is not None:
            held = self.keys.shape[2]
            self.room = [change(t) for t in self.room]
            self._show(held)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._over_prompts(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._over_prompts(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._over_prompts(lambda t: t[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "a sharded cache cannot be cropped, as assisted decoding does: patch the model with cache='replicated'"
        )


def sharded_layer(cache: Any, number: int) -> ShardedLayer | None:
    """Layer ``number`` of a cache where it is sharded."""
    layers = getattr(cache, "layers", None)
    if layers is None or number >= len(layers):
        return None
    return layers[number] if isinstance(layers[number], ShardedLayer) else None


def shard_layer(cache: Cache, number: int, ranks: Ranks) -> ShardedLayer | None:
    """Makes layer ``number`` of a cache a sharded one; None for a layer with a sliding window, which is small and stays
    with every rank.

    Raises:
        NotImplementedError: a static or quantized cache, or one that holds tokens already.
    """
    while len(cache.layers) <= number:
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[number]
    if isinstance(layer, ShardedLayer):
        return layer
    if layer.is_sliding:
        return None
    if type(layer) is not DynamicLayer or cache.offloading or layer.get_seq_length():
        raise NotImplementedError(
            f"cache='sharded' takes an empty DynamicCache, this one has a {type(layer).__name__} of "
            f"{int(layer.get_seq_length())} tokens: leave the cache to generate(), or patch with cache='replicated'"
        )
    layer = cache.layers[number] = ShardedLayer(ranks)
    return layer


# All layers of a model have the same tokens dealt out in the same way.
@lru_cache(maxsize=64)
def _with_owner(dealing: Dealing, tokens: int) -> Dealing:
    return dealing.with_owner(tokens)


@lru_cache(maxsize=8)
def _columns(dealing: Dealing, rank: int, device: torch.device) -> Tensor:
    return torch.as_tensor(dealing.queries(rank).numbers).to(device, torch.int64)
