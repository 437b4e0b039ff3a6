"""Formulas as MathML, made when the site is built: browsers draw them without a script and without a network.

latex2mathml converts everything but alignment, so ``aligned`` becomes a table here, cell by cell.
"""

from __future__ import annotations

import re
from typing import Any
from xml.sax.saxutils import unescape

from latex2mathml.converter import convert
from sphinx.errors import SphinxError

_ALIGNED = re.compile(r"^\s*\\begin\{aligned\}(.*)\\end\{aligned\}\s*$", re.S)
_ROWS = re.compile(r"\\\\\s*\n")
_CELLS = re.compile(r"(?<!\\)&")
_LETTERS = re.compile(r'(?:<mi mathvariant="normal">\w</mi>){2,}')
RAW = re.compile(r"\\[a-zA-Z]+|\\\\|\\[;,!{}]|(?<!\$)\$\$(?!\$)")
"""What LaTeX looks like that was not converted."""


def mathml(latex: str, display: bool = False) -> str:
    """A formula as a ``<math>`` element.

    Raises:
        ValueError: something in it was not converted; the message has it and the formula.
    """
    aligned = _ALIGNED.match(latex)
    if aligned is None:
        return _checked(convert(latex, display="block" if display else "inline"), latex)
    rows = []
    for line in _ROWS.split(aligned[1].strip()):
        cells = (_inside(_checked(convert(cell), latex)) if cell.strip() else "" for cell in _CELLS.split(line))
        rows.append("<mtr>" + "".join(f"<mtd>{cell}</mtd>" for cell in cells) + "</mtr>")
    table = f'<mtable class="aligned" displaystyle="true">{"".join(rows)}</mtable>'
    return f'<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">{table}</math>'


def _inside(math: str) -> str:
    return re.sub(r"^<math[^>]*>|</math>$", "", math)


def _checked(made: str, latex: str) -> str:
    text = unescape(re.sub(r"<[^>]*>", " ", made))
    raw = RAW.search(text)
    if raw or re.search(r"<m[io]>&</m[io]>", made):
        raise ValueError(f"{raw[0] if raw else '&'!r} was not converted to MathML in {latex.strip()!r}")
    # names come letter by letter
    return _LETTERS.sub(lambda m: f"<mi>{re.sub('<[^>]*>', '', m[0])}</mi>", made)


def setup(app: Any) -> None:
    """Registers the renderer "mathml"."""
    from docutils import nodes

    def inline(self: Any, node: nodes.Node) -> None:
        self.body.append(f'<span class="math">{_rendered(node, False)}</span>')
        raise nodes.SkipNode

    def block(self: Any, node: nodes.Node) -> None:
        self.body.append(f'<div class="math">{_rendered(node, True)}</div>\n')
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))


def _rendered(node: Any, display: bool) -> str:
    try:
        return mathml(node.astext(), display)
    except Exception as error:
        raise SphinxError(f"{node.source}, line {node.line}: {error}") from error
