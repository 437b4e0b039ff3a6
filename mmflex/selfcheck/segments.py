"""Attention within the segments of a packed sequence, as vision towers have it, by every kernel that can run here."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from ..runtime.pairs import VerificationError
from ..runtime.varlen import BACKENDS, Segments, varlen_attention
from ..runtime.verify import OUTPUT_ERROR
from .cases import DTYPES
from .jobs import Job, NotRun, Options

LENGTHS = {
    "windows": [64] * 20,
    "cut windows": [64, 64, 32, 64, 1, 16, 64, 64, 7, 64],
    "frames": [300, 300, 300],
    "unlike": [257, 1, 0, 130, 64, 513, 5],
}
"""Tokens of each segment."""

HEADS, KV_HEADS, DIM = 16, 4, 80


def jobs(options: Options) -> list[Job]:
    ways = ("auto", "sdpa", "cudnn", "flash") if options.device == "cuda" else ("auto", "sdpa")
    dtypes = ("bfloat16", "float16", "float32") if options.device == "cuda" else ("float32", "bfloat16")
    return [
        Job("segments", f"{way}, {lengths}, {dtype}", {"way": way, "lengths": lengths, "dtype": dtype}, "segments")
        for lengths in LENGTHS
        for dtype in dtypes
        for way in ways
        if dtype != "float32" or way in ("auto", "sdpa")
    ]


def run(settings: dict[str, Any], device: str) -> dict[str, Any]:
    """Against softmax in float64, segment by segment; then once more with a NaN, which stays in its segment."""
    dtype, way = DTYPES[settings["dtype"]], settings["way"]
    segments = Segments([0, *torch.tensor(LENGTHS[settings["lengths"]]).cumsum(0).tolist()])
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(segments.tokens, HEADS + 2 * KV_HEADS, DIM, generator=generator).to(device, dtype)
    q, k, v = joint.split([HEADS, KV_HEADS, KV_HEADS], 1)
    reason = None if way == "auto" else BACKENDS[way].why_not(q, segments)
    if reason is not None:
        raise NotRun(reason)
    try:
        out = varlen_attention(q, k, v, segments, backend=way)
    except RuntimeError as error:
        if way != "cudnn":
            raise
        raise NotRun(f"cuDNN has no plan for it: {error}") from None
    wanted = _softmax(q, k, v, segments)
    apart, bound = float((out.double() - wanted).norm() / wanted.norm()), OUTPUT_ERROR[dtype]
    if not apart <= bound:
        raise VerificationError(f"attention within segments is {apart:.1e} away from float64, more than {bound:.1e}")
    first, end = segments.starts[1:3].tolist()
    spoiled = v.clone()
    spoiled[first] = float("nan")
    finite = varlen_attention(q, k, spoiled, segments, backend=way).isfinite().flatten(1).all(1)
    wrong = [token for token, fine in enumerate(finite.tolist()) if fine == (first <= token < end)]
    if wrong:
        raise VerificationError(
            f"a NaN in v of token {first}, in the segment of {first} to {end}, is told by {wrong[:9]}"
        )
    return {"error": apart, "bound": bound, "backend": "dense" if way == "sdpa" else way}


def _softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for first, end in pairwise(segments.starts.tolist()):
        query, key, value = (t[first:end].double().transpose(0, 1) for t in (q, k, v))
        key, value = (t.repeat_interleave(HEADS // KV_HEADS, 0) for t in (key, value))
        weight = (query @ key.mT * DIM**-0.5).softmax(-1)
        out[first:end] = (weight @ value).transpose(0, 1)
    return out
