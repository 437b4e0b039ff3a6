"""Patterns that select blocks on whatever comes in: odd shapes, scopes, padding, bad numbers, bad parameters."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from test_adaptive import SMALL, found, random
from test_exactness import Case, adaptive, layouts, prove, run_settings
from test_selection import TILE, Planted

import mmflex
from mask_builders import (
    AShape,
    BlockPeaks,
    BlockTopK,
    Boundary2D,
    FlashPrefill,
    FlexPrefill,
    Prism,
    ProxyAttn,
    QBoundary,
    XAttention,
    flash_prefill,
    proxy_attn,
    x_attention,
)

# ---- any shape, any scope ----


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Adaptive heads on any layout, restricted or not."""
    batch, tile = draw(st.integers(1, 3)), draw(st.sampled_from([8, 16, 32]))
    layout = draw(layouts(batch, 150))
    kv_heads, ratio = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]))
    last = draw(st.sampled_from([1, 16, 50]))
    odd = st.sampled_from([XAttention(7, 0.7, 4, 7), FlexPrefill(0.7, 1.0, 20, 20, 4, 0, 7, last)])
    leaf = st.one_of(adaptive(tile, last), adaptive(tile, last), odd)

    def pattern() -> mmflex.Pattern:
        kind = draw(st.integers(0, 4))
        if kind == 0:
            return QBoundary({"text": draw(leaf), "video": draw(leaf)})
        if kind == 1:
            return Boundary2D({("text", "video"): draw(leaf), ("video", "video"): draw(leaf)})
        if kind == 2:
            return draw(leaf).on(draw(st.sampled_from([None, 0, 2])), draw(st.sampled_from([None, 0, 2])))
        return draw(leaf) | AShape(0, tile) if kind == 3 else draw(leaf)

    n = layout.length
    return Case(
        layout=layout,
        spec=tuple(pattern() for _ in range(kv_heads * ratio)),
        tile=tile,
        batch=batch,
        kv_heads=kv_heads,
        queries=n if draw(st.booleans()) else draw(st.integers(1, n)),
        dim=draw(st.sampled_from([16, 24, 33])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        scale=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 10_000)),
        lowering=draw(st.sampled_from(["chosen", "without lse", 0, 1])),
    )


@run_settings(30)
@given(cases())
def test_exact_on_any_layout(case: Case) -> None:
    """Mask, block lists, selection, output and log-sum-exp against the oracle."""
    prove(case)


VIDEO = mmflex.TokenLayout.from_segments(
    [("text", 45), ("video", (9, 5, 5), {"timestamps": 3}), ("text", 61), ("image", (6, 7)), ("text", 20)]
)
FLEX, CROSSED = FlexPrefill(0.8, 0.2, 50, 64, 5, 16, 16, 32, 1), XAttention(4, 0.7, 5, 16, 1)
PEAKS = BlockPeaks(0.01, 4, 5, 16, 1)
BANDS, CUT = Prism(0.7, 4, 16, near=20), FlashPrefill(0.3, 5, 0.6, 20, 16, 9, 16)
PROXY, FALLING = ProxyAttn(0.7, 6, 32, 4, 1, 32, 16, 1), BlockTopK(6, 16, 20, 0.5, 0.3)
EVERY = [FLEX, FlexPrefill(0.8, 1.0, 50, 64, 5, 16, 16, 32), CROSSED, PEAKS, BANDS, CUT, PROXY, FALLING]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("queries", [None, 150, 3])
def test_attention_with_scopes_padding_and_chunks(side: str, queries: int | None) -> None:
    """Through the public API, tiles of 128: boundaries and restrictions, two prompts of different lengths."""
    layout = mmflex.TokenLayout.batch([VIDEO, VIDEO[10:250]], side=side, length=VIDEO.length + 5)
    q, k, v = random(layout.length, queries, batch=2)
    wide = FlexPrefill(0.8, 0.2, 50, 64, 2, 16, 32, 32)
    spec = [
        FLEX,
        QBoundary({"text": wide, "video": CROSSED}),
        Boundary2D({("text", "video"): CROSSED, ("video", "video"): wide, ("text", "text"): FLEX}),
        CROSSED.on("text", "video") | FLEX.on("video"),
    ]
    newer = [
        QBoundary({"video": BANDS, "text": PROXY}),
        Boundary2D({("text", "video"): CUT, ("video", "video"): BANDS, ("text", "text"): PROXY}),
        PROXY.on("video", "video") | FALLING.on("text"),
        CUT,
    ]
    for other in (spec, newer):
        plan = mmflex.plan(q, k, other, layout=layout, backend="reference", v=v)
        assert oracle.check_selection(plan, q, k, v) >= 12
        out = mmflex.attention(q, k, v, other, layout=layout, backend="reference")
        wanted, _ = oracle.softmax(q, k, v, oracle.token_mask(plan, tuple(other)))
        assert oracle.error(out, wanted) <= 2e-6


def test_boundary_finds_what_each_modality_wants() -> None:
    """Video queries want blocks of video, text queries one key: each kind where it is due."""
    n = VIDEO.length
    text, video = (np.flatnonzero(VIDEO.modality[0] == m) for m in (0, 2))
    planted = Planted(n)
    for first in range(32, len(video), TILE):  # blocks of ranks: interrupted by timestamps as they are
        planted.link(video[first : first + TILE], video[first - 32 : first - 16], 20.0)
    planted.link(text, text[[7]])
    pattern = FlexPrefill(0.9, 0.12, 40, 64, 6, **SMALL | {"last_q": 1})
    spec = Boundary2D({("video", "video"): pattern, ("text", "text"): pattern})
    plan = mmflex.plan(planted.q, planted.k, spec, layout=VIDEO, backend="reference", block_size=TILE)
    kinds = {key.split("[")[1]: t for key, t in plan.selections.items() if key.startswith("blocks")}
    assert kinds["video>video]"].any()
    assert not kinds["text>text]"].any()
    assert oracle.check_selection(plan, planted.q, planted.k) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_a_bad_number_does_not_spread_through_selection(pattern: mmflex.Pattern, where: str, bad: float) -> None:
    q, k, v = random(200)
    (q if where == "q" else k)[:, :, 100, 3] = bad
    plan = mmflex.plan(q, k, pattern, backend="reference", block_size=16, v=v)
    mask = plan.dense_mask()
    assert mask.any(-1).all(), "every query still sees something"
    out = plan.attend(q, k, v)
    touched = mask[..., 100] if where == "k" else torch.zeros_like(mask[..., 0])
    if where == "q":
        touched[:, :, 100] = True
    assert torch.isfinite(out[~touched]).all()


@pytest.mark.parametrize("shape", ["ones", "peaks", "far", "sharp"])
def test_widths_hold_for_any_input(shape: str) -> None:
    """Inputs that spread selections or pile them up: lists never pass the width that follows from the spec."""
    q, k, _ = random(640, batch=2)
    if shape == "ones":
        q, k = torch.ones_like(q), torch.ones_like(k)
    elif shape == "peaks":
        k[:, :, torch.randperm(640, generator=torch.Generator().manual_seed(0))[:60]] *= 20
    elif shape == "far":
        k[:, :, ::5] *= 8
    else:
        q = q * 30
    both = FlexPrefill(1.0, 0.15, 50, 100, 5, 0, 16, 32)
    v = k.flip(2)
    for spec in ([both, CROSSED, FLEX, both], [BANDS, PROXY, FALLING, FlashPrefill(0.1, 5, 0.3, 20, 16, 0, 16)]):
        plan = mmflex.plan(q, k, spec, backend="reference", block_size=16, v=v)
        (launch,) = plan.program.launches
        counts = plan.state.prepared[0].lists
        assert max(int(counts[0].max()), int(counts[2].max())) <= launch.width < 640 // 16
        assert oracle.check_selection(plan, q, k, v) == 8
    assert found(mmflex.plan(q, k, both, backend="reference", block_size=16), "columns").sum(-1).max() <= 50


def test_a_prompt_of_padding_alone_gives_zeros() -> None:
    """Beside a prompt that has some tokens."""
    layout = mmflex.TokenLayout.batch([mmflex.TokenLayout.text(0), mmflex.TokenLayout.text(60)])
    q, k, v = random(60, batch=2)
    for pattern in EVERY:
        plan = mmflex.plan(q, k, pattern, layout=layout, backend="reference", block_size=16, v=v)
        out = plan.attend(q, k, v)
        assert (out[0] == 0).all()
        wanted, _ = oracle.softmax(q, k, v, oracle.token_mask(plan, (pattern,) * 4))
        assert oracle.error(out, wanted) <= 2e-6


def test_planning_reads_nothing_back() -> None:
    """No value of the device steers the host: what is found has shapes that follow from the spec."""
    q, k, v = random(300)
    spec, other = [FLEX, CROSSED] * 2, [BANDS, CUT, PROXY, FALLING]
    for each in (spec, other):
        mmflex.plan(q, k, each, backend="reference", block_size=16, v=v)
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReadBack(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(function), "a device value is read back"
            assert "nonzero" not in str(function), "nonzero synchronises"
            return function(*args, **(kwargs or {}))

    with NoReadBack():
        for each in (spec, other):
            mmflex.plan(q, k, each, backend="reference", block_size=16, v=v)


def test_memory_is_far_below_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """32768 tokens: the largest tensor of a plan is a 32nd of a boolean N x N mask of one head."""
    from test_program import Largest

    n = 32768
    for module, name in ((x_attention, "_SCORES"), (flash_prefill, "_STRIP"), (proxy_attn, "_STRIP")):
        monkeypatch.setattr(module, name, 1 << 20)
    q, k = torch.randn(1, 2, n, 16), torch.randn(1, 1, n, 16)
    newer = (
        BlockPeaks(0.01, 16, 10),
        Prism(0.9, 10),
        FlashPrefill(0.1, 10, 0.2),
        ProxyAttn(0.9, 10),
        BlockTopK(10, decay=0.7, values=0.2),
    )
    for pattern in (FlexPrefill(0.9, 0.1, 500, 1024, 10), XAttention(16, 0.9, 10), *newer):
        with Largest() as largest:
            mmflex.plan(q, k, pattern, backend="reference", v=k)
        assert largest.numel <= n * n // 32, f"{largest.numel / 2**20:.0f} MiB by {largest.where}"


# ---- parameters ----


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: FlexPrefill(0.0), ValueError, ["FlexPrefill.gamma", "0.0", "at most 1"]),
        (lambda: FlexPrefill(1.01), ValueError, ["FlexPrefill.gamma", "1.01", "at most 1"]),
        (lambda: FlexPrefill(-0.5), ValueError, ["FlexPrefill.gamma", "-0.5"]),
        (lambda: FlexPrefill(float("nan")), ValueError, ["FlexPrefill.gamma", "nan"]),
        (lambda: FlexPrefill("0.9"), TypeError, ["FlexPrefill.gamma", "'0.9'", "float"]),
        (lambda: FlexPrefill(True), TypeError, ["FlexPrefill.gamma", "True"]),
        (lambda: FlexPrefill(tau=-0.1), ValueError, ["FlexPrefill.tau", "-0.1", "0", "1"]),
        (lambda: FlexPrefill(tau=1.5), ValueError, ["FlexPrefill.tau", "1.5"]),
        (lambda: FlexPrefill(tau=None), TypeError, ["FlexPrefill.tau", "None"]),
        (lambda: FlexPrefill(vertical=0), ValueError, ["FlexPrefill.vertical", "0", "1"]),
        (lambda: FlexPrefill(slash=0), ValueError, ["FlexPrefill.slash", "0", "1"]),
        (lambda: FlexPrefill(blocks=0), ValueError, ["FlexPrefill.blocks", "0", "1"]),
        (lambda: FlexPrefill(blocks=1.5), TypeError, ["FlexPrefill.blocks", "1.5", "int"]),
        (lambda: FlexPrefill(minimum=-1), ValueError, ["FlexPrefill.minimum", "-1", "0"]),
        (lambda: FlexPrefill(last_q=0), ValueError, ["FlexPrefill.last_q", "0", "1"]),
        (lambda: XAttention(threshold=0), ValueError, ["XAttention.threshold", "0", "at most 1"]),
        (lambda: XAttention(threshold=2), ValueError, ["XAttention.threshold", "2"]),
        (lambda: XAttention(stride=0), ValueError, ["XAttention.stride", "0", "1"]),
        (lambda: XAttention(stride=12), ValueError, ["12", "128", "divisor"]),
        (lambda: XAttention(stride=256), ValueError, ["256", "128", "divisor"]),
        (lambda: BlockPeaks(0), ValueError, ["BlockPeaks.peak", "0", "at most 1"]),
        (lambda: BlockPeaks("0.1"), TypeError, ["BlockPeaks.peak", "'0.1'", "float"]),
        (lambda: BlockPeaks(stride=48), ValueError, ["BlockPeaks.stride", "48", "128", "divisor"]),
        (lambda: BlockPeaks(blocks=0), ValueError, ["BlockPeaks.blocks", "0", "1"]),
        (lambda: XAttention(blocks=0), ValueError, ["XAttention.blocks", "0", "1"]),
        (lambda: XAttention(block_size=0), ValueError, ["XAttention.block_size", "0", "1"]),
        (lambda: XAttention(near=-1), ValueError, ["XAttention.near", "-1", "0"]),
        (lambda: FlexPrefill(near=0.5), TypeError, ["FlexPrefill.near", "0.5", "int"]),
        (lambda: BlockTopK(decay=0), ValueError, ["BlockTopK.decay", "0", "at most 1"]),
        (lambda: BlockTopK(decay="0.7"), TypeError, ["BlockTopK.decay", "'0.7'"]),
        (lambda: BlockTopK(values=-1), ValueError, ["BlockTopK.values", "-1", "off"]),
        (lambda: BlockTopK(values=float("inf")), ValueError, ["BlockTopK.values", "inf"]),
        (lambda: BlockTopK(values=None), TypeError, ["BlockTopK.values", "None"]),
        (lambda: BlockTopK(near=-1), ValueError, ["BlockTopK.near", "-1"]),
        (lambda: Prism(0), ValueError, ["Prism.threshold", "0"]),
        (lambda: Prism(blocks=0), ValueError, ["Prism.blocks", "0", "1"]),
        (lambda: Prism(rotary_dim=2), ValueError, ["Prism.rotary_dim", "2", "4"]),
        (lambda: Prism(pairs="thirds"), ValueError, ["Prism.pairs", "thirds", "halves", "interleaved"]),
        (lambda: FlashPrefill(0), ValueError, ["FlashPrefill.alpha", "0"]),
        (lambda: FlashPrefill(rescue=1.5), ValueError, ["FlashPrefill.rescue", "1.5", "off", "1"]),
        (lambda: FlashPrefill(rescue="x"), TypeError, ["FlashPrefill.rescue", "'x'"]),
        (lambda: FlashPrefill(last=-1), ValueError, ["FlashPrefill.last", "-1"]),
        (lambda: FlashPrefill(sink=1.0), TypeError, ["FlashPrefill.sink", "1.0"]),
        (lambda: ProxyAttn(1.2), ValueError, ["ProxyAttn.gamma", "1.2"]),
        (lambda: ProxyAttn(stride=0), ValueError, ["ProxyAttn.stride", "0", "1"]),
        (lambda: ProxyAttn(kv_heads=0), ValueError, ["ProxyAttn.kv_heads", "0", "1"]),
        (lambda: ProxyAttn(minimum=-1), ValueError, ["ProxyAttn.minimum", "-1"]),
    ],
)
def test_refused_by_name(make, kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as error:
        make()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("cls", [FlashPrefill, FlexPrefill, Prism, ProxyAttn, XAttention])
def test_candidates_travel_as_json_and_scale(cls: type[mmflex.Pattern]) -> None:
    candidates = cls.candidates()
    assert len(set(candidates)) == len(candidates) >= 2
    for pattern in candidates:
        assert mmflex.Pattern.from_json(pattern.to_json()) == pattern
        half = pattern.scaled(0.5)
        assert half.blocks == pattern.blocks // 2
        assert half.scaled(2.0) == pattern


def test_unbounded_budgets_and_a_share_of_one_are_dense() -> None:
    q, k, _ = random(150, 37)
    q, k = q * 0.1, k * 0.1  # no mass that float32 cannot tell from 0
    share = (FlexPrefill(1.0, 1.0, 999, 999, 999, 0, 16), XAttention(4, 1.0, 999, 16), Prism(1.0, 999, 16))
    for pattern in (
        *share,
        FlashPrefill(1e-9, 999, block_size=16),
        BlockPeaks(1e-9, 4, 999, 16),
        ProxyAttn(1.0, 999, 0, block_size=16),
    ):
        plan = mmflex.plan(q, k, pattern, backend="reference", block_size=16)
        assert torch.equal(plan.dense_mask()[0, 0], torch.ones(37, 150).tril(113).bool())
    columns = FlexPrefill(1.0, 0.0, 999, 999, 1, 999, 16)
    plan = mmflex.plan(q, k, columns, backend="reference", block_size=16)
    assert torch.equal(plan.dense_mask()[0, 0], torch.ones(37, 150).tril(113).bool())
