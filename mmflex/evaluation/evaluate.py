"""Does a sparse model answer as the dense one does? Prompts with needles, every method at the same FLOPs.

For every task, length and seed: every method is brought to the target on the dense model's queries and keys of the
seed's first prompt, because frames, and with them densities, differ from seed to seed. What a method may decide but for
its size (`methods.choose`, `Method.prepare`) it decides on a sample prompt of another seed. Then the seed's prompts are
answered dense and by every method, through `mmflex.patch`. A layer that would run its own attention although its spec
asks for less is an error, and the density of what ran is read from plans on the very queries and keys; of the first
prompts the output is compared with that of the plan, too.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..integrations.transformers import DenseFallback, patched
from ..integrations.trial import EAGER_SCORES
from ..runtime.attention import plan
from ..runtime.backends import BACKENDS
from ..runtime.kernels.lists import listed_eagerly
from ..tuning.config import Config, Spec
from . import methods as table
from .answers import Answers, split
from .methods import Fitted, Method, Setting
from .report import Report, Row, Skipped
from .samples import Prompts, prompts
from .trace import Measured, Seen, Trace, capture, logits_at, relative, watched

__all__ = ["Report", "evaluate"]

SCORES_AT_ONCE = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Scores of a layer that the eager backend holds at a time: 0.25 and 4 GB in float32, about six times over."""

SAME = 0.01
"""A plan that is made again must give a layer's output to this relative error: rounding, in half precision."""

Make = Callable[..., Prompts]


@dataclass(frozen=True)
class Entry:
    """A row of one task and length: a method and its target. ``fit``: its setting on a prompt."""

    name: str
    label: str
    target: float | None
    fit: Callable[[Trace], Fitted]


@dataclass(frozen=True)
class Settings:
    """What to evaluate; fields as the arguments of `evaluate`. ValueError for what cannot be."""

    lengths: tuple[int, ...]
    flops: tuple[float, ...]
    sweep: int
    depths: int
    prompts: int
    questions: int
    seeds: int
    first_seed: int
    backend: str

    def __post_init__(self) -> None:
        for name in ("depths", "prompts", "questions", "seeds", "first_seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}: use a whole number, 1 or more")
        if not self.lengths or any(not isinstance(n, int) or n < 256 for n in self.lengths):
            raise ValueError(f"lengths are {list(self.lengths)}: use one or more numbers of tokens, 256 or more")
        if not self.flops or any(not 0 < share < 1 for share in self.flops):
            raise ValueError(f"flops are {list(self.flops)}: use shares of dense attention between 0 and 1")
        known = ("auto", *(name for name in BACKENDS if name != "dense"))
        if self.backend not in known:
            raise ValueError(f"backend is {self.backend!r}: the specs themselves must run, so use one of {known}")
        if self.sweep not in self.lengths:
            raise ValueError(f"sweep is {self.sweep}: use one of the lengths {list(self.lengths)}")

    def targets(self, tokens: int) -> tuple[float, ...]:
        """All targets at the length of the sweep; elsewhere the largest."""
        return tuple(sorted(self.flops)) if tokens == self.sweep else (max(self.flops),)

    def numbers(self) -> list[int]:
        """The seeds of the prompts."""
        return list(range(self.first_seed, self.first_seed + self.seeds))

    @property
    def sample(self) -> int:
        """The seed of the sample prompts: the one before the first."""
        return self.first_seed - 1


def evaluate(
    model: Any,
    spec: Spec | Config | Mapping[str, Spec | Config] | None = None,
    task: str | Sequence[str] = "v-niah",
    *,
    lengths: Sequence[int] = (1024, 2048, 4096),
    methods: str | Sequence[str] = "all",
    config: Config | None = None,
    flops: Sequence[float] = (0.15, 0.25, 0.4),
    sweep: int | None = None,
    depths: int = 5,
    prompts: int = 8,
    questions: int = 8,
    seeds: int = 3,
    first_seed: int = 1000,
    backend: str = "auto",
    make_prompts: Make | None = None,
    progress: Callable[[str], None] | None = None,
    found: Callable[[Report], None] | None = None,
) -> Report:
    """Accuracy, attention FLOPs and output error of specs and methods on needle tasks, beside the dense model's.

    Args:
        model: a transformers model that reads the tasks' prompts, in eval mode, on any device.
        spec: a spec or config to run as it is, or several as ``{name: spec}``; None for the methods alone.
        task: one or more of `mmflex.evaluation.samples.TASKS`.
        lengths: tokens of a prompt.
        methods: names of `mmflex.evaluation.methods.METHODS`, "all", or an empty list.
        config: a searched config, for the methods "mminference" and "mminference-intra"; it also runs as it is.
        flops: shares of dense attention (pairs in computed blocks over causal pairs) that methods are brought to: all
            of them at length ``sweep`` (the longest, if None), the largest at the others.
        depths: into how many parts of the prompt the needles are sorted.
        prompts, questions: a seed's prompts, and questions in each.
        seeds, first_seed: how many seeds, and the first. The sample prompt has the seed before the first.
        backend: as in `mmflex.patch`, but "auto" never runs a spec dense: it is "reference" for prompts that fit
            (`EAGER_SCORES`), else "triton" or "cpu".
        make_prompts: another source of prompts, called as `mmflex.evaluation.samples.prompts`.
        progress: is told in a few words what comes next.
        found: is given the report so far after every length of a task.

    Raises:
        ValueError: arguments that cannot be, or a spec of another number of layers or heads; both are named.
        RuntimeError: a layer would run dense although its spec asks for less.
    """
    tasks = [task] if isinstance(task, str) else list(task)
    ordered = tuple(sorted(set(lengths)))
    settings = Settings(
        ordered, tuple(flops), max(ordered, default=0) if sweep is None else sweep, depths, prompts, questions, seeds,
        first_seed, backend,
    )  # fmt: skip
    wanted = [m for m in table.chosen(methods) if m.name != "dense"] if methods else []
    given = _named(spec)
    if config is not None:
        given = {table.SEARCHED: config, **given}
    run = _Run(model, settings, wanted, given, config, make_prompts or _prompts, progress or (lambda text: None))
    rows: list[Row] = []
    report = Report((), (), (run.about(tasks),))
    for name in tasks:
        for tokens in ordered:
            rows += run.cell(name, tokens, run.backend(tokens))
            report = Report(tuple(rows), tuple(dict.fromkeys(run.skipped)), (run.about(tasks),))
            if found is not None:
                found(report)
    return report


def _prompts(*args: Any, **kwargs: Any) -> Prompts:
    return prompts(*args, **kwargs)


def _named(spec: Any) -> dict[str, Any]:
    if spec is None:
        return {}
    if isinstance(spec, Mapping) and spec and all(isinstance(name, str) for name in spec):
        return dict(spec)
    label = (spec.model or "config") if isinstance(spec, Config) else str(spec) if hasattr(spec, "mask") else "spec"
    return {label: spec}


@dataclass(eq=False)
class _Run:
    """An evaluation under way."""

    model: Any
    settings: Settings
    methods: list[Method]
    given: Mapping[str, Spec | Config]
    config: Config | None
    make: Make
    progress: Callable[[str], None]

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.skipped: list[Skipped] = []
        if self.model.training:
            raise ValueError(f"{type(self.model).__name__} is in training mode: call model.eval() first")
        self.device = next(self.model.parameters()).device

    def prompts(self, task: str, tokens: int, batch: int, seed: int) -> Prompts:
        questions = self.settings.questions
        return self.make(task, tokens, batch=batch, questions=questions, seed=seed, device=self.device)

    # ---- one task at one length ------------------------------------------------------------------------------------

    def cell(self, task: str, tokens: int, backend: str) -> list[Row]:
        """Dense, what was given, and every method at its targets."""
        try:
            with listed_eagerly() if backend == "reference" else nullcontext():
                return self._cell(task, tokens, backend)
        except torch.OutOfMemoryError:
            if self.settings.backend != "auto" or backend != "reference":
                raise
        torch.cuda.empty_cache()
        return self._cell(task, tokens, "triton")

    def _cell(self, task: str, tokens: int, backend: str) -> list[Row]:
        s = self.settings
        self.progress(f"{task}, {tokens} tokens: sizing")
        entries = self.entries(task, capture(self.model, self.prompts(task, tokens, 1, s.sample).inputs, backend))
        batch = 1  # kernels are compiled for a batch size, and those of sizing for one prompt
        if backend == "reference":
            at_once = SCORES_AT_ONCE.get(self.device.type, 1 << 26)
            batch = max(1, min(s.prompts, at_once // (_heads(self.model) * tokens**2)))
        dense, found = Answers(s.depths), [Answers(s.depths) for _ in entries]
        shared: dict[str, Any] = {}
        for seed in s.numbers():
            self.progress(f"{task}, {tokens} tokens, seed {seed}: sizing")
            asked = self.prompts(task, tokens, s.prompts, seed)
            trace = capture(self.model, split(asked, 1)[0].inputs, backend)
            for entry, answers in zip(entries, found, strict=True):
                answers.fitted.append(entry.fit(trace))
            del trace
            parts = split(asked, batch)
            dense.fitted.append(Fitted(Setting("-", {}), Measured(1.0, 1.0, 0.0), False))
            dense.ran.append(1.0)
            for part in parts:
                dense.add(part, logits_at(self.model, part.inputs, part.rows), seed)
            known: dict[tuple[str, str], tuple[list[Tensor], float]] = {}  # targets may end at one setting
            for entry, answers in zip(entries, found, strict=True):
                setting = answers.fitted[-1].setting
                key = entry.name, setting.text
                if key not in known:
                    self.progress(f"{task}, {tokens} tokens, seed {seed}: {entry.label}")
                    check = seed == s.first_seed
                    known[key] = self.forward(parts, setting.spec, backend, shared, check)
                for part, logits in zip(parts, known[key][0], strict=True):
                    answers.add(part, logits, seed)
                answers.ran.append(known[key][1])
        where: dict[str, Any] = {"task": task, "tokens": tokens}
        rows = [dense.row(dense, method="dense", label="dense", target=None, backend="own", **where)]
        for entry, answers in zip(entries, found, strict=True):
            named: dict[str, Any] = {"method": entry.name, "label": entry.label, "target": entry.target}
            rows.append(answers.row(dense, backend=backend, **named, **where))
        return rows

    def backend(self, tokens: int) -> str:
        """The backend of a length; never one that may trade a spec for dense attention."""
        if self.settings.backend != "auto":
            return self.settings.backend
        if _heads(self.model) * tokens**2 <= EAGER_SCORES.get(self.device.type, 1 << 27):
            return "reference"
        return "triton" if self.device.type == "cuda" else "cpu"

    def entries(self, task: str, sample: Trace) -> list[Entry]:
        """What runs on a task at a length. What cannot, is noted, or an error if the user gave it as a spec."""
        found = []
        for name, spec in self.given.items():
            try:
                sample.density(spec)
                found.append(Entry(name, name, None, partial(_as_given, spec)))
            except ValueError as error:
                if spec is not self.config:
                    raise ValueError(f"{name} can't run on {task}, {sample.tokens} tokens: {error}") from error
                self.skipped.append(Skipped(name, task, str(error)))
        for method in self.methods:
            try:
                config = method.prepare(sample, self.config)
                ladders = method.ladders(sample, config)
                numbers = {t: table.choose(ladders, t, sample) for t in self.settings.targets(sample.tokens)}
                sample.density(ladders[0].at(0).spec)
            except ValueError as error:
                self.skipped.append(Skipped(method.name, task, str(error)))
                continue
            for target, number in numbers.items():
                fit = partial(_sized, method, config, target, number)
                found.append(Entry(method.name, method.label, target, fit))
        return found

    def forward(
        self, parts: list[Prompts], spec: Any, backend: str, shared: dict[str, Any], check: bool
    ) -> tuple[list[Tensor], float]:
        """Logits at the questions, and the density of what ran in the first part. ``check``: there, layers' outputs
        are compared with those of plans made again."""
        densities: list[float] = []
        logits: list[Tensor] = []

        def read(call: Seen) -> None:
            if call.patterns is None:
                densities.append(1.0)
                return
            made = plan(
                call.q, call.k, call.patterns, layout=call.layout, scale=call.scale, backend=backend, v=call.v
            )  # fmt: skip
            densities.append(made.density.total)
            if check:
                off = float(relative(made.attend(call.q, call.k, call.v), call.out))
                if not off <= SAME:
                    raise RuntimeError(f"layer {call.layer} did not run its plan: its output is {off:.2g} off")

        with warnings.catch_warnings():
            warnings.simplefilter("error", DenseFallback)
            try:
                with patched(self.model, spec, backend=backend, fuse=False):  # watched layers do not compile
                    # Programs are kept with their layout, so all patches of a cell share theirs.
                    vars(self.model)["_mmflex_patch"].prompt.recent = shared
                    for i, part in enumerate(parts):
                        with nullcontext() if i else watched(read):
                            logits.append(logits_at(self.model, part.inputs, part.rows))
            except DenseFallback as error:
                raise RuntimeError(f"this evaluation would not be of the spec: {error}") from error
        return logits, sum(densities) / len(densities)

    def about(self, tasks: list[str]) -> dict[str, Any]:
        """What is kept of a run, as JSON data."""
        found = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self.settings).items()}
        found |= {"tasks": tasks, "seeds": self.settings.numbers(), "sample_seed": self.settings.sample}
        seconds = round(time.perf_counter() - self.started, 1)
        return {**found, "seconds": seconds, "versions": versions(self.model)}


def _as_given(spec: Any, trace: Trace) -> Fitted:
    return Fitted(Setting(_text(spec), spec), trace.measure(spec), False)


def _sized(method: Method, config: Config | None, target: float, number: int, trace: Trace) -> Fitted:
    return table.fit(method.ladders(trace, config)[number], target, trace)


def _heads(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).num_attention_heads)


def _text(spec: Spec | Config) -> str:
    if isinstance(spec, Config):
        return "as searched"
    return str(spec) if hasattr(spec, "mask") else "as given"


def versions(model: Any) -> dict[str, str]:
    """What a result is measured with: packages, device, dtype and class of the model."""
    import transformers

    from ..version import __version__

    parameter = next(model.parameters())
    device = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else platform.processor() or "CPU"
    return {
        "mmflex": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "model": type(model).__name__,
    }
