"""``mmflex search``: find which pattern each head of a model gets."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .app import app, fail
from .dry_run import duration, model_line
from .estimate import BASIS, Forwards
from .models import check_backend, check_media, check_place, config_of, device_of, load, weights_dtype
from .options import counted, text_of
from .prompts import prepare, shortened

if TYPE_CHECKING:
    from ..ir.pattern import Pattern
    from ..tuning.config import Config

BACKWARD = 3
"""What a backward pass takes in forwards: two, and one more for activations that are computed again."""

TASKS = ("v-niah", "mm-niah", "retrieval", "tracking")


@app.command()
def search(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder with a transformers model, a name that transformers finds, or a task of the models that "
            f"come with mmflex: {', '.join(TASKS)}. Left out with --qkv.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the config goes.")] = Path("mmflex_config.json"),
    budget: Annotated[
        str | None,
        typer.Option(
            help="What attention may cost: cost=0.2 (a share of dense attention), cost=12ms, density=0.15 (share of "
            "the pairs that are computed), or error=0.05 (relative error of its output to stay under).",
            show_default="for each head, the cost of 1k first and 4k last keys",
        ),
    ] = None,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Every head keeps to the budget; else heads share it.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Length of the sample: of a task's prompt (default 8192), or what a longer text is cut to, out of its "
            "middle: its beginning and the question at its end stay.",
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            "--for", help="Tokens of the prompts that the config is for, if not the sample's: budgets are resized."
        ),
    ] = None,
    video: Annotated[Path | None, typer.Option(help="For a model of yours: a video file to read.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image file; may be given several times.")] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="The question about them, or a long text with a question at its end; @file.txt reads a file."
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Frames to take from the video, evenly spread.", show_default="one a second, at most 128"),
    ] = None,
    qkv: Annotated[
        Path | None,
        typer.Option(help="Instead of a model: a safetensors file with 0.q, 0.k, 0.v, 1.q, ... each [1, heads, N, D]."),
    ] = None,
    segments: Annotated[
        str | None,
        typer.Option(help='With --qkv, what the tokens are: "text 40, video 24x16x16, text 60".', show_default="text"),
    ] = None,
    candidates: Annotated[
        Path | None,
        typer.Option(help="A JSON list of patterns to try instead of the papers' table, from simple to complex."),
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Query rows of each modality to measure errors on.")] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="'answers': errors count by how much the model's predictions at the prompt's end depend on them (it "
            "takes gradients), so the text is asked as mmflex run asks it, in the model's chat template where it has "
            "one; 'outputs': all heads and tokens alike, and the text is read as it stands. With --qkv it is outputs.",
        ),
    ] = "answers",
    seed: Annotated[int, typer.Option(help="Seed of a task's prompt.")] = 1 << 20,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'auto': a GPU if there is one.")] = "auto",
    backend: Annotated[str, typer.Option(help="Whose costs count; 'auto' for the one that would run.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a search that was interrupted (OUTPUT.progress).")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be searched; load no weights, write nothing.")
    ] = False,
) -> None:
    """Find which pattern each head of a model gets, on one sample prompt.

    Runs the prompt through the model once, densely, and tries a table of patterns on every layer: which one keeps the
    attention output closest to dense within the budget. Writes a config for [bold]mmflex.patch(model, config)[/].
    It judges by this sample alone: give one like the prompts that the config is for, as long as they are if possible.

      mmflex search v-niah --budget density=0.25 -o v-niah.json
      mmflex search ./Qwen2.5-VL-7B-Instruct --video film.mp4 --frames 96 --text "What happens?" --budget cost=0.3
      mmflex search --qkv layers.safetensors --segments "text 40, video 24x16x16, text 60"

    Progress is kept in OUTPUT.progress, layer by layer, until the config is written.
    """
    if (model is None) == (qkv is None):
        raise fail("give a model (a folder, a name or a task) or --qkv FILE, one of the two")
    if not output.parent.is_dir():
        raise fail(f"there is no folder {output.parent} for the config: make it first")
    if objective not in ("answers", "outputs"):
        raise fail(f"--objective is {objective!r}: give answers or outputs")
    if prompts is not None and prompts < 1:
        raise fail(f"--for is {prompts}: give the tokens of a prompt")
    progress = output.with_name(output.name + ".progress")
    if progress.exists() and not resume:
        raise fail(f"{progress} holds a search that was interrupted: go on with --resume, or remove it")
    from ..integrations.search import search as find
    from ..tuning.budget import Budget
    from ..tuning.config import save_config

    console = Console()
    try:
        limit = None if budget is None else Budget.parse(budget, shared=not per_head)
        table = None if candidates is None else _patterns(candidates)
        options: dict[str, Any] = {
            "budget": limit, "candidates": table, "backend": backend, "rows": rows, "objective": objective
        }  # fmt: skip
        where = device_of(device)
        check_backend(backend, where)
        found: _Tensors | _Task | _Model
        if qkv is not None:
            options["layout"] = None if segments is None else _layout(segments)
            found = _Tensors(qkv, where)
        elif model in TASKS:
            assert model is not None
            found = _Task(model, tokens or 8192, seed, where, backend)
        else:
            assert model is not None
            sample = _Sample(video, image or [], text, frames, tokens, template=objective != "outputs")
            found = _Model(model, sample, where, backend)
            if found.left_out:
                told = f"{counted(found.left_out, 'token')} are left out of its middle (--tokens {tokens})"
                console.print(f"the text is longer: {told}", highlight=False, soft_wrap=True)
        if dry_run:
            _say_plan(console, found, limit, table, objective, where, backend, output)
            return
        given, inputs = found.loaded()
        config = find(given, inputs, checkpoint=progress, **options)
        fitted = config if prompts is None else config.resized(prompts)
        save_config(fitted, output)
    except (ValueError, TypeError, OSError, NotImplementedError, RuntimeError, ImportError) as error:
        raise fail(str(error)) from error
    progress.unlink(missing_ok=True)
    _summary(config, console)
    console.print(_promise(config, fitted), soft_wrap=True, highlight=False)
    console.print(f"written to {output}; look at it with [bold]mmflex show {output}[/]", soft_wrap=True)


def _patterns(path: Path) -> list[Pattern]:
    from ..ir.pattern import from_json

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, list):
        raise ValueError(f"{path}: a list of patterns is needed, got {type(data).__name__}")
    return [from_json(item) for item in data]


# ---- what is searched ------------------------------------------------------------------------------------------------


class _Task:
    """The shipped model of a task, and a prompt that no evaluation has (its seeds are small)."""

    def __init__(self, task: str, tokens: int, seed: int, device: str, backend: str) -> None:
        from ..evaluation import models, samples

        check_backend(backend, device, "float32")
        models.check_present(task)
        self.task, self.device = task, device
        self.sample = samples.prompts(task, tokens, batch=1, questions=16, seed=seed, device=device).inputs

    def loaded(self) -> tuple[Any, Any]:
        from ..evaluation import models

        return models.load(self.task, device=self.device), self.sample

    def sizes(self) -> tuple[str, int, int, int]:
        text = self.forwards().config.get_text_config(decoder=True)
        return self.task, text.num_hidden_layers, text.num_attention_heads, self.sample["input_ids"].shape[1]

    def forwards(self) -> Forwards:
        import torch

        from ..evaluation import models

        return Forwards(models.config_of(self.task), self.device, torch.float32)


@dataclass(frozen=True)
class _Sample:
    """What the sample of a model is made of. ``tokens``: to cut a text to. ``template``: ask as a user would."""

    video: Path | None
    images: list[Path]
    text: str | None
    frames: int | None
    tokens: int | None
    template: bool


class _Model:
    """A model from a folder or the Hub, and the prompt that `mmflex run` would give it.

    Attributes:
        left_out: tokens of the text that are not in the sample.
    """

    def __init__(self, name: str, sample: _Sample, device: str, backend: str) -> None:
        check_place(name)
        media = sample.video is not None or bool(sample.images)
        if sample.text is None and not media:
            raise ValueError(
                f"{name} is none of the tasks {', '.join(TASKS)}, and a model needs a sample: --video FILE, --image "
                "FILE or --text, at best all it is for"
            )
        if media and sample.tokens is not None:
            raise ValueError(
                f"--tokens is {sample.tokens}, and prompts with images or video are not cut: leave it out, or give "
                "fewer --frames or smaller images"
            )
        asked = None if sample.text is None else text_of("--text", sample.text)
        if importlib.util.find_spec("transformers") is None:
            raise ImportError("this needs transformers: pip install 'mmflex[transformers]'")
        from ..integrations.capture import tokens_of
        from ..integrations.frames import read_frames

        self.name, self.device = name, device
        self.config = config_of(name)
        check_backend(backend, device, config=self.config)
        check_media(name, self.config, sample.video, sample.images)
        frames = None if sample.video is None else read_frames(sample.video, sample.frames)
        question = "Describe this in detail." if asked is None else asked
        prompt, _ = prepare(name, question, frames, sample.images, template=sample.template)
        self.sample = prompt if sample.tokens is None else shortened(prompt, sample.tokens)
        self.left_out = prompt["input_ids"].shape[1] - tokens_of(self.sample)

    def loaded(self) -> tuple[Any, Any]:
        return load(self.name, self.device), self.sample

    def sizes(self) -> tuple[str, int, int, int]:
        text = self.config.get_text_config(decoder=True)
        return self.name, text.num_hidden_layers, text.num_attention_heads, self.sample["input_ids"].shape[1]

    def forwards(self) -> Forwards:
        return Forwards(self.config, self.device, weights_dtype("auto", self.config))


def _say_plan(
    console: Console,
    found: _Tensors | _Task | _Model,
    budget: Any,
    table: list[Pattern] | None,
    objective: str,
    device: str,
    backend: str,
    output: Path,
) -> None:
    """The dry run."""
    from ..integrations.comparison import RIVALS

    name, layers, heads, tokens = found.sizes()
    passes, as_many = "one forward pass", 1
    if isinstance(found, _Tensors):
        passes = "no model"
    elif objective == "answers":
        passes, as_many = "two forward and two backward passes", 2 + 2 * BACKWARD
    if budget is not None and budget.shared and budget.kind != "error" and not isinstance(found, _Tensors):
        passes += f" and, to compare the config with single patterns, {RIVALS + 2} forward passes"
        as_many += RIVALS + 2
    model = f"model: {name}, {counted(layers, 'layer')} x {counted(heads, 'head')}; on {device}"
    took = "longest for trying patterns: how long it tells after the first layer"
    if not isinstance(found, _Tensors):
        model = model_line(name, found.forwards())
        took = f"about {duration(as_many * found.forwards().seconds(tokens))} for those passes ({BASIS}); {took}"
    tried = "the papers' table" if table is None else counted(len(table), "pattern")
    limit = "for each head, the cost of 1k first and 4k last keys" if budget is None else budget
    for line in (
        f"sample: {counted(tokens, 'token')}",
        model,
        f"would run: {passes} over the sample, and try {tried} on {counted(layers * heads, 'head')}; budget: {limit}; "
        f"costs of backend {backend}",
        f"would take: {took}",
        f"would write: {output}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Tensors:
    """(layer, q, k, v) of a safetensors file, one layer at a time."""

    def __init__(self, path: Path, device: str) -> None:
        if importlib.util.find_spec("safetensors") is None:
            raise ImportError("this needs safetensors: pip install safetensors")
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        try:
            self.file = safe_open(os.fspath(path), framework="pt", device=device)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from None
        names = set(self.file.keys())
        layers = sorted({int(name.split(".")[0]) for name in names if name.split(".")[0].isdecimal()})
        wanted = {f"{layer}.{side}" for layer in layers for side in "qkv"}
        if not layers or names != wanted:
            odd = ", ".join(sorted(names ^ wanted)[:5]) or "nothing"
            raise ValueError(f"{path}: tensors 0.q, 0.k, 0.v, 1.q, ... are needed; missing or unknown: {odd}")
        self.layers = layers

    def loaded(self) -> tuple[Any, None]:
        return self, None

    def sizes(self) -> tuple[str, int, int, int]:
        _, heads, tokens, _ = self.file.get_slice(f"{self.layers[0]}.q").get_shape()
        return "tensors", len(self.layers), heads, tokens

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Any:
        for layer in self.layers:
            yield (layer, *(self.file.get_tensor(f"{layer}.{side}") for side in "qkv"))


def _layout(text: str) -> Any:
    from ..ir.layout import TokenLayout

    segments = []
    for part in text.split(","):
        words = part.split()
        try:
            name, size = words
            segments.append((name, tuple(int(n) for n in size.split("x"))))
        except ValueError:
            raise ValueError(f'--segments: {part.strip()!r} is no segment: write "text 40, video 24x16x16"') from None
    return TokenLayout.from_segments(segments)


# ---- what was found --------------------------------------------------------------------------------------------------


def _promise(config: Config, fitted: Config) -> str:
    """For which lengths the budget holds."""
    made, tokens = config.provenance["tokens"], fitted.provenance["tokens"]
    if made != tokens:
        return f"budgets resized from {made:,} to {tokens:,} tokens: the figures above are those of the sample"
    return (
        f"the figures hold for {made:,} tokens; on prompts twice as long, about half the density: --for TOKENS, or "
        "config.resized(tokens), makes a config for another length"
    )


def _summary(config: Config, console: Console) -> None:
    found = config.provenance
    console.print(
        f"[bold]{config.model or 'tensors'}[/]: {counted(config.layers, 'layer')} x "
        f"{counted(config.heads, 'head')}, {counted(found['tokens'], 'token')}, budget {found['budget']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table()
    for name in ("error of outputs", "mass kept", "density", "share of dense cost"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{found['error']:.2%}", f"{found['recall']:.2%}", f"{found['density']:.2%}",
        f"{found['share of dense cost']:.2%}",
    )  # fmt: skip
    console.print(table)
    kinds = Counter(type(p).__name__ for patterns in config.patterns.values() for p in patterns)
    console.print(", ".join(f"{counted(count, 'head')} {name}" for name, count in kinds.most_common()), soft_wrap=True)
    if "own attention" in found:
        layers = ", ".join(found["own attention"])
        console.print(f"layers that keep the model's own attention: {layers}", soft_wrap=True)
