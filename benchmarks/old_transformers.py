"""`mmflex.intercept` on the transformers that the video models of 2024 pin, beside a current PyTorch.

    python -m benchmarks.old_transformers             # installs each of VERSIONS into a folder; a minute
    python -m benchmarks.old_transformers --current      # with the transformers of this environment, seconds

A tiny Qwen2 with random weights, fed by ``inputs_embeds``, on the CPU. Compared with the model itself are prefills with
`Dense()` (also padded on both sides, and a chunk on a cache), `generate()`, and a sparse spec with softmax under the
plan's own mask.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmflex
import mmflex.runtime.attention as runtime
from benchmarks.intercept import machine
from mask_builders import Dense, VerticalSlash

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("4.46.3", "4.40.1")
TOKENS, PAD = 700, 77


def model() -> Any:
    """Two layers, 8 query heads on 2 KV heads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    lm = Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=8, num_key_value_heads=2)).eval()
    lm.generation_config.eos_token_id = lm.generation_config.pad_token_id = 2
    return lm


def apart(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def dense(lm: Any, x: Tensor, **inputs: Any) -> tuple[float, Any]:
    """(relative difference of the logits of real tokens, record) of `Dense()`."""
    wanted = lm(inputs_embeds=x, **inputs).logits
    with mmflex.intercept(lm, Dense()) as seen:
        found = lm(inputs_embeds=x, **inputs).logits
    real = inputs.get("attention_mask", torch.ones(x.shape[:2])).bool()
    return apart(found[real], wanted[real]), seen


def sparse(lm: Any, x: Tensor) -> tuple[float, Any]:
    """(relative difference of layer 0's attention from softmax in float64 under the plan's mask, record)."""
    calls: list[tuple[Any, ...]] = []
    outputs: list[Tensor] = []
    real = runtime.attention

    def noted(q: Tensor, k: Tensor, v: Tensor, spec: Any, **options: Any) -> Any:
        calls.append((q, k, v, spec, options))
        outputs.append(real(q, k, v, spec, **options))
        return outputs[-1]

    runtime.attention = noted
    try:
        with mmflex.intercept(lm, VerticalSlash(40, 128), backend="reference") as seen:
            lm(inputs_embeds=x)
    finally:
        runtime.attention = real
    q, k, v, spec, options = calls[0]
    mask = mmflex.plan(q, k, spec, **options).dense_mask()
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q.double() @ k.transpose(2, 3)) * options["scale"]
    return apart(outputs[0], scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v), seen


def checks() -> dict[str, Any]:
    """Every check by name: its relative difference (0 or 1 for `generate()`), and calls that ran through mmflex."""
    lm, rows = model(), {}
    x, two = torch.randn(1, TOKENS, 128), torch.randn(2, TOKENS // 2, 128)

    def note(name: str, difference: float, seen: Any, calls: int, limit: float) -> None:
        good = difference <= limit and sum(seen.taken.values()) == calls and not seen.left
        rows[name] = {"difference": difference, "limit": limit, "calls": sum(seen.taken.values()), "good": good}

    note("prefill, Dense()", *dense(lm, x), 2, 1e-6)
    note("prefill, VerticalSlash(40, 128)", *sparse(lm, x), 2, 2e-6)
    for side in ("left", "right"):
        mask = torch.ones(2, TOKENS // 2, dtype=torch.long)
        mask[0, slice(0, PAD) if side == "left" else slice(-PAD, None)] = 0
        note(f"two prompts, padding on the {side}, Dense()", *dense(lm, two, attention_mask=mask), 2, 1e-6)
    options = {"inputs_embeds": x, "attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}
    options |= {"max_new_tokens": 12, "do_sample": False}
    wanted = lm.generate(**options)
    with mmflex.intercept(lm, Dense()) as seen:
        found = lm.generate(**options)
    note("generate(), 12 tokens", float(not torch.equal(found, wanted)), seen, 2, 0.0)
    wanted = lm(inputs_embeds=x).logits[:, 400:]
    with mmflex.intercept(lm, Dense()) as seen:
        cache = _cache()
        first = lm(inputs_embeds=x[:, :400], past_key_values=cache, use_cache=True)
        last = lm(inputs_embeds=x[:, 400:], past_key_values=first.past_key_values, use_cache=True)
    note("a chunk of 300 on a cache of 400", apart(last.logits, wanted), seen, 4, 1e-6)
    return rows


def _cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def current() -> dict[str, Any]:
    """The checks with the transformers of this environment."""
    start = time.perf_counter()
    with torch.no_grad():
        rows = checks()
    return {"machine": machine(torch.device("cpu")), "rows": rows, "seconds": time.perf_counter() - start}


def elsewhere(version: str, folder: Path) -> dict[str, Any]:
    """The checks with a transformers of its own, and what that wants, in front of this environment's packages."""
    packages, result = folder / version, folder / f"{version}.json"
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(packages), f"transformers=={version}"]
    subprocess.run(install, check=True)
    run = [sys.executable, "-m", "benchmarks.old_transformers", "--current", "--json", str(result)]
    paths = os.pathsep.join((str(packages), str(ROOT)))
    subprocess.run(run, check=False, stdout=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths})
    return json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--current", action="store_true", help="with the transformers of this environment")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    if args.current:
        report = current()
    else:
        with tempfile.TemporaryDirectory() as folder:
            runs = [elsewhere(version, Path(folder)) for version in VERSIONS]
        versions = {**runs[0]["machine"], "transformers": ", ".join(run["machine"]["transformers"] for run in runs)}
        report = {"machine": versions, "environments": runs}
    path = args.json or ROOT / "benchmarks" / "results" / "old-transformers.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    bad = 0
    for run in report.get("environments", [report]):
        print(", ".join(f"{name} {value}" for name, value in run["machine"].items()), f"({run['seconds']:.1f} s)")
        for name, row in run["rows"].items():
            bad += not row["good"]
            print(f"  {'ok ' if row['good'] else 'BAD'} {name}: {row['difference']:.1e}, {row['calls']} calls")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
