"""The contract where it was broken once: batches of unlike prompts, any budget, any scale, what is not finite."""

from __future__ import annotations

import math
import sys
import types

import oracle
import pytest
import torch

import mmflex
from mask_builders import (
    AShape,
    BlockPeaks,
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
from mmflex.runtime import backends

torch.set_num_threads(1)


def tensors(batch: int, m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 4, m, 32), (batch, 2, n, 32), (batch, 2, n, 32))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def close(plan: mmflex.Plan, spec: mmflex.Pattern, qkv: list[torch.Tensor], bound: float = 2e-6) -> None:
    """Mask, output (prompt by prompt) and log-sum-exp of a plan against the oracle."""
    mask = oracle.token_mask(plan, (spec,) * qkv[0].shape[1])
    assert (plan.dense_mask().numpy() == mask).all()
    wanted, sums = oracle.softmax(*qkv, mask, plan.scale)
    out, lse = plan._attend(*qkv, plan.backend != "cpu")
    for b in range(len(out)):
        assert oracle.error(out[b], wanted[b]) <= bound, b
    if lse is not None:
        seen = mask.any(-1)
        assert abs(lse.double().numpy()[seen] - sums[seen]).max(initial=0.0) <= 1e-4
        assert (lse.numpy()[~seen] == -math.inf).all()


# ---- a batch of prompts whose modalities stand in different places ---------------------------------------------------

UNLIKE = mmflex.TokenLayout.batch(
    [
        mmflex.TokenLayout.from_segments([("text", 100), ("video", (5, 6, 6)), ("text", 120)]),
        mmflex.TokenLayout.from_segments([("video", (5, 6, 6)), ("text", 220)]),
        mmflex.TokenLayout.from_segments([("text", 3), ("image", (9, 13)), ("text", 217), ("video", (7, 3, 3))]),
    ]
)


@pytest.mark.parametrize("m", [UNLIKE.length, 40])
@pytest.mark.parametrize(
    "spec",
    [
        Dense().on(key="text"),
        VerticalSlash(20, 40).on(key="text"),
        QBoundary({"video": AShape(1, 30), "text": VerticalSlash(20, 40)}),
        Boundary2D({("text", "text"): AShape(1, 40), ("text", "video"): VerticalSlash(9, 20)}),
    ],
    ids=str,
)
def test_unlike_prompts_of_equal_length(spec: mmflex.Pattern, m: int) -> None:
    qkv = tensors(3, m, UNLIKE.length)
    close(mmflex.plan(*qkv[:2], spec, layout=UNLIKE, backend="reference", block_size=16), spec, qkv)


def test_unlike_prompts_on_the_compiled_kernel() -> None:
    spec, qkv = Dense().on(key="text"), tensors(3, UNLIKE.length, UNLIKE.length)
    close(mmflex.plan(*qkv[:2], spec, layout=UNLIKE, backend="cpu"), spec, qkv)


# ---- budgets beyond the prompt select all of it ----------------------------------------------------------------------

EVERYTHING = [
    AShape(sys.maxsize, 0),
    AShape(0, sys.maxsize),
    TriShape(1, 1, last=2**31),
    TriShape(2**32, 0, 0),
    VerticalSlash(2**70, 0),
    VerticalSlash(0, 2**31),
    BlockTopK(2**70),
    BlockTopK(1, 2**40),
    BlockTopK(1, 2**31 - 1),
    Grid(3, sink=2**40),
    Grid(7, local=2**70),
    Grid("search", local=2**63),
    Dilated(0, 2**40, 1),
    Dilated(2**40, 0, 5),
    StridedFixed(2**40, 1),
    StridedFixed(9, 2**40),
    Strided(2**40),
    FlexPrefill(1.0, 0.0, vertical=2**70, slash=2**70, blocks=2**70, minimum=2**70),
    FlexPrefill(1.0, 1.0, blocks=2**70, minimum=2**70, block_size=2**50),
    XAttention(8, 1.0, blocks=2**70),
    BlockPeaks(1e-9, 8, blocks=2**70),
    BlockPeaks(1.0, 2**40, 1, block_size=2**41, near=2**70),
    XAttention(2**40, 1.0, block_size=2**41),
    XAttention(8, 0.1, 1, near=2**70),
    VerticalSlash(0, 1, near=2**40),
    BlockTopK(1, near=2**63),
    BlockTopK(2**70, near=0, decay=0.5, values=0.0),
    FlexPrefill(0.1, 1.0, near=2**70),
    Prism(1.0, blocks=2**70, rotary_dim=2**70),
    FlashPrefill(1.0, 1, near=0, sink=2**70, last=0),
    FlashPrefill(1.0, 1, 1.0, near=2**70, sink=0, last=0),
    FlashPrefill(1.0, 1, last=2**70),
    ProxyAttn(1.0, blocks=2**70, minimum=2**70, stride=2**70, kv_heads=2**70, last_q=2**70),
    ProxyAttn(0.1, 1, 0, near=2**70, block_size=2**50),
]


@pytest.mark.parametrize("m", [230, 9])
@pytest.mark.parametrize("spec", EVERYTHING, ids=str)
def test_budgets_beyond_int32_and_int64_select_everything(spec: mmflex.Pattern, m: int) -> None:
    qkv = tensors(1, m, 230)
    plan = mmflex.plan(*qkv[:2], spec, backend="reference", block_size=16)
    assert torch.equal(plan.dense_mask()[0, 0], torch.ones(m, 230, dtype=torch.bool).tril(230 - m))
    wanted, _ = oracle.softmax(*qkv, plan.dense_mask().numpy(), None)
    assert oracle.error(plan.attend(*qkv), wanted) <= 2e-6


@pytest.mark.parametrize("scope", [None, "video"])
@pytest.mark.parametrize(
    "spec",
    [
        Grid(2**31 - 1, phase=1, local=0, sink=0, rows=True, slash=True),
        Grid(2**31 - 1, phase=2**31 + 6, local=0, sink=0),
        Grid(2**45, phase=2**44, local=0, sink=0, rows=True),
        Grid(2**62, phase=2**62 - 1, local=0, sink=0, rows=True, columns=False),
        Grid(5, phase=2**40, local=0, sink=0),
        Grid("search", shortest=2**33, longest=2**34, local=20, sink=3),
        Dilated(0, 300, 2**35),
        VerticalSlash(10, 20, last_q=2**40),
    ],
    ids=str,
)
def test_strides_and_phases_beyond_the_prompt(spec: mmflex.Pattern, scope: str | None) -> None:
    layout = UNLIKE[:350]
    spec = spec if scope is None else spec.on(query=scope, key=scope)
    qkv = tensors(3, 350, 350)
    close(mmflex.plan(*qkv[:2], spec, layout=layout, backend="reference", block_size=16), spec, qkv)


# ---- scales and numbers that are not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [-0.3, 0.0, -1e-3])
@pytest.mark.parametrize("m", [300, 70])
@pytest.mark.parametrize(("spec", "backend"), [(Dense(), "dense"), (Grid(7, slash=True, local=9), "reference")])
def test_scales_that_are_not_positive(
    spec: mmflex.Pattern, backend: str, m: int, scale: float, dtype: torch.dtype
) -> None:
    qkv = tensors(1, m, 300, dtype=dtype)
    plan = mmflex.plan(*qkv[:2], spec, scale=scale, backend=backend)
    close(plan, spec, qkv, 2e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("backend", ["dense", "cpu", "reference"])
@pytest.mark.parametrize("m", [300, 70])
def test_what_is_not_finite_reaches_the_rows_that_see_it(backend: str, m: int, bad: float, where: str) -> None:
    spec = Dense() if backend == "dense" else AShape(100, 100)
    qkv = dict(zip("qkv", tensors(1, m, 300), strict=True))
    token = 40 if where == "q" else 250
    qkv[where][0, 0, token, 5] = bad
    plan = mmflex.plan(qkv["q"], qkv["k"], spec, backend=backend)
    out = plan.attend(**qkv)
    seen = plan.dense_mask()[0, :, :, 250] if where != "q" else torch.arange(m).eq(40).expand(4, m)
    own = torch.tensor([True, where != "q", False, False])  # heads of the first KV head, or the first head
    spoiled = ~out[0].isfinite().all(-1)
    assert not (spoiled & ~(seen & own[:, None])).any(), "a row that does not see it"
    if where == "v":
        assert torch.equal(spoiled, seen & own[:, None])
        rest = torch.arange(32) != 5
        assert out[..., rest].isfinite().all(), "other channels"
        if math.isinf(bad):
            assert (out[0, ..., 5][spoiled] == bad).all()
    elif math.isnan(bad):
        assert torch.equal(spoiled, seen & own[:, None])


# ---- float32: what scores of any size are rounded to -----------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 30.0, 100.0, 400.0])
@pytest.mark.parametrize(("spec", "backend"), [(Dense(), "dense"), (AShape(100, 100), "cpu"), (Dense(), "reference")])
def test_float32_error_is_bounded_by_the_rounding_of_scores(spec: mmflex.Pattern, backend: str, offset: float) -> None:
    """A float32 score of 100 is itself only known to 8e-6, and its weight with it: 2e-6, and one rounding (1.2e-7) for
    every unit of the greatest score."""
    q, k, v = tensors(1, 300, 300)
    common = torch.nn.functional.normalize(torch.ones(32), dim=0) * (offset * 32**0.5) ** 0.5
    q, k = q + common, k + common
    plan = mmflex.plan(q, k, spec, backend=backend)
    mask = plan.dense_mask().numpy()
    greatest = (q.double() @ k.double().repeat_interleave(2, 1).mT * 32**-0.5).abs().max().item()
    wanted, _ = oracle.softmax(q, k, v, mask, None)
    assert oracle.error(plan.attend(q, k, v), wanted) <= 2e-6 + 1.2e-7 * greatest


# ---- backends --------------------------------------------------------------------------------------------------------


def _flex_attention(torch_has_corrected: bool) -> types.FunctionType:
    """Stands for FlexAttention's own function, with or without the argument that came with the correction."""
    if torch_has_corrected:

        def flex_attention() -> None:
            def _finalize_outputs(stats_are_log2: bool) -> None: ...

    else:

        def flex_attention() -> None:
            def _finalize_outputs() -> None: ...

    return flex_attention  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("version", "corrected", "factor"),
    [("2.11.0+cu130", False, 1 / math.log(2)), ("2.12.0", True, 1.0), ("2.13.0", False, 1.0), ("3.0.0", False, 1.0)],
)
def test_log_sum_exp_of_flash_by_version(
    monkeypatch: pytest.MonkeyPatch, version: str, corrected: bool, factor: float
) -> None:
    monkeypatch.setattr(backends, "flex_attention", _flex_attention(corrected))
    monkeypatch.setattr(torch, "__version__", version)
    assert backends._flash_lse_factor.__wrapped__() == factor


@pytest.mark.parametrize(("capability", "chosen"), [((8, 0), "triton"), ((10, 0), "triton"), ((12, 0), "triton")])
def test_flash_is_for_hopper(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str) -> None:
    """flash-attn-4's sparse query blocks are 256 rows on Blackwell: `auto` takes Triton there, and says why."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Device")
    monkeypatch.setattr(backends, "_flash_missing", lambda: None)
    reason = mmflex.why_not("flash", "cuda:0")
    assert reason is not None
    if capability[0] > 9:
        assert "256" in reason
        assert "128" in reason
        assert f"{capability[0]}.{capability[1]}" in reason
    backends.resolve.cache_clear()
    assert backends.resolve("auto", torch.device("cuda:0"), 128, torch.bfloat16).name == chosen
    with pytest.raises(RuntimeError, match="flash"):
        backends.resolve("flash", torch.device("cuda:0"), 128, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    backends.resolve.cache_clear()
    assert backends.resolve("auto", torch.device("cuda:0"), 128, torch.bfloat16).name == "flash"
    backends.resolve.cache_clear()
