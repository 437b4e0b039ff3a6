"""Whether the keys and values that a prompt leaves in a cache fit: said before minutes are spent on it, not after."""

from __future__ import annotations

import gc
from typing import Any

import torch

from .layouts import call_arguments
from .prefill import PatchedModel, kv_heads_of
from .prompts import decodes

LONG = 1 << 16
"""Tokens from which on it is looked at: shorter prompts fail soon enough by themselves."""


def check_room(patch: PatchedModel, module: Any, args: Any, kwargs: Any) -> None:
    """Before a language model's forward.

    Raises:
        torch.OutOfMemoryError: keys and values of the new tokens that take more bytes than are free on a GPU.
    """
    if torch.compiler.is_compiling() or decodes(args, kwargs):
        return
    try:
        inputs = call_arguments(module.forward, args, kwargs)
    except TypeError:
        return  # the call itself raises it
    tokens = inputs.get("inputs_embeds")
    tokens = inputs.get("input_ids") if tokens is None else tokens
    if tokens is None or tokens.shape[1] < LONG or not _grows(inputs, patch.config):
        return
    wanted: dict[torch.device, int] = {}
    for attention in patch.modules:
        weight = next(attention.parameters())
        more = _layer_bytes(patch, int(attention.layer_idx), tokens.shape[:2].numel(), weight.dtype)  # type: ignore[arg-type]
        wanted[weight.device] = wanted.get(weight.device, 0) + more
    for device, more in wanted.items():
        if more > free_bytes(device):
            gc.collect()  # a cache of an earlier prompt may hang in a circle
        free = free_bytes(device)
        if more > free:
            raise torch.OutOfMemoryError(
                f"the KV cache of {tokens.shape[0]} x {tokens.shape[1]:,} tokens takes {more / 1e9:.1f} GB, but "
                f"{free / 1e9:.1f} GB are free on {device}, {(more - free) / 1e9:.1f} GB too few: run it with "
                'use_cache=False (mmflex.last_token_logits), over several GPUs (mesh=, cache="sharded"), or shorter'
            )


def _grows(inputs: dict[str, Any], config: Any) -> bool:
    """Whether the forward puts its keys and values into a cache on the GPU that takes its memory as it grows."""
    cache, use = inputs.get("past_key_values"), inputs.get("use_cache")
    if cache is None:
        return bool(getattr(config, "use_cache", False) if use is None else use)
    return type(cache).__name__ == "DynamicCache" and not getattr(cache, "offloading", False)


def _layer_bytes(patch: PatchedModel, layer: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a layer's keys and values, at least; 0 where the layer is none that keeps all of them."""
    config, ranks = patch.config, patch.context_parallel
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "kv_lora_rank", None) or (kinds and kinds[layer] != "full_attention"):
        return 0
    if layer >= int(config.num_hidden_layers) - int(getattr(config, "num_kv_shared_layers", 0) or 0):
        return 0
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shares = int(getattr(patch.root, "_tp_size", None) or 1)
    if ranks is not None and ranks.cache_kind == "sharded":
        shares *= ranks.ranks.size
    return 2 * kv_heads_of(config) * int(dim) * tokens * dtype.itemsize // shares


def free_bytes(device: torch.device) -> float:
    """Bytes that PyTorch can still give out there: free ones, and those that it holds without a tensor in them. Endless
    where it is no GPU."""
    if device.type != "cuda":
        return float("inf")
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
