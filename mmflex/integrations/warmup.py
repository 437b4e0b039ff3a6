"""Compiling ahead: what the first long prompt of a process would wait for."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from mmflex.ir.layout import TokenLayout
from mmflex.runtime.recorded import recording
from mmflex.runtime.workers import Workers
from mmflex.tuning.config import Config, Spec, per_layer

from .closed import running_layer
from .prompts import token_layout


def warmup(model: nn.Module, lengths: Sequence[int | TokenLayout], *, batch: int = 1, jobs: int = 1) -> list[float]:
    """Compile what prefills of these lengths need, by running them through one layer for every different spec.

    Kernels are compiled for a spec, a layout's modalities and a length (on the flash backend for any length), layers
    for any length (`mmflex.patch`, ``fuse``). All of it is kept for the process; Inductor, Triton and flash-attn-4 keep
    their part on disk, so that the next process starts sooner.

    Args:
        model: patched by `mmflex.patch`; its weights do not matter, what is compiled depends on shapes alone.
        lengths: tokens of a prompt of text, or the `TokenLayout` of a prompt with images or video.
        batch: prompts at once.
        jobs: processes that compile the kernels of attention side by side, while this one compiles the layers. Worth it
            where folders are empty: they take some seconds to start. On a GPU each holds a context (about 0.5 GB) and
            the tensors of one layer's attention. What they cannot compile is compiled here, after a warning. 1: none;
            none either where a model is spread over ranks, all of which have to do the same.

    Returns:
        The seconds that each length took, in the order of ``lengths``; the first waits for the processes.

    Raises:
        ValueError: the model is not patched; a length below 2; jobs below 1.
        TypeError: a length that is neither a number nor a layout; jobs that are no whole number.
    """
    if not isinstance(jobs, int) or isinstance(jobs, bool):
        raise TypeError(f"warmup was given the jobs {jobs!r}: give a number of processes")
    if jobs < 1:
        raise ValueError(f"warmup was given {jobs} jobs: give a number of processes, 1 to compile in this one")
    patch: Any = next((vars(m)["_mmflex_patch"] for m in model.modules() if "_mmflex_patch" in vars(m)), None)
    if patch is None:
        raise ValueError(f"{type(model).__name__} is not patched: call mmflex.patch(model, spec) before warmup")
    layouts = [_layout(length) for length in lengths]
    text, layers = patch.text_model, patch.text_model.layers
    seconds = []
    try:
        text.layers = nn.ModuleList(_one_of_each(layers, patch.spec))
        start = time.perf_counter()
        with ExitStack() as stack:
            if jobs > 1 and not _over_ranks(patch):
                _compile_beside(jobs, patch, layouts, batch, stack)
            for layout in layouts:
                _prefill(text, layout, batch)
                seconds.append(time.perf_counter() - start)
                start = time.perf_counter()
    finally:
        text.layers = layers
    return seconds


def _over_ranks(patch: Any) -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed or patch.context_parallel is not None


MOST_PROCESSES = 4
"""More would start later than the first have finished: two kernels that attend, some twenty that plan."""


def processes() -> int:
    """How many ``jobs`` to give, where folders are empty: a core for each, one left to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_PROCESSES, cores - 1))


def _prefill(text: nn.Module, layout: TokenLayout, batch: int) -> None:
    """Runs a language model on random embeddings."""
    weight = text.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    shape = batch, layout.length, weight.shape[1]
    embeddings = torch.randn(shape, dtype=weight.dtype, device=weight.device) * 0.02
    with torch.no_grad(), token_layout(layout):
        text(inputs_embeds=embeddings, use_cache=False)
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)


def _compile_beside(jobs: int, patch: Any, layouts: Sequence[TokenLayout], batch: int, stack: ExitStack) -> None:
    """Has the kernels of these prompts' attention compiled in other processes. Attention waits for them before its
    first call; they end with the stack."""

    def notice(reason: str) -> None:
        warnings.warn(f"mmflex.warmup: this process compiles what others could not: {reason}", stacklevel=2)

    def wait(module: nn.Module, query: torch.Tensor, *_: Any) -> None:
        layer = running_layer()
        if layer is not None and not waited:  # its MLP is compiled meanwhile
            width = patch.text_model.get_input_embeddings().weight.shape[1]
            with suppress(Exception):  # then it is compiled after attention, or not at all
                layer.mlp(query.new_zeros(query.shape[0], query.shape[2], width))
        waited.append(True)
        for failure in workers.wait():
            notice(failure)

    waited: list[bool] = []

    try:
        workers = stack.enter_context(Workers(jobs))
        with recording() as calls:
            for layout in layouts:
                _prefill(patch.text_model, layout, batch)
        workers.submit(list(calls.by_key.values()))
    except Exception as error:  # a pattern that cannot be pickled or reads values back, no more processes, ...
        notice(f"{type(error).__name__}: {error}")
        return
    before, patch.observer = patch.observer, wait
    stack.callback(setattr, patch, "observer", before)


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
