"""The attention modules of a model's decoder layers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
"""What decoder layers call their attention."""

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


def attention_modules(model: nn.Module, layers: Sequence[nn.Module] | None) -> list[tuple[int, nn.Module]]:
    """(number of the layer, attention module) of a decoder.

    Args:
        model: holds the decoder, and perhaps a vision tower.
        layers: its decoder layers or their attention modules, in order; None to look for them. Of several stacks of
            layers, those are a decoder's whose attention knows its ``layer_idx``, as vision towers' does not.

    Raises:
        TypeError: none, or several of which nothing tells which one reads the prompt.
    """
    if layers is not None:
        return [(number, _attention(layer) or layer) for number, layer in enumerate(layers)]
    stacks = {name: _stack(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    stacks = {name: stack for name, stack in stacks.items() if stack}
    numbered = {name: of for name, of in stacks.items() if isinstance(getattr(of[0][1], "layer_idx", None), int)}
    choice = numbered or stacks
    if len(choice) != 1:
        name = type(model).__name__
        shown = ", ".join(choice) or f"no list of modules with {', '.join(ATTENTION_NAMES)}"
        raise TypeError(
            f"{name} holds {len(choice)} stacks of layers with attention ({shown}): pass the language model alone, or "
            "layers=[...], the decoder layers or their attention modules in order"
        )
    ((_, stack),) = choice.items()
    return stack


def _stack(modules: nn.ModuleList) -> list[tuple[int, nn.Module]]:
    layers = ((number, _attention(layer)) for number, layer in enumerate(modules))
    return [(number, attention) for number, attention in layers if attention is not None]


def _attention(layer: nn.Module) -> nn.Module | None:
    for name in ATTENTION_NAMES:
        if isinstance(getattr(layer, name, None), nn.Module):
            return getattr(layer, name)
    return None


def query_heads(module: nn.Module, config: Any) -> int | None:
    """Query heads of an attention module, where it or the config tells."""
    for owner in (module, config):
        for name in _HEADS:
            if isinstance(getattr(owner, name, None), int):
                return int(getattr(owner, name))
    return None


def config_of(model: nn.Module, module: nn.Module) -> Any:
    """The config of an attention module: its own, or that of the language model; None where there is none."""
    config = getattr(module, "config", None) or getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


def takes_patch(model: Any) -> bool:
    """Whether `mmflex.patch` does the same for this model: transformers 5.17 or newer, by its attention interface."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not hasattr(model, "_can_set_attn_implementation"):
        return False
    version = tuple(int(part) for part in str(transformers.__version__).split(".")[:2] if part.isdecimal())
    return version >= (5, 17) and bool(model._can_set_attn_implementation())
