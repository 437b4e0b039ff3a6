"""Configs: files that round-trip, errors that name the place, MInference's format, counts and slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mask_builders import AShape, BlockTopK, Boundary2D, Dense, Grid, QBoundary, VerticalSlash
from mmflex import plan
from mmflex.tuning.config import Config, head_slice, load_config, load_minference_config, per_layer, save_config

MIXED = {
    0: (Dense(), AShape(128, 2048), AShape(128, 2048), VerticalSlash(30, 800)),
    2: (
        Grid(stride="frame", columns=True, rows=True),
        QBoundary({"video": Grid(), "text": VerticalSlash(100, 750)}),
        Boundary2D({("video", "video"): Grid(slash=True), ("text", "video"): AShape()}),
        AShape(0, 128) | VerticalSlash(10, 100),
    ),
    3: (BlockTopK(100),) * 4,
}


def config(**changes: Any) -> Config:
    values = {
        "model": "Qwen/Qwen2.5-VL-7B",
        "layers": 4,
        "heads": 4,
        "patterns": MIXED,
        "provenance": {"by": ["search", 1]},
    }
    return Config(**{**values, **changes})


def test_resized_configs_keep_their_density() -> None:
    def density(made: Config, tokens: int) -> float:
        torch.manual_seed(0)
        q, k = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, tokens, 16)
        return plan(q, k, made.patterns[0], backend="reference").density.total

    heads = (AShape(128, 512), BlockTopK(4), VerticalSlash(128, 384), AShape(0, 256) | BlockTopK(3))
    made = Config("", 1, 4, {0: heads}, {"tokens": 2048})
    sample = density(made, 2048)
    assert density(made, 4096) < 0.7 * sample
    assert density(made.resized(4096), 4096) == pytest.approx(sample, rel=0.1)
    assert made.resized(4096).patterns[0][:2] == (AShape(128, 1024), BlockTopK(8))
    assert made.resized(2048).patterns == made.patterns
    assert made.resized(4096).provenance == {"tokens": 4096, "resized from": 2048}
    assert made.resized(4096).resized(2048).patterns == made.patterns
    assert config().resized(600, sample=300).patterns[3] == (BlockTopK(200),) * 4


def test_what_cannot_be_resized() -> None:
    with pytest.raises(ValueError, match="this config does not say how long its sample was"):
        config().resized(4096)
    with pytest.raises(ValueError, match="tokens is 0: a length is a whole number"):
        config(provenance={"tokens": 100}).resized(0)
    with pytest.raises(ValueError, match="sample is -5: a length"):
        config().resized(100, sample=-5)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save_config(config(), path)
    assert load_config(path) == config()
    document = json.loads(path.read_text())
    assert (document["schema"], document["version"]) == ("mmflex.config", 1)
    assert document["spec"]["0"] == [0, 1, 1, 2]
    assert document["spec"]["3"] == len(document["patterns"]) - 1, "heads that are alike are one number"
    assert "1" not in document["spec"], "a layer left out stays out"


def test_patterns_of_one_modality_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    restricted = Config.of(AShape(0, 128).on("video"), layers=1, heads=2)
    save_config(restricted, path)
    assert load_config(path) == restricted


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save_config(config(), path)
    before = path.read_text()
    with pytest.raises(TypeError):
        save_config(config(provenance={"by": object()}), path)
    path.parent.joinpath("taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        save_config(config(), path.parent / "taken")
    assert path.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "taken"], "no temporary file stays"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "schema: got 'other', \"mmflex.config\" is needed"),
        ({"version": 2}, "version: got 2; this mmflex reads version 1"),
        ({"layers": None}, "layers: got None, int is needed"),
        ({"heads": True}, "heads: got True, int is needed"),
        ({"heads": 0}, "heads: got 0, 1 or more is needed"),
        ({"more": 1}, "more: unknown field"),
        ({"patterns": [{"pattern": "AShape", "version": 1, "sinks": 3}]}, r"patterns\[0\]: AShape has no field sinks"),
        ({"patterns": [{"pattern": "AShape", "version": 9}]}, r"patterns\[0\]: AShape has version 9"),
        ({"patterns": [{"pattern": "AShape", "version": 1, "sink": -1}]}, r"patterns\[0\]: AShape.sink is -1"),
        ({"patterns": [{"pattern": "Nope", "version": 1}]}, r"patterns\[0\]: unknown pattern 'Nope': known are AShape"),
        ({"patterns": [7]}, r'patterns\[0\]: a pattern is an object with a "pattern" field, got 7'),
        ({"spec": {"4": 0}}, "spec.4: not a layer: layers are 0 to 3"),
        ({"spec": {"one": 0}}, "spec.one: not a layer"),
        ({"spec": {"1": [0, 0, 0]}}, "spec.1: 3 entries for 4 heads"),
        ({"spec": {"1": [0, 0, 99, 0]}}, r"spec.1\[2\]: got 99, a whole number from 0 below"),
        ({"spec": {"1": 1.5}}, "spec.1: got 1.5"),
    ],
)
def test_errors_name_the_place(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "config.json"
    save_config(config(), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        load_config(path)


def test_files_that_are_no_configs(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*config\.json: give .* that .*save_config"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match=r"no file default: give .*mmflex\.default_spec\(\)"):
        load_config("default")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*config\.json: give .* MInference published"):
        load_minference_config(path)
    for folder in (tmp_path, ""):
        with pytest.raises(IsADirectoryError, match=r"is a folder: give the path of the config file"):
            load_config(folder)
    for text, message in (
        ("{", "not JSON"),
        ("[]", "read it with load_minference_config"),
        ("3", "schema: got 'int'"),
        ("{}", "schema: got None"),
        ('{"schema": "mmflex.config", "version": 1}', "model: missing"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            load_config(path)


def test_counts_that_differ_are_refused_with_both_numbers() -> None:
    assert config().for_model(4, 4) == MIXED
    with pytest.raises(ValueError, match=r"made for Qwen/Qwen2.5-VL-7B\) has 4 layers but the model has 28"):
        config().for_model(28, 4)
    with pytest.raises(ValueError, match="has 4 heads but the model has 28"):
        config().for_model(4, 28)
    with pytest.raises(ValueError, match="layer 2 has 3 patterns for 4 query heads"):
        config(patterns={2: MIXED[2][:3]})
    with pytest.raises(ValueError, match="layer 9 has no attention"):
        config(patterns={9: Dense()})


def test_specs_written_out() -> None:
    assert per_layer(Dense(), range(2), 3) == {0: (Dense(),) * 3, 1: (Dense(),) * 3}
    assert per_layer({1: [Dense(), AShape()]}, range(2), 2) == {1: (Dense(), AShape())}
    assert Config.of(Dense(), 2, 2, model="m", method="hand").provenance == {"method": "hand"}
    with pytest.raises(ValueError, match=r"layer 0 has no attention to set: the model's attention layers are \[1, 3\]"):
        per_layer({0: Dense()}, [1, 3], 2)
    with pytest.raises(TypeError, match="layer 1, head 1 is 5: a pattern is needed"):
        per_layer({1: [Dense(), 5]}, range(2), 2)  # type: ignore[list-item]


def test_slices_for_tensor_parallel_ranks() -> None:
    patterns = MIXED[0]
    assert head_slice(patterns, 4, None) == patterns
    assert [head_slice(patterns, 2, rank) for rank in (0, 1)] == [patterns[:2], patterns[2:]]
    for heads, rank in ((3, 0), (2, None), (2, 2), (8, 0)):
        with pytest.raises(ValueError, match=f"computes {heads} query heads but its spec has 4 patterns"):
            head_slice(patterns, heads, rank)


def minference(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "Llama_3_8B_kv_out_v32_fit_o_best_pattern.json"
    path.write_text(json.dumps(document))
    return path


def test_minference_files(tmp_path: Path) -> None:
    layer = {
        "0": ["vertical_and_slash", 1000, 6096, 0.97],
        "1": ["stream_llm", 100, 800, 0.9],
        "2": ["block_sparse", 100, 1024, 1],
    }
    loaded = load_minference_config(minference(tmp_path, [layer, layer]), model="llama")
    assert (loaded.model, loaded.layers, loaded.heads) == ("llama", 2, 3)
    assert loaded.patterns[1] == (VerticalSlash(1000, 6096), AShape(100, 800), BlockTopK(100))
    assert loaded.provenance["format"] == "minference"
    save_config(loaded, tmp_path / "own.json")
    assert load_config(tmp_path / "own.json") == loaded


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "a list over layers"),
        ([], "a list over layers"),
        ([{"0": ["dense", 1, 2, 3]}], r'\[0\]\["0"\]\[0\]: unknown kind \'dense\': known are vertical_and_slash'),
        ([{"0": ["stream_llm", 1]}], r'\[0\]\["0"\]: got \[\'stream_llm\', 1\]'),
        ([{"0": ["stream_llm", 1, -5, 1.0]}], r'\[0\]\["0"\]\[2\]: got -5'),
        ([{"0": ["stream_llm", 1, 2.5, 1.0]}], r'\[0\]\["0"\]\[2\]: got 2.5'),
        ([{"0": ["stream_llm", 1, 5, 1.0]}, {"1": ["stream_llm", 1, 5, 1.0]}], r"\[1\]: heads are \['1'\]"),
    ],
)
def test_minference_errors_name_the_place(tmp_path: Path, document: Any, message: str) -> None:
    path = minference(tmp_path, document)
    with pytest.raises(ValueError, match=f"best_pattern.json: .*{message}"):
        load_minference_config(path)
