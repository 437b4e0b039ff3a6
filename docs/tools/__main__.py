"""Renews what is made from the code and kept in the pages.

python -m docs.tools            # formulas, numbers and pictures of the examples
python -m docs.tools --prints   # also what Python blocks print; runs all of them
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from pathlib import Path

from . import blocks
from .examples import PICTURES
from .markers import found_examples, pages, with_examples


def main() -> None:
    """Renews pages and pictures, and deletes pictures that no page shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prints", action="store_true", help="also run the Python blocks and keep what they print")
    args = parser.parse_args()
    root = PICTURES.parents[1]
    texts = [page.read_text("utf-8") for page in (*pages(), *root.glob("*.md"))]
    shown = {PICTURES / name for text in texts for name in re.findall(r"pictures/([\w-]+\.png)", text)}
    for page in pages():
        before = text = page.read_text("utf-8")
        for example in found_examples(page):
            example.draw()
            shown |= {example.picture(view) for view in example.views}
        if args.prints and blocks.BLOCK.search(text):
            with tempfile.TemporaryDirectory() as folder:  # blocks write files
                os.chdir(folder)
                text = blocks.with_prints(page)
                os.chdir(PICTURES)
                for drawn in Path(folder).glob("gallery-*.png"):
                    shutil.copy(drawn, PICTURES)
        text = with_examples(text, page)
        if text != before:
            page.write_text(text, "utf-8")
            print(f"renewed {page}")
    for path in set(PICTURES.glob("*.png")) - shown:
        path.unlink()
        print(f"deleted {path}")


if __name__ == "__main__":
    main()
