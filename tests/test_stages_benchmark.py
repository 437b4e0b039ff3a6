"""`benchmarks.stages`: processes in their order, so many at once, each with a limit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("code", "states"),
    [("pass", ["done", "done", "cut off", "failed (3)"]), ("raise SystemExit(2)", ["failed (2)", *["not begun"] * 3])],
)
def test_what_runs_after_the_first(
    code: str, states: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others begin when it is done, and not at all where it fails."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.stages import Stage, run

    stages = [
        Stage("search", ["-c", code], 60, first=True),
        Stage("quick", ["-c", "print('so far')"], 60),
        Stage("slow", ["-c", "import time; time.sleep(60)"], 1),
        Stage("wrong", ["-c", "raise SystemExit(3)"], 60),
    ]
    ended: list[str] = []
    run(stages, 2, time.monotonic() + 60, tmp_path, lambda stage: ended.append(stage.name))
    assert [stage.state for stage in stages] == states
    assert sorted(ended) == sorted(stage.name for stage in stages if stage.state != "not begun")
    assert ended[0] == "search"
    if len(ended) > 1:
        assert all(stage.started >= stages[0].started + stages[0].seconds - 0.1 for stage in stages[1:])
        assert (tmp_path / "quick.log").read_text() == "so far\n"
        assert stages[2].process.poll() is not None
