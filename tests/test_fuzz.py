"""A hundred cases of the fuzzer (`fuzz.py`), and that it notices what it is there for."""

from __future__ import annotations

import fuzz
import numpy as np
import pytest
import torch

import mmflex
from mask_builders import AShape

torch.set_num_threads(1)


@pytest.mark.parametrize("number", range(100))
def test_case(number: int) -> None:
    outcome = fuzz.run_case(1, number, raises=True)
    assert outcome.result in ("accepted", "beyond float32", "refused"), outcome


def test_cases_are_the_same_each_time() -> None:
    first, second = ([fuzz.run_case(2, number) for number in range(12)] for _ in range(2))
    assert [(case.kind, case.result) for case in first] == [(case.kind, case.result) for case in second]


def call(rows: slice = slice(None), **changes: float) -> None:
    """Compares a right result, or one that was changed."""
    q, k, v = (torch.randn((1, h, 40, 16), generator=torch.Generator().manual_seed(h)) for h in (2, 1, 1))
    plan = mmflex.plan(q, k, AShape(3, 9), backend="reference", block_size=16)
    out, lse = mmflex.attention(q, k, v, AShape(3, 9), backend="reference", return_lse=True)
    mask = np.tri(40, dtype=bool)[None, None].repeat(2, 1)  # of blocks of 128
    out[:, :, rows] += changes.get("out", 0.0)
    lse[:, :, rows] += changes.get("lse", 0.0)
    fuzz.compare(fuzz.Case(None), plan, (q, k, v), mask, out, lse, True)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"out": 1e-4}, {"lse": 1e-2}, {"out": float("nan")}, {"lse": float("nan")}])
def test_wrong_numbers_are_noticed(changes: dict[str, float]) -> None:
    call()
    with pytest.raises(fuzz.Wrong):
        call(slice(20, 23), **changes)


def test_foreign_exceptions_are_noticed() -> None:
    def judged(raising: object) -> str:
        try:
            raising()  # type: ignore[operator]
        except Exception as error:
            return fuzz.judged(error)
        raise AssertionError

    assert judged(lambda: AShape(-1)) == "refused"
    assert judged(lambda: torch.zeros(3)[5]) == "undeclared"
    assert judged(lambda: torch.zeros(3).view(7)) == "undeclared"
    assert judged(lambda: np.zeros(3).reshape(7)) == "undeclared"
    assert judged(lambda: mmflex.attention(None, None, None, None)) == "refused"
