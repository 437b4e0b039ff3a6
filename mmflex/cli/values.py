"""Arguments of the command line that several commands take, and how their progress is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console


def numbers_of(text: str, kind: type, option: str) -> list[Any]:
    """Numbers separated by commas; ValueError names the option."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}: give numbers separated by commas, such as 0.25 or 1024,2048") from None


def spec_of(text: str) -> tuple[str, Any]:
    """(label, spec) of an argument: a file, or a pattern's JSON itself."""
    from ..ir.pattern import Pattern
    from ..tuning.config import load_config, load_minference_config

    if text.lstrip().startswith("{"):
        try:
            pattern = Pattern.from_json(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{text!r} is not JSON: {error}") from None
        return str(pattern), pattern
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"there is no file {text}; give a config, or a pattern's JSON in quotes")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(data, list):
        return path.stem, load_minference_config(path)
    if isinstance(data, dict) and "pattern" in data:
        try:
            return path.stem, Pattern.from_json(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return path.stem, load_config(path)


class Progress:
    """What is running: a status line on a terminal, otherwise one line each."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status = console.status("") if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.status is not None:
            self.status.start()
        return self

    def __call__(self, text: str) -> None:
        if self.status is not None:
            self.status.update(text)
        else:
            self.console.print(text, style="dim", highlight=False)

    def __exit__(self, *args: object) -> None:
        if self.status is not None:
            self.status.stop()
