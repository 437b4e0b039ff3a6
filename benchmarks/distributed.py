"""One prompt on several GPUs: exactness, time to the first token, memory, communication; and decoding.

    python -m benchmarks.distributed                              # on two GPUs, about 7 minutes
    torchrun --nproc-per-node=4 -m benchmarks.distributed         # as many ranks as torchrun starts
    python -m benchmarks.distributed --tiny                       # two processes on the CPU, a small model

The model is that of `benchmarks.prefill`: the shape of Qwen2.5-VL-7B in bf16 with random weights, a video between two
pieces of text, its spec. Everything runs in one process group:

1. exactness: `mmflex.distributed.attention` against one GPU, on the same tensors: selected sets and the masks of
   sampled rows are equal, outputs agree to rounding. What fails is said, and ends the benchmark. Patterns that cut the
   mass of blocks at a threshold are counted apart: sums in another order may move what lies at a threshold.
2. time to the first token of a length on one GPU (rank 0, the others wait) and over all ranks, the same code. What
   ranks wait for each other's data is measured where they wait: events around the waits of every collective.
3. a length that needs the ranks, to see that it runs.
4. what the collectives of a layer take by themselves.
5. decoding with the cache on every rank, and sharded.
6. tensor parallelism of transformers over the same GPUs, patched as well.

The slowest rank counts. Peaks are those of the rank that has most.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import mmflex
from benchmarks.prefill import RESULTS, SPEC, build, machine, prompt
from mask_builders import (
    AShape,
    BlockTopK,
    Dense,
    FlashPrefill,
    FlexPrefill,
    Grid,
    Prism,
    ProxyAttn,
    VerticalSlash,
    XAttention,
)
from mmflex.distributed import Dealing, attention, shard
from mmflex.distributed.ranks import Ranks
from mmflex.integrations.tensor_parallel import tensor_parallel
from mmflex.runtime.calls import observed

LENGTHS = (262144, 1048576)
LONGEST = 2097152
"""What only several GPUs are asked for."""
REPEATS = {262144: 3}
"""Runs of each length, of which the median counts; 1 for lengths that are not named."""
CHECKED = 65536
"""Tokens of the exactness check."""
DECODED = 16
"""Decode steps that are timed."""

CHECK_SPEC = [
    *[Grid("frame", columns=True, rows=True, local=1024)] * 6,
    *[Grid("frame", slash=True, local=1024)] * 4,
    *[VerticalSlash(1000, 4096)] * 6,
    *[AShape(128, 4096)] * 4,
    *[BlockTopK(32)] * 4,
    *[Dense()] * 4,
]
"""28 heads, every kind of launch."""
BLOCK_SPEC = [
    *[XAttention(8, 0.9, 32)] * 4,
    *[FlashPrefill(0.1, 32, near=300)] * 5,
    *[ProxyAttn(0.9, 32)] * 5,
    *[Prism(0.9, 32)] * 4,
    *[FlexPrefill(0.9, 0.1)] * 4,
    *[BlockTopK(32, decay=0.7, values=0.2)] * 6,
]
"""28 heads that score blocks of queries."""


class Embeddings:
    """Random embeddings in place of those of the table, made anew in every forward and equal on all ranks."""

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] == 1:
            return output
        generator = torch.Generator(output.device).manual_seed(output.shape[1])
        return output.normal_(std=0.02, generator=generator)


class Waits:
    """How long ranks wait for each other's data: around every wait for a collective, on the stream that waits."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        inner = Ranks._finished

        def timed(ranks: Ranks, name: str, work: Any, out: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
            start = now(out.device)
            result = inner(ranks, name, work, out, *held)
            self.spans.append((name, start, now(out.device)))
            return result

        with mock.patch.object(Ranks, "_finished", timed):
            yield

    def take(self) -> dict[str, float]:
        """Seconds by kind of collective; after a synchronisation."""
        out: dict[str, float] = {}
        for name, start, end in self.spans:
            out[name] = out.get(name, 0.0) + between(start, end)
        self.spans.clear()
        return out


def now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


class Bench:
    """One rank's part of the benchmark."""

    def __init__(
        self, args: argparse.Namespace, device: torch.device, mesh: DeviceMesh, report: dict[str, Any]
    ) -> None:
        self.args, self.device, self.mesh, self.report = args, device, mesh, report
        self.ranks = Ranks.of(mesh)
        self.deadline = time.monotonic() + args.limit
        self.waits = Waits()
        self.model: Any = None

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def say(self, *words: Any) -> None:
        if self.ranks.rank == 0:
            print(*words, flush=True)

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Runs a step on every rank; an error is noted and the next step goes on where all ranks had it. The result of
        rank 0 goes into the report."""
        if name in self.report["steps"]:
            return self.report["steps"][name]
        late = self.everybody(float(time.monotonic() > self.deadline))
        if any(late):
            self.say(f"{name}: left out, the time limit was reached (--limit)")
            self.report["left_out"].append(name)
            return None
        start, result, error = time.perf_counter(), None, ""
        try:
            result = work()
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"[:800]
            traceback.print_exc()
        self.free()
        failed = self.everybody(float(bool(error)))
        if error:
            self.report["errors"][f"{name}, rank {self.ranks.rank}"] = error
        if any(failed):
            self.say(f"{name}: failed on ranks {[r for r, bad in enumerate(failed) if bad]}: {error}")
            return None
        self.report["steps"][name] = result
        self.say(f"{name} ({time.perf_counter() - start:.0f} s): {json.dumps(result)}")
        self.write()
        return result

    def everybody(self, value: float) -> list[float]:
        return self.ranks.all_gather(torch.tensor([value], device=self.device)).finish().flatten().tolist()

    def write(self) -> None:
        if self.ranks.rank == 0:
            self.args.json.parent.mkdir(parents=True, exist_ok=True)
            self.args.json.write_text(json.dumps(self.report, indent=2) + "\n", encoding="utf-8")

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.everybody(0.0)

    # ---- exactness -------------------------------------------------------------------------------------------------

    def exactness(self, spec: list[mmflex.Pattern], equal: bool) -> dict[str, Any]:
        """Attention over the ranks against attention on this one, of the same tensors. ``equal``: masks have to be."""
        tokens, heads, kv_heads, dim = self.args.checked, 28, 4, 128 if self.device.type == "cuda" else 16
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        frames = (tokens - 340) // 256
        layout = mmflex.TokenLayout.from_segments(
            [("text", 40), ("video", (frames, 16, 16)), ("text", tokens - 40 - 256 * frames)]
        )
        generator = torch.Generator(self.device).manual_seed(1)
        q, k, v = (
            torch.randn(1, h, tokens, dim, dtype=dtype, device=self.device, generator=generator)
            for h in (heads, kv_heads, kv_heads)
        )
        k[:, :, 5::97] *= 2
        backend = self.args.backend if self.device.type == "cuda" else "reference"
        whole = mmflex.plan(q, k, spec, layout=layout, backend=backend, v=v)
        wanted = whole.attend(q, k, v)
        own = Dealing.head_tail(tokens, self.ranks.size).queries(self.ranks.rank).numbers
        result: dict[str, Any] = {"tokens": tokens, "launches": [x.label for x in whole.program.launches]}
        schemes = ["keys"] + ["heads"] * (kv_heads % self.ranks.size == 0)
        for scheme in schemes:
            plans: list[Any] = []
            with observed(plans.append):
                out = attention(
                    *(shard(t, mesh=self.mesh) for t in (q, k, v)), spec,
                    mesh=self.mesh, layout=layout, backend=backend, scheme=scheme,
                )  # fmt: skip
            index = torch.as_tensor(own, device=self.device).long()
            apart = (out - wanted[:, :, index]).float().norm() / wanted.float().norm()
            result[f"{scheme}: relative difference"] = worst = max(self.everybody(float(apart)))
            assert not equal or worst <= (4e-3 if dtype == torch.bfloat16 else 2e-6), f"outputs differ by {worst:.2g}"
            if scheme == "keys":
                (plan,) = plans
                for name, chosen in plan.selections.items():
                    if chosen.dim() < 4 and equal:
                        assert torch.equal(chosen, whole.selections[name]), f"{name} selects otherwise"
                sampled = list(range(0, len(own), max(1, len(own) // 48)))
                mask, same = plan.dense_mask(sampled), 0
                for part, row in enumerate(own[sampled]):  # one row at a time: a row of all heads is 2 MB
                    heads_same = (mask[:, :, part] == whole.dense_mask([int(row)])[:, :, 0]).all(-1)
                    assert not equal or heads_same.all(), f"row {row} differs"
                    same += int(heads_same.sum())
                result["rows of heads whose masks are equal"] = f"{same} of {heads * len(sampled)}"
                result["launches of a rank"] = [x.label for x in plan.program.launches]
        return result

    # ---- prefill ---------------------------------------------------------------------------------------------------

    def make_model(self) -> dict[str, Any]:
        start = time.perf_counter()
        self.model = build(self.device, self.args.tiny)
        self.model.get_input_embeddings().register_forward_hook(Embeddings())
        self.text = self.model.model.language_model
        self.layers = self.text.layers
        return {"seconds": time.perf_counter() - start, "parameters": sum(p.numel() for p in self.model.parameters())}

    def run(self, tokens: int, number: int, layers: int, waits: bool) -> dict[str, Any]:
        """One prefill through the first ``layers`` layers."""
        torch.manual_seed(number)
        inputs = prompt(self.model, tokens, number, False)
        self.text.layers = self.layers[:layers]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        try:
            with self.waits.recording() if waits else nullcontext():
                start = time.perf_counter()
                logits = mmflex.last_token_logits(self.model, inputs)
                token = int(logits.argmax(-1))
                seconds = time.perf_counter() - start
        finally:
            self.text.layers = self.layers
        found = {"seconds": seconds, "token": token, "finite": bool(logits.isfinite().all())}
        if waits:
            found["waits"] = self.waits.take()
        if self.device.type == "cuda":
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return found

    def prefill(self, tokens: int, alone: bool, **options: Any) -> dict[str, Any] | None:
        """Time to the first token of a length: alone on rank 0, or over all ranks."""
        where = {} if alone else options
        if alone and self.ranks.rank:
            return None
        repeats = self.args.repeats.get(tokens, 1)
        with mmflex.patched(self.model, SPEC, backend=self.args.backend, **where):
            start = time.perf_counter()
            self.run(tokens, 100, min(2, len(self.layers)), False)  # kernels are compiled
            first = time.perf_counter() - start
            runs = []
            for number in range(repeats):
                if not alone:
                    self.wait()
                runs.append(self.run(tokens, number, len(self.layers), not alone and "mesh" in options))
        times = [run["seconds"] for run in runs]
        peak = max(run.get("peak_gb", 0.0) for run in runs)
        if not alone:
            every = [self.everybody(seconds) for seconds in times]
            times, peak = [max(one) for one in every], max(self.everybody(peak))
            tokens_of_ranks = self.everybody(float(runs[0]["token"]))
            assert len(set(tokens_of_ranks)) == 1, f"ranks have other tokens: {tokens_of_ranks}"
        result = {
            "tokens": tokens,
            "seconds": statistics.median(times),
            "runs": times,
            "first_call_s": first,
            "peak_gb": peak,
            "token": runs[0]["token"],
            "finite": all(run["finite"] for run in runs),
        }
        if "waits" in runs[0]:
            layers = len(self.layers)
            result["waits_ms_per_layer"] = {
                name: 1000 * statistics.median(run["waits"][name] for run in runs) / layers for name in runs[0]["waits"]
            }
        return result

    # ---- collectives, decoding, tensor parallelism -----------------------------------------------------------------

    def collectives(self, tokens: int) -> dict[str, Any]:
        """What a layer moves: K and V of all tokens to everybody, and the queries that patterns estimate from."""
        size = {"dtype": torch.bfloat16 if self.device.type == "cuda" else torch.float32, "device": self.device}
        dealing = Dealing.head_tail(tokens, self.ranks.size)
        key = torch.randn(1, 4, dealing.counts[self.ranks.rank], 128, **size)
        query = torch.randn(1, 28, dealing.counts[self.ranks.rank], 128, **size)
        last = tuple(range(tokens - 64, tokens))
        work: dict[str, Callable[[], Any]] = {
            "all-gather of K": lambda: self.ranks.all_gather(dealing.padded(key, 2)).finish(),
            "all-gather of K, in order": lambda: self.ranks.gather_tokens(key, dealing).finish(),
            "last 64 queries": lambda: self.ranks.pick_tokens(query, dealing, last).finish(),
        }
        out: dict[str, Any] = {"tokens": tokens, "GB of K received": key.nbytes * (self.ranks.size - 1) / 1e9}
        for name, call in work.items():
            taken = []
            for _ in range(6):
                self.wait()
                start = now(self.device)
                call()
                end = now(self.device)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                taken.append(between(start, end))
            out[f"{name}, ms"] = 1000 * max(self.everybody(statistics.median(taken[1:])))
        out["GB/s"] = out["GB of K received"] / (out["all-gather of K, ms"] / 1000)
        return out

    def decoding(self, tokens: int, kind: str) -> dict[str, Any]:
        """Milliseconds of a decode step behind a prompt of a length. Twice, and the second time counts: PyTorch's cuDNN
        attention plans for every new length, 60 ms at a step."""
        where = {} if kind == "one GPU" else {"mesh": self.mesh, "cache": kind}
        with mmflex.patched(self.model, SPEC, backend=self.args.backend, **where), torch.no_grad():
            self.decoded(tokens)
            self.free()
            times, made, held = self.decoded(tokens)
        return {"tokens": tokens, "ms": 1000 * statistics.median(times[2:]), "cache_gb": held, "made": made}

    def decoded(self, tokens: int) -> tuple[list[float], list[int], float]:
        """(seconds of every step, tokens, GB of the cache) behind a prompt."""
        torch.manual_seed(7)
        inputs = prompt(self.model, tokens, 7, True)
        inputs.pop("use_cache")
        out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        times, made = [], [int(token)]
        for step in range(DECODED):
            position = torch.full((3, 1, 1), tokens + step, device=self.device)
            start = time.perf_counter()
            out = self.model(token, past_key_values=cache, position_ids=position, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            made.append(int(token))
            times.append(time.perf_counter() - start)
        return times, made, sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) / 1e9

    def tensor(self) -> dict[str, Any]:
        """Shards the weights over all ranks, as transformers does for tp_plan="auto"."""
        start = time.perf_counter()
        tensor_mesh = init_device_mesh(self.device.type, (self.ranks.size,), mesh_dim_names=("tp",))
        tensor_parallel(self.model, tensor_mesh)
        return {"seconds": time.perf_counter() - start}

    # ---- all of it -------------------------------------------------------------------------------------------------

    def all(self) -> None:
        args, mesh = self.args, self.mesh
        if self.step("exactness", lambda: self.exactness(CHECK_SPEC, True)) is None:
            return
        self.step("block patterns", lambda: self.exactness(BLOCK_SPEC, False))
        for name in ("model", "tensor parallel, weights"):  # they change this process
            self.report["steps"].pop(name, None)
        self.step("model", self.make_model)
        for tokens in args.lengths:
            self.step(f"one GPU, {tokens}", lambda n=tokens: self.prefill(n, True))
            self.step(f"ranks, {tokens}", lambda n=tokens: self.prefill(n, False, mesh=mesh))
        if args.longest:
            self.step(f"ranks, {args.longest}", lambda: self.prefill(args.longest, False, mesh=mesh))
        for tokens in args.lengths:
            self.step(f"collectives, {tokens}", lambda n=tokens: self.collectives(n))
        short = args.lengths[0]
        for kind in ("one GPU", "replicated", "sharded"):
            self.step(f"decoding, {kind}", lambda kind=kind: self.decoding(short, kind))
        if self.step("tensor parallel, weights", self.tensor) is not None:
            for tokens in args.lengths:
                self.step(f"tensor parallel, {tokens}", lambda n=tokens: self.prefill(n, False))
        self.table()

    def table(self) -> None:
        steps = self.report["steps"]
        lines = [
            "tokens       one GPU s  GB     | ranks s  share  GB  share  waits ms/layer | tensor parallel s  share"
        ]
        for tokens in (*self.args.lengths, self.args.longest):
            one, many, tp = (steps.get(f"{name}, {tokens}") for name in ("one GPU", "ranks", "tensor parallel"))
            if not many:
                continue
            waits = sum(many.get("waits_ms_per_layer", {}).values())
            text = f"{tokens:9,d}"
            text += f"  {one['seconds']:8.2f}  {one['peak_gb']:6.1f}" if one else " " * 18
            text += f" | {many['seconds']:7.2f}"
            text += f"  {many['seconds'] / one['seconds']:.3f}" if one else " " * 7
            text += f"  {many['peak_gb']:5.1f}"
            text += f"  {many['peak_gb'] / max(one['peak_gb'], 1e-9):.2f}" if one else " " * 6
            text += f"  {waits:6.2f}"
            text += f" | {tp['seconds']:7.2f}  {tp['seconds'] / one['seconds']:.3f}" if tp and one else ""
            lines.append(text)
        for kind in ("one GPU", "replicated", "sharded"):
            found = steps.get(f"decoding, {kind}")
            if found:
                lines.append(f"decoding, {kind}: {found['ms']:.1f} ms a token, cache {found['cache_gb']:.2f} GB")
        for name, error in self.report["errors"].items():
            lines.append(f"FAILED {name}: {error}")
        self.say("\n".join(lines))
        self.write()
        self.say(f"written to {self.args.json}")


def one_rank(rank: int, size: int, port: int, args: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available() and not args.tiny
    if cuda:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    if port:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
        os.environ["LOCAL_RANK"] = str(rank)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=size)
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("cp",))
    report: dict[str, Any] = {
        "settings": {
            "ranks": size,
            "backend": args.backend,
            "communication": dist.get_backend(),
            "heads": {"query": 28, "KV": 4},
            "tokens": list(args.lengths),
        },
        "machine": machine(device),
        "steps": json.loads(args.json.read_text(encoding="utf-8"))["steps"] if args.resume else {},
        "errors": {},
        "left_out": [],
    }
    Bench(args, device, mesh, report).all()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", help=f"tokens, separated by commas (default: {','.join(map(str, LENGTHS))})")
    parser.add_argument("--longest", type=int, help=f"tokens over all ranks alone (default {LONGEST}; 0: none)")
    parser.add_argument("--ranks", type=int, default=2, help="processes, where torchrun has not started them")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--resume", action="store_true", help="keep the steps that the JSON already has")
    parser.add_argument("--tiny", action="store_true", help="a small float32 model on the CPU")
    parser.add_argument("--backend", default="auto", help="mmflex's backend")
    parser.add_argument("--limit", type=float, default=440, help="seconds after which no further step starts")
    args = parser.parse_args()
    args.lengths = tuple(map(int, args.lengths.split(","))) if args.lengths else (1024, 1400) if args.tiny else LENGTHS
    args.longest = (1600 if args.tiny else LONGEST) if args.longest is None else args.longest
    args.checked = 1100 if args.tiny else CHECKED
    args.repeats = {} if args.tiny else REPEATS
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", args.ranks))
    if torch.cuda.is_available() and not args.tiny and ranks > torch.cuda.device_count():
        parser.error(f"{ranks} ranks on {torch.cuda.device_count()} GPUs, but each needs one: use --ranks, or --tiny")
    args.json = args.json or RESULTS / ("distributed-tiny.json" if args.tiny else "distributed-h200.json")
    if args.tiny:
        args.backend = "reference"
    if "RANK" in os.environ:
        one_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0, args)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (args.ranks, port, args), args.ranks)


if __name__ == "__main__":
    main()
