"""Kernels listed ahead on tensors without memory, and compiled by other processes."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import mmflex  # noqa: E402
from mask_builders import AShape, FlexPrefill, Grid, VerticalSlash, XAttention  # noqa: E402
from mmflex.ir.pattern import Pattern  # noqa: E402
from mmflex.ir.queries import QueryTokens  # noqa: E402
from mmflex.runtime import backends, calls, replay, workers  # noqa: E402
from mmflex.runtime.calls import Request, decided, listed  # noqa: E402
from mmflex.runtime.kernels.listing import listing  # noqa: E402
from mmflex.runtime.plan import Plan  # noqa: E402
from mmflex.runtime.recorded import recording  # noqa: E402
from mmflex.runtime.workers import Workers  # noqa: E402

SEGMENTS = [("text", 37), ("video", (6, 5, 11)), ("text", 133)]
SPECS: dict[str, list[Pattern]] = {
    "mixed": [*[Grid("frame", columns=True, rows=True, local=50)] * 2, *[VerticalSlash(40, 90)] * 2],
    "shares": [XAttention(8, 0.9)] * 2 + [FlexPrefill(0.9)] * 2,
    "fixed": [AShape(16, 70)] * 4,
}

INTERPRETED = """
import json, sys, torch
from triton.runtime.interpreter import GridExecutor
sys.path.insert(0, sys.argv[1])
import mmflex, test_workers
names, call = [], GridExecutor.__call__
GridExecutor.__call__ = lambda self, *args, **options: (names.append(self.fn.__name__), call(self, *args, **options))
out = {}
for name, spec in test_workers.SPECS.items():
    names.clear()
    torch.manual_seed(0)
    layout = mmflex.TokenLayout.from_segments(test_workers.SEGMENTS)
    q, k = (torch.randn(1, heads, layout.length, 32).bfloat16() for heads in (4, 2))
    mmflex.plan(q, k, spec, layout=layout, backend="reference")
    out[name] = sorted(set(names))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def launched() -> dict[str, list[str]]:
    """Triton kernels that planning launches on real tensors, in the interpreter (chosen before Triton's import)."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(Path(__file__).parent)], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SPECS)
def test_kernels_that_plan(name: str, launched: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are listed on "meta" are those that run; what is listed twice is compiled once."""
    layout = mmflex.TokenLayout.from_segments(SEGMENTS)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    real = [torch.empty(1, dtype=torch.bfloat16).expand(1, heads, layout.length, 32) for heads in (4, 2)]
    program, _ = decided(real[0], real[1], SPECS[name], layout, Request(backend="reference"))
    q, k = (torch.empty(t.shape, dtype=t.dtype, device="meta") for t in real)
    with listing(torch.device("cuda", 0)) as kernels, torch.no_grad():
        Plan(program, backends.BACKENDS["reference"], 0.1, q, k)
    found = list(kernels.by_key.values())
    assert sorted({kernel.name for kernel in found}) == launched[name]
    assert len(set(map(id, found))) == len(found)
    assert all(kernel.plans for kernel in found)


class Hopper:
    """A GPU that Triton compiles for, and that is not there."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        self.made.append(metadata.name)


def test_compiled_for_what_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listed kernel compiles, launcher included, to what a launch on real tensors finds on disk."""
    triton = pytest.importorskip("triton")
    from mmflex.runtime.kernels import rows

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver = Hopper()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    try:
        source = torch.empty(1, 2, 100, 32, device="meta", dtype=torch.bfloat16)
        index = torch.empty(1, 2, 51, dtype=torch.int64, device="meta")
        with listing(torch.device("cuda", 0)) as kernels:
            for length in (51, 32, 49):  # lengths share a kernel
                rows.take_rows(source, index[..., :length].contiguous())
            assert not list(tmp_path.iterdir()), "listing compiles nothing"
        (kernel,) = kernels.by_key.values()
        assert kernel.name == "_take"
        kernel.compile(torch.device("cuda", 0))
        assert driver.made == ["_take"]
        made = {path.name for path in tmp_path.iterdir()}
        assert made
        rows._take.device_caches.clear()
        rows._take.compiled(
            *(torch.empty_like(t, device="cpu") if isinstance(t, torch.Tensor) else t for t in kernel.args),  # type: ignore[attr-defined]
            **kernel.options,  # type: ignore[attr-defined]
        )
        assert {path.name for path in tmp_path.iterdir()} == made
    finally:
        rows._take.device_caches.clear()


@dataclass(frozen=True)
class OnGpu:
    """What is asked of a tensor whose kernels are listed."""

    like: torch.Tensor
    device: torch.device = torch.device("cuda", 0)  # noqa: RUF009

    def __getattr__(self, name: str) -> Any:
        return getattr(self.like, name)


def test_launchers_before_the_first_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for every kernel that Triton compiles, once for a spec; what fails is left to the plan."""
    triton = pytest.importorskip("triton")
    driver = Hopper()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(replay, "stream", lambda device: 0)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    mmflex.clear_caches()
    q, k = torch.empty(1, 4, 200, 32), torch.empty(1, 2, 200, 32)
    call = calls._call(q, k, k, AShape(16, 70), None, Request(backend="cpu"))
    try:
        for _ in range(2):
            calls._compile_first(call, OnGpu(q), OnGpu(k), None)  # type: ignore[arg-type]
        binaries = [path.stem for path in tmp_path.rglob("*.cubin")]
        assert "kernel" in driver.made
        assert sorted(driver.made) == sorted(binaries)
        monkeypatch.setattr(driver, "launcher_cls", None)
        mmflex.clear_caches()
        calls._compile_first(call, OnGpu(q), OnGpu(k), None)  # type: ignore[arg-type]
    finally:
        mmflex.clear_caches()  # kernels that were compiled for no GPU


def test_kernels_that_attend() -> None:
    """One for each mask, named after it; none where attention is eager or dense."""
    q, k = torch.empty(1, 4, 700, 32, device="meta"), torch.empty(1, 2, 700, 32, device="meta")
    spec, cpu = (AShape(16, 200), *[VerticalSlash(40, 128)] * 3), torch.device("cpu")
    kernels = listed(q, k, k, cpu, spec, None, Request(backend="cpu"))
    assert [kernel.name for kernel in kernels if not kernel.plans] == [
        "attention on cpu under q >= limit[first[h] + kv]"
    ]
    assert not listed(q, k, k, cpu, spec, None, Request(backend="reference"))
    assert not listed(q, k, k, cpu, spec, None, Request(backend="dense"))

    class Other(VerticalSlash):
        pass

    with pytest.raises(NotImplementedError, match="Other selects by code"):
        listed(q, k, k, cpu, Other(40, 128), None, Request(backend="cpu"))
    with pytest.raises(ValueError, match="q has 5 heads, k 2"):
        listed(torch.empty(1, 5, 700, 32, device="meta"), k, k, cpu, spec, None, Request())


def test_recording() -> None:
    """Calls are noted once each and not made; they survive pickling, strides included."""
    q, k = torch.full((1, 300, 4, 32), torch.nan).transpose(1, 2), torch.empty(1, 2, 300, 32)
    layout = mmflex.TokenLayout.from_segments([("text", 44), ("image", (16, 16))])
    with recording() as calls:
        for _ in range(2):
            out = mmflex.attention(q, k, k[..., :16], AShape(4, 40), layout=layout, backend="reference")
        assert out.shape == (1, 4, 300, 16)
        _, lse = mmflex.attention(q, k, k, AShape(4, 40), backend="reference", return_lse=True)
        assert (lse.shape, lse.dtype) == ((1, 4, 300), torch.float32)
        with pytest.raises(ValueError, match="nonsense"):
            mmflex.attention(q, k, k, AShape(4, 40), backend="nonsense")
    first, second = calls.by_key.values()
    again = pickle.loads(pickle.dumps(first))
    assert again.tensors[0].stride() == q.stride()
    assert again.tensors[2].shape == (1, 2, 300, 16)
    assert again.layout.fingerprint == layout.fingerprint
    assert (again.spec, again.device) == (AShape(4, 40), torch.device("cpu"))
    assert second.request.lse
    assert QueryTokens.of(again.request.queries, 300, 300).count == 300


@dataclass(frozen=True)
class Kernel:
    """What a compiler does with it."""

    name: str
    plans: bool = False

    @property
    def key(self) -> str:
        return self.name

    def compile(self, device: torch.device) -> None:
        print("compilers print")
        if self.name == "fails":
            raise ValueError("a reason\nand more")
        if self.name.startswith("dies"):
            print("no memory left", file=sys.stderr, flush=True)
            os._exit(7)


@dataclass(frozen=True)
class Call:
    names: tuple[str, ...]
    device: torch.device = torch.device("cpu")  # noqa: RUF009

    def kernels(self) -> list[Kernel]:
        return [Kernel(name) for name in self.names]


def test_processes_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and cause; the others go on, and none is left."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    calls = [sys.modules[__name__].Call(names) for names in (("fine", "dies", "fails"), ("fails", "dies too", "good"))]
    with Workers(1) as compiling:
        compiling.submit(calls)  # type: ignore[arg-type]
        failures = compiling.wait()
        assert compiling.wait() == []
        processes = [worker.process for worker in compiling._all]
    assert failures == [
        "dies: the process ended with code 7: no memory left",
        "fails: ValueError: a reason",
        "dies too: the process ended with code 7: no memory left",
    ]
    assert [process.returncode for process in processes] == [7, 7, 0]
    assert all(worker.errors.closed for worker in compiling._all)


def test_prompts_find_kernels_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """With ``jobs`` the kernels that attend are on disk when this process first attends; it waits for them last."""
    from torch._dynamo.utils import counters

    waited_after: list[int] = []
    wait = Workers.wait

    def noted(self: Workers) -> list[str]:
        waited_after.append(counters["inductor"]["fxgraph_cache_miss"])
        return wait(self)

    monkeypatch.setattr(Workers, "wait", noted)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=64, num_hidden_layers=2, **sizes)).eval()
    near, lines = (AShape(16, 140),) * 4, (VerticalSlash(40, 128), *(AShape(16, 140),) * 3)
    mmflex.clear_caches()
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad(), mmflex.patched(model, {0: near, 1: lines}, backend="cpu", fuse=True):
        before = backends.compiles
        (seconds,) = mmflex.warmup(model, [650], jobs=2)
        compiled = backends.compiles - before
        assert seconds > 0
        assert vars(model)["_mmflex_patch"].observer is None
    assert compiled > 0
    assert counters["inductor"]["fxgraph_cache_hit"] == compiled
    assert counters["aot_autograd"]["autograd_cache_hit"] == compiled
    assert counters["inductor"]["fxgraph_cache_miss"] == 2, "a layer and its MLP"
    assert waited_after == [2, 2], "before attention of each layer"
    assert not [w for w in recwarn if "mmflex.warmup" in str(w.message)]


def test_what_cannot_be_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern that no other process knows: a warning, and everything is compiled here."""

    class Local(AShape):
        pass

    started: list[Any] = []
    monkeypatch.setattr(workers, "_Worker", lambda: started.append(None) or _Idle())
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=64, num_hidden_layers=1, **sizes)).eval()
    with mmflex.patched(model, Local(4, 40), backend="reference"):
        with pytest.warns(UserWarning, match=r"mmflex\.warmup: this process compiles what others could not: .*Local"):
            assert len(mmflex.warmup(model, [200, 210], jobs=3)) == 2
        with pytest.raises(ValueError, match=r"0 jobs: give a number of processes"):
            mmflex.warmup(model, [200], jobs=0)
        with pytest.raises(TypeError, match="the jobs '2'"):
            mmflex.warmup(model, [200], jobs="2")  # type: ignore[arg-type]
    assert len(started) == 3
    gc.collect()


class _Idle:
    """A process that is never asked."""

    broken = False

    def close(self) -> None: ...

    def wait(self, seconds: float) -> None: ...

    def free(self) -> None: ...


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_settings_of_the_caller_reach_the_processes(precision: str) -> None:
    """Inductor finds what they compiled under the caller's settings alone."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision(precision)
        wanted = pickle.loads(pickle.dumps(workers._settings()))
        torch.backends.cuda.matmul.fp32_precision = before
        workers._set(wanted)
        assert workers._settings() == wanted
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class _Dead:
    """A process that answered, and then died; no other can be started after the first ones."""

    room = 2

    def __init__(self) -> None:
        if not _Dead.room:
            raise OSError("no more processes")
        _Dead.room -= 1
        self.broken, self.answered, self.left = False, True, True

    def ask(self, task: tuple[str, bytes, int]) -> str:
        self.broken = True
        return "the process ended with code 9"

    def close(self) -> None: ...

    def wait(self, seconds: float) -> None: ...

    def free(self) -> None: ...


def test_processes_that_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel is reported, and nothing waits for a process that never comes."""
    monkeypatch.setattr(workers, "_Worker", _Dead)
    monkeypatch.setattr(_Dead, "room", 2)
    with Workers(2) as pool:
        for number in range(5):
            pool._results.append(pool._threads.submit(pool._compile, f"kernel {number}", b"", number))
        failures = pool.wait()
    assert len(failures) == 5
    assert all("ended with code 9" in failure for failure in failures)
    assert any("no more processes" in failure for failure in failures)


def test_patterns_of_the_main_module_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = AShape(16, 70)
    layout = mmflex.TokenLayout.text(300)
    q, k = (torch.randn(1, heads, 300, 32) for heads in (4, 2))
    with recording() as noted:
        mmflex.attention(q, k, k, pattern, layout=layout, backend="cpu")
    (call,) = noted.by_key.values()

    class Hidden(AShape):
        pass

    Hidden.__module__, Hidden.__qualname__ = "__main__", "Hidden"
    monkeypatch.setattr(sys.modules["__main__"], "Hidden", Hidden, raising=False)
    with Workers(1) as pool, pytest.raises(ValueError, match="use a module"):
        pool.submit([type(call)(call.tensors, call.device, Hidden(16, 70), call.layout, call.request)])
