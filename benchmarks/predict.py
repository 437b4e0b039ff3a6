"""Predicted against measured milliseconds, over the cases of the attention benchmark.

    python -m benchmarks.predict                     # measures here; on a GPU the cases of benchmarks.attention
    python -m benchmarks.predict --results benchmarks/results/attention-h200.json    # what was measured before

Three times are predicted: from the mask expressions alone (before planning), from the block lists (after planning), and
dense. The constants are those that `mmflex calibrate` left here, else the shipped ones. ``--results`` needs no GPU: it
predicts before planning, with the constants of the device that the file names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mmflex
from mmflex.compiler.constants import constants_for, shipped
from mmflex.compiler.lower import lower
from mmflex.compiler.prices import Prediction, predict
from mmflex.ir.queries import QueryTokens
from mmflex.runtime import backends
from mmflex.tuning.cases import Case, held_out_cases, measure

from . import attention, cpu

TARGET = 0.2
"""Largest error wanted."""


def here(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures and predicts on this device."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    lengths = [int(n) for n in (args.lengths or ("16384,32768,131072" if gpu else "4096,8192")).split(",")]
    wanted = (args.patterns or ("a-shape,vs,grid,block-topk" if gpu else "")).split(",")
    rows = []
    for n in lengths:
        if gpu:
            q, k, v = attention.planted(n)
            cases = [Case(name, attention.SPECS[name], n, True) for name in wanted]
        else:
            q, k, v = cpu.inputs("planted", n, 4, 2, 64, torch.bfloat16)
            cases = [case for case in held_out_cases([n]) if wanted == [""] or case.name in wanted]
        for name in (args.backends or ("flash,triton" if gpu else "cpu")).split(","):
            reason = mmflex.why_not(name, device, q.shape[3], q.dtype)
            if reason is not None:
                print(f"{name} is left out: {reason}")
                continue
            constants = constants_for(device, name, q.dtype, q.shape[3])
            for case in cases:
                with torch.no_grad():
                    sample = measure(case, q, k, v, name, args.seconds)
                first = predict(sample.program, constants)
                after = predict(sample.program, constants, counted=sample.works)
                rows.append(row(n, case.name, name, sample.total, first, after))
                print(f"{n} {case.name} {name}: {sample.total:.3g} ms, predicted {after.total_ms:.3g}", flush=True)
        del q, k, v
    return rows


def before(path: Path) -> list[dict[str, Any]]:
    """Predicts what a file of `benchmarks.attention` has measured."""
    data = json.loads(path.read_text())
    rows = []
    for found in data["rows"]:
        name, n, pattern = found["backend"], found["tokens"], found["pattern"]
        if found["runs"] == "dense" or pattern not in attention.SPECS:
            continue
        records = [c for c in shipped() if c.device == data["device"] and c.backend == name]
        if not records:
            raise SystemExit(f"no constants are shipped for {data['device']} with backend {name!r}")
        runs = backends.BACKENDS[name]
        layout = mmflex.TokenLayout.text(n)
        program = lower(
            [attention.SPECS[pattern]] * attention.HEADS, layout, QueryTokens.last(n, n), attention.KV_HEADS, 128,
            lse=runs.lse, full_width=runs.full_width, constants=records[0],
        )  # fmt: skip
        rows.append(row(n, pattern, name, found["total_ms"], predict(program), None))
    return rows


def row(n: int, pattern: str, backend: str, measured: float, before: Prediction, after: Prediction | None) -> dict:
    """One line of the table."""
    out = {
        "tokens": n, "pattern": pattern, "backend": backend, "measured_ms": measured,
        "before_planning_ms": before.total_ms, "before_planning_error": before.total_ms / measured - 1,
        "constants": f"{before.constants.device}, {before.constants.source}",
    }  # fmt: skip
    best = after or before
    for part in ("attend_ms", "moving_ms", "planning_ms", "waiting_ms"):
        out[part] = getattr(best, part)
    if after is not None:
        out |= {"predicted_ms": after.total_ms, "error": after.total_ms / measured - 1}
    return out


def show(rows: list[dict[str, Any]]) -> float:
    """The table; the largest error."""
    names = ("measured", "before planning", "after planning", "attending", "moving", "planning", "waiting")
    table = Table("tokens", "pattern", "backend", *names, title="milliseconds, measured and predicted")
    for r in rows:
        after = f"{r['predicted_ms']:.3g} ({r['error']:+.0%})" if "error" in r else "-"
        table.add_row(
            str(r["tokens"]), r["pattern"], r["backend"], f"{r['measured_ms']:.3g}",
            f"{r['before_planning_ms']:.3g} ({r['before_planning_error']:+.0%})", after,
            *(f"{r[part]:.3g}" for part in ("attend_ms", "moving_ms", "planning_ms", "waiting_ms")),
        )  # fmt: skip
    console = Console(width=130)
    console.print(table)
    worst = 0.0
    for name, field in (("before planning", "before_planning_error"), ("after planning", "error")):
        errors = sorted(abs(r[field]) for r in rows if field in r)
        if errors:
            inside = sum(e <= TARGET for e in errors)
            middle = errors[len(errors) // 2]
            console.print(
                f"{name}: median error {middle:.0%}, largest {errors[-1]:.0%}; {inside} of {len(errors)} within "
                f"{TARGET:.0%}", highlight=False,
            )  # fmt: skip
            worst = errors[-1]
    for what in dict.fromkeys(r["constants"] for r in rows):
        console.print(f"constants: {what}", highlight=False)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", help="tokens, comma-separated")
    parser.add_argument("--patterns", help=f"on a GPU of {', '.join(attention.SPECS)}; on a CPU by name as printed")
    parser.add_argument("--backends", help="flash, triton or cpu, comma-separated")
    parser.add_argument("--seconds", type=float, default=0.3, help="for the runs of one timing")
    parser.add_argument("--results", type=Path, help="predict what this file of benchmarks.attention has measured")
    parser.add_argument("--json", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    rows = here(args) if args.results is None else before(args.results)
    worst = show(rows)
    if args.json is not None:
        facts = {
            "torch": torch.__version__,
            "mmflex": mmflex.__version__,
            "constants": sorted({r["constants"] for r in rows}),
            "largest_error": worst,
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
