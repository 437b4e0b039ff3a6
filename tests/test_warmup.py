"""Warming up: nothing is left to compile for the prompts that follow, and the model is as it was."""

from __future__ import annotations

import gc
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")

import mmflex  # noqa: E402
from mask_builders import AShape, VerticalSlash  # noqa: E402
from mmflex.cli import app  # noqa: E402
from mmflex.integrations import warmup as module  # noqa: E402
from mmflex.runtime import backends, tracing  # noqa: E402
from mmflex.tuning.config import Config, save_config  # noqa: E402

NEAR, LINES = (AShape(16, 200),) * 4, (VerticalSlash(40, 128), *(AShape(16, 200),) * 3)
SPEC = {0: NEAR, 1: LINES, 2: NEAR, 3: LINES}


def config(layers: int = 4) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.Qwen2Config(vocab_size=64, num_hidden_layers=layers, **sizes)


def test_prompts_find_everything_compiled() -> None:
    """One run of each spec; afterwards no kernel is compiled for a prompt of a warm length."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config()).eval()
    layers = model.model.layers
    calls: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    with torch.no_grad(), mmflex.patched(model, SPEC, backend="cpu"):
        seconds = mmflex.warmup(model, [700])
        assert len(seconds) == 1
        assert calls == [0, 1]
        assert model.model.layers is layers
        before = backends.compiles
        assert before > 0
        model(torch.randint(64, (1, 700)))
        assert backends.compiles == before


def test_what_cannot_be_warmed_up() -> None:
    model = transformers.Qwen2ForCausalLM(config(1)).eval()
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM is not patched: call mmflex\.patch"):
        mmflex.warmup(model, [100])
    with mmflex.patched(model, AShape(4, 4)):
        with pytest.raises(TypeError, match="the length '100'"):
            mmflex.warmup(model, ["100"])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="the length 1:"):
            mmflex.warmup(model, [1])


def test_command(tmp_path: Path) -> None:
    """From a folder with nothing but a config.json: as many layers as there are specs."""
    config().save_pretrained(tmp_path / "model")
    save_config(Config(model="tiny", layers=4, heads=4, patterns=SPEC), tmp_path / "specs.json")
    made = module.random_model(str(tmp_path / "model"), mmflex.load_config(tmp_path / "specs.json"),
                               torch.device("cpu"), torch.float32, "reference")  # fmt: skip
    assert len(made.model.layers) == 2
    run = CliRunner().invoke(app, ["warmup", str(tmp_path / "model"), "--config", str(tmp_path / "specs.json"),
                                   "--lengths", "300,200", "--backend", "reference", "--dtype", "float32"])  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "300 tokens: " in run.output
    run = CliRunner().invoke(app, ["warmup", str(tmp_path / "model"), "--config", "default:fast",
                                   "--lengths", "210", "--backend", "reference", "--dtype", "float32"])  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "210 tokens: " in run.output
    for given, said in ((["--lengths", "many"], "--lengths is 'many'"), (["--dtype", "int8"], "--dtype is 'int8'"),
                        (["--backend", "triton"], "--backend is 'triton', which cannot run here"),
                        (["--device", "gpu"], "--device is 'gpu'")):  # fmt: skip
        run = CliRunner().invoke(app, ["warmup", str(tmp_path / "model"), "--config", str(tmp_path / "specs.json"),
                                       *given])  # fmt: skip
        assert run.exit_code == 1
        assert said in " ".join(run.output.split())
    run = CliRunner().invoke(app, ["warmup", "m", "--config", "default", "--jobs", "0"])
    assert run.exit_code == 2


def test_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core for each and one for the caller, a few at most; none beside it on few cores."""
    for cores, jobs in ((1, 1), (2, 1), (3, 2), (5, 4), (64, 4)):
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert module.processes() == jobs


def test_flash_kernels_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of the user's, unless the user has said otherwise, or it cannot be written to."""
    for name in backends.FLASH_CACHE:
        monkeypatch.setenv(name, "")  # remembered, so that what is set below is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backends._keep_flash_kernels()
    kept = {name: backends.os.environ.get(name) for name in backends.FLASH_CACHE}
    assert kept == dict(zip(backends.FLASH_CACHE, ("1", str(tmp_path / "mmflex" / "flash-attn-4")), strict=True))
    monkeypatch.setenv(backends.FLASH_CACHE[0], "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    backends._keep_flash_kernels()
    assert backends.os.environ[backends.FLASH_CACHE[0]] == "0"
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for name in backends.FLASH_CACHE:
        monkeypatch.delenv(name, raising=False)
    backends._keep_flash_kernels()
    assert backends.FLASH_CACHE[0] not in backends.os.environ


def test_places_of_operations_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers as `inspect` gives, from one look at the disk for each place; undone after an error."""
    asked: list[int] = []

    def getframeinfo(frame: Any, context: int = 1) -> inspect.Traceback:
        asked.append(frame.f_lasti)
        return real(frame, context)

    def operation() -> None:
        frame = sys._getframe(1)
        places.append((operations.inspect.getframeinfo(frame), real(frame)))  # type: ignore[attr-defined]

    def kernel(depth: int) -> None:
        for _ in range(3):
            operation(), operation()
        if depth:
            kernel(depth - 1)

    places: list[tuple[inspect.Traceback, inspect.Traceback]] = []
    real, operations = inspect.getframeinfo, types.ModuleType(tracing._OPERATIONS)
    vars(operations)["inspect"] = inspect
    monkeypatch.setitem(sys.modules, tracing._OPERATIONS, operations)
    monkeypatch.setattr(inspect, "getframeinfo", getframeinfo)

    def trace() -> None:
        with tracing.quick_tracing():
            assert not gc.isenabled()
            kernel(2)
            raise KeyError

    with pytest.raises(KeyError):
        trace()
    assert gc.isenabled()
    assert vars(operations)["inspect"] is inspect
    assert len(places) == 18
    assert all(known == true and known.positions == true.positions for known, true in places)
    assert len(asked) == len(set(asked)) == 2
