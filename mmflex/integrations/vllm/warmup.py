"""Kernels compiled and memory taken while vLLM profiles itself.

vLLM runs the model once on as many tokens as a step may have, measures the memory that takes, and gives the rest to its
cache. What a long prefill needs besides must be taken then: the buffer for gathered keys and values, and what planning
and attention of the largest step hold for a moment. Kernels are compiled by the way, so that no request waits for them.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from mmflex.ir.pattern import Pattern
from mmflex.runtime.attention import plan

from .engine import Engine, logger
from .threshold import sample_layout


def warm_up(engine: Engine, spec: tuple[Pattern, ...], query: Tensor, kv_heads: int, scale: float) -> None:
    """Runs a spec as the largest step would: a whole prompt of the step's tokens, and the end of the longest request.

    query [T, Hq, D]: of vLLM's profiling run. Once for every spec: layers with an equal one need no more.
    """
    tokens = min(query.shape[0], engine.longest)
    key = (spec, kv_heads, tokens)
    if key in engine.warmed or (tokens < engine.budget and tokens < engine.longest):
        return
    engine.warmed.add(key)
    started = time.perf_counter()
    dim = query.shape[2]
    k, v = engine.buffer.take(query, kv_heads, engine.longest, dim)
    k.normal_()
    v.normal_()
    q = torch.randn_like(query[:tokens]).transpose(0, 1)[None]
    for until in sorted({tokens, engine.longest}):
        for images in (True, False) if engine.holds_images else (False,):
            layout = sample_layout(until, images)
            _run(engine, spec, q, k[:, :, :until], v[:, :, :until], layout, scale)
            layout.forget()
    logger.info("mmflex: kernels for %s ready after %.1f s", _named(spec), time.perf_counter() - started)


def _run(engine: Engine, spec: Any, q: Tensor, k: Tensor, v: Tensor, layout: Any, scale: float) -> None:
    try:
        planned = plan(q, k, spec, layout=layout, scale=float(scale), backend=engine.settings.backend)
    except ValueError:  # frames, but no video
        return
    planned.attend(q, k, v)


def _named(spec: tuple[Pattern, ...]) -> str:
    names = sorted({type(pattern).__name__ for pattern in spec})
    return ", ".join(names)
