"""What repeated calls skip: nothing that their inputs do not pin."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import threading
import unittest.mock
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mmflex
from mask_builders import AShape, Dense, VerticalSlash
from mmflex import TokenLayout
from mmflex.compiler import constants
from mmflex.ir.memo import Memo
from mmflex.plot.recorded import recorded
from mmflex.runtime import backends, calls
from mmflex.runtime.launches import BlockExecution


def make(heads: int = 4, kv_heads: int = 2, n: int = 96, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, heads, n, dim), torch.randn(1, kv_heads, n, dim), torch.randn(1, kv_heads, n, dim)


@pytest.fixture
def checked() -> Iterator[unittest.mock.Mock]:
    with unittest.mock.patch.object(calls, "check", wraps=calls.check) as check:
        yield check


def test_a_call_like_an_earlier_one_is_not_checked_again(checked: unittest.mock.Mock) -> None:
    q, k, v = make()
    layout, spec = TokenLayout.from_segments([("text", 96)]), Dense()
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for _ in range(3):
        assert torch.equal(mmflex.attention(q, k, v, spec, layout=layout), wanted)
    assert checked.call_count == 1
    assert torch.equal(mmflex.attention(q, k, v, [spec] * 4, layout=layout), wanted)
    assert checked.call_count == 2
    mmflex.attention(q, k, v, Dense(), layout=layout)
    mmflex.attention(q, k, v, [Dense() for _ in range(4)], layout=layout)
    assert checked.call_count == 2
    mmflex.attention(q, k, v, spec, layout=layout, scale=1)
    mmflex.attention(q, k, v, spec, layout=layout, scale=0.3)
    assert checked.call_count == 4


def test_what_a_call_does_not_share_with_an_earlier_one_is_checked() -> None:
    q, k, v = make()
    layout, spec = TokenLayout.from_segments([("text", 96)]), Dense()
    many = [spec] * 4
    for given in (spec, many):
        mmflex.attention(q, k, v, given, layout=layout)
    wrong = [
        ((q.double(), k, v), {}, TypeError, "float64"),
        ((q, k, v.bfloat16()), {}, TypeError, "bfloat16"),
        ((q, k, v[:, :1]), {}, ValueError, "v has shape"),
        ((q[:, :3], k, v), {}, ValueError, "multiple of the KV heads"),
        ((q.numpy(), k, v), {}, TypeError, "q is ndarray"),
        ((q, k[:, :, :90], v[:, :, :90]), {}, ValueError, "q has 96 tokens but k 90"),
        ((q[:, :, 6:], k[:, :, 6:], v[:, :, 6:]), {}, ValueError, "slice it"),
        ((q, k, v), {"backend": "fast"}, ValueError, "unknown backend"),
        ((q, k, v), {"layout": {}}, TypeError, "layout is dict"),
    ]
    for tensors, options, error, words in wrong:
        with pytest.raises(error, match=words):
            mmflex.attention(*tensors, spec, **{"layout": layout, **options})  # type: ignore[arg-type]
    many.pop()
    with pytest.raises(ValueError, match="3 patterns for 4"):
        mmflex.attention(q, k, v, many, layout=layout)
    for odd in ("Dense", iter([spec] * 4), 3):
        with pytest.raises(TypeError, match="give a pattern"):
            mmflex.attention(q, k, v, odd, layout=layout)  # type: ignore[arg-type]
    mmflex.attention(q, k, v, spec, layout=layout, return_lse=True, backend="reference")
    with pytest.raises(ValueError, match="does not give it"):
        mmflex.attention(q, k, v, spec, layout=layout, return_lse=True, backend="cpu")
    mmflex.attention(q, k, v, spec, layout=layout, scale=1.0)
    equal = [("return_lse", 1), ("return_lse", 0), ("scale", True), ("scale", [1.0]), ("backend", ["auto"])]
    for name, value in equal:  # some are equal to what was given before, and hash alike
        with pytest.raises((TypeError, ValueError), match=name):
            mmflex.attention(q, k, v, spec, **{"layout": layout, "backend": "reference", name: value})


def test_another_number_of_threads_decides_anew() -> None:
    """What blocks cost on a CPU depends on how many threads share them."""
    q, k, v = make(n=512)
    layout, spec = TokenLayout.from_segments([("text", 512)]), AShape(16, 128)
    real, devices = torch.get_num_threads(), []
    for threads in (1, 2, 1):
        with unittest.mock.patch.object(constants, "device_name", wraps=constants.device_name) as named:
            torch.set_num_threads(threads)
            try:
                mmflex.attention(q, k, v, spec, layout=layout, backend="cpu")
            finally:
                torch.set_num_threads(real)
        devices.append(named.call_count)
    assert devices[0] > 0 < devices[1]
    assert devices[2] == 0, "decided before"


def test_autocast_and_gradients_are_seen_after_an_equal_call() -> None:
    q, k, v = make()
    wanted = mmflex.attention(q, k, v, Dense())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mmflex.attention(q, k, v, Dense()), wanted)
    with torch.no_grad():
        assert not mmflex.attention(q.requires_grad_(), k, v, Dense()).requires_grad
    for grad in ((q, k, v), (q.detach(), k, v.clone().requires_grad_())):
        assert mmflex.attention(*grad, Dense()).requires_grad


def test_what_is_no_tensor_of_values_is_refused_after_an_equal_call() -> None:
    """And leaves nothing behind: a plan made of fake tensors would be kept for real ones."""

    class Duck:
        def __init__(self, t: Tensor) -> None:
            self.shape, self.dtype, self.device, self.layout, self.is_cuda = t.shape, t.dtype, t.device, t.layout, False

    q, k, v = make()
    spec = AShape(8, 32)
    wanted = mmflex.attention(q, k, v, spec, backend="reference")
    with pytest.raises(TypeError, match="q is Duck"):
        mmflex.attention(Duck(q), k, v, spec, backend="reference")  # type: ignore[arg-type]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty_like(t) for t in (q, k, v)]
        for pattern in (spec, AShape(8, 48)):
            with pytest.raises(TypeError, match="q is a FakeTensor"):
                mmflex.attention(*fakes, pattern, backend="reference")
    assert torch.equal(mmflex.attention(q, k, v, spec, backend="reference"), wanted)
    assert mmflex.attention(q, k, v, AShape(8, 48), backend="reference").isfinite().all()


def test_what_is_kept_is_shared_by_threads() -> None:
    """Keys whose comparison lets other threads in, more of them than are kept."""
    kept, errors = Memo(64), []
    interval = sys.getswitchinterval()

    def use(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(4000):
                width = rng.randrange(1, 100)
                key = (tuple, *[AShape(1, width)] * 4)
                found = kept.recall(key)
                assert found in (None, width)
                kept.keep(key, width)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert len(kept) == 64


def test_new_constants_decide_anew() -> None:
    """A program is chosen by what blocks cost: once that is measured again, earlier calls do not count."""
    q, k, v = make(n=1024)
    layout, spec = TokenLayout.from_segments([("text", 1024)]), AShape(16, 128)
    before = mmflex.plan(q, k, spec, layout=layout, backend="cpu").program
    mmflex.attention(q, k, v, spec, layout=layout, backend="cpu")
    constants.forget()
    with unittest.mock.patch.object(constants, "constants_for", return_value=constants.GENERIC):
        after = mmflex.plan(q, k, spec, layout=layout, backend="cpu").program
        mmflex.attention(q, k, v, spec, layout=layout, backend="cpu")
    assert after.constants == constants.GENERIC != before.constants


@pytest.mark.parametrize("spec", [AShape(16, 32), Dense(), VerticalSlash(16, 32)], ids=str)
def test_lists_that_follow_from_the_layout_are_made_once(spec: mmflex.Pattern) -> None:
    q, k, v = make(n=512)
    layout = TokenLayout.from_segments([("text", 512)])
    with unittest.mock.patch.object(BlockExecution, "list", autospec=True, side_effect=BlockExecution.list) as made:
        first = mmflex.attention(q, k, v, spec, layout=layout, backend="reference")
        assert torch.equal(mmflex.attention(q, k, v, spec, layout=layout, backend="reference"), first)
        other = mmflex.attention(q * 2, k, v, spec, layout=layout, backend="reference")
    assert made.call_count == {"AShape": 1, "Dense": 0, "VerticalSlash": 3}[type(spec).__name__]
    plan = mmflex.plan(q * 2, k, spec, layout=layout, backend="reference")
    assert torch.allclose(plan.attend(q * 2, k, v), other, atol=1e-6)


def test_every_recorded_plan_is_its_own() -> None:
    q, k, v = make()
    for spec in (Dense(), AShape(16, 32)):
        mmflex.attention(q, k, v, spec, backend="reference")
        with recorded() as plans:
            for _ in range(2):
                mmflex.attention(q, k, v, spec, backend="reference")
        assert len(plans) == 2
        assert plans[0] is not plans[1]


def test_a_repeated_call_has_no_backward_either() -> None:
    q, k, v = make()
    spec = Dense()
    mmflex.attention(q, k, v, spec)
    out = mmflex.attention(q.requires_grad_(), k, v, spec)
    with pytest.raises(RuntimeError, match="no backward"):
        out.sum().backward()


def test_inputs_that_ask_for_gradients_run_on_the_cpu_kernel() -> None:
    q, k, v = make(n=256)
    spec = AShape(16, 32)
    want = mmflex.attention(q, k, v, spec, backend="cpu")
    out = mmflex.attention(q.requires_grad_(), k, v, spec, backend="cpu")
    assert torch.equal(out, want)
    with pytest.raises(RuntimeError, match="no backward"):
        out.sum().backward()


def test_a_copy_has_a_serial_of_its_own() -> None:
    """Serials are numbers of one process: a pickled one would name another pattern, or layout, where it is read."""
    q, k, v = make(n=512)
    layout, spec = TokenLayout.from_segments([("text", 512)]), AShape(128, 128)
    want = mmflex.attention(q, k, v, spec, layout=layout)
    for thing in (spec, layout):
        data = pickle.dumps(thing)
        assert thing.serial.encode() not in data
        copies = [pickle.loads(data), copy.copy(thing), copy.deepcopy(thing)]
        assert len({thing.serial, *(found.serial for found in copies)}) == 4
    read, again = pickle.loads(pickle.dumps(spec)), pickle.loads(pickle.dumps(layout))
    assert read == spec
    assert again.fingerprint == layout.fingerprint
    assert not set(again.memo) - {"fingerprint"}, "what was computed is not pickled"
    assert torch.equal(mmflex.attention(q, k, v, read, layout=again), want)


def test_calls_kept_for_a_layout_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "CALLS", 4)
    q, k, v = make()
    layout = TokenLayout.from_segments([("text", 96)])
    for i in range(20):
        mmflex.attention(q, k, v, Dense(), layout=layout, scale=1.0 / (i + 1))
        assert 1 <= len(layout.memo["calls"]) <= 4


def test_a_kernel_that_does_not_fit_is_made_without_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What masks look up is pipelined through shared memory. Once, and for no other error."""
    made: list[int | None] = []
    errors = ["No valid triton configs. OutOfMemoryError: out of resource", "something else"]

    def compiled(function: Any, **options: Any) -> Any:
        kept = function.__closure__[list(function.__code__.co_freevars).index("options")].cell_contents
        made.append(kept.get("num_stages"))

        def run(*args: Tensor) -> str:
            if made[-1] is None:
                raise RuntimeError(errors[0])
            return "ran"

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    bucket = (torch.float32, torch.device("cpu"), (1, 2, 128, 64))
    kernel = backends._kernel.__wrapped__("make = None", "triton", 128, 1.0, False, bucket)
    assert [kernel(), kernel()] == ["ran", "ran"]
    assert made == [None, 1]
    errors.reverse()
    kernel = backends._kernel.__wrapped__("make = None", "triton", 128, 1.0, False, bucket)
    with pytest.raises(RuntimeError, match="something else"):
        kernel()
