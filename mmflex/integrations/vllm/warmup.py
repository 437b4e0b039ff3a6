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
from mmflex.runtime.backends import LONG_QUERIES, STRIP
from mmflex.runtime.calls import TILE

from .engine import Engine, logger, why_not_auto
from .pages import warm_gathering
from .threshold import sample_layout


def warm_up(engine: Engine, spec: tuple[Pattern, ...], query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Runs a spec as the largest step would, and as some smaller ones. Once for every spec.

    query [T, Hq, D], key and value [T, Hkv, D]: of vLLM's profiling run, of as many tokens as a step may have. Whole
    prompts are read from them and others from the buffer, because kernels are compiled for the order in memory too.
    """
    tokens, kv_heads, dim = query.shape[0], key.shape[1], query.shape[2]
    warmed = (spec, kv_heads)
    if warmed in engine.warmed or tokens < min(engine.budget, engine.longest):  # vLLM's dummy runs of fewer tokens
        return
    engine.warmed.add(warmed)
    if why_not_auto(engine.settings.backend, query.device, dim, query.dtype) is not None:
        return
    started = time.perf_counter()
    for t in engine.buffer.take(query, kv_heads, engine.longest, dim):
        t.normal_()
    warm_gathering(query, kv_heads, dim)
    q, *own = (t.transpose(0, 1)[None] for t in (query, key, value))
    for queries, keys in lengths(min(tokens, engine.longest), engine.longest):
        k, v = own if queries == keys else engine.buffer.take(query, kv_heads, keys, dim)
        for images in (True, False) if engine.holds_images else (False,):
            layout = sample_layout(keys, images)
            sides = q[:, :, :queries], k[:, :, :keys]
            try:
                planned = plan(*sides, spec, layout=layout, scale=float(scale), backend=engine.settings.backend)
            except ValueError:  # frames, but no video
                continue
            if not planned.program.is_dense:  # else vLLM runs it
                planned.attend(*sides, v[:, :, :keys])
            layout.forget()
    if query.is_cuda:
        torch.cuda.synchronize(query.device)
    names = ", ".join(sorted({type(pattern).__name__ for pattern in spec}))
    logger.info("mmflex: kernels for %s are ready after %.1f s", names, time.perf_counter() - started)


def lengths(budget: int, longest: int) -> list[tuple[int, int]]:
    """(queries, keys) to run: the largest step as a whole prompt and as the end of the longest; then, for every way in
    which kernels read queries (copied to whole tiles, whole tiles where they are, strips), whole prompts and chunks of
    two lengths, of which the shorter one's gathered rows may fill one tile."""
    sizes = [(budget, budget), (budget, longest)]
    for unit, least, most in ((1, 1, budget // 2), (TILE, TILE, budget // 2), (STRIP * TILE, LONG_QUERIES, budget)):
        odd = unit == 1
        first = most // unit * unit - 51 * odd
        second = first // 2 // unit * unit if least < LONG_QUERIES else first - unit
        last = longest // unit * unit - 203 * odd
        for queries, keys in ((first, first), (first, last), (second, second), (second, last - unit)):
            if least <= queries <= keys:
                sizes.append((queries, keys))
    return list(dict.fromkeys(sizes))
