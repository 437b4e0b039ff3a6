"""Runs the notebooks and stores their outputs in them, without anything that differs from machine to machine.

    python notebooks/refresh.py          # all
    python notebooks/refresh.py 02 04    # those whose names begin so

Edit notebooks in Jupyter or as text, run this, look at the pictures, and commit. The tests run every notebook again
(with nbmake) and check that what is committed is what `clean` leaves.
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent
COLOURS = 128
"""Of a stored picture: ours have few tones, and the files are a fifth of the size."""


def clean(notebook: NotebookNode) -> NotebookNode:
    """The notebook with outputs as they are stored: no timings, no widgets' state, pictures in few colours."""
    out = nbformat.from_dict(notebook)
    out.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    count = 0
    for number, cell in enumerate(out.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", {}
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = _joined(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "metadata" in output:
                output.metadata = {}
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _few_colours(output.data["image/png"])
    return out


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Text that was printed in a row as one output: where it is cut depends on the machine's speed."""
    out: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and out and out[-1].get("name") == output.name:
            out[-1].text += output.text
        else:
            out.append(output)
    return out


def _few_colours(data: str) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    if picture.mode == "P":
        return data.strip()
    file = io.BytesIO()
    few = picture.convert("RGB").quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def refresh(path: Path) -> None:
    """Runs one notebook and writes it back; RuntimeError if a cell printed to stderr (a warning, mostly)."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise RuntimeError(f"{path.name}, {cell.id}: {output.text}")
    nbformat.write(clean(notebook), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names; all notebooks if none is given")
    names = tuple(parser.parse_args().names)
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.name.startswith(names):
            refresh(path)
            print(f"{path.name}: {path.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
