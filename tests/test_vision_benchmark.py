"""`python -m benchmarks.vision --tiny`: every part reports what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")


def test_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import vision

    few = [("windows", 2, 20, [8] * 6), ("images of unlike sizes", 2, 16, [8, 20, 3])]
    monkeypatch.setattr(vision, "shapes", lambda tiny: few)
    monkeypatch.setattr(vision, "METHODS", ("transformers, SDPA", "mmflex"))  # compiling is tested elsewhere
    monkeypatch.setattr(vision, "PROFILED", (("mmflex", {}),))
    path = tmp_path / "vision.json"
    monkeypatch.setattr("sys.argv", ["vision", "--tiny", "--frames", "4,6", "--json", str(path)])
    vision.main()
    report = json.loads(path.read_text())
    assert not [name for name in report if name.endswith("_error")]
    windows, unlike = report["attention"]
    assert windows["ms"].keys() == unlike["ms"].keys() == {"auto", "sdpa", "each segment"}
    assert windows["why_not"].keys() == {"cudnn", "flash", "flash4"}
    assert max(error for row in report["attention"] for error in row["errors"].values()) < 2e-6
    assert windows["contained"] == unlike["contained"] == {"sdpa": True}
    for dtype, limit in (("float32", 2e-6), ("bfloat16", 2e-2)):
        for found in report["exact"][dtype].values():
            assert found["to_float64"] < limit
    for row, patches in zip(report["tower"], (2 * 64, 3 * 64), strict=True):
        assert row["patches"] == patches
        assert all(len(found["runs"]) == 3 for found in row["methods"].values())
    assert report["tower"][0]["methods"]["mmflex"]["operators"] > 0
    assert report["profile"][0]["kinds"]
    assert [row["device"] for row in report["processor"]] == ["cpu"]
    assert vision.verdict(report) == []
    windows["errors"]["sdpa"], unlike["contained"]["sdpa"] = float("nan"), False
    report["exact"]["bfloat16"]["mmflex"]["to_float64"] *= 2
    found = vision.verdict(report)
    assert [line.split(":")[0] for line in found] == [
        "windows, sdpa",
        "images of unlike sizes, sdpa",
        "tower, bfloat16, mmflex",
    ]


def test_document_mask_lists_every_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidate that runs through FlexAttention is given the right blocks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks.vision import DocumentMask
    from mmflex.runtime.varlen import Segments

    for lengths in ([256, 256, 128], [100, 30, 200, 500, 7, 7, 7], [64] * 9, [5]):
        starts = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        mask = DocumentMask.build(Segments(starts), torch.device("cpu"))
        of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        allowed = of[:, None] == of
        for row in range(mask.kv_indices.shape[2]):
            rows = slice(row * 128, row * 128 + 128)
            partial = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist()
            full = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist()
            assert len({*partial, *full}) == len(partial) + len(full)
            for column in range(mask.kv_indices.shape[2]):
                block = allowed[rows, column * 128 : column * 128 + 128]
                if column in full:
                    assert block.shape == (128, 128)
                    assert block.all()
                else:
                    assert (column in partial) == bool(block.any())
