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


def answers(*arguments: str) -> Any:
    found = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=os.environ, capture_output=True, text=True, timeout=540
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]
    return json.loads(next(line for line in reversed(found.stdout.splitlines()) if line.startswith("[[[")))


def test_every_rank_runs_its_heads_patterns_and_compiled_models_the_same() -> None:
    alone = answers("1")
    assert answers("1", "plain") != alone
    for found in (answers("2"), answers("1", "compiled")):
        for (tokens, lines), (other, others) in zip(found, alone, strict=True):
            assert tokens == other
            assert lines == pytest.approx(others, abs=1e-3)
