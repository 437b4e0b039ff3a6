"""Attention within segments: against softmax in float64, one segment at a time."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmflex.runtime import varlen
from mmflex.runtime.varlen import Segments, varlen_attention, varlen_attention_op

Lengths = list[int]


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, scale: float) -> np.ndarray:
    """[T, H, D] in float64, by numpy."""
    q64, k64, v64 = (t.double().numpy() for t in (q, k, v))
    group = q64.shape[1] // k64.shape[1]
    out, first = np.zeros(q64.shape), 0
    for length in lengths:
        rows = slice(first, first + length)
        for head in range(q64.shape[1]):
            scores = q64[rows, head] @ k64[rows, head // group].T * scale
            weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
            out[rows, head] = weights / weights.sum(axis=1, keepdims=True) @ v64[rows, head // group]
        first += length
    return out


def tensors(
    tokens: int, heads: int = 2, kv_heads: int = 2, width: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, n, width, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads)]


def boundaries(lengths: Lengths) -> list[int]:
    return np.cumsum([0, *lengths]).tolist()


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - expected) / max(np.linalg.norm(expected), 1e-300))


@settings(max_examples=120, deadline=None)
@given(
    lengths=st.one_of(
        st.lists(st.integers(0, 37), min_size=1, max_size=12),
        st.lists(st.sampled_from([0, 1, 7, 16]), min_size=1, max_size=40),
        st.tuples(st.integers(1, 33), st.integers(1, 9)).map(lambda pair: [pair[0]] * pair[1]),
    ),
    width=st.sampled_from([5, 8, 64, 72, 80]),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    scale=st.sampled_from([None, 0.3]),
    gather=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_softmax_in_float64(
    lengths: Lengths,
    width: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    scale: float | None,
    gather: bool,
    seed: int,
) -> None:
    q, k, v = tensors(sum(lengths), *heads, width, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(varlen.GATHER_S, "cpu", 0.0 if gather else 1.0)
        found = varlen_attention(q, k, v, Segments(boundaries(lengths)), scale)
    assert (found.shape, found.dtype, found.is_contiguous()) == (q.shape, dtype, True)
    expected = oracle(q, k, v, lengths, width**-0.5 if scale is None else scale)
    limit = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 4e-3)
    assert difference(found, expected) <= limit


def test_views_of_one_projection() -> None:
    """q, k and v as a tower has them: slices of one tensor, heads first."""
    lengths = [16, 16, 9, 16, 4, 9]
    packed = torch.randn(sum(lengths), 3, 4, 20, generator=torch.Generator().manual_seed(0))
    q, k, v = packed.unbind(1)
    before = packed.clone()
    found = varlen_attention(q, k, v, Segments(boundaries(lengths)))
    assert difference(found, oracle(q, k, v, lengths, 20**-0.5)) <= 2e-6
    assert torch.equal(packed, before)


@pytest.mark.parametrize("lengths", [[8, 8, 8, 8], [8, 5, 8, 11], [5, 5, 9, 9]])
@pytest.mark.parametrize("tensor", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_segment(lengths: Lengths, tensor: str, bad: float) -> None:
    q, k, v = tensors(sum(lengths))
    clean = varlen_attention(q, k, v, Segments(boundaries(lengths)))
    {"q": q, "k": k, "v": v}[tensor][10, 0, 3] = bad
    found = varlen_attention(q, k, v, Segments(boundaries(lengths)))
    starts = boundaries(lengths)
    inside = next(slice(a, b) for a, b in itertools.pairwise(starts) if a <= 10 < b)
    if tensor == "v":  # what PyTorch makes of scores that are not finite differs from kernel to kernel
        assert not found[inside, 0, 3].isfinite().any()
    found[inside] = clean[inside]
    assert torch.equal(found, clean)


def test_more_segments_than_one_launch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "GRID_LIMIT", 3)
    for lengths in ([4] * 8, [4, 6, 4, 4, 6, 4, 4]):
        q, k, v = tensors(sum(lengths))
        found = varlen_attention(q, k, v, Segments(boundaries(lengths)))
        assert difference(found, oracle(q, k, v, lengths, 0.25)) <= 2e-6


def test_one_call_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[int]] = []
    real = varlen.scaled_dot_product_attention

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(list(q.shape))
        return real(q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(varlen, "scaled_dot_product_attention", counted)
    varlen_attention(*tensors(64), Segments(boundaries([8] * 8)))
    assert calls == [[8, 2, 8, 16]]
    calls.clear()
    mixed = Segments(boundaries([8, 6, 8, 6, 16, 16]))
    varlen_attention(*tensors(60), mixed)
    assert calls == [[2, 2, 6, 16], [2, 2, 8, 16], [2, 2, 16, 16]]
    calls.clear()
    monkeypatch.setitem(varlen.GATHER_S, "cpu", 1.0)  # where copies are dear, neighbours of one length
    varlen_attention(*tensors(60), mixed)
    assert calls == [[1, 2, 8, 16], [1, 2, 6, 16], [1, 2, 8, 16], [1, 2, 6, 16], [2, 2, 16, 16]]


# ---- boundaries on the device ----------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the tensors that were read from the device."""
    seen: list[int] = []
    real = varlen._read

    def read(cu_seqlens: torch.Tensor) -> np.ndarray:
        seen.append(len(cu_seqlens))
        return real(cu_seqlens)

    monkeypatch.setattr(varlen, "_read", read)
    return seen


def test_boundaries_are_known_again(reads: list[int]) -> None:
    segments = Segments([0, 3, 3, 9])
    given = segments.boundaries(torch.device("cpu"))
    assert given.tolist() == [0, 3, 9]
    assert given.dtype == torch.int32
    assert segments.boundaries(torch.device("cpu")) is given
    assert Segments.of(given) is segments
    assert Segments.of(given.detach()) is segments
    assert not reads
    assert Segments.of(given[:2]).starts.tolist() == [0, 3]
    assert Segments.of(given.clone()).starts.tolist() == [0, 3, 9]
    assert reads == [2, 3]


def test_boundaries_of_others_are_read_each_time(reads: list[int]) -> None:
    given = torch.tensor([0, 4, 8])
    assert Segments.of(given).length == 4
    given[1] = 3
    assert Segments.of(given).starts.tolist() == [0, 3, 8]
    assert reads == [3, 3]


def test_memory_that_is_used_again() -> None:
    """Boundaries that are gone must not answer for a tensor that now lies where they were."""
    segments = Segments([0, 1, 8])
    key = (torch.device("cpu"), segments.boundaries(torch.device("cpu")).data_ptr())
    assert key in varlen._by_memory
    del segments
    gc.collect()
    assert key not in varlen._by_memory


@pytest.mark.parametrize("given", [[1, 4], [0, 4, 3], [], [-1, 0], [*range(20, 0, -1)]])
def test_boundaries_that_make_no_sense(given: list[int]) -> None:
    shown = str(given) if len(given) <= 8 else "20, 19, 18, 17, 16, 15, ..."
    with pytest.raises(ValueError, match="must start with 0 and never fall") as error:
        Segments(given)
    assert shown in str(error.value)


def test_errors_name_both_values() -> None:
    q, k, v = tensors(8)
    with pytest.raises(ValueError, match="hold 9 tokens but q has 8"):
        varlen_attention(q, k, v, Segments([0, 9]))
    with pytest.raises(ValueError, match=r"q \[1, 8, 2, 16\]"):
        varlen_attention(q[None], k, v, Segments([0, 8]))
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2"):
        varlen_attention(q[:, :1].expand(8, 3, 16), k, v, Segments([0, 8]))
    with pytest.raises(ValueError, match="unknown backend 'fast': use 'auto', 'sdpa'"):
        varlen_attention(q, k, v, Segments([0, 8]), backend="fast")
    for backend in ("flash", "cudnn"):
        with pytest.raises(NotImplementedError, match=r"bfloat16 or float16 on CUDA, not torch.float32 on cpu"):
            varlen_attention(q, k, v, Segments([0, 8]), backend=backend)


# ---- inside compiled graphs ------------------------------------------------------------------------------------------


def test_operator() -> None:
    q, k, v = tensors(24)
    segments = Segments([0, 8, 11, 24])
    given = segments.boundaries(torch.device("cpu"))
    torch.library.opcheck(varlen_attention_op, (q, k, v, given, 0.25))
    compiled = torch.compile(
        lambda q, k, v, given: varlen_attention_op(q * 2, k, v, given, 0.25) + 1, backend="aot_eager", fullgraph=True
    )
    expected = varlen_attention(q * 2, k, v, segments, 0.25) + 1
    torch.testing.assert_close(compiled(q, k, v, given), expected)
