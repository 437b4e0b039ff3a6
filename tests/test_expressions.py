"""What the author of a pattern may write: ``//`` by numbers, as compared with numpy; errors for what goes wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sympy
import torch

import mmflex
from mmflex.ir import expr as x
from mmflex.ir.atoms import atoms
from mmflex.ir.pattern import find

N = 300
QUOTIENTS: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("own run", lambda q, k: (q // 7, k // 7)),
    ("shifted", lambda q, k: ((q - 11) // 8 + 1, (k + 5) // 8)),
    ("multiple", lambda q, k: (3 * q // 10, (k + 2 * k) // 10)),
    ("both", lambda q, k: ((q - k) // 6, 3 + 0 * q)),
    ("nested", lambda q, k: (q // 4 // 5, (k + 1) // 2 // 10)),
]


@dataclass(frozen=True)
class Quotients(mmflex.Pattern):
    """Pairs whose quotients are equal; ``case`` of `QUOTIENTS`."""

    case: int

    def mask(self, t: mmflex.Tokens) -> Any:
        return sympy.Eq(*QUOTIENTS[self.case][1](t.q, t.k))


@pytest.mark.parametrize("case", range(len(QUOTIENTS)), ids=[name for name, _ in QUOTIENTS])
def test_rounded_division_is_that_of_integers(case: int) -> None:
    q = k = torch.randn(1, 1, N, 16)
    plan = mmflex.plan(q, k, Quotients(case), backend="reference", block_size=16)
    rows, keys = np.arange(N)[:, None], np.arange(N)[None]
    left, right = QUOTIENTS[case][1](rows, keys)
    expected = (left == right) & (rows >= keys)
    assert 0 < expected.sum() < N * (N + 1) // 2
    assert (plan.dense_mask()[0, 0].numpy() == expected).all()
    out = plan.attend(q, k, k)
    scores = (q.double() @ k.double().mT / 4).masked_fill(~torch.from_numpy(expected), float("-inf"))
    wanted = scores.softmax(-1).nan_to_num(0.0) @ k.double()
    assert (out - wanted).norm() / wanted.norm() <= 2e-6


def test_tiles_print_as_they_are_written() -> None:
    assert str(x.tiled((x.q + 3) // 8)) == "(q + 3)//8"
    assert x.tiled(x.q // 1) == x.q
    assert x.tiled(sympy.sympify((x.q + 16) // 8)) == x.Tile(x.q, 8) + 2


def test_what_cannot_be_written_is_named() -> None:
    @dataclass(frozen=True)
    class Ratio(mmflex.Pattern):
        def mask(self, t: mmflex.Tokens) -> Any:
            return t.q // (t.k + 1) < 3

    @dataclass(frozen=True)
    class Python(mmflex.Pattern):
        def mask(self, t: mmflex.Tokens) -> Any:
            return t.q_segment == t.k_segment

    q = torch.randn(1, 1, 64, 16)
    with pytest.raises(TypeError, match=r"cannot hold Pow .* use \+ - \* mod // by whole numbers"):
        mmflex.plan(q, q, Ratio(), backend="reference")
    with pytest.raises(TypeError, match=r"Python.mask returned False: == and != .* write sympy.Eq"):
        mmflex.plan(q, q, Python(), backend="reference")


def test_a_pattern_that_is_no_frozen_dataclass_says_so() -> None:
    class Plain(mmflex.Pattern):
        pass

    @dataclass
    class Thawed(mmflex.Pattern):
        n: int = 1

    for wrong in (Plain, Thawed):
        with pytest.raises(TypeError, match=rf"{wrong.__name__} must be a frozen dataclass.*@dataclass\(frozen=True\)"):
            wrong()


def test_help_shows_the_fields() -> None:
    assert list(inspect.signature(Quotients).parameters) == ["case"]
    assert str(inspect.signature(find("AShape"))) == "(sink: 'int' = 128, local: 'int' = 1024)"


def test_no_mask_gets_lost_on_the_way_through_an_expression() -> None:
    with pytest.raises(TypeError, match="Symbol is not an atom"):
        list(atoms(sympy.And(sympy.Symbol("unknown"), x.q >= x.k)))
    assert list(atoms(sympy.true)) == []
