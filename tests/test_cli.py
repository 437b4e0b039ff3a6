"""The command line: help for newcomers, the demo at a tiny size, configs shown, errors with a way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mmflex
from mask_builders import AShape, Dense, Grid, VerticalSlash
from mmflex.cli import app
from mmflex.tuning.config import Config, save_config

runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"})


def output_of(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    spec = {0: AShape(), 1: [Grid(columns=True, rows=True)] * 3 + [VerticalSlash(500, 700)], 3: AShape() | Grid()}
    save_config(Config.of(spec, 4, 4, model="a/model", method="by hand"), path)
    return path


@pytest.mark.parametrize("command", ["demo", "show", "families", "bench"])
def test_help_says_what_it_does(command: str) -> None:
    assert command in output_of("--help")
    text = output_of(command, "--help")
    assert "Usage" in text
    assert len(text) > 300
    assert "--frames" not in text  # sizes of the demo are for tests


def test_demo_without_the_weights_of_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a wheel has none of them."""
    pytest.importorskip("transformers")
    from mmflex.evaluation import models

    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    assert not models.present("v-niah")
    sizes = ("--frames", "16", "--size", "56", "--layers", "1", "--runs", "1", "--device", "cpu")
    text = output_of("demo", *sizes, "-o", str(tmp_path / "masks.png"))
    assert "weights that are in a checkout" in text
    assert "a trained model" not in text


def test_version_names_what_a_bug_report_needs() -> None:
    lines = output_of("--version").splitlines()
    assert lines[0].startswith(f"mmflex {mmflex.__version__}, Python 3.")
    names = ["torch", "triton", "flash-attn-4", "transformers"]
    assert [line.split(" ", 1)[0] for line in lines[1:]] == names
    assert lines[1] == f"torch {torch.__version__}"


def test_demo_at_a_tiny_size(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "masks.png"
    text = output_of(
        "demo", "--frames", "16", "--size", "56", "--layers", "1", "--runs", "1", "--device", "cpu", "-o", str(picture)
    )
    assert picture.stat().st_size > 5000
    assert "98 tokens" in text
    assert "video_grid_thw" in text
    for line in (
        "whole prefill",
        "planning",
        "max logit difference, Dense()",
        "max logit difference, sparse",
        "plan of layer",
    ):
        assert line in text


def test_demo_says_what_cannot_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    arguments = ("--frames", "4", "--size", "56", "--layers", "1", "--runs", "1", "--device", "cpu")
    text = output_of("demo", *arguments, "--backend", "triton", "-o", str(tmp_path / "x.png"), code=1)
    assert "backend 'triton' cannot run here" in " ".join(text.split())


def test_the_demo_tells_no_ratio_below_the_spread() -> None:
    pytest.importorskip("transformers")
    from mmflex.demo import compared

    assert compared([2.0, 2.1, 2.0], [1.0, 1.0, 1.1]) == ("2.00 s", "1.00 s (2.0x)")
    assert compared([1.0, 1.0], [2.0, 2.0]) == ("1.00 s", "2.00 s (0.5x)")
    assert compared([2.0, 2.6], [1.9, 1.5]) == ("2.30 s", "1.70 s")  # 0.6 apart, as are the runs of the first
    assert compared([3.0], [1.0]) == ("3.00 s", "1.00 s")  # one run each: no spread is known


@pytest.mark.parametrize(("free", "expected"), [(140, (512, 28, True)), (20, (128, 28, True)), (8, (512, 8, False))])
def test_the_demo_goes_by_the_memory_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, free: int, expected: tuple[int, int, bool]
) -> None:
    pytest.importorskip("transformers")
    from mmflex.demo import Settings

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 10**9, 150 * 10**9))
    settings = Settings.suited("cuda", runs=None, layers=3)
    assert (settings.frames, settings.heads, settings.real_tower) == expected
    assert settings.layers == 3
    assert ("GB of GPU memory are free" in settings.more) == (free < 40)
    assert Settings.suited("cpu", frames=None).frames == 512


def test_the_demo_joins_frames_as_the_video_processor_does() -> None:
    pytest.importorskip("transformers")
    from mmflex.demo import moving_shapes, process

    video = moving_shapes(5, 56)
    pixels, grid, _ = process(video)
    assert grid.tolist() == [[3, 4, 4]]
    assert pixels.shape == (3 * 4 * 4, 3 * 2 * 14 * 14)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    # patch 1 of frames 2 and 3: patches go through windows of 2 x 2 first
    expected = ((video[2:4, 0:14, 14:28] / 255 - mean) / std).transpose(3, 0, 1, 2).reshape(-1)
    np.testing.assert_allclose(pixels[16 + 1].numpy(), expected, atol=2e-5)
    torch.testing.assert_close(
        pixels[32:].unflatten(1, (3, 2, -1))[:, :, 0], pixels[32:].unflatten(1, (3, 2, -1))[:, :, 1]
    )


def test_show_prints_a_letter_per_head(config: Path) -> None:
    lines = output_of("show", str(config)).splitlines()
    assert "a/model: 4 layers x 4 heads" in lines[0]
    assert [line.split()[-1] for line in lines[2:6]] == ["AAAA", "GGGV", "····", "1111"]
    text = "\n".join(lines)
    assert "VerticalSlash, 1 head: VerticalSlash(vertical=500, slash=700)" in text
    assert "AShape | Grid, 4 heads" in text
    assert "own attention, 1 layer\n" in text
    assert "method by hand" in text


def test_show_lists_a_layer(config: Path) -> None:
    text = output_of("show", str(config), "--layer", "1")
    assert re.search(r"0-2\W+Grid\(rows=True\)", text)
    assert re.search(r"3\W+VerticalSlash\(vertical=500, slash=700\)", text)
    assert "own attention" in output_of("show", str(config), "--layer", "2")
    assert "layer is 4, the config has 4 layers" in output_of("show", str(config), "--layer", "4", code=1)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_show_draws(config: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"config.{ending}"
    assert str(path) in output_of("show", str(config), "-o", str(path)).replace("\n", "")
    assert path.stat().st_size > 3000


def test_show_reads_minference_files(tmp_path: Path) -> None:
    path = tmp_path / "their.json"
    path.write_text('[{"0": ["vertical_and_slash", 1000, 6096, 0.9], "1": ["stream_llm", 128, 1024, 0.9]}]')
    assert "VA" in output_of("show", str(path))


def test_show_errors(tmp_path: Path) -> None:
    assert "no file" in output_of("show", str(tmp_path / "none.json"), code=1)
    path = tmp_path / "wrong.json"
    path.write_text('{"schema": "other"}')
    assert "schema" in output_of("show", str(path), code=1)


def test_families_lists_those_with_layouts() -> None:
    text = output_of("families")
    for name in ("qwen2_5_vl", "llava_onevision", "internvl", "gemma3", "mistral"):
        assert name in text


def test_bench_names_what_there_is() -> None:
    text = output_of("bench", "nothing", code=1)
    assert "no benchmark 'nothing'" in text
    assert "cpu" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cpu", "--tokens", "1024"], ["--tokens", "1024", "--json", "cpu.json"]),
        (["cpu", "--output", "mine.json"], ["--output", "mine.json"]),
        (["attention", "--json=mine.json"], ["--json=mine.json"]),
        (["attention"], ["--json", "attention.json"]),
        (["picture"], ["--output", "picture.png"]),
        (["cpu", "--", "--help"], ["--help"]),
        (["prefill"], []),
    ],
)
def test_bench_leaves_the_results_of_the_checkout_alone(
    arguments: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0)

    (tmp_path / "benchmarks").mkdir()
    for name in ("__init__", "cpu", "attention", "picture", "prefill"):
        (tmp_path / "benchmarks" / f"{name}.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    text = output_of("bench", *arguments)
    folder = tmp_path / "build" / "bench"
    assert [part.removeprefix(f"{folder}/") for part in calls[0][3:]] == expected
    assert ("results go to" in text) == any(str(folder) in part for part in calls[0])


def test_a_dry_run_of_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is and how long it takes is in its documentation; its own parser judges the options."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "cpu.py").write_text(
        '"""One layer: dense and sparse.\n\n    python -m benchmarks.cpu     # on two cores, 3 minutes\n"""\n'
        "import argparse\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--tokens', type=int)\n"
        "parser.add_argument('--json')\n"
        "parser.parse_args()\n"
        "open('ran', 'w')\n"
    )
    (tmp_path / "benchmarks" / "kinds.py").write_text('"""Names."""\n')
    monkeypatch.chdir(tmp_path)
    text = output_of("bench", "cpu", "--tokens", "64", "--dry-run")
    file = tmp_path / "build" / "bench" / "cpu.json"
    for line in (
        f"would run: python -m benchmarks.cpu --tokens 64 --json {file}, in {tmp_path}",
        "measures: One layer: dense and sparse.",
        "would take, by its documentation: python -m benchmarks.cpu # on two cores, 3 minutes",
        f"would write: {file}",
    ):
        assert line in text.splitlines(), text
    assert "would write: mine.json" in output_of("bench", "cpu", "--json=mine.json", "--dry-run")
    assert "would take: its documentation names no time" in output_of("bench", "kinds", "--dry-run")
    assert "invalid int value: 'x'" in output_of("bench", "cpu", "--tokens", "x", "--dry-run", code=1)
    text = output_of("bench", "cpu", "--token", "64", "--layers=3", "--dry-run", code=1)
    assert "benchmarks.cpu has no option --layers: it takes --tokens, --json, --help" in text
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["benchmarks"]


def test_benchmarks_that_replace_results_are_known_to_bench() -> None:
    """`mmflex bench` gives those a file of their own."""
    from mmflex.cli.run import FILES

    written = re.compile(r'"(--\w+)",(?: "--output", dest="output",)? type=Path, default=')
    found = {}
    for path in (Path(mmflex.__file__).parents[1] / "benchmarks").glob("*.py"):
        for option in written.findall(path.read_text()):
            if option in ("--json", "--output"):
                found[path.stem] = option
    assert found == FILES


def test_dense_has_its_own_letter() -> None:
    from mmflex.plot import FAMILIES, family

    letters = [letter for letter, _ in FAMILIES.values()]
    assert len(set(letters)) == len(letters)
    assert family(Dense()) in FAMILIES
