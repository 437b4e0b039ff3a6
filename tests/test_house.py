"""Who may import whom: one way, without circles, type-only imports counted. And what is run by hand still imports."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from docs.tools import house

GRAPH = house.arrows()
FOUNDATIONS = ("ir", "compiler", "runtime")


@pytest.mark.parametrize("module", sorted(GRAPH.nodes))
def test_imports_go_one_way(module: str) -> None:
    """ir <- compiler <- runtime <- distributed <- tuning <- plot <- integrations <- evaluation <- selfcheck <- cli;
    patterns stand on the first three alone, and only the self-check, the command line and the demo name them: others
    find them by their entry points."""
    own = house.room(module)
    for other in GRAPH.successors(module):
        room = house.room(other)
        if own == "mask_builders":
            assert room in (*FOUNDATIONS, "mask_builders"), f"{module} imports {other}"
        elif own in house.ROOMS:
            allowed = room in house.ROOMS and house.ROOMS.index(room) <= house.ROOMS.index(own)
            assert allowed or (room == "mask_builders" and own in ("selfcheck", "cli")), f"{module} imports {other}"
        else:
            assert room != "mask_builders", f"{module} imports {other}"


def test_no_module_imports_itself_in_a_circle() -> None:
    assert not house.circles(GRAPH)


def test_every_folder_has_its_place() -> None:
    folders = {path.parent.name for path in (house.ROOT / "mmflex").glob("*/__init__.py")}
    assert folders == set(house.ROOMS)


@pytest.mark.parametrize("path", sorted((house.ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import(path: Path) -> None:
    importlib.import_module(f"benchmarks.{path.stem}")
