"""vLLM with mmflex beside vLLM without: time to the first token, short prompts, decoding beside a long prompt.

    python -m benchmarks.serving --stages brief --limit 150               # one H200: what matters most, in 150 seconds
    python -m benchmarks.serving --json results/serving.json              # under 9 minutes
    python -m benchmarks.serving --stages exact,long,video,server         # the rest, another 9 minutes
    python -m benchmarks.serving --tiny                                   # a small model on the CPU, to try it out
    python -m benchmarks.serving --tiny --stages soak --limit 1200 --json benchmarks/results/soak-cpu.json

Every engine is a process of its own, one after another, plain vLLM and mmflex in turns; the next one imports what it
needs while the one before works. Every figure is written to the JSON file as soon as it is known. What is done in an
engine is a *stage*:

    brief     131k tokens in one step and in steps of 32k, both by one engine
    whole     131k tokens in one step
    chunks    steps of 32k tokens: 131k tokens; 16 prompts of 4k at once; 16 requests that decode while 131k tokens
              arrive; 262k tokens
    decode    what "chunks" does with requests that decode, in an engine of its own
    long      524k tokens in steps of 32k
    exact     a spec under which every key is seen: the answers of plain vLLM, by block-sparse kernels
    video     Qwen2.5-VL with its vision tower and real frames: the layout that patterns see
    server    the OpenAI-style server and a client at 127.0.0.1, with the sizes of the stage "whole"
    soak      requests of mixed lengths, half of them aborted at some point: none may be lost, memory must not grow

Models have the shape of Qwen2.5-7B (for "exact" two layers of it) and random weights. The first request of an engine
counts apart.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

RESULTS = Path(__file__).parent / "results"
SIDES = ("plain", "mmflex")
STAGES = ("brief", "whole", "chunks", "decode", "long", "exact", "video", "server", "soak")
DEFAULT = "whole,chunks,long"

SIZES: dict[bool, dict[str, int]] = {
    False: {
        "whole": 131072,
        "budget": 32768,
        "double": 262144,
        "long": 524288,
        "short": 4096,
        "shorts": 16,
        "decode": 1300,
        "requests": 500,
    },
    True: {
        "whole": 4096,
        "budget": 1024,
        "double": 6144,
        "long": 8192,
        "short": 512,
        "shorts": 4,
        "decode": 24,
        "requests": 1000,
    },
}
"""Tokens of prompts and steps, and numbers of requests, on the GPU and (True) in a try-out on the CPU."""

SHARE = 75
"""Seconds that the first side of the stage "brief" leaves to the second."""

SECONDS = {"double": {"plain": 45, "mmflex": 25}, "long": {"plain": 150, "mmflex": 60}}
"""What a prompt may take: it is left out where less time is left."""

TINY = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


def spec(heads: int, tiny: bool) -> list[Any]:
    """The mixed heads of `benchmarks.prefill`, lines every 256 tokens instead of every frame: prompts here are text."""
    from mask_builders import Grid, VerticalSlash

    near, slash = (64, 256) if tiny else (1024, 4096)
    twelve, eight = round(heads * 12 / 28), round(heads * 8 / 28)
    return [
        *[Grid(256, columns=True, local=near)] * twelve,
        *[Grid(256, columns=True, rows=True, local=near)] * eight,
        *[VerticalSlash(1000, slash)] * (heads - twelve - eight),
    ]


def ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(5, 500), k=count)


# ---- in a process of its own -----------------------------------------------------------------------------------------


class Child:
    """One engine and its measurements."""

    def __init__(self, side: str, stage: str, tiny: bool, deadline: float) -> None:
        self.side, self.stage, self.tiny, self.deadline = side, stage, tiny, deadline
        self.sizes, self.found = SIZES[tiny], {"side": side, "stage": stage}  # type: ignore[var-annotated]

    def config(self, pattern: Any = None, **given: Any) -> dict[str, Any]:
        """vLLM's ``additional_config``."""
        if self.side == "plain":
            return {}
        from mmflex.integrations.vllm import options

        backend = {"backend": "reference", "threshold": 512} if self.tiny else {}
        heads = TINY["num_attention_heads"] if self.tiny else 28
        return options(spec(heads, self.tiny) if pattern is None else pattern, **{**backend, **given})

    def ready(self) -> bool:
        """Imports what takes seconds, then waits until it is this process's turn; False where that never comes."""
        import vllm  # noqa: F401
        from vllm import LLM  # noqa: F401  # most of it is imported when it is asked for

        if self.side == "mmflex":
            from mmflex.integrations.vllm.plugin import register

            register()  # also where the package is not installed but lies on the path, without its entry points
        return bool(sys.stdin.readline())

    def model(self, **shape: Any) -> str:
        from benchmarks import served

        return served.text_folder(**{**(TINY if self.tiny else {}), **shape})

    @contextmanager
    def engine(self, folder: str, config: dict[str, Any], **given: Any) -> Iterator[Any]:
        from vllm import LLM

        settings: dict[str, Any] = {
            "load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False, "seed": 0,
            "gpu_memory_utilization": 0.9, "disable_log_stats": True, "enforce_eager": self.tiny,
        }  # fmt: skip
        started = time.perf_counter()
        llm = LLM(folder, additional_config=config, **{**settings, **given})
        self.found["start_s"] = time.perf_counter() - started
        self.write()
        try:
            yield llm
        finally:
            self.found |= self.memory() | self.counted()
            llm.llm_engine.engine_core.shutdown()

    def memory(self) -> dict[str, Any]:
        import torch

        if not torch.cuda.is_available():
            return {}
        free, total = torch.cuda.mem_get_info()
        return {"used_gb": (total - free) / 1e9, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}

    def counted(self) -> dict[str, Any]:
        """What mmflex accelerated, and the threshold."""
        module = sys.modules.get(f"mmflex.integrations.vllm.{'cpu' if self.tiny else 'cuda'}")
        engines = [] if module is None else [e for _, e, _ in module.PLATFORM.engines.values() if e is not None]
        sums = {name: sum(getattr(e.counters, name) for e in engines) for name in ("prefills", "layers", "standard")}
        return {"accelerated": sums} if engines else {}

    def first_token(self, llm: Any, tokens: int, seed: int, prompt: Any = None) -> float:
        """Seconds from the arrival of a prompt to its first token."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        given = {"prompt_token_ids": ids(tokens, seed)} if prompt is None else prompt
        started = time.perf_counter()
        llm.generate([given], sampling, use_tqdm=False)
        return time.perf_counter() - started

    def again(self, llm: Any, name: str, tokens: int) -> None:
        """One more prompt of about a length, a little shorter than the one before: no layout comes twice."""
        runs = self.found.setdefault(name, {"tokens": tokens, "runs": []})["runs"]
        runs.append(self.first_token(llm, tokens - 64 * len(runs) - 1, 100 + len(runs)))
        self.found[name]["seconds"] = statistics.median(runs)
        self.write()

    def repeated(self, llm: Any, name: str, tokens: int, times: int) -> None:
        for _ in range(times):
            self.again(llm, name, tokens)

    def write(self) -> None:
        print("\nRESULT " + json.dumps(self.found), flush=True)

    def left(self) -> float:
        return self.deadline - time.time()

    # ---- stages ------------------------------------------------------------------------------------------------------

    def brief(self) -> None:
        """By turns whole and in chunks: as long as another turn fits, three at most."""
        n = self.sizes["whole"]
        given = {"max_model_len": n + 64, "max_num_batched_tokens": n + 64, "enforce_eager": True, "max_num_seqs": 8}
        with self.engine(self.model(), self.config(), **given) as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            self.found["first"] = {"seconds": self.first_token(llm, n, 1)}
            self.write()
            for _ in range(3):
                started = time.perf_counter()
                for name, tokens in (("whole", n + 64), ("chunks", self.sizes["budget"])):
                    scheduler.max_num_scheduled_tokens = tokens  # of a step, at most
                    self.again(llm, name, n)
                    self.found |= self.counted()
                if self.left() < 1.2 * (time.perf_counter() - started) + SHARE * (self.side == "mmflex"):
                    break

    def whole(self) -> None:
        n = self.sizes["whole"]
        given = {"max_model_len": n + 64, "max_num_batched_tokens": n + 64, "enforce_eager": True, "max_num_seqs": 8}
        with self.engine(self.model(), self.config(), **given) as llm:
            self.found["first"] = {"seconds": self.first_token(llm, n, 1)}
            self.repeated(llm, "whole", n, 3)

    def chunks(self) -> None:
        n, double = self.sizes["whole"], self.sizes["double"]
        given = {"max_model_len": double + 64, "max_num_batched_tokens": self.sizes["budget"], "max_num_seqs": 32}
        with self.engine(self.model(), self.config(), **given) as llm:
            self.found["first"] = {"seconds": self.first_token(llm, n, 1)}
            self.repeated(llm, "chunks", n, 2)
            self.shorts(llm)
            self.decoding(llm)
            if self.left() > SECONDS["double"][self.side]:
                self.repeated(llm, "double", double, 1)

    def decode(self) -> None:
        given = {"max_model_len": self.sizes["whole"] + 64, "max_num_batched_tokens": self.sizes["budget"],
                 "max_num_seqs": 32}  # fmt: skip
        with self.engine(self.model(), self.config(), **given) as llm:
            self.first_token(llm, self.sizes["whole"], 1)
            self.decoding(llm)

    def shorts(self, llm: Any) -> None:
        """Several short prompts at once: until all have a token."""
        from vllm import SamplingParams

        count, n = self.sizes["shorts"], self.sizes["short"]
        sampling, runs = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False), []
        for turn in range(6):
            prompts = [{"prompt_token_ids": ids(n, 1000 * turn + i)} for i in range(count)]
            started = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            runs.append(time.perf_counter() - started)
        self.found["shorts"] = {"tokens": n, "prompts": count, "runs": runs, "seconds": statistics.median(runs[1:])}
        self.write()

    def decoding(self, llm: Any) -> None:
        """Tokens a second of requests that decode: alone, and from the arrival of a long prompt to its first token."""
        from vllm import SamplingParams

        engine, count = llm.llm_engine, self.sizes["shorts"]
        sampling = SamplingParams(max_tokens=self.sizes["decode"], temperature=0.0, detokenize=False, ignore_eos=True)
        for i in range(count):
            engine.add_request(f"short-{i}", {"prompt_token_ids": ids(256, i)}, sampling)
        made: dict[str, int] = {}

        def step() -> bool:
            """Whether the long prompt has its token."""
            done = False
            for output in engine.step():
                made[output.request_id] = len(output.outputs[0].token_ids)
                done |= output.request_id.startswith("long")
            return done

        def total() -> int:
            return sum(n for name, n in made.items() if name.startswith("short"))

        while min((made.get(f"short-{i}", 0) for i in range(count)), default=0) < 4:
            step()
        rates = []
        for _ in range(5):
            before, started = total(), time.perf_counter()
            for _ in range(max(3, self.sizes["decode"] // 8)):
                step()
            rates.append((total() - before) / (time.perf_counter() - started))
        alone = statistics.median(rates)
        one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        before, started = total(), time.perf_counter()
        engine.add_request("long", {"prompt_token_ids": ids(self.sizes["whole"], 77)}, one)
        while not step():
            pass
        seconds = time.perf_counter() - started
        beside = (total() - before) / seconds
        self.found["decoding"] = {
            "alone": alone, "alone_runs": rates, "beside": beside, "seconds": seconds, "requests": count
        }  # fmt: skip
        while engine.has_unfinished_requests():
            engine.step()
        self.write()

    def long(self) -> None:
        n = self.sizes["long"]
        given = {"max_model_len": n + 64, "max_num_batched_tokens": self.sizes["budget"], "enforce_eager": True,
                 "max_num_seqs": 8}  # fmt: skip
        if self.left() < SECONDS["long"][self.side]:
            return
        with self.engine(self.model(), self.config(), **given) as llm:
            self.repeated(llm, "long", n, 1)

    def exact(self) -> None:
        """A spec that sees everything, whole, in chunks and among others."""
        from vllm import SamplingParams

        from benchmarks import served
        from mask_builders import AShape

        backend = {"backend": "reference"} if self.tiny else {"backend": "flash"}
        config = self.config(AShape(1 << 20, 128), threshold=600, **backend)
        sampling = SamplingParams(max_tokens=4, temperature=0.0, logprobs=1, detokenize=False, ignore_eos=True)
        lines: list[Any] = []
        folder = self.model(num_hidden_layers=2, vocab_size=512)
        served.save_weights(folder, "cpu" if self.tiny else "cuda")
        given = {"max_model_len": 16384, "max_num_batched_tokens": 2048, "enable_prefix_caching": True,
                 "load_format": "auto"}  # fmt: skip
        with self.engine(folder, config, **given) as llm:
            for prompts in ([9001], [37, 3000, 700, 3], [9001]):  # the last one is cached but for its end
                batch = [{"prompt_token_ids": ids(n, n) + ids(700, 5 + len(lines))} for n in prompts]
                for output in llm.generate(batch, sampling, use_tqdm=False):
                    chosen = output.outputs[0]
                    first = chosen.logprobs[0][chosen.token_ids[0]].logprob
                    lines.append({"token": chosen.token_ids[0], "logprob": first})
        self.found["exact"] = lines
        self.write()

    def video(self) -> None:
        """Real frames through vLLM's processor and vision tower: what patterns are told of them."""
        import numpy as np
        from transformers import AutoConfig, AutoProcessor

        import mmflex
        from benchmarks import served
        from mask_builders import Grid, QBoundary, VerticalSlash

        folder = served.vision_folder()
        frames = np.random.default_rng(0).integers(0, 256, (128, 448, 448, 3), dtype=np.uint8)
        facts = {"fps": 2.0, "total_num_frames": 128, "frames_indices": list(range(128)), "do_sample_frames": False}
        text = "<|vision_start|><|video_pad|><|vision_end|>" + "What happens?" * 30
        prompt = {"prompt": text, "multi_modal_data": {"video": [(frames, facts)]}}
        config = self.config(QBoundary({"video": Grid("frame", local=1024), "text": VerticalSlash(1000, 2048)}),
                             threshold=2048)  # fmt: skip
        given = {"max_model_len": 32768, "max_num_batched_tokens": 32768, "skip_tokenizer_init": False,
                 "enforce_eager": True, "max_num_seqs": 4}  # fmt: skip
        with self.engine(folder, config, **given) as llm:
            runs = [self.first_token(llm, 0, 0, {**prompt, "prompt": text + "!" * i}) for i in range(3)]
            self.found["video"] = {"runs": runs, "seconds": runs[-1]}
            if config:
                from mmflex.integrations.vllm.cuda import PLATFORM

                inputs = AutoProcessor.from_pretrained(folder)(text=[text], videos=[frames], return_tensors="pt")
                wanted = mmflex.layout_for(AutoConfig.from_pretrained(folder), inputs)
                (engine,) = [e for _, e, _ in PLATFORM.engines.values() if e is not None]
                self.found["video"] |= {
                    "layout": wanted.summary(),
                    "frame_stride": wanted.frame_stride("video"),
                    "as_in_transformers": wanted.fingerprint in engine.layouts.kept,
                }
        self.write()

    def server(self) -> None:
        """A server process and a client: seconds from the request to the first streamed token."""
        from benchmarks import served

        n, budget = self.sizes["whole"], self.sizes["budget"]
        folder = self.model()
        served.save_tokenizer(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--load-format", "dummy",
            "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(n + 64), "--max-num-batched-tokens",
            str(budget), "--enforce-eager", "--no-enable-prefix-caching", "--served-model-name", "m",
            "--additional-config", json.dumps(self.config()),
        ]  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        started = time.perf_counter()
        counters = mkdtemp(prefix="mmflex-metrics-")  # the engine is a process of its own
        variables = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": counters}
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sys.stderr, env=variables)
        try:
            while True:
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=2).close()
                    break
                except OSError:
                    if server.poll() is not None or self.left() < 20:
                        raise RuntimeError(f"the server is not up (exit status {server.poll()})") from None
                    time.sleep(1)
            self.found["start_s"] = time.perf_counter() - started
            runs = [self.streamed(url, ids(n - 64 * i - 8, i)) for i in range(3)]
            self.found["server"] = {
                "tokens": n,
                "first_s": runs[0],
                "runs": runs,
                "seconds": statistics.median(runs[1:]),
            }
            with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
                lines = page.read().decode().splitlines()
            self.found["server"]["metrics"] = [line for line in lines if line.startswith("mmflex")]
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
            shutil.rmtree(counters, ignore_errors=True)
        self.write()

    def streamed(self, url: str, prompt: list[int]) -> float:
        body = {"model": "m", "prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        started = time.perf_counter()
        with urllib.request.urlopen(request, timeout=max(20.0, self.left())) as answer:
            for line in answer:
                if line.startswith(b"data:") and b"choices" in line:
                    seconds = time.perf_counter() - started
                    answer.read()
                    return seconds
        raise RuntimeError("the server's answer held no token")

    def soak(self) -> None:
        from vllm import SamplingParams

        count, rng = self.sizes["requests"], random.Random(0)
        given = {"max_model_len": 2048, "max_num_batched_tokens": 1024, "max_num_seqs": 8, "block_size": 32,
                 "num_gpu_blocks_override": 200, "enable_prefix_caching": True}  # fmt: skip
        finished: set[str] = set()
        aborted: set[str] = set()
        running: dict[str, int] = {}  # -> steps until it is aborted; below 0: never
        marks: list[dict[str, Any]] = []
        number = 0
        with self.engine(self.model(), self.config(threshold=512), **given) as llm:
            engine = llm.llm_engine
            while number < count or running:
                while number < count and len(running) < 12:
                    name, tokens = f"r{number}", rng.choice([3, 60, 300, 700, 1100, 1500])
                    prompt = ids(tokens // 2, number % 7) + ids(tokens - tokens // 2, number)
                    most = {"max_tokens": rng.randint(1, 24), "temperature": 0.0}
                    sampling = SamplingParams(**most, detokenize=False, ignore_eos=True)
                    engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
                    running[name] = rng.randint(0, 12) if number % 2 else -1
                    number += 1
                for name, left in list(running.items()):
                    if left == 0:
                        engine.abort_request([name])
                        aborted.add(name)
                        del running[name]
                    else:
                        running[name] = left - 1
                for output in engine.step():
                    if output.finished and output.request_id in running:
                        finished.add(output.request_id)
                        del running[output.request_id]
                done = len(finished) + len(aborted)
                if done // 50 > len(marks):
                    marks.append({"requests": done, "resident_mb": resident_mb(), "prompts_known": known_prompts()})
                    self.found["soak"] = {"finished": len(finished), "aborted": len(aborted), "marks": marks}
                    self.write()
            engine.step()
            half = marks[len(marks) // 2 - 1]
            grown = (marks[-1]["resident_mb"] - half["resident_mb"]) / (marks[-1]["requests"] - half["requests"])
            self.found["soak"] |= {
                "finished": len(finished),
                "aborted": len(aborted),
                "lost": count - len(finished | aborted),
                "prompts_known": known_prompts(),
                "mb_per_request": grown,
            }
        self.write()


def resident_mb() -> float:
    """Memory that is held, without what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def known_prompts() -> int:
    from mmflex.integrations.vllm import requests

    return sum(len(one.prompts) for one in requests._requests.values())


# ---- all of them -----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    import torch

    import mmflex
    from mmflex.integrations.vllm.plugin import _installed

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    facts = {"mmflex": mmflex.__version__, "vllm": _installed(), "torch": torch.__version__, "device": device}
    return {"machine": {**facts, "python": platform.python_version()}}


def environment(side: str, tiny: bool) -> dict[str, str]:
    """Of a process in which an engine lives."""
    given = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if side == "plain":
        given["VLLM_PLUGINS"] = ""  # of none of the packages that are installed
    if tiny:
        given |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **given}


class Process:
    """A child: it imports while another one works (`Child.ready`), and tells its figures line by line."""

    def __init__(self, side: str, stage: str, tiny: bool, deadline: float, log: Path) -> None:
        self.deadline, self.log = deadline, log
        self.result: dict[str, Any] = {"side": side, "stage": stage}
        command = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "benchmarks.serving"]
        command += ["--child", side, stage, "--deadline", str(deadline), *(["--tiny"] if tiny else [])]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 1}
        pipes |= {"encoding": "utf-8", "errors": "replace"}
        log.unlink(missing_ok=True)
        with log.open("a") as errors:
            self.child = subprocess.Popen(command, env=environment(side, tiny), stderr=errors, **pipes)

    def work(self, keep: Callable[[], None]) -> None:
        """Has it do its stage; ``keep`` is called after every figure."""
        started = time.time()
        timer = threading.Timer(max(1.0, self.deadline - started), self.child.kill)
        timer.start()
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        with suppress(BrokenPipeError):  # it is over: its exit status and its log say why
            self.child.stdin.write("go\n")
        with self.log.open("a", encoding="utf-8") as log:
            for line in self.child.stdout:
                if line.startswith("RESULT "):
                    self.result |= json.loads(line.removeprefix("RESULT "))
                    keep()
                else:
                    log.write(line)
        status = self.child.wait()
        timer.cancel()
        if status:
            self.result["error"] = f"exit status {status}; " + self.log.read_text(errors="replace")[-1500:]
        self.result["wall_s"] = time.time() - started
        keep()

    def leave(self) -> None:
        """Lets it end, unused."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.kill()
        self.child.wait()


def table(results: list[dict[str, Any]]) -> list[str]:
    """The figures, plain beside mmflex."""
    found = {(r["stage"], r["side"]): r for r in results}
    out = [f"{'':46} {'plain':>10} {'mmflex':>10} {'ratio':>7}"]

    def row(label: str, stage: str, get: Callable[[dict[str, Any]], float], form: str = "{:.2f}") -> None:
        values = []
        for side in SIDES:
            try:
                values.append(float(get(found[stage, side])))
            except (KeyError, TypeError):
                values.append(math.nan)
        if all(map(math.isnan, values)):
            return
        cells = ["-" if math.isnan(v) else form.format(v) for v in values]
        ratio = values[1] / values[0] if values[0] else math.nan
        out.append(f"{label:46} {cells[0]:>10} {cells[1]:>10} {'-' if math.isnan(ratio) else f'{ratio:.3f}':>7}")

    def prompt(stage: str, name: str, what: str) -> None:
        sizes = [r[name]["tokens"] for r in results if r["stage"] == stage and name in r]
        row(f"TTFT, {sizes[0] if sizes else '?'} tokens {what} (s)", stage, lambda r: r[name]["seconds"])

    prompt("brief", "whole", "whole")
    prompt("brief", "chunks", "in chunks")
    row("  first request after the start (s)", "brief", lambda r: r["first"]["seconds"])
    row("  engine start (s)", "brief", lambda r: r["start_s"])
    row("  memory in use at the end (GB)", "brief", lambda r: r["used_gb"], "{:.1f}")
    row("  layers of prefills that mmflex ran", "brief", lambda r: r["accelerated"]["layers"], "{:.0f}")
    prompt("whole", "whole", "whole")
    row("  its first request (s)", "whole", lambda r: r["first"]["seconds"])
    row("  engine start (s)", "whole", lambda r: r["start_s"])
    prompt("chunks", "chunks", "in chunks")
    row("  its first request (s)", "chunks", lambda r: r["first"]["seconds"])
    row("  engine start (s)", "chunks", lambda r: r["start_s"])
    row("short prompts at once (s)", "chunks", lambda r: r["shorts"]["seconds"], "{:.3f}")
    for stage in ("chunks", "decode"):
        row("decoding alone (tokens/s)", stage, lambda r: r["decoding"]["alone"], "{:.0f}")
        row("decoding beside a long prompt (tokens/s)", stage, lambda r: r["decoding"]["beside"], "{:.1f}")
        row("  that prompt's TTFT (s)", stage, lambda r: r["decoding"]["seconds"])
    prompt("chunks", "double", "in chunks")
    prompt("long", "long", "in chunks")
    row("TTFT, video (s)", "video", lambda r: r["video"]["seconds"])
    row("TTFT by the server (s)", "server", lambda r: r["server"]["seconds"])
    row("memory in use at the end (GB)", "chunks", lambda r: r["used_gb"], "{:.1f}")
    for name in ("finished", "aborted", "lost"):
        row(f"requests that were {name}", "soak", lambda r, name=name: r["soak"][name], "{:.0f}")  # type: ignore[misc]
    row("memory for every request more, second half (MB)", "soak", lambda r: r["soak"]["mb_per_request"], "{:.3f}")
    for key, r in found.items():
        if "video" in r and "layout" in r["video"]:
            out.append(f"video: {r['video']['layout']}; as in transformers: {r['video']['as_in_transformers']}")
        if "error" in r:
            out.append(f"{key[0]}, {key[1]}: FAILED: {r['error'].splitlines()[-1][:200]}")
    if all("exact" in found.get(("exact", side), {}) for side in SIDES):
        pairs = list(zip(*(found["exact", side]["exact"] for side in SIDES), strict=True))
        worst = max(abs(a["logprob"] - b["logprob"]) for a, b in pairs)
        equal = sum(a["token"] == b["token"] for a, b in pairs)
        out.append(f"exact: {equal} of {len(pairs)} first tokens equal, logprobs differ by {worst:.4f} at most")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--stages", default=DEFAULT, help=f"of {', '.join(STAGES)}; default {DEFAULT}")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--limit", type=float, default=525, help="seconds after which nothing more is started")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "STAGE"), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child = Child(*args.child, args.tiny, args.deadline)
        if child.ready():
            getattr(child, args.child[1])()
            child.write()
        return
    stages = args.stages.split(",")
    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        parser.error(f"unknown stages {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    path = args.json or RESULTS / ("serving-tiny.json" if args.tiny else "serving.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + args.limit
    results: list[dict[str, Any]] = []
    # What is new first, should time run out.
    todo = [(stage, side) for stage in stages for side in reversed(args.sides.split(","))]

    def keep() -> None:
        path.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")

    def prepared() -> Process | None:
        if not todo:
            return None
        stage, side = todo.pop(0)
        return Process(side, stage, args.tiny, deadline, path.with_name(f"serving-{stage}-{side}.log"))

    process = prepared()
    facts = {**machine(), "sizes": SIZES[args.tiny]}
    while process is not None:
        following = prepared()
        name = f"{process.result['stage']}, {process.result['side']}"
        if time.time() > deadline - 40:
            print(f"{name}: no time left", flush=True)
            process.leave()
        else:
            results.append(process.result)
            process.work(keep)
            print(f"{name}: {process.result['wall_s']:.0f} s", flush=True)
        process = following
    print("\n".join(table(results)))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
