"""``mmflex eval --model``: perplexity, KL and needles of any causal language model, dense and sparse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from .app import fail
from .dry_run import entries_of, method_lines, model_line, work_lines, written_line
from .estimate import Forwards
from .models import check_backend, check_place, config_of, device_of
from .options import by_layer, counted, numbers_of, print_table, spec_of
from .progress import Progress

if TYPE_CHECKING:
    from ..evaluation.real import Report, Text
    from ..evaluation.real.evaluate import Settings


def evaluate_model(
    model: str | None,
    texts: Sequence[str],
    specs: Sequence[str],
    tasks: Sequence[str],
    lengths: str | None,
    densities: str | None,
    windows: int,
    last: int,
    depths: int,
    prompts: int | None,
    methods: str,
    config: Path | None,
    device: str,
    backend: str,
    extend: bool,
    resume: Path | None,
    add: Sequence[Path],
    json_file: Path | None,
    picture: Path | None,
    dry_run: bool,
) -> None:
    """Runs it and shows it; arguments as the options of ``mmflex eval``."""
    import torch

    from ..evaluation.methods import chosen
    from ..evaluation.pictures import drawable
    from ..evaluation.real import Report, evaluate, load, read
    from ..evaluation.real.evaluate import Settings, check_prompts
    from ..evaluation.real.model import default_dtype, describe
    from ..evaluation.real.pictures import save_picture
    from ..evaluation.report import writable
    from ..tuning.config import load_config

    console = Console()
    try:
        if model is None or not texts:
            raise ValueError("give both: --model (a folder, a name or a GGUF file) and --text FILE")
        wanted = [] if methods == "none" else [name.strip() for name in methods.split(",")]
        chosen(wanted)
        count = 20 if prompts is None else prompts
        sizes = tuple(numbers_of(lengths or "4096", int, "--lengths"))
        shares = tuple(numbers_of(densities or "0.3,0.5", float, "--flops"))
        where = torch.device(device_of(device))
        check_backend(backend, str(where), without=("dense",))
        settings = Settings(sizes, shares, windows, last, tuple(tasks), depths, count, 0, backend)
        given = dict(map(spec_of, specs))
        searched = None if config is None else load_config(config)
        writable([json_file, picture])
        if picture is not None:
            drawable(picture)
        before = sum(map(Report.load, add), Report())
        check_place(model, gguf=True)
        if not (model.endswith(".gguf") or any(Path(model).glob("*.gguf"))):
            dtype = "float32" if where.type == "cpu" else "bfloat16"  # as `load` has it
            check_backend(backend, str(where), dtype, config_of(model), without=("dense",))
        if dry_run:
            entries = entries_of(given, searched, wanted)
            known, files = describe(model), [json_file, picture, resume]
            read_texts = [read(text, known.tokenizer) for text in texts]
            check_prompts(known, read_texts, settings, extend)
            for spec in (*given.values(), *([] if searched is None else [searched])):
                by_layer(spec, known.config.get_text_config(decoder=True))
            forwards = Forwards(known.config, str(where), default_dtype(where))
            _say_plan(console, known.name, read_texts, entries, settings, forwards, files)
            if resume is not None and any(resume.glob("*.npy")):
                console.print(f"less what {resume} holds of it", markup=False, highlight=False, soft_wrap=True)
            return
        with Progress(console) as say:
            say(f"loading {model}")
            loaded = load(model, device=where)

            def keep(part: Report) -> None:
                if json_file is not None:  # what is measured stays, if the rest is cut off
                    (before + part).save(json_file)

            report = before + evaluate(
                loaded, [read(text, loaded.tokenizer) for text in texts], given, methods=wanted, config=searched,
                lengths=sizes, densities=shares, windows=windows, last=last, tasks=tasks, depths=depths, prompts=count,
                backend=backend, extend=extend, resume=resume, progress=say, measured=keep,
            )  # fmt: skip
        show(report, console)
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
    name: str,
    texts: Sequence[Text],
    entries: tuple[list[str], list[str]],
    settings: Settings,
    forwards: Forwards,
    files: Sequence[Path | None],
) -> None:
    """The dry run. ``entries``: of `entries_of`."""
    from ..evaluation.outlook import text_work

    given, methods = entries
    read = ", ".join(f"{text.name} ({counted(len(text.ids), 'token')})" for text in texts)
    lengths = ", ".join(f"{tokens:,}" for tokens in sorted(set(settings.lengths)))
    asked = "".join(f", {counted(settings.prompts, 'prompt')} of {task}" for task in settings.tasks)
    works = text_work(settings, len(texts), len(given), len(methods))
    for line in (
        model_line(name, forwards),
        f"texts: {read}",
        f"of every text at {lengths} tokens: {counted(settings.windows, 'window')}{asked}",
        *method_lines(given, methods, settings.densities, "at every length"),
        *work_lines(works, [forwards] * len(works)),
        written_line(files),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def show(report: Report, console: Console) -> None:
    """The tables, and what the columns are."""
    if report.texts:
        print_table(report.text_table(), console)
    if report.needles:
        print_table(report.needle_table(), console)
    console.print(
        "ran: pairs in computed blocks over causal pairs, as it ran; estimates: their products, in no target; rows "
        "0-15 and others: KL at the first queries of every tile of 128, and at the rest; brackets: 95% intervals "
        "(bootstrap over blocks of 128 rows; Wilson for answers); over: no setting is within the target.",
        style="dim",
    )
    for entry in report.skipped:
        console.print(f"left out on {entry.task}: {entry.method}: {entry.reason}", style="yellow")
    seconds = sum(run["seconds"] for run in report.runs)
    console.print(
        f"{counted(len(report.texts) + len(report.needles), 'row')} in {counted(round(seconds), 'second')}", style="dim"
    )
