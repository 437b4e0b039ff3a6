"""`benchmarks.cold_start`: every second of the main thread is counted once, as the innermost work under way."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_seconds_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work inside of work, a failure, a function in two threads, and the stages of torch.compile."""
    monkeypatch.syspath_prepend(str(ROOT))
    from torch._dynamo.utils import ChromiumEventLogger

    from benchmarks.cold_start import REST, STAGES, Split

    for name in ("log_event_start", "log_event_end"):
        monkeypatch.setattr(ChromiumEventLogger, name, getattr(ChromiumEventLogger, name))  # put back at the end

    def outer(fails: bool = False) -> None:
        work.inner()  # type: ignore[attr-defined]
        time.sleep(0.02)
        if fails:
            raise KeyError

    work = types.SimpleNamespace(inner=lambda: time.sleep(0.01), outer=outer)
    split, begun = Split(), time.perf_counter()
    split.wrap(work, "inner", "inside")
    split.wrap(work, "outer", "outside")
    split.wrap(work, "missing.function", "nothing")
    work.outer()
    with pytest.raises(KeyError):
        work.outer(fails=True)
    thread = threading.Thread(target=work.inner)
    thread.start()
    thread.join()
    split.watch_stages()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    assert split.open == [REST]
    seconds, calls = split.take()
    wall = time.perf_counter() - begun
    dynamo, backend = STAGES["entire_frame_compile"], STAGES["backend_compile"]
    assert calls == {"inside": 2, "outside": 2, dynamo: 1, backend: 1}
    assert seconds.keys() == {REST, "inside", "outside", dynamo, backend}
    assert seconds["inside"] >= 0.02
    assert seconds["outside"] >= 0.04
    assert seconds[REST] >= 0.01, "the other thread's, which was waited for"
    assert sum(seconds.values()) == pytest.approx(wall, abs=0.01)
    assert split.take()[1] == {}


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds by their seconds in the first process, also those that only the second has."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.cold_start import table

    common = {"before_s": {"import torch": 1.5}, "first_s": 9.0, "second_s": 0.5, "kept_graphs": {}}
    frames = [{"name": "layer", "restarts": ["why"]}, {"name": "mlp", "restarts": []}]
    empty = {**common, "kinds_s": {"a": 1.0, "b": 8.0}, "calls": {"b": 3}, "frames": frames}
    kept = {**common, "warmup_s": 4.5, "kinds_s": {"a": 1.0, "c": 8.0}, "calls": {}, "frames": []}
    lines = table({"empty": empty, "kept": kept})
    assert lines[2] == "| before: import torch | 1.50 | 1.50 |"
    assert lines[3] == "| mmflex.warmup | - | 4.50 |"
    assert lines[5:8] == ["| b | 8.00 (3) | 0.00 |", "| a | 1.00 | 1.00 |", "| c | 0.00 | 8.00 |"]
    assert "| frames compiled, traced again | 2, 1 | 0, 0 |" in lines


def test_layout_of_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens in the same places as in the prompt that follows."""
    monkeypatch.syspath_prepend(str(ROOT))
    pytest.importorskip("transformers")
    from benchmarks import prefill
    from benchmarks.cold_start import layout
    from mmflex.integrations.layouts import layout_for

    model = prefill.build(torch.device("cpu"), tiny=True, layers=1)
    assert layout(1200).fingerprint == layout_for(model.config, prefill.prompt(model, 1200, 0, cache=False)).fingerprint


def test_help() -> None:
    command = [sys.executable, "-m", "benchmarks.cold_start", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "one GPU, about two minutes" in run.stdout
