"""The offline search: how long it takes on a 7B shape, and whether it finds patterns that are known to be best.

    python -m benchmarks.search --json benchmarks/results/search.json     # both, on one GPU: about five minutes
    python -m benchmarks.search planted --heads 100                       # planted heads only; a CPU will do
    python -m benchmarks.search speed --tiny                              # a small model on the CPU, to try it out

*speed*: a model of the shape of Qwen2.5-VL-7B with random weights reads a video of 24k tokens (as in
`benchmarks.prefill`), and `mmflex.search` looks for patterns at a shared budget of a share of dense cost. Measured is
all of it: the dense forward, pricing the candidates, and trying them. With random weights the config is worthless.

*planted*: heads of `benchmarks.planted`, each with a budget of its own. A head is found if the search gives it the
planted boundary type, and each part the planted family, with an output error (over all rows, measured by running the
plan) that ties with the planted pattern's or is better.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mmflex
from mmflex.runtime.reference import softmax_attention
from mmflex.tuning.budget import Budget
from mmflex.tuning.rows import Rows
from mmflex.tuning.search import SLACK

from . import planted, prefill

TIE = 0.05
LAYER = 20
"""Planted heads of a layer: one of each kind."""


# ---- planted heads ---------------------------------------------------------------------------------------------------


def layers(scale: planted.Scale, heads: int, seed: int, device: str) -> tuple[list[planted.Head], list[Any]]:
    """Planted heads, and (layer, q, k, v) of them."""
    found: list[planted.Head] = []
    made = []
    for layer in range(-(-heads // LAYER)):
        here, *qkv = planted.plant(scale, LAYER, seed + layer)
        found += here
        made.append((layer, *(t.to(device) for t in qkv)))
    return found, made


def output_error(scale: planted.Scale, q: Tensor, k: Tensor, v: Tensor, pattern: mmflex.Pattern) -> tuple[float, float]:
    """(relative error of the output over all rows, density) of a pattern, from the plan that would run."""
    plan = mmflex.plan(q, k, pattern, layout=scale.layout, backend="reference", block_size=scale.tile)
    every = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    dense = softmax_attention(q, k, v, every[None, None], plan.scale)[0]
    sparse = softmax_attention(q, k, v, plan.dense_mask(), plan.scale)[0]
    return float((sparse - dense).norm() / dense.norm()), float(plan.density)


def run_planted(heads: int, seed: int, device: str, rows: int, density: float, console: Console) -> dict[str, Any]:
    """Searches planted heads and compares."""
    scale = planted.Scale()
    known, given = layers(scale, heads, seed, device)
    start = time.perf_counter()
    config = mmflex.search(
        given,
        budget=Budget.density(density, shared=False),
        candidates=scale.table(),
        layout=scale.layout,
        backend="reference",
        rows=Rows(count=rows, last=scale.last_q),
        tie=TIE,
        block_size=scale.tile,
    )
    seconds = time.perf_counter() - start
    records = []
    for number, head in enumerate(known[:heads]):
        layer, h = divmod(number, LAYER)
        pattern = config.patterns[layer][h]
        qkv = [t[:, h : h + 1] for t in given[layer][1:]]
        (error, dense), (best, _) = (output_error(scale, *qkv, p) for p in (pattern, head.pattern))
        right = planted.recognised(head, pattern)
        records.append(
            {
                "boundary": head.boundary,
                "structures": list(head.structures.values()),
                "found": str(pattern),
                "error": error,
                "planted error": best,
                "density": dense,
                "recognised": right,
                "as good": error <= best * (1 + TIE) + SLACK,
            }
        )
    good = [r["recognised"] and r["as good"] for r in records]
    table = Table(title=f"planted heads: {sum(good)} of {len(good)} found, {seconds:.0f} s")
    for name in ("boundary", "structures", "found", "of"):
        table.add_column(name)
    kinds = Counter((r["boundary"], ", ".join(r["structures"])) for r in records)
    for kind, count in kinds.items():
        found = sum(
            g for g, r in zip(good, records, strict=True) if (r["boundary"], ", ".join(r["structures"])) == kind
        )
        table.add_row(*kind, str(found), str(count))
    console.print(table)
    for r, g in zip(records, good, strict=True):
        if not g:
            console.print(
                f"missed {r['boundary']} {r['structures']}: {r['found']}, error {r['error']:.4f}, planted "
                f"{r['planted error']:.4f}",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
    return {
        "heads": len(good), "found": sum(good), "share": sum(good) / len(good), "seconds": seconds, "seed": seed,
        "tokens": scale.layout.length, "density budget": density, "rows": rows, "records": records,
    }  # fmt: skip


# ---- speed -----------------------------------------------------------------------------------------------------------


def run_speed(tokens: int, budget: str, rows: int, tiny: bool, device: str, console: Console) -> dict[str, Any]:
    """Times a search on a model of a 7B's shape."""
    where = torch.device(device)
    model = prefill.build(where, tiny)
    sample = prefill.prompt(model, tokens, 0, cache=False)
    hook = model.get_input_embeddings().register_forward_hook(prefill.embeddings(model, tokens))
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    times: list[float] = []
    with _stopwatch(times):
        config = mmflex.search(model, sample, budget=budget, rows=rows)
    seconds = time.perf_counter() - start
    hook.remove()
    found = config.provenance
    out: dict[str, Any] = {
        "tokens": tokens,
        "layers": config.layers,
        "heads": config.heads,
        "budget": found["budget"],
        "rows": found["rows"],
        "candidates": found["candidates"],
        "seconds": seconds,
        "seconds of layers": times,
        "peak memory GB": torch.cuda.max_memory_allocated() / 1e9 if where.type == "cuda" else None,
        **{name: found[name] for name in ("error", "recall", "density", "share of dense cost", "ms")},
    }
    table = Table(title="search on a 7B shape with random weights")
    for name in ("tokens", "layers x heads", "seconds", "first layer, with pricing", "median layer", "peak memory"):
        table.add_column(name, justify="right")
    memory = "" if out["peak memory GB"] is None else f"{out['peak memory GB']:.0f} GB"
    table.add_row(
        f"{tokens:,}", f"{config.layers} x {config.heads}", f"{seconds:.0f}", f"{times[0]:.1f} s",
        f"{sorted(times)[len(times) // 2]:.1f} s", memory,
    )  # fmt: skip
    console.print(table)
    return out


class _stopwatch:
    """Notes the seconds of every layer's search (for the first, of pricing as well)."""

    def __init__(self, times: list[float]) -> None:
        self.times = times

    def __enter__(self) -> None:
        from mmflex.tuning.search import Search

        self.run, self.prepare = Search.run, Search.prepare
        pricing = [0.0]

        def prepare(search: Any, *args: Any, **options: Any) -> None:
            start = time.perf_counter()
            self.prepare(search, *args, **options)
            pricing[0] = time.perf_counter() - start

        def run(search: Any, layer: Any) -> Any:
            start = time.perf_counter()
            found = self.run(search, layer)
            self.times.append(time.perf_counter() - start + pricing[0])
            print(f"layer {layer.index}: {self.times[-1]:.1f} s", flush=True)
            pricing[0] = 0.0
            return found

        Search.run, Search.prepare = run, prepare  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        from mmflex.tuning.search import Search

        Search.run, Search.prepare = self.run, self.prepare  # type: ignore[method-assign]


def experiments(args: argparse.Namespace, console: Console) -> Iterator[tuple[str, dict[str, Any]]]:
    if args.which in ("both", "planted"):
        yield "planted", run_planted(args.heads, args.seed, args.device, args.planted_rows, args.density, console)
    if args.which in ("both", "speed"):
        tokens = args.tokens or (1024 if args.tiny else 24576)
        budget = args.budget or ("density=0.6" if args.tiny else "cost=0.3")
        yield "speed", run_speed(tokens, budget, args.rows, args.tiny, args.device, console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=("both", "planted", "speed"), default="both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, default=100, help="planted heads")
    parser.add_argument("--seed", type=int, default=1000, help="of the planted heads")
    parser.add_argument("--density", type=float, default=0.3, help="budget of every planted head")
    parser.add_argument("--planted-rows", type=int, default=256, help="sampled rows of each modality, planted heads")
    parser.add_argument("--tokens", type=int, help="of the 7B shape's prompt (24576)")
    parser.add_argument("--budget", help="of the 7B shape (cost=0.3; of the small model density=0.6)")
    parser.add_argument("--rows", type=int, default=512, help="sampled rows of each modality, 7B shape")
    parser.add_argument("--tiny", action="store_true", help="a small model instead of the 7B shape")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    console = Console()
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu"
    out: dict[str, Any] = {"device": device, "torch": torch.__version__, "mmflex": mmflex.__version__}
    for name, result in experiments(args, console):
        out[name] = result
        if args.json:  # after each, so that nothing is lost
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
