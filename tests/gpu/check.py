"""Exactness on a CUDA device: ``python -m tests.gpu.check [--long]``. Prints one line a case, and a verdict.

Short inputs are compared with float64 softmax attention under `Plan.dense_mask()`. Long ones (``--long``: up to 1M
tokens, 28 query heads) on sampled rows, whose masks are built from the expressions' sets alone; and calls in a row.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import mmflex
from mask_builders import (
    AShape,
    BlockTopK,
    Boundary2D,
    Dense,
    Dilated,
    FlashPrefill,
    FlexPrefill,
    Grid,
    Prism,
    ProxyAttn,
    QBoundary,
    Strided,
    StridedFixed,
    TriShape,
    VerticalSlash,
    XAttention,
)
from mmflex.runtime.reference import softmax_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}


def cases() -> list[tuple[str, object]]:
    vs = VerticalSlash(200, 512)
    grid = Grid(192, local=256, shortest=64)
    return [
        ("dense", Dense()),
        ("a-shape", AShape(100, 600)),
        ("tri-shape", TriShape(100, 300, 200)),
        ("vertical-slash", vs),
        ("block top-k", BlockTopK(6)),
        ("block top-k 64", BlockTopK(10, 64)),
        ("flex prefill", FlexPrefill(0.9, 0.2, 256, 512, 8, 128)),
        ("flex prefill, blocks", FlexPrefill(0.9, 1.0, 256, 512, 8, 128)),
        ("flex prefill, lines", FlexPrefill(0.9, 0.0, 256, 512, 8, 128)),
        ("x attention", XAttention(8, 0.8, 8)),
        ("x attention 16", XAttention(16, 0.8, 8)),
        ("falling top-k, values", BlockTopK(8, decay=0.6, values=0.2)),
        ("prism", Prism(0.8, 6)),
        ("flash prefill", FlashPrefill(0.2, 8)),
        ("flash prefill, rescue", FlashPrefill(0.2, 8, 0.4)),
        ("proxy attn", ProxyAttn(0.8, 8, 512)),
        ("grid", grid),
        ("grid rows", Grid(192, rows=True, local=256)),
        ("grid slash", Grid(192, columns=False, slash=True, local=256)),
        ("grid all, searched", Grid("search", rows=True, slash=True, local=256)),
        ("fixed", StridedFixed(192)),
        ("strided", Strided(192)),
        ("dilated", Dilated(128, 600, 2)),
        ("q-boundary", QBoundary({"video": Grid("frame", local=256), "text": vs})),
        (
            "2d-boundary",
            Boundary2D({("video", "video"): grid, ("text", "video"): vs, ("text", "text"): AShape(64, 200)}),
        ),
        ("union", AShape(64, 300) | vs),
        ("difference", vs - AShape(64, 300)),
        ("mixed", [vs, grid, Dense(), AShape(100, 600)] * 2),
    ]


def told(backend: str, where: object, case: str, error: float, verdict: str, more: str = "", **facts: object) -> dict:
    """A row of results, printed as well."""
    print(f"{backend:9} {where!s:8} {case:22} {error:.1e} {verdict} {more}", flush=True)
    return {"case": case, "backend": backend, "error": error, "verdict": verdict, **facts}


def judged(error: float, dtype: torch.dtype) -> str:
    return "ok" if error <= TOLERANCE[dtype] else "WRONG"


def short(backend: str, dtype: torch.dtype, only: str = "") -> list[dict]:
    """Every case at a few thousand tokens, plain, padded, and with fewer queries than keys."""
    torch.manual_seed(0)
    layout = mmflex.TokenLayout.from_segments(
        [("text", 100), ("video", (10, 12, 16), {"timestamps": 5}), ("text", 300), ("image", (20, 30)), ("text", 157)]
    )
    n = layout.length
    inputs = [
        ("plain", layout, n, 1),
        ("chunk", layout, 1000, 1),
        ("padded", mmflex.TokenLayout.batch([layout, layout[:2000]], side="left"), n, 2),
    ]
    out = []
    for kind, lay, m, batch in inputs:
        q = torch.randn(batch, 8, m, 64, device="cuda", dtype=dtype)
        k, v = (torch.randn(batch, 2, n, 64, device="cuda", dtype=dtype) for _ in range(2))
        for name, spec in cases():
            if only and only not in name:
                continue
            if kind != "plain" and name not in (
                "vertical-slash",
                "flex prefill",
                "x attention",
                "prism",
                "flash prefill, rescue",
                "proxy attn",
                "grid all, searched",
                "q-boundary",
                "2d-boundary",
                "mixed",
            ):
                continue
            plan = None
            try:
                plan = mmflex.plan(q, k, spec, layout=lay, backend=backend, v=v)
                found, mask = plan.attend(q, k, v), plan.dense_mask()
                expected, _ = softmax_attention(q.double(), k.double(), v.double(), mask, 64**-0.5)
                error = ((found - expected).norm() / expected.norm()).item()
                verdict = judged(error, dtype)
            except Exception as problem:
                error, verdict = float("nan"), f"{type(problem).__name__}: {problem}"[:300]
            launches = (
                []
                if plan is None
                else [launch.label + ("" if launch.compares else " (looked up)") for launch in plan.program.launches]
            )
            out.append(told(backend, kind, name, error, verdict, str(launches), input=kind, launches=launches))
    return out


def steady(backend: str) -> list[dict]:
    """Calls in a row with other k and v each, without waiting, at a length that fills no tiles: as `Plan.attend` has
    them. Plans are replayed, rows run beside, and memory is used again."""
    out = []
    for n, memory in ((40_001, "heads"), (40_001, "tokens"), (131_072, "tokens")):
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(heads: int) -> torch.Tensor:
            shape = (1, n, heads, 64) if memory == "tokens" else (1, heads, n, 64)  # noqa: B023
            t = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)  # noqa: B023
            return t.transpose(1, 2) if memory == "tokens" else t  # noqa: B023

        layout = mmflex.TokenLayout.text(n)
        spec = [VerticalSlash(500, 1024)] * 4 + [Grid(256, rows=True)] * 2 + [AShape(128, 1024)] * 2
        inputs = [(draw(8), draw(2), draw(2)) for _ in range(6)]
        found = [mmflex.attention(*qkv, spec, layout=layout, backend=backend) for qkv in inputs]
        torch.cuda.synchronize()
        expected = [mmflex.plan(*qkv[:2], spec, layout=layout, backend=backend).attend(*qkv) for qkv in inputs]
        errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, expected, strict=True)]
        error = max(errors, key=lambda e: (e != e, e))  # one that is no number comes first
        out.append(told(backend, n, f"steady, {memory} first", error, judged(error, torch.bfloat16), tokens=n))
    return out


def long(backend: str, n: int, heads: int = 28, kv_heads: int = 4, dim: int = 128) -> list[dict]:
    """Sampled rows at length n: their masks come from the slots of no launch, only from the plan's sets."""
    out = []
    layout = mmflex.TokenLayout.text(n)
    for name, spec in (("vertical-slash", VerticalSlash(1000, 2048)), ("grid", Grid(256, rows=True))):
        torch.manual_seed(0)
        q = torch.randn(1, heads, n, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, kv_heads, n, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        plan = mmflex.plan(q, k, spec, layout=layout, backend=backend)
        found = plan.attend(q, k, v)
        rows = torch.tensor([0, 1, 129, n // 3, n // 2 + 77, n - 1], device="cuda")
        position = torch.arange(n, device="cuda")
        sets = {key.split("@")[0]: value for key, value in plan.selections.items()}
        error, norm = 0.0, 0.0
        for h in range(0, heads, 9):
            at, key = rows[:, None], position[None]
            if name == "grid":
                phase = sets["phase"][0, h]
                mask = (key < 128) | (at // 128 - key // 128 <= 8) | (key % 256 == phase) | (at % 256 == phase)
            else:
                mask = sets["columns"][0, h][key] | sets["diagonals"][0, h][(at // 128 - key // 128).clamp(min=0)]
            mask = mask & (key <= at)
            kv = h * kv_heads // heads
            expected, _ = softmax_attention(
                q[:, h : h + 1, rows].double(),
                k[:, kv : kv + 1].double(),
                v[:, kv : kv + 1].double(),
                mask[None, None],
                dim**-0.5,
            )
            error += (found[:, h : h + 1, rows] - expected).square().sum().item()
            norm += expected.square().sum().item()
        relative = (error / norm) ** 0.5
        verdict = judged(relative, torch.bfloat16)
        peak = torch.cuda.max_memory_allocated() / 2**30
        out.append(told(backend, n, name, relative, verdict, f"peak {peak:.1f} GiB", tokens=n, peak_gib=peak))
        del q, k, v, plan, found
        torch.cuda.empty_cache()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", default="triton,flash")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--only", default="")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for backend in args.backends.split(","):
        for dtype in args.dtypes.split(","):
            kind = getattr(torch, dtype)
            if (reason := mmflex.why_not(backend, "cuda", 64, kind)) is not None:
                print(f"{backend} {dtype}: not run, {reason}")
                continue
            results += short(backend, kind, args.only)
            if args.long and kind == torch.bfloat16:
                results += steady(backend) + long(backend, 100_001) + long(backend, 131072) + long(backend, 1 << 20)
    bad = [r for r in results if r["verdict"] != "ok"]
    print(f"{len(results) - len(bad)} passed, {len(bad)} failed")
    if args.json:
        facts = {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "results": results}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
