"""The Sphinx extension of this documentation: markers in pages, and docstrings as they are meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import markers

_AS_WRITTEN = ("attribute", "property")
"""Kinds of members whose docstrings are sentences: what stands before a colon is no type."""


def setup(app: Any) -> dict[str, Any]:
    """Connects everything."""
    from docutils import nodes

    written: dict[str, list[str]] = {}

    def read(app: Any, name: str, source: list[str]) -> None:
        page = Path(app.env.doc2path(name))
        if markers.TABLE.search(source[0]) or markers.PLOT.search(source[0]):
            app.env.note_reread()  # results may change without the page
        source[0] = markers.with_tables(markers.with_examples(source[0], page))

    def keep(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        if what in _AS_WRITTEN:
            written[name] = list(lines)

    def restore(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        if name in written:
            lines[:] = written.pop(name)

    def dashes(app: Any, tree: nodes.document) -> None:
        for text in list(tree.findall(nodes.Text)):
            code = isinstance(text.parent, (nodes.literal, nodes.FixedTextElement, nodes.raw, nodes.math))
            if " -- " in text and not code:  # as between a parameter and what it is
                text.parent.replace(text, nodes.Text(re.sub(" -- (?!-)", " \N{EN DASH} ", text)))

    app.connect("source-read", read)
    app.connect("doctree-read", dashes)
    app.connect("autodoc-process-docstring", keep, priority=400)  # napoleon is at 500
    app.connect("autodoc-process-docstring", restore, priority=600)
    return {"parallel_read_safe": True}
