"""Attention on one CUDA device beside the dense kernels: ``python -m benchmarks.attention --help``.

One table and one JSON. Everything is measured in one process: dense references (SDPA's FlashAttention-2 and cuDNN,
flash-attn-4 where installed), then mmflex with everything counted, then its parts. Times are medians over groups of
calls that follow each other without a synchronisation. Inputs have planted structure (`planted`): columns in clusters,
a few clustered diagonals, a grid.

Best dense is the fastest of all, with flash-attn-4 on tensors copied beforehand into the order in memory that it likes
best ("fa4"). "S given" is against the kernels on the very tensors that mmflex gets: whether it is ever slower.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable
from functools import partial as partial_
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmflex
from mask_builders import (
    AShape,
    BlockPeaks,
    BlockTopK,
    FlashPrefill,
    FlexPrefill,
    Grid,
    Prism,
    ProxyAttn,
    VerticalSlash,
    XAttention,
)
from mmflex.runtime import backends
from mmflex.runtime.reference import softmax_attention

HEADS, KV_HEADS, DIM = 28, 4, 128
SPECS = {
    "vs": VerticalSlash(1000, 2048),
    "vs-4096": VerticalSlash(1000, 4096),
    "grid": Grid(256, columns=True, rows=True, local=1024),
    "grid-729": Grid(729, columns=True, rows=True, local=1024),
    "grid-196": Grid(196, columns=True, local=1024),
    "a-shape": AShape(1024, 4096),
    "block-topk": BlockTopK(64),
    "stem": BlockTopK(64, decay=0.7, values=0.2),
    "flex-prefill": FlexPrefill(),
    "block-peaks": BlockPeaks(),
    "x-attention-8": XAttention(8),
    "x-attention": XAttention(16),
    "prism": Prism(),
    "flash-prefill": FlashPrefill(),
    "flash-rescue": FlashPrefill(rescue=0.3),
    "proxy": ProxyAttn(),
    "default": mmflex.default_spec(),
}


def planted(n: int, stride: int = 256, seed: int = 0, memory: str = "heads") -> tuple[Tensor, Tensor, Tensor]:
    """q [1, 28, n, 128], k and v [1, 4, n, 128], bf16: noise, 320 columns in 20 clusters, diagonals around three
    distances (relative position by 16 random frequencies), and a comb of the given stride. The same for all KV
    heads but for places. In memory, "heads" come first, or "tokens" as in models."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def noise(heads: int) -> Tensor:
        return torch.randn(1, heads, n, DIM, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(0.7)

    q, k, v = noise(HEADS), noise(KV_HEADS), noise(KV_HEADS)
    place = torch.arange(n, device="cuda", dtype=torch.float64)
    rate = torch.rand(16, generator=generator, device="cuda", dtype=torch.float64) * math.pi
    wave = torch.cat([(place[:, None] * rate).cos(), (place[:, None] * rate).sin()], 1).bfloat16()
    q[..., :32] = wave
    k[..., :32] = 0
    for distance in (0, min(n // 8, 5000), min(n // 3, 40000)):
        moved = torch.cat([((place[:, None] + distance) * rate).cos(), ((place[:, None] + distance) * rate).sin()], 1)
        k[..., :32] += 3 * moved.bfloat16()
    q[..., 32:34] = 2.0
    for head in range(KV_HEADS):
        starts = torch.randint(0, max(1, n - 16), (20,), generator=generator, device="cuda")
        k[0, head, (starts[:, None] + torch.arange(16, device="cuda")).flatten(), 32] = 25.0
        k[0, head, (7 + 31 * head) % stride :: stride, 33] = 20.0
    if memory == "tokens":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    return q, k, v


def milliseconds(call: Callable[[], Any], groups: int = 5, budget_ms: float = 400.0) -> float:
    """Median time of a call, in groups that run back to back."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = max(1e-3, (time.perf_counter() - begin) * 1e3)
    if once > budget_ms:
        return once
    each = max(1, min(20, int(budget_ms / groups / once)))
    times = []
    for _ in range(groups):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(each):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / each)
    return sorted(times)[len(times) // 2]


def attending(call: Callable[[], Any], total_ms: float, budget_ms: float = 300.0) -> tuple[float, float]:
    """Milliseconds of a call, and those of them in which an attention kernel runs, by the device's own clock. Under
    load, as in `milliseconds`, since clocks fall. ``total_ms``: about what a call takes."""
    calls = max(2, min(20, int(budget_ms / total_ms)))
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    device = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.time_range.start, e.time_range.end) for e in device]
    kernels = [span for e, span in zip(device, spans, strict=True) if re.search("flash|flex|triton_tem", e.name)]
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    return whole / 1e3 / calls, covered(kernels) / 1e3 / calls


def covered(spans: list[tuple[float, float]]) -> float:
    """Time in at least one of some spans (start, end): kernels may run beside others."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


GIVEN = "fa4 as given"


def dense_references(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Milliseconds of the dense kernels; from 512k tokens on of one KV head's group, times four (all groups alike)."""
    n = q.shape[2]
    share = 1 if n < (1 << 19) else KV_HEADS
    q, k, v = q[:, : HEADS // share], k[:, : KV_HEADS // share], v[:, : KV_HEADS // share]
    out = {}
    for name, kind in (("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(kind):
            call = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
            out[name] = milliseconds(call, groups=3) * share
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return out
    views = [t.transpose(1, 2) for t in (q, k, v)]
    for name, parts in ((GIVEN, views), ("fa4", [t.contiguous() for t in views])):
        if name != GIVEN or share == 1:  # they do not differ on long prompts
            out[name] = milliseconds(partial_(flash_attn_func, *parts, causal=True), groups=3) * share
    return out


def sampled_error(plan: mmflex.Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> float:
    """Relative error on a few rows of every seventh head, against float64 under the token-level mask."""
    n, heads = q.shape[2], list(range(0, HEADS, 9))
    rows = [0, 1, 129, n // 3, n // 2 + 77, n - 1]
    mask = plan.dense_mask(rows)[:, heads]
    error, norm = 0.0, 0.0
    for i, h in enumerate(heads):
        kv = h * KV_HEADS // HEADS
        parts = (q[:, h : h + 1, rows], k[:, kv : kv + 1], v[:, kv : kv + 1])
        expected, _ = softmax_attention(*(t.double() for t in parts), mask[:, i : i + 1], DIM**-0.5)
        error += (out[:, h : h + 1, rows] - expected).square().sum().item()
        norm += expected.square().sum().item()
    return (error / norm) ** 0.5


def measure(name: str, backend: str, q: Tensor, k: Tensor, v: Tensor, dense: dict[str, float]) -> dict[str, Any]:
    """One row of the table."""
    spec, n = SPECS[name], q.shape[2]
    how: dict[str, Any] = {"layout": mmflex.TokenLayout.text(n), "backend": backend}
    call = partial_(mmflex.attention, q, k, v, spec, **how)
    make = partial_(mmflex.plan, q, k, spec, v=v, **how)
    before, begin = backends.compiles, time.perf_counter()
    out = call()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held - out.nbytes
    again = backends.compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        syncs = 0
    except RuntimeError:
        syncs = 1
    torch.cuda.set_sync_debug_mode("default")
    total = milliseconds(call)
    plan = make()
    begin = time.perf_counter()
    make()
    host = (time.perf_counter() - begin) * 1e3
    torch.cuda.synchronize()
    planning = milliseconds(make)
    ready = [plan.state.prepared[i] for i, launch in enumerate(plan.program.launches) if launch.name != "dense"]
    partial, full = (sum(int(one.lists[i].sum()) for one in ready) for i in (0, 2))
    whole, kernel = total, 0.0
    if ready:
        whole, kernel = attending(call, total)
    flops = (full + partial) * 128.0**2 * DIM * 4
    best = min(dense.values())
    dense_rate = HEADS * (n / 128) * (n / 128 + 1) / 2 * 128.0**2 * DIM * 4 / best
    given = min(ms for kind, ms in dense.items() if kind != "fa4" or GIVEN not in dense)
    row = {
        "tokens": n, "pattern": name, "spec": str(spec), "backend": backend, "runs": plan.program.launches[0].name,
        "dense_ms": dense, "total_ms": total, "S": best / total, "S_given": given / total,
        "S_fa2": dense["fa2"] / total,
        "density": plan.density.total, "full": full, "partial": partial,
        "rate": (flops / kernel / dense_rate) if kernel else None, "plan_ms": planning,
        "kernel_ms": kernel, "share": 1 - kernel / whole if kernel else 0.0,
        "host_plan_ms": host, "peak_extra_bytes": peak, "peak_share": peak / (2 * q.nbytes + 2 * k.nbytes),
        "compiles_first": again - before, "compiles_steady": backends.compiles - again, "syncs": syncs,
        "first_call_s": first, "error": sampled_error(plan, q, k, v, out),
    }  # fmt: skip
    return row


def show(rows: list[dict[str, Any]]) -> None:
    heads = ["tokens", "pattern", "backend", "best dense", "mmflex", "S", "S given", "S fa2", "density", "rate", "plan",
             "kernel", "not kernel", "extra mem", "compiles", "syncs", "error"]  # fmt: skip
    table = Table(*heads)
    for r in rows:
        table.add_row(
            f"{r['tokens']}", r["pattern"], r["backend"] if r["runs"] != "dense" else "dense",
            f"{min(r['dense_ms'].values()):.2f}",
            f"{r['total_ms']:.2f}", f"{r['S']:.2f}", f"{r['S_given']:.2f}", f"{r['S_fa2']:.1f}", f"{r['density']:.1%}",
            f"{r['rate']:.2f}" if r["rate"] else "-", f"{r['plan_ms']:.2f}",
            f"{r['kernel_ms']:.2f}",
            f"{r['share']:.0%}", f"{r['peak_share']:.0%}", f"{r['compiles_first']}+{r['compiles_steady']}",
            f"{r['syncs']}",
            f"{r['error']:.1e}",
        )  # fmt: skip
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8192,16384,32768,65536,131072,262144,524288,1048576")
    default = "vs,grid,a-shape,block-topk:0-131072,vs-4096:524288-"
    parser.add_argument(
        "--patterns", default=default, help=f"of {', '.join(SPECS)}; NAME:LOW-HIGH for some lengths only"
    )
    parser.add_argument("--backends", default="flash", help="comma-separated; 'auto' lets the cost model choose dense")
    parser.add_argument("--memory", choices=("heads", "tokens"), default="heads", help="what comes first in memory")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new row after this many seconds")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/attention.json"))
    args = parser.parse_args()
    begin, rows = time.perf_counter(), []
    for n in map(int, args.lengths.split(",")):
        if time.perf_counter() - begin > args.seconds:
            print(f"left out: {n}")
            continue
        q, k, v = planted(n, memory=args.memory)
        dense = dense_references(q, k, v)
        print(n, {name: round(ms, 3) for name, ms in dense.items()}, flush=True)
        for backend in args.backends.split(","):
            for entry in args.patterns.split(","):
                name, _, limits = entry.partition(":")
                low, _, high = limits.partition("-")
                if not int(low or 0) <= n <= int(high or 1 << 40):
                    continue
                if time.perf_counter() - begin > args.seconds:
                    print(f"left out: {n} {name} {backend}")
                    continue
                try:
                    rows.append(measure(name, backend, q, k, v, dense))
                    r = rows[-1]
                    print(
                        f"{time.perf_counter() - begin:5.0f}s {n} {name} {backend}: {r['total_ms']:.2f} ms",
                        flush=True,
                    )
                except Exception as problem:
                    print(f"{n} {name} {backend}: {type(problem).__name__}: {str(problem)[:400]}", flush=True)
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.empty_cache()
                facts = {
                    "torch": torch.__version__,
                    "device": torch.cuda.get_device_name(),
                    "inputs": "planted",
                    "memory": args.memory,
                    "rows": rows,
                }
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(facts, indent=1) + "\n")
        del q, k, v
        torch.cuda.empty_cache()
    show(rows)


if __name__ == "__main__":
    main()
