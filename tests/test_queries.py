"""Queries that are not the last tokens, queries to estimate from, and what that must not change."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from test_exactness import Case, cases, lowered, run_settings, tensors

import mmflex
from mask_builders import (
    AShape,
    BlockPeaks,
    BlockTopK,
    Boundary2D,
    Dense,
    FlashPrefill,
    FlexPrefill,
    Grid,
    Prism,
    ProxyAttn,
    QBoundary,
    VerticalSlash,
    XAttention,
)
from mmflex import QueryTokens

torch.set_num_threads(1)
VIDEO = mmflex.TokenLayout.from_segments(
    [("text", 70), ("video", (6, 6, 7), {"timestamps": 3}), ("text", 90), ("image", (9, 13)), ("text", 41)]
)
ADAPTIVE = [
    VerticalSlash(30, 60, 16),
    Grid("search", rows=True, slash=True, local=16, sink=16, last_q=16, shortest=8, longest=60),
    QBoundary({"text": VerticalSlash(20, 40, 16), "video": Grid("frame", local=16, last_q=16)}),
    Boundary2D({("text", "video"): VerticalSlash(9, 20, 16), ("video", "video"): VerticalSlash(30, 30, 16)}),
]


def draw(n: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 4, n, 32), (batch, 2, n, 32), (batch, 2, n, 32))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    k[:, :, ::23] *= 2
    return q, k, v


@run_settings(120)
@given(cases(nested=1), st.data())
def test_any_rows_of_a_prompt_are_exact(case: Case, data: st.DataObject) -> None:
    """Queries anywhere, in one run or several: softmax under the plan's own mask, whose rows are those of the
    tokens."""
    q, k, v = tensors(Case(case | {"queries": case["layout"].length}))
    n, spec = case["layout"].length, case["spec"]
    mark = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    if data.draw(st.booleans()):  # one run
        first = data.draw(st.integers(0, n - 1))
        rows = np.arange(first, data.draw(st.integers(first + 1, n)))
    else:
        rows = np.flatnonzero(mark)
    index = torch.as_tensor(rows)
    options = {"layout": case["layout"], "scale": case["scale"], "backend": "reference", "block_size": case["tile"]}
    options["v"] = v
    with lowered(case["lowering"]) as lowering:
        part = mmflex.plan(q[:, :, index], k, spec, query_positions=rows, lowering=lowering, **options)
    out, lse = part._attend(q[:, :, index], k, v, True)
    mask = part.dense_mask().numpy()
    wanted, sums = oracle.softmax(q[:, :, index], k, v, mask, case["scale"])
    assert oracle.error(out, wanted) <= (2e-6 if case["dtype"] == torch.float32 else 4e-3)
    seen = np.isfinite(sums)
    assert np.abs(lse.double().numpy()[seen] - sums[seen]).max(initial=0) <= 1e-4
    if not part.program.leaves:  # nothing selected: the rows of the whole prompt's mask
        with lowered(case["lowering"]) as lowering:
            whole = mmflex.plan(q, k, spec, lowering=lowering, **options)
        assert (mask == whole.dense_mask().numpy()[:, :, rows]).all()


@pytest.mark.parametrize("spec", ADAPTIVE, ids=str)
@pytest.mark.parametrize("chunks", [[(0, 250), (250, 560)], [(0, 97), (97, 98), (98, 560)]])
def test_chunks_that_estimate_from_the_prompts_last_queries_are_the_whole_prompt(
    spec: mmflex.Pattern, chunks: list[tuple[int, int]]
) -> None:
    """Selected sets, masks and outputs are those of one call over all queries."""
    n = VIDEO.length
    chunks = [*chunks[:-1], (chunks[-1][0], n)]
    q, k, v = draw(n)
    options = {"layout": VIDEO, "backend": "reference"}
    whole = mmflex.plan(q, k, spec, block_size=16, **options)
    wanted = whole.attend(q, k, v)
    for first, end in chunks:
        rows = q[:, :, first:end]
        given = (q, None)  # estimators take the last queries of every scope from it
        part = mmflex.plan(rows, k, spec, block_size=16, query_start=first, estimate_from=given, **options)
        assert set(part.selections) == set(whole.selections)
        for name, chosen in part.selections.items():
            assert torch.equal(chosen, whole.selections[name]), name
        assert torch.equal(part.dense_mask(), whole.dense_mask()[:, :, first:end])
        assert oracle.error(part.attend(rows, k, v), wanted[:, :, first:end].double().numpy()) <= 2e-6


BY_BLOCK = [
    BlockTopK(3, 16, 1),
    BlockTopK(9, 16, 20, decay=0.5),
    XAttention(8, 0.8, 4, 16, 20),
    BlockPeaks(0.01, 8, 6, 16, 20),
    FlashPrefill(0.2, 4, 0.5, 20, 16, 20, 16),
    ProxyAttn(0.8, 6, 0, block_size=16, near=1),
    FlexPrefill(0.9, 0.2, 40, 64, 4, 16, 16, near=1),
    Prism(0.7, 4, 16, near=1),
]


@pytest.mark.parametrize("spec", BY_BLOCK, ids=str)
def test_patterns_of_every_query_block_go_by_the_calls_queries(spec: mmflex.Pattern) -> None:
    """Chunks on the borders of blocks select the same blocks as the whole prompt."""
    n = VIDEO.length
    q, k, _ = draw(n)
    whole = mmflex.plan(q, k, spec, layout=VIDEO, backend="reference", block_size=16).dense_mask()
    for first, end in ((0, 128), (128, 320), (320, n)):
        part = mmflex.plan(
            q[:, :, first:end], k, spec, layout=VIDEO, backend="reference", block_size=16, query_start=first,
            estimate_from=(q, None),
        )  # fmt: skip
        if not isinstance(spec, (FlexPrefill, Prism)):  # their share, or temperature, is of all rows of the call
            assert torch.equal(part.dense_mask(), whole[:, :, first:end])
        assert part.dense_mask().any()


@pytest.mark.parametrize("layout", ["plain", "padded", "unlike"])
def test_head_tail_chunks_in_one_call(layout: str) -> None:
    """As context parallel deals them: the first and the last quarter of a prompt at once, on the compiled kernel
    too."""
    prompts = {
        "plain": mmflex.TokenLayout.text(512),
        "padded": mmflex.TokenLayout.batch([VIDEO[:512], VIDEO[40:500]], side="left", length=512),
        "unlike": mmflex.TokenLayout.batch([VIDEO[:512], VIDEO[30:542]]),
    }
    lay = prompts[layout]
    rows = QueryTokens(((0, 128), (384, 512)))
    q, k, v = draw(512, lay.batch_size)
    spec = [VerticalSlash(30, 128), AShape(64, 128), Dense(), AShape(0, 256)]
    for backend in ("reference", "cpu"):
        whole = mmflex.plan(q, k, spec, layout=lay, backend=backend)
        part = mmflex.plan(
            q[:, :, rows.numbers], k, spec, layout=lay, backend=backend, query_positions=rows, estimate_from=(q, None)
        )
        assert torch.equal(part.dense_mask(), whole.dense_mask()[:, :, rows.numbers])
        wanted, _ = oracle.softmax(q, k, v, whole.dense_mask().numpy())
        assert oracle.error(part.attend(q[:, :, rows.numbers], k, v), wanted[:, :, rows.numbers]) <= 2e-6
        tiles = part.program.launches[0].row_slots // 128
        assert tiles <= 4, "tiles without a query are left out"


def test_positions_reach_the_compiled_function() -> None:
    q, k, v = draw(300)
    spec, layout = AShape(16, 64), mmflex.TokenLayout.text(300)

    @torch.compile(fullgraph=True)
    def compiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return mmflex.attention(q, k, v, spec, layout=layout, backend="reference", query_start=100)

    wanted = mmflex.attention(q, k, v, spec, layout=layout, backend="reference")[:, :, 100:200]
    assert oracle.error(compiled(q[:, :, 100:200], k, v), wanted.double().numpy()) <= 2e-6


def test_word_for_positions() -> None:
    assert QueryTokens.of(None, 3, 10).runs == ((7, 10),)
    assert QueryTokens.of(4, 3, 10).runs == ((4, 7),)
    assert QueryTokens.of([1, 2, 3, 7, 9], 5, 10).runs == ((1, 4), (7, 8), (9, 10))
    assert QueryTokens.of(torch.tensor([0, 5]), 2, 10).runs == ((0, 1), (5, 6))
    assert QueryTokens.of([], 0, 10).runs == QueryTokens.of(None, 0, 10).runs == ()
    assert QueryTokens.of([1, 2, 7], 3, 10).take(np.arange(20).reshape(2, 10)).tolist() == [[1, 2, 7], [11, 12, 17]]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"query_start": 95}, ValueError, ["95", "104", "99"]),
        ({"query_start": -1}, ValueError, ["-1"]),
        ({"query_positions": [3, 3, *range(4, 12)]}, ValueError, ["ascend", "3"]),
        ({"query_positions": [1, 2]}, ValueError, ["2", "10"]),
        ({"query_positions": [0.5] * 10}, TypeError, ["float64"]),
        ({"query_positions": [[1, 2]]}, ValueError, ["(1, 2)"]),
        ({"query_start": 1, "query_positions": [1]}, ValueError, ["query_start", "one of the two"]),
        ({"estimate_from": torch.randn(1, 4, 10, 32)}, TypeError, ["estimate_from"]),
        ({"estimate_from": (torch.randn(1, 3, 10, 32), 0)}, ValueError, ["heads 3", "4"]),
        ({"estimate_from": (torch.randn(1, 4, 10, 16), 0)}, ValueError, ["dimension 16", "32"]),
        ({"estimate_from": (torch.randn(1, 4, 10, 32).half(), 0)}, ValueError, ["float16", "float32"]),
        ({"estimate_from": (torch.randn(1, 4, 10, 32), 95)}, ValueError, ["104"]),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, error: type[Exception], words: list[str]) -> None:
    q, k, v = draw(100)
    with pytest.raises(error) as raised:
        mmflex.attention(q[:, :, :10], k, v, VerticalSlash(9, 9), backend="reference", **options)
    for word in words:
        assert word in str(raised.value)


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_merged_attention_is_attention_over_both_sets_of_keys() -> None:
    q, k, v = draw(90)
    mask = torch.rand(1, 4, 90, 90) < 0.5
    mask[0, 0, 7] = mask[0, 1, 8, :45] = mask[0, 1, 9, 45:] = False
    halves = []
    for keys in (slice(0, 45), slice(45, 90)):
        out, lse = oracle.softmax(q, k[:, :, keys], v[:, :, keys], mask[..., keys].numpy())
        halves += [torch.as_tensor(out).float(), torch.as_tensor(lse).float()]
    wanted, sums = oracle.softmax(q, k, v, mask.numpy())
    out, lse = mmflex.merge_attention(*halves)
    assert oracle.error(out, wanted) <= 2e-6
    assert lse[0, 0, 7] == -torch.inf
    assert (out[0, 0, 7] == 0).all()
    seen = np.isfinite(sums)
    assert np.abs(lse.double().numpy()[seen] - sums[seen]).max() <= 1e-5
