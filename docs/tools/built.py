"""What a built page must hold to read well without a network: ``python -m docs.tools.built build/docs``.

Formulas are converted (no LaTeX in the text), nothing is loaded from elsewhere, and tables can be scrolled.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

from .mathml import RAW

_QUOTED = ("code", "pre", "script", "style", "svg")
_LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src"}
_VOID = ("img", "link", "meta", "br", "hr", "input", "path", "use")


class _Page(HTMLParser):
    """Collects what is wrong with one page."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.open: list[tuple[str, str]] = []  # (tag, class) of elements around the present place

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        address = given.get(_LOADED.get(tag, ""), "")
        loads = tag != "link" or "stylesheet" in given.get("rel", "")
        if loads and address.startswith(("http:", "https:", "//")):
            self.wrong.append(f"loads {address}")
        scrolls = any("table-wrapper" in names for _, names in self.open)
        if tag == "table" and "docutils" in given.get("class", "") and not scrolls:
            self.wrong.append("a table that cannot be scrolled")
        if tag not in _VOID:
            self.open.append((tag, given.get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        while self.open:
            if self.open.pop()[0] == tag:
                break

    def handle_data(self, data: str) -> None:
        raw = RAW.search(data)
        if raw and not any(tag in _QUOTED for tag, _ in self.open):
            self.wrong.append(f"raw LaTeX: {data.strip()[:60]!r}")


def problems(page: str) -> list[str]:
    """What is wrong with the HTML of a page."""
    parser = _Page()
    parser.feed(page)
    return parser.wrong


def main(folder: Path) -> int:
    """Prints the problems of all pages; 1 if there are any, or no pages."""
    pages = sorted(folder.rglob("*.html"))
    found = [f"{page.relative_to(folder)}: {wrong}" for page in pages for wrong in problems(page.read_text("utf-8"))]
    print("\n".join(found) or f"{len(pages)} pages read without a network")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
