"""Texts of the command line as numbers and specs, and numbers and tables as texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..ir.shown import shown


def numbers_of(text: str, kind: type, option: str) -> list[Any]:
    """The numbers of an option's text; ValueError names the option."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} is {shown(text)}: give numbers separated by commas, such as 0.25 or 1024,2048"
        ) from None


def text_of(option: str, text: str) -> str:
    """The text of an option, from a file if it is ``@file``; ValueError if that cannot be read."""
    if not text.startswith("@"):
        return text
    path = Path(text[1:])
    if not path.is_file():
        raise ValueError(f"{option} is {shown(text)}: there is no file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} is {shown(text)}: {path} is not text in UTF-8: {error}") from None


def spec_of(text: str) -> tuple[str, Any]:
    """(label, spec) of an argument: "default", a file, or a pattern's JSON itself."""
    from ..ir.pattern import Pattern
    from ..tuning.config import load_config, load_minference_config
    from ..tuning.default import default_named

    default = default_named(text)
    if default is not None:
        return text, default
    if text.lstrip().startswith("{"):
        try:
            pattern = Pattern.from_json(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{shown(text)} is not JSON: {error}") from None
        return str(pattern), pattern
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"there is no file {text}; give a config, 'default', or a pattern's JSON in quotes")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(data, list):
        return path.stem, load_minference_config(path)
    if isinstance(data, dict) and "pattern" in data:
        try:
            return path.stem, Pattern.from_json(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return path.stem, load_config(path)


def by_layer(spec: Any, config: Any) -> dict[int, tuple[Any, ...]]:
    """The patterns of a spec or config for the language model that ``config`` describes; ValueError where they are for
    another number of layers or heads."""
    from ..tuning.config import Config, per_layer

    layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    return spec.for_model(layers, heads) if isinstance(spec, Config) else per_layer(spec, range(layers), heads)


def counted(number: int, what: str) -> str:
    """A number with its noun: "1 head", "2 heads"."""
    return f"{number:,} {what if number == 1 else what + 's'}"


def in_short(number: int) -> str:
    """A number of parameters in three digits, with the unit that fits: "950", "12.3k", "135M", "7.62B"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 0.9995 * size:
            share = number / size
            return f"{share:,.{2 if share < 9.995 else 1 if share < 99.95 else 0}f}{unit}"
    return str(number)


def print_table(table: Table, console: Console) -> None:
    """Prints a table; where no terminal folds its lines, as wide as it needs to be."""
    if not console.is_terminal:
        from ..evaluation.tables import whole_width

        width = max(console.width, whole_width(table))
        console = Console(file=console.file, width=width, no_color=console.no_color)
    console.print(table)
