"""``mmflex run``: a model of yours answers one prompt, dense beside sparse."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .app import app, fail
from .dry_run import duration, model_line, written_line
from .estimate import BASIS, Forwards
from .models import check_backend, check_media, config_of, device_of, dtype_of, load, multimodal, weights_dtype
from .options import by_layer, counted, spec_of, text_of
from .progress import Progress
from .prompts import prepare

if TYPE_CHECKING:
    from ..evaluation.beside import Beside


@app.command()
def run(
    model: Annotated[
        str, typer.Argument(help="A folder with a transformers model, or a name that transformers finds.")
    ],
    prompt: Annotated[str, typer.Option(help="The question or the text; @file.txt reads a file.")],
    video: Annotated[Path | None, typer.Option(help="A video file, read by PyAV or torchcodec.")] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Frames to take, evenly spread.", show_default="one a second, at most 128"),
    ] = None,
    spec: Annotated[
        str | None,
        typer.Option(
            help="'default', 'default:high', 'default:fast', a config or pattern as a JSON file, one of MInference's "
            "files, or a pattern's JSON itself.",
            show_default="default",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer; the prompt is never cut.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Timed prefills of each side.")] = 2,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'auto': a GPU if there is one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="'auto' (as stored), 'bfloat16', 'float16' or 'float32'; also bf16, ...")
    ] = "auto",
    backend: Annotated[str, typer.Option(help="As in mmflex.attention; 'auto' may run short prompts dense.")] = "auto",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Draw the masks of a layer to this file (PNG, SVG, PDF).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and about how long it takes; load no weights.")
    ] = False,
) -> None:
    """Answer one prompt with a model of yours, dense and sparse.

    Prints the time to the first token by stage, both answers, and the density of the masks. Nothing is sampled: where
    the answers differ, it is by the masks (or by rounding, where two tokens are almost equally likely).

      mmflex run Qwen/Qwen2.5-VL-7B-Instruct --video film.mp4 --prompt "What happens?" -o masks.png
      mmflex run ./SmolLM2-135M-Instruct --prompt @report.txt --dry-run
    """
    if importlib.util.find_spec("transformers") is None:
        raise fail("this needs transformers: pip install 'mmflex[transformers]', with --video 'mmflex[video]'")
    from ..evaluation.report import writable

    console = Console()
    try:
        writable([json_file, output])
        if output is not None and importlib.util.find_spec("matplotlib") is None:
            raise ImportError("--output draws with matplotlib: pip install 'mmflex[plot]'")
        where, kind = device_of(device), dtype_of(dtype, auto=True)
        check_backend(backend, where, kind)
        chosen = _spec(spec)
        text = text_of("--prompt", prompt)
        config = config_of(model)
        check_backend(backend, where, kind, config)
        check_media(model, config, video)
        with Progress(console) as say:
            taken = None
            if video is not None:
                from ..integrations.frames import read_frames

                say(f"reading {video}")
                taken = read_frames(video, frames)
                console.print(
                    f"{len(taken.indices)} of {counted(taken.total, 'frame')} of {taken.pixels.shape[2]} x "
                    f"{taken.pixels.shape[1]} pixels, by {taken.reader}",
                    highlight=False,
                )
            say("preparing the prompt")
            inputs, decode = prepare(model, text, taken)
            if dry_run:
                files = [json_file, output]
                _say_plan(console, config, inputs, chosen, where, kind, backend, tokens, runs, files)
                return
            say("loading the model")
            loaded = load(model, where, kind)
            from ..evaluation.beside import beside

            given = {name: _placed(value, loaded) for name, value in inputs.items()}
            found = beside(
                loaded, given, chosen, decode, new_tokens=tokens, runs=runs, backend=backend, say=say
            )  # fmt: skip
            if output is not None and found.plan is not None:
                say(f"drawing masks to {output}")
                _draw(found.plan, output)
        show(found, console)
        if json_file is not None:
            json_file.write_text(json.dumps({"model": model, "prompt": text, **found.to_json()}, indent=1) + "\n")
            console.print(f"written to {json_file}", soft_wrap=True)
        if output is not None and found.plan is not None:
            console.print(f"masks of the middle layer: {output}", soft_wrap=True)
        elif output is not None:
            console.print("no picture: everything ran dense")
    except (ValueError, TypeError, OSError, NotImplementedError, RuntimeError, ImportError) as error:
        raise fail(str(error)) from error


def _spec(given: str | None) -> Any:
    return spec_of("default" if given is None else given)[1]


def _placed(value: Any, model: Any) -> Any:
    """An input on the model's device; pixels in its dtype."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


# ---- what is said ----------------------------------------------------------------------------------------------------


def _say_plan(
    console: Console,
    config: Any,
    inputs: dict[str, Any],
    spec: Any,
    device: str,
    dtype: str,
    backend: str,
    tokens: int,
    runs: int,
    written: list[Path | None],
) -> None:
    """The dry run: sizes and predictions from the config, seconds from one matrix product here."""
    from ..integrations.layouts import layout_for
    from ..tuning.config import Config

    text = config.get_text_config(decoder=True)
    layers, heads = int(text.num_hidden_layers), int(text.num_attention_heads)
    layout = layout_for(config, inputs)
    length = int(inputs["input_ids"].shape[1])
    patterns = by_layer(spec, text)
    kind = weights_dtype(dtype, config)
    forwards = Forwards(config, device, kind)
    prefills = 2 * (1 + runs)
    given = f"a config of {counted(layers, 'layer')} x {counted(heads, 'head')}" if isinstance(spec, Config) else spec
    chosen = [f"spec: {given}, backend {backend}"]
    if backend == "auto":
        chosen.append(_choice_of_auto(text, patterns, layout, device, kind))
    seconds, tower = forwards.seconds(length), "the vision tower, " if multimodal(config) else ""
    for line in (
        f"prompt: {counted(length, 'token')} ({layout.summary()})",
        model_line(config.model_type, forwards),
        *chosen,
        f"would run: {prefills} prefills and two answers of {counted(tokens, 'token')}, dense and sparse",
        f"would take: about {duration(seconds)} a dense prefill, {duration(prefills * seconds)} for as many as all of "
        f"them ({BASIS}); {tower}the answers' tokens and compilation (10 to 60 s on a CPU) come on top",
        written_line(written),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _choice_of_auto(text: Any, spec: Any, layout: Any, device: str, dtype: Any) -> str:
    """What backend "auto" will do with the prompt, by the cost model that decides it at run time."""
    from ..integrations.notice import mostly, predicted_dense

    reasons = predicted_dense(text, spec, layout, device, dtype)
    dense = {layer: reason for layer, reason in reasons.items() if reason}
    if not dense:
        return f"backend auto: the cost model has none of {counted(len(spec), 'layer')} run dense instead of its spec"
    layer, reason = next(iter(dense.items()))
    said = (
        f"backend auto: {len(dense)} of {counted(len(spec), 'layer')} will run dense, which the cost model predicts to "
        f"be faster for this prompt (layer {layer}: {reason})"
    )
    if mostly(reasons, len(spec)):
        said += "; most of both sides is the same then: to run the spec at any length, name a backend"
    return said


def show(found: Beside, console: Console) -> None:
    """The tables and both answers."""
    console.print(f"{counted(found.prompt_tokens, 'token')}: {found.layout}", highlight=False, soft_wrap=True)
    table = Table(title="time to the first token")
    for name in ("", "dense", "mmflex"):
        table.add_column(name, justify="right" if name else "left")
    dense, sparse = found.dense, found.sparse
    for stage in dense.seconds:
        table.add_row(stage, f"{dense.seconds[stage]:.2f} s", f"{sparse.seconds.get(stage, 0.0):.2f} s")
    table.add_row("in all", f"{dense.first_token_s:.2f} s", f"{sparse.first_token_s:.2f} s")
    table.add_row("first call, with the answer", f"{dense.first_s:.1f} s", f"{sparse.first_s:.1f} s")
    console.print(table)
    if found.densities and min(found.densities) < 1:
        low, high = min(found.densities), max(found.densities)
        mean = sum(found.densities) / len(found.densities)
        console.print(
            f"density: {mean:.1%} of the causal pairs were computed, {low:.1%} to {high:.1%} by layer", highlight=False
        )
    else:
        console.print(
            "every causal pair was computed: the masks leave nothing out of a prompt of this length, or dense "
            "attention is faster for it"
        )
    for name, side in (("dense", dense), ("mmflex", sparse)):
        console.print(f"[bold]{name}:[/]")
        console.print(side.answer.strip(), markup=False, highlight=False, soft_wrap=True)
    shared = min(len(dense.tokens), len(sparse.tokens))
    console.print(
        f"the answers agree in their first {found.same} of {counted(shared, 'token')}", style="dim", highlight=False
    )


def _draw(plan: Any, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from ..plot import plot_masks

    heads = [group.heads[0] for group in plan.program.groups][:4]
    plot_masks(plan, heads).savefig(path, bbox_inches="tight")
