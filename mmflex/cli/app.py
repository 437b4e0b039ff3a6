"""The command line: ``mmflex demo``, ``show``, ``families``, ``bench``; one file per group of commands."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    help="Sparse attention for long prompts of vision-language models, as block masks for FlexAttention.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.callback()
def _start() -> None:
    pass


def printable(text: object) -> str:
    """A text that may be anybody's, without what a terminal obeys."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(text))


def plain(text: object) -> str:
    """The same for `Console.print`, which takes brackets for markup."""
    return escape(printable(text))


def fail(message: str) -> typer.Exit:
    """Prints an error for people; raise what it returns."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {plain(message)}", highlight=False)
    return typer.Exit(1)
