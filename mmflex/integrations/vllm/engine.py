"""What is read from vLLM's own config: read by attribute, so that nothing here imports vLLM."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from mmflex.distributed.estimates import check_whole_layers
from mmflex.integrations.layouts.inputs import setting
from mmflex.ir.layout import TokenLayout
from mmflex.ir.pattern import Pattern
from mmflex.runtime.backends import resolve, why_not
from mmflex.tuning.config import head_slice

from .metrics import Counters
from .pages import Buffer
from .requests import Layouts, holds_images
from .settings import Settings, read_settings

logger = logging.getLogger("vllm.mmflex")  # below vLLM's logger, whose level and format it takes


@dataclass
class Engine:
    """One model served by one vLLM engine, as far as this process computes it.

    Attributes:
        settings: what the user asked for.
        spec: layer -> the patterns of this rank's query heads.
        config: the model's own config (``hf_config``).
        layers: of the model. budget: tokens in a step at most. longest: tokens of a request at most.
        captured: tokens up to which vLLM replays CUDA graphs, inside which nothing can be decided.
        rank: of this process among those that share a layer's heads.
        layouts, buffer, counters: shared by all layers. warmed: what `warmup` has run.
        last_layer: the last accelerated layer in this process.
    """

    settings: Settings
    spec: dict[int, tuple[Pattern, ...]]
    config: Any
    layers: int
    budget: int
    longest: int
    captured: int
    layouts: Layouts = field(init=False)
    buffer: Buffer = field(default_factory=Buffer)
    rank: int = 0
    counters: Counters = field(init=False)
    warmed: set[Any] = field(default_factory=set)
    last_layer: int = -1
    _noticed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.layouts = Layouts(self.config, self.notice)
        self.counters = Counters(exported=self.rank == 0)

    @property
    def holds_images(self) -> bool:
        """Whether the model's prompts may hold more than text."""
        return holds_images(self.config)

    def use_config(self, config: Any) -> None:
        """Takes the model's own config: while its language model is built, vLLM shows that part's alone."""
        self.config = self.layouts.config = config

    def notice(self, reason: str) -> None:
        """Says once why something runs the standard attention."""
        if reason not in self._noticed and len(self._noticed) < 256:
            self._noticed.add(reason)
            logger.warning("mmflex: %s", reason)

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that vLLM calls ``name``; None for a layer that is not the model's own."""
        found = re.findall(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name)
        return int(found[0]) if len(found) == 1 and int(found[0]) < self.layers else None


def read_engine(vllm_config: Any, rank: int) -> Engine | None:
    """What mmflex is to do in an engine; None where it is off.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        rank: of this process among those that share the heads of a layer.

    Raises:
        ValueError: settings that make no sense, a config for another model (both numbers are named), or patterns that
            estimate from more heads together than a rank has.
    """
    settings = read_settings(getattr(vllm_config, "additional_config", None))
    if settings is None:
        return None
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text = model.hf_text_config
    layers, heads = int(text.num_hidden_layers), int(text.num_attention_heads)
    size = int(parallel.tensor_parallel_size)
    whole = settings.for_model(layers, heads)
    if heads % size:
        raise ValueError(f"{heads} query heads cannot be shared by {size} tensor-parallel ranks evenly")
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    for patterns in dict.fromkeys(whole.values()):
        check_whole_layers(patterns, TokenLayout.text(1), heads, kv_heads, size)
    spec = {layer: head_slice(patterns, heads // size, rank) for layer, patterns in whole.items()}
    captured = setting(vllm_config, "compilation_config", "max_cudagraph_capture_size", default=0)
    return Engine(
        settings,
        spec,
        model.hf_config,
        layers,
        budget=int(vllm_config.scheduler_config.max_num_batched_tokens),
        longest=int(model.max_model_len),
        captured=int(captured),
        rank=rank,
    )


def why_off(vllm_config: Any) -> str | None:
    """Why no layer of a model can be accelerated in this engine; None where some can."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if getattr(model, "runner_type", "generate") == "draft":
        return "a draft model runs the standard attention"
    if getattr(model, "use_mla", False):
        return "latent attention (MLA) runs the standard backend"
    for name, what in (
        ("decode_context_parallel_size", "decode context parallelism"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
    ):
        if getattr(parallel, name, 1) > 1:
            return f"{what} spreads a request's keys over several ranks: every layer runs the standard attention"
    if getattr(parallel, "use_ubatching", False):
        return "dual batch overlap cuts requests in two: every layer runs the standard attention"
    if getattr(model, "is_mm_prefix_lm", False):
        return "image tokens of this model see both ways: every layer runs the standard attention"
    return None


def why_not_auto(backend: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why backend "auto" leaves everything to the standard attention here; None where it does not.

    A server meets a new length with every prompt, and must not compile a kernel for each.
    """
    if backend != "auto":
        return None
    best = resolve("auto", device, head_dim, dtype).name
    if best == "flash":
        return None
    return (
        f"every layer runs the standard attention: the best backend here is {best!r}, whose kernels are compiled for "
        f"one length each, seconds at every new one ({why_not('flash', device, head_dim, dtype)}); name a backend to "
        "use it all the same"
    )


def why_standard(arguments: dict[str, Any]) -> str | None:
    """Why a layer runs the standard attention, from the arguments of its `AttentionImpl`; None where mmflex can run
    it."""
    kind = arguments.get("attn_type", "decoder")
    if str(getattr(kind, "value", kind)) != "decoder":
        return f"layers of type {getattr(kind, 'value', kind)} run the standard attention"
    if arguments.get("alibi_slopes") is not None:
        return "layers with ALiBi slopes run the standard attention"
    if arguments.get("sliding_window") is not None:
        return "layers with a sliding window run the standard attention"
    if arguments.get("logits_soft_cap"):
        return "layers with soft-capped scores run the standard attention"
    if arguments.get("sinks") is not None:
        return "layers with attention sinks run the standard attention"
    cache = str(arguments.get("kv_cache_dtype", "auto"))
    if cache not in ("auto", "float16", "bfloat16", "float32"):
        return f"a KV cache of {cache} is read by the standard attention alone"
    if not 16 <= int(arguments["head_size"]) <= 256:
        return f"head dimension {arguments['head_size']}: mmflex takes 16 to 256"
    return None
