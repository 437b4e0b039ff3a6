"""Saved plans: what is read is what was saved, broken files are refused, `mmflex show` prints and draws them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_plot import SPEC, VIDEO, make_plan
from typer.testing import CliRunner

import mmflex
from mask_builders import AShape, VerticalSlash
from mmflex import plot
from mmflex.cli import app
from mmflex.plot import files, raster
from mmflex.plot.snapshot import snapshot
from mmflex.runtime.plan import Plan

runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"})


def output_of(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan()


@pytest.fixture(scope="module")
def saved(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.mmflex.npz"
    plot.save_plan(plan, path)
    return path


def rasters(plan: Any, head: int) -> list[np.ndarray]:
    """All that pictures of a head are drawn from."""
    found = [raster.mask_raster(plan, head, pixels=300)]
    for number, _ in snapshot(plan).launches_of(head):
        if snapshot(plan).launches[number].kind != "dense":
            found += [r for r in raster.launch_raster(plan, head, number, pixels=300) if r is not None]
    return [a for r in found for a in (r.full, r.partial, r.pairs, r.later)]


@pytest.mark.parametrize("head", range(len(SPEC)))
def test_what_is_read_is_what_was_saved(plan: Plan, saved: Path, head: int) -> None:
    loaded = plot.load_plan(saved)
    for a, b in zip(rasters(plan, head), rasters(loaded, head), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(loaded.reader.allowed(head, 0), plan.dense_mask()[0, head].numpy())
    assert loaded.counts(head) == snapshot(plan).counts(head)


def test_numbers_and_layout_are_kept(plan: Plan, saved: Path) -> None:
    loaded, live = plot.load_plan(saved), snapshot(plan)
    for name in ("q", "k", "tile", "backend", "note", "patterns", "families", "launches", "groups"):
        assert getattr(loaded, name) == getattr(live, name), name
    np.testing.assert_array_equal(loaded.density, plan.density.heads)
    assert loaded.layout.fingerprint == VIDEO.fingerprint
    assert loaded._repr_html_() == plan._repr_html_()
    assert repr(loaded).startswith("Snapshot((1, 8, 940, 16)")


def test_loaded_plans_can_be_saved_again_and_drawn(saved: Path, tmp_path: Path) -> None:
    loaded = plot.load_plan(saved)
    plot.save_plan(loaded, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == saved.read_bytes()
    for draw in (plot.plot_mask, plot.plot_orders):
        draw(loaded, 1).savefig("/dev/null", format="png")
    plot.plot_heads(loaded).savefig("/dev/null", format="png")
    with pytest.raises(ValueError, match="a saved plan holds no estimates"):
        plot.plot_estimate(loaded, 0)


def test_batches_chunks_and_long_prompts(tmp_path: Path) -> None:
    layout = mmflex.TokenLayout.batch([VIDEO, mmflex.TokenLayout.text(300)], side="left")
    plan = make_plan(layout, [VerticalSlash(60, 200), AShape(30, 100)], queries=200)
    plot.save_plan(plan, tmp_path / "batch.npz")
    loaded = plot.load_plan(tmp_path / "batch.npz")
    for batch in range(2):
        np.testing.assert_array_equal(
            raster.mask_raster(loaded, 0, batch).partial, raster.mask_raster(plan, 0, batch).partial
        )
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 4096, 16), torch.randn(1, 1, 4096, 16)
    plot.save_plan(mmflex.plan(q, k, AShape(), backend="reference"), tmp_path / "long.npz")
    with pytest.raises(ValueError, match=r"no token masks .* use level='block'"):
        plot.plot_mask(plot.load_plan(tmp_path / "long.npz"), 0, level="token")


def test_a_plan_of_no_queries_is_kept(tmp_path: Path) -> None:
    plan = make_plan(VIDEO, [AShape(), AShape()], queries=0)
    plot.save_plan(plan, tmp_path / "empty.npz")
    assert plot.load_plan(tmp_path / "empty.npz").queries == 0
    assert "<img" not in plan._repr_html_()


# ---- files ----


def changed(saved: Path, path: Path, **arrays: Any) -> Path:
    """The file with some arrays replaced."""
    with np.load(saved) as file:
        found = {name: file[name] for name in file.files}
    np.savez(path, **(found | arrays))
    return path


def meta_of(saved: Path) -> dict[str, Any]:
    with np.load(saved) as file:
        return json.loads(str(file["meta"]))


def test_foreign_and_broken_files_are_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(saved.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"x\.npz is not a saved plan, or it is cut short"):
        plot.load_plan(path)
    path.write_text("not an archive")
    with pytest.raises(ValueError, match=r"x\.npz is not a saved plan"):
        plot.load_plan(path)
    np.savez(path, other=np.arange(3))
    with pytest.raises(ValueError, match=r"x\.npz is not a saved plan: write one with mmflex\.plot\.save_plan"):
        plot.load_plan(path)
    np.save(path.with_suffix(".npy"), np.arange(3))
    with pytest.raises(ValueError, match="is not a saved plan"):
        plot.load_plan(path.with_suffix(".npy"))
    np.savez(path, meta=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="is not a saved plan"):
        plot.load_plan(path)
    with pytest.raises(FileNotFoundError):
        plot.load_plan(tmp_path / "none.npz")


def test_other_versions_and_damage_are_named(saved: Path, tmp_path: Path) -> None:
    path, meta = tmp_path / "x.npz", meta_of(saved)
    with pytest.raises(ValueError, match="has version 2; this mmflex reads version 1"):
        plot.load_plan(changed(saved, path, meta=np.array(json.dumps(meta | {"version": 2}))))
    with pytest.raises(ValueError, match=r"schema is 'mmflex\.config', \"mmflex\.plan\" is needed"):
        plot.load_plan(changed(saved, path, meta=np.array(json.dumps(meta | {"schema": "mmflex.config"}))))
    with np.load(saved) as file:
        count, index = file["0.partial.count"], file["0.partial.index"]
    with pytest.raises(ValueError, match=r"broken .*launch 0, partial blocks: \d+ where \d+ is expected"):
        plot.load_plan(changed(saved, path, **{"0.partial.index": index[:-1]}))
    with pytest.raises(ValueError, match=r"broken .*a block outside of the \d+ key blocks"):
        plot.load_plan(changed(saved, path, **{"0.partial.index": index + 100}))
    with pytest.raises(ValueError, match="broken"):
        plot.load_plan(changed(saved, path, **{"0.partial.count": count[:-1]}))
    with pytest.raises(ValueError, match=r"broken .*density: \(1, 3\) where \(1, 8\) is expected"):
        plot.load_plan(changed(saved, path, density=np.ones((1, 3))))


def test_a_failed_save_leaves_the_old_file(
    plan: Plan, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.npz"
    path.write_bytes(b"old")

    def fail(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(files.np, "savez_compressed", fail)
    with pytest.raises(OSError, match="no space left"):
        plot.save_plan(plan, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_small(tmp_path: Path) -> None:
    """Two bytes a listed block, and next to nothing for layouts and orders."""
    q, k = torch.randn(1, 8, 1, 16).expand(1, 8, 16384, 16), torch.randn(1, 2, 1, 16).expand(1, 2, 16384, 16)
    layout = mmflex.TokenLayout.from_segments([("text", 128), ("video", (63, 16, 16)), ("text", 128)])
    plan = mmflex.plan(q, k, AShape(128, 4096), layout=layout, backend="reference")
    plot.save_plan(plan, tmp_path / "plan.npz")
    blocks = sum(sum(snapshot(plan).counts(head)) for head in range(8))
    assert blocks > 30_000
    assert (tmp_path / "plan.npz").stat().st_size < 2 * blocks


# ---- on the command line ----


def test_show_prints_numbers_and_pictures(plan: Plan, saved: Path) -> None:
    text = output_of("show", str(saved))
    assert "1 x 8 heads on 4 KV heads, 940 queries" in text
    assert "text 40 | video 768 | text 60 | image 42 | text 30" in text
    full, partial = snapshot(plan).counts(5)
    assert re.search(rf"5 .*AShape\(sink=30, local=100\) .*{plan.density.heads[0, 5]:.1%} .*{full} .*{partial}", text)
    assert text.count("head ") == 6
    assert set("█▒░·") <= set(text)


def test_show_prints_one_head(saved: Path) -> None:
    text = output_of("show", str(saved), "--head", "5")
    expected = [line.rstrip() for line in plot.mask_text(plot.load_plan(saved), 5, width=96)]
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("head 5: AShape")) + 1
    assert lines[first : first + len(expected)] == expected
    assert "head 0" not in text


@pytest.mark.parametrize("arguments", [(), ("--head", "2")])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_show_draws_plans(saved: Path, tmp_path: Path, ending: str, arguments: tuple[str, ...]) -> None:
    path = tmp_path / f"plan.{ending}"
    assert str(path) in output_of("show", str(saved), *arguments, "-o", str(path)).replace("\n", "")
    assert path.stat().st_size > 5000


def test_show_refuses_what_is_not_there(saved: Path, tmp_path: Path) -> None:
    assert "head is 8, the plan has 8 heads" in output_of("show", str(saved), "--head", "8", code=1)
    assert "batch is 1, the plan has 1 prompts" in output_of("show", str(saved), "--prompt", "1", code=1)
    assert "--layer is for configs" in output_of("show", str(saved), "--layer", "1", code=1)
    path = tmp_path / "cut.npz"
    path.write_bytes(saved.read_bytes()[:1000])
    assert "cut short" in " ".join(output_of("show", str(path), code=1).split())
    path.write_bytes(b"\x89PNG\xff\xfe")
    assert "neither a config (JSON) nor a saved plan" in output_of("show", str(path), code=1)
    assert "no file" in output_of("show", str(tmp_path / "none.npz"), code=1)
    text = output_of("show", str(saved), "-o", str(tmp_path / "picture.xyz"), code=1)
    assert "xyz" in text
