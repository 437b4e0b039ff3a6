"""The committed notebooks: run, quiet, and free of what differs from machine to machine. nbmake runs them again."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
TOPICS = [
    "first_look",
    "grid_heads",
    "modality_boundaries",
    "your_own_pattern",
    "vision_language_model",
    "search",
    "what_answers_need",
]


@pytest.fixture(scope="module")
def refresh() -> ModuleType:
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("refresh", FOLDER / "refresh.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_are_there_in_order() -> None:
    assert [path.stem for path in PATHS] == [f"{i:02d}_{topic}" for i, topic in enumerate(TOPICS, start=1)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_quiet(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run from top to bottom"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    text = "\n".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs)
    html = "\n".join(str(o.get("data", {}).get("text/html", "")) for o in outputs)
    for found in re.findall(r"0x[0-9a-f]{6,}|(?:/[\w.-]+){3,}|[Ww]arning", text + re.sub(r"base64,[^\"]+", "", html)):
        pytest.fail(f"{path.name} shows {found!r}, which differs from machine to machine")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_is_committed_is_clean_and_small(path: Path, refresh: ModuleType) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert refresh.clean(notebook) == notebook, f"run: python notebooks/refresh.py {path.name[:2]}"
    nbformat.validate(notebook)
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    prose = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
