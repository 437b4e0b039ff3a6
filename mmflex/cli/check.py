"""``mmflex check``: is mmflex right on this machine?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .app import app, fail


@app.command()
def check(
    backend: Annotated[
        list[str] | None,
        typer.Option(help="'flash', 'triton', 'cpu', 'dense' or 'reference'; repeatable. Default: all that run here."),
    ] = None,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'auto': a GPU if there is one.")] = "auto",
    long: Annotated[bool, typer.Option("--long", help="A million tokens too (a GPU with 80 GB).")] = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Every work with every kind of prompt on every backend.")
    ] = False,
    only: Annotated[str, typer.Option(help="Checks whose name contains this, such as 'residues'.")] = "",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a core, at most 16.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all rows, versions and the hash of the sources.")] = None,
) -> None:
    """Is mmflex right on this machine?

    Runs every kind of launch on every backend that can run here, whatever the cost model would choose, and compares
    output, log-sum-exp and block lists with masks and float64 softmax that do not go through the compiler; then sampled
    rows at 128 thousand tokens, values that are not finite, and calls in a row. Under five minutes on two cores, under
    two on a GPU machine with 16. Exits with 1 if anything is wrong. Put its last lines into a bug report.
    """
    from .. import selfcheck

    console = Console(stderr=True)

    def progress(done: int, total: int, row: dict[str, Any]) -> None:
        if console.is_terminal:
            print(f"\r{done} of {total}", end="" if done < total else "\r", file=console.file, flush=True)
        if row["verdict"] != "ok":
            print(f"{row['group']}: {row['name']}: {row['verdict']}", file=console.file, flush=True)

    try:
        report = selfcheck.check(
            device=device, backends=backend, long=long, thorough=thorough, only=only, workers=workers, progress=progress
        )
    except (RuntimeError, ValueError) as error:
        raise fail(str(error)) from error
    print(report)
    if json is not None:
        report.save(json)
    if not report.ok:
        raise typer.Exit(1)
