"""The cost model: constants and where they come from, expected and counted work, predictions, and decisions by them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from typer.testing import CliRunner

import mmflex
from benchmarks.attention import HEADS, KV_HEADS, SPECS
from mask_builders import (
    AShape,
    BlockTopK,
    Boundary2D,
    Dense,
    Dilated,
    Grid,
    QBoundary,
    StridedFixed,
    TriShape,
    VerticalSlash,
)
from mmflex.cli import app
from mmflex.compiler import constants as store
from mmflex.compiler.constants import COSTS, GENERIC, Constants, constants_for
from mmflex.compiler.launches import SIDE_STREAM_KEYS
from mmflex.compiler.lower import lower
from mmflex.compiler.prices import MARGIN, attend_ms, expected_work, moving_ms, predict
from mmflex.compiler.program import Program
from mmflex.ir.queries import QueryTokens
from mmflex.tuning.calibrate import ATTEND, Settings, attend_features, blank, calibrate, fit, least_squares
from mmflex.tuning.cases import Case, Sample, fit_cases
from mmflex.tuning.cost import Link, counted, program_of
from mmflex.tuning.cost import predict as predict_any

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]

PLANTED = Constants(
    "a device", "1.0", "flash", "bfloat16", 128, 64, full=1e-4, partial=1.7e-4, looked_full=1.5e-4, lookup=6e-4,
    tile=4e-4, launch=0.02, copy=0.05, moved=3e-4, plan=0.3, estimate=0.7, token=2e-6, product=2e-8,
    planned=0.2, slot=4e-7, entry=5e-7, host=0.4, host_estimate=0.9, host_launch=0.3, dense=9e-5, dense_call=0.01,
    measured="2026-01-01",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of its own for every test."""
    monkeypatch.setenv("MMFLEX_CACHE", str(tmp_path / "cache"))
    store.forget()
    yield tmp_path / "cache" / "constants.json"
    store.forget()


def program(spec: mmflex.Pattern, tokens: int, constants: Constants = GENERIC, heads: int = 4) -> Program:
    layout = mmflex.TokenLayout.text(tokens)
    queries = QueryTokens.last(tokens, layout.length)
    return lower([spec] * heads, layout, queries, 2, 128, lse=True, full_width=False, constants=constants)


def random_plan(spec: mmflex.Pattern, layout: mmflex.TokenLayout, tile: int = 128, batch: int = 1) -> mmflex.Plan:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, h, layout.length, 16, generator=generator) for h in (4, 2))
    return mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=tile)


# ---- least squares ----


def test_least_squares_recovers_planted_coefficients() -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 1, (30, 6)) * [1e6, 1e4, 1, 1e3, 10, 0]
    planted = np.array([2e-6, 0.0, 0.5, 3e-3, 0.02, 0.0])
    assert np.allclose(least_squares(features, features @ planted), planted, rtol=1e-6, atol=1e-12)
    noisy = least_squares(features, features @ planted * rng.normal(1, 0.02, 30))
    assert np.allclose(noisy[planted > 0], planted[planted > 0], rtol=0.25)


def test_least_squares_is_the_constrained_optimum() -> None:
    """Karush-Kuhn-Tucker: no slope where a coefficient is positive, none downhill where it is held at 0."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(20):
        features, ms = rng.uniform(0, 1, (12, 5)), rng.uniform(0.5, 2, 12)
        found = least_squares(features, ms)
        rows = features / ms[:, None]
        slope = rows.T @ (rows @ found - 1)
        assert (found >= 0).all()
        assert np.allclose(slope[found > 0], 0, atol=1e-8)
        assert (slope[found == 0] >= -1e-8).all()
        held += int((found == 0).any())
    assert held > 0, "no case met the constraint"


def test_least_squares_refuses_what_it_cannot_fit() -> None:
    with pytest.raises(ValueError, match="one row for every time"):
        least_squares(np.ones((3, 2)), np.ones(4))
    with pytest.raises(ValueError, match="positive"):
        least_squares(np.ones((2, 1)), np.array([1.0, 0.0]))


@pytest.mark.parametrize("backend", ["flash", "triton"])
def test_fit_recovers_a_device(backend: str) -> None:
    """Times made from planted constants, over the very plans that calibration runs, give the constants back."""
    planted = replace(PLANTED, backend=backend)
    planted = planted if backend == "flash" else replace(planted, looked_full=planted.full)
    samples = []
    for case in fit_cases(4096, 16384):
        made = program(case.spec, case.tokens, planted)
        done = expected_work(made, 1)
        guess = predict(made, planted)
        host = planted.host + planted.host_estimate * bool(made.estimates)
        host += planted.host_launch * len(made.launches)
        attend = guess.attend_ms + guess.moving_ms
        samples.append(Sample(case, made, done, done, attend, guess.planning_ms, 1e3 * host, 0.0, host))
    dense = [(n, float(n * n), planted.dense_call + planted.dense * n * n) for n in (10, 100, 1000)]
    start = replace(blank(backend, CPU, Settings((256, 512), 4, 2, 16, torch.float32, 1, 1)), lanes=planted.lanes)
    found = fit(samples, dense, start)
    close = {name: getattr(found, name) / getattr(planted, name) for name in COSTS}
    assert all(0.98 < ratio < 1.02 for ratio in close.values()), close
    assert found.backend == backend


def test_calibration_plans_differ_in_what_they_are_named_for() -> None:
    """Full, partial, looked up, rows: each kind of block dominates one plan, on the lists as they are."""
    found = {}
    for case in fit_cases(2048, 4096)[:6]:
        plan = random_plan(case.spec, mmflex.TokenLayout.text(case.tokens))
        found[case.name] = counted(plan)
    full, pierced, thinned, window, rows = (found[n] for n in ("full", "pierced", "thinned", "window", "rows"))
    assert full[0].full > 3 * full[0].partial
    assert pierced[0].partial > 3 * pierced[0].full
    assert pierced[0].copies
    assert not pierced[0].looked_up
    assert thinned[0].looked_up
    assert thinned[0].full == 0
    assert window[0].looked_up
    assert window[0].full > window[0].partial
    assert len(rows) == 2
    assert rows[1].longest > 3 * rows[0].longest
    assert rows[1].tiles < rows[0].tiles / 3


# ---- expected and counted work ----


KNOWN = [
    AShape(1000, 3000),
    TriShape(128, 512, 300),
    StridedFixed(512, 32),
    AShape(1, 200) | AShape(700, 0),
    BlockTopK(6),
    Grid(256, columns=True, rows=True, local=512, phase=3),
]


@pytest.mark.parametrize("spec", KNOWN, ids=str)
@pytest.mark.parametrize("tokens", [8192, 7950])
def test_what_the_layout_decides_is_counted_before_planning(spec: mmflex.Pattern, tokens: int) -> None:
    """Block for block, full and partial; 2% for gathered rows and columns, whose phase moves with the budget."""
    plan = random_plan(spec, mmflex.TokenLayout.text(tokens))
    expected, found = expected_work(plan.program, 1), counted(plan)
    assert expected.keys() == found.keys()
    for number, work in found.items():
        for part in ("full", "partial", "longest"):
            count = getattr(work, part)
            assert getattr(expected[number], part) == pytest.approx(count, rel=0.02, abs=4), (number, part)


SELECTED = [
    (VerticalSlash(300, 1000), 0.2),
    (Grid(256, columns=True, rows=True, local=512), 0.05),
    (Grid(300, columns=True, slash=True, local=512), 0.1),
    (Grid("search", columns=True, rows=True, slash=True, local=512), 0.25),
    (VerticalSlash(300, 1000) | AShape(128, 512), 0.2),
    (VerticalSlash(300, 1000) - AShape(128, 512), 0.3),
    (Dilated(), 0.15),
    (QBoundary({"text": VerticalSlash(300, 1000), "video": Grid("frame", local=512)}), 0.15),
    (Boundary2D({("video", "video"): Grid("frame", local=512), ("text", "video"): VerticalSlash(300, 500)}), 0.1),
]


@pytest.mark.parametrize(("spec", "off"), SELECTED, ids=lambda value: str(value))
def test_what_is_selected_is_expected(spec: mmflex.Pattern, off: float) -> None:
    """Blocks in all, on inputs without structure."""
    layout = mmflex.TokenLayout.from_segments([("text", 1500), ("video", (12, 20, 20)), ("text", 1900)])
    plan = random_plan(spec, layout)
    expected, found = (sum(w.full + w.partial for w in works.values()) for works in
                       (expected_work(plan.program, 1), counted(plan)))  # fmt: skip
    assert expected == pytest.approx(found, rel=off)


@pytest.mark.parametrize("batch", [1, 2])
def test_counts_are_those_of_the_block_lists(batch: int) -> None:
    layout = mmflex.TokenLayout.text(512)
    spec = Grid(48, columns=True, rows=True, slash=True, local=64, sink=16)
    plan = random_plan(spec, layout, tile=16, batch=batch)
    full = partial = longest = 0
    for cover in oracle.launch_cover(plan):
        full, partial = full + int(cover.full.sum()), partial + int(cover.partial.sum())
        longest = max(longest, int((cover.full | cover.partial).sum(1).max()))
    works = counted(plan).values()
    assert len(works) > 1
    assert (sum(w.full for w in works), sum(w.partial for w in works)) == (full, partial)
    assert max(w.longest for w in works) == longest


def test_expected_blocks_are_those_of_the_measured_runs() -> None:
    """At full size: the block counts that benchmarks.attention reported, before any input was seen."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "attention-h200.json").read_text())["rows"]
    rows = [row for row in rows if row["tokens"] in (16384, 131072) and row["pattern"] in SPECS]
    assert len(rows) >= 6
    for row in rows:
        n = row["tokens"]
        layout = mmflex.TokenLayout.text(n)
        spec, queries = [SPECS[row["pattern"]]] * HEADS, QueryTokens.last(n, n)
        made = lower(spec, layout, queries, KV_HEADS, 128, lse=True, full_width=False)
        blocks = sum(w.full + w.partial for w in expected_work(made, 1).values())
        assert blocks == pytest.approx(row["full"] + row["partial"], rel=0.2), (n, row["pattern"])


# ---- predictions ----


def test_a_prediction_is_the_sum_of_its_parts() -> None:
    spec = Grid(256, columns=True, rows=True, local=512)
    made = predict(program(spec, 8192, PLANTED))
    parts = made.attend_ms + made.dense_ms + made.moving_ms + made.planning_ms + made.waiting_ms
    assert made.total_ms == pytest.approx(parts)
    assert len(made.launches) == 2
    assert made.attend_ms == pytest.approx(sum(launch.attend_ms for launch in made.launches))
    assert made.moving_ms == pytest.approx(sum(launch.moving_ms for launch in made.launches))
    assert min(made.attend_ms, made.moving_ms, made.planning_ms) > 0
    assert not made.exact


def test_a_launch_in_milliseconds() -> None:
    """Written out: blocks, tiles and the launch; one long tile takes its lane as long as it takes."""
    plan = random_plan(VerticalSlash(40, 160), mmflex.TokenLayout.text(1024))
    (work,) = counted(plan).values()
    c = replace(PLANTED, lanes=1)
    by_hand = work.full * c.full + work.partial * c.partial + work.tiles * c.tile + c.launch
    assert attend_ms(work, c) == pytest.approx(by_hand)
    assert work.tiles == 4 * 8
    alone = 10_000 * (work.longest * c.full + c.tile) + c.launch
    assert attend_ms(work, replace(c, lanes=10_000)) == pytest.approx(alone)
    assert moving_ms(work, c) == pytest.approx(c.copy + c.moved * 2 * 2 * plan.program.launches[0].key_slots / 128)
    made = predict_any(plan, c)
    assert made.exact
    assert made.attend_ms == pytest.approx(by_hand)
    assert not predict_any(plan.program, c).exact


@pytest.mark.parametrize("backend", ["flash", "triton", "cpu"])
@pytest.mark.parametrize("tokens", [4096, SIDE_STREAM_KEYS])
def test_what_is_fitted_is_what_is_predicted(backend: str, tokens: int) -> None:
    """One model of attending, forwards and backwards: with few rows too, which run beside the rest of long prompts."""
    c = replace(PLANTED, backend=backend, looked_full=PLANTED.full)
    costs = {name: getattr(c, name) for name in ATTEND} | {"partial": c.partial - c.full, "lookup": c.lookup - c.full}
    for spec in (Grid(256, columns=True, rows=True, local=512), VerticalSlash(500, 1024)):
        made = program(spec, tokens, c, heads=32)
        found = attend_features(made, expected_work(made, 1), c, apart=False)
        both = predict(made, c)
        assert found @ np.array([costs[name] for name in ATTEND]) == pytest.approx(both.attend_ms + both.moving_ms)


def test_predictions_grow_with_blocks_tokens_and_prompts() -> None:
    narrow, wide = (predict(program(AShape(128, n), 8192, PLANTED)) for n in (512, 4096))
    assert wide.attend_ms > 1.5 * narrow.attend_ms
    short, long = (predict(program(VerticalSlash(200, 512), n, PLANTED)) for n in (4096, 16384))
    for part in ("attend_ms", "moving_ms", "planning_ms"):
        assert getattr(long, part) > getattr(short, part), part
    made = program(VerticalSlash(200, 512), 8192, PLANTED)
    one, four = (predict(made, batch=batch) for batch in (1, 4))
    assert one.attend_ms < four.attend_ms < 4 * one.attend_ms
    assert expected_work(made, 1)[0].times(4) == expected_work(made, 4)[0]


def test_ranks_share_the_work_and_wait_for_keys() -> None:
    """Attending shrinks with the ranks, planning does not. Keys are waited for, values as long as planning does not
    hide them, or all of it where patterns select by them."""
    tokens, link = 32768, Link(gbs=2.0, call_ms=0.5, key_bytes=64)
    for spec, queries, hides in (
        (AShape(128, 4096), 0.0, True),
        (VerticalSlash(200, 4096), 0.5, True),
        (BlockTopK(40, values=0.2), 0.5, False),
    ):
        made = program(spec, tokens, PLANTED)
        one = predict_any(made)
        assert one.communication_ms == 0
        for ranks in (2, 4):
            several = predict_any(made, ranks=ranks, link=link)
            assert several.attend_ms == pytest.approx(one.attend_ms / ranks, rel=0.15), (spec, ranks)
            if spec != AShape(128, 4096):
                assert several.planning_ms > 1.2 * one.planning_ms / ranks
            each = 0.5 + tokens * 2 * 64 * (1 - 1 / ranks) / 2e6
            exposed = max(0.0, each - several.planning_ms) if hides else each
            assert several.communication_ms == pytest.approx(queries + each + exposed)
            four = predict_any(made, batch=4, ranks=ranks, link=link)
            assert four.communication_ms > several.communication_ms
            parts = (getattr(several, f"{part}_ms") for part in ("attend", "dense", "moving", "planning", "waiting"))
            assert several.total_ms == pytest.approx(sum(parts) + several.communication_ms)


def test_what_is_not_dealt_out_is_not_predicted() -> None:
    spec, layout = AShape(128, 128), mmflex.TokenLayout.text(1024)
    for made in (random_plan(spec, layout), program_of(spec, layout, 4, 2, queries=512)):
        with pytest.raises(ValueError, match=r"ranks is 2: give the program of a whole prompt \(program_of\)"):
            predict_any(made, ranks=2)
    with pytest.raises(ValueError, match=r"1024 tokens are 8 tiles of 128, but 5 ranks need 10"):
        predict_any(program(spec, 1024), ranks=5)


def test_the_host_counts_only_where_nothing_hides_it() -> None:
    made = program(VerticalSlash(200, 512), 4096, PLANTED)
    asynchronous, alone = (predict(made, replace(PLANTED, host=host)) for host in (50.0, 0.0))
    assert asynchronous.total_ms == pytest.approx(50.0 + PLANTED.host_estimate + PLANTED.host_launch)
    assert alone.total_ms < 10
    assert asynchronous.attend_ms == alone.attend_ms


def test_dense_is_priced_as_dense() -> None:
    made = program(Dense(), 1024, PLANTED)
    assert predict(made).total_ms == pytest.approx(PLANTED.dense_call + PLANTED.dense * 4 * 8 * 9 / 2)
    assert made.dense_cost == pytest.approx(4 * 8 * 9 / 2 * PLANTED.dense / PLANTED.full)


def test_program_of_needs_no_tensors() -> None:
    layout = mmflex.TokenLayout.text(4096)
    made = program_of(VerticalSlash(100, 256), layout, 4, 2, backend="reference", head_dim=64)
    assert predict_any(made).total_ms > 0
    assert [launch.name for launch in program_of(AShape(), mmflex.TokenLayout.text(64), 4, 2).launches] == ["blocks"]
    with pytest.raises(ValueError, match="3 patterns for 4 query"):
        program_of([AShape()] * 3, layout, 4, 2)
    with pytest.raises(TypeError, match="plan"):
        predict_any("plan")  # type: ignore[arg-type]


# ---- decisions ----


def test_the_break_even_follows_the_constants() -> None:
    """The same call runs dense or sparse, as the constants in the cache have it, and says why."""
    q, k = torch.randn(1, 4, 1024, 16), torch.randn(1, 2, 1024, 16)
    base = replace(
        blank("cpu", CPU, Settings((256, 512), 4, 2, 16, torch.float32, 1, 1)),
        full=1e-3, partial=1e-3, looked_full=1e-3, lookup=1e-3, dense=1e-2,
    )  # fmt: skip
    kinds = {}
    for name, record in {
        "sparse is cheap": base,
        "dense is cheap": replace(base, dense=1e-4),
        "planning is dear": replace(base, plan=1e3),
        "by a little": replace(base, dense=1e-9, dense_call=predict(program(AShape(128, 128), 1024, base)).total_ms),
    }.items():
        store.keep([record])
        plan = mmflex.plan(q, k, AShape(128, 128))
        kinds[name] = plan.program.launches[0].name
        assert ("ms" in plan.note and "dense" in plan.note) == (kinds[name] == "dense")
        assert plan.program.constants.source == "measured"
    assert 0 < MARGIN < 0.2
    assert kinds == {
        "sparse is cheap": "blocks",
        "dense is cheap": "dense",
        "planning is dear": "dense",
        "by a little": "dense",
    }


def test_orders_follow_the_constants() -> None:
    """Moving rows for free or dearly decides between modality-major and natural order."""
    segments = [part for _ in range(12) for part in (("text", 150), ("image", (10, 15)))]
    layout = mmflex.TokenLayout.from_segments(segments)
    spec = [QBoundary({"text": AShape(64, 256), "image": AShape(128, 512)})] * 4
    labels = set()
    for moved in (0.0, 1.0):
        queries, prices = QueryTokens.last(layout.length, layout.length), replace(GENERIC, moved=moved)
        made = lower(spec, layout, queries, 2, 128, lse=True, full_width=False, constants=prices)
        chosen, *rest = made.groups[0].alternatives
        assert rest
        assert all(chosen.cost <= way.cost for way in rest)
        labels.add(chosen.label.split(" queries")[0])
    assert labels == {"natural", "modality-major"}


# ---- files ----


def test_round_trip_and_what_is_kept(cache: Path) -> None:
    other = replace(PLANTED, backend="triton")
    assert store.keep([PLANTED, other]) == cache
    assert store.read_constants(cache.read_text()) == [PLANTED, other]
    newer = replace(PLANTED, full=2e-4)
    store.keep([newer])
    assert set(store.read_constants(cache.read_text())) == {newer, other}
    assert not [path for path in cache.parent.iterdir() if path != cache], "a temporary file is left"


def test_the_nearest_record_is_found() -> None:
    """Measured here before shipped, this device before others, its element size before its version."""
    name = store.device_name(CPU)
    shipped_only = constants_for(CPU, "cpu", torch.bfloat16, 64)
    assert shipped_only.source == "shipped"
    mine = replace(PLANTED, device=name, torch=torch.__version__, backend="cpu", head_dim=64)
    wide = replace(mine, dtype="float32", full=3e-4)
    store.keep([mine, wide, replace(mine, device="another", full=1.0), replace(mine, torch="0.1", full=2.0)])
    assert constants_for(CPU, "cpu", torch.bfloat16, 64) == mine
    assert constants_for(CPU, "cpu", torch.float16, 64) == mine
    assert constants_for(CPU, "cpu", torch.float32, 64) == wide
    double = constants_for(CPU, "cpu", torch.bfloat16, 128)
    assert 1.2 * mine.full < double.full < 2 * mine.full
    assert double.moved == 2 * mine.moved
    assert constants_for(CPU, "reference", torch.float32, 64) is GENERIC
    assert constants_for(CPU, "flash", torch.bfloat16, 128).device == "NVIDIA H200"


def test_what_was_measured_here_counts_under_every_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(PLANTED, device=store.device_name(CPU), backend="cpu", head_dim=64, torch="0.1", source="measured")
    monkeypatch.setattr(store, "shipped", lambda: (replace(mine, torch=torch.__version__, source="shipped"),))
    store.keep([mine])
    assert constants_for(CPU, "cpu", torch.bfloat16, 64).source == "measured"


def test_what_is_shipped() -> None:
    records = store.shipped()
    assert {(c.device, c.backend) for c in records} >= {("NVIDIA H200", "flash"), ("NVIDIA H200", "triton")}
    assert any(c.backend == "cpu" for c in records)
    for record in records:
        assert record.lookup >= record.partial >= record.full > 0
        assert record.measured


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{ not json", "not JSON"),
        ("[1, 2]", "not written by mmflex"),
        ('{"version": 99, "constants": []}', "version 99"),
        (json.dumps({"version": 1, "constants": [{"device": "x"}]}), "fields missing or unknown"),
        (json.dumps({"version": 1, "constants": [PLANTED.to_json() | {"full": -1.0}]}), "not negative"),
        (json.dumps({"version": 1, "constants": [PLANTED.to_json() | {"full": "fast"}]}), "full is 'fast'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_left_out(cache: Path, text: str, why: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.warns(UserWarning, match=re.escape(str(cache))) as caught:
        found = constants_for(CPU, "cpu", torch.bfloat16, 64)
    assert why in str(caught[0].message)
    assert "mmflex calibrate" in str(caught[0].message)
    assert found.source == "shipped"
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        constants_for(CPU, "cpu", torch.bfloat16, 96)
    store.keep([PLANTED])  # what was there is kept beside
    assert cache.with_suffix(".unreadable.json").read_text() == text
    assert store.read_constants(cache.read_text()) == [PLANTED]


def test_nothing_is_half_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.keep([PLANTED])
    before = cache.read_text()

    def broken(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(store.os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        store.keep([replace(PLANTED, full=5e-4)])
    assert cache.read_text() == before
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


# ---- measuring ----

TINY = ["--lengths", "256,384", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--dtype", "float32"]


def test_calibrate_on_the_command_line(cache: Path) -> None:
    for _ in range(4):  # tiny runs on a busy machine may tell nothing, and then say so
        run = CliRunner().invoke(app, ["calibrate", "--quick", "--backend", "reference", "--seconds", "60", *TINY])
        if run.exit_code == 0:
            break
        assert "or a quieter machine" in run.output.replace("\n", " ")
        assert not cache.exists()
    assert run.exit_code == 0, run.output
    for word in ("full block", "query tile", "held out:", "fitted to:", "vertical-slash", "largest error", str(cache)):
        assert word in run.output.replace("\n", ""), word
    (record,) = store.read_constants(cache.read_text())
    assert (record.backend, record.dtype, record.head_dim) == ("reference", "float32", 16)
    assert record.device == store.device_name(CPU)
    assert record.full > 0
    found = constants_for(CPU, "reference", torch.float32, 16)
    assert found == record
    assert found.source == "measured"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "cuda"], ["'cuda'", "flash, triton, cpu"]),
        (["--backend", "dense"], ["'dense'", "cpu"]),
        (["--backend", "triton", "--device", "cpu"], ["'triton' cannot run here", "CUDA"]),
        (["--backend", "cpu", "--backend", "flash", "--device", "cpu"], ["'flash' cannot run here"]),
        (["--backend", "reference", "--lengths", "512"], ["at least two"]),
        (["--backend", "reference", "--lengths", "short"], ["'short'", "numbers of tokens"]),
        (["--backend", "reference", "--heads", "3"], ["3 query heads", "2 KV heads"]),
        (["--backend", "reference", "--dtype", "int8"], ["'int8'", "bfloat16"]),
    ],
)
def test_bad_input_is_refused_before_anything_runs(cache: Path, arguments: list[str], words: list[str]) -> None:
    run = CliRunner().invoke(app, ["calibrate", *arguments])
    assert run.exit_code == 1, run.output
    for word in words:
        assert word in run.output.replace("\n", ""), run.output
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMFLEX_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr("mmflex.tuning.calibrate.calibrate", lambda *args: pytest.fail("measured for nothing"))
    run = CliRunner().invoke(app, ["calibrate", "--backend", "reference", *TINY])
    assert run.exit_code == 1
    assert "cannot be written" in run.output
    assert "MMFLEX_CACHE" in run.output


def test_a_case_that_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other cases still tell; if none runs, that is an error."""
    settings = Settings((256, 512), 2, 1, 16, torch.float32, 0.0, 0.01)
    monkeypatch.setattr("mmflex.tuning.calibrate._dense", lambda n, *args: (n, float(n), 0.01 * n))

    def measured(case: Case, *args: object) -> Sample:
        if case.name == "window":
            raise RuntimeError("no kernel for it")
        made = program(case.spec, case.tokens, PLANTED, heads=2)
        done = expected_work(made, 1)
        guess = predict(made, PLANTED)
        return Sample(case, made, done, done, guess.attend_ms + guess.moving_ms, guess.planning_ms, 9.0, 0.0, 0.0)

    monkeypatch.setattr("mmflex.tuning.calibrate.measure", measured)
    found = calibrate("reference", CPU, settings)
    assert [reason for name, reason in found.left_out if name.startswith("window")] == [
        "RuntimeError: no kernel for it"
    ]
    assert any(reason == "no time left" for _, reason in found.left_out)

    def none(*args: object) -> Sample:
        raise RuntimeError("no kernel at all")

    monkeypatch.setattr("mmflex.tuning.calibrate.measure", none)
    with pytest.raises(RuntimeError, match="no kernel at all"):
        calibrate("reference", CPU, settings)
