"""``mmflex eval``: do sparse answers stay the dense ones, and at how many FLOPs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .app import app, fail
from .dry_run import entries_of, method_lines, model_line, work_lines, written_line
from .estimate import Forwards
from .models import check_backend, device_of
from .options import by_layer, counted, numbers_of, print_table, spec_of

if TYPE_CHECKING:
    import torch

    from ..evaluation.evaluate import Settings
    from ..evaluation.report import Report


@app.command(name="eval")
def evaluate_(
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPEC_OR_CONFIG]...",
            help="Run as they are: 'default' (or 'default:high', 'default:fast'), a config or a pattern as a JSON "
            "file, one of MInference's files, or a pattern's JSON itself, such as "
            """'{"pattern": "AShape", "version": 1, "local": 2048}'.""",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Evaluate this model instead: a folder, a name that transformers finds, or a GGUF file."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="With --model: a text to read, FILE or NAME=FILE; several times for several."),
    ] = None,
    windows: Annotated[int, typer.Option(help="With --model: windows of each text.")] = 3,
    last: Annotated[
        int, typer.Option(help="With --model: rows at the end of a window that are also reported alone.")
    ] = 512,
    extend: Annotated[
        bool, typer.Option("--extend", help="With --model: allow prompts longer than it was trained for.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(help="With --model: a folder that keeps what is measured, and from which it goes on."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="v-niah, mm-niah, retrieval or tracking; several times for several. Default: the first two. With "
            "--model: passkey, multikey or tracking; default: none, the text alone."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a prompt, separated by commas; with --model also of a window. Only a task's filler is cut, "
            "and its question stays at the end.",
            show_default="1024,2048,4096,8192; with --model 4096",
        ),
    ] = None,
    depths: Annotated[int, typer.Option(help="Parts of the prompt that needles are sorted into.")] = 5,
    prompts: Annotated[
        int | None, typer.Option(help="Prompts of a seed; with --model of a task.", show_default="8; with --model 20")
    ] = None,
    questions: Annotated[int, typer.Option(help="Questions in a prompt.")] = 8,
    seeds: Annotated[int, typer.Option(help="Number of seeds of prompts.")] = 3,
    first_seed: Annotated[int, typer.Option(help="The first seed; the sample prompt has the one before.")] = 1000,
    flops: Annotated[
        str | None,
        typer.Option(
            help="Shares of the dense attention FLOPs to bring methods to, separated by commas.",
            show_default="0.15,0.25,0.4; with --model 0.3,0.5",
        ),
    ] = None,
    sweep: Annotated[
        int | None,
        typer.Option(help="The length at which all shares are run (the others: the largest); default: the longest."),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="'all', 'none', or names separated by commas; an unknown one lists them.")
    ] = "all",
    config: Annotated[
        Path | None,
        typer.Option(help="A config from mmflex search, for the methods mminference and mminference-intra."),
    ] = None,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'auto': a GPU if there is one.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="'auto', 'reference', 'cpu', 'triton' or 'flash'. A spec never runs dense here.")
    ] = "auto",
    add: Annotated[
        list[Path] | None,
        typer.Option(help="An earlier --json file, to show and draw with this run; without --task nothing is run."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw heat maps and curves to this file (PNG, SVG, PDF).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and about how long it takes; load no weights.")
    ] = False,
) -> None:
    """Needles in long prompts: accuracy of sparse attention beside dense, at matched attention FLOPs.

    Runs the small trained models that come with mmflex on generated prompts: questions about needle frames in a long
    video ([bold]v-niah[/]), the same with text between the frames ([bold]mm-niah[/]), and two tasks of text alone.
    Every method is brought to the same share of the dense attention FLOPs (pairs in computed blocks, read from plans on
    the model's own queries and keys) and answers the same prompts. Intervals are Wilson's, over the questions of all
    seeds.

    With [bold]--model[/], any causal language model of transformers reads text of yours: perplexity, KL divergence and
    first choices beside the dense model's, and needles in that text.

      mmflex eval --model ./SmolLM2-135M-Instruct --text prose=book.txt --text code=code.txt --flops 0.3,0.5
    """
    if importlib.util.find_spec("transformers") is None:
        raise fail("the evaluation needs transformers: pip install 'mmflex[transformers,plot]'")
    if model is not None or text:
        from .real import evaluate_model

        return evaluate_model(
            model, text or [], specs or [], task or [], lengths, flops, windows, last, depths, prompts, methods, config,
            device, backend, extend, resume, add or [], json_file, picture, dry_run,
        )  # fmt: skip
    import torch

    from ..evaluation.evaluate import Settings, evaluate
    from ..evaluation.methods import chosen
    from ..evaluation.models import load
    from ..evaluation.pictures import drawable, save_picture
    from ..evaluation.report import Report, writable
    from ..tuning.config import load_config

    console = Console()
    try:
        tasks = _tasks(task or ([] if add else ["v-niah", "mm-niah"]))
        given = dict(map(spec_of, specs or ())) or None
        wanted = [] if methods == "none" else [name.strip() for name in methods.split(",")]
        chosen(wanted)
        numbers = numbers_of(lengths or "1024,2048,4096,8192", int, "--lengths")
        options: dict[str, Any] = {
            "lengths": tuple(numbers),
            "flops": tuple(numbers_of(flops or "0.15,0.25,0.4", float, "--flops")),
            "sweep": max(numbers) if sweep is None else sweep,
            "depths": depths,
            "prompts": 8 if prompts is None else prompts,
            "questions": questions,
            "seeds": seeds,
            "first_seed": first_seed,
            "backend": backend,
        }
        where = torch.device(device_of(device))
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        check_backend(backend, str(where), str(dtype).removeprefix("torch."), without=("dense",))
        checked = Settings(**options)
        options |= {"config": None if config is None else load_config(config), "methods": wanted}
        writable([json_file, picture])
        if picture is not None:
            drawable(picture)
        report = sum(map(Report.load, add or ()), Report(()))
        if dry_run:
            _say_plan(console, tasks, given or {}, options, checked, where, dtype, [json_file, picture])
            return
        if tasks:
            used = ", ".join(map(str, checked.numbers()))
            console.print(f"seeds of the prompts: {used}; of the sample prompts: {checked.sample}; on {where}")
        with console.status("loading") as status:
            for group in _models(tasks):
                shipped = load(group[0], device=where, dtype=dtype)
                before = report

                def keep(part: Report, before: Report = before) -> None:
                    if json_file is not None:  # what is measured stays, if the rest is cut off
                        (before + part).save(json_file)

                report = before + evaluate(shipped, given, group, progress=status.update, found=keep, **options)
        _show(report, console)
        if json_file is not None:
            report.save(json_file)
            console.print(f"written to {json_file}")
        if picture is not None:
            save_picture(report, picture)
            console.print(f"drawn to {picture}")
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        raise fail(str(error)) from error


def _say_plan(
    console: Console,
    tasks: list[str],
    given: dict[str, Any],
    options: dict[str, Any],
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    files: list[Path | None],
) -> None:
    """The dry run."""
    from ..evaluation import models
    from ..evaluation.outlook import task_work

    forwards: dict[str, Forwards] = {}
    for group in _models(tasks):
        models.check_present(group[0])
        found = Forwards(models.config_of(group[0]), str(device), dtype)
        for spec in given.values():
            by_layer(spec, found.config.get_text_config(decoder=True))
        forwards |= dict.fromkeys(group, found)
    as_given, methods = entries_of(given, options["config"], options["methods"])
    seeds, questions = counted(settings.seeds, "seed"), counted(settings.questions, "question")
    works = task_work(settings, tasks, len(as_given), len(methods))
    if not tasks:
        console.print(f"would run: nothing; it shows what --add holds\n{written_line(files)}", markup=False)
        return
    for line in (
        *(model_line(f"that of {' and '.join(group)}", forwards[group[0]]) for group in _models(tasks)),
        f"of every task and length: {seeds} of {counted(settings.prompts, 'prompt')}, each with {questions}",
        *method_lines(as_given, methods, settings.flops, f"all at {settings.sweep:,} tokens, else the largest"),
        *work_lines(works, [forwards[work.where] for work in works]),
        written_line(files),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _show(report: Report, console: Console) -> None:
    for name in report.tasks:
        print_table(report.table(name), console)
    console.print(
        "blocks: pairs in computed blocks, as sized on each seed's first prompt; ran: as it ran; pairs: allowed pairs; "
        "estimates: their products, in no target; "
        "lost / gained: answers against the dense model's; over: no setting is within the target.",
        style="dim",
    )
    seconds = sum(run["seconds"] for run in report.runs)
    console.print(f"{counted(len(report.rows), 'row')} in {counted(round(seconds), 'second')}", style="dim")
    for entry in report.skipped:
        console.print(f"left out on {entry.task}: {entry.method}: {entry.reason}", style="yellow")


def _tasks(names: list[str]) -> list[str]:
    from ..evaluation.samples import TASKS

    unknown = sorted(set(names) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown task {', '.join(map(repr, unknown))}: use some of {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


def _models(tasks: list[str]) -> list[list[str]]:
    """Tasks that one model does, together."""
    from ..evaluation.samples import VISION

    groups = ([t for t in tasks if t in VISION], [t for t in tasks if t not in VISION])
    return [group for group in groups if group]
