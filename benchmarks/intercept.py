"""`mmflex.intercept` beside `mmflex.patch` and beside nothing, on one decoder of the shape of Qwen2.5-7B.

    python -m benchmarks.intercept --json benchmarks/results/intercept-h200.json     # one GPU, about 4 minutes
    python -m benchmarks.intercept --tiny                                            # a small model on the CPU

The same weights run twice: as transformers' model, patched, and with attention modules of plain code in their place,
as models of 2024 have them, which repeat the KV heads and call `scaled_dot_product_attention`. Prefill: one forward of
a prompt with a video, given as embeddings, up to the last hidden state, without a cache, in turns. Decoding: single
tokens on the cache of a short prompt, in turns, plain and within `intercept`. The last columns compare the answers.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mmflex
from benchmarks.prefill import HEADS, SPEC
from mask_builders import Dense, VerticalSlash
from mmflex.integrations.long_prefill import chunk_rows

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (65536, 131072)
SIDE, BEFORE, AFTER = 14, 40, 300
"""A frame of LLaVA-Video: 14 rows of 14 tokens and a newline; text in front and (at least) behind."""
STEPS, TURNS = 40, 8
"""Decode steps of a turn, and turns."""


class PlainAttention(nn.Module):
    """Qwen2's attention in the code of 2024, on the projections of another attention module."""

    is_causal = True

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = module.q_proj, module.k_proj, module.v_proj, module.o_proj
        self.layer_idx, self.head_dim, self.config = module.layer_idx, module.head_dim, module.config
        self.num_key_value_groups = module.num_key_value_groups

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """``[B, M, width]`` to the same."""
        batch, tokens, _ = hidden_states.shape
        q, k, v = (
            projection(hidden_states).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (_rotated(x, *position_embeddings) for x in (q, k))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        k, v = (_repeated(x, self.num_key_value_groups) for x in (k, v))
        causal = self.is_causal and attention_mask is None and tokens > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=causal)
        return self.o_proj(out.transpose(1, 2).contiguous().view(batch, tokens, -1)), None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]


def _repeated(x: Tensor, times: int) -> Tensor:
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, times, tokens, width).reshape(batch, heads * times, tokens, width)


def build(device: torch.device, tiny: bool) -> Any:
    """Qwen2 with random weights, made where it runs."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    if tiny:
        shape = {"hidden_size": HEADS * 16, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1024}
    config = Qwen2Config(
        **shape,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
        max_position_embeddings=1 << 18,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if tiny else torch.bfloat16
        model = Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


class Bench:
    """The model, and its two kinds of attention modules."""

    def __init__(self, model: Any, device: torch.device, backend: str) -> None:
        self.model, self.device, self.backend = model, device, backend
        self.original = [layer.self_attn for layer in model.model.layers]
        self.plain = [PlainAttention(module).eval() for module in self.original]

    @contextmanager
    def method(self, name: str, layout: mmflex.TokenLayout | None, spec: Any = SPEC) -> Iterator[Any]:
        """The model with one method's attention: "plain", "patch", "unfused" (patch, its layers not compiled) or
        "intercept"."""
        if name in ("patch", "unfused"):
            given = nullcontext() if layout is None else mmflex.token_layout(layout)
            fuse = None if name == "patch" else False
            with mmflex.patched(self.model, spec, backend=self.backend, fuse=fuse), given:
                yield None
            return
        chunks = chunk_rows(self.model.model, None)  # as `patch` does, so that prefills of 128k fit
        for layer, module in zip(self.model.model.layers, self.plain, strict=True):
            layer.self_attn = module
        try:
            if name == "plain":
                yield None
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that these transformers could be patched
                    block = mmflex.intercept(self.model, spec, layout=layout, backend=self.backend)
                    seen = block.__enter__()
                try:
                    yield seen
                finally:
                    block.__exit__(None, None, None)
        finally:
            for layer, module in zip(self.model.model.layers, self.original, strict=True):
                layer.self_attn = module
            for chunk in chunks:
                chunk.remove()

    def timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds, result)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, result


def video_layout(tokens: int) -> mmflex.TokenLayout:
    """A prompt of so many tokens: text, a video, text."""
    per_frame = SIDE * (SIDE + 1)
    frames = (tokens - BEFORE - AFTER) // per_frame
    parts = [("text", BEFORE), ("video", (frames, SIDE, SIDE), {"newline": "row"})]
    return mmflex.TokenLayout.from_segments([*parts, ("text", tokens - BEFORE - frames * per_frame)])


def prefill(bench: Bench, tokens: int, repeats: int) -> dict[str, Any]:
    """One row: medians of all methods, and how far the last hidden states of "unfused" and "intercept", which run the
    same layers, are apart."""
    layout = video_layout(tokens)
    weight = bench.model.get_input_embeddings().weight
    embeds = torch.empty((1, tokens, weight.shape[1]), dtype=weight.dtype, device=weight.device).normal_(std=0.02)

    def run() -> Tensor:
        return bench.model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -256:].float()

    runs: dict[str, list[float]] = {name: [] for name in ("plain", "patch", "unfused", "intercept")}
    outputs: dict[str, Tensor] = {}
    taken, reasons = 0, {}
    for turn in range(repeats + 1):  # the first one compiles kernels and is not counted
        for name in runs if turn % 2 else reversed(runs):
            with bench.method(name, layout) as seen:
                seconds, outputs[name] = bench.timed(run)
                if seen is not None:
                    taken, reasons = sum(seen.taken.values()), seen.reasons
            if turn:
                runs[name].append(seconds)
    row: dict[str, Any] = {"tokens": tokens, "layout": layout.summary(), "runs_s": runs}
    row.update({f"{name}_s": statistics.median(times) for name, times in runs.items()})
    for other in ("patch", "unfused"):
        pairs = zip(runs["intercept"], runs[other], strict=True)
        row[f"intercept_of_{other}"] = statistics.median(a / b for a, b in pairs)
    apart = (outputs["intercept"] - outputs["unfused"]).norm() / outputs["unfused"].norm()
    row.update(difference=float(apart), taken=taken, reasons=reasons)
    return row


def decode(bench: Bench, tokens: int, steps: int, turns: int) -> dict[str, Any]:
    """Milliseconds of a decode step, plain and within `intercept`."""
    width, dtype = bench.model.config.hidden_size, bench.model.dtype
    x = torch.randn(1, tokens, width, device=bench.device, dtype=dtype)
    one = torch.randn(1, 1, width, device=bench.device, dtype=dtype)

    def run(cache: Any) -> None:
        for _ in range(steps):
            bench.model.model(inputs_embeds=one, past_key_values=cache, use_cache=True)

    layout = video_layout(tokens)
    runs: dict[str, list[float]] = {"plain": [], "intercept": []}
    for turn in range(turns + 1):
        for name in runs if turn % 2 else reversed(runs):
            with bench.method(name, layout):
                cache = bench.model.model(inputs_embeds=x, use_cache=True).past_key_values
                seconds, _ = bench.timed(lambda cache=cache: run(cache))
            if turn:
                runs[name].append(1000 * seconds / steps)
    medians = {f"{name}_ms": statistics.median(times) for name, times in runs.items()}
    share = statistics.median(a / b for a, b in zip(runs["intercept"], runs["plain"], strict=True))
    return {"tokens": tokens, "steps": steps, "runs_ms": runs, **medians, "intercept_of_plain": share}


def agreement(bench: Bench, tokens: int) -> dict[str, dict[str, Any]]:
    """Relative differences of hidden states of real tokens, where masks are tensors: batches padded on either side, and
    a chunk on a cache."""
    width = bench.model.config.hidden_size
    x = torch.randn(2, tokens, width, device=bench.device, dtype=bench.model.dtype)
    rows: dict[str, dict[str, Any]] = {}

    def run(method: str, spec: Any, mask: Tensor | None, chunk: int) -> tuple[Tensor, Any]:
        with warnings.catch_warnings(), bench.method(method, None, spec) as seen:
            warnings.simplefilter("ignore", UserWarning)  # that embeddings are taken as text
            cache = None
            if chunk:
                cache = bench.model.model(inputs_embeds=x[:, :-chunk], use_cache=True).past_key_values
            out = bench.model.model(
                inputs_embeds=x[:, -chunk:], attention_mask=mask, past_key_values=cache, use_cache=chunk > 0
            ).last_hidden_state
        return out.float() if mask is None else out[mask.bool()].float(), seen

    for side in ("left", "right", "chunk"):
        mask = None
        if side != "chunk":
            mask = torch.ones(2, tokens, dtype=torch.long, device=bench.device)
            mask[0, slice(0, tokens // 5) if side == "left" else slice(-(tokens // 5), None)] = 0
        chunk = tokens // 3 if side == "chunk" else 0
        for spec, other in ((Dense(), "plain"), (VerticalSlash(200, 512), "patch")):
            wanted, _ = run(other, spec, mask, chunk)
            result, seen = run("intercept", spec, mask, chunk)
            apart = float((result - wanted).norm() / wanted.norm())
            layers = len(bench.original) * (2 if chunk else 1)
            complete = sum(seen.taken.values()) == layers and not seen.reasons
            rows[f"{side}, {spec}, against {other}"] = {"difference": apart, "all_taken": complete}
    return rows


def machine(device: torch.device) -> dict[str, str]:
    """Versions, the device and a hash of the sources."""
    import transformers

    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("mmflex/**/*.py"), *ROOT.glob("mask_builders/*.py"), Path(__file__).resolve()]):
        digest.update(path.read_bytes())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {"mmflex": mmflex.__version__, **versions, "device": name, "sources": digest.hexdigest()[:16]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", help=f"tokens, separated by commas (default: {','.join(map(str, LENGTHS))})")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each, of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="a small float32 model on the CPU")
    parser.add_argument("--backend", default="auto", help="mmflex's backend")
    args = parser.parse_args()
    device = torch.device("cpu" if args.tiny else "cuda")
    lengths = [int(n) for n in args.lengths.split(",")] if args.lengths else [4096] if args.tiny else list(LENGTHS)
    path = args.json or ROOT / "benchmarks" / "results" / f"intercept{'-tiny' if args.tiny else ''}.json"
    report: dict[str, Any] = {"machine": machine(device), "spec": [repr(p) for p in SPEC], "prefill": [], "decode": []}

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    with torch.inference_mode():
        bench = Bench(build(device, args.tiny), device, args.backend)
        for tokens in lengths:
            report["prefill"].append(prefill(bench, tokens, args.repeat))
            write()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        report["decode"].append(
            decode(bench, 1024 if args.tiny else 2048, 5 if args.tiny else STEPS, 2 if args.tiny else TURNS)
        )
        write()
        # "auto" would run so short a prompt dense
        report["agreement"] = agreement(
            Bench(bench.model, device, "reference" if args.tiny else "triton"), tokens=400 if args.tiny else 1200
        )
        write()
    table = Table(title="intercept, patch and the model itself")
    for name in ("", "plain", "patch", "unfused", "intercept", "intercept / other", "difference"):
        table.add_column(name, justify="right")
    for row in report["prefill"]:
        seconds = [f"{row[f'{name}_s']:.3f} s" for name in ("plain", "patch", "unfused", "intercept")]
        share = f"{row['intercept_of_patch']:.3f} of patch, {row['intercept_of_unfused']:.3f} of unfused"
        table.add_row(f"prefill, {row['tokens']:,} tokens", *seconds, share, f"{row['difference']:.1e}")
    for row in report["decode"]:
        share = f"{row['intercept_of_plain']:.3f} of plain"
        name = f"decode step on {row['tokens']:,} tokens"
        table.add_row(name, f"{row['plain_ms']:.2f} ms", "-", "-", f"{row['intercept_ms']:.2f} ms", share, "-")
    Console(width=140).print(table)
    for name, row in report["agreement"].items():
        print(f"{name}: difference {row['difference']:.1e}, {'all' if row['all_taken'] else 'NOT ALL'} calls taken")
    print(f"written to {path}; calls that were left: {[row['reasons'] for row in report['prefill']]}")


if __name__ == "__main__":
    main()
