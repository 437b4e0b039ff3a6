"""Every pattern and order on FlexAttention's compiled CPU kernel: equal to the float64 oracle.

A kernel is compiled per mask_mod source and shape, which takes 6 to 50 s, so the cases share them: one prompt length,
one number of heads, text and video of equally many tiles, and one section of gathered columns per KV head. What differs
between the cases of a group (patterns, numbers, phases, inputs, head dimensions up to the next power of two) is data to
the kernel. The last test counts the kernels.
"""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from torch._dynamo.utils import counters

import mmflex
from mask_builders import (
    AShape,
    BlockTopK,
    Boundary2D,
    Dense,
    Dilated,
    FlashPrefill,
    FlexPrefill,
    Grid,
    Prism,
    ProxyAttn,
    QBoundary,
    Strided,
    StridedFixed,
    TriShape,
    VerticalSlash,
    XAttention,
)
from mmflex.compiler.lower import Lowering

N, HEADS, KV_HEADS, DIM = 750, 4, 2, 32
MOST_KERNELS = 13

RAN: list[tuple[str, str, str, str]] = []
"""(case, launch kind, query order, key order) of every launch that ran."""
BEFORE: list[int] = []
"""Graphs that other files had compiled in this process."""


@pytest.fixture(autouse=True, scope="module")
def graphs_before() -> None:
    BEFORE.append(counters["stats"]["unique_graphs"])


def prompt() -> mmflex.TokenLayout:
    """380 tokens of text and 370 of video, both three tiles of 128, interleaved."""
    video = ("video", (5, 6, 6), {"newline": "frame", "timestamps": 4})
    return mmflex.TokenLayout.from_segments([("text", 120), video, ("text", 150), video, ("text", 70)])


LAYOUT = prompt()
MODALITY_MAJOR = Lowering("modality-major", "modality-major")
PADDED = mmflex.TokenLayout.batch([prompt()[:690], prompt()[20:]], side="left", length=N)


@functools.cache
def tensors(
    dim: int = DIM, dtype: torch.dtype = torch.float32, batch: int = 1, seed: int = 0, m: int = N
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v with some keys that many queries like."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, dim, generator=generator)

    q, k, v = draw(HEADS, m), draw(KV_HEADS, N), draw(KV_HEADS, N)
    k[:, :, torch.randperm(N, generator=generator)[:40]] *= 2.0
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check(
    spec: object,
    layout: mmflex.TokenLayout = LAYOUT,
    lowering: Lowering | None = None,
    scale: float | None = None,
    **options: object,
) -> mmflex.Plan:
    """Mask and output of one call on the compiled kernel against the oracle, head by head.

    Args:
        lowering: which of the ways to compute the spec to take, not the cheapest.
    """
    patterns = (spec,) * HEADS if isinstance(spec, mmflex.Pattern) else tuple(spec)  # type: ignore[arg-type]
    q, k, v = tensors(**options)  # type: ignore[arg-type]
    plan = mmflex.plan(q, k, patterns, layout=layout, scale=scale, backend="cpu", lowering=lowering, v=v)
    mask = oracle.token_mask(plan, patterns)
    assert (plan.dense_mask().numpy() == mask).all()
    out = plan.attend(q, k, v)
    wanted, _ = oracle.softmax(q, k, v, mask, scale)
    assert out.dtype == q.dtype
    for h in range(HEADS):
        error = oracle.error(out[:, h], wanted[:, h])
        assert error <= (2e-6 if q.dtype == torch.float32 else 4e-3), f"head {h}, {patterns[h]}: {error}"
    assert (out[torch.as_tensor(~mask.any(-1))] == 0).all()
    RAN.extend((str(spec), x.name, x.rows.label, x.keys.label) for x in plan.program.launches)
    return plan


LINES = VerticalSlash(100, 200)
A = AShape(100, 200)

# One head of each KV head gathers columns, the other does not: one section.
ONE_COMPARISON = [
    [A, LINES, A, LINES],
    [LINES, AShape(1, 1), VerticalSlash(64, 128, 16), AShape(0, 300)],
    [LINES, AShape(1, 1), VerticalSlash(1, 0), AShape(700, 0)],
    [VerticalSlash(128, 750, 64), TriShape(1, 1, 1), VerticalSlash(30, 100), TriShape(128, 256, 130)],
    [BlockTopK(2), LINES, BlockTopK(1), LINES],
    [BlockTopK(3, 256), LINES, BlockTopK(1, 384), VerticalSlash(77, 129)],
    [FlexPrefill(0.9, 0.1, 100, 256, 2, 0), XAttention(8, 0.8, 2), FlexPrefill(0.7, 0.0, 64, 256), XAttention(16, 0.5)],
    [LINES, Prism(0.8, 2), LINES, FlashPrefill(0.2, 2, 0.3, near=200)],
    [ProxyAttn(0.8, 2, 128), LINES, BlockTopK(3, near=1, decay=0.5, values=0.2), LINES],
    [Grid(30, local=64, sink=32), A, Grid(7, phase=3, local=1, sink=1), A],
    [A, Grid("frame", local=64, sink=32, last_q=16), BlockTopK(2), Grid("frame", phase=5, local=0, sink=0)],
    [
        Grid("search", local=64, sink=32, shortest=8, longest=100),
        A,
        Grid("search", local=1, shortest=20, longest=90),
        A,
    ],
    [A | LINES, A | TriShape(1, 1, 1), BlockTopK(2) | LINES, AShape(1, 1) | BlockTopK(1)],
    [LINES | LINES, A & TriShape(64, 64), LINES, Dense() - AShape(1, 128)],
    [Dense(), LINES, A, LINES],
    [LINES, AShape(1, 1), Dense(), LINES],
    [LINES, A, LINES, Dense() - Dense()],
    [AShape(0, 0), LINES, BlockTopK(2) - AShape(200, 200), LINES],
]


@pytest.mark.parametrize("spec", ONE_COMPARISON)
def test_masks_of_one_comparison(spec: list[mmflex.Pattern]) -> None:
    """A-shape, tri-shape, vertical-slash, block top-k, grid columns and what they compose to: one kernel for all."""
    check(spec)


@pytest.mark.parametrize(("dim", "seed"), [(17, 1), (24, 2), (29, 3), (32, 4)])
def test_odd_head_dimensions_share_a_kernel(dim: int, seed: int) -> None:
    """Head dimensions are padded to the next power of two; the scale is given, as it is a constant of the kernel."""
    check(ONE_COMPARISON[0], dim=dim, seed=seed, scale=DIM**-0.5)


ROWS = [
    Grid(30, local=64, sink=32, rows=True),
    Grid(17, local=1, sink=1, rows=True, phase=4),
    Grid("frame", local=100, sink=100, rows=True),
    Grid("search", local=64, sink=32, rows=True, shortest=8, longest=100),
]


@pytest.mark.parametrize("pattern", ROWS, ids=str)
def test_gathered_rows(pattern: mmflex.Pattern) -> None:
    """Rows of a grid see everything: gathered into slots of their own, they replace rows of the output."""
    plan = check([pattern, A, pattern, BlockTopK(2)])
    assert [x.name for x in plan.program.launches] == ["blocks", "gathered rows"]


BY_MODALITY = [
    [QBoundary({"text": LINES, "video": LINES}), QBoundary({"text": A, "video": A})] * 2,
    [QBoundary({"text": VerticalSlash(31, 100), "video": LINES}), QBoundary({"text": AShape(1, 1), "video": A})] * 2,
    [QBoundary({"text": A, "video": AShape(1, 1)}), QBoundary({"text": LINES, "video": LINES | A})] * 2,
    [QBoundary({"text": LINES, "video": Grid(30, local=64, sink=0)}), QBoundary({"text": A, "video": BlockTopK(1)})]
    * 2,
]


@pytest.mark.parametrize("spec", BY_MODALITY)
def test_queries_by_modality(spec: list[mmflex.Pattern]) -> None:
    """Q-boundary: the queries of a modality are a launch of their own."""
    plan = check(spec, lowering=MODALITY_MAJOR)
    assert {x.rows.label for x in plan.program.launches} == {"text queries", "video queries"}


BY_PAIR = [
    (LINES, LINES, AShape(0, 1), A),
    (VerticalSlash(40, 130), VerticalSlash(128, 1), AShape(128, 128), AShape(0, 300)),
    (VerticalSlash(1, 700), VerticalSlash(1, 256), AShape(1, 200), AShape(200, 1)),
]


@pytest.mark.parametrize("patterns", BY_PAIR)
def test_queries_and_keys_by_modality(patterns: tuple[mmflex.Pattern, ...]) -> None:
    """2D-boundary: modality-major keys as well, lines in ranks within the modality."""
    pairs = (("text", "text"), ("video", "video"), ("text", "video"), ("video", "text"))
    plan = check(Boundary2D(dict(zip(pairs, patterns, strict=True))), lowering=MODALITY_MAJOR)
    assert {x.keys.label for x in plan.program.launches} == {"modality-major"}


@pytest.mark.parametrize("stride", [7, 37, 128, 500])
def test_strided_baselines_are_looked_up(stride: int) -> None:
    """Token-exact masks: SF-strided and SF-fixed in one expression."""
    check(Strided(stride) | StridedFixed(50, 1 + stride % 5))


@pytest.mark.parametrize("spec", [(2, 300, 9), (3, 500, 100), (5, 128, 1)], ids=str)
def test_dilated_windows_and_small_blocks_are_looked_up(spec: tuple[int, int, int]) -> None:
    """Dilated attention within block top-k of blocks that are no whole tiles."""
    dilation, local, sink = spec
    check(Dilated(sink, local, dilation) & BlockTopK(4, 96))


@pytest.mark.parametrize("stride", [30, 37, 64])
def test_grid_diagonals_are_looked_up(stride: int) -> None:
    """The kernel has no log-sum-exp: diagonals of a grid go into the main launch, with the columns of the others."""
    plan = check(Grid(stride, slash=True, local=64, sink=32))
    assert [x.name for x in plan.program.launches] == ["blocks"]


@pytest.mark.parametrize("seed", range(3))
def test_differences_are_looked_up(seed: int) -> None:
    """Lines without a window: columns are looked up where they cannot be gathered."""
    check(VerticalSlash(90 + seed, 300) - AShape(60, 130 * (seed + 1)), seed=seed)


@pytest.mark.parametrize(
    "spec",
    [
        ONE_COMPARISON[0],
        [LINES, AShape(1, 1), VerticalSlash(40, 300), TriShape(10, 10, 200)],
        [BlockTopK(2), LINES, Grid(40, local=64), A],
        [Grid(40, local=64), A, A | LINES, BlockTopK(3)],
    ],
)
def test_padded_batches_in_half_precision_and_chunks(spec: list[mmflex.Pattern]) -> None:
    """bfloat16, two prompts of different length padded on the left, the last 300 queries of 750 keys."""
    check(spec, layout=PADDED, dtype=torch.bfloat16, batch=2, m=300)


def test_kernels_are_shared_and_every_order_ran() -> None:
    """At least 40 cases on a handful of kernels, over all orders that a kernel without log-sum-exp can have."""
    if len({case for case, *_ in RAN}) < 40:
        pytest.skip("only some of the cases ran in this process")
    assert counters["stats"]["unique_graphs"] - BEFORE[0] <= MOST_KERNELS
    kinds = {(kind, rows, keys) for _, kind, rows, keys in RAN}
    for wanted in (
        ("blocks", "natural", "natural"),
        ("gathered rows", "natural", "natural"),
        ("dense", "natural", "natural"),
        ("blocks", "text queries", "natural"),
        ("blocks", "video queries", "natural"),
        ("blocks", "text queries", "modality-major"),
        ("blocks", "video queries", "modality-major"),
    ):
        assert wanted in kinds, wanted
