"""Texts of the command line as numbers and specs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..ir.shown import shown


def numbers_of(text: str, kind: type, option: str) -> list[Any]:
    """The numbers of an option's text; ValueError names the option."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} is {shown(text)}: give numbers separated by commas, such as 0.25 or 1024,2048"
        ) from None


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
