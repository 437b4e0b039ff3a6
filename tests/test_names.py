"""Patterns are told apart by their class and fields, whatever they are called and however they are printed."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import sympy
import torch

import mask_builders
import mmflex
from mmflex import Pattern, TokenLayout, Tokens
from mmflex.ir import names
from mmflex.ir.pattern import find, from_json
from mmflex.tuning.candidates import is_boundary, paper

N = 300


def mask_of(*spec: Pattern) -> np.ndarray:
    """[H, N, N], of a plan with one head for each pattern, causal."""
    torch.manual_seed(0)
    q, k = torch.randn(1, len(spec), N, 16), torch.randn(1, len(spec), N, 16)
    plan = mmflex.plan(q, k, list(spec), layout=TokenLayout.text(N), backend="reference", block_size=16)
    return plan.dense_mask()[0].numpy()


def dense() -> type[Pattern]:
    @dataclass(frozen=True)
    class Dense(Pattern):  # as a user might call one
        near: int = 3

        def mask(self, t: Tokens) -> Any:
            return t.q - t.k < self.near

    return Dense


def cell(column: int) -> type[Pattern]:
    """A notebook cell; run again, it makes another class of the same name with another default."""

    @dataclass(frozen=True)
    class Chosen(Pattern):
        column: int = 1

        def estimator(self) -> Any:
            return _nothing

        def select(self, estimate: Any, view: Any) -> dict[str, torch.Tensor]:
            chosen = torch.zeros(*estimate.shape, view.size, dtype=torch.bool)
            chosen[..., self.column] = True
            return {"columns": chosen}

        def mask(self, t: Tokens) -> Any:
            return t.columns("columns", 1)

    Chosen.__init__.__defaults__ = (column,)  # type: ignore[misc]
    Chosen.__dataclass_fields__["column"].default = column  # type: ignore[attr-defined]
    return Chosen


def _nothing(q: torch.Tensor, k: torch.Tensor, view: Any, scale: float) -> torch.Tensor:
    return torch.zeros(q.shape[:2])


def test_a_class_called_dense_changes_nothing_else() -> None:
    mine = dense()
    assert find("Dense") is mask_builders.Dense
    assert from_json({"pattern": "Dense", "version": 1}) == mask_builders.Dense()
    own, plain = mask_of(mine(), mask_builders.Dense())
    tri = np.tri(N, dtype=bool)
    assert (plain == tri).all()
    assert (own == tri & ~np.tri(N, k=-3, dtype=bool)).all()
    assert mine not in {type(p) for p in paper()}


def test_a_class_called_dense_has_a_json_form_of_its_own() -> None:
    mine = dense()
    data = mine(7).to_json()
    assert data["pattern"] == f"{__name__}:dense.<locals>.Dense"
    assert from_json(data) == mine(7)
    assert mask_builders.Dense().to_json()["pattern"] == "Dense"


@pytest.mark.parametrize("name", ["Union", "Restricted", "QBoundary"])
def test_compositions_and_shipped_patterns_keep_their_names(name: str) -> None:
    before = find(name)
    type(name, (Pattern,), {})
    assert find(name) is before
    assert is_boundary(mask_builders.QBoundary({}))


def test_a_cell_run_twice() -> None:
    """Both classes live on, with sets of their own, side by side in one plan; the newest has the name."""
    first, second = cell(1), cell(2)
    assert str(first()) == str(second())
    old, new = mask_of(first(), second())
    columns = [set(np.flatnonzero(head[-1])) for head in (old, new)]
    assert columns == [{1}, {2}]
    assert find("Chosen") is second
    assert from_json(second(5).to_json()) == second(5)


def test_labels_are_free_again() -> None:
    first = cell(1)
    name = names.label(first)
    assert names.label(cell(2)) != name
    del first
    gc.collect()
    assert names.label(cell(3)) in (name, f"{name}~2")


def test_printing_does_not_decide() -> None:
    @dataclass(frozen=True)
    class Silent(Pattern):
        near: int

        def mask(self, t: Tokens) -> Any:
            return sympy.Lt(t.q - t.k, self.near)

        def __str__(self) -> str:
            return "Silent()"

    narrow, wide = mask_of(Silent(2), Silent(9))
    assert (narrow.sum(-1).max(), wide.sum(-1).max()) == (2, 9)
    assert Silent(2).identity() != Silent(9).identity()
    assert Silent(2).identity() == Silent(2).identity()


def test_one_name_from_two_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("Twice", value, names.GROUP) for value in ("one:Twice", "other:Twice")]
    monkeypatch.setattr(names, "_offers", lambda: {"Twice": points})
    with pytest.raises(ValueError, match="'Twice' is offered by several packages: one:Twice, other:Twice; uninstall"):
        find("Twice")


@pytest.mark.parametrize("name", ["pattern", "version", "serial"])
def test_fields_that_patterns_need_for_themselves_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"Mine has a field '{name}'.*rename it"):
        type("Mine", (mmflex.Pattern,), {"__annotations__": {name: int}})
