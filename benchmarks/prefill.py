"""Time to the first token of a 7B vision-language model, by prompt length: dense attention and mmflex.

    python -m benchmarks.prefill --json benchmarks/results/prefill.json      # all lengths on one GPU, about 7 minutes
    python -m benchmarks.prefill --vision                                    # with the vision tower, about 8 minutes
    python -m benchmarks.prefill --tiny                                      # a small model on the CPU, to try it out

The model has the shape of Qwen2.5-VL-7B, in bf16 with random weights. The prompt is a video between two pieces of text.
Without ``--vision`` the vision tower is left out and the embeddings of the video's tokens are random. With it the model
is whole, its frames are random patches of 448 x 448 pixels, and the time of the tower and of ``generate()`` for one
token are measured too.

Measured is one forward up to the logits of the last token, without a KV cache unless asked for (``--cache``). Every run
has another prompt (the text in front of the video differs by a token), so token layouts and plans are made anew, as for
a new request.

Compared are transformers' "sdpa" attention as PyTorch dispatches it (short prompts only, and whole models), forced to
FlashAttention-2,
forced to cuDNN, and the same model patched with `SPEC`. Dense prefills that would take minutes run `DENSE_LAYERS`
layers and count them up to all: marked in the table and the JSON. Dense prefills of more than 65536 tokens get the
chunked MLPs and norms that `mmflex.patch` brings, without which they do not fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmflex
from benchmarks.kinds import profiled
from mask_builders import Grid, VerticalSlash
from mmflex.integrations import decoder
from mmflex.integrations.long_prefill import chunk_rows
from mmflex.runtime.calls import programs_of

RESULTS = Path(__file__).parent / "results"
DENSE = ("sdpa", "cudnn", "fa2")

HEADS = 28
SPEC = [
    *[Grid("frame", columns=True, local=1024)] * 12,
    *[Grid("frame", columns=True, rows=True, local=1024)] * 8,
    *[VerticalSlash(1000, 4096)] * 8,
]
"""Patterns of the 28 heads of every layer, with the paper's budgets."""

SIDE = 16
"""A frame has SIDE x SIDE tokens."""
BEFORE, AFTER = 40, 300
"""Tokens of text in front of the video and (at least) behind it."""

LENGTHS = (4096, 16384, 32768, 131072, 262144, 524288, 1048576)
REPEATS = {4096: 15, 16384: 9, 32768: 5, 131072: 3, 262144: 3}
"""Runs of each, of which the median counts; 1 for lengths that are not named."""
DENSE_LAYERS = {262144: 4, 524288: 3, 1048576: 2}
"""Layers that a dense run has, for lengths where all would take too long."""
SHORT = 16384
"""Up to this length the undirected dispatch of PyTorch is measured too."""

VISION_LENGTHS = (4096, 16724, 65876, 131072, 262144)
"""With the vision tower: 16,724 and 65,876 tokens hold 128 and 512 frames."""
VISION_REPEATS = {4096: 5, 16724: 3, 65876: 3}
GENERATED = 70_000
"""Up to this length ``generate()`` is timed as well, with the vision tower."""

UNFUSED = (32768, 131072)
"""Lengths at which mmflex runs with uncompiled layers as well."""

METHODS = {
    "mmflex": None,
    "unfused": None,
    "sdpa": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "fa2": SDPBackend.FLASH_ATTENTION,
}


# ---- the model and its prompts -------------------------------------------------------------------------------------


VISION = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "depth": 32}
"""The tower of Qwen2.5-VL's checkpoints of 3B and 7B; the defaults of transformers are 3584 channels wide."""


def build(device: torch.device, tiny: bool, whole: bool = False, layers: int | None = None) -> Any:
    """Qwen2.5-VL with random weights, made where it runs; with ``layers`` of another number than the checkpoint's."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: dict[str, Any] = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 1 << 21,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    if tiny:
        text.update(hidden_size=HEADS * 16, intermediate_size=128, num_hidden_layers=6, vocab_size=1024)
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    if layers is not None:
        text["num_hidden_layers"] = layers
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [0],
    }
    if whole and not tiny:
        vision = {**VISION, "out_hidden_size": text["hidden_size"]}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    dtype = torch.float32 if tiny else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    if model.lm_head.weight.device.type != device.type:
        raise RuntimeError(f"the model was made on {model.lm_head.weight.device} instead of {device}")
    return model


@dataclass
class Embeddings:
    """Random embeddings in place of what the vision tower would give; a forward hook of the embedding table."""

    table: torch.Tensor

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.table if output.shape == self.table.shape else output


def embeddings(model: Any, tokens: int) -> Embeddings:
    """Embeddings of a prompt, as large as those of the table."""
    weight = model.get_input_embeddings().weight
    table = torch.empty((1, tokens, weight.shape[1]), dtype=weight.dtype, device=weight.device)
    return Embeddings(table.normal_(std=0.02))


def prompt(model: Any, tokens: int, number: int, cache: bool, whole: bool = False) -> dict[str, Any]:
    """The processor's output for prompt ``number`` of this length, on the model's device; patches of the frames only
    for a ``whole`` model."""
    before = BEFORE + number
    frames = (tokens - before - AFTER) // SIDE**2
    if frames < 2:
        least = BEFORE + AFTER + 3 * SIDE**2
        raise ValueError(f"{tokens} tokens hold {frames} frames of {SIDE**2}: give {least} or more")
    device = model.lm_head.weight.device
    kinds = torch.zeros((1, tokens), dtype=torch.int32, device=device)
    kinds[:, before : before + frames * SIDE**2] = 2
    ids = torch.randint(10, model.config.text_config.vocab_size, (1, tokens), device=device)
    ids[kinds == 2] = model.config.video_token_id
    grid = torch.tensor([[frames, 2 * SIDE, 2 * SIDE]], device=device)
    inputs = {"input_ids": ids, "mm_token_type_ids": kinds, "video_grid_thw": grid, "use_cache": cache}
    if whole:
        patches = torch.empty(frames * 4 * SIDE**2, 3 * 2 * 14 * 14, dtype=model.lm_head.weight.dtype, device=device)
        inputs["pixel_values_videos"] = patches.normal_()
    return inputs


# ---- measuring -----------------------------------------------------------------------------------------------------


class Clock:
    """Times stretches of a stream of work: CUDA events, or the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = {}

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Any) -> None:
        self.spans.setdefault(name, []).append((start, self.now()))

    def take(self, name: str) -> list[float]:
        """Seconds of every stretch of this name since the last call; after a synchronisation."""
        spans = self.spans.pop(name, [])
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in spans]


@dataclass
class Bench:
    """A model, and what is switched on and off around it."""

    model: Any
    device: torch.device
    backend: str
    cache: bool
    whole: bool = False
    profile: bool = False
    methods: tuple[str, ...] = tuple(METHODS)
    repeats: int = 0
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self.timed: dict[str, Callable[..., Any]] = {}
        self.text = self.model.model.language_model
        self.layers = self.text.layers
        self.started: list[Any] = []
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda *_: self.started.append(self.clock.now()))
            layer.register_forward_hook(lambda *_: self.clock.add("layer", self.started.pop()))
        for part, name in ((self.model.model.visual, "vision"), (self.text, "language")) if self.whole else ():
            part.register_forward_pre_hook(lambda *_: self.started.append(self.clock.now()))
            part.register_forward_hook(lambda *_, name=name: self.clock.add(name, self.started.pop()))

    @contextmanager
    def ready(self, method: str) -> Iterator[None]:
        """The model with one method's attention, timed."""
        with ExitStack() as stack:
            if method in ("mmflex", "unfused"):
                fuse = False if method == "unfused" else None
                stack.enter_context(mmflex.patched(self.model, SPEC, backend=self.backend, fuse=fuse))
            else:
                for chunks in chunk_rows(self.text, None):
                    stack.callback(chunks.remove)
                kernel = METHODS[method]
                if kernel is not None:
                    stack.enter_context(sdpa_kernel(kernel))
            stack.enter_context(self.timed_attention("sdpa" if method in DENSE else "mmflex"))
            yield

    @contextmanager
    def timed_attention(self, name: str) -> Iterator[None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

        inner = functions[name]
        if name not in self.timed:  # compiled layers call it: another function would be another compilation

            def made(*args: Any, **options: Any) -> Any:
                if torch.compiler.is_compiling():
                    return inner(*args, **options)
                start = self.clock.now()
                out = inner(*args, **options)
                self.clock.add("attention", start)
                return out

            self.timed[name] = made
        functions[name] = timed = self.timed[name]
        before, decoder.attention_forward = decoder.attention_forward, timed  # called by compiled layers
        try:
            yield
        finally:
            del functions[name]
            decoder.attention_forward = before

    def run(self, tokens: int, number: int, layers: int) -> dict[str, Any]:
        """One prefill through the first ``layers`` layers; call it within `ready`."""
        inputs = prompt(self.model, tokens, number, self.cache, self.whole)
        self.clock.spans.clear()
        self.started.clear()
        self.text.layers = self.layers[:layers]
        if self.clock.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        try:
            start = time.perf_counter()
            logits = mmflex.last_token_logits(self.model, inputs)
            token = int(logits.argmax(-1))
            seconds = time.perf_counter() - start
        finally:
            self.text.layers = self.layers
        per_layer, attention = self.clock.take("layer"), self.clock.take("attention")
        total = len(self.layers)
        found = {"seconds": seconds, "measured_s": seconds, "layers": layers, "attention_s": sum(attention)}
        if layers < total:
            # the first layer meets a cold kernel: the others stand for those left out
            one, of_it = (statistics.median(x[1:] or x) for x in (per_layer, attention))
            found["seconds"] = seconds - sum(per_layer) + total * one
            found["attention_s"] = total * of_it
        found["attention_share"] = found["attention_s"] / found["seconds"]
        found["finite"] = bool(logits.isfinite().all()) and token >= 0
        if self.clock.cuda:
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        if self.whole:
            found["vision_s"], found["language_s"] = (sum(self.clock.take(name)) for name in ("vision", "language"))
            if layers == total and tokens <= GENERATED:
                start = time.perf_counter()
                answer = self.model.generate(
                    **{**inputs, "use_cache": True}, max_new_tokens=1, do_sample=False, pad_token_id=0
                )
                found["same_token"] = int(answer[0, -1]) == token
                found["generate_s"] = time.perf_counter() - start
        return found

    def decisions(self) -> list[str]:
        """What mmflex made of the last prompts, while patched: its launches, or why it ran dense."""
        patch = self.model.__dict__.get("_mmflex_patch")
        programs = [one for layout in patch.prompt.recent.values() for one in programs_of(layout)] if patch else []
        made = {note or ", ".join(launch.label for launch in program.launches) for program, note in programs}
        return sorted(made | set(patch.noticed if patch else ()))


class OutOfTime(RuntimeError):
    """The time limit of the whole benchmark is over."""


def measure(bench: Bench, tokens: int, deadline: float, row: dict[str, Any], changed: Callable[[], None]) -> None:
    """Fills ``row`` with the results of one length, method by method; what fails is noted and the rest goes on."""
    short, total = tokens <= SHORT, len(bench.layers)
    left_out = {"sdpa": short, "unfused": tokens in UNFUSED}
    names = ["mmflex", "sdpa"] if bench.whole else [name for name in METHODS if left_out.get(name, True)]
    names = [name for name in names if name in bench.methods]
    repeats = bench.repeats or (VISION_REPEATS if bench.whole else REPEATS).get(tokens, 1)
    layers = {name: min(total, DENSE_LAYERS.get(tokens, total)) if name in DENSE else total for name in names}
    results: dict[str, dict[str, Any]] = row["methods"]
    results.update({name: {"layers": layers[name], "extrapolated": layers[name] < total, "runs": []} for name in names})

    def attempt(name: str, work: Callable[[dict[str, Any]], None]) -> None:
        if "error" in results[name]:
            return
        try:
            if time.monotonic() > deadline:
                raise OutOfTime("the time limit was reached; see --limit")
            with bench.ready(name):
                work(results[name])
        except Exception as error:
            results[name]["error"] = f"{type(error).__name__}: {error}"[:500]
            results[name]["traceback"] = traceback.format_exc()[-3000:]
        if "error" in results[name]:
            free(bench.device)  # when no traceback holds tensors any more
        changed()

    def warm(name: str) -> Callable[[dict[str, Any]], None]:
        def work(result: dict[str, Any]) -> None:
            few = min(2, total)
            if name not in DENSE:
                first, second = (bench.run(tokens, 100 + i, few)["measured_s"] for i in (0, 1))
                result.update(first_call_s=first, compile_s=max(0.0, first - second))
            elif layers[name] == total:  # else the first layer of the run itself is the warm-up
                bench.run(tokens, 100, few)

        return work

    def once(name: str, number: int) -> Callable[[dict[str, Any]], None]:
        def work(result: dict[str, Any]) -> None:
            result["runs"].append(bench.run(tokens, number, layers[name]))
            result.update(summary(result["runs"]))
            if name == "mmflex":
                result["decisions"] = bench.decisions()

        return work

    for name in names:
        attempt(name, warm(name))
    for number in range(repeats):  # in turns, so that a slow spell meets all
        for name in names if number % 2 == 0 else reversed(names):
            attempt(name, once(name, number))
    if bench.profile and "error" not in results.get("mmflex", {"error": "not asked for"}):
        with bench.ready("mmflex"):
            row["profile"] = profiled(lambda: bench.run(tokens, 200, total), bench.device)
    times = {name: found["seconds"] for name, found in results.items() if "seconds" in found}
    ours = times.pop("mmflex", None)
    row["speedup"] = {name: seconds / ours for name, seconds in times.items()} if ours else {}
    changed()


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of several runs, peaks at their highest."""
    measured = ("seconds", "attention_s", "attention_share", "vision_s", "language_s", "generate_s")
    medians = {name: statistics.median(run[name] for run in runs) for name in measured if name in runs[0]}
    peaks = {name: max(run.get(name, 0.0) for run in runs) for name in ("peak_gb", "reserved_gb") if name in runs[0]}
    return {**medians, **peaks, "finite": all(run["finite"] for run in runs)}


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- reporting -----------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, str]:
    """Versions and the device."""
    found = {"mmflex": mmflex.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("transformers", "triton", "flash-attn-4"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    import transformers

    found["transformers"] = transformers.__version__
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    if device.type == "cuda":
        found["cuda"], found["cudnn"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
        found["memory_gb"] = f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.0f}"
    return found


WHOLE_COLUMNS = ("tokens", "frames", "SDPA", "of which tower", "generate()", "mmflex", "of which tower", "generate()",
                 "vs SDPA", "peak (SDPA / mmflex)", "compiling")  # fmt: skip
COLUMNS = ("tokens", "frames", "SDPA", "FA2", "cuDNN", "mmflex", "vs SDPA", "vs FA2", "vs cuDNN",
           "in attention (FA2 / mmflex)", "peak (FA2 / mmflex)", "compiling")  # fmt: skip


def whole_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table of whole models."""
    methods = row["methods"]

    def seconds(name: str, what: str) -> str:
        found = methods.get(name, {})
        shown = f"{found[what]:.2f} s" if what in found else "failed" if "error" in found else "-"
        return shown + (" *" if what == "seconds" and found.get("extrapolated") and what in found else "")

    faster = row.get("speedup", {}).get("sdpa")
    peaks = [f"{methods[n]['peak_gb']:.0f} GB" if "peak_gb" in methods.get(n, {}) else "-" for n in ("sdpa", "mmflex")]
    compiling = methods.get("mmflex", {}).get("compile_s")
    return [
        f"{row['tokens']:,}",
        str(row["frames"]),
        *(seconds(name, what) for name in ("sdpa", "mmflex") for what in ("seconds", "vision_s", "generate_s")),
        "-" if faster is None else f"{faster:.2f}x",
        " / ".join(peaks),
        "-" if compiling is None else f"{compiling:.1f} s",
    ]


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    methods = row["methods"]

    def seconds(name: str) -> str:
        found = methods.get(name, {})
        if "seconds" not in found:
            return "failed" if "error" in found else "-"
        value = found["seconds"]
        shown = f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
        return shown + (" *" if found["extrapolated"] else "")

    def faster(name: str) -> str:
        found = row.get("speedup", {}).get(name)
        return "-" if found is None else f"{found:.2f}x" if found < 2 else f"{found:.1f}x"

    def pair(key: str, form: str) -> str:
        return " / ".join(form.format(methods[n][key]) if key in methods.get(n, {}) else "-" for n in ("fa2", "mmflex"))

    compiling = methods.get("mmflex", {}).get("compile_s")
    return [
        f"{row['tokens']:,}",
        str(row["frames"]),
        *(seconds(name) for name in ("sdpa", "fa2", "cudnn", "mmflex")),
        *(faster(name) for name in ("sdpa", "fa2", "cudnn")),
        pair("attention_share", "{:.0%}"),
        pair("peak_gb", "{:.0f} GB"),
        "-" if compiling is None else f"{compiling:.1f} s",
    ]


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    counted = [
        f"{row['tokens']:,} tokens: {found['layers']}"
        for row in report["rows"]
        for name, found in row["methods"].items()
        if name in ("fa2", "sdpa") and found["extrapolated"]
    ]
    unfused = [
        f"{row['tokens']:,} tokens {found['seconds']:.2f} s."
        for row in report["rows"]
        for name, found in row["methods"].items()
        if name == "unfused" and "seconds" in found
    ]
    errors = [
        f"{row['tokens']:,} tokens, {name}: {found['error'].splitlines()[0]}"
        for row in report["rows"]
        for name, found in row["methods"].items()
        if "error" in found
    ]
    errors += [f"{row['tokens']:,} tokens: {row['error']}" for row in report["rows"] if "error" in row]
    settings = report["settings"]
    usual = VISION_REPEATS if settings.get("whole") else REPEATS
    listed = ", ".join(f"{n} runs at {t:,}" for t, n in usual.items()) + " tokens, else one run"
    runs = f"{settings['repeats']} runs" if settings["repeats"] else listed
    return [
        f"{settings['model']}, {settings['dtype']}, {settings['layers']} layers; batch 1; KV cache "
        f"{'kept' if settings['cache'] else 'off'}; logits of the last token only.",
        f"Medians of {runs}; every run has a new prompt. Compiling: what the first call of a length takes beyond the "
        "second.",
        "Heads of every layer: " + ", ".join(f"{n} x {name}" for name, n in settings["spec"].items()) + ".",
        "Dense runs of more than 65,536 tokens have mmflex's chunked MLPs and norms, without which they do not fit.",
        *(
            [f"* counted up to {settings['layers']} layers from fewer ({'; '.join(dict.fromkeys(counted))})."]
            if counted
            else []
        ),
        *(f"Uncompiled layers: {line}" for line in unfused),
        *(line for row in report["rows"] for line in by_kind(row)),
        *(f"Failed: {error}" for error in errors),
        ", ".join(f"{name} {value}" for name, value in report["machine"].items()),
    ]


def by_kind(row: dict[str, Any]) -> list[str]:
    """A line on where the time of a prefill goes, where it was profiled, beside the floor: matrix products and
    attention, which any implementation of these masks has."""
    if "profile" not in row:
        return []
    kinds, seconds = row["profile"]["kinds"], row["methods"]["mmflex"]["seconds"]
    floor = sum(kinds.get(kind, 0.0) for kind in ("matrix products", "attention"))
    listed = ", ".join(f"{kind} {spent:.3f}" for kind, spent in sorted(kinds.items(), key=lambda kind: -kind[1]))
    return [
        f"{row['tokens']:,} tokens: {seconds / floor:.2f} of matrix products and attention ({floor:.2f} s); {listed}"
    ]


def table_of(report: dict[str, Any]) -> tuple[tuple[str, ...], Callable[[dict[str, Any]], list[str]]]:
    """Columns of a report's table, and what makes its rows."""
    return (WHOLE_COLUMNS, whole_cells) if report["settings"].get("whole") else (COLUMNS, cells)


def write(report: dict[str, Any], path: Path) -> None:
    """The JSON, and beside it the table as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    columns, of_row = table_of(report)
    rows = [columns, ["---:"] * len(columns), *(of_row(row) for row in report["rows"])]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    listed = "\n".join(f"- {note}" for note in notes(report))
    path.with_suffix(".md").write_text(f"# Prefill: time to the first token\n\n{table}\n\n{listed}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", help=f"tokens, separated by commas (default: {','.join(map(str, LENGTHS))})")
    parser.add_argument("--json", type=Path, help="where the results go (a table beside it as .md)")
    parser.add_argument("--tiny", action="store_true", help="a small float32 model on the CPU")
    parser.add_argument("--vision", action="store_true", help="with the vision tower, and generate()")
    parser.add_argument("--profile", action="store_true", help="time on the device by kind of work, at every length")
    parser.add_argument("--methods", default=",".join(METHODS), help="of these alone, separated by commas")
    parser.add_argument("--repeats", type=int, default=0, help="runs of each (default: by length)")
    parser.add_argument("--cache", action="store_true", help="keep a KV cache, as generate() does (57 KB a token)")
    parser.add_argument("--backend", default="auto", help="mmflex's backend")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which no further run starts")
    args = parser.parse_args()
    deadline = time.monotonic() + args.limit
    device = torch.device("cpu" if args.tiny else "cuda")
    if device.type == "cuda":
        with suppress(AttributeError, RuntimeError):  # blocks of all sizes come and go: it keeps them from splintering
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    usual = [2048] if args.tiny else VISION_LENGTHS if args.vision else LENGTHS
    lengths = [int(n) for n in args.lengths.split(",")] if args.lengths else list(usual)
    kind = ("-vision" if args.vision else "") + ("-tiny" if args.tiny else "")
    path = args.json or RESULTS / f"prefill{kind}.json"
    console = Console()
    start = time.perf_counter()
    model = build(device, args.tiny, args.vision)
    methods = tuple(args.methods.split(","))
    bench = Bench(model, device, args.backend, args.cache, args.vision, args.profile, methods, args.repeats)
    parameters = sum(p.numel() for p in bench.model.parameters())
    spec: dict[str, int] = {}
    for pattern in SPEC:
        spec[repr(pattern)] = spec.get(repr(pattern), 0) + 1
    report: dict[str, Any] = {
        "settings": {
            "model": f"Qwen2.5-VL of {parameters / 1e6:,.0f}M parameters, random weights, "
            + ("with its vision tower" if args.vision else "no vision tower"),
            "whole": args.vision,
            "dtype": str(next(bench.model.parameters()).dtype).removeprefix("torch."),
            "layers": len(bench.layers),
            "spec": spec,
            "cache": args.cache,
            "tokens_per_frame": SIDE**2,
            "backend": args.backend,
            "repeats": args.repeats,
            "build_s": time.perf_counter() - start,
        },
        "machine": machine(device),
        "rows": [],
    }
    columns, of_row = table_of(report)
    for line in notes(report)[:3]:
        console.print(line)
    console.print(f"built in {report['settings']['build_s']:.1f} s")
    for tokens in lengths:
        steps = (tokens - BEFORE - AFTER) // SIDE**2
        row: dict[str, Any] = {"tokens": tokens, "frames": steps * (2 if args.vision else 1), "methods": {}}
        report["rows"].append(row)
        start = time.perf_counter()
        handle: Any = None
        try:
            if not args.vision:
                table = bench.model.get_input_embeddings()
                handle = table.register_forward_hook(embeddings(bench.model, tokens))
            measure(bench, tokens, deadline, row, lambda: write(report, path))
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
            console.print(f"{tokens:,} tokens failed: {row['error']}", markup=False)
        finally:
            if handle is not None:
                handle.remove()
            free(device)
        row["wall_s"] = time.perf_counter() - start
        write(report, path)
        console.print(" | ".join(of_row(row)), f"({row['wall_s']:.0f} s)")
        for line in by_kind(row):
            console.print(line)
    table = Table(title="Prefill: time to the first token", caption="\n".join(notes(report)), caption_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for row in report["rows"]:
        table.add_row(*of_row(row))
    Console(width=max(console.width, 140)).print(table)
    console.print(f"written to {path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
