"""Calls in a row without waiting, with other tensors each, equal to `Plan.attend`.

`mmflex.attention` replays its planning as a CUDA graph, uses memory again and runs gathered rows on a side stream;
`mmflex.plan` does none of the first two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mask_builders import AShape, BlockTopK, Dense, Grid, QBoundary, VerticalSlash, XAttention

from ..ir.layout import TokenLayout
from ..ir.pattern import Pattern
from ..runtime.attention import attention, plan
from ..runtime.backends import BACKENDS
from ..runtime.pairs import VerificationError
from ..runtime.verify import LSE_ERROR, OUTPUT_ERROR
from .jobs import Job, Options

CALLS = {"cuda": 6, "cpu": 3}

SPECS: dict[str, list[Pattern]] = {
    "lines": [VerticalSlash(500, 1024)] * 4 + [Grid(256, rows=True)] * 2 + [AShape(128, 1024)] * 2,
    "many patterns": [
        XAttention(8, 0.9, 16),
        BlockTopK(12),
        Grid(256, rows=True, slash=True, phase=7),
        Dense(),
        QBoundary({"text": VerticalSlash(300, 512), "video": AShape(128, 512)}),
        VerticalSlash(100, 256),
        AShape(128, 1024),
        BlockTopK(6, 64),
    ],
}


def jobs(options: Options) -> list[Job]:
    """At lengths that fill no tiles, in both memory orders; small ones where planning is not replayed."""
    kinds = [("lines", 40_001, "heads first"), ("lines", 40_001, "tokens first"), ("lines", 131_072, "tokens first"),
             ("many patterns", 20_011, "tokens first")]  # fmt: skip
    if options.device != "cuda":
        kinds = [("many patterns", 801, "tokens first")]
    out = []
    for backend in options.backends:
        if backend in ("flash", "triton") or (options.device == "cpu" and backend == "reference"):
            for spec, tokens, memory in kinds:
                settings = {"backend": backend, "spec": spec, "tokens": tokens, "memory": memory}
                name = f"{backend}, {spec}, {tokens} tokens, {memory}"
                out.append(Job("in a row", name, settings, f"in a row/{name}", 40.0 if backend != "reference" else 3.0))
    return out


def run(settings: dict[str, Any], device: str) -> dict[str, Any]:
    backend, n, tokens_first = settings["backend"], settings["tokens"], settings["memory"] == "tokens first"
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def draw(heads: int) -> Tensor:
        shape = (1, n, heads, 64) if tokens_first else (1, heads, n, 64)
        t = torch.randn(shape, generator=generator, device=device).to(dtype)
        return t.transpose(1, 2) if tokens_first else t

    text, frames = n // 8, n // 512
    layout = TokenLayout.from_segments(
        [("text", text), ("video", (frames, 8, 16)), ("text", n - text - 128 * frames)]
    )  # fmt: skip
    spec = SPECS[settings["spec"]]
    lse = BACKENDS[backend].lse
    inputs = [(draw(8), draw(2), draw(2)) for _ in range(CALLS[device])]
    results = [attention(*qkv, spec, layout=layout, backend=backend, return_lse=lse) for qkv in inputs]
    if device == "cuda":
        torch.cuda.synchronize()
    error = lse_error = 0.0
    for number, (qkv, result) in enumerate(zip(inputs, results, strict=True)):
        planned = plan(*qkv[:2], spec, layout=layout, backend=backend)
        with torch.no_grad():
            out, sums = planned._attend(*qkv, lse)
        given, given_sums = result if lse else (result, None)
        error = _most(error, float((given - out).float().norm() / out.float().norm()), OUTPUT_ERROR[dtype], number)
        if given_sums is not None and sums is not None:
            lse_error = _most(
                lse_error,
                float(torch.where(given_sums == sums, 0.0, (given_sums - sums).abs()).max()),
                LSE_ERROR,
                number,
            )
    return {"error": error, "lse_error": lse_error if lse else None, "bound": OUTPUT_ERROR[dtype]}


def _most(so_far: float, error: float, bound: float, number: int) -> float:
    if not error <= bound:
        raise VerificationError(f"call {number} in a row is {error:.1e} away from the same call alone")
    return max(so_far, error)
