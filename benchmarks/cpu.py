"""One attention layer on the CPU: dense SDPA and mmflex side by side, planning counted.

    python -m benchmarks.cpu        # 16k tokens, bf16, 4 query / 2 KV heads of 64; on two cores 0.5 to 2 minutes

The spec is a vertical-slash. Both run in turns on the same tensors, so that a slow spell of the machine meets both; the
table gives medians. The first call of mmflex, which compiles the kernel, is timed on its own. ``planted`` inputs have
columns and diagonals that every query wants, as trained heads do; ``random`` ones have no structure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mmflex
from mask_builders import VerticalSlash

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def inputs(kind: str, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v ``[1, heads, tokens, dim]`` with a fixed seed; "planted" adds 200 columns and two diagonals a head."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, tokens, dim), (1, kv_heads, tokens, dim), (1, kv_heads, tokens, dim))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    if kind == "planted":
        sought = torch.nn.functional.normalize(torch.randn(kv_heads, dim, generator=generator), dim=-1) * dim**0.5
        q += sought.repeat_interleave(heads // kv_heads, 0)[None, :, None]
        for head in range(kv_heads):
            columns = torch.randperm(tokens, generator=generator)[:200]
            k[0, head, columns] += 1.5 * sought[head]
        # A distance is planted by turning pairs of features with the position, as rotary embeddings do.
        speed = 0.5 * torch.arange(1, dim // 4 + 1) / dim
        place = torch.arange(tokens)[:, None]
        for head in range(heads):
            turned = (place - (tokens // 5) * (1 + head % 3)) * speed
            q[0, head, :, : dim // 2] += 2.0 * torch.cat([turned.cos(), turned.sin()], -1)
        k[..., : dim // 2] += 2.0 * torch.cat([(place * speed).cos(), (place * speed).sin()], -1)
    return [t.to(dtype) for t in (q, k, v)]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    q, k, v = inputs(kind, args.tokens, args.heads, args.kv_heads, args.dim, DTYPES[args.dtype])
    spec = VerticalSlash(args.vertical, args.slash)

    def dense() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def sparse() -> torch.Tensor:
        return mmflex.attention(q, k, v, spec, backend="cpu")

    first, out = timed(sparse)
    dense()
    runs: dict[str, list[float]] = {"dense": [], "mmflex": [], "plan": [], "attend": []}
    for _ in range(args.repeat):
        runs["dense"].append(timed(dense)[0])
        runs["mmflex"].append(timed(sparse)[0])
        planning, plan = timed(lambda: mmflex.plan(q, k, spec, backend="cpu"))
        runs["plan"].append(planning)
        runs["attend"].append(timed(lambda plan=plan: plan.attend(q, k, v))[0])
    median = {name: statistics.median(found) for name, found in runs.items()}
    error, at = _error(q, k, v, out, plan)
    return {
        "input": kind,
        "density": plan.density.total,
        "dense_s": median["dense"],
        "mmflex_s": median["mmflex"],
        "plan_s": median["plan"],
        "attend_s": median["attend"],
        "speedup": median["dense"] / median["mmflex"],
        "ideal_speedup": 1 / plan.density.total,
        "first_call_s": first,
        "relative_error": error,
        "rows_checked": at,
        "runs": runs,
    }


def _error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, plan: Any) -> tuple[float, int]:
    """Relative error against float64 attention under the same mask, on 64 evenly spaced queries."""
    from mmflex.plot.raster import allowed_rows

    at = torch.linspace(0, q.shape[2] - 1, 64).long()
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = (q[:, :, at].double() @ keys.mT * plan.scale).masked_fill(~allowed_rows(plan, at), float("-inf"))
    expected = scores.softmax(-1) @ values
    return float((out[:, :, at].double() - expected).norm() / expected.norm()), len(at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--vertical", type=int, default=500, help="columns (tokens)")
    parser.add_argument("--slash", type=int, default=640, help="diagonals (tokens)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7, help="runs of each, in turns")
    file = RESULTS / "cpu.json"
    parser.add_argument("--json", "--output", dest="output", type=Path, default=file, help="where the results go")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # well above 0: others were computing too
    with torch.no_grad():
        rows = [measure(kind, args) for kind in ("planted", "random")]
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    machine: dict[str, Any] = {
        "torch": torch.__version__,
        "mmflex": mmflex.__version__,
        "python": platform.python_version(),
        **_device(),
        "load_before": load,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=2) + "\n")
    show(rows, settings, machine)
    Console().print(f"written to {args.output}")


def _device() -> dict[str, str]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = lines[0] if lines else name
    return {"device": name, "capability": torch.backends.cpu.get_cpu_capability()}


def show(rows: list[dict[str, Any]], settings: dict[str, Any], machine: dict[str, Any]) -> None:
    """The table."""
    title = "{tokens} tokens, {heads} query / {kv_heads} KV heads of {dim}, {dtype}, {threads} threads"
    title = (title + ", VerticalSlash({vertical}, {slash})").format(**settings)
    caption = "torch {torch}, {device}, load before {load_before}".format(**machine)
    table = Table(title=title, caption=caption)
    names = (
        "input",
        "density",
        "SDPA",
        "mmflex",
        "planning",
        "attending",
        "speed-up",
        "ideal",
        "first",
        "error",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "input" else "right")
    for row in rows:
        milliseconds = (f"{1000 * row[name]:.0f} ms" for name in ("dense_s", "mmflex_s", "plan_s", "attend_s"))
        table.add_row(
            row["input"],
            f"{row['density']:.1%}",
            *milliseconds,
            f"{row['speedup']:.2f}x",
            f"{row['ideal_speedup']:.1f}x",
            f"{row['first_call_s']:.1f} s",
            f"{row['relative_error']:.1e}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
