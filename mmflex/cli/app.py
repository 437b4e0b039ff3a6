"""The command line itself; its commands are in the other files of this folder, one per group."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..version import __version__

app = typer.Typer(
    help="Sparse attention for long prompts of vision-language models, as block masks for FlexAttention.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


PACKAGES = ("torch", "triton", "flash-attn-4", "transformers")
"""Packages whose versions decide what runs; all but the first are optional."""


def _versions(asked: bool) -> None:
    if not asked:
        return
    print(f"mmflex {__version__}, Python {platform.python_version()}")
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        print(f"{package} {found}")
    raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_versions, is_eager=True, help="Versions of mmflex and of the packages it runs on."
        ),
    ] = False,
) -> None:
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
