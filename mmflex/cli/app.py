"""The command line: ``mmflex demo``, ``show``, ``families``, ``bench``; one file per group of commands."""

from __future__ import annotations

import typer
from rich.console import Console

app = typer.Typer(
    help="Sparse attention for long prompts of vision-language models, as block masks for FlexAttention.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.callback()
def _start() -> None:
    pass


def fail(message: str) -> typer.Exit:
    """Prints an error for people; raise what it returns."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {message}", highlight=False)
    return typer.Exit(1)
