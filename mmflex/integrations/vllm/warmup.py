"""Kernels compiled and memory taken while vLLM profiles itself.

vLLM runs the model once on as many tokens as a step may have, measures the memory that takes, and gives the rest to its
cache. What a long prefill needs besides must be taken then: the buffer for gathered keys and values, and what planning
and attention of the largest step hold for a moment. Kernels are compiled by the way, so that no request waits for them.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from mmflex.ir.pattern import Pattern
from mmflex.runtime.attention import plan

from .engine import Engine, logger, why_not_auto
from .threshold import sample_layout


def warm_up(engine: Engine, spec: tuple[Pattern, ...], query: Tensor, kv_heads: int, scale: float) -> None:
    """Runs a spec as the largest step would, and as some smaller ones. Once for every spec.

    query [T, Hq, D]: of vLLM's profiling run, of as many tokens as a step may have.
    """
    tokens, dim = query.shape[0], query.shape[2]
    key = (spec, kv_heads)
    if key in engine.warmed or tokens < min(engine.budget, engine.longest):  # vLLM's dummy runs of fewer tokens
        return
    engine.warmed.add(key)
    if why_not_auto(engine.settings.backend, query.device, dim, query.dtype) is not None:
        return
    started = time.perf_counter()
    k, v = engine.buffer.take(query, kv_heads, engine.longest, dim)
    k.normal_()
    v.normal_()
    q = query.transpose(0, 1)[None]
    for queries, keys in lengths(min(tokens, engine.longest), engine.longest):
        for images in (True, False) if engine.holds_images else (False,):
            layout = sample_layout(keys, images)
            sides = q[:, :, :queries], k[:, :, :keys]
            try:
                planned = plan(*sides, spec, layout=layout, scale=float(scale), backend=engine.settings.backend)
            except ValueError:  # frames, but no video
                continue
            planned.attend(*sides, v[:, :, :keys])
            layout.forget()
    if query.is_cuda:
        torch.cuda.synchronize(query.device)
    names = ", ".join(sorted({type(pattern).__name__ for pattern in spec}))
    logger.info("mmflex: kernels for %s are ready after %.1f s", names, time.perf_counter() - started)


def lengths(budget: int, longest: int) -> list[tuple[int, int]]:
    """(queries, keys) to run: the largest step as a whole prompt and as the end of the longest, then others, because a
    kernel takes any length only once it has met two, and any number of queries beside keys once they have differed."""
    odd = max(1, budget // 2 - 51)
    sizes = [
        (budget, budget),
        (budget, longest),
        (odd, odd),
        (odd, longest),
        (max(1, odd // 2), max(odd, longest - 203)),
    ]
    return list(dict.fromkeys(sizes))
