"""The vision tower: what its attention and the whole of it take, before and after `mmflex.patch`.

    python -m benchmarks.vision                  # on one GPU, about 4 minutes
    python -m benchmarks.vision --tiny           # a small float32 tower on the CPU, to try it out
    python -m benchmarks.vision --demo           # the tower of `mmflex demo` on the CPU, for several lengths

The tower is Qwen2.5-VL-7B's (32 layers of 1280 channels, windows of 64 patches, 4 layers that see whole frames) with
random weights, in bf16, on frames of 448 x 448: 1024 patches for two frames. Five parts, ``--parts``:

attention  one layer's attention over the segments of several families, every backend, a document mask through
           FlexAttention, and one call for every segment as transformers makes it; each against float64
exact      the whole tower on a short video against itself in float64: how far every path is from it, and from
           transformers' own
tower      times, memory, kernel launches and host syncs of the tower by length: transformers with SDPA and with
           flash-attn-4 (where installed), mmflex with layers as they are and compiled
profile    kernel time of the tower by kind of work
processor  frames to patches by transformers' processor, on the CPU and (with torchvision) on the GPU
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.kinds import on_gpu, profiled
from benchmarks.prefill import RESULTS, VISION, machine
from mmflex.integrations.vision import VisionPatch
from mmflex.integrations.vision import tower as tower_module
from mmflex.runtime import varlen
from mmflex.runtime.varlen import Segments

PARTS = ("exact", "tower", "attention", "profile", "processor")

SIDE = 32
"""Patches along a side of a frame of 448 pixels."""
LENGTHS = (128, 512, 2048)
"""Frames."""
LONGEST_SDPA = 512
"""Beyond, transformers' one call for every window takes minutes and the tower at once does not fit."""


# ---- attention -------------------------------------------------------------------------------------------------------


def shapes(tiny: bool) -> list[tuple[str, int, int, list[int]]]:
    """(name, heads, head dimension, lengths of segments)."""
    frames = 1 if tiny else 64
    generator = np.random.default_rng(0)
    images = (4 * generator.integers(16, 512 if not tiny else 40, frames)).tolist()
    cut = [64, 64, 64, 32, 64, 64, 64, 32, 32, 32, 32, 16] * (4 * frames)  # windows of a frame that they do not fit
    return [
        ("Qwen2.5-VL windows", 16, 80, [64] * (16 * frames)),
        ("Qwen2.5-VL windows, cut", 16, 80, cut),
        ("Qwen2.5-VL frames", 16, 80, [1024] * frames),
        ("Qwen3-VL frames", 16, 72, [784] * frames),
        ("GLM-4.1V frames", 12, 128, [1024] * frames),
        ("images of unlike sizes", 16, 80, images),
    ]


def candidates(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor, Segments], Tensor]]:
    def backend(name: str) -> Callable[[Tensor, Tensor, Tensor, Segments], Tensor]:
        return lambda q, k, v, segments: varlen.varlen_attention(q, k, v, segments, backend=name)

    found = {"auto": backend("auto"), **{name: backend(name) for name in varlen.BACKENDS}}
    found["each segment"] = _one_call_each
    if device.type == "cuda":
        found["flex"] = DocumentMask()
    return found


def _one_call_each(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """As transformers does it, its reading of the lengths included."""
    lengths = segments.boundaries(q.device).diff().tolist()
    parts = zip(*(t.transpose(0, 1)[None].split(lengths, dim=2) for t in (q, k, v)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*part)[0].transpose(0, 1) for part in parts])


class DocumentMask:
    """A block mask by segment through FlexAttention: lists of blocks from the boundaries, not from T x T pairs."""

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self.attend = torch.compile(flex_attention, dynamic=False)
        self.mask: tuple[Segments, Any] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        if self.mask is None or self.mask[0] is not segments:
            self.mask = (segments, self.build(segments, q.device))
        heads_first = (t.transpose(0, 1)[None] for t in (q, k, v))
        out: Any = self.attend(*heads_first, block_mask=self.mask[1])
        return out[0].transpose(0, 1)

    @staticmethod
    def build(segments: Segments, device: torch.device, block: int = 128) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        of = np.repeat(np.arange(len(segments)), np.diff(segments.starts))
        blocks = -(-segments.tokens // block)
        padded = np.pad(of, (0, blocks * block - len(of)), constant_values=-1).reshape(blocks, block)
        low, high = of[::block], of[np.minimum(np.arange(1, blocks + 1) * block, len(of)) - 1]
        rows, full = [], []
        for row in range(blocks):
            first, last = np.searchsorted(high, low[row]), np.searchsorted(low, high[row], side="right")
            alike = [
                c for c in range(first, last) if low[row] == high[row] == low[c] == high[c] and -1 not in padded[c]
            ]
            full.append(alike if -1 not in padded[row] else [])
            rows.append([c for c in range(first, last) if c not in set(full[-1])])
        width = max(len(r) for r in (*rows, *full))

        def lists(found: list[list[int]]) -> tuple[Tensor, Tensor]:
            index = np.zeros((1, 1, blocks, width), np.int32)
            for number, row in enumerate(found):
                index[0, 0, number, : len(row)] = row
            counts = np.array([len(row) for row in found], np.int32)[None, None]
            return torch.from_numpy(counts).to(device), torch.from_numpy(index).to(device)

        document = torch.from_numpy(padded.reshape(-1).astype(np.int32)).to(device)

        def same(b: Any, h: Any, q: Any, kv: Any) -> Any:
            return document[q] == document[kv]

        return BlockMask.from_kv_blocks(
            *lists(rows), *lists(full), BLOCK_SIZE=block, mask_mod=same, compute_q_blocks=False,
            seq_lengths=(segments.tokens, segments.tokens),
        )  # fmt: skip


def exact_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, sampled: int) -> tuple[Tensor, Tensor]:
    """(tokens of some segments, their attention in float64)."""
    chosen = np.unique(np.linspace(0, len(segments) - 1, sampled).astype(int))
    tokens, parts = [], []
    for number in chosen:
        rows = slice(int(segments.starts[number]), int(segments.starts[number + 1]))
        qs, ks, vs = (t[rows].double().transpose(0, 1) for t in (q, k, v))
        parts.append(((qs @ ks.mT) * q.shape[2] ** -0.5).softmax(-1) @ vs)
        tokens.append(torch.arange(rows.start, rows.stop, device=q.device))
    return torch.cat(tokens), torch.cat(parts, 1).transpose(0, 1)


def attention_part(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    every = candidates(bench.device)
    for name, heads, width, lengths in shapes(bench.tiny):
        segments = Segments(np.cumsum([0, *lengths]))
        generator = torch.Generator(bench.device).manual_seed(0)
        packed = torch.randn(segments.tokens, 3, heads, width, generator=generator, device=bench.device)
        q, k, v = packed.to(bench.dtype).unbind(1)
        tokens, expected = exact_attention(q, k, v, segments, 12)
        row: dict[str, Any] = {"shape": name, "tokens": segments.tokens, "segments": len(segments), "ms": {}}
        row.update(errors={}, why_not={})
        for candidate, attend in every.items():
            try:
                if time.monotonic() > bench.deadline:
                    raise TimeoutError("the time limit was reached; see --limit")
                start = time.perf_counter()
                found = attend(q, k, v, segments)
                bench.wait()
                first = time.perf_counter() - start
                error = float((found[tokens].double() - expected).norm() / expected.norm())
                row["errors"][candidate] = error
                times = bench.times(partial(attend, q, k, v, segments), 3 if first > 1 or bench.tiny else 10)
                row["ms"][candidate] = 1000 * statistics.median(times)
                row.setdefault("first_s", {})[candidate] = first
            except Exception as error:
                row["why_not"][candidate] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        row["contained"] = contained(q, k, v, segments, every)
        row["chosen"] = varlen._fastest(q, k, v, segments, width**-0.5)
        rows.append(row)
    return rows


def contained(q: Tensor, k: Tensor, v: Tensor, segments: Segments, every: dict[str, Any]) -> dict[str, bool]:
    """By backend: whether a NaN in v reaches only the rows of its own segment."""
    number = len(segments) // 2
    bad = v.clone()
    bad[int(segments.starts[number])] = float("nan")
    found = {}
    for name in varlen.BACKENDS:
        with suppress(Exception):
            rows = every[name](q, k, bad, segments).isfinite().all(-1).all(-1)
            rows[int(segments.starts[number]) : int(segments.starts[number + 1])] = True
            found[name] = bool(rows.all())
    return found


# ---- the tower -------------------------------------------------------------------------------------------------------


def build(device: torch.device, dtype: torch.dtype, tiny: bool, **changes: Any) -> Any:
    """Qwen2.5-VL-7B's tower with random weights."""
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl

    sizes: dict[str, Any] = {**VISION, "out_hidden_size": 3584, **changes}
    if tiny:
        sizes.update(depth=4, hidden_size=160, intermediate_size=428, num_heads=2, out_hidden_size=64)
        sizes["fullatt_block_indexes"] = [1, 3]
    config = configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(**sizes)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        model = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(config)
    return model.to(dtype).eval().requires_grad_(False)


def video(model: Any, frames: int, side: int) -> tuple[Tensor, Tensor]:
    """Patches and grid of a film, as the processor gives them."""
    weight = next(model.parameters())
    grid = torch.tensor([[frames // 2, side, side]], device=weight.device)
    patches = torch.empty(frames // 2 * side * side, 1176, dtype=weight.dtype, device=weight.device)
    return patches.normal_(), grid


class Bench:
    """A device, and how to measure on it."""

    def __init__(self, tiny: bool, deadline: float) -> None:
        self.tiny, self.deadline = tiny, deadline
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def times(self, work: Callable[[], Any], runs: int) -> list[float]:
        """Seconds of several runs, each waited for."""
        found = []
        for _ in range(runs):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - start)
        return found

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None


@contextmanager
def method(model: Any, name: str) -> Iterator[None]:
    """The tower as transformers has it, or patched; raises where it is not to be had."""
    if name.startswith("mmflex"):
        patch = VisionPatch(model, fuse="fused" in name, chunk=CHUNKS.get(name, tower_module.CHUNK_PATCHES))
        try:
            yield
        finally:
            patch.remove()
        return
    model.set_attn_implementation("flash_attention_4" if "flash" in name else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


METHODS = ("transformers, SDPA", "transformers, flash-attn-4", "mmflex", "mmflex, fused")
CHUNKS = {"mmflex, fused, chunks of 32k": 32_768, "mmflex, fused, chunks of 128k": 131_072}


def exact_part(bench: Bench) -> dict[str, Any]:
    """How far the tower's outputs are from float64, by path and precision, and from transformers' own."""
    side = 12 if bench.tiny else SIDE
    exact = build(bench.device, torch.float64, bench.tiny)
    # what is computed is the tower whose weights bfloat16 can hold, so that only arithmetic differs
    for parameter in exact.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    patches, grid = video(exact, 4, side)
    patches = patches.to(torch.bfloat16).double()
    expected = exact(patches, grid).pooler_output
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build(bench.device, dtype, bench.tiny)
        model.load_state_dict(exact.state_dict())
        outputs: dict[str, Tensor] = {}
        rows: dict[str, Any] = {}
        for name in METHODS:
            try:
                with method(model, name):
                    outputs[name] = model(patches.to(dtype), grid).pooler_output.double()
            except Exception as error:
                rows[name] = {"why_not": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
                continue
            first = next(iter(outputs.values()))
            rows[name] = {
                "to_float64": float((outputs[name] - expected).norm() / expected.norm()),
                "to_transformers": float((outputs[name] - first).norm() / expected.norm()),
            }
        found[str(dtype).removeprefix("torch.")] = rows
    return found


def launches_and_syncs(bench: Bench, work: Callable[[], Any]) -> dict[str, int]:
    """On CUDA kernels, copies and waits of one call; on a CPU calls of ATen operators."""
    if bench.device.type == "cpu":
        from torch.utils._python_dispatch import TorchDispatchMode

        class Counter(TorchDispatchMode):
            calls = 0

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.calls += 1
                return func(*args, **(kwargs or {}))

        with Counter() as counter:
            work()
        return {"operators": counter.calls}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        work()
        bench.wait()
    kernels = [event for event in trace.events() if on_gpu(event.name, event.device_type)]
    copies = sum(event.name.startswith(("Memcpy", "Memset")) for event in kernels)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    return {"kernels": len(kernels) - copies, "copies": copies, "host_syncs": len(waits)}


def tower_part(bench: Bench, lengths: list[int], changed: Callable[[], None], rows: list[dict[str, Any]]) -> None:
    side = 8 if bench.tiny else SIDE
    model = build(bench.device, bench.dtype, bench.tiny)
    for frames in lengths:
        patches, grid = video(model, frames, side)
        row: dict[str, Any] = {"frames": frames, "patches": len(patches), "methods": {}}
        rows.append(row)
        names = [*METHODS, *(CHUNKS if frames == 512 else ())]
        for name in names:
            if frames > LONGEST_SDPA and name.startswith("transformers"):
                continue
            result = row["methods"][name] = {}
            bench.free()
            try:
                if time.monotonic() > bench.deadline:
                    raise TimeoutError("the time limit was reached; see --limit")
                with method(model, name):
                    work = lambda patches=patches, grid=grid: model(patches, grid)  # noqa: E731
                    result["first_s"] = bench.times(work, 1)[0]
                    result["runs"] = bench.times(work, 3 if frames < 2048 else 2)
                    result["seconds"] = statistics.median(result["runs"])
                    result["peak_gb"] = bench.peak_gb()
                    if frames == lengths[0]:
                        result.update(launches_and_syncs(bench, work))
            except Exception as error:
                result["why_not"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                result["traceback"] = traceback.format_exc()[-2000:]
            changed()


PROFILED: tuple[tuple[str, dict[str, int]], ...] = (
    ("mmflex", {}),
    ("mmflex, fused", {}),
    ("mmflex, fused", {"intermediate_size": 3424}),
)


def profile_part(bench: Bench) -> list[dict[str, Any]]:
    """Kernel time by kind of work, 512 frames: as it is, compiled, and with an MLP width that suits matrix units (3420
    channels are no multiple of 8)."""
    found = []
    for name, changes in PROFILED:
        bench.free()
        model = build(bench.device, bench.dtype, bench.tiny, **changes)
        patches, grid = video(model, 8 if bench.tiny else 512, 8 if bench.tiny else SIDE)
        with method(model, name):
            model(patches, grid)
            seconds = statistics.median(bench.times(lambda m=model, p=patches, g=grid: m(p, g), 2))

            def once(m: Any = model, p: Tensor = patches, g: Tensor = grid) -> None:
                m(p, g)
                bench.wait()

            parts = profiled(once, bench.device)
        found.append({"method": name, "changes": changes, "seconds": seconds, **parts})
    return found


def processor_part(bench: Bench) -> list[dict[str, Any]]:
    """Seconds of transformers' processor for 128 frames (8 tiny ones on a CPU), where it runs."""
    from mmflex import demo

    frames, size = (8, 56) if bench.tiny else (128, 448)
    film = demo.moving_shapes(frames, size)
    found = []
    for device in dict.fromkeys(("cpu", bench.device.type)):
        row: dict[str, Any] = {"frames": frames, "device": device}
        found.append(row)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            patches, _, row["by"] = demo.process(film, device)
            patches.to(bench.device, bench.dtype)
            bench.wait()
            times.append(time.perf_counter() - start)
        row["seconds"] = statistics.median(times)
        if patches.device.type != device:
            row["why_not"] = f"{row['by']} runs on the CPU alone: install torchvision"
    return found


# ---- the demo's tower on a CPU ---------------------------------------------------------------------------------------


def demo_part(lengths: list[int]) -> list[dict[str, Any]]:
    """The tower of `mmflex demo`, bf16 on the CPU: medians of seven runs in turns."""
    from mmflex import demo

    model = demo.build(demo.Settings(device="cpu")).model.visual.requires_grad_(False)
    model.set_attn_implementation("sdpa")
    found = []
    for frames in lengths:
        patches, grid = video(model, frames, 16)
        times: dict[str, list[float]] = {"transformers, SDPA": [], "mmflex": []}
        for turn in range(8):
            for name in times:
                with method(model, name):
                    start = time.perf_counter()
                    model(patches, grid)
                    if turn:
                        times[name].append(time.perf_counter() - start)
        methods = {name: {"seconds": statistics.median(runs), "runs": runs} for name, runs in times.items()}
        found.append({"frames": frames, "patches": len(patches), "methods": methods})
    return found


# ---- reporting -------------------------------------------------------------------------------------------------------


def verdict(report: dict[str, Any]) -> list[str]:
    """What is wrong: attention farther from float64 than rounding takes it, a NaN outside of its segment, a tower 1.5
    times as far from float64 as transformers' own."""
    wrong = []
    for row in report.get("attention", ()):
        limit = 2e-6 if report["dtype"] == "float32" else 4e-3
        wrong += [f"{row['shape']}, {name}: {error:.1e}" for name, error in row["errors"].items() if not error <= limit]
        wrong += [f"{row['shape']}, {name}: a NaN spreads" for name, ok in row["contained"].items() if not ok]
    for dtype, rows in report.get("exact", {}).items():
        usual = rows["transformers, SDPA"]["to_float64"]
        found = {
            name: row["to_float64"] for name, row in rows.items() if name.startswith("mmflex") and "to_float64" in row
        }
        wrong += [
            f"tower, {dtype}, {name}: {e:.1e} instead of {usual:.1e}"
            for name, e in found.items()
            if not e <= 1.5 * usual
        ]
    return wrong


def show(report: dict[str, Any], console: Console) -> None:
    """Short tables."""

    def cell(value: Any, form: str) -> str:
        return "-" if value is None else form.format(value)

    if report.get("attention"):
        table = Table(title="attention of one layer, ms (chosen by 'auto' in the last column)")
        names = list(dict.fromkeys(n for row in report["attention"] for n in (*row["ms"], *row["why_not"])))
        for name in ("", "tokens", *names, "worst error", "chosen"):
            table.add_column(name, justify="right")
        for row in report["attention"]:
            cells = [cell(row["ms"].get(name), "{:.2f}") for name in names]
            worst = max(row["errors"].values(), default=None)
            table.add_row(row["shape"], f"{row['tokens']:,}", *cells, cell(worst, "{:.1e}"), row["chosen"])
        console.print(table)
    if report.get("exact"):
        table = Table(title="the tower against float64: relative difference (to transformers with SDPA)")
        for name in ("", *report["exact"]):
            table.add_column(name, justify="right")
        for name in METHODS:
            cells = []
            for rows in report["exact"].values():
                row = rows.get(name, {})
                cells.append(f"{row['to_float64']:.2e} ({row['to_transformers']:.2e})" if "to_float64" in row else "-")
            table.add_row(name, *cells)
        console.print(table)
    if report.get("tower"):
        table = Table(title="the tower: seconds (peak GB)")
        names = list(dict.fromkeys(name for row in report["tower"] for name in row["methods"]))
        for name in ("frames", *names):
            table.add_column(name, justify="right")
        for row in report["tower"]:
            cells = []
            for name in names:
                found = row["methods"].get(name, {})
                cells.append(
                    f"{found['seconds']:.3f}" + cell(found.get("peak_gb"), " ({:.0f})")
                    if "seconds" in found
                    else found.get("why_not", "-")[:40]
                )
            table.add_row(str(row["frames"]), *cells)
        console.print(table)
        for name, found in report["tower"][0]["methods"].items():
            counts = {
                k: v for k, v in found.items() if k in ("kernels", "copies", "host_syncs", "operators", "first_s")
            }
            console.print(f"{name}, {report['tower'][0]['frames']} frames: {counts}")
    if wrong := verdict(report):
        console.print("WRONG: " + "; ".join(wrong), markup=False)
    elif report.get("attention") or report.get("exact"):
        console.print("exactness: all right")
    for row in report.get("processor", ()):
        console.print(row)
    for row in report.get("profile", ()):
        kinds = ", ".join(
            f"{kind} {seconds:.3f}" for kind, seconds in sorted(row["kinds"].items(), key=lambda x: -x[1])
        )
        console.print(f"{row['method']} {row['changes'] or ''}: {row['seconds']:.3f} s; {kinds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    parser.add_argument("--frames", help=f"lengths, separated by commas (default: {','.join(map(str, LENGTHS))})")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--tiny", action="store_true", help="a small float32 tower on the CPU")
    parser.add_argument("--demo", action="store_true", help="the demo's tower on the CPU, and nothing else")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which no further run starts")
    args = parser.parse_args()
    console = Console(width=160)
    bench = Bench(args.tiny or args.demo, time.monotonic() + args.limit)
    default = (32, 128, 512) if args.demo else (8, 16) if args.tiny else LENGTHS
    lengths = [int(n) for n in args.frames.split(",")] if args.frames else list(default)
    name = "vision-demo-cpu.json" if args.demo else "vision-tiny.json" if args.tiny else "vision-h200.json"
    path = args.json or RESULTS / name
    dtype = str(bench.dtype).removeprefix("torch.")
    report: dict[str, Any] = {"machine": machine(bench.device), "dtype": dtype, "frames": lengths}

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    with torch.inference_mode():
        if args.demo:
            report.update(dtype="bfloat16", tower=demo_part(lengths))
        for part in () if args.demo else args.parts.split(","):
            start = time.perf_counter()
            try:
                if part == "attention":
                    report[part] = attention_part(bench)
                elif part == "exact":
                    report[part] = exact_part(bench)
                elif part == "tower":
                    report[part] = []
                    tower_part(bench, lengths, write, report[part])
                elif part == "profile":
                    report[part] = profile_part(bench)
                elif part == "processor":
                    report[part] = processor_part(bench)
                else:
                    parser.error(f"unknown part {part!r}: choose from {', '.join(PARTS)}")
            except Exception as error:  # the other parts are worth having
                report[f"{part}_error"] = traceback.format_exc()[-3000:]
                console.print(f"{part} failed: {type(error).__name__}: {error}", markup=False)
            bench.free()
            console.print(f"{part}: {time.perf_counter() - start:.0f} s")
            write()
    write()
    show(report, console)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
