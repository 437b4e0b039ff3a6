"""Tables of rich where there is no console: as a text for `print`, as HTML for notebooks."""

from __future__ import annotations

import io
from collections.abc import Iterable
from html import escape

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def whole_width(table: Table) -> int:
    """Characters of a line in which no cell is folded."""
    endless = Console(width=10_000)
    return Measurement.get(endless, endless.options, table).maximum


def as_text(tables: Iterable[Table]) -> str:
    """Tables one below the other, each as wide as it needs to be, without colours."""
    texts = []
    for table in tables:
        file = io.StringIO()
        Console(file=file, width=whole_width(table), color_system=None, markup=False).print(table)
        texts.append(file.getvalue().rstrip("\n"))
    return "\n\n".join(texts)


def as_html(tables: Iterable[Table]) -> str:
    """Tables one below the other, with their titles; wider ones scroll."""
    return "".join(f'<div style="overflow-x:auto">{_html(table)}</div>' for table in tables)


def _html(table: Table) -> str:
    aligned = [f'style="text-align:{column.justify}"' for column in table.columns]
    head = "".join(
        f"<th {align}>{escape(str(column.header))}</th>" for align, column in zip(aligned, table.columns, strict=True)
    )
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join(
        "<tr>" + "".join(f"<td {a}>{escape(str(cell))}</td>" for a, cell in zip(aligned, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><caption>{escape(str(table.title))}</caption><tr>{head}</tr>{body}</table>"
