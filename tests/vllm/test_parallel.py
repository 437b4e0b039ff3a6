"""Heads shared by two processes, and a model that vLLM compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

SCRIPT = Path(__file__).with_name("parallel.py")


def run(*arguments: str) -> Any:
    found = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=os.environ, capture_output=True, text=True, timeout=540
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]
    return json.loads(next(line for line in reversed(found.stdout.splitlines()) if line.startswith('{"answers"')))


def test_every_rank_runs_its_heads_patterns_and_compiled_models_the_same() -> None:
    alone, shared, compiled = run("1"), run("2"), run("1", "compiled")
    assert alone["layers"] == compiled["layers"] == 4  # two chunks in two layers
    for found in (shared, compiled):
        for (tokens, lines), (other, others) in zip(found["answers"], alone["answers"], strict=True):
            assert tokens == other
            assert lines == pytest.approx(others, abs=1e-3)
