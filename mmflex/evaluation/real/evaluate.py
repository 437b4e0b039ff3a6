"""Does a sparse model predict and answer as the dense one does? On real weights and real text.

For every text and length: methods are brought to their densities on the dense model's queries and keys of the text's
first window; then every window is read dense and by every method, and the predictions of all rows are compared. Needle
tasks are asked in the same text, of the same settings.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...integrations.predictions import Hidden, log_probabilities, portions
from ...integrations.trial import default_backend, planning_backend, sparse
from ...tuning.config import Config, Spec
from .. import methods as table
from ..evaluate import versions
from ..methods import SEARCHED
from ..report import Score
from ..trace import Trace, capture
from .model import LanguageModel, Reader, check_context, hidden_states, logits
from .needles import TASKS, answered, question
from .progress import Progress
from .report import Method, NeedleRow, Report, TextRow
from .score import compare, summarise
from .sizing import Entry, Sizing
from .text import Text

PROMPTS_AT_ONCE = 16
"""Needle prompts of a forward on a GPU: planning takes the host as long for one."""

TOKENS_AT_ONCE = 1 << 15
"""Tokens of these prompts together: plans and masks of 16 prompts of 6k tokens take 35 GB."""

DENSE_SCORES = 1 << 29
"""Scores of a layer that the dense model may hold in a forward with needles: SDPA keeps all of them in float32 where
heads share keys, and a few times."""


@dataclass(frozen=True)
class Settings:
    """What to evaluate; fields as the arguments of `evaluate`. ValueError for what cannot be."""

    lengths: tuple[int, ...]
    densities: tuple[float, ...]
    windows: int
    last: int
    tasks: tuple[str, ...]
    depths: int
    prompts: int
    seed: int
    backend: str

    def __post_init__(self) -> None:
        for name in ("windows", "last", "depths", "prompts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}: use a whole number, 1 or more")
        if not self.lengths or any(not isinstance(n, int) or n < 64 for n in self.lengths):
            raise ValueError(f"lengths are {list(self.lengths)}: use one or more numbers of tokens, 64 or more")
        if not self.densities or any(not 0 < share < 1 for share in self.densities):
            raise ValueError(f"densities are {list(self.densities)}: use shares of dense attention between 0 and 1")
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"unknown task {', '.join(map(repr, unknown))}: use some of {', '.join(TASKS)}")


def evaluate(
    model: LanguageModel,
    texts: Sequence[Text],
    specs: Mapping[str, Spec | Config] | None = None,
    *,
    methods: str | Sequence[str] = "all",
    config: Config | None = None,
    lengths: Sequence[int] = (4096,),
    densities: Sequence[float] = (0.3, 0.5),
    windows: int = 3,
    last: int = 512,
    tasks: Sequence[str] = (),
    depths: int = 5,
    prompts: int = 20,
    seed: int = 0,
    backend: str = "auto",
    extend: bool = False,
    resume: Path | None = None,
    progress: Callable[[str], None] | None = None,
    measured: Callable[[Report], None] | None = None,
) -> Report:
    """Perplexity, KL to dense, agreement and needles of specs and methods, beside their density, on a model's own text.

    Args:
        model: from `load`.
        texts: from `read`, each long enough for its windows.
        specs: specs or configs to run as they are, ``{name: spec}``.
        methods: names of `mmflex.evaluation.methods.METHODS`, "all", or an empty list.
        config: a searched config, for the methods that resize one; it also runs as it is.
        lengths: tokens of a window, and of a needle prompt.
        densities: shares of dense attention (pairs in computed blocks over causal pairs) that methods are brought to.
        windows: of each text, without overlap.
        last: rows at the end of a window whose KL is reported beside that of all.
        tasks: needle tasks, of `TASKS`; asked in every text at every length.
        depths, prompts: depths of the needle, and prompts (spread over the depths) of each task, text and length.
        seed: of the needles.
        backend: as in `mmflex.attention`; "auto" is one that never runs a spec dense; "masked": SDPA under the token
            mask of each plan, which compiles nothing (`integrations.trial.MASKED`).
        extend: allow prompts longer than the model was trained for.
        resume: a folder in which what is measured is kept, and from which an evaluation that was cut off goes on.
        progress: is told in a few words what comes next.
        measured: is given the report so far after every text and length, and each of its tasks.

    Raises:
        ValueError: arguments that cannot be; a length beyond the model's; a text too short; a spec of another number of
            layers or heads. RuntimeError: a layer would run dense although its spec asks for less.
    """
    settings = Settings(
        tuple(sorted(set(lengths))), tuple(densities), windows, last, tuple(tasks), depths, prompts, seed, backend
    )
    check_prompts(model, texts, settings, extend)
    wanted = [m for m in table.chosen(methods) if m.name != "dense"] if methods else []
    given = dict(specs or {})
    if config is not None:
        given = {SEARCHED: config, **given}
    kept = Progress(resume)
    run = _Run(model, settings, kept, progress or (lambda text: None))
    report = Report()
    for tokens in settings.lengths:
        sizing = Sizing(wanted, given, config, settings.densities, kept)
        for text in texts:
            before = report
            for cell in run.cell(text, tokens, sizing):
                skipped = tuple(dict.fromkeys(before.skipped + tuple(sizing.skipped)))
                rows = before.texts + cell.texts, before.needles + cell.needles
                report = Report(*rows, skipped, (run.about(texts, wanted, given),))
                if measured is not None:
                    measured(report)
    return report


def check_prompts(model: Reader, texts: Sequence[Text], settings: Settings, extend: bool) -> None:
    """ValueError for no text, and for lengths that the model, a text or the question of a task is not made for."""
    if not texts:
        raise ValueError("there is no text: give at least one")
    for tokens in settings.lengths:
        check_context(model, tokens, extend)
        for text in texts:
            filler = text.windows(tokens, settings.windows)[0]
            for task in settings.tasks:
                question(task, model, filler, tokens, 0.5, settings.seed)


@dataclass(eq=False)
class _Run:
    """An evaluation under way."""

    model: LanguageModel
    settings: Settings
    kept: Progress
    progress: Callable[[str], None]

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.sources = source_digest()
        self.heads = int(self.model.model.config.get_text_config(decoder=True).num_attention_heads)

    def cell(self, text: Text, tokens: int, sizing: Sizing) -> Iterator[Report]:
        """One text at one length, as far as it is known: all entries on all windows, then each needle task besides."""
        s, where = self.settings, f"{text.name}, {tokens} tokens"
        self.progress(f"{where}: sizing")
        windows = text.windows(tokens, s.windows)

        def trace() -> Trace:
            backend = planning_backend(self.backend(tokens))
            return capture(self.model.model, {"input_ids": windows[:1].to(self.model.device)}, backend)

        entries = sizing.entries(trace, text.name, *self.key(text, tokens, None))
        gc.collect()  # queries, keys and values of all layers
        layouts: dict[str, Any] = {}
        rows = [self.window(text, i, windows[i], entries, layouts) for i in range(len(windows))]
        found = []
        for number, entry in enumerate(entries):
            scores = [window[number][0] for window in rows]
            ran = np.mean([window[number][1] for window in rows], axis=0)
            perplexities = tuple(float(np.exp(score[0].mean())) for score in scores)
            summary = summarise(scores, s.last)
            method = self.method(entry, ran, self.backend(tokens))
            found.append(TextRow(text.name, tokens, s.windows, method, summary, perplexities))
        yield Report(tuple(found))
        needles: list[NeedleRow] = []
        for task in s.tasks:
            needles += self.needles(task, text, tokens, entries, layouts)
            yield Report(tuple(found), tuple(needles))

    def key(self, text: Text, tokens: int, entry: Entry | None, *more: Any) -> tuple[Any, ...]:
        """What a measurement depends on."""
        spec = None if entry is None else [entry.label, entry.setting, _spec_key(entry.spec)]
        model = self.model.name, self.model.device.type, str(self.model.model.dtype), self.sources
        return (*model, text.digest, tokens, self.backend(tokens), spec, *more)

    def method(self, entry: Entry, ran: Any, backend: str) -> Method:
        return Method(
            entry.method, entry.label, entry.setting, entry.target, entry.over, entry.planned, entry.error,
            float(ran[0]), float(ran[1]), backend,
        )  # fmt: skip

    def backend(self, tokens: int, many: bool = False) -> str:
        """The backend of a length."""
        if self.settings.backend != "auto":
            return self.settings.backend
        return default_backend(self.model.device, self.heads, tokens, many)

    # ---- text ------------------------------------------------------------------------------------------------------

    def window(
        self, text: Text, number: int, ids: Tensor, entries: Sequence[Entry], layouts: dict[str, Any]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of every entry: float64 [4, rows] as `compare`, and [density, estimates]."""
        keys = [self.key(text, len(ids), entry, "window", self.settings.windows, number) for entry in entries]
        missing = [i for i, key in enumerate(keys) if self.kept.get("scores", *key) is None]
        if missing:
            where = f"{text.name}, {len(ids)} tokens, window {number + 1} of {self.settings.windows}"
            self.progress(f"{where}: dense")
            dense = hidden_states(self.model.model, ids)
            for i in missing:
                self.progress(f"{where}: {entries[i].label} {entries[i].setting}")
                with sparse(self.model.model, entries[i].spec, self.backend(len(ids)), layouts) as ran:
                    states = hidden_states(self.model.model, ids)
                self.kept.put(np.array(ran.mean()), "ran", *keys[i])
                self.kept.put(self.compared(ids, dense, states), "scores", *keys[i])
        return [(self._kept("scores", key), self._kept("ran", key)) for key in keys]

    def _kept(self, kind: str, key: tuple[Any, ...]) -> np.ndarray:
        array = self.kept.get(kind, *key)
        assert array is not None
        return array

    def compared(self, ids: Tensor, dense: Hidden, other: Hidden) -> np.ndarray:
        """float64 [4, rows], as `compare`. The dense logits are made again for every entry: so each is kept at once."""
        model, targets = self.model.model, ids.to(dense.states.device)[1:]
        parts = []
        for part in portions(len(targets)):
            want, got = (log_probabilities(logits(model, of, part.start, part.stop)) for of in (dense, other))
            parts.append(compare(want, got, targets[part]).cpu())
        return torch.cat(parts, dim=1).numpy()

    # ---- needles ---------------------------------------------------------------------------------------------------

    def needles(
        self, task: str, text: Text, tokens: int, entries: Sequence[Entry], layouts: dict[str, Any]
    ) -> list[NeedleRow]:
        """A task's row for every entry."""
        s = self.settings
        fillers = text.windows(tokens, min(s.windows, len(text.ids) // tokens))
        asked = []
        for number in range(s.prompts):
            depth = (number % s.depths + 0.5) / s.depths
            filler = fillers[number // s.depths % len(fillers)]
            asked.append(question(task, self.model, filler, tokens, depth, s.seed + number))
        bins = [number % s.depths for number in range(s.prompts)]
        dense = self.answers(task, text, tokens, asked, None, layouts)[0]
        rows = []
        for entry in entries:
            right, ran = self.answers(task, text, tokens, asked, entry, layouts)
            pairs = list(zip(dense, right, strict=True))
            by_depth = [Score.of(a for a, b in zip(right, bins, strict=True) if b == i) for i in range(s.depths)]
            method = self.method(entry, ran, self.backend(tokens, many=True))
            rows.append(
                NeedleRow(
                    task, text.name, tokens, method, Score.of(right), Score.of(dense),
                    Score.of(a for d, a in pairs if d), sum(a and not d for d, a in pairs), tuple(by_depth),
                )
            )  # fmt: skip
        return rows

    def answers(
        self, task: str, text: Text, tokens: int, asked: Sequence[Any], entry: Entry | None, layouts: dict[str, Any]
    ) -> tuple[list[bool], np.ndarray]:
        """Whether each question is answered, by the dense model (``entry`` None) or an entry; its [density,
        estimates]."""
        s, name = self.settings, "dense" if entry is None else f"{entry.label} {entry.setting}"
        batch = self.at_once(tokens, entry)
        found: list[bool] = []
        shares = []
        for first in range(0, len(asked), batch):
            some = asked[first : first + batch]
            key = self.key(text, tokens, entry, "needle", task, first, len(some), s.depths, s.windows, s.seed)
            known = self.kept.get(*key)
            if known is None:
                self.progress(f"{text.name}, {tokens} tokens, {task} {first + 1} of {len(asked)}: {name}")
                if entry is None:
                    known = np.array([1.0, 0.0, *answered(self.model.model, some)])
                else:
                    with sparse(self.model.model, entry.spec, self.backend(tokens, many=True), layouts) as ran:
                        answers = answered(self.model.model, some)
                    known = np.array([*ran.mean(), *answers])
                self.kept.put(known, *key)
            found += known[2:].astype(bool).tolist()
            shares.append(known[:2])
        return found, np.mean(shares, axis=0)

    def at_once(self, tokens: int, entry: Entry | None) -> int:
        """Prompts of a forward."""
        if self.model.device.type != "cuda":
            return 1
        fit = TOKENS_AT_ONCE // tokens if entry else DENSE_SCORES // (self.heads * tokens**2)
        return max(1, min(PROMPTS_AT_ONCE, fit))

    # ---- about the run ---------------------------------------------------------------------------------------------

    def about(self, texts: Sequence[Text], methods: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """What is kept of a run, as JSON data."""
        found = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self.settings).items()}
        found |= {"model": self.model.name, "methods": [m.name for m in methods], "given": list(given)}
        found |= {"texts": {t.name: {"tokens": len(t.ids), "digest": t.digest} for t in texts}}
        found |= {"sources": self.sources, "versions": versions(self.model.model)}
        return {**found, "seconds": round(time.perf_counter() - self.started, 1)}


def _spec_key(spec: Any) -> Any:
    """A spec as JSON data."""
    if isinstance(spec, Config):
        return {str(layer): [p.to_json() for p in heads] for layer, heads in sorted(spec.patterns.items())}
    if hasattr(spec, "to_json"):
        return spec.to_json()
    if isinstance(spec, Mapping):
        return {str(layer): _spec_key(part) for layer, part in spec.items()}
    return [_spec_key(part) for part in spec]


def source_digest() -> str:
    """A hash of what decides the figures, so that a result names what ran: the compiler, the runtime, and the packages
    of the patterns that are installed."""
    root = Path(__file__).parents[2]
    folders = {root / name for name in ("ir", "compiler", "runtime")}
    for package in {point.module.partition(".")[0] for point in entry_points(group="mmflex.patterns")}:
        spec = find_spec(package)
        if spec is not None:
            folders |= {Path(folder) for folder in spec.submodule_search_locations or ()}
    digest = hashlib.sha256()
    for path in sorted((p for folder in folders for p in folder.rglob("*.py")), key=lambda p: (p.parent.name, p.name)):
        digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
