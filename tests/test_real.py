"""Evaluation on real weights: the arithmetic against numpy, forwards under a spec, needles, files and errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from mask_builders import AShape, BlockTopK, Dense, VerticalSlash
from mmflex.evaluation.methods import METHODS
from mmflex.evaluation.outlook import text_work
from mmflex.evaluation.real import LanguageModel, Report, evaluate, load, needles, read, tokenized
from mmflex.evaluation.real.evaluate import Settings, source_digest
from mmflex.evaluation.real.model import check_context, describe, hidden_states, logits
from mmflex.evaluation.real.score import BLOCK, bootstrap, compare, summarise
from mmflex.evaluation.trace import allowed, capture
from mmflex.integrations import trial
from mmflex.integrations.predictions import HEAD_ROWS, log_probabilities
from mmflex.integrations.trial import sparse
from mmflex.tuning.config import Config, save_config

TOKENS = 300
WORDS = "the quick brown fox jumps over a lazy dog.\nIt was the best of times, it was the worst of times.\n" * 40


def tokenizer() -> Any:
    """Bytes as tokens, with nothing in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def tiny(kind: str = "llama", **options: Any) -> Any:
    import transformers

    common = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "initializer_range": 0.5,
    }  # fmt: skip
    torch.manual_seed(0)
    name = {"llama": "Llama", "cohere": "Cohere"}[kind]
    config = getattr(transformers, f"{name}Config")(**{**common, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(tiny(), tokenizer(), "tiny", 1024)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_perplexity_kl_and_agreement_against_numpy() -> None:
    generator = np.random.default_rng(0)
    dense, other = (generator.normal(size=(200, 37)) * 2 for _ in range(2))
    targets = generator.integers(0, 37, 200)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (dense, other))
    rows = np.arange(200)
    want = np.stack(
        [-np.log(q[rows, targets]), -np.log(p[rows, targets]), (p * np.log(p / q)).sum(1), p.argmax(1) == q.argmax(1)]
    )
    logs = (log_probabilities(torch.tensor(x, dtype=torch.float32)) for x in (dense, other))
    found = compare(*logs, torch.tensor(targets)).numpy()
    np.testing.assert_allclose(found, want, rtol=2e-6, atol=2e-7)
    windows = [want[:, :150], want[:, 150:]]
    scores = summarise(windows, last=30)
    ends = np.r_[120:150, 170:200]
    assert scores.perplexity == pytest.approx(np.exp(want[0].mean()))
    assert scores.dense == pytest.approx(np.exp(want[1].mean()))
    assert scores.excess.value == pytest.approx(scores.perplexity / scores.dense - 1)
    assert scores.kl_last.value == pytest.approx(want[2, ends].mean())
    assert scores.top1_last == pytest.approx(want[3, ends].mean())
    position = np.r_[0:150, 0:50] % 128
    assert scores.kl_first == pytest.approx(want[2, position < 16].mean())
    assert scores.kl_rest == pytest.approx(want[2, position >= 16].mean())
    assert scores.loss_first == pytest.approx((want[0] - want[1])[position < 16].mean())
    assert scores.offsets[7] == pytest.approx(want[2, position >= 112].mean())
    assert (scores.rows, len(scores.offsets)) == (200, 8)


def test_intervals_are_those_of_blocks_drawn_with_replacement() -> None:
    generator = np.random.default_rng(1)
    windows = [generator.normal(1.0, 1.0, n) for n in (1000, 500)]
    blocks = [w[i : i + BLOCK] for w in windows for i in range(0, len(w), BLOCK)]
    draws = [np.concatenate([blocks[i] for i in generator.integers(0, len(blocks), len(blocks))]) for _ in range(4000)]
    low, high = np.quantile([d.mean() for d in draws], (0.025, 0.975))
    found = bootstrap(windows)
    assert found.value == pytest.approx(np.concatenate(windows).mean())
    assert found.low == pytest.approx(low, abs=0.15 * (high - low))
    assert found.high == pytest.approx(high, abs=0.15 * (high - low))
    assert bootstrap(windows) == found  # the same draws every time


def test_intervals_hold_the_mean_of_rows_that_depend_on_each_other() -> None:
    """Of values that are alike for 64 rows, drawing rows would give intervals 8 times too narrow."""
    generator = np.random.default_rng(2)
    inside = 0
    for seed in range(200):
        values = np.repeat(generator.normal(size=48), 64)
        interval = bootstrap([values[:1536], values[1536:]], draws=300, seed=seed)
        inside += interval.low <= 0.0 <= interval.high
    assert 170 <= inside <= 200
    assert np.isnan(bootstrap([values[:100]]).low)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "cohere"])
def test_logits_a_few_rows_at_a_time_are_the_models(kind: str) -> None:
    """Cohere scales its logits after the head."""
    options = {"logit_scale": 0.25} if kind == "cohere" else {}
    model = tiny(kind, **options)
    ids = torch.arange(90) * 7 % 256
    with torch.no_grad():
        want = model(input_ids=ids[None]).logits[0]
    hidden = hidden_states(model, ids)
    found = torch.cat([logits(model, hidden, first, min(90, first + 40)) for first in range(0, 90, 40)])
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids[None]).logits[0], want)  # the model is as it was


def test_a_model_without_a_head_is_refused(model: LanguageModel) -> None:
    with pytest.raises(TypeError, match="has no language model head"):
        hidden_states(model.model.model, torch.arange(70))


@pytest.mark.parametrize("spec", [AShape(128, 1), VerticalSlash(16, 128), {1: BlockTopK(1, near=0)}])
def test_forwards_under_a_spec_are_those_of_a_patched_model(model: LanguageModel, spec: Any) -> None:
    import mmflex

    ids = read_ids(model)[:TOKENS]
    with mmflex.patched(model.model, spec, backend="reference"):
        want = hidden_states(model.model, ids).states
    with sparse(model.model, spec, "reference", {}) as ran:
        found = hidden_states(model.model, ids).states
    torch.testing.assert_close(found, want)
    with sparse(model.model, spec, trial.MASKED, {}) as masked:
        torch.testing.assert_close(hidden_states(model.model, ids).states, want, rtol=1e-4, atol=1e-4)
    assert masked == ran
    assert not torch.allclose(found, hidden_states(model.model, ids).states, atol=1e-3)
    density, estimates = ran.mean()
    assert len(ran.density) == 2
    if isinstance(spec, AShape):
        assert density == pytest.approx(5 * 128 * 128 / (TOKENS * (TOKENS + 1) / 2))  # of six blocks
        assert estimates == 0.0
    if isinstance(spec, dict):
        assert ran.density[0] == 1.0
        assert estimates > 0.0


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
@pytest.mark.parametrize(
    "spec", [VerticalSlash(16, 128), AShape(0, 1), BlockTopK(1, near=0) | AShape(128, 1), Dense()], ids=str
)
def test_attention_under_the_token_mask(spec: Any, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 under the mask that the whole plan denotes; strips of one tile, the last one short."""
    import mmflex

    monkeypatch.setitem(trial.PAIRS_AT_ONCE, "cpu", 1)
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, h, 413, 16) for h in (heads[0], heads[1], heads[1]))
    plan = mmflex.plan(q, k, spec, backend="reference", scale=0.4)
    mask = plan.dense_mask()
    wide = [t.double().repeat_interleave(heads[0] // t.shape[1], 1) for t in (q, k, v)]
    scores = (wide[0] @ wide[1].mT * 0.4).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(trial.attend_masked(plan, q, k, v), (scores.softmax(-1) @ wide[2]).float())
    torch.testing.assert_close(trial.attend_masked(plan, q, k, v), plan.attend(q, k, v))


def test_the_token_mask_of_the_first_keys() -> None:
    import mmflex

    q, k = torch.randn(1, 2, 300, 16), torch.randn(1, 1, 300, 16)
    plan = mmflex.plan(q, k, [VerticalSlash(16, 128), BlockTopK(1, near=0)], backend="reference")
    for keys in (0, 1, 128, 257, 300):
        assert torch.equal(plan.dense_mask([5, 256, 299], keys=keys), plan.dense_mask()[:, :, [5, 256, 299], :keys])
    for keys in (-1, 301):
        with pytest.raises(ValueError, match=f"keys is {keys}: use a number of tokens from 0 to 300"):
            plan.dense_mask(keys=keys)


def read_ids(model: LanguageModel) -> torch.Tensor:
    return tokenized("words", WORDS, model.tokenizer).ids


def test_windows_are_spread_and_do_not_overlap(model: LanguageModel) -> None:
    text = tokenized("words", WORDS, model.tokenizer)
    found = text.windows(TOKENS, 3)
    assert found.shape == (3, TOKENS)
    assert torch.equal(found[0], text.ids[:TOKENS])
    assert torch.equal(found[2], text.ids[-TOKENS:])
    with pytest.raises(ValueError, match=rf"words has {len(text.ids)} tokens, and 20 windows of {TOKENS} need 6000"):
        text.windows(TOKENS, 20)


def test_a_token_in_front_of_every_window(model: LanguageModel) -> None:
    from tokenizers.processors import TemplateProcessing

    marked = tokenizer()
    marked.add_special_tokens({"bos_token": "<s>"})
    marked.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", marked.bos_token_id)]
    )
    text = tokenized("words", WORDS, marked)
    assert text.prefix == (marked.bos_token_id,)
    found = text.windows(TOKENS, 2)
    assert found[:, 0].tolist() == [marked.bos_token_id] * 2
    assert torch.equal(found[0, 1:], text.ids[: TOKENS - 1])


# ---- needles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", needles.TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.6, 1.0])
def test_prompts_have_their_needle_and_question(model: LanguageModel, task: str, depth: float) -> None:
    tokens = 900
    asked = needles.question(task, model, read_ids(model), tokens, depth, 3)
    prompt, answer = (model.tokenizer.decode(ids) for ids in (asked.ids, asked.answer))
    assert len(asked.ids) == tokens
    number = answer.strip()
    assert len(number) == 5
    assert prompt.count(number) == (2 if task == "passkey" else 1)
    assert prompt.rstrip().endswith("is")
    lines = prompt.split("\n")
    where = next(i for i, line in enumerate(lines) if number in line) / len(lines)
    assert where == pytest.approx(depth, abs=0.25 if task == "passkey" else 0.6)
    again = needles.question(task, model, read_ids(model), tokens, depth, 3)
    assert torch.equal(again.ids, asked.ids)
    other = needles.question(task, model, read_ids(model), tokens, depth, 4)
    assert not torch.equal(other.ids, asked.ids)
    assert not torch.equal(other.answer, asked.answer)


def test_an_answer_is_right_where_greedy_decoding_gives_it(model: LanguageModel) -> None:
    asked = needles.question("passkey", model, read_ids(model), TOKENS + 100, 0.5, 0)
    said = model.model.generate(asked.ids[None], max_new_tokens=4, do_sample=False, pad_token_id=0)[0, len(asked.ids) :]
    wrong = [said.clone() for _ in range(4)]
    for place, answer in enumerate(wrong):
        answer[place] = (answer[place] + 1) % 256
    together = [needles.Question(asked.ids, answer, 0.5) for answer in (said, *wrong, said[:2], said[:1], wrong[0][:1])]
    want = [True, False, False, False, False, True, True, False]
    assert needles.answered(model.model, together) == want
    assert [needles.answered(model.model, [one])[0] for one in together] == want


def test_too_short_prompts_are_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"a multikey prompt of 128 tokens takes -[0-9]+ tokens of filler"):
        needles.question("multikey", model, read_ids(model), 128, 0.5, 0)
    with pytest.raises(ValueError, match="unknown task 'haystack': use some of passkey"):
        needles.question("haystack", model, read_ids(model), 128, 0.5, 0)


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stem", "prism", "flashprefill", "proxyattn", "triangle-mix"])
def test_ladders_of_block_methods_grow(model: LanguageModel, name: str) -> None:
    """Bisection takes it for granted; the largest setting is all but dense."""
    seen = capture(model.model, {"input_ids": read_ids(model)[None, :1024]}, "reference")
    least = 1.0
    for ladder in METHODS[name].ladders(seen, None):
        pairs = []
        for i in (0, ladder.length // 2, ladder.length - 1):
            spec = seen.per_layer(ladder.at(i).spec)
            pairs.append(sum(allowed(seen.plan(layer, patterns)) for layer, patterns in spec.items()) / len(spec))
        assert pairs == sorted(pairs)
        assert pairs[-1] == pytest.approx(1, abs=0.01)
        least = min(least, pairs[0])
    assert least < 0.98


def test_a_spec_that_reads_values_runs_as_in_a_patched_model(model: LanguageModel) -> None:
    import mmflex

    ids, spec = read_ids(model)[:700], BlockTopK(2, values=5.0, near=0)
    with sparse(model.model, spec, "reference", {}):
        found = hidden_states(model.model, ids).states
    with torch.no_grad(), mmflex.patched(model.model, spec, backend="reference"):
        want = model.model.model(input_ids=ids[None]).last_hidden_state[0]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


# ---- the whole -------------------------------------------------------------------------------------------------------


def small(model: LanguageModel, **options: Any) -> Report:
    text = tokenized("words", WORDS, model.tokenizer)
    defaults: dict[str, Any] = {
        "methods": ["a-shape", "block-topk"], "lengths": (640,), "densities": (0.97,), "windows": 2, "last": 64,
        "tasks": ("passkey",), "prompts": 4, "depths": 2, "backend": "reference",
    }  # fmt: skip
    return evaluate(model, [text], {"sink": AShape(128, 128)}, **{**defaults, **options})


@pytest.fixture(scope="module")
def report(model: LanguageModel) -> Report:
    return small(model)


def test_an_evaluation_tells_what_it_has_measured_so_far(model: LanguageModel, report: Report) -> None:
    parts: list[Report] = []
    whole = small(model, tasks=("passkey", "tracking"), measured=parts.append)
    assert [(len(part.texts), len(part.needles)) for part in parts] == [(3, 0), (3, 3), (3, 6)]
    assert parts[1].needles == report.needles == whole.needles[:3]


def test_an_evaluation_under_token_masks_is_the_same(model: LanguageModel, report: Report) -> None:
    masked = small(model, backend=trial.MASKED)
    for found, want in zip(masked.texts, report.texts, strict=True):
        assert found.scores.perplexity == pytest.approx(want.scores.perplexity, rel=1e-5)
        assert found.method == replace(want.method, backend=trial.MASKED)
    assert [row.score for row in masked.needles] == [row.score for row in report.needles]


def test_rows_of_a_whole_evaluation(model: LanguageModel, report: Report) -> None:
    assert [row.method.label for row in report.texts] == ["sink", "A-shape", "block top-k"]
    assert report.skipped == ()
    import mmflex

    row = report.texts[0]
    windows = tokenized("words", WORDS, model.tokenizer).windows(640, 2)
    with torch.no_grad():
        dense = model.model(input_ids=windows).logits.double().log_softmax(-1)[:, :-1].numpy()
        with mmflex.patched(model.model, AShape(128, 128), backend="reference"):
            got = model.model(input_ids=windows).logits.double().log_softmax(-1)[:, :-1].numpy()
    targets = windows[:, 1:].numpy()[..., None]
    want = -np.take_along_axis(got, targets, 2)[..., 0]
    kl = (np.exp(dense) * (dense - got)).sum(-1)
    assert row.scores.perplexity == pytest.approx(np.exp(want.mean()), rel=1e-4)
    assert row.by_window == pytest.approx(np.exp(want.mean(1)), rel=1e-4)
    assert row.scores.kl.value == pytest.approx(kl.mean(), rel=1e-3)
    assert row.scores.kl_last.value == pytest.approx(kl[:, -64:].mean(), rel=1e-3)
    assert row.scores.dense == pytest.approx(np.exp(-np.take_along_axis(dense, targets, 2).mean()), rel=1e-4)
    for other in report.texts[1:]:
        assert other.method.target == 0.97
        assert 0.6 < other.method.ran <= 0.97
        assert other.method.planned == pytest.approx(other.method.ran, abs=0.05)
    assert [row.task for row in report.needles] == ["passkey"] * 3
    assert all(row.score.asked == 4 and [d.asked for d in row.depths] == [2, 2] for row in report.needles)


def test_files_and_tables(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.save(path)
    again = Report.load(path)
    assert again.to_json() == report.to_json()
    assert json.loads(path.read_text())["runs"][0]["versions"]["model"] == "LlamaForCausalLM"
    assert len(again.runs[0]["sources"]) == 16
    both = again + again
    assert len(both.texts) == 2 * len(report.texts)
    assert len(both.text_table().rows) == 2 * len(report.texts) + 1
    assert len(again.needle_table().rows) == 3
    path.write_text('{"schema": "other"}')
    with pytest.raises(ValueError, match=r"got \['other', None\], 'mmflex.evaluation.real' of version 1 is needed"):
        Report.load(path)


def test_a_report_prints_its_tables(report: Report) -> None:
    assert repr(report) == "Report(texts: 3, needles: 3)"
    lines, row = str(report).splitlines(), report.texts[0]
    line = next(line for line in lines if " sink " in line)
    for cell in ("words", "640", row.method.setting, f"{row.scores.perplexity:.2f}"):
        assert cell in line  # nothing is folded
    assert sum("needles: right answers" in line for line in lines) == 1
    named = replace(row, text="<b>a & b</b>")
    html = Report((named,), report.needles)._repr_html_()
    assert html.count("<table>") == 2
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in html
    assert html.count("<tr>") == 2 + 2 + 3  # heads; dense and one method; three methods
    assert f">{row.scores.perplexity:.2f}</td>" in html
    assert "needles" not in str(Report(report.texts))
    assert str(Report()) == "Report()"


def test_the_hash_of_sources_does_not_ask_what_is_loaded() -> None:
    """A run that starts without patterns, and finds them by name, names what one with patterns names."""
    code = "import sys; from mmflex.evaluation.real.evaluate import source_digest; before = source_digest(); "
    code += "assert 'mask_builders' not in sys.modules; import mask_builders; print(before, source_digest())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = run.stdout.split()
    assert before == after == source_digest()


def test_an_evaluation_that_was_cut_off_goes_on(
    model: LanguageModel, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def stop(text: str) -> None:
        said.append(text)
        if "window 2" in text and "A-shape" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(model, resume=tmp_path / "kept", progress=stop)
    first = len(said)
    found = small(model, resume=tmp_path / "kept", progress=said.append)
    assert not any("window 1" in text for text in said[first:])
    monkeypatch.setattr("mmflex.evaluation.methods.fit", None)  # what was sized is kept too
    small(model, resume=tmp_path / "kept")
    assert [row.scores for row in found.texts] == [row.scores for row in report.texts]
    assert [row.score for row in found.needles] == [row.score for row in report.needles]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (2048,), "windows": 1}, "2048 tokens are more than the 1024 positions that tiny was trained for"),
        ({"lengths": ()}, "lengths are"),
        ({"densities": (1.5,)}, r"densities are \[1.5\]: use shares"),
        ({"windows": 0}, "windows is 0"),
        ({"tasks": ("haystack",)}, "unknown task 'haystack'"),
        ({"methods": ["magic"]}, "unknown method 'magic'"),
    ],
)
def test_errors(model: LanguageModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(model, **options)


def test_longer_prompts_where_the_user_says_so(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="2048 tokens are more than the 1024 positions"):
        check_context(model, 2048)
    check_context(model, 2048, extend=True)


def test_models_and_texts_from_files(tmp_path: Path, model: LanguageModel) -> None:
    folder = tmp_path / "model"
    model.save(folder)
    found = load(folder)
    assert (found.context, found.model.training, found.model.dtype) == (1024, False, torch.float32)
    file = tmp_path / "words.txt"
    file.write_text(WORDS)
    text = read(f"prose={file}", found.tokenizer)
    assert (text.name, read(str(file), found.tokenizer).name) == ("prose", "words")
    assert torch.equal(text.ids, read_ids(model))
    with pytest.raises(ValueError, match="there is no text file"):
        read("missing.txt", found.tokenizer)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read(str(file), found.tokenizer)
    with pytest.raises(ValueError, match="is no model that transformers can load"):
        load(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        load(tmp_path / "none.gguf")
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\)"):
        load(tmp_path)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    model.model.save_pretrained(place)
    model.tokenizer.save_pretrained(place)
    (place / "words.txt").write_text(WORDS)
    return place


def said(*arguments: str, code: int = 0) -> str:
    from typer.testing import CliRunner

    from mmflex.cli import app

    result = CliRunner(env={"COLUMNS": "220", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, ["eval", *arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    json_file, picture = tmp_path / "real.json", tmp_path / "real.png"
    common = ("--model", str(folder), "--text", f"prose={folder / 'words.txt'}", "--backend", "reference")
    spec = '{"pattern": "AShape", "version": 1, "sink": 128, "local": 128}'
    sizes = ("--lengths", "512", "--windows", "2", "--last", "64", "--methods", "block-topk", "--flops", "0.9")
    needles_ = ("--task", "passkey", "--prompts", "2", "--depths", "1")
    files = ("--json", str(json_file), "--picture", str(picture))
    text = said(spec, *common, *sizes, *needles_, *files)
    for part in ("prose", "block top-k", "AShape(local=128)", "passkey", "window 2 of 2", "of dense's right"):
        assert part in text, text
    report = Report.load(json_file)
    assert (len(report.texts), len(report.needles)) == (2, 2)
    assert picture.stat().st_size > 5000
    again = tmp_path / "both.json"
    said(spec, *common, *sizes, "--add", str(json_file), "--json", str(again))
    assert len(Report.load(again).texts) == 4


def test_tables_are_whole_where_there_is_no_terminal(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from mmflex.cli.real import show

    show(report, Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    first = report.texts[0]
    row = next(line for line in lines if " sink " in line)
    for part in ("words", "640", first.method.setting, f"{first.scores.perplexity:.2f}"):
        assert part in row
    assert sum("KL, last rows" in line and "estimates" in line for line in lines) == 1
    assert f"{len(report.texts) + len(report.needles)} rows in" in lines[-1]


def test_errors_on_the_command_line(folder: Path) -> None:
    words = str(folder / "words.txt")
    assert "give both: --model" in said("--text", words, code=1)
    assert "give both: --model" in said("--model", str(folder), code=1)
    long = said("--model", str(folder), "--text", words, "--lengths", "2048", "--windows", "1", code=1)
    assert "2048 tokens are more than the 1024 positions" in long
    assert "--extend" in long
    assert "there is no folder ./none" in said("--model", "./none", "--text", words, code=1)
    assert "--backend is 'triton', which cannot run here" in said(
        "--model", str(folder), "--text", words, "--backend", "triton", "--device", "cpu", code=1
    )
    assert "there is no text file" in said("--model", str(folder), "--text", "nowhere.txt", code=1)
    assert "unknown task 'v-niah'" in said("--model", str(folder), "--text", words, "--task", "v-niah", code=1)


@pytest.mark.parametrize("methods", [["a-shape", "block-topk"], []])
def test_forwards_are_counted_before_they_run(model: LanguageModel, methods: list[str]) -> None:
    seen: list[int] = []  # tokens of every prompt that is read
    heads: list[int] = []  # rows of logits, by which the inner model is called without reading anything

    def note(module: Any, args: Any, given: dict[str, Any]) -> None:
        ids = given["input_ids"]
        if ids.shape[1] > 64 and given.get("past_key_values") is None:
            (seen if ids.any() else heads).extend([ids.shape[1]] * len(ids))

    hook = model.model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        small(model, methods=methods, windows=3, lengths=(640, 512), tasks=("passkey", "tracking"))
    finally:
        hook.remove()
    settings = Settings((640, 512), (0.97,), 3, 64, ("passkey", "tracking"), 2, 4, 0, "reference")
    found = text_work(settings, 1, 1, len(methods))
    assert [work.tokens for work in found] == [512, 640]
    entries = 1 + len(methods)
    for work in found:
        assert work.dense + work.sparse == seen.count(work.tokens)
        assert work.dense == 1 + 3 + 2 * 4
        assert work.logits == heads.count((work.tokens - 1) % HEAD_ROWS) == 2 * 3 * entries
        assert work.sized == len(methods)


def test_a_dry_run_loads_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is counted and checked from the config, the tokenizer and the texts."""
    from mmflex.cli import estimate
    from mmflex.evaluation import real

    monkeypatch.setattr(real, "load", lambda *args, **options: pytest.fail("weights were loaded"))
    monkeypatch.setattr(estimate, "product_rate", lambda *args: 1e6)
    file, words = tmp_path / "real.json", folder / "words.txt"
    common = ("--model", str(folder), "--text", f"prose={words}", "--device", "cpu", "--dry-run")
    sizes = ("--lengths", "512,640", "--windows", "2", "--task", "passkey", "--prompts", "4", "--flops", "0.5")
    spec = '{"pattern": "AShape", "version": 1, "sink": 128, "local": 128}'
    text = said(spec, *common, *sizes, "--methods", "block-topk,a-shape", "--json", str(file))
    for part in (
        f"{sum(p.numel() for p in load(folder).model.parameters()) / 1e3:.1f}k parameters, 2 layers x 4 heads",
        f"prose ({len(WORDS):,} tokens)", "of every text at 512, 640 tokens: 2 windows, 4 prompts of passkey",
        "as given: AShape(local=128)", "brought to 0.5 of dense attention, at every length: A-shape, block top-k",
        "would run, 512 tokens: 7 dense and at most 18 sparse passes", f"would write: {file}",
    ):  # fmt: skip
        assert part in text, (part, text)
    assert "2 operations for every weight and token" in text
    weights = estimate.weights_of(describe(folder).config)
    inner = tiny().model
    assert weights.body == sum(p.numel() for p in inner.parameters()) - inner.embed_tokens.weight.numel()
    assert weights.head == 256 * 64
    products = 2e-6 * (25 * (512 * weights.body + weights.head) + 12 * 512 * weights.head)
    shown = re.search(r"windows; about ([\d.]+) (s|minutes|hours) would run, 640", text)
    assert shown is not None
    seconds = float(shown[1]) * {"s": 1, "minutes": 60, "hours": 3600}[shown[2]]
    assert seconds == pytest.approx(products, rel=0.06)  # attention takes next to nothing; two digits are shown
    assert not file.exists()
    (tmp_path / "kept").mkdir()
    resumed = (*common, "--lengths", "512", "--resume", str(tmp_path / "kept"))
    assert "less what" not in said(*resumed)
    (tmp_path / "kept" / "a.npy").touch()
    assert f"less what {tmp_path / 'kept'} holds of it" in said(*resumed)
    assert "2048 tokens are more than the 1024 positions" in said(*common, "--lengths", "2048", code=1)
    assert "need 5120: give a longer text" in said(*common, "--lengths", "512", "--windows", "10", code=1)
    assert "a multikey prompt of 128 tokens takes -" in said(*common, "--lengths", "128", "--task", "multikey", code=1)
    assert "unknown method 'magic'" in said(*common, "--lengths", "512", "--methods", "magic", code=1)
    save_config(Config.of(AShape(), 3, 4), tmp_path / "config.json")
    assert "has 3 layers but the model has 2" in said(
        *common, "--lengths", "512", str(tmp_path / "config.json"), code=1
    )


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: Any, letters: list[str]) -> None:
    """A Llama in float32, as llama.cpp's converter writes it: rows of q and k in its order of rotary pairs."""
    gguf = pytest.importorskip("gguf")
    config, state = model.config, {name: t.numpy() for name, t in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters[:-1], letters[1] * 2])  # a byte that no text here has makes room for a merge
    writer.add_token_types([1] * len(letters))
    writer.add_token_merges([f"{letters[1]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    def rotary(weight: np.ndarray, heads: int) -> np.ndarray:
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(config.num_hidden_layers):
        tensors |= {f"blk.{layer}.{short}": f"model.layers.{layer}.{long}" for short, long in parts.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for short, long in tensors.items():
        weight = state[f"{long}.weight"]
        count = heads.get(short.split(".")[-1])
        writer.add_tensor(f"{short}.weight", weight if count is None else np.ascontiguousarray(rotary(weight, count)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_from_a_gguf_file(model: LanguageModel, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    letters = model.tokenizer.convert_ids_to_tokens(list(range(256)))
    write_gguf(tmp_path / "tiny.gguf", model.model, letters)
    ids = read_ids(model)[:100]
    with torch.no_grad():
        want = model.model(input_ids=ids[None]).logits
    for source in (tmp_path / "tiny.gguf", tmp_path):  # a folder with one such file
        found = load(source)
        assert (found.name, found.context, found.model.dtype) == ("tiny", 1024, torch.float32)
        known = describe(source)  # without its weights
        assert (known.name, known.context, known.config.num_hidden_layers) == ("tiny", 1024, 2)
        with torch.no_grad():
            torch.testing.assert_close(found.model(input_ids=ids[None]).logits, want, atol=1e-4, rtol=1e-4)
        assert torch.equal(tokenized("words", WORDS, found.tokenizer).ids, read_ids(model))


def test_what_reading_gguf_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    (tmp_path / "x.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"reading x.gguf needs gguf and accelerate: pip install 'mmflex\[gguf\]'"):
        load(tmp_path / "x.gguf")


def test_errors_of_long_prompts_are_those_of_drawn_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmflex.evaluation import trace

    seen = capture(tiny(), {"input_ids": torch.arange(TOKENS)[None] % 256}, "reference")
    made = seen.plan(1, seen.per_layer(VerticalSlash(16, 128))[1])
    exact = seen.errors(1, made)
    monkeypatch.setattr(trace, "WHOLE_OUTPUT_QUERIES", TOKENS - 1)
    monkeypatch.setattr(trace, "ROWS", TOKENS)
    torch.testing.assert_close(seen.errors(1, made), exact, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(trace, "ROWS", 7)
    rows, want = trace.drawn(TOKENS, 7), made.attend(*(getattr(seen.layers[1], name) for name in "qkv"))
    assert len(set(rows.tolist())) == 7
    off = (want - seen.layers[1].out)[0, :, rows].norm(dim=(1, 2)) / seen.layers[1].out[0, :, rows].norm(dim=(1, 2))
    torch.testing.assert_close(seen.errors(1, made), off, rtol=1e-4, atol=1e-5)


def test_settings_are_sized_on_some_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmflex.evaluation.real import sizing

    monkeypatch.setattr(sizing, "SIZED_LAYERS", 2)
    whole = capture(tiny(num_hidden_layers=4), {"input_ids": torch.arange(TOKENS)[None] % 256}, "reference")
    found = sizing.SampledTrace.of(whole)
    assert (list(found.layers), found.depth) == ([0, 3], 4)
    assert found.density({0: AShape(128, 1)}) == pytest.approx((1 + found.density(AShape(128, 1))) / 2)
    config = Config.of(AShape(128, 1), 4, 4)
    assert found.density(config) == pytest.approx(found.density(AShape(128, 1)))
    monkeypatch.setattr(sizing, "ERROR_ROWS", TOKENS)
    spec = VerticalSlash(16, 128)
    exact = [float(whole.errors(layer, whole.plan(layer, whole.per_layer(spec)[layer])).mean()) for layer in (0, 3)]
    assert found.measure(spec).error == pytest.approx(sum(exact) / 2, rel=1e-4)
