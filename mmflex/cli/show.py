"""``mmflex show``: which pattern each head of a model has, or what a saved plan computes, as text or as a picture."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .app import app, fail, plain, printable
from .options import counted

if TYPE_CHECKING:
    from ..snapshot import Snapshot
    from ..tuning.config import Config

PICTURES = 6
"""Heads of a plan that are drawn if none is named: the first of each of so many patterns."""


@app.command()
def show(
    file: Annotated[
        Path,
        typer.Argument(
            help="A config (JSON from mmflex.save_config, or one of MInference's files), or a plan from "
            "mmflex.plot.save_plan (.npz)."
        ),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Draw it to this file (PNG, SVG, PDF).")] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", help="Of a config only this layer: the whole pattern of each head.")
    ] = None,
    head: Annotated[int | None, typer.Option("--head", help="Of a plan only this head.")] = None,
    prompt: Annotated[int | None, typer.Option("--prompt", help="Of a plan, which prompt of the batch (0).")] = None,
) -> None:
    """Show which pattern each head of a model has, or what a saved plan computes.

    A config is printed as a line per layer, a letter per head. A plan is printed as its numbers and small text pictures
    of one head of each pattern. With [bold]-o picture.png[/] it is drawn to a file; [bold]--layer 3[/] lists the heads
    of a config's layer with all their numbers, [bold]--head 5[/] shows one head of a plan.
    """
    console = Console()
    if _is_plan(file):
        if layer is not None:
            raise fail(f"{file} is a plan of one layer: --layer is for configs; use --head")
        _show_plan(file, head, prompt or 0, output, console)
    else:
        if head is not None or prompt is not None:
            raise fail(f"{file} is a config: --head and --prompt are for saved plans; use --layer")
        _show_config(file, layer, output, console)


def _is_plan(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(4) == b"PK\x03\x04"
    except FileNotFoundError:
        raise fail(
            f"there is no file {file}; write one with mmflex.save_config(config, path) or "
            "mmflex.plot.save_plan(plan, path)"
        ) from None
    except OSError as error:
        raise fail(str(error)) from None


def _draw(draw: str, output: Path, console: Console, *args: Any, **options: Any) -> None:
    """Calls a function of `mmflex.plot` and saves its figure."""
    if importlib.util.find_spec("matplotlib") is None:
        raise fail("drawing needs matplotlib: pip install 'mmflex[plot]'")
    import matplotlib

    matplotlib.use("Agg")
    from .. import plot

    try:
        getattr(plot, draw)(*args, **options).savefig(output, bbox_inches="tight")
    except (ValueError, OSError) as error:
        raise fail(str(error)) from None
    console.print(f"drawn to {output}")


# ---- configs ---------------------------------------------------------------------------------------------------------


def _show_config(file: Path, layer: int | None, output: Path | None, console: Console) -> None:
    from ..tuning.config import load_config, load_minference_config

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise fail(f"{file} is neither a config (JSON) nor a saved plan (.npz)") from None
    except OSError as error:
        raise fail(str(error)) from None
    try:
        found = load_minference_config(file) if text.lstrip().startswith("[") else load_config(file)
    except ValueError as error:
        raise fail(str(error)) from None
    if layer is not None:
        if not 0 <= layer < found.layers:
            raise fail(
                f"layer is {layer}, the config has {counted(found.layers, 'layer')}: give 0 to {found.layers - 1}"
            )
        console.print(layer_table(found, layer))
    if output is not None:
        _draw("plot_config", output, console, found)
    elif layer is None:
        print_config(found, console)


def layer_table(config: Config, layer: int) -> Table:
    """Heads of a layer, those alike joined, with the whole pattern."""
    table = Table(title=f"layer {layer} of {plain(config.model or 'the config')}")
    table.add_column("heads", justify="right")
    table.add_column("pattern")
    patterns = config.patterns.get(layer)
    if patterns is None:
        table.add_row(f"0-{config.heads - 1}", "the model's own attention")
        return table
    first = 0
    for head in range(1, len(patterns) + 1):
        if head == len(patterns) or patterns[head] != patterns[first]:
            table.add_row(str(first) if head - first == 1 else f"{first}-{head - 1}", plain(patterns[first]))
            first = head
    return table


def print_config(config: Config, console: Console) -> None:
    """The text picture: a line per layer, a letter per head, then the legend and where the config is from."""
    from ..plot import family, look

    names = [family(p) for patterns in config.patterns.values() for p in patterns]
    known = list(dict.fromkeys(names))
    letters = _letters(known)
    console.print(
        f"[bold]{plain(config.model or 'config')}[/]: {counted(config.layers, 'layer')} x "
        f"{counted(config.heads, 'head')}"
    )
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
        key.append(printable(f"{name}, {counted(count, 'head')}: {examples}"), style="default not bold")
        console.print(key, soft_wrap=True)
    if len(config.patterns) < config.layers:
        console.print(f"    · the model's own attention, {counted(config.layers - len(config.patterns), 'layer')}")
    facts = [f"{k} {v}" for k, v in config.provenance.items() if isinstance(v, (str, int, float))]
    if facts:
        console.print("from: " + plain(", ".join(facts)), style="dim", soft_wrap=True)


def _ink(colour: str) -> str:
    from ..plot.style import ink

    return ink(colour)


def _letters(known: list[str]) -> dict[str, str]:
    """One letter for each family: its own, and digits for compositions and families of other packages."""
    from ..plot import FAMILIES

    spare = iter("123456789abcdefghijklmnopqrstuvwxyz")
    return {name: FAMILIES[name][0] if name in FAMILIES else next(spare, "?") for name in known}


# ---- plans -----------------------------------------------------------------------------------------------------------


def _show_plan(file: Path, head: int | None, prompt: int, output: Path | None, console: Console) -> None:
    from ..plot import load_plan

    try:
        plan = load_plan(file)
        plan.check(0 if head is None else head, prompt)
    except (ValueError, OSError) as error:
        raise fail(str(error)) from None
    heads = [heads[0] for _, heads in plan.groups][:PICTURES]
    if output is None:
        print_plan(plan, heads if head is None else [head], prompt, console, alone=head is not None)
    elif head is None:
        _draw("plot_masks", output, console, plan, heads, prompt)
    else:
        _draw("plot_mask", output, console, plan, head, prompt)


def print_plan(plan: Snapshot, heads: list[int], prompt: int, console: Console, *, alone: bool = False) -> None:
    """The numbers of a plan, and text pictures of some heads; ``alone``: of one head, as wide as the terminal."""
    from ..plot.html import ranges
    from ..plot.text import ASCII, UNICODE, mask_text, side_by_side

    console.print(
        f"[bold]plan[/] of {plan.batch} x {counted(plan.heads, 'head')} on {counted(plan.kv_heads, 'KV head')}, "
        f"{plan.queries:,} {'query' if plan.queries == 1 else 'queries'}, {counted(plan.length, 'key')}; backend "
        f"{plain(plan.backend)}, blocks of {plan.tile}, {plan.density.mean():.1%} of the causal pairs computed"
        f"{'; ' + plain(plan.note) if plan.note else ''}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for line in plan.layout.summary().splitlines()[prompt : prompt + 1]:
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    if not alone:
        table = Table()
        for name in ("heads", "pattern", "density", "full", "partial"):
            table.add_column(name, justify="left" if name in ("heads", "pattern") else "right", overflow="fold")
        for pattern, group in plan.groups:
            full, partial = (sum(found) for found in zip(*(plan.counts(h, prompt) for h in group), strict=True))
            share = plan.density[prompt, list(group)].mean()
            table.add_row(ranges(group), plain(pattern), f"{share:.1%}", f"{full:,}", f"{partial:,}")
        console.print(table)
    try:
        UNICODE.encode(console.encoding)
        characters = UNICODE
    except UnicodeEncodeError:
        characters = ASCII
    room = max(20, console.width)
    width = min(96, room) if alone or len(heads) == 1 else min(36, max(20, (room - 6) // 3))
    pictures = []
    for h in heads:
        title = f"head {h}: {printable(plan.patterns[h])}"
        title = title if len(title) <= width else title[: width - 1] + "…"
        pictures.append([title, *mask_text(plan, h, prompt, width=width, characters=characters)])
    across = max(1, (room + 3) // (width + 3))
    for first in range(0, len(pictures), across):
        console.print()
        for line in side_by_side(pictures[first : first + across]):
            console.print(Text(line), soft_wrap=True)
    console.print()
    words = ("mostly in full blocks", "computed", "lines (under an eighth)", "skipped")
    console.print(Text("   ".join(f"{c} {word}" for c, word in zip(characters, words, strict=False))), style="dim")
