"""`mmflex.search`: which pattern each head of a model gets, found on one calibration prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmflex.compiler.constants import device_name
from mmflex.ir.layout import TokenLayout
from mmflex.ir.pattern import Pattern
from mmflex.runtime.calls import TILE
from mmflex.tuning import candidates as table
from mmflex.tuning.budget import Budget, Option, allocate
from mmflex.tuning.checkpoint import Checkpoint, Done, Header, digest
from mmflex.tuning.config import Config
from mmflex.tuning.probe import Layer
from mmflex.tuning.rows import LAST_QUERIES, Rows
from mmflex.tuning.search import Search, Settings
from mmflex.version import __version__

from .comparison import RIVALS, Contender, compare, rivals_of
from .progress import LayerProgress, say

Given = Layer | tuple[int, str]
"""A layer, or the number of one that keeps the model's own attention and why."""


@dataclass(eq=False)
class _Source:
    """Where layers come from.

    Attributes:
        name: of the model. model, sample: hashes. layers: how many the model has (None: as many as come).
        heads: query heads of all layers (None: not known ahead).
        wanted: numbers of the layers with attention, where known.
        objective: "answers" or "outputs", as in `search`.
    """

    name: str
    model: str
    sample: str
    layers: int | None
    heads: int | None
    wanted: tuple[int, ...] | None
    objective: str = "outputs"

    def run(self) -> Iterator[Given]:
        raise NotImplementedError


class _Model(_Source):
    def __init__(self, model: nn.Module, sample: Any, layout: TokenLayout | None, objective: str) -> None:
        from .capture import tokens_of
        from .transformers import _language_model

        self.root: nn.Module = getattr(model, "_orig_mod", model)
        self.given, self.layout = sample, layout
        tokens_of(sample)
        config, _, _, modules = _language_model(self.root)
        layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
        weights = [p for _, p in sorted(self.root.named_parameters())]
        name = str(getattr(self.root.config, "_name_or_path", "") or type(self.root).__name__)
        shown = sample if isinstance(sample, Tensor) else {k: v for k, v in sample.items() if isinstance(v, Tensor)}
        super().__init__(
            name,
            digest(type(self.root).__name__, *(w.flatten()[:: max(1, w.numel() // 16)][:16] for w in weights)),
            digest(shown, "" if layout is None else layout.fingerprint),
            layers,
            heads * len(modules),
            tuple(sorted({int(module.layer_idx) for module in modules})),  # type: ignore[arg-type]
            objective,
        )

    def run(self) -> Iterator[Given]:
        from .capture import capture, check_model

        check_model(self.root)  # before gradients are taken for nothing
        weights = self.importance()
        with closing(capture(self.root, self.given, layout=self.layout)) as layers:
            for given in layers:
                if isinstance(given, Layer):
                    given.importance = weights.get(given.index)
                yield given
                del given

    def importance(self) -> dict[int, Tensor]:
        from .capture import inputs_of
        from .importance import Unknown, importance

        if self.objective == "outputs":
            return {}
        try:
            return importance(self.root, inputs_of(self.root, self.given))
        except (Unknown, RuntimeError) as error:  # out of memory, or a kernel without a backward
            raise ValueError(f"{error}; search with objective='outputs', which needs no gradients") from error

    def compare(self, specs: Mapping[str, Any], backend: str) -> list[Contender]:
        """Forward passes under specs, as in `comparison.compare`."""
        from .capture import inputs_of

        last = LAST_QUERIES if self.objective == "answers" else None
        return compare(self.root, inputs_of(self.root, self.given), self.layout, specs, backend=backend, last=last)


class _Tensors(_Source):
    def __init__(self, given: Any, layout: TokenLayout | None, scale: float | None, tile: int) -> None:
        single = isinstance(given, (tuple, list)) and len(given) == 3 and all(isinstance(t, Tensor) for t in given)
        self.given: Iterable[Any] = [(0, *given)] if single else given
        self.layout, self.scale, self.tile = layout, scale, tile
        if not isinstance(self.given, Iterable) or isinstance(self.given, (str, Mapping, Tensor)):
            raise TypeError(
                f"search takes a transformers model and a sample, (q, k, v), or an iterable of (layer, q, k, v); got "
                f"{type(given).__name__}"
            )
        count = len(self.given) if isinstance(self.given, Sized) else None
        heads = None
        if isinstance(self.given, Sequence) and count:
            heads = sum(int(item[1].shape[1]) for item in self.given)
        super().__init__("", "", "" if layout is None else layout.fingerprint, None, heads, None)

    def run(self) -> Iterator[Given]:
        for item in self.given:
            if not isinstance(item, (tuple, list)) or len(item) != 4:
                raise TypeError(f"an iterable of (layer, q, k, v) is needed, got {type(item).__name__}")
            index, q, k, v = item
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                raise TypeError(f"an iterable of (layer, q, k, v) is needed, with numbers of layers; got {index!r}")
            shape = k.shape if isinstance(k, Tensor) and k.dim() == 4 else (1, 1, 0)
            layout = TokenLayout.text(int(shape[2])) if self.layout is None else self.layout
            yield Layer(index, q, k, v, layout, self.scale, self.tile)


def search(
    model_or_qkv: Any,
    sample: Mapping[str, Any] | Tensor | None = None,
    *,
    budget: Budget | str | None = None,
    candidates: Sequence[Pattern] | None = None,
    layout: TokenLayout | None = None,
    backend: str = "auto",
    rows: Rows | int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    levels: Sequence[float] | None = None,
    tie: float = 0.05,
    objective: Literal["answers", "outputs"] = "answers",
    rivals: int = RIVALS,
    scale: float | None = None,
    block_size: int = TILE,
) -> Config:
    """The pattern of every head, so that attention stays within a budget and its output close to dense.

    Runs one prompt through the dense model and tries every candidate on each layer's q, k and v (see
    `mmflex.tuning.search` for the steps). Errors are those of the attention *output*, relative to dense attention, on
    sampled rows. Last, a model reads the sample under the config and under a few single patterns, so that no config is
    taken that is worse than one of those (``rivals``).

    Args:
        model_or_qkv: a transformers model in eval mode; or (q, k, v) of one layer, or an iterable of
            (layer, q, k, v), taken one at a time: q [1, Hq, N, D], k and v [1, Hkv, N, D].
        sample: for a model, what its processor returns for one prompt (64 to 32768 tokens, if possible as many as the
            config's prompts will have), or input ids [1, N].
        budget: ``Budget.cost(0.2)``, ``Budget.density(0.15)``, ``Budget.error(0.05)``, their text form "cost=0.2", or
            None for the paper's: for every head the cost of an A-shape with a sink of 1k and a window of 4k tokens.
        candidates: patterns to try, from simple to complex: at each of their ``levels`` and as given, else scaled to
            equal cost where they declare ``budgets``; None for the papers' table (`mmflex.tuning.candidates.paper`), to
            which own ones can be added.
        layout: what the tokens are; read from a model's sample if None, text for tensors.
        backend: whose costs count; "auto" for the one that would run here.
        rows: where errors are measured: a number of rows of each query modality, or `Rows`; by default 512 of each
            and the last 128. For answers each modality and the last rows count alike, for outputs each token.
        checkpoint: JSON lines, written after every layer. If the file is there, the search goes on where it stopped.
        progress: show a bar on a terminal, else a line now and then, on the standard error stream.
        levels, tie: as in `mmflex.tuning.search.Settings`.
        objective: "answers": a model's errors count by how much its predictions at the last 64 tokens depend on them
            (`mmflex.integrations.importance`; one more forward pass and two backward, memory as for gradient
            checkpointing), so the sample should end with a question. "outputs": all rows and heads count alike, as in
            the paper. For tensors it decides no more than how ``rows`` count.
        rivals: for a model and a shared budget, a number of single patterns on all heads (the best of different
            families within the budget) to compare the config with. The model reads the sample again, densely, under the
            config and under each of them, and the one whose predictions are closest to dense is taken (KL, after the
            last 64 tokens for "answers", else after all): ``rivals`` + 2 forward passes, with kernels compiled for
            them. 0: no comparison.
        scale: of the scores, for tensors; ``1 / sqrt(D)`` if None.
        block_size: tokens per block, for tensors (other than 128 for experiments).

    Returns:
        A `Config`, which meets the budget on prompts as long as the sample: `Config.resized` makes one for others. Its
        provenance has the sample's and the model's hash, versions, the budget, and under ``per_head`` lists of error,
        recall, density, ms and weight over heads, by layer.

    Raises:
        ValueError: a budget below the cheapest candidates (the least is named), a sample too short or too long, a
            checkpoint of another search, or cut off. TypeError: no model whose attention can be captured.
    """
    if isinstance(candidates, Pattern):
        raise TypeError(f"candidates is one pattern, {candidates!r}: give a list of patterns")
    given = table.paper() if candidates is None else tuple(candidates)
    for pattern in given:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"candidates holds {pattern!r}: give patterns (see mask_builders)")
    settings = Settings(
        given,
        Budget.parse(budget) if isinstance(budget, str) else budget,
        rows if isinstance(rows, Rows) else Rows(Rows.count if rows is None else rows, even=objective == "answers"),
        backend,
        None if levels is None else tuple(levels),
        tie,
    )
    if objective not in ("answers", "outputs"):
        raise ValueError(f"objective is {objective!r}: use 'answers' or 'outputs'")
    if not isinstance(rivals, int) or isinstance(rivals, bool) or rivals < 0:
        raise ValueError(f"rivals is {rivals!r}: give a number of uniform patterns, 0 for none")
    source: _Source
    if isinstance(model_or_qkv, nn.Module):
        if sample is None:
            raise TypeError("search(model, sample): give what the model's processor returns for one prompt")
        source = _Model(model_or_qkv, sample, layout, objective)
    else:
        source = _Tensors(model_or_qkv, layout, scale, block_size)
    hashed = _settings_hash(settings, block_size, source.objective)
    same = {"model": source.model, "sample": source.sample, "settings": hashed}
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the checkpoint: make it first")
    held = Checkpoint.open(path, **same)
    missing = source.wanted is None or bool(set(source.wanted) - set(held.layers))
    if missing:
        _run(source, settings, held, same, progress)
    if held.header is None or not any(done.heads for done in held.layers.values()):
        reasons = sorted({done.skipped for done in held.layers.values() if done.skipped})
        raise ValueError("no layer could be searched" + (f": {'; '.join(reasons)}" if reasons else ": none was given"))
    options = _chosen(held)
    if not isinstance(source, _Model) or not rivals:
        return _config(source, settings, held, options)
    return _compared(source, settings, held, options, rivals, say if progress else lambda text: None)


def _settings_hash(settings: Settings, block_size: int, objective: str) -> str:

    table_ = [p.to_json() for p in settings.candidates]
    budget = None if settings.budget is None else settings.budget.to_json()
    rest = (asdict(settings.rows), settings.backend, settings.levels or (), settings.tie, block_size, objective)
    return digest(__version__, table_, budget or {}, *rest)


def _run(source: _Source, settings: Settings, held: Checkpoint, same: dict[str, str], progress: bool) -> None:
    """Searches the layers that the checkpoint does not have."""
    run: Search | None = None
    layout: TokenLayout | None = None
    if settings.budget is not None and settings.budget.unit == "ms" and source.heads is None:
        raise ValueError(
            "a budget in ms is for all layers together: give them as a list, so that their number is known"
        )
    total = 1 if source.heads is None else source.heads
    total_layers = len(source.wanted) if source.wanted else source.layers
    if total_layers is None and source.heads is not None and isinstance(source, _Tensors):
        total_layers = len(source.given)  # type: ignore[arg-type]
    with LayerProgress(total_layers, progress) as shown:
        layers = source.run()
        try:
            for given in layers:
                index = given[0] if isinstance(given, tuple) else given.index
                shown.begin(index)
                searched = False
                if isinstance(given, tuple):
                    held.layers[index] = Done("", skipped=given[1])
                else:
                    layout = given.layout if layout is None else layout
                    _same_layout(layout, given)
                    mark = "" if source.wanted else digest(given.q, given.k, given.v)
                    known = held.layers.get(index)
                    if known is None:
                        if run is None:
                            run = Search(settings, total)
                            _prepare(run, given, held, same)
                        found = run.run(given)
                        held.layers[index] = Done(mark, found.heads, found.uniform)
                        searched = True
                        held.save()
                    elif known.digest != mark:
                        raise ValueError(
                            f"{held.path}: it is of other tensors: layer {index} has hash {known.digest} there, {mark} "
                            "here; give another path, or remove the file to start afresh"
                        )
                del given
                shown.end(index, searched)
        finally:
            getattr(layers, "close", lambda: None)()
    held.save()


def _prepare(run: Search, layer: Layer, held: Checkpoint, same: dict[str, str]) -> None:
    if held.header is None:
        run.prepare(layer)
        facts = {
            "tokens": layer.layout.length,
            "prompt": layer.layout.summary(),
            "device": device_name(layer.q.device),
            "dtype": str(layer.q.dtype).removeprefix("torch."),
        }
        held.header = Header(
            **same, budget=run.budget, table=run.table, levels=run.levels, dense=run.dense, facts=facts
        )
    else:
        run.prepare(layer, held.header.table, held.header.levels)


def _same_layout(first: TokenLayout, layer: Layer) -> None:
    if layer.layout.fingerprint != first.fingerprint:
        raise ValueError(
            f"layer {layer.index} has {layer.layout.length} tokens in another layout than the first layer's "
            f"{first.length}: a search takes one prompt"
        )


Chosen = dict[int, list[Option]]
"""The option of each head, by layer."""


def _chosen(held: Checkpoint) -> Chosen:
    """The options that the budget chooses."""
    header = held.header
    chosen: Chosen = {}
    assert header is not None
    heads = [(layer, options) for layer, done in sorted(held.layers.items()) for options in done.heads]
    picked = allocate(header.budget, [options for _, options in heads], header.dense)
    for (layer, options), i in zip(heads, picked, strict=True):
        chosen.setdefault(layer, []).append(options[i])
    return chosen


def _compared(
    source: _Model, settings: Settings, held: Checkpoint, chosen: Chosen, count: int, tell: Callable[[str], None]
) -> Config:
    """The config of a search, or of one pattern on all heads where that is better on the sample."""
    assert held.header is not None
    budget = held.header.budget
    if budget.kind == "error" or not budget.shared:
        return _config(source, settings, held, chosen)
    layers = {layer: done for layer, done in held.layers.items() if done.heads}
    specs = {"searched": chosen}
    for rival in rivals_of(layers, budget, held.header.dense, count):
        specs[str(rival.option.pattern)] = {n: [o] * len(layers[n].heads) for n, o in rival.layers.items()}
    tell(f"comparing on the sample: {', '.join(specs)}")
    try:
        found = source.compare({name: _patterns(options) for name, options in specs.items()}, settings.backend)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        tell(f"not compared: {error}")
        return _config(source, settings, held, chosen, {"compared": str(error)})
    best = min(found, key=lambda contender: contender.kl)
    tell(f"KL to dense on the sample: {', '.join(map(str, found))}; taken: {best.name}")
    figures = {c.name: {"KL": _short(c.kl), "density": _short(c.density)} for c in found}
    return _config(source, settings, held, specs[best.name], {"compared": figures, "taken": best.name})


def _patterns(chosen: Chosen) -> dict[int, tuple[Pattern, ...]]:
    return {layer: tuple(o.pattern for o in options) for layer, options in chosen.items()}


def _config(
    source: _Source, settings: Settings, held: Checkpoint, chosen: Chosen, more: Mapping[str, Any] | None = None
) -> Config:
    """A config of options, with where they come from."""
    header = held.header
    assert header is not None
    every = [o for options in chosen.values() for o in options]
    dense = sum(options[-1].ms for done in held.layers.values() for options in done.heads)
    versions = {"mmflex": __version__, "torch": torch.__version__}
    if source.wanted:
        import transformers

        versions["transformers"] = transformers.__version__
    provenance: dict[str, Any] = {
        "method": "mmflex.search",
        "budget": str(header.budget),
        "objective": source.objective,
        "error": _short(float(np.sqrt(np.average([o.error**2 for o in every], weights=[o.weight for o in every])))),
        "recall": _short(float(np.mean([o.recall for o in every]))),
        "density": _short(float(np.mean([o.density for o in every]))),
        "share of dense cost": _short(sum(o.ms for o in every) / dense),
        "ms": _short(sum(o.ms for o in every)),
        "sample": source.sample,
        "model hash": source.model,
        "rows": asdict(settings.rows),
        "backend": settings.backend,
        "candidates": len(settings.candidates),
        "settings": header.settings,
        "versions": versions,
        **header.facts,
        **(more or {}),
    }
    skipped = {str(layer): done.skipped for layer, done in sorted(held.layers.items()) if done.skipped}
    if skipped:
        provenance["own attention"] = skipped
    provenance["per_head"] = {
        name: {str(layer): [_short(getattr(o, name)) for o in options] for layer, options in chosen.items()}
        for name in ("error", "recall", "density", "ms", "weight")
    }
    layers = source.layers if source.layers is not None else max(held.layers) + 1
    counts = {len(options) for options in chosen.values()}
    if len(counts) > 1:
        raise ValueError(f"layers have {sorted(counts)} heads: a config is for layers of equally many")
    return Config(source.name, layers, counts.pop(), _patterns(chosen), provenance)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
