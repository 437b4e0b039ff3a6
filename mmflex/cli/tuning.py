"""``mmflex calibrate``: what attention costs on this device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .app import app, fail

if TYPE_CHECKING:
    import torch

    from ..tuning.calibrate import Calibration, Settings


@app.command()
def calibrate(
    backend: Annotated[
        list[str] | None,
        typer.Option(help="'flash', 'triton', 'cpu' or 'reference'; repeatable. Default: all that run here."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Shorter lengths, half the time.")] = False,
    lengths: Annotated[str | None, typer.Option(help="Tokens, as 16384,32768,131072: at least two.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="'bfloat16', 'float16' or 'float32'; several times.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Head dimension.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time budget of each backend and dtype.")] = None,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'auto': a GPU if there is one.")] = "auto",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the constants there, not to the cache.")
    ] = None,
) -> None:
    """Measure what blocks, launches, planning and dense attention cost here.

    mmflex decides by these numbers between sparse and dense, and between token orders. A few plans that differ in one
    thing each are timed, constants are fitted to them, and tested on patterns that were held out. They are kept in a
    file (its path is printed; the folder is [bold]$MMFLEX_CACHE[/] or the user's cache) and used from then on. Under
    three minutes on a GPU, under four on a CPU. Run it while nothing else runs.
    """
    import torch

    from ..compiler.constants import cache_path, keep, write_constants
    from ..tuning import calibrate as tool

    console = Console()
    console = console if console.is_terminal else Console(width=100)
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        path = cache_path() if output is None else output
        _check_writable(path)
        names = _backends(place, backend)
        kinds: list[str | None] = [*dtype] if dtype else [None]
        runs = [(name, _settings(place, quick, seconds, lengths, kind, heads, kv_heads, head_dim))
                for name in names for kind in kinds]  # fmt: skip
        for name, settings in runs:  # before the first is measured, for a while
            tool.backends.resolve(name, place, settings.head_dim, settings.dtype)
        made = []
        for name, settings in runs:
            with console.status(f"{name}") as status:

                def say(text: str, name: str = name, status: Any = status) -> None:
                    status.update(f"{name}: {text}")

                found = tool.calibrate(name, place, settings, say)
            made.append(found)
            show(found, console)
        records = [one.constants for one in made]
        if output is None:
            path = keep(records)
        else:
            write_constants(path, records)
    except torch.OutOfMemoryError as error:
        raise fail(f"{error}; give shorter --lengths, or fewer --heads") from error
    except (ValueError, RuntimeError, OSError) as error:
        raise fail(str(error)) from error
    console.print(f"written to {path}", soft_wrap=True)


def _backends(device: torch.device, asked: list[str] | None) -> list[str]:
    from ..runtime.backends import BACKENDS, why_not

    known = [name for name in BACKENDS if name not in ("dense", "reference")]
    for name in asked or []:
        if name in ("auto", "dense") or name not in BACKENDS:
            raise ValueError(f"backend {name!r}: calibrate one of {', '.join([*known, 'reference'])}")
    return asked or [name for name in known if why_not(name, device) is None]


def _settings(
    device: torch.device,
    quick: bool,
    seconds: float | None,
    lengths: str | None,
    dtype: str | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
) -> Settings:
    import torch

    from ..tuning.calibrate import settings_for

    given: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    if dtype is not None:
        if dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype {dtype!r}: use bfloat16, float16 or float32")
        given["dtype"] = getattr(torch, dtype)
    if lengths is not None:
        try:
            given["lengths"] = tuple(int(n) for n in lengths.split(","))
        except ValueError:
            raise ValueError(f"--lengths {lengths!r}: give numbers of tokens, as 4096,16384") from None
    return settings_for(device, quick, seconds, **given)


def _check_writable(path: Path) -> None:
    """An error now, not after minutes of measuring."""
    import tempfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror or error}; set MMFLEX_CACHE to a folder that can, or give "
            "--output FILE"
        ) from None


def _time(ms: float) -> str:
    """A duration with a fitting unit."""
    for unit, factor in (("ms", 1.0), ("us", 1e3), ("ns", 1e6)):
        if ms * factor >= 1 or unit == "ns":
            return f"{ms * factor:.3g} {unit}"
    return ""


def show(found: Calibration, console: Console) -> None:
    """Constants, how well they fit, and how well they predict what they were not fitted to."""
    from ..compiler.constants import COSTS

    c = found.constants
    title = f"{c.device}, {c.backend}, {c.dtype}, head dimension {c.head_dim}, torch {c.torch}"
    table = Table("one", "takes", "of a full block", title=title, box=box.SIMPLE)
    for name, what in COSTS.items():
        ms = getattr(c, name)
        table.add_row(what, _time(ms) if ms else "-", f"{ms / c.full:.3g}" if ms else "-")
    console.print(table)
    dense = ", ".join(f"{n} tokens {ms:.3g} ms (fit {c.dense * b + c.dense_call:.3g})" for n, b, ms in found.dense)
    console.print(f"dense: {dense}", highlight=False)
    for name, samples in (("fitted to", found.samples), ("held out", found.held_out)):
        if samples:
            console.print(predictions(found, samples, name))
    for case, reason in found.left_out:
        console.print(f"left out: {case}: {reason}", highlight=False)
    if found.held_out:
        console.print(f"largest error on what was held out, from block lists: {c.error:.0%}\n", highlight=False)


def _off(predicted: float, measured: float) -> str:
    return f"{predicted / measured - 1:+.0%}" if measured else ""


def predictions(found: Calibration, samples: Any, title: str) -> Table:
    """Measured milliseconds, with what was predicted from the block lists, and for whole calls from the expressions."""
    table = Table(title=f"{title}: ms measured, and how far predictions are off", box=box.SIMPLE)
    table.add_column("case", no_wrap=True)
    for name in ("tokens", "full", "partial", "attending", "planning", "call", "before planning"):
        table.add_column(name, justify="right", no_wrap=True)
    for s in samples:
        before, after = found.predictions(s)
        full, partial = (sum(getattr(w, kind) for w in s.works.values()) for kind in ("full", "partial"))
        attend = after.attend_ms + after.moving_ms
        table.add_row(
            s.case.name, str(s.case.tokens), f"{full:.0f}", f"{partial:.0f}",
            f"{s.attend:.3g} {_off(attend, s.attend)}", f"{s.planning:.3g} {_off(after.planning_ms, s.planning)}",
            f"{s.total:.3g} {_off(after.total_ms, s.total)}", _off(before.total_ms, s.total),
        )  # fmt: skip
    return table
