"""`mmflex check`: what its cases cover, that its oracle is right, that it says what is wrong, and how it runs."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from typer.testing import CliRunner

import mmflex
from mmflex import selfcheck
from mmflex.cli import app
from mmflex.runtime import backends
from mmflex.runtime.launches import blocks
from mmflex.runtime.varlen import Segments
from mmflex.selfcheck import cases, lowerings, report, runner, segments, worker
from mmflex.selfcheck.groups import GROUPS
from mmflex.selfcheck.jobs import Job, Options
from mmflex.selfcheck.oracle import token_mask
from mmflex.selfcheck.works import WORKS

torch.set_num_threads(1)

ON_CPU = ("cpu", "dense", "reference")


# ---- what is covered -------------------------------------------------------------------------------------------------


def _on_hopper(name: str, device: str, head_dim: int, dtype: torch.dtype) -> str | None:
    """Stands for `why_not` on a machine with everything."""
    if name == "cpu":
        return "the tensors are on cuda"
    return "half precision" if name == "flash" and dtype == torch.float32 else None


@pytest.mark.parametrize(
    ("device", "names"), [("cpu", ON_CPU), ("cuda", ("flash", "triton", "dense", "reference"))]
)  # fmt: skip
@pytest.mark.parametrize("thorough", [False, True])
def test_every_pair_of_settings_occurs(
    monkeypatch: pytest.MonkeyPatch, device: str, names: tuple[str, ...], thorough: bool
) -> None:
    """Every two settings that can run together do so in some case; few cases, each only once."""
    if device == "cuda":
        monkeypatch.setattr(cases, "why_not", _on_hopper)
    chosen = cases.cases(device, names, thorough)
    assert len({case.name for case in chosen}) == len(chosen)
    assert all(cases.possible(asdict(case), device) for case in chosen)
    occurs = {pair for case in chosen for pair in combinations(asdict(case).items(), 2)}
    dimensions = {"backend": names, **cases.DIMENSIONS}
    for (a, some), (b, others) in combinations(dimensions.items(), 2):
        for x in some:
            for y in others:
                assert ((a, x), (b, y)) in occurs or not cases.possible({a: x, b: y}, device), (x, y)
    triples = {(case.backend, case.work, case.prompt) for case in chosen}
    strong = [(name, work) for name in names for work in WORKS if thorough or name == "reference"]
    strong += [("flash", work) for work in ("blocks", "gathered keys", "both by modality") if "flash" in names]
    for name, work in strong:
        if cases.possible({"backend": name, "work": work}, device):
            assert all((name, work, prompt) in triples for prompt in cases.PROMPTS)
    assert len(chosen) < (600 if thorough else 350)


def test_what_cannot_run_is_no_case() -> None:
    for case in cases.cases("cpu", ON_CPU, True):
        assert not (case.backend == "cpu" and (case.need_lse or case.work == "residues"))
        assert case.backend != "dense" or case.work == "dense"


@pytest.mark.parametrize("names", [("cpu",), ("dense",), ("cpu", "dense")])
def test_some_backends_alone_run_their_cases_of_all(names: tuple[str, ...]) -> None:
    found = cases.cases("cpu", names)
    assert {case.backend for case in found} == set(names)
    assert {case.name for case in cases.cases("cpu", ("reference", *names))} > {case.name for case in found}


def test_kernels_are_few_and_shared() -> None:
    """On a CPU it is compiling that takes the time."""
    chosen = [case for case in cases.cases("cpu", ON_CPU) if case.backend == "cpu"]
    assert len(chosen) <= len(WORKS)
    batches = runner._batches(lowerings.jobs(Options("cpu", ON_CPU)))
    assert max(job.weight for job in batches[0]) >= max(job.weight for job in batches[-1])
    assert sorted(job.name for batch in batches for job in batch) == sorted(
        case.name for case in cases.cases("cpu", ON_CPU)
    )


@pytest.mark.parametrize("memory", cases.MEMORY)
def test_tensors_lie_in_memory_as_said(memory: str) -> None:
    case = cases.Case("reference", "blocks", "plain", "float32", "no lse", memory, "8/2 x 64", "usual")
    q, k, v = cases.tensors(case, "cpu")
    other = cases.tensors(cases.Case(**{**asdict(case), "memory": "heads first"}), "cpu")
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), other, strict=True))
    assert q.is_contiguous() == (memory == "heads first")
    assert q.transpose(1, 2).is_contiguous() == (memory == "tokens first")
    joint = {t.untyped_storage().data_ptr() for t in (q, k, v)}
    assert len(joint) == (1 if memory == "joint" else 3)


# ---- its oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["plain", "padded left", "padded right", "unlike"])
def test_meanings_are_those_of_the_tests_oracle(prompt: str) -> None:
    """Two descriptions in numpy, written apart, agree on every pattern that selects nothing."""
    layout, batch = cases.layout_of(prompt), 2 if "pad" in prompt or prompt == "unlike" else 1
    every = {head[0]: head[1] for work in WORKS.values() for head in work.heads if head[1] is not None}
    heads = {pattern: meaning for pattern, meaning in every.items() if pattern.estimator() is None}
    assert len(heads) >= 11
    queries = np.arange(layout.length)
    masks = token_mask(list(heads.values()), layout, batch, queries)
    for b in range(batch):
        meaning = oracle.Meaning(layout, b, 128, lambda *_: pytest.fail("nothing is selected"))
        causal = oracle.Prompt.of(layout, b).causal()
        for h, pattern in enumerate(heads):
            assert np.array_equal(meaning.pairs(pattern) & causal, masks[b, h]), pattern


# ---- what it says ----------------------------------------------------------------------------------------------------


def run(name: str, **settings: str) -> dict[str, Any]:
    """One case of a work, on the reference backend."""
    usual = {**cases.USUAL, "work": name, "lse": "lse", **settings}
    return worker.result("lowerings", usual, "cpu")


@pytest.mark.parametrize("name", ["gathered keys", "residues", "mixed"])
def test_what_is_right_passes(name: str) -> None:
    row = run(name)
    assert row["verdict"] == "ok", row
    assert 0 < row["error"] <= row["bound"]
    assert row["lse_error"] <= 1e-4
    assert row["blocks"] > 0


def _keys_of_the_first_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch's keys ordered as the first prompt's: what was wrong once for unlike prompts."""
    counted = blocks._counted_from_first_slot

    def first(state: Any, launch: Any) -> Any:
        row, key, base = counted(state, launch)
        return row, key[:1].expand(state.batch, -1), base

    monkeypatch.setattr(blocks, "_counted_from_first_slot", first)


def _lse_in_base_two(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = backends.attend
    monkeypatch.setattr(backends, "attend", lambda *a: (lambda out, lse: (out, lse * 0.6931))(*attend(*a)))


def _sign_of_the_scale_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = mmflex.Plan._attend

    def positive(self: mmflex.Plan, *args: Any) -> Any:
        self.scale = abs(self.scale)
        return attend(self, *args)

    monkeypatch.setattr(mmflex.Plan, "_attend", positive)


def _a_mask_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mask_builders.AShape.mask", lambda self, t: t.local(self.local))


def _a_lowering_that_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmflex.compiler.lower._residues_pay", lambda *_: False)


@pytest.mark.parametrize(
    ("spoil", "settings", "says"),
    [
        (_keys_of_the_first_prompt, {"work": "keys by modality", "prompt": "unlike"}, "pairs|off by"),
        (_lse_in_base_two, {"work": "residues"}, "off by"),
        (_lse_in_base_two, {"work": "blocks"}, "log-sum-exp is off by"),
        (_sign_of_the_scale_lost, {"work": "blocks", "scale": "negative"}, "off by"),
        (_a_mask_that_forgets, {"work": "blocks"}, "token mask differs"),
        (_a_lowering_that_is_not_taken, {"work": "residues"}, r"it needs \['residue-major'\]"),
    ],
)
def test_what_was_wrong_once_is_found(
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pytest.MonkeyPatch], None],
    settings: dict[str, str],
    says: str,
) -> None:
    cases.layout_of.cache_clear()  # programs are kept with layouts
    assert run(settings["work"], **settings)["verdict"] == "ok"
    cases.layout_of.cache_clear()
    spoil(monkeypatch)
    verdict = run(settings["work"], **settings)["verdict"]
    cases.layout_of.cache_clear()
    assert verdict.startswith("WRONG: ")
    assert re.search(says, verdict), verdict


def test_what_is_not_finite_in_a_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU kernel that lets NaN in v reach rows which do not see it."""
    settings = {"backend": "dense", "prompt": "plain", "dtype": "float32"}
    assert worker.result("not finite", settings, "cpu")["verdict"] == "ok"
    monkeypatch.setattr("mmflex.runtime.plan._finite", lambda t: True)  # no care is taken
    assert "which does not see it" in worker.result("not finite", settings, "cpu")["verdict"]


def test_an_exception_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "attend", lambda *a: 1 / 0)
    assert run("blocks")["verdict"].startswith("FAILED: ZeroDivisionError: division by zero (test_check.py:")


# ---- how it runs -----------------------------------------------------------------------------------------------------


def test_a_check_and_its_report(tmp_path: Path) -> None:
    """In processes of their own; the table, the JSON, the command and its status."""
    seen = []
    found = mmflex.check(
        backends=["reference"], only="reference, blocks, plain", workers=1, progress=lambda *at: seen.append(at)
    )
    assert found.ok
    assert [row["work"] for row in found.rows] == ["blocks"]
    assert seen == [(1, 1, found.rows[0])]
    assert {"error", "lse_error", "bound", "launches", "seconds", "kernels"} <= set(found.rows[0])
    assert "1 right, 0 wrong, 0 not run" in str(found)
    path = tmp_path / "check.json"
    arguments = ["check", "--backend", "reference", "--only", "blocks, plain", "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1 right, 0 wrong" in result.output
    data = json.loads(path.read_text())
    assert data["torch"] == torch.__version__
    assert {"device", "python", "triton", "transformers", "flash-attn-4", "seconds", "cores"} <= set(data)
    assert data["source"] == _hash_by_hand()
    assert (data["passed"], data["failed"], len(data["rows"])) == (1, 0, 1)
    rows = [{**found.rows[0], "verdict": verdict} for verdict in ("WRONG: no", "not run: small")]
    wrong = selfcheck.Report(rows, found.facts)
    assert not wrong.ok
    assert "0 right, 1 wrong, 1 not run" in str(wrong)
    assert report.summary(wrong.rows)[0].wrong == 1


def _hash_by_hand() -> str:
    root = Path(mmflex.__file__).resolve().parents[1]
    files = [path for name in ("mmflex", "mask_builders") for path in (root / name).rglob("*.py")]
    text = b"".join(
        path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        for path in sorted(files, key=lambda path: path.relative_to(root).as_posix())
    )
    return hashlib.sha256(text).hexdigest()


def test_the_command_fails_where_a_check_does(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = selfcheck.Report(
        [{"group": "long", "name": "x", "backend": "cpu", "verdict": "WRONG: no", "seconds": 1, "kernels": 0}],
        {"device": "d", "source": "0" * 64, "seconds": 1.0},
    )
    monkeypatch.setattr(selfcheck, "check", lambda **_: bad)
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 1
    assert "long: x" in result.output
    assert "WRONG: no" in result.output


def test_a_process_that_dies_fails_its_check_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next check gets a new process."""
    begun = runner._Process._begun
    first = iter([True])

    def dies_once(self: Any) -> Any:
        if next(first, False):
            monkeypatch.setattr(sys, "executable", "/bin/false")
            process = begun(self)
            monkeypatch.undo()
            return process
        return begun(self)

    monkeypatch.setattr(runner._Process, "_begun", dies_once)
    settings = [{**cases.USUAL, "work": "nothing", "prompt": prompt} for prompt in ("plain", "chunk")]
    jobs = [Job("lowerings", s["prompt"], s, "one process") for s in settings]
    rows = runner._run([jobs], 1, "cpu", 2, None)
    assert rows[0]["verdict"].startswith("FAILED: its process ended with status 1")
    assert rows[1]["verdict"] == "ok"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"backends": ["triton"], "device": "cpu"}, "'triton' cannot run here"),
        ({"backends": ["fast"]}, "unknown backend 'fast'"),
        ({"only": "no such thing"}, "names no check"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=error):
        mmflex.check(**options)


def test_segments_that_see_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"way": "sdpa", "lengths": "windows", "dtype": "float32"}
    assert worker.result("segments", settings, "cpu")["verdict"] == "ok"
    real = segments.varlen_attention

    def pairs_of_windows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cut: Segments, **how: Any) -> torch.Tensor:
        return real(q, k, v, Segments(cut.starts[::2]), **how)

    monkeypatch.setattr(segments, "varlen_attention", pairs_of_windows)
    assert "WRONG: attention within segments is" in worker.result("segments", settings, "cpu")["verdict"]

    def spilling(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cut: Segments, **how: Any) -> torch.Tensor:
        return real(q, k, v, cut, **how) + 0.0 * v.sum()

    monkeypatch.setattr(segments, "varlen_attention", spilling)
    assert "WRONG: a NaN in v of token 64" in worker.result("segments", settings, "cpu")["verdict"]


def test_groups_hand_out_jobs_that_travel() -> None:
    """Settings are JSON, names are unique, and every backend of a GPU has its long prompts and calls in a row."""
    for options in (Options("cpu", ON_CPU), Options("cuda", ("flash", "triton", "dense", "reference"), long=True)):
        for name, group in GROUPS.items():
            if name == "lowerings" and options.device == "cuda":
                continue
            jobs = group.jobs(options)
            assert jobs, name
            assert len({job.name for job in jobs}) == len(jobs)
            assert all(json.loads(json.dumps(job.settings)) == job.settings for job in jobs)
            if options.device == "cuda" and name in ("long", "in a row"):
                assert {job.settings["backend"] for job in jobs} == {"flash", "triton"}
    assert any(job.settings["tokens"] == 1 << 20 for job in GROUPS["long"].jobs(options))
