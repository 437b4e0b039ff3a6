"""The Python blocks of a page: run from top to bottom in one namespace, with what they print.

A ```text block right after one is what it prints. A block that starts with ```python needs-gpu or ```python needs-model
(one that is downloaded) is compiled and not run.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PRINTS = r"(?:\n\n```text\n(?P<prints>.*?)^```$)?"
BLOCK = re.compile(r"^```python(?P<mark>[^\n]*)\n(?P<source>.*?)^```$" + _PRINTS, re.M | re.S)
MARKS = ("", " needs-gpu", " needs-model")


@dataclass(frozen=True)
class Ran:
    """A block that was run: its line in the page, what it printed, what the page says (None: nothing), and where."""

    line: int
    printed: str
    says: str | None
    span: tuple[int, int]


def run(page: Path) -> Iterator[Ran]:
    """Runs the blocks of a page in the working folder.

    Raises:
        ValueError: an unknown mark. SyntaxError, and whatever a block raises; tracebacks have the page's line numbers.
    """
    text = page.read_text("utf-8")
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        if block["mark"] not in MARKS:
            raise ValueError(f"{page}, line {line}: the mark is{block['mark']!r}: use none, or one of{MARKS[1:]}")
        code = compile("\n" * line + block["source"], str(page), "exec", dont_inherit=True)
        if not block["mark"]:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
            yield Ran(line, out.getvalue(), block["prints"], block.span("prints"))


def with_prints(page: Path) -> str:
    """The page's text with what its blocks print now."""
    text = page.read_text("utf-8")
    for ran in reversed(list(run(page))):
        if ran.says is not None:
            text = text[: ran.span[0]] + ran.printed.rstrip() + "\n" + text[ran.span[1] :]
    return text
