"""Arithmetic of the attention benchmark."""

from __future__ import annotations

from benchmarks.attention import covered


def test_time_in_which_a_kernel_runs() -> None:
    assert covered([]) == 0
    assert covered([(5.0, 9.0), (1.0, 2.0)]) == 5
    assert covered([(1.0, 4.0), (2.0, 3.0), (3.5, 6.0)]) == 5  # one within another, one over its end
    assert covered([(1.0, 4.0), (1.0, 4.0)]) == 3
