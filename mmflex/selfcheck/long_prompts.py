"""Long prompts, by `Plan.verify`: sampled rows in float64 and sampled block lists."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from mask_builders import AShape, BlockTopK, Dense, Grid, VerticalSlash

from ..compiler.lower import Lowering
from ..ir.layout import TokenLayout
from ..ir.pattern import Pattern
from ..runtime.attention import plan
from .jobs import Job, NotRun, Options

LONG = 1 << 20

SPECS: dict[str, list[Pattern]] = {
    "vertical-slash": [VerticalSlash(1000, 2048)],
    "grid": [Grid(256, rows=True)],
    "mixed": [VerticalSlash(500, 1024), Grid(256, rows=True, slash=True, local=512), Dense(), AShape(128, 1024),
              BlockTopK(16), Grid(300, local=256, phase=7), VerticalSlash(100, 4096)],
}  # fmt: skip
"""Patterns of the first heads, repeated for the others."""

RESIDUE_MAJOR = Lowering(gather_rows=True, residue_launches=True)


def jobs(options: Options) -> list[Job]:
    kinds = [("vertical-slash", 1 << 17), ("grid", 100_001), ("mixed", 1 << 17)]
    if options.long:
        kinds += [("vertical-slash", LONG), ("grid", LONG)]
    if options.device != "cuda":
        kinds = [("vertical-slash", 1 << 17)]
    out = []
    for backend in options.backends:
        if backend in ("flash", "triton", "cpu"):
            for spec, tokens in kinds:
                name = f"{backend}, {spec}, {tokens} tokens"
                out.append(Job("long", name, {"backend": backend, "spec": spec, "tokens": tokens}, name, 60.0))
    return out


def run(settings: dict[str, Any], device: str) -> dict[str, Any]:
    """28 query heads on 4 KV heads of 128 in bfloat16; on a CPU, two heads of 64."""
    backend, n, name = settings["backend"], settings["tokens"], settings["spec"]
    heads, kv_heads, dim, rows = (28, 4, 128, 64) if device == "cuda" else (2, 1, 64, 16)
    if device == "cuda":
        need, free = 4.5 * heads * n * dim * 2 + (1 << 32), torch.cuda.mem_get_info()[1]
        if need > free:
            raise NotRun(f"it needs about {need / 2**30:.0f} GiB, the device has {free / 2**30:.0f}")
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, count, n, dim, generator=generator, device=device, dtype=torch.bfloat16)
        for count in (heads, kv_heads, kv_heads)
    )
    layout = TokenLayout.text(n)
    spec = (SPECS[name] * heads)[:heads]
    lowering = RESIDUE_MAJOR if name == "mixed" else None
    planned = plan(q, k, spec, layout=layout, backend=backend, lowering=lowering)
    found = asdict(planned.verify(q, k, v, rows=rows))
    found["error"] = found.pop("output_error")
    if device == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    launches = [launch.label for launch in planned.program.launches]
    del q, k, v, planned
    if device == "cuda":
        torch.cuda.empty_cache()
    return {**found, "launches": launches}
