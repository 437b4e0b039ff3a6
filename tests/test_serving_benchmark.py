"""benchmarks.serving without vLLM: what it shows of results, and what it does with a process that fails."""

from __future__ import annotations

import json
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from benchmarks.serving import STAGES, Child, Process, table
from mmflex.integrations.vllm.plugin import _installed


def test_the_table_has_both_sides_and_says_what_failed() -> None:
    plain = {"stage": "brief", "side": "plain", "whole": {"tokens": 131072, "seconds": 8.0}, "start_s": 20.0}
    fast = {
        "stage": "brief",
        "side": "mmflex",
        "whole": {"tokens": 131072, "seconds": 2.0},
        "first": {"seconds": 2.5},
        "accelerated": {"layers": 56},
    }
    broken = {"stage": "long", "side": "mmflex", "error": "exit status 1; Traceback\nRuntimeError: no memory"}
    lines = [" ".join(line.split()) for line in table([fast, plain, broken])]
    assert lines == [
        "plain mmflex ratio",
        "TTFT, 131072 tokens whole (s) 8.00 2.00 0.250",
        "first request after the start (s) - 2.50 -",
        "engine start (s) 20.00 - -",
        "layers of prefills that mmflex ran - 56 -",
        "long, mmflex: FAILED: RuntimeError: no memory",
    ]


def test_every_stage_is_there() -> None:
    assert all(callable(getattr(Child, stage)) for stage in STAGES)


def without_vllm() -> bool:
    """By its metadata: the folder tests/vllm could be taken for a package of that name."""
    try:
        _installed()
    except PackageNotFoundError:
        return True
    return False


@pytest.mark.skipif(not without_vllm(), reason="vLLM is there")
def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    kept = []
    process = Process("mmflex", "brief", True, time.time() + 60, tmp_path / "log")
    process.work(lambda: kept.append(json.dumps(process.result)))
    assert "No module named 'vllm'" in process.result["error"]
    assert process.result["stage"] == "brief"
    assert kept == [json.dumps(process.result)]
