"""`mmflex.evaluation.evaluate` and ``mmflex eval``: sizing, scores, that what is reported ran, files, bad input."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

from mask_builders import AShape, Boundary2D, Dense, Grid, QBoundary, VerticalSlash, XAttention
from mmflex.cli import app
from mmflex.evaluation import Report, evaluate, methods, models, plot_report, trace
from mmflex.evaluation.answers import Answers, split
from mmflex.evaluation.methods import METHODS, Fitted, Ladder, Setting, choose, fit, largest
from mmflex.evaluation.report import Score, replaced
from mmflex.evaluation.samples import Prompts, prompts
from mmflex.evaluation.trace import Measured, Trace, capture, logits_at
from mmflex.tuning.config import Config, save_config

TOKENS = 512
SMALL: dict[str, Any] = {"lengths": (TOKENS,), "prompts": 2, "questions": 3, "seeds": 2, "flops": (0.9,), "depths": 4}


@pytest.fixture(scope="module")
def vision() -> Any:
    torch.manual_seed(0)
    return models.build("vision", hidden=128, layers=2).eval()


@pytest.fixture(scope="module")
def text() -> Any:
    torch.manual_seed(0)
    return models.build("text", hidden=64, layers=1).eval()


@pytest.fixture(scope="module")
def seen(vision: Any) -> Trace:
    return capture(vision, sample("mm-niah", 1, 5).inputs, "reference")


def sample(task: str, batch: int, seed: int, tokens: int = TOKENS) -> Prompts:
    return prompts(task, tokens, batch=batch, questions=3, seed=seed)


def echoing(model: Any) -> Callable[..., Prompts]:
    """Prompts whose right answers are what the dense model says: an untrained model is then always right."""

    def make(*args: Any, **kwargs: Any) -> Prompts:
        asked = prompts(*args, **kwargs)
        said = logits_at(model, asked.inputs, asked.rows).argmax(-1)
        return dataclasses.replace(asked, answers=said)

    return make


# ---- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (8, 10, 0.49016, 0.94331), (95, 100, 0.88825, 0.97846)],
)
def test_wilson_interval(right: int, asked: int, low: float, high: float) -> None:
    assert Score(right, asked).interval == pytest.approx((low, high), abs=2e-5)


def test_answers_are_sorted_by_kind_depth_and_seed() -> None:
    answers, dense = Answers(4), Answers(4)
    logits = torch.eye(5)[torch.tensor([[1, 2, 3]])]
    for seed, right in ((7, [1, 2, 4]), (8, [0, 2, 3])):
        asked = Prompts(
            {}, torch.zeros(1, 3), torch.tensor([right]), (("near", "far", "near"),), torch.tensor([[0.0, 0.3, 1.0]])
        )
        answers.add(asked, logits, seed)
        dense.add(asked, torch.eye(5)[torch.tensor([[1, 2, 4]])], seed)
    for text, over in (("x", False), ("y", True)):
        answers.fitted.append(Fitted(Setting(text, {}), Measured(0.5 + over, 0.25, 0.125), over))
        answers.ran.append(0.75 + over)
    row = answers.row(dense, method="m", label="M", target=0.5, task="t", tokens=9, backend="b")
    assert answers.right == [True, True, False, False, True, True]
    assert row.score == Score(4, 6)
    assert row.kinds == {"near": Score(2, 4), "far": Score(2, 2)}
    assert row.depths == (Score(1, 2), Score(2, 2), Score(0, 0), Score(1, 2))
    assert row.seeds == {"7": Score(2, 3), "8": Score(2, 3)}
    assert (row.planned, row.ran, row.pairs, row.error, row.over) == (1.0, 1.25, 0.25, 0.125, True)
    assert (row.settings, row.setting) == (("x", "y"), "x (and 1 more)")
    assert (row.lost, row.gained) == (1, 1)  # dense: 1, 2, 4 is right on the first seed, only 2 on the second


def test_parts_of_prompts_are_the_prompts(vision: Any) -> None:
    whole = sample("mm-niah", 3, 2)
    parts = split(whole, 2)
    assert [len(p.rows) for p in parts] == [2, 1]
    together = logits_at(vision, whole.inputs, whole.rows)
    apart = torch.cat([logits_at(vision, p.inputs, p.rows) for p in parts])
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)
    uneven = dataclasses.replace(whole, inputs={"pixel_values": torch.zeros(7, 2)})
    with pytest.raises(ValueError, match="pixel_values has 7 rows for 3 prompts"):
        split(uneven, 1)


# ---- what a model's layers see -------------------------------------------------------------------------------------


def test_logits_at_the_questions_are_those_of_the_whole_forward(vision: Any) -> None:
    asked = sample("mm-niah", 2, 1)
    with torch.no_grad():
        whole = vision(**asked.inputs).logits
    want = torch.stack([whole[b, rows] for b, rows in enumerate(asked.rows)])
    torch.testing.assert_close(logits_at(vision, asked.inputs, asked.rows), want)
    with pytest.raises(TypeError, match="has no language model head"):
        logits_at(vision.model, asked.inputs, asked.rows)


def test_measures_of_a_trace(text: Any) -> None:
    found = capture(text, {"input_ids": torch.arange(200)[None] % 60}, "reference")
    assert (found.tokens, found.heads, list(found.layers)) == (200, text.config.num_attention_heads, [0])
    dense = found.measure(Dense())
    assert (dense.density, dense.pairs) == (1.0, 1.0)
    assert dense.error < 1e-5
    spec = AShape(0, 1)  # the own tile alone
    made = found.plan(0, found.per_layer(spec)[0])
    mask, causal = made.dense_mask(), 200 * 201 / 2
    measured = found.measure(spec)
    assert measured.pairs == pytest.approx(float(mask[0, 0].sum()) / causal)
    assert measured.density == pytest.approx(2 * 128 * 128 / causal)  # of three blocks under the diagonal
    seen = found.layers[0]
    group = seen.q.shape[1] // seen.k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (seen.k, seen.v))
    weights = (seen.q.double() @ k.mT * seen.scale).masked_fill(~mask, float("-inf")).softmax(-1)
    per_head = ((weights @ v - seen.out).flatten(2).norm(dim=2) / seen.out.double().flatten(2).norm(dim=2))[0]
    assert measured.error == pytest.approx(float(per_head.mean()), rel=1e-3)


def test_products_of_estimates(text: Any) -> None:
    """Of 200 tokens: one product for each query and key, two for each pair of dense attention."""
    found = capture(text, {"input_ids": torch.arange(200)[None] % 60}, "reference")
    dense = 200 * 201

    def share(spec: Any) -> float:
        return found.measure(spec).estimates

    assert share(AShape(0, 1)) == 0.0
    assert share(VerticalSlash(16, 32)) == pytest.approx(2 * 64 * 200 / dense)
    assert share((VerticalSlash(16, 32), *[AShape(0, 1)] * (found.heads - 1))) == pytest.approx(
        2 * 64 * 200 / dense / found.heads
    )
    assert share(XAttention(8)) == pytest.approx(200 * 200 / 2 / 8 / dense)


def test_layers_that_a_spec_leaves_out_count_as_dense(seen: Trace) -> None:
    one, both = ({layer: AShape(128, 1) for layer in layers} for layers in ((0,), (0, 1)))
    assert seen.density(one) == pytest.approx((1 + seen.density(both)) / 2)
    assert seen.measure(one).pairs == pytest.approx((1 + seen.measure(both).pairs) / 2)


def test_pairs_of_long_prompts_are_estimated_from_some_rows(seen: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    made = seen.plan(0, (AShape(128, 1),) * 2)
    some = trace.allowed(made)
    monkeypatch.setattr(trace, "ROWS", TOKENS)
    exact = float(made.dense_mask()[0, 0].sum()) / (TOKENS * (TOKENS + 1) / 2)
    assert trace.allowed(made) == pytest.approx(exact)
    assert some == pytest.approx(exact, rel=0.1)


# ---- sizing ------------------------------------------------------------------------------------------------------


class FakeTrace:
    """Settings are numbers: their density is given, their error too."""

    def __init__(self, density: dict[float, float], error: dict[float, float] | None = None) -> None:
        self.given, self.error, self.asked = density, error or {}, 0

    def density(self, spec: Any) -> float:
        self.asked += 1
        return self.given[spec]

    def measure(self, spec: Any) -> Measured:
        return Measured(self.given[spec], 0.0, self.error.get(spec, 0.0))


def ladder(values: list[Any]) -> Ladder:
    return Ladder(len(values), lambda i: Setting(str(values[i]), values[i]))


@pytest.mark.parametrize("target", [0.05, 0.1, 0.35, 0.999, 2.0])
def test_the_largest_setting_within_the_target(target: float) -> None:
    densities = {i: (i + 1) / 100 for i in range(100)}
    fake: Any = FakeTrace(densities)
    setting, within = largest(ladder(list(densities)), target, fake)
    assert within
    assert setting.spec == max(i for i, d in densities.items() if d <= target)
    assert fake.asked <= 8


def test_no_setting_within_the_target() -> None:
    fake: Any = FakeTrace({0: 0.5, 1: 0.6, 2: 0.4})
    setting, within = largest(ladder([0, 1]), 0.3, fake)
    assert (setting.spec, within) == (0, False)
    found = fit(ladder([0, 1]), 0.3, fake)
    assert (found.setting.spec, found.over, found.measured.density) == (0, True, 0.5)
    assert choose([ladder([0, 1]), ladder([2])], 0.3, fake) == 1


def test_of_several_ladders_the_one_with_the_least_error() -> None:
    fake: Any = FakeTrace({0: 0.1, 1: 0.3, 2: 0.2, 3: 0.4, 4: 0.9}, {1: 0.5, 2: 0.2})
    assert choose([ladder([0, 1]), ladder([2, 3]), ladder([4])], 0.35, fake) == 1


def config_of(*patterns: Any) -> Config:
    return Config.of(list(patterns), 2, 2, model="tiny")


MIXED = config_of(
    QBoundary({"video": Grid("frame", local=128), "text": VerticalSlash(100, 128)}),
    Boundary2D({("video", "video"): AShape(128, 128), ("text", "video"): VerticalSlash(50, 128)}) | AShape(128, 128),
)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_brought_to_size(name: str, seen: Trace) -> None:
    method = METHODS[name]
    ladders = method.ladders(seen, method.prepare(seen, MIXED))
    for one in ladders:
        found = fit(one, 0.95, seen)
        assert found.over == (found.measured.density > 0.95)
        assert found.measured.density == pytest.approx(seen.density(found.setting.spec))
        ends = [seen.density(one.at(i).spec) for i in sorted({0, one.length // 2, one.length - 1})]
        asked_for = [density for density in ends if density < 1]  # beyond, blocks of short prompts may overlap
        assert asked_for == sorted(asked_for), f"{name} does not grow: {ends}"


def test_a_config_without_boundaries_has_each_heads_best_part(seen: Trace) -> None:
    assert methods.intra(MIXED.patterns[0][0]) == (VerticalSlash(100, 128), Grid("frame", local=128))
    assert set(methods.intra(MIXED.patterns[0][1])) == {VerticalSlash(50, 128), AShape(128, 128)}
    plain = AShape(128, 128) | VerticalSlash(50, 128)
    assert methods.intra(plain) == (plain,)
    found = methods.without_boundaries(MIXED, seen)
    for layer, heads in MIXED.patterns.items():
        for head, pattern in enumerate(heads):
            errors = {p: float(seen.errors(layer, seen.plan(layer, (p, p)))[head]) for p in methods.intra(pattern)}
            assert found.patterns[layer][head] == min(errors, key=errors.__getitem__)


# ---- the evaluation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(vision: Any) -> Report:
    chosen = ["a-shape", "tri-shape", "minference", "mminference"]
    return evaluate(
        vision, {"wide": AShape(128, TOKENS)}, "mm-niah", methods=chosen, config=MIXED, make_prompts=echoing(vision),
        **{**SMALL, "flops": (0.7, 0.9)},
    )  # fmt: skip


def test_scores_stand_beside_those_of_dense(report: Report) -> None:
    rows = {(r.label, r.target): r for r in report.rows}
    dense = rows["dense", None]
    assert dense.score == Score(12, 12)  # 2 seeds, 2 prompts, 3 questions
    assert dense.seeds == {"1000": Score(6, 6), "1001": Score(6, 6)}
    assert set(dense.kinds) == {"near", "far", "text"}
    assert sum(d.asked for d in dense.depths) == 12
    for row in report.rows:
        assert row.score.asked == 12
        assert row.gained == 0
        assert row.lost == 12 - row.score.right
        assert row.backend == ("own" if row.method == "dense" else "reference")
    wide = rows["wide", None]
    assert (wide.score.right, wide.pairs) == (12, 1.0)
    assert wide.error < 1e-4
    assert wide.planned == pytest.approx(10 * 128 * 128 / (TOKENS * (TOKENS + 1) / 2))  # 4 x 5 / 2 blocks
    assert rows["A-shape", 0.9].ran == rows["A-shape", 0.9].planned == pytest.approx(0.7 * wide.planned)
    assert rows["A-shape", 0.7].over
    assert {r.label for r in report.rows} >= {"MMInference as searched", "MMInference", "MInference", "Tri-shape"}


def test_the_report_so_far_is_given_after_every_length(vision: Any) -> None:
    given: list[Report] = []
    options: dict[str, Any] = {"methods": [], "lengths": (256, 320), "prompts": 1, "questions": 2, "seeds": 1}
    whole = evaluate(vision, AShape(128, 128), "v-niah", found=given.append, **options)
    assert [{row.tokens for row in part.rows} for part in given] == [{256}, {256, 320}]
    assert given[-1].rows == whole.rows


def test_seeds_fix_everything(vision: Any, report: Report) -> None:
    assert report.runs[0]["seeds"] == [1000, 1001]
    assert report.runs[0]["sample_seed"] == 999
    run = dict(SMALL, seeds=1, prompts=1, methods=["minference"])
    first, second = (evaluate(vision, None, "mm-niah", **run).to_json()["rows"] for _ in range(2))
    assert first == second


def test_other_prompts_and_text_models(text: Any) -> None:
    def make(task: str, tokens: int, *, batch: int, questions: int, seed: int, device: Any) -> Prompts:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(60, (batch, tokens), generator=g)
        rows = torch.randint(tokens, (batch, questions), generator=g)
        answers = logits_at(text, {"input_ids": ids}, rows).argmax(-1)
        return Prompts({"input_ids": ids}, rows, answers, (("mine",) * questions,) * batch, rows / tokens)

    found = evaluate(text, None, "mine", make_prompts=make, methods=["sf-fixed", "sf-strided"], config=MIXED, **SMALL)
    dense, fixed, strided = found.at("mine", TOKENS)
    assert dense.score == Score(12, 12)
    assert fixed.settings[0].startswith("StridedFixed(stride=128")
    assert "Strided(stride=128)" in strided.settings[0]
    assert [(s.method, s.task) for s in found.skipped] == [("MMInference as searched", "mine")]
    assert "has 2 layers but the model has 1" in found.skipped[0].reason


def test_what_needs_a_config_or_a_pattern_is_left_out_with_its_reason(
    vision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> Any:
        raise ValueError(f"unknown pattern {name!r}")

    monkeypatch.setattr(methods, "find", find)
    run = dict(SMALL, seeds=1, prompts=1)
    found = evaluate(vision, None, "v-niah", methods=["xattention", "mminference"], **run)
    assert [r.method for r in found.rows] == ["dense"]
    reasons = {s.method: s.reason for s in found.skipped}
    assert "no pattern XAttention" in reasons["xattention"]
    assert "--config" in reasons["mminference"]


@pytest.mark.filterwarnings("ignore::mmflex.DenseFallback")
def test_a_spec_that_would_run_dense_is_an_error(vision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmflex.integrations import prefill

    run = dict(SMALL, seeds=1, prompts=1, methods=[])
    with monkeypatch.context() as patch:
        patch.setattr(prefill, "_why_dense", lambda *args: "no reason at all")
        with pytest.raises(RuntimeError, match=r"would not be of the spec.*no reason at all"):
            evaluate(vision, AShape(128, 1), "v-niah", **run)
    real = trace.attention_forward

    def off(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        out, rest = real(module, query, key, value, mask, **options)
        return out * 1.5, rest

    monkeypatch.setattr(trace, "attention_forward", off)
    with pytest.raises(RuntimeError, match="layer 0 did not run its plan"):
        evaluate(vision, AShape(128, 1), "v-niah", **run)


def test_backends_by_size(vision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mmflex.evaluation.evaluate")
    asked: list[tuple[int, str]] = []

    def cell(self: Any, task: str, tokens: int, backend: str) -> list[Any]:
        asked.append((tokens, backend))
        if backend == "reference" and tokens > 1024:
            raise torch.OutOfMemoryError("too much")
        return []

    monkeypatch.setattr(module._Run, "_cell", cell)
    evaluate(vision, None, "v-niah", lengths=(512, 2048, 1 << 15))
    assert asked == [(512, "reference"), (2048, "reference"), (2048, "triton"), (1 << 15, "cpu")]
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(vision, None, "v-niah", lengths=(2048,), backend="reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["a-shape", "b-shape"]}, "unknown method 'b-shape': use 'all' or some of dense, a-shape"),
        ({"backend": "dense"}, "backend is 'dense': the specs themselves must run"),
        ({"flops": (0.4, 1.5)}, r"flops are \[0.4, 1.5\]: use shares"),
        ({"lengths": (128,)}, r"lengths are \[128\]: use one or more numbers of tokens, 256"),
        ({"sweep": 4096}, r"sweep is 4096: use one of the lengths \[512\]"),
        ({"prompts": 0}, "prompts is 0: use a whole number, 1 or more"),
        ({"first_seed": 0}, "first_seed is 0: use a whole number, 1 or more"),
    ],
)
def test_arguments_that_cannot_be(vision: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(vision, None, "v-niah", **{**SMALL, **change})


def test_a_spec_of_another_model_is_an_error(vision: Any) -> None:
    with pytest.raises(ValueError, match="has 3 layers but the model has 2"):
        evaluate(vision, Config.of(AShape(), 3, 2), "v-niah", methods=[], **SMALL)
    vision.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            evaluate(vision, AShape(), "v-niah", methods=[], **SMALL)
    finally:
        vision.eval()


# ---- files -------------------------------------------------------------------------------------------------------


def test_json_and_back(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "found.json")
    data = json.loads((tmp_path / "found.json").read_text())
    assert data["interval"].startswith("Wilson 95%")
    assert data["runs"][0]["versions"]["model"] == "Qwen2_5_VLForConditionalGeneration"
    again = Report.from_json(data)
    assert again.to_json() == data
    assert [r.score for r in again.rows] == [r.score for r in report.rows]
    with pytest.raises(ValueError, match="not an evaluation: got"):
        Report.from_json({"schema": "mmflex.config", "version": 1})
    with pytest.raises(ValueError, match="missing or unknown field"):
        Report.from_json({**data, "rows": [{"method": "x"}]})
    both = report + report
    assert len(both.rows) == 2 * len(report.rows)
    assert [run["tasks"] for run in both.runs] == [["mm-niah"]] * 2


def test_a_report_prints_its_tables(report: Report) -> None:
    assert repr(report) == f"Report(rows: {len(report.rows)})"
    for row in report.rows:
        assert any(row.label in line and str(row.score) in line for line in str(report).splitlines())
    html = report._repr_html_()
    assert html.count("<tr>") == len(report.rows) + len(report.tasks)
    assert f">{report.rows[0].score}</td>" in html


def test_a_file_is_complete_or_untouched(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("before")

    def broken(part: Path) -> None:
        part.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        replaced(path, broken)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == "before"


def test_picture(report: Report) -> None:
    figure = plot_report(report)
    figure.canvas.draw()
    above, below = figure.subfigs
    titles = [ax.get_title().replace("\n", " ") for ax in above.axes]
    labels = list(dict.fromkeys(r.label for r in report.rows))
    assert titles[: len(labels)] == labels
    (image,) = above.axes[0].get_images()  # dense
    assert image.get_array().shape == (4, 1)
    assert float(image.get_array().max()) == 1.0
    (legend,) = below.legends
    assert [t.get_text() for t in legend.get_texts()] == labels
    accuracy, error = below.axes
    points = [line.get_xydata().tolist() for line in error.lines]
    row = next(r for r in report.rows if r.label == "A-shape")
    assert any([pytest.approx(100 * row.ran), pytest.approx(row.error)] in p for p in points)
    assert accuracy.get_ylabel() == "accuracy (%)"


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(vision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mmflex.evaluation.models")
    monkeypatch.setattr(module, "load", lambda task, device, dtype: vision)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "250"})


SIZES = {"device": "cpu", "lengths": 512, "prompts": 1, "questions": 3, "seeds": 1, "depths": 3}
COMMON = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.mark.usefixtures("tiny")
def test_the_command(tmp_path: Path) -> None:
    save_config(MIXED, tmp_path / "config.json")
    spec = json.dumps(AShape(128, 200).to_json())
    out = [tmp_path / "found.json", tmp_path / "found.png"]
    result = command(
        spec, "--task", "v-niah", "--task", "mm-niah", *COMMON, "--methods", "a-shape", "--flops", "0.7,0.95",
        "--config", str(tmp_path / "config.json"), "--json", str(out[0]), "--picture", str(out[1]),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "seeds of the prompts: 1000" in result.output
    found = Report.from_json(json.loads(out[0].read_text()))
    assert found.tasks == ["v-niah", "mm-niah"]
    labels = [r.label for r in found.at("v-niah")]
    assert labels == ["dense", "MMInference as searched", "AShape(local=200)", "A-shape", "A-shape"]
    assert out[1].read_bytes().startswith(b"\x89PNG")
    for row in found.rows:
        assert row.label in result.output
    again = command("--add", str(out[0]), "--json", str(tmp_path / "again.json"))  # nothing is run
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.json").read_bytes() == out[0].read_bytes()
    dry = command("--add", str(out[0]), "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert dry.output.splitlines() == ["would run: nothing; it shows what --add holds", "would write: no files"]


@pytest.mark.usefixtures("tiny")
def test_a_dry_run_counts_what_a_run_does(vision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def note(module: Any, args: Any, given: dict[str, Any]) -> None:
        seen.extend([given["input_ids"].shape[1]] * len(given["input_ids"]))

    spec = json.dumps(AShape(128, 200).to_json())
    sizes = (spec, "--task", "v-niah", *COMMON, "--seeds", "2", "--methods", "a-shape,tri-shape", "--flops", "0.7")
    hook = vision.register_forward_pre_hook(note, with_kwargs=True)
    try:
        result = command(*sizes)
    finally:
        hook.remove()
    assert result.exit_code == 0, result.output
    module = importlib.import_module("mmflex.evaluation.models")
    monkeypatch.setattr(module, "load", lambda *args, **options: pytest.fail("weights were loaded"))
    result = command(*sizes, "--dry-run", "--json", str(tmp_path / "found.json"))
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    counts = re.search(
        r"would run, v-niah, 512 tokens: (\d+) dense and at most (\d+) sparse passes of one prompt;", text
    )
    assert counts is not None
    assert (int(counts[1]), int(counts[2])) == (1 + 2 + 2, 2 * 3)
    assert sum(map(int, counts.groups())) == len(seen)
    for part in (
        "of every task and length: 2 seeds of 1 prompt, each with 3 questions", "as given: AShape(local=200)",
        "brought to 0.7 of dense attention, all at 512 tokens, else the largest: A-shape, Tri-shape",
        "4 layers x 8 heads; on cpu, weights are not loaded in a dry run", "looking for 4 settings on plans",
        f"would write: {tmp_path / 'found.json'}",
    ):  # fmt: skip
        assert part in text, (part, text)
    assert not (tmp_path / "found.json").exists()
    monkeypatch.setattr(module, "WEIGHTS", tmp_path)
    result = command(*sizes, "--dry-run")
    assert result.exit_code == 1
    assert "is missing: the weights of the vision model are in the repository" in result.output.replace("\n", " ")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "x-niah"], "unknown task 'x-niah': use some of v-niah"),
        (["--methods", "best"], "unknown method 'best'"),
        (["--lengths", "1k"], "--lengths is '1k': give numbers"),
        (["--flops", "40"], "flops are [40.0]: use shares"),
        (["missing.json"], "there is no file missing.json"),
        (["{oops"], "is not JSON"),
        (['{"pattern": "Nope", "version": 1}'], "unknown pattern 'Nope'"),
        (["--json", "nowhere/found.json"], "there is no folder"),
        (["--picture", "found.txt"], "found.txt has no suffix of a picture"),
        (["--config", "other.json"], "other.json: schema: got 'else'"),
        (["--config", "gone.json"], "gone.json"),
        (["--add", "other.json"], "other.json: not an evaluation: got ['else', None]"),
        (["--backend", "dense"], "backend is 'dense'"),
        (["--backend", "triton"], "--backend is 'triton', which cannot run here"),
        (["--device", "gpu"], "--device is 'gpu': give cpu, cuda"),
    ],
)
def test_the_commands_errors(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text('{"schema": "else"}')
    result = command(*COMMON, *arguments)
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


# ---- the shipped model ---------------------------------------------------------------------------------------------


def test_the_shipped_model_answers(request: pytest.FixtureRequest) -> None:
    try:
        model = models.load("v-niah")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    found = evaluate(
        model, None, "v-niah", methods=["a-shape"], flops=(0.5,), lengths=(1024,), prompts=2, questions=8, seeds=2
    )
    dense, a_shape = found.rows
    assert dense.score.accuracy >= 0.9
    assert a_shape.score.accuracy < dense.score.accuracy  # it cannot see the needles
