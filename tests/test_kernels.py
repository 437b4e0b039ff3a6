"""Triton kernels against their torch twins. On a machine without CUDA they run under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmflex.runtime.device import constants_used, device_constant, estimate_result, writing_to
from mmflex.runtime.replay import _Replay

CASES = Path(__file__).with_name("kernel_cases.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs them on the device instead")
def test_kernels_equal_their_twins_under_the_interpreter():
    """In a process of its own: TRITON_INTERPRET must be set before Triton is imported."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(CASES)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels agree" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_equal_their_twins_on_the_device():
    import kernel_cases

    kernel_cases.main("cuda")


def test_results_are_written_where_they_are_offered_while_shapes_agree() -> None:
    first, second, third = (torch.empty(shape) for shape in ((2, 3), (2, 3), (2,)))
    cpu = torch.device("cpu")
    with writing_to([first, second, third]):
        assert estimate_result((2, 3), cpu) is first
        assert estimate_result((2, 3), cpu) is second
        assert estimate_result((3,), cpu).shape == (3,)  # something else: the rest may belong to another estimate
        assert estimate_result((2,), cpu) is not third
    with writing_to([first.int()]):
        assert estimate_result((2, 3), cpu).dtype == torch.float32
    assert estimate_result((2, 3), cpu) is not first


def test_constants_are_kept_and_told_to_who_has_to_hold_them() -> None:
    cpu, made = torch.device("cpu"), []

    def make(device: torch.device) -> torch.Tensor:
        made.append(1)
        return torch.zeros(3, device=device)

    first = device_constant("test", cpu, make)
    with constants_used() as used:
        assert device_constant("test", cpu, make) is first
    assert device_constant("test", cpu, make) is first
    assert len(made) == 1
    assert len(used) == 1
    assert used[0] is first


def test_a_graph_gets_what_was_estimated_wherever_it_was_written() -> None:
    """Estimates that stand in the graph's tensors, in order or not, or are views of them, or stand elsewhere."""
    torch.manual_seed(0)
    for given in (
        lambda a, b: (a, b),
        lambda a, b: (b, a),
        lambda a, b: (a.flip(-1), a[:]),
        lambda a, b: (torch.randn(5), b),
    ):
        inputs = [torch.randn(5), torch.randn(5)]
        estimate = given(*inputs)
        expected = [t.clone() for t in estimate]
        seen: list[torch.Tensor] = []
        graph = SimpleNamespace(replay=lambda inputs=inputs, seen=seen: seen.extend(t.clone() for t in inputs))
        state = SimpleNamespace(estimates={"one": (estimate, {})}, selections=None, prepared=None)
        assert _Replay(graph, inputs, {}, {}, []).run(state)
        assert all(map(torch.equal, seen, expected))
