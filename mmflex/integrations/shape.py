"""Sizes of a language model's attention, as its config gives them."""

from __future__ import annotations

from typing import Any


def kv_heads_of(config: Any) -> int:
    """KV heads of a layer, over all processes."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim_of(config: Any) -> int | None:
    """Width of a query and a key of one head; None where the config does not say.

    Latent attention has ``qk_head_dim``, and its ``head_dim`` is that of the rotary part alone.
    """
    for name in ("qk_head_dim", "head_dim"):
        if isinstance(width := getattr(config, name, None), int):
            return width
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None


def sees_all(config: Any, layer: int, tokens: int) -> bool:
    """Whether a layer's queries see all keys before them in a prompt of so many tokens: attention that is neither
    linear nor in chunks, and without a window that is shorter."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    kind = kinds[layer] if kinds else "sliding_attention" if window else "full_attention"
    if not kinds and getattr(config, "attention_chunk_size", None):
        return False
    return kind == "full_attention" or (kind == "sliding_attention" and (window is None or window >= tokens))
