"""Whether the keys and values that a prompt leaves in a cache fit: said before minutes are spent on it, not after.

What is not known for certain counts nothing: a prompt that would have fitted must not be refused.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from .layouts import call_arguments
from .prefill import PatchedModel
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
    count = tokens.shape[:2].numel()
    for device, each in _token_bytes(patch).items():
        wanted = each * count
        if wanted > free_bytes(device):
            gc.collect()  # a cache of an earlier prompt may hang in a circle
        free = free_bytes(device)
        if wanted > free:
            raise torch.OutOfMemoryError(
                f"the KV cache of {tokens.shape[0]} x {tokens.shape[1]:,} tokens takes {wanted / 1e9:.1f} GB, but "
                f"{free / 1e9:.1f} GB are free on {device}, {(wanted - free) / 1e9:.1f} GB too few: run it without a "
                'cache (mmflex.last_token_logits), over several GPUs (mesh=, cache="sharded"), or shorter'
            )


def _grows(inputs: dict[str, Any], config: Any) -> bool:
    """Whether the forward puts its keys and values into a cache that takes its memory on the GPU as it grows."""
    cache, use = inputs.get("past_key_values"), inputs.get("use_cache")
    if cache is None:
        return bool(getattr(config, "use_cache", False) if use is None else use)
    return type(cache).__name__ == "DynamicCache" and not getattr(cache, "offloading", False)


def _token_bytes(patch: PatchedModel) -> dict[torch.device, int]:
    """Bytes of a token's keys and values by device, of the layers that keep those of all tokens: whose projections
    say how wide they are, and which are computed whole in this process."""
    config, ranks = patch.config, patch.context_parallel
    if any(getattr(model, "_tp_size", None) not in (None, 1) for model in (patch.owner, patch.root)):
        return {}
    if ranks is not None and ranks.tensor_ranks > 1:
        return {}
    kinds = getattr(config, "layer_types", None)
    if kinds is None and any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")):
        return {}
    some = set(range(int(config.num_hidden_layers) - int(getattr(config, "num_kv_shared_layers", None) or 0)))
    some -= set(getattr(config, "cross_attention_layers", None) or ())
    shares = ranks.ranks.size if ranks is not None and ranks.cache_kind == "sharded" else 1
    found: dict[torch.device, int] = {}
    for attention in patch.modules:
        layer: Any = attention.layer_idx
        widths: list[Any] = [
            getattr(getattr(attention, name, None), "out_features", None) for name in ("k_proj", "v_proj")
        ]
        if layer not in some or None in widths or (kinds is not None and kinds[layer] != "full_attention"):
            continue
        some.remove(layer)
        weight = next(attention.parameters(), None)
        if weight is not None and weight.is_floating_point():
            found[weight.device] = found.get(weight.device, 0) + sum(widths) * weight.dtype.itemsize // shares
    return found


def free_bytes(device: torch.device) -> float:
    """Bytes that PyTorch can still give out there: free ones, and those that it holds without a tensor in them. Endless
    where it is no GPU."""
    if device.type != "cuda":
        return float("inf")
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
