"""`python -m benchmarks.prefill --tiny`: its numbers add up, and one failure does not lose the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")


def test_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import prefill

    path = tmp_path / "results" / "prefill.json"
    monkeypatch.setattr(prefill, "DENSE_LAYERS", {1200: 3})
    monkeypatch.setattr(prefill, "REPEATS", {1200: 2})
    monkeypatch.setattr("sys.argv", ["prefill", "--tiny", "--lengths", "500,1200", "--json", str(path)])
    prefill.main()
    short, row = json.loads(path.read_text())["rows"]
    assert "500 tokens hold 0 frames of 256" in short["methods"]["mmflex"]["error"]
    ours, dense = row["methods"]["mmflex"], row["methods"]["sdpa"]
    assert (ours["layers"], ours["extrapolated"], dense["layers"], dense["extrapolated"]) == (6, False, 3, True)
    assert len(ours["runs"]) == len(dense["runs"]) == 2
    assert ours["decisions"][0].startswith("dense: ")
    assert ours["finite"]
    assert dense["seconds"] > min(run["measured_s"] for run in dense["runs"])
    assert 0 < dense["attention_share"] < 1
    assert row["speedup"]["sdpa"] == dense["seconds"] / ours["seconds"]
    page = path.with_suffix(".md").read_text()
    assert "| 1,200 | 3 |" in page
    assert "counted up to 6 layers from fewer (1,200 tokens: 3)" in page


def test_tiny_with_vision_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import prefill

    path = tmp_path / "results" / "prefill.json"
    monkeypatch.setattr(prefill, "VISION_REPEATS", {1200: 2})
    monkeypatch.setattr("sys.argv", ["prefill", "--tiny", "--vision", "--lengths", "1200", "--json", str(path)])
    prefill.main()
    (row,) = json.loads(path.read_text())["rows"]
    assert row["frames"] == 6
    assert row["methods"].keys() == {"mmflex", "sdpa"}
    for found in row["methods"].values():
        assert len(found["runs"]) == 2
        for run in found["runs"]:
            assert 0 < run["vision_s"] < run["vision_s"] + run["language_s"] <= run["seconds"]
            assert run["same_token"]
    assert "| 1,200 | 6 |" in path.with_suffix(".md").read_text()
