"""The ```python blocks of the README and of docs/ run, page by page, from top to bottom.

A block that starts with ```python no-run is left out. docs/design.md is run by test_readme.py, which compares output.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
    if page.name != "design.md" and BLOCK.search(page.read_text("utf-8"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # blocks may write files
    torch.manual_seed(0)
    text = page.read_text("utf-8")
    namespace = {"__name__": __name__}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        source = "\n" * line + block[1]  # so that a traceback shows the page's own line numbers
        exec(compile(source, str(page), "exec", dont_inherit=True), namespace)
