"""Compiling ahead: what the first long prompt of a process would wait for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmflex.ir.layout import TokenLayout
from mmflex.tuning.config import Config, Spec, per_layer

from .prompts import token_layout


def warmup(model: nn.Module, lengths: Sequence[int | TokenLayout], *, batch: int = 1) -> list[float]:
    """Compile what prefills of these lengths need, by running them through one layer for every different spec.

    Kernels are compiled for a spec, a layout's modalities and a length (on the flash backend for any length), layers
    for any length (`mmflex.patch`, ``fuse``). All of it is kept for the process; Inductor, Triton and flash-attn-4 keep
    their part on disk, so that the next process starts sooner.

    Args:
        model: patched by `mmflex.patch`; its weights do not matter, what is compiled depends on shapes alone.
        lengths: tokens of a prompt of text, or the `TokenLayout` of a prompt with images or video.
        batch: prompts at once.

    Returns:
        The seconds that each length took, in the order of ``lengths``.

    Raises:
        ValueError: the model is not patched; a length below 2.
        TypeError: a length that is neither a number nor a layout.
    """
    patch: Any = next((vars(m)["_mmflex_patch"] for m in model.modules() if "_mmflex_patch" in vars(m)), None)
    if patch is None:
        raise ValueError(f"{type(model).__name__} is not patched: call mmflex.patch(model, spec) before warmup")
    layouts = [_layout(length) for length in lengths]
    text, layers = patch.text_model, patch.text_model.layers
    weight = text.get_input_embeddings().weight
    width = weight.shape[1]
    seconds = []
    try:
        text.layers = nn.ModuleList(_one_of_each(layers, patch.spec))
        for layout in layouts:
            start = time.perf_counter()
            embeddings = torch.randn((batch, layout.length, width), dtype=weight.dtype, device=weight.device) * 0.02
            with torch.no_grad(), token_layout(layout):
                text(inputs_embeds=embeddings, use_cache=False)
            if weight.is_cuda:
                torch.cuda.synchronize(weight.device)
            seconds.append(time.perf_counter() - start)
    finally:
        text.layers = layers
    return seconds


def _layout(length: int | TokenLayout) -> TokenLayout:
    if isinstance(length, TokenLayout):
        return length
    if not isinstance(length, int) or isinstance(length, bool):
        raise TypeError(f"warmup was given the length {length!r}: give numbers of tokens, or TokenLayouts")
    if length < 2:
        raise ValueError(f"warmup was given the length {length}: prompts of 2 tokens and more are prefilled")
    return TokenLayout.text(length)


def _one_of_each(layers: nn.ModuleList, spec: dict[int, tuple[Any, ...]]) -> list[nn.Module]:
    """The first layer of every spec, and of every kind of layer."""
    kinds: dict[Any, nn.Module] = {}
    for number, layer in enumerate(layers):
        window = getattr(getattr(layer, "self_attn", None), "sliding_window", None)
        kinds.setdefault((type(layer), window, spec.get(number)), layer)
    return list(kinds.values())


def random_model(name: str, spec: Spec | Config, device: torch.device, dtype: torch.dtype, backend: str) -> nn.Module:
    """A patched model with the shape that the ``config.json`` of a folder or hub name has, and random weights: as many
    layers as have other specs, no vision tower to speak of.

    Raises:
        OSError: no such model. ValueError: a spec for another number of layers or heads; a model without one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from .transformers import patch

    shape = AutoConfig.from_pretrained(name)
    text = shape.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    by_layer = spec.for_model(layers, heads) if isinstance(spec, Config) else per_layer(spec, range(layers), heads)
    distinct = list(dict.fromkeys(by_layer.values()))
    text.num_hidden_layers = len(distinct)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: len(distinct)]
    vision = getattr(shape, "vision_config", None)
    for depth in ("depth", "num_hidden_layers"):
        if hasattr(vision, depth):
            setattr(vision, depth, 1)
    kind = AutoModelForImageTextToText if vision is not None else AutoModelForCausalLM
    with torch.device(device):
        model = kind.from_config(shape, dtype=dtype)
    model.eval().requires_grad_(False)
    return patch(model, dict(enumerate(distinct)), backend=backend, vision=False)
