"""How far a prompt in chunks selects what a whole one selects, and what each keeps of dense attention.

    python -m benchmarks.chunks                        # some ten minutes on two CPU cores

A prompt's whole prefill estimates by its last 64 queries. A chunk cannot: those come later. What it may estimate by:

    own       the last 64 queries of every modality in the chunk: what a call does by itself
    carried   the last 64 queries of every modality up to the chunk's end, also from earlier chunks: what a prompt that
              ended here would do
    mixed     of every modality, the last 32 up to here and the last 32 of the chunk before
    running   of every modality, the last 64 of every chunk so far, their attention summed

On queries and keys of the small trained models, prompts with needles. Per chunk and way: *overlap*, the share of the
whole prompt's allowed pairs that the chunk allows too; *kept*, the share of dense attention's mass under the mask;
*error*, of the output against dense attention. All over sampled rows of a chunk, heads and layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmflex
from mask_builders import Boundary2D, Grid, QBoundary, VerticalSlash
from mmflex.evaluation.models import load
from mmflex.evaluation.samples import prompts
from mmflex.integrations.capture import capture
from mmflex.tuning.probe import Layer

RESULTS = Path(__file__).parent / "results" / "chunks-cpu.json"
ROWS = 96
"""Sampled rows of a chunk."""

KEPT = 64
"""Queries that an estimate goes by."""

SPECS: dict[str, dict[str, Any]] = {
    "retrieval": {"VerticalSlash(256, 512)": VerticalSlash(256, 512)},
    "tracking": {"VerticalSlash(256, 512)": VerticalSlash(256, 512)},
    "v-niah": {
        "VerticalSlash(256, 512)": VerticalSlash(256, 512),
        "Grid('search')": Grid("search"),
        "QBoundary": QBoundary({"video": Grid("frame"), "text": VerticalSlash(256, 512)}),
    },
    "mm-niah": {
        "QBoundary": QBoundary({"video": Grid("frame"), "text": VerticalSlash(256, 512)}),
        "Boundary2D": Boundary2D(
            {("text", "text"): VerticalSlash(128, 256), ("text", "video"): VerticalSlash(128, 256),
             ("video", "video"): Grid("frame"), ("video", "text"): VerticalSlash(64, 128)}
        ),
    },
}  # fmt: skip


def wider(pattern: Any, last_q: int) -> Any:
    """A pattern that estimates by more queries, parts of it included."""
    if not dataclasses.is_dataclass(pattern):
        return pattern
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(pattern):
        value = getattr(pattern, field.name)
        if field.name == "last_q":
            changed["last_q"] = last_q
        elif isinstance(value, mmflex.Pattern):
            changed[field.name] = wider(value, last_q)
        elif isinstance(value, tuple) and value and isinstance(value[0], tuple):
            changed[field.name] = {key: wider(part, last_q) for key, part in value}
    return dataclasses.replace(pattern, **changed)


def ways(layer: Layer, starts: list[int], ends: list[int]) -> dict[str, Callable[[int], Tensor | None]]:
    """Name -> (number of a chunk -> the token numbers of the queries to estimate by; None: those of the call)."""
    kinds = layer.layout.modality[0]

    def last(start: int, end: int, count: int) -> np.ndarray:
        """The last ``count`` tokens of every modality."""
        return np.concatenate([start + np.flatnonzero(kinds[start:end] == m)[-count:] for m in np.unique(kinds)])

    def joined(*parts: np.ndarray) -> Tensor:
        return torch.as_tensor(np.unique(np.concatenate(parts)))

    return {
        "own": lambda c: None,
        "carried": lambda c: joined(last(0, ends[c], KEPT)),
        "mixed": lambda c: joined(
            *([last(0, ends[c - 1], KEPT // 2)] if c else []), last(0, ends[c], KEPT // 2 if c else KEPT)
        ),
        "running": lambda c: joined(*(last(a, b, KEPT) for a, b in zip(starts[: c + 1], ends, strict=False))),
    }


def measured(layer: Layer, spec: Any, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """One layer: a record per way and chunk."""
    n = layer.q.shape[2]
    ends = [n * (c + 1) // count // 128 * 128 for c in range(count - 1)] + [n]
    starts = [0, *ends[:-1]]
    scale = layer.q.shape[3] ** -0.5 if layer.scale is None else layer.scale
    options: Any = {"scale": scale, "backend": "reference"}
    whole = mmflex.plan(layer.q, layer.k, spec, layout=layer.layout, **options)
    group = layer.q.shape[1] // layer.k.shape[1]
    out = []
    for c, (start, end) in enumerate(zip(starts, ends, strict=True)):
        rows = start + torch.randperm(end - start, generator=generator)[:ROWS].sort().values
        keys, values = (t[:, :, :end].repeat_interleave(group, 1).float() for t in (layer.k, layer.v))
        scores = layer.q[:, :, rows].float() @ keys.mT * scale
        mass = scores.masked_fill(torch.arange(end) > rows[:, None], float("-inf")).softmax(-1)
        dense = mass @ values
        wanted = whole.dense_mask(rows.tolist())[..., :end]
        layout = layer.layout[:end]
        made = {"whole": wanted}
        for name, queries_of in ways(layer, starts, ends).items():
            queries, last_q = queries_of(c), KEPT * (c + 1) if name == "running" else KEPT
            given = {} if queries is None else {"estimate_from": (layer.q[:, :, queries], queries.numpy())}
            q, k = layer.q[:, :, start:end], layer.k[:, :, :end]
            part = mmflex.plan(q, k, wider(spec, last_q), layout=layout, **given, **options)
            made[name] = part.dense_mask((rows - start).tolist())
        for name, mask in made.items():
            kept = (mass * mask).sum(-1)
            sparse = (mass * mask) @ values / kept[..., None].clamp(min=1e-12)
            out.append(
                {
                    "chunk": c,
                    "way": name,
                    "overlap": float((mask & wanted).sum() / wanted.sum().clamp(min=1)),
                    "pairs": float(mask.sum() / (rows + 1).sum() / mask.shape[1]),
                    "kept": float(kept.mean()),
                    "error": float((sparse - dense).norm() / dense.norm()),
                }
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--tasks", default=",".join(SPECS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    records: list[dict[str, Any]] = []
    started = time.perf_counter()
    for task in args.tasks.split(","):
        model = load(task)
        for seed in range(args.prompts):
            given = prompts(task, args.tokens, batch=1, questions=8, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            for layer in capture(model, given.inputs):
                assert isinstance(layer, Layer)
                for label, spec in SPECS[task].items():
                    for record in measured(layer, spec, args.chunks, generator):
                        records.append({"task": task, "spec": label, "seed": seed, "layer": layer.index, **record})
            print(f"{task}, prompt {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    rows = summary(records)
    facts = {
        "settings": {"tokens": args.tokens, "chunks": args.chunks, "prompts": args.prompts, "rows": ROWS},
        "machine": {"mmflex": mmflex.__version__, "torch": torch.__version__, "device": platform.machine()},
        "rows": rows,
    }
    args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{'task':10} {'spec':26} {'chunk':>5} {'way':8} {'overlap':>8} {'pairs':>7} {'kept':>7} {'error':>7}")
    for row in rows:
        figures = f"{row['overlap']:8.1%} {row['pairs']:7.1%} {row['kept']:7.2%} {row['error']:7.3f}"
        print(f"{row['task']:10} {row['spec']:26} {row['chunk']:>5} {row['way']:8} {figures}")


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over prompts and layers."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["task"], record["spec"], record["chunk"], record["way"]), []).append(record)
    out = []
    for (task, spec, chunk, way), of in groups.items():
        means = {name: sum(r[name] for r in of) / len(of) for name in ("overlap", "pairs", "kept", "error")}
        out.append(
            {"task": task, "spec": spec, "chunk": chunk, "way": way, **{k: round(v, 5) for k, v in means.items()}}
        )
    return out


if __name__ == "__main__":
    main()
