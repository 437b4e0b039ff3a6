"""``mmflex show``: which pattern each head of a model has, as text or as a picture."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .app import app, fail

if TYPE_CHECKING:
    from ..tuning.config import Config


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
    from ..tuning.config import load_config, load_minference_config

    try:
        found = load_minference_config(config) if config.read_text().lstrip().startswith("[") else load_config(config)
    except FileNotFoundError:
        raise fail(f"there is no file {config}; write one with mmflex.save_config(config, path)") from None
    except (ValueError, OSError) as error:
        raise fail(str(error)) from None
    console = Console()
    if layer is not None:
        if not 0 <= layer < found.layers:
            raise fail(f"layer is {layer}, the config has {found.layers} layers: give 0 to {found.layers - 1}")
        console.print(layer_table(found, layer))
    if output is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise fail("drawing needs matplotlib: pip install 'mmflex\\[plot]'")
        import matplotlib

        matplotlib.use("Agg")
        from ..plot import plot_config

        try:
            plot_config(found).savefig(output, bbox_inches="tight")
        except ValueError as error:
            raise fail(str(error)) from None
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
    from ..plot import family, look

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
    from ..plot import FAMILIES

    spare = iter("123456789abcdefghijklmnopqrstuvwxyz")
    return {name: FAMILIES[name][0] if name in FAMILIES else next(spare, "?") for name in known}
