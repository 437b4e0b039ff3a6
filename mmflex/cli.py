"""The command line: ``mmflex demo``, ``mmflex show``, ``mmflex families``, ``mmflex bench``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .tuning.config import Config

app = typer.Typer(
    help="Sparse attention for long prompts of vision-language models, as block masks for FlexAttention.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.callback()
def _start() -> None:
    pass


def _fail(message: str) -> typer.Exit:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {message}", highlight=False)
    return typer.Exit(1)


# ---- demo -----------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where the picture of the masks goes (PNG, SVG, PDF).")
    ] = Path("mmflex_demo.png"),
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'auto': a GPU if there is one.")] = "auto",
    backend: Annotated[str, typer.Option(help="Kernels: 'auto', 'cpu', 'triton', 'flash' or 'reference'.")] = "auto",
    frames: Annotated[int, typer.Option(hidden=True)] = 512,
    size: Annotated[int, typer.Option(hidden=True)] = 224,
    layers: Annotated[int, typer.Option(hidden=True)] = 2,
    runs: Annotated[int, typer.Option(hidden=True)] = 2,
) -> None:
    """See it work: a small Qwen2.5-VL reads a video of 16 thousand tokens, dense and sparse, side by side.

    Builds the real model class with random weights, draws a video of moving shapes (nothing is downloaded), and
    prefills it with PyTorch's attention and through [bold]mmflex.patch[/]. Prints times with planning counted, what
    each pattern computes, how far the outputs are apart and why the plan is what it is. Under two minutes on two cores.
    """
    if importlib.util.find_spec("transformers") is None:
        raise _fail("the demo needs transformers: pip install 'mmflex\\[transformers,plot]'")
    from . import demo as demo_

    settings = demo_.Settings(frames=frames, size=size, layers=layers, runs=runs, device=device, backend=backend)
    try:
        demo_.run(settings, Console(), output)
    except (RuntimeError, ValueError, ImportError) as error:
        raise _fail(str(error)) from error


# ---- show -----------------------------------------------------------------------------------------------------------


@app.command()
def show(
    config: Annotated[
        Path, typer.Argument(help="A config: JSON from mmflex.save_config, or one of MInference's files.")
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Draw it to this file (PNG, SVG, PDF).")] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", help="Only this layer: the whole pattern of each head.")
    ] = None,
) -> None:
    """Show which pattern each head of a model has.

    Prints a small picture: a line per layer, a letter per head. With [bold]-o picture.png[/] it is drawn to a file,
    with [bold]--layer 3[/] every head of that layer is listed with all its numbers.
    """
    from .tuning.config import load_config, load_minference_config

    try:
        found = load_minference_config(config) if config.read_text().lstrip().startswith("[") else load_config(config)
    except FileNotFoundError:
        raise _fail(f"there is no file {config}; write one with mmflex.save_config(config, path)") from None
    except (ValueError, OSError) as error:
        raise _fail(str(error)) from None
    console = Console()
    if layer is not None:
        if not 0 <= layer < found.layers:
            raise _fail(f"layer is {layer}, the config has {found.layers} layers: give 0 to {found.layers - 1}")
        console.print(layer_table(found, layer))
    if output is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise _fail("drawing needs matplotlib: pip install 'mmflex\\[plot]'")
        import matplotlib

        matplotlib.use("Agg")
        from .plot import plot_config

        try:
            plot_config(found).savefig(output, bbox_inches="tight")
        except ValueError as error:
            raise _fail(str(error)) from None
        console.print(f"drawn to {output}")
    elif layer is None:
        print_config(found, console)


def layer_table(config: Config, layer: int) -> Table:
    """Heads of a layer, those alike joined, with the whole pattern."""
    table = Table(title=f"layer {layer} of {config.model or 'the config'}")
    table.add_column("heads", justify="right")
    table.add_column("pattern")
    patterns = config.patterns.get(layer)
    if patterns is None:
        table.add_row(f"0-{config.heads - 1}", "the model's own attention")
        return table
    first = 0
    for head in range(1, len(patterns) + 1):
        if head == len(patterns) or patterns[head] != patterns[first]:
            table.add_row(str(first) if head - first == 1 else f"{first}-{head - 1}", str(patterns[first]))
            first = head
    return table


def print_config(config: Config, console: Console) -> None:
    """The text picture: a line per layer, a letter per head, then the legend and where the config is from."""
    from .plot import family, look

    names = [family(p) for patterns in config.patterns.values() for p in patterns]
    known = list(dict.fromkeys(names))
    letters = _letters(known)
    console.print(f"[bold]{config.model or 'config'}[/]: {config.layers} layers x {config.heads} heads")
    ruler = "".join(str(h // 10 % 10) if h % 10 == 0 and h else ("|" if h % 10 == 0 else ("'" if h % 5 == 0 else " "))
                    for h in range(config.heads))  # fmt: skip
    console.print(Text(f"      {ruler}", style="dim"))
    for layer in range(config.layers):
        line = Text(f"{layer:>5} ", style="dim")
        for pattern in config.patterns.get(layer, ()):
            name = family(pattern)
            line.append(letters[name], style=f"bold {_ink(look(name, known)[1])} on {look(name, known)[1]}")
        if layer not in config.patterns:
            line.append("·" * config.heads, style="dim")
        console.print(line, soft_wrap=True)
    for name, count in Counter(names).most_common():
        distinct = dict.fromkeys(str(p) for patterns in config.patterns.values() for p in patterns if family(p) == name)
        examples = ", ".join(list(distinct)[:3]) + (f" and {len(distinct) - 3} more" if len(distinct) > 3 else "")
        key = Text(f"    {letters[name]} ", style="bold")
        key.append(f"{name}, {count} heads: {examples}", style="default not bold")
        console.print(key, soft_wrap=True)
    if len(config.patterns) < config.layers:
        console.print(f"    · the model's own attention, {config.layers - len(config.patterns)} layers")
    if config.provenance:
        console.print(
            "from: " + ", ".join(f"{k} {v}" for k, v in config.provenance.items()), style="dim", soft_wrap=True
        )


def _ink(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"


def _letters(known: list[str]) -> dict[str, str]:
    """One letter for each family: its own, and digits for compositions and families of other packages."""
    from .plot import FAMILIES

    spare = iter("123456789abcdefghijklmnopqrstuvwxyz")
    return {name: FAMILIES[name][0] if name in FAMILIES else next(spare, "?") for name in known}


# ---- families -------------------------------------------------------------------------------------------------------


@app.command()
def families() -> None:
    """List the transformers model families whose prompts mmflex can read, and what runs sparse in each.

    Any other causal language model works as well, its tokens taken as text; for a vision-language model that is not
    listed, give the layout yourself: [bold]with mmflex.token_layout(layout):[/]
    """
    from .integrations import layouts

    table = Table(title="model families")
    for name in ("model_type", "images and videos", "attention"):
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
        holds = getattr(entry, "note", "") or ", ".join(getattr(entry, "names", ()) or ("image", "video"))
        rows.append((model_type, holds, SPECIAL.get(model_type, "sparse prefill")))
    rows += [(name, "text", SPECIAL.get(name, "sparse prefill")) for name in TEXT_ONLY]
    return rows


# ---- bench ----------------------------------------------------------------------------------------------------------


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    which: Annotated[
        str, typer.Argument(help="'auto', or a module of benchmarks/: cpu, attention, prefill, ...")
    ] = "auto",
) -> None:
    """Measure it here: attention against PyTorch's, planning counted.

    Runs [bold]python -m benchmarks.cpu[/] without a GPU and [bold]python -m benchmarks.attention[/] with one; further
    options are passed on (try [bold]mmflex bench cpu --help[/]). The benchmarks come with the source, not with the
    installed package: run it from a checkout.
    """
    if which == "auto":
        import torch

        which = "attention" if torch.cuda.is_available() else "cpu"
    root = next(
        (p for p in (Path.cwd(), Path(__file__).parents[1]) if (p / "benchmarks" / "__init__.py").exists()), None
    )
    if root is None:
        raise _fail("there is no benchmarks folder here: run it from a checkout of mmflex")
    if not (root / "benchmarks" / f"{which}.py").exists():
        known = sorted(p.stem for p in (root / "benchmarks").glob("*.py") if not p.stem.startswith("_"))
        raise _fail(f"there is no benchmark {which!r} in {root / 'benchmarks'}: choose one of {', '.join(known)}")
    command = [sys.executable, "-m", f"benchmarks.{which}", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=root, check=False).returncode)
