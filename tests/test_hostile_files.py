"""Files from strangers: configs and saved plans that are not what they say. Bounded work, and a ValueError of bounded
length that names the file."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mmflex
from mask_builders import AShape, Dense, Grid, VerticalSlash
from mmflex import plot
from mmflex.cli import app
from mmflex.plot.archive import MOST_BYTES
from mmflex.tuning.config import Config, load_config, load_minference_config, save_config


def refused(path: Path, load: Callable[[Path], object], *named: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the texts are compared below
        load(path)
    assert time.perf_counter() - begun < 20, "work without bounds"
    text = str(caught.value)
    assert type(caught.value) is ValueError
    assert path.name in text
    assert len(text) < 1200, len(text)
    for name in named:
        assert name in text, text


def refused_or_usable(path: Path, load: Callable[[Path], Any], use: Callable[[Any], object]) -> None:
    text = ""
    try:
        loaded = load(path)
    except ValueError as error:
        text = str(error)
    else:
        use(loaded)
    assert len(text) < 1200, text


# ---- configs ---------------------------------------------------------------------------------------------------------


def config_text(**changes: Any) -> str:
    data = {
        "schema": "mmflex.config",
        "version": 1,
        "model": "m",
        "layers": 2,
        "heads": 2,
        "provenance": {},
        "patterns": [Dense().to_json(), AShape().to_json()],
        "spec": {"0": 1, "1": [0, 1]},
    }
    return json.dumps(data | changes)


def nested(levels: int) -> Any:
    data: Any = Dense().to_json()
    for _ in range(levels):
        data = {"pattern": "Restricted", "version": 1, "inner": data}
    return data


LONG = "x" * 10**6
CONFIGS: dict[str, tuple[str, list[str]]] = {
    "deep lists": ("[" * 10**5, ["not JSON"]),
    "deep objects": ('{"a":' * 10**5, ["not JSON"]),
    "deep patterns": (config_text(patterns=[nested(150)]), ["patterns[0]", "100"]),
    "a billion layers": (config_text(layers=10**9), ["layers: got 1000000000", "1024 or less"]),
    "layers as a float": (config_text(layers=1e9), ["layers: got 1000000000.0"]),
    "thirty million heads": (config_text(heads=3 * 10**7), ["heads: got 30000000", "1024 or less"]),
    "a number of 5000 digits": (config_text(layers=0).replace('"layers": 0', '"layers": ' + "9" * 5000), ["not JSON"]),
    "duplicate fields": (config_text()[:-1] + ', "layers": 3}', ["'layers' stands more than once"]),
    "duplicate layers": (config_text(spec={}).replace('"spec": {}', '"spec": {"0": 0, "0": 1}'), ["'0'", "once"]),
    "one layer by two names": (config_text(spec={"0": 1, "00": 0}), ["spec.00", "not a layer"]),
    "another script": (config_text(spec={"\u0661": 1}), ["not a layer"]),
    "version true": (config_text(version=True), ["version: got True"]),
    "version 1.0": (config_text(version=1.0), ["version: got 1.0"]),
    "a megabyte of schema": (config_text(schema=LONG), ["schema: got 'xxx"]),
    "a megabyte of field": (config_text(**{LONG: 1}), ["unknown field"]),
    "a megabyte of layer": (config_text(spec={LONG: 1}), ["spec.xxx", "not a layer"]),
    "a megabyte of entry": (config_text(spec={"0": LONG}), ["spec.0: got 'xxx"]),
    "a megabyte of pattern": (config_text(patterns=[{"pattern": LONG, "version": 1}]), ["patterns[0]", "xxx"]),
    "a megabyte of model": (config_text(model=[LONG]), ["model: got ['xxx"]),
    "seventeen megabytes": (config_text() + " " * (1 << 24), ["more than 16777216 bytes"]),
    "a private class": (config_text(patterns=[{"pattern": "_Pair", "version": 1}]), ["'_Pair'", "known are"]),
    "not text": ("\udcff\udcfe", ["not JSON"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, tmp_path: Path) -> None:
    text, named = CONFIGS[case]
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(path, load_config, *named)


def test_a_config_whose_model_has_a_long_name_says_so_briefly() -> None:
    with pytest.raises(ValueError, match="has 2 layers but the model has 3") as caught:
        Config.of(Dense(), 2, 2, model=LONG).for_model(3, 2)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("counts", [(10**9, 2), (2, 10**9), (1e9, 2), (True, 2)])
def test_configs_of_no_model(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="from 1 to 1024"):
        Config.of(Dense(), *counts)
    with pytest.raises(ValueError, match="from 1 to 1024"):
        Config("", *counts, {})


def test_provenance_of_no_dictionary() -> None:
    with pytest.raises(TypeError, match="provenance 3"):
        Config("", 1, 1, {}, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ([{"0": [["a list"], 1, 2, 3]}], ["[0]", "unknown kind ['a list']"]),
        ([{"0": ["stream_llm", 1e400, 2, 3]}], ["[0]", "inf"]),
        ([{"0": [LONG, 1, 2, 3]}], ["unknown kind 'xxx"]),
        ([{"0": LONG}], ["got 'xxx"]),
        ([{"0": ["stream_llm", 1, 5, 1.0]}, {LONG: 1}], ["[1]", "heads are ['xxx"]),
        ([{"0": ["stream_llm", 1, 5, 1.0]}] * 2000, ["layers is 2000", "1024"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_foreign_configs(document: Any, named: list[str], tmp_path: Path) -> None:
    path = tmp_path / "best_pattern.json"
    path.write_text(json.dumps(document))
    refused(path, load_minference_config, *named)


# ---- saved plans -----------------------------------------------------------------------------------------------------

VIDEO = mmflex.TokenLayout.from_segments([("text", 40), ("video", (6, 8, 8)), ("text", 60)])


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Of a plan with every kind of launch that a file can hold."""
    torch.manual_seed(0)
    n = VIDEO.length
    spec = [AShape(30, 100), VerticalSlash(40, 60), Grid("frame", rows=True, slash=True, local=60), Dense()]
    plan = mmflex.plan(torch.randn(1, 4, n, 16), torch.randn(1, 2, n, 16), spec, layout=VIDEO, backend="reference")
    path = tmp_path_factory.mktemp("plans") / "plan.npz"
    plot.save_plan(plan, path)
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def changed_meta(arrays: dict[str, np.ndarray], change: Callable[[Any], None]) -> dict[str, np.ndarray]:
    meta = json.loads(str(arrays["meta"]))
    change(meta)
    return arrays | {"meta": np.array(json.dumps(meta))}


def each_place(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values within JSON data."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [place for key, child in children for place in each_place(child, (*path, key))]
    return [path, *found] if path else found


def put(data: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        data = data[key]
    data[place[-1]] = value


def draw(snapshot: Any) -> None:
    """Whatever is read can be drawn."""
    plot.mask_text(snapshot, 0)
    snapshot._repr_html_()
    for head in range(snapshot.heads):
        snapshot.counts(head)
        for number, _ in snapshot.launches_of(head):
            if snapshot.launches[number].kind != "dense":
                plot.mask_text(snapshot, head)


ODD_VALUES = [None, True, -1, 0, 1, 3, 127, 10**12, 1.5, float("nan"), "x", LONG, [], [0], [10**9, 3], {}, {"a": 1}]


@pytest.mark.parametrize("part", ["head", "launches"])
def test_any_value_in_any_place_of_the_meta_data(part: str, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """It is refused, or it is harmless: drawn without an error."""
    path = tmp_path / "x.npz"
    meta = json.loads(str(arrays["meta"]))
    places = [
        place for place in each_place(meta) if (place[0] == "launches" and len(place) > 1) == (part == "launches")
    ]
    assert len(places) > 15
    for place in places:
        for value in ODD_VALUES[:: 1 if part == "head" else 3]:
            np.savez(path, **changed_meta(arrays, lambda data: put(data, place, value)))  # noqa: B023
            refused_or_usable(path, plot.load_plan, draw)


def test_any_value_in_any_array(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for name, array in arrays.items():
        if name == "meta":
            continue
        flat = array.reshape(-1)
        odd: list[Any] = [
            array[..., None],
            array.astype(np.float64) + 0.5,
            array[:0],
            np.array("text"),
            -array.astype(int),
        ]
        odd += [array.astype(np.int64) * (1 << 33), np.concatenate([flat, flat]), array.astype(np.float16)]
        odd += [np.where(np.arange(flat.size).reshape(array.shape) == flat.size // 2, 10**6, array.astype(np.int64))]
        for other in odd:
            np.savez(path, **(arrays | {name: other}))
            refused_or_usable(path, plot.load_plan, draw)
        left = {key: value for key, value in arrays.items() if key != name}
        np.savez(path, **left)
        if name != "allowed":
            refused(path, plot.load_plan, "broken")


def test_tokens_that_there_are_not_are_refused(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for name in ("0.rows.table", "0.keys.table", "0.own.table"):
        for value in (10**6, -5):
            table = arrays[name].copy()
            table[0, 0] += value
            np.savez(path, **(arrays | {name: table}))
            refused(path, plot.load_plan, "broken", "launch 0, tokens of")
    np.savez(path, **changed_meta(arrays, lambda meta: meta.update(tile=0)))
    refused(path, plot.load_plan, "broken", "tile", "0")


def archive(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as opened:
        for name, content in files.items():
            opened.writestr(zipfile.ZipInfo(name + ".npy"), content, compression)  # its time is always the same
    return path


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def header(shape: str, dtype: str = "<i4", rest: int = 0) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(rest)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (header("(2000000000000,)"), "2000000000000"),
        (header("(1000000, 1000000)", rest=64), "1000000"),
        (header("(-1,)"), "(-1,)"),
        (header("(3,)", "<U0"), "numbers, booleans and texts"),
        (header("(1,)", "|O", rest=8), "numbers, booleans and texts"),
        (header("(1,)", "<M8[s]", rest=8), "numbers, booleans and texts"),
        (header("(" * 3000 + ")" * 3000), "not a saved plan"),
        (header("((((1,),),),)"), "not a saved plan"),
        (header("(True,)", rest=4), "not a saved plan"),
        (b"\x93NUMPY\x09\x00" + bytes(90), "not a saved plan"),
        (b"", "not a saved plan"),
        (b"\x80\x04K\x01.", "not a saved plan"),
    ],
    ids=lambda value: repr(value)[12:50],
)
def test_headers(content: bytes, named: str, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    files = {name: npy(array) for name, array in arrays.items()} | {"density": content}
    refused(archive(tmp_path / "x.npz", files), plot.load_plan, named)


@pytest.mark.parametrize("way", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_odd_compression(way: int, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    files = {name: npy(array) for name, array in arrays.items()}
    refused(archive(tmp_path / "x.npz", files, way), plot.load_plan, "compressed in way", "deflate")
    assert plot.load_plan(archive(tmp_path / "y.npz", files, zipfile.ZIP_STORED)).heads == 4


def test_an_archive_that_expands_without_end(
    arrays: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOST_BYTES == 1 << 30
    monkeypatch.setattr("mmflex.plot.archive.MOST_BYTES", 1 << 24)
    files = {name: npy(array) for name, array in arrays.items()}
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in files.items():
            opened.writestr(name + ".npy", content)
        with opened.open("more.npy", "w", force_zip64=True) as entry:
            for _ in range(17):
                entry.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 16
    refused(path, plot.load_plan, "16777216 are the most")


def test_an_archive_of_very_many_files(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as opened:
        for number in range(20_000):
            opened.writestr(f"{number}.npy", b"")
    refused(path, plot.load_plan, "list of arrays takes")


def test_archives_that_contradict_themselves(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    files = {name: npy(array) for name, array in arrays.items()}
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in [*files.items(), ("Meta", files["meta"])]:
            opened.writestr(name + ".npy", content)
    path.write_bytes(path.read_bytes().replace(b"Meta.npy", b"meta.npy"))
    refused(path, plot.load_plan, "'meta' twice")
    whole = archive(path, files).read_bytes()
    encrypted = bytearray(whole)
    at = whole.index(b"PK\x01\x02")
    encrypted[at + 8] |= 1
    encrypted[6] |= 1
    path.write_bytes(encrypted)
    refused(path, plot.load_plan, "encrypted")
    path.write_bytes(whole + b"more")
    refused(path, plot.load_plan, "does not end as an archive")
    for size in (4, 30, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, plot.load_plan, "cut short")
    assert zlib.crc32(whole) == zlib.crc32(archive(path, files).read_bytes())
    plot.load_plan(path)


def test_bytes_that_have_changed(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Anywhere: it is refused, or what is read can be drawn."""
    rng, path = np.random.default_rng(0), tmp_path / "x.npz"
    whole = archive(path, {name: npy(array) for name, array in arrays.items()}).read_bytes()
    for _ in range(150):
        broken = bytearray(whole)
        for at in rng.integers(4, len(whole), rng.integers(1, 4)):
            broken[at] = rng.integers(256)
        path.write_bytes(broken)
        refused_or_usable(path, plot.load_plan, draw)


def test_configs_with_changed_bytes(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "x.json"
    save_config(Config.of(AShape() | VerticalSlash(9, 9).on("video"), 2, 2, model="m", by=["hand"]), path)
    whole = path.read_bytes()
    for _ in range(400):
        broken = bytearray(whole)
        for at in rng.integers(0, len(whole), rng.integers(1, 4)):
            broken[at] = rng.integers(256)
        path.write_bytes(broken)
        refused_or_usable(path, load_config, lambda config: config.for_model(config.layers, config.heads))


@pytest.mark.parametrize("head", ["x", 1.5, None, True])
def test_heads_are_numbers(head: Any, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    loaded = plot.load_plan(tmp_path / "x.npz")
    for draw in (plot.mask_text, plot.plot_mask, plot.plot_orders):
        with pytest.raises(TypeError, match="head is "):
            draw(loaded, head)


def test_what_is_no_plan_is_not_drawn() -> None:
    with pytest.raises(TypeError, match=r"5 is no plan: make one with mmflex.plan"):
        plot.mask_text(5, 0)  # type: ignore[arg-type]


# ---- on the command line ---------------------------------------------------------------------------------------------


def test_texts_of_strangers_are_shown_as_they_are(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Brackets are no markup, and nothing reaches the terminal that it would obey."""
    odd = "[/] [red]x[link=https://example.org] \x1b]0;title\x07 \x1b[2J"
    path = tmp_path / "x.npz"
    fields = {"patterns": [odd] * 4, "note": odd, "backend": odd}
    np.savez(path, **changed_meta(arrays, lambda meta: meta.update(fields)))
    config = tmp_path / "x.json"
    save_config(Config.of(AShape(), 2, 2, model=odd, by=odd), config)
    for file in (path, config):
        for options in ((), ("--head", "1") if file == path else ("--layer", "1")):
            result = CliRunner().invoke(app, ["show", str(file), *options], env={"COLUMNS": "400"})
            assert result.exit_code == 0, result.exception
            assert "\x1b]0" not in result.output
            assert "\x1b[2J" not in result.output
            assert "[link=https://example.org]" in "".join(result.output.split())
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"schema": "[/] \x1b[2J"}))
    result = CliRunner().invoke(app, ["show", str(bad)])
    assert result.exit_code == 1
    assert "[/]" in result.output
