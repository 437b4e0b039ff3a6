"""``mmflex demo``, ``mmflex families``, ``mmflex bench``."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .app import app, fail


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where the picture of the masks goes (PNG, SVG, PDF).")
    ] = Path("mmflex_demo.png"),
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'auto': a GPU if there is one.")] = "auto",
    backend: Annotated[str, typer.Option(help="Kernels: 'auto', 'cpu', 'triton', 'flash' or 'reference'.")] = "auto",
    frames: Annotated[int | None, typer.Option(hidden=True)] = None,
    size: Annotated[int | None, typer.Option(hidden=True)] = None,
    layers: Annotated[int | None, typer.Option(hidden=True)] = None,
    runs: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """See it work: a Qwen2.5-VL reads a video, dense and sparse, side by side.

    Builds the real model class with random weights, draws a video of moving shapes (nothing is downloaded), and
    prefills it with PyTorch's attention and through [bold]mmflex.patch[/]. Prints the time to the first token by
    stage, planning counted, what each pattern computes, how far the outputs are apart and why the plan is what it is.
    On a CPU the model is small and the video has 16 thousand tokens: one to two minutes on two cores. On a GPU with 40
    GB it has four layers of the 7B shape and its whole vision tower, and the video 65 thousand tokens.
    """
    if importlib.util.find_spec("transformers") is None:
        raise fail("the demo needs transformers: pip install 'mmflex[transformers,plot]'")
    from .. import demo as demo_

    try:
        settings = demo_.Settings.suited(device, frames=frames, size=size, layers=layers, runs=runs, backend=backend)
        demo_.run(settings, Console(), output)
    except (RuntimeError, ValueError, ImportError) as error:
        raise fail(str(error)) from error


@app.command()
def families() -> None:
    """List the transformers model families whose prompts mmflex can read, and what runs sparse in each.

    Any other causal language model works as well, its tokens taken as text; for a vision-language model that is not
    listed, run it inside [bold]with mmflex.token_layout(layout):[/], with a layout of yours.
    """
    from ..integrations import layouts

    table = Table(title="model families")
    for name in ("model_type", "prompts hold", "attention"):
        table.add_column(name)
    for row in family_rows(layouts):
        table.add_row(*row)
    Console().print(table)


SPECIAL = {
    "gemma3": "image blocks see both ways: those layers run dense, with a notice",
    "paligemma": "prefixes see both ways: runs dense, with a notice",
    "mistral": "sliding layers keep their window, exactly",
    "phi3": "sliding layers keep their window, exactly",
}
TEXT_ONLY = ("llama (also Yi)", "qwen2", "qwen3", "glm4", "mistral", "phi3")


def family_rows(layouts: Any) -> list[tuple[str, str, str]]:
    """(model type, what its prompts hold, what runs sparse) of every family with a layout rule, then of text models."""
    rows = []
    for model_type, entry in layouts.FAMILIES.items():
        rows.append((model_type, ", ".join(entry.holds), SPECIAL.get(model_type, "sparse prefill")))
    rows += [(name, "text", SPECIAL.get(name, "sparse prefill")) for name in TEXT_ONLY]
    return rows


FILES = {"attention": "--json", "chunks": "--json", "cpu": "--json", "memory": "--json", "picture": "--output"}
"""The option for the file of those benchmarks that replace one of the checkout where none is named."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    which: Annotated[
        str, typer.Argument(help="'auto', or a module of benchmarks/: cpu, attention, prefill, ...")
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and how long it is known to take; measure nothing.")
    ] = False,
) -> None:
    """Measure it here: attention against PyTorch's, planning counted.

    Runs [bold]python -m benchmarks.cpu[/] without a GPU and [bold]python -m benchmarks.attention[/] with one; further
    options are passed on ([bold]mmflex bench cpu -- --help[/] lists them). Results go to build/bench of the checkout,
    which git ignores, unless [bold]--json FILE[/] names another file. The benchmarks come with the source, not with
    the installed package: run it from a checkout.
    """
    if which == "auto":
        import torch

        which = "attention" if torch.cuda.is_available() else "cpu"
    root = next(
        (p for p in (Path.cwd(), Path(__file__).parents[2]) if (p / "benchmarks" / "__init__.py").exists()), None
    )
    if root is None:
        raise fail("there is no benchmarks folder here: run it from a checkout of mmflex")
    module = root / "benchmarks" / f"{which}.py"
    if not module.exists():
        known = sorted(p.stem for p in (root / "benchmarks").glob("*.py") if not p.stem.startswith("_"))
        raise fail(f"there is no benchmark {which!r} in {root / 'benchmarks'}: choose one of {', '.join(known)}")
    command, path = [sys.executable, "-m", f"benchmarks.{which}", *context.args], _file(which, context.args, root)
    if path is not None:
        command += [FILES[which], str(path)]
    if dry_run:
        _check_options(command, root)
        _say_plan(module, command, root, path)
        return
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"results go to {path}", flush=True)
    raise typer.Exit(subprocess.run(command, cwd=root, check=False).returncode)


def _file(which: str, given: list[str], root: Path) -> Path | None:
    """What keeps a benchmark from replacing the results that are in the checkout; None where a file is named."""
    named = {argument.partition("=")[0] for argument in given} & {"--json", "--output", "-h", "--help"}
    if which not in FILES or named:
        return None
    return root / "build" / "bench" / (f"{which}.png" if which == "picture" else f"{which}.json")


def _check_options(command: list[str], root: Path) -> None:
    """An error for options that a benchmark does not take: its own parser and its own help are asked."""
    asked = subprocess.run([*command, "--help"], cwd=root, check=False, capture_output=True, text=True)
    if asked.returncode:
        raise fail(asked.stderr.strip().splitlines()[-1] if asked.stderr.strip() else f"{command[2]} does not start")
    known = dict.fromkeys(re.findall(r"--[a-z][\w-]*", asked.stdout))
    for argument in command[3:]:
        name = argument.partition("=")[0]
        if name.startswith("--") and not any(option.startswith(name) for option in known):
            raise fail(f"{command[2]} has no option {name}: it takes {', '.join(known) or 'none'}")


def _say_plan(module: Path, command: list[str], root: Path, path: Path | None) -> None:
    """The dry run: what a benchmark's own documentation says of it."""
    lines = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").splitlines()
    times = [" ".join(line.split()) for line in lines if re.search(r"#.*(second|minute|hour)", line)]
    named = [after for before, after in pairwise(command) if before in ("--json", "--output")]
    named += [part.partition("=")[2] for part in command if part.startswith(("--json=", "--output="))]
    written = str(path) if path is not None else ", ".join(named) or "what its own options name"
    console = Console()
    for line in (
        f"would run: python {' '.join(command[1:])}, in {root}",
        f"measures: {lines[0] if lines else 'it does not say'}",
        *(f"would take, by its documentation: {line}" for line in times),
        *([] if times else ["would take: its documentation names no time"]),
        f"would write: {written}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
