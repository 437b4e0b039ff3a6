"""From how many new tokens on a request gains by mmflex, as the cost model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmflex.ir.layout import TokenLayout
from mmflex.ir.pattern import Pattern
from mmflex.runtime.calls import Request, decided

from .engine import Engine

FEWEST = 1024
"""New tokens below which no request is looked at: planning costs every layer more than it can save."""

_SPECS = 4
"""Specs of layers that are tried: each is lowered for every length."""


def sample_layout(tokens: int, images: bool) -> TokenLayout:
    """A prompt for want of a real one: text, or a video of 16 x 16 tokens a frame between a little text."""
    frames = (tokens - 64) // 256 if images else 0
    if frames < 2:
        return TokenLayout.from_segments([("text", tokens)])
    return TokenLayout.from_segments([("text", 32), ("video", (frames, 16, 16)), ("text", tokens - 32 - 256 * frames)])


def default_threshold(
    engine: Engine,
    specs: Sequence[tuple[Pattern, ...]],
    arguments: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """The fewest new tokens, a power of two, with which some layer is predicted to be faster than dense: as a whole
    prompt, or at the end of the longest. `engine.longest` where none is."""
    request = Request(float(arguments["scale"]), engine.settings.backend)
    heads, kv_heads, dim = (int(arguments[name]) for name in ("num_heads", "num_kv_heads", "head_size"))
    row = torch.empty((1, 1, 1, dim), dtype=dtype, device=device)

    def gains(tokens: int, until: int) -> bool:
        q, k = row.expand(1, heads, tokens, dim), row.expand(1, kv_heads, until, dim)
        for spec in specs[:_SPECS]:
            for images in (True, False) if engine.holds_images else (False,):
                try:
                    program, _ = decided(q, k, spec, sample_layout(until, images), request)
                except ValueError:  # frames, but no video
                    continue
                if not program.is_dense:
                    return True
        return False

    tokens = FEWEST
    while tokens < engine.longest:
        if gains(tokens, tokens) or gains(tokens, engine.longest):
            return tokens
        tokens *= 2
    return engine.longest
