"""Markers in the pages, and what stands for them.

``<!-- example: Grid(local=512); mask, orders -->`` to ``<!-- end -->``: formula, numbers and pictures of a pattern.
These are kept in the pages, to be read anywhere; ``python -m docs.tools`` renews them, and the tests say when to.

``<!-- table: attention -->``, ``<!-- plot: attention_times -->``: from code or results, made when the site is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from . import commands, examples, plots, results

ROOT = Path(__file__).parents[1]
EXAMPLE = re.compile(r"^<!-- example: (.*?) -->\n(.*?)^<!-- end -->$", re.M | re.S)
TABLE = re.compile(r"^<!-- table: (.*?) -->$", re.M)
PLOT = re.compile(r"^<!-- plot: (.*?) -->$", re.M)
TABLES: dict[str, Callable[[], str]] = {**results.TABLES, "commands": commands.commands}


def pages() -> list[Path]:
    """All pages."""
    return sorted(ROOT.glob("**/*.md"))


def found_examples(page: Path) -> list[examples.Example]:
    """The examples of a page, in order."""
    markers = EXAMPLE.findall(page.read_text("utf-8"))
    return [examples.Example.parse(f"{page.stem}-{i}", body) for i, (body, _) in enumerate(markers)]


def with_examples(text: str, page: Path) -> str:
    """A page's text with its examples made anew."""
    own = iter(found_examples(page))
    up = "../" * (len(page.relative_to(ROOT).parts) - 1)
    return EXAMPLE.sub(lambda m: f"<!-- example: {m[1]} -->\n\n{next(own).markdown(up)}\n<!-- end -->", text)


def with_tables(text: str) -> str:
    """A page's text with its tables and plots; ValueError for one that there is not."""

    def made(kind: str, known: dict[str, Callable[[], str]]) -> Callable[[re.Match[str]], str]:
        def one(match: re.Match[str]) -> str:
            if match[1] not in known:
                raise ValueError(f"there is no {kind} {match[1]!r}: use one of {', '.join(known)}")
            return known[match[1]]()

        return one

    return PLOT.sub(made("plot", plots.PLOTS), TABLE.sub(made("table", TABLES), text))
