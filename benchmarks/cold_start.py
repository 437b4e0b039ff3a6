"""What the first prefill of a process waits for: with empty folders of compiled code, with those of another process,
and with empty folders after `mmflex.warmup` with several processes.

    python -m benchmarks.cold_start --json benchmarks/results/cold-start.json     # one GPU, about two minutes
    python -m benchmarks.cold_start --tiny                                        # a small model on the CPU

The model is that of `benchmarks.prefill` with fewer layers, which share all compiled code. Processes run one after the
other, each a Python of its own: the first with empty folders (Inductor, Triton, flash-attn-4), the second with what it
has left there, the third with empty ones again. The third warms up first, with ``--jobs`` processes beside it, for a
prompt of other tokens in the same places; its kinds of work are those of the warm-up and the first prefill together.

Every second of the main thread belongs to one kind of work, the innermost that is under way, so kinds add up to the
whole. PyTorch tells when its own stages begin and end; imports, Triton, the C compiler and flash-attn-4 are watched by
wrapping their functions. What other threads and processes do meanwhile is not counted; waiting for them is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REST = "all else in Python, and waiting for the GPU"

IMPORTS = {
    "torch": "imports: torch (compilers)", "triton": "imports: torch (compilers)", "sympy": "imports: sympy",
    "flash_attn": "imports: flash-attn-4", "cutlass": "imports: flash-attn-4", "quack": "imports: flash-attn-4",
    "transformers": "imports: transformers", "mmflex": "imports: mmflex",
}  # fmt: skip
"""Kinds of imports by top-level package."""

STAGES = {
    "entire_frame_compile": "Dynamo: tracing and guards",
    "create_aot_dispatcher_function": "AOTAutograd",
    "backend_compile": "AOTAutograd",
    "inductor_compile": "Inductor: lowering and code",
    "async_compile.wait": "Inductor: waiting for its kernels",
    "AOTAutogradCache.inductor_load": "Inductor: loading what a process before has compiled",
    "inductor_codecache_torch_key": "hashes of PyTorch's and Triton's sources",
    "CacheBase.get_system.triton_key": "hashes of PyTorch's and Triton's sources",
    "compile_file": "Inductor: the C++ compiler",
}
"""Kinds of PyTorch's stages, by the names in its traces; a stage of another name belongs to the one around it."""

WRAPPED: dict[str, list[tuple[str, str]]] = {
    "triton": [("compile", "Triton: kernels")],
    "triton.compiler": [("compile", "Triton: kernels")],
    "triton.compiler.compiler": [("CompiledKernel._init_handles", "Triton: kernels to the GPU")],
    "triton.backends.nvidia.driver": [("compile_module_from_src", "Triton: launchers, by the C compiler")],
    "cutlass.base_dsl.compiler": [
        ("CompileCallable.__call__", "flash-attn-4: tracing"),
        ("Compiler.compile", "flash-attn-4: MLIR to machine code"),
        ("Compiler.jit", "flash-attn-4: linking"),
    ],
    "flash_attn.cute.cache_utils": [
        ("JITPersistentCache._try_load_from_storage", "flash-attn-4: loading"),
        ("JITPersistentCache._try_export_to_storage", "flash-attn-4: saving"),
    ],
    "mmflex.runtime.workers": [
        ("Workers.submit", "mmflex: which kernels there are"),
        ("Workers.wait", "mmflex: waiting for other processes"),
    ],
    "mmflex.integrations.decoder": [("attention_forward", "mmflex: planning and launching")],
}
"""Functions of modules, and the kind of work that they do. Wrapped once the module has been imported."""

FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash-attn-4",
}


class Split:
    """Seconds of the main thread by kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.open: list[str] = [REST]
        self.since = time.perf_counter()
        self.thread = threading.get_ident()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now

    def begin(self, kind: str) -> None:
        self._tick()
        self.open.append(kind)

    def end(self) -> None:
        self._tick()
        if len(self.open) > 1:
            self.open.pop()

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Work of a kind; nothing in other threads."""
        if threading.get_ident() != self.thread:
            yield
            return
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.begin(kind)
        try:
            yield
        finally:
            self.end()

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds and calls of each kind since the last time."""
        self._tick()
        taken = self.seconds, self.calls
        self.seconds, self.calls = {}, {}
        return taken

    # ---- what is watched -------------------------------------------------------------------------------------------

    def wrap(self, owner: Any, name: str, kind: str) -> None:
        """Has ``owner.name`` counted as work of a kind; nothing where there is no such function."""
        *outer, last = name.split(".")
        for part in outer:
            owner = getattr(owner, part, None)
        inner = getattr(owner, last, None)
        if inner is None:
            return

        def timed(*args: Any, **options: Any) -> Any:
            with self.during(kind):
                return inner(*args, **options)

        setattr(owner, last, timed)

    def watch_imports(self) -> None:
        """Modules that are imported from now on; functions in `WRAPPED` once their module is there."""
        machinery = sys.modules["_frozen_importlib"]
        inner: Callable[..., Any] = machinery._find_and_load  # type: ignore[attr-defined]
        waiting = dict(WRAPPED)

        def wrap_imported() -> None:
            for module in [name for name in waiting if name in sys.modules]:
                for name, kind in waiting.pop(module):
                    self.wrap(sys.modules[module], name, kind)

        def find_and_load(name: str, import_: Any) -> Any:
            if any(kind.startswith("imports") for kind in self.open):
                return inner(name, import_)
            with self.during(IMPORTS.get(name.partition(".")[0], "imports: others")):
                module = inner(name, import_)
            wrap_imported()
            return module

        wrap_imported()
        machinery._find_and_load = find_and_load  # type: ignore[attr-defined]

    def watch_stages(self) -> None:
        """The stages of torch.compile."""
        from torch._dynamo.utils import ChromiumEventLogger

        start, end = ChromiumEventLogger.log_event_start, ChromiumEventLogger.log_event_end

        def begin(logger: Any, event_name: str, *args: Any, **options: Any) -> None:
            start(logger, event_name, *args, **options)
            if threading.get_ident() == self.thread:
                kind = STAGES.get(event_name)
                if kind is not None:
                    self.calls[kind] = self.calls.get(kind, 0) + 1
                self.begin(kind or self.open[-1])

        def finish(logger: Any, event_name: str, *args: Any, **options: Any) -> None:
            end(logger, event_name, *args, **options)
            if threading.get_ident() == self.thread:
                self.end()

        ChromiumEventLogger.log_event_start = begin  # type: ignore[method-assign]
        ChromiumEventLogger.log_event_end = finish  # type: ignore[method-assign]


# ---- one process -----------------------------------------------------------------------------------------------------


def process(args: argparse.Namespace) -> dict[str, Any]:
    """Starts, prefills twice, and says where the time went."""
    before: dict[str, float] = {"interpreter": time.time() - float(os.environ["MMFLEX_STARTED"])}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.synchronize()
        now = time.perf_counter()
        before[name], clock = now - clock, now

    import torch

    lap("import torch")
    import transformers  # noqa: F401

    lap("import transformers")
    import mmflex

    lap("import mmflex")
    from benchmarks import prefill

    lap("import the benchmark")
    device = torch.device("cpu" if args.tiny else "cuda")
    torch.zeros(1, device=device)
    lap("CUDA context")
    square = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
    square @ square
    lap("cuBLAS")
    model = prefill.build(device, args.tiny, layers=args.layers)
    lap("building the model")
    mmflex.patch(model, prefill.SPEC, backend=args.backend, fuse=True)
    lap("mmflex.patch")
    model.get_input_embeddings().register_forward_hook(prefill.embeddings(model, args.tokens))
    prompts = [prefill.prompt(model, args.tokens, number, cache=False) for number in range(2)]
    lap("prompts")

    split = Split()
    split.watch_imports()
    with split.during(IMPORTS["torch"]):
        split.watch_stages()
    seconds, warmup = [], 0.0
    if args.jobs:
        start = time.perf_counter()
        mmflex.warmup(model, [layout(args.tokens)], jobs=args.jobs)
        warmup = time.perf_counter() - start
    for inputs in prompts:
        start = time.perf_counter()
        int(mmflex.last_token_logits(model, inputs).argmax(-1))
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            kinds, calls = split.take()
    metrics = torch._dynamo.utils.get_compilation_metrics()
    counted = torch._dynamo.utils.counters
    names = ("fxgraph_cache", "autograd_cache")
    return {
        "before_s": before,
        "warmup_s": warmup,
        "first_s": seconds[0],
        "second_s": seconds[1],
        "kinds_s": kinds,
        "calls": calls,
        "frames": [{"name": m.co_name, "restarts": sorted(m.restart_reasons or ())} for m in metrics],
        "kept_graphs": {
            name: count
            for group in ("inductor", "aot_autograd")
            for name, count in counted[group].items()
            if name.startswith(names)
        },
        "machine": prefill.machine(device),
    }


def layout(tokens: int) -> Any:
    """Which token is what in the prompts of `benchmarks.prefill`."""
    import mmflex
    from benchmarks.prefill import AFTER, BEFORE, SIDE

    frames = (tokens - BEFORE - AFTER) // SIDE**2
    rest = tokens - BEFORE - frames * SIDE**2
    return mmflex.TokenLayout.from_segments([("text", BEFORE), ("video", (frames, SIDE, SIDE)), ("text", rest)])


# ---- processes one after the other -----------------------------------------------------------------------------------


def start(args: argparse.Namespace, folder: Path, jobs: int) -> dict[str, Any]:
    """One process with compiled code in this folder, which warms up with so many ``jobs`` (0: it does not)."""
    folder.mkdir(exist_ok=True)
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    places = {name: str(folder / place) for name, place in FOLDERS.items()}
    command = [sys.executable, "-m", "benchmarks.cold_start", "--process", str(result), "--tokens", str(args.tokens),
               "--layers", str(args.layers), "--backend", args.backend, "--jobs", str(jobs),
               *(["--tiny"] if args.tiny else [])]  # fmt: skip
    kept = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1", "MMFLEX_STARTED": str(time.time())}
    subprocess.run(command, env={**os.environ, **places, **kept}, check=True, timeout=args.limit)
    return json.loads(result.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def table(processes: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: seconds (calls) of each process."""
    rows: list[list[str]] = [["", *processes], ["---", *["---:"] * len(processes)]]

    def row(title: str, cells: list[str]) -> None:
        rows.append([title, *cells])

    found = list(processes.values())
    for name in found[0]["before_s"]:
        row(f"before: {name}", [f"{one['before_s'].get(name, 0):.2f}" for one in found])
    row("mmflex.warmup", [f"{one['warmup_s']:.2f}" if one.get("warmup_s") else "-" for one in found])
    row("**first prefill**", [f"**{one['first_s']:.2f}**" for one in found])
    kinds = {kind for one in found for kind in one["kinds_s"]}
    for kind in sorted(kinds, key=lambda kind: -found[0]["kinds_s"].get(kind, 0.0)):
        cells = []
        for one in found:
            calls = one["calls"].get(kind)
            cells.append(f"{one['kinds_s'].get(kind, 0.0):.2f}" + (f" ({calls})" if calls else ""))
        row(kind, cells)
    row("second prefill", [f"{one['second_s']:.2f}" for one in found])
    row("frames compiled, traced again", [
        f"{len(one['frames'])}, {sum(len(f['restarts']) for f in one['frames'])}" for one in found
    ])  # fmt: skip
    row("graphs kept", [", ".join(f"{n} {k}" for k, n in one["kept_graphs"].items()) or "-" for one in found])
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="of the prompt (default: 32768, with --tiny 1200)")
    parser.add_argument("--layers", type=int, default=2, help="of the model; they share what is compiled")
    parser.add_argument("--processes", type=int, default=3, help="how many of the three")
    parser.add_argument("--jobs", type=int, help="of the third's warm-up (default: as `mmflex warmup` has)")
    parser.add_argument("--backend", default="auto", help="mmflex's backend")
    parser.add_argument("--tiny", action="store_true", help="a small float32 model on the CPU")
    parser.add_argument("--limit", type=float, default=200, help="seconds for each process")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tokens = args.tokens or (1200 if args.tiny else 32768)
    if args.process is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args.process.write_text(json.dumps(process(args)), encoding="utf-8")
        return
    if args.jobs is None:
        from mmflex.integrations.warmup import processes as automatic

        args.jobs = max(2, automatic())
    processes: dict[str, dict[str, Any]] = {}
    plan = [("empty folders", "first", 0), ("kept folders", "first", 0), (f"{args.jobs} jobs", "warmed", args.jobs)]
    with tempfile.TemporaryDirectory() as folder:
        for name, place, jobs in plan[: args.processes]:
            processes[name] = start(args, Path(folder) / place, jobs)
            if args.json is not None:
                settings = {name: getattr(args, name) for name in ("tokens", "layers", "backend", "tiny", "jobs")}
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps({"settings": settings, "processes": processes}, indent=2) + "\n",
                                     encoding="utf-8")  # fmt: skip
    print("\n".join(table(processes)))


if __name__ == "__main__":
    main()
