"""The mixin over a standard attention backend of vLLM. It imports no vLLM: `cuda` and `cpu` give it their classes.

Per step and layer, one of these happens:

==============================================================  ========================================================
rows of the step, the layer                                     what runs
==============================================================  ========================================================
a request with ``threshold`` new tokens or more, whole or a     `mmflex.attention` with the layer's spec; keys and
values chunk, with or without a cached prefix, alone or among others   of earlier tokens are gathered from the cache the
same, where the cost model says that dense is faster        the standard backend decode steps, short prompts
the standard backend, on the other rows of the same step
cascade, where a step has a long prefill                        the standard backend without it: the result is the same
layers that the spec leaves out, sliding windows, soft caps,    the standard backend, and a line in the log, once per
sinks, ALiBi, encoders, quantized caches, draft models, MLA,    reason
context parallelism, bidirectional image tokens
==============================================================  ========================================================
"""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmflex.compiler.program import Program
from mmflex.ir.pattern import Pattern
from mmflex.runtime.attention import plan
from mmflex.runtime.calls import Request, decided

from .batch import Run, cut, runs_of, why_whole
from .carry import estimate_from
from .engine import Engine, logger, read_engine, why_not_auto, why_off, why_standard
from .requests import current_step
from .threshold import default_threshold
from .warmup import warm_up

RUNS = "mmflex_runs"
"""Attribute of a standard backend's metadata: the runs of its step, where it has long prefills."""


@dataclass
class Platform:
    """What a binding brings.

    Attributes:
        rank: of this process among those that share a layer's heads.
        current_config: vLLM's config while a model is built.
        pages: (engine's buffer) -> reads a request's keys and values (`pages.StridedPages`, `pages.ProbedPages`).
        engaged: called when a layer is to be accelerated; what it returns is logged once.
        warms: whether kernels are compiled while vLLM profiles itself.
    """

    rank: Callable[[], int]
    current_config: Callable[[], Any]
    pages: Callable[[Any], Any]
    engaged: Callable[[], str | None]
    warms: bool
    engines: dict[int, tuple[weakref.ref, Engine | None, Any]] = field(default_factory=dict)

    def engine(self, vllm_config: Any) -> tuple[Engine | None, Any]:
        """The engine of a config and what reads its pages. Configs of parts of a model share what they compile into."""
        owner = vllm_config.compilation_config
        known = self.engines.get(id(owner))
        if known is None or known[0]() is not owner:
            engine = read_engine(vllm_config, self.rank())
            pages = None if engine is None else self.pages(engine.buffer)
            known = self.engines[id(owner)] = (weakref.ref(owner), engine, pages)
            weakref.finalize(owner, self.engines.pop, id(owner), None)
        return known[1], known[2]


@dataclass
class LayerRules:
    """What one attention layer runs, and with what.

    Attributes:
        engine, pages: of its model.
        arguments: of its `AttentionImpl`, by name.
    """

    engine: Engine
    pages: Any
    arguments: dict[str, Any]
    warms: bool
    _specs: dict[str, tuple[int, tuple[Pattern, ...]] | None] = field(default_factory=dict)

    def spec(self, layer_name: str) -> tuple[int, tuple[Pattern, ...]] | None:
        """(number of the layer, the patterns of this rank's heads); None where it runs the standard attention."""
        if layer_name not in self._specs:
            number = self.engine.layer_of(layer_name)
            patterns = None if number is None else self.engine.spec.get(number)
            if number is None:
                self.engine.notice(f"{layer_name} is no layer of the model: it runs the standard attention")
            if patterns is not None and len(patterns) != self.arguments["num_heads"]:
                raise ValueError(
                    f"{layer_name} has {self.arguments['num_heads']} query heads here but its spec {len(patterns)} "
                    "patterns: leave the layer out of the spec"
                )
            self._specs[layer_name] = None if number is None or patterns is None else (number, patterns)
        return self._specs[layer_name]


def accelerated_impl(base: type, platform: Platform) -> type:
    """An `AttentionImpl` over a standard one."""
    signature = inspect.signature(base.__init__)  # type: ignore[misc]

    class AcceleratedImpl(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            del arguments["self"]
            self.mmflex = _rules(platform, arguments)

        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: Any,
            output: Tensor,
            output_scale: Tensor | None = None,
            output_block_scale: Tensor | None = None,
        ) -> Tensor:
            """As the standard backend's: query [T, Hq, D], key and value [T, Hkv, D] of the step, output like query."""
            rules, runs = self.mmflex, getattr(attn_metadata, RUNS, ())

            def standard(tokens: slice | None = None, metadata: Any = attn_metadata) -> Any:
                q, k, v, out = (t if t is None or tokens is None else t[tokens] for t in (query, key, value, output))
                given = (layer, q, k, v, kv_cache, metadata, out, output_scale, output_block_scale)
                return super(AcceleratedImpl, self).forward(*given)

            if rules is None or output_scale is not None or output_block_scale is not None:
                return standard()
            if attn_metadata is None:
                found = rules.spec(layer.layer_name)
                if rules.warms and found is not None and key is not None and value is not None:
                    warm_up(rules.engine, found[1], query, key, value, self.scale)
                return standard()
            found = None if not runs else rules.spec(layer.layer_name)
            if found is None:
                return standard()
            number, spec = found
            programs = [_program(rules, spec, run, query, self.scale) if run.long else None for run in runs]
            if not any(programs):
                return standard()
            for run, program in zip(runs, programs, strict=True):
                if program is None:
                    standard(run.tokens, run.metadata)
                else:
                    out = _attend(self, layer, number, spec, run, program, query, key, value, kv_cache)
                    output[run.tokens].copy_(out[0].transpose(0, 1))
            return output

    AcceleratedImpl.__name__ = AcceleratedImpl.__qualname__ = f"Mmflex{base.__name__}"
    return AcceleratedImpl


def _rules(platform: Platform, arguments: dict[str, Any]) -> LayerRules | None:
    """The rules of a layer that is being built; None where it is a standard one."""
    config = platform.current_config()
    engine, pages = platform.engine(config)
    if engine is None:
        return None
    reason = why_off(config) or why_standard(arguments)
    if reason is not None:
        engine.notice(reason)
        return None
    warning = platform.engaged()
    if warning is not None:
        engine.notice(warning)
    return LayerRules(engine, pages, arguments, platform.warms)


def _program(rules: LayerRules, spec: tuple[Pattern, ...], run: Run, query: Tensor, scale: float) -> Program | None:
    """What a long prefill runs in layers with a spec; None for the standard attention: where the cost model says so, or
    where a spec makes no sense with this prompt (frames, but no video)."""
    key = id(spec)
    if key not in run.programs:
        engine = rules.engine
        assert run.layout is not None
        request = Request(float(scale), engine.settings.backend)
        q = query[run.tokens].transpose(0, 1)[None]
        k = query.new_empty((1, rules.arguments["num_kv_heads"], 1, q.shape[3])).expand(-1, -1, run.end, -1)
        program: Program | None = None
        try:
            program, _ = decided(q, k, spec, run.layout, request)
        except ValueError as error:
            engine.notice(f"{run.layout.summary()}: standard attention: {error}")
        if program is not None and program.is_dense and engine.settings.backend == "auto":
            program = None
        run.programs[key] = program
    if run.programs[key] is None:
        rules.engine.counters.add("standard")
    return run.programs[key]


def _attend(
    impl: Any,
    layer: Any,
    number: int,
    spec: tuple[Pattern, ...],
    run: Run,
    program: Program,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Tensor,
) -> Tensor:
    """[1, Hq, M, D]: one long prefill's attention in one layer."""
    rules: LayerRules = impl.mmflex
    engine = rules.engine
    q = query[run.tokens].transpose(0, 1)[None]
    if run.start or rules.arguments.get("kv_sharing_target_layer_name") is not None:
        k, v = rules.pages.read(impl, layer, cache, run.table, run.end)
    else:
        k, v = (t[run.tokens].transpose(0, 1)[None] for t in (key, value))
    timed = logger.isEnabledFor(logging.DEBUG)
    started = _now(q.device) if timed else 0.0
    # Plans are not replayed as graphs here: prompts differ, and graphs hold memory that vLLM has counted for its cache.
    settings: Any = {"layout": run.layout, "scale": float(impl.scale), "backend": engine.settings.backend}
    planned = plan(q, k, spec, estimate_from=estimate_from(run, number, q, program), **settings)
    between = _now(q.device) if timed else 0.0
    out = planned.attend(q, k, v)
    engine.counters.add("layers")
    if not run.counted:
        run.counted = True
        engine.counters.add("prefills")
        engine.counters.add("tokens", q.shape[2])
    if timed:
        ended = _now(q.device)
        run.note(planned.density.total, 1e3 * (between - started), 1e3 * (ended - between))
        if number == engine.last_layer:
            logger.debug("mmflex: %s", run.summary())
    return out


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- metadata --------------------------------------------------------------------------------------------------------


@dataclass
class LayerGroup:
    """Layers that share metadata: from how many new tokens on a request is a long prefill for them.

    Attributes:
        engine: of the model. threshold: in tokens.
    """

    engine: Engine
    threshold: int

    def runs(self, common: Any) -> list[Run]:
        """The runs of a step; none where it has no long prefill or must not be cut."""
        if common.max_query_len < self.threshold:
            return []
        reason = why_whole(common)
        if reason is not None:
            self.engine.notice(f"{reason}: the step runs the standard attention")
            return []
        runs = runs_of(common, self.threshold)
        step = current_step()
        names: Sequence[str | None] = ()
        if step is not None:
            names = step.names(np.diff(np.asarray(common.query_start_loc_cpu)).tolist())
        for run in runs:
            if run.long:
                name = names[run.rows.start] if run.rows.start < len(names) else None
                run.prompt = None if step is None or name is None else step.requests.prompts.get(name)
                if run.prompt is None:
                    self.engine.notice("rows of a step whose requests are not known: their tokens are taken as text")
                run.layout = self.engine.layouts.until(run.prompt, run.end)
        return runs


def accelerated_builder(base: type, platform: Platform) -> type:
    """An `AttentionMetadataBuilder` over a standard one."""

    class AcceleratedBuilder(base):  # type: ignore[misc, valid-type]
        def __init__(
            self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any, *args: Any, **kwargs: Any
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs)
            self.mmflex = _group(kv_cache_spec, layer_names, vllm_config, torch.device(device))

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any
        ) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
            if self.mmflex is None or fast_build:  # fast: for a draft model
                return metadata
            runs = self.mmflex.runs(common_attn_metadata)
            for run in runs:
                # Fast, because only then does FlashAttention write nothing to memory that the whole step's metadata
                # has.
                part = cut(common_attn_metadata, run)
                run.metadata, run.table = super().build(0, part, True, **kwargs), part.block_table_tensor[0]
            setattr(metadata, RUNS, runs)
            return metadata

        def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
            """Of another group of layers with the same rows."""
            updated = super().update_block_table(metadata, blk_table, slot_mapping)
            update, runs = super().update_block_table, []
            for run in getattr(metadata, RUNS, ()):
                part = update(run.metadata, blk_table[run.rows], slot_mapping[run.tokens])
                runs.append(run.over(part, blk_table))
            setattr(updated, RUNS, runs)
            return updated

    AcceleratedBuilder.__name__ = AcceleratedBuilder.__qualname__ = f"Mmflex{base.__name__}"
    return AcceleratedBuilder


def _group(cache: Any, names: list[str], vllm_config: Any, device: torch.device) -> LayerGroup | None:
    """The group of layers that a builder is made for; None where all of them are standard ones.

    cache: the `KVCacheSpec` of the group.
    """
    layers = vllm_config.compilation_config.static_forward_context
    found = []
    for name in names:
        rules: LayerRules | None = getattr(getattr(layers.get(name), "impl", None), "mmflex", None)
        spec = None if rules is None else rules.spec(name)
        if rules is not None and spec is not None:
            found.append((rules, *spec))
    if not found:
        return None
    engine, arguments = found[0][0].engine, found[0][0].arguments
    dtype = vllm_config.model_config.dtype
    reason = why_not_auto(engine.settings.backend, device, int(arguments["head_size"]), dtype)
    if getattr(cache, "attention_chunk_size", None) is not None or type(cache).__name__ != "FullAttentionSpec":
        reason = f"layers with a cache of {type(cache).__name__} run the standard attention"
    if reason is not None:
        engine.notice(reason)
        return None
    engine.use_config(vllm_config.model_config.hf_config)
    engine.last_layer = max([engine.last_layer, *(number for _, number, _ in found)])
    threshold = engine.settings.threshold
    if threshold is None:
        specs = list(dict.fromkeys(spec for _, _, spec in found))
        threshold = default_threshold(engine, specs, arguments, device, dtype)
    if threshold <= engine.captured:
        engine.notice(
            f"threshold {threshold} is raised to {engine.captured + 1}: up to {engine.captured} tokens vLLM replays "
            "CUDA graphs"
        )
        threshold = engine.captured + 1
    logger.info("mmflex accelerates %d layers for requests with %d or more new tokens in a step", len(found), threshold)
    return LayerGroup(engine, threshold)


def accelerated_backend(base: type, platform: Platform, module: str = __name__) -> type:
    """An `AttentionBackend` over a standard one, under its name. Without the option in `additional_config` its layers
    are the standard ones.

    module: where it is found, as ``Backend``.
    """
    impl = accelerated_impl(base.get_impl_cls(), platform)  # type: ignore[attr-defined]
    builder = accelerated_builder(base.get_builder_cls(), platform)  # type: ignore[attr-defined]

    class AcceleratedBackend(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def get_impl_cls() -> type:
            return impl

        @staticmethod
        def get_builder_cls() -> type:
            return builder

    AcceleratedBackend.__name__ = AcceleratedBackend.__qualname__ = "Backend"
    AcceleratedBackend.__module__ = module  # vLLM tells backends apart by their full names
    return AcceleratedBackend
