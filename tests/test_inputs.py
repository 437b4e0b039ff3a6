"""What goes in: bad input is refused by name, edge cases are defined, patterns travel as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import oracle
import pytest
import sympy
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
from mmflex.ir.pattern import from_json

EVERY = [
    Dense(),
    AShape(16, 32),
    TriShape(16, 32, 16),
    VerticalSlash(20, 40, 16),
    BlockTopK(3, 16),
    FlexPrefill(0.8, 0.2, 20, 40, 3, 16, 16, 16),
    XAttention(4, 0.8, 3, 16),
    BlockPeaks(0.02, 4, 3, 16),
    BlockTopK(3, 16, near=0, decay=0.5),
    Prism(0.8, 3, 16, near=1),
    FlashPrefill(0.2, 3, 0.5, 20, 16, 5, 16),
    ProxyAttn(0.8, 3, 16, 4, 1, 16, 16, 1),
    Grid(20, rows=True, slash=True, local=16, sink=16, last_q=16),
    Grid("search", slash=True, local=16, sink=16, last_q=16, shortest=8, longest=40),
    StridedFixed(20, 3),
    Strided(20),
    Dilated(8, 40, 3),
    QBoundary({"text": AShape(16, 32), "video": VerticalSlash(20, 40)}),
    Boundary2D({("text", "video"): Grid(10, local=16, sink=0), ("video", "video"): BlockTopK(2, 16)}),
    AShape(16, 32) | VerticalSlash(20, 40),
    Dense() - AShape(16, 16),
    Strided(7) & AShape(0, 64),
    VerticalSlash(20, 40).on("video"),
    Dilated(8, 40, 3).on(key="text") | AShape(16, 16).on("text", "video"),
    (Grid(12).on("image") | Dense()) - (QBoundary({"audio": Strided(3)}) & TriShape(1, 2, 3)),
]


def make(batch: int = 1, heads: int = 4, kv_heads: int = 2, m: int = 100, n: int | None = None, dim: int = 32):
    """Random q, k and v."""
    generator = torch.Generator().manual_seed(batch + heads + m)
    n = m if n is None else n
    shapes = ((batch, heads, m, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


# ---- refused ----

Q, K, V = make()
LONG = mmflex.TokenLayout.text(120)
THREE = mmflex.TokenLayout.batch([mmflex.TokenLayout.text(100)] * 3)


def attend(q=Q, k=K, v=V, spec=None, **options) -> torch.Tensor:
    return mmflex.attention(q, k, v, AShape() if spec is None else spec, **options)


REFUSED: list[tuple[str, Callable[[], object], type[Exception], list[str]]] = [
    ("heads do not divide", lambda: attend(*make(heads=4, kv_heads=3)), ValueError, ["4", "3", "multiple"]),
    ("more KV heads", lambda: attend(*make(heads=2, kv_heads=4)), ValueError, ["2", "4", "multiple"]),
    ("no query heads", lambda: attend(*make(heads=0, kv_heads=2)), ValueError, ["0", "2"]),
    ("no KV heads", lambda: attend(*make(heads=2, kv_heads=0)), ValueError, ["2", "0"]),
    ("short spec", lambda: attend(spec=[Dense()] * 3), ValueError, ["3", "4", "one per head"]),
    ("long spec", lambda: attend(spec=[Dense()] * 5), ValueError, ["5", "4", "one per head"]),
    ("empty spec", lambda: attend(spec=[]), ValueError, ["0", "4"]),
    ("no pattern", lambda: attend(spec=[Dense()] * 3 + ["dense"]), TypeError, ["'dense'", "pattern"]),
    ("class as spec", lambda: attend(spec=[AShape] * 4), TypeError, ["AShape", "pattern"]),
    ("spec a number", lambda: attend(spec=7), TypeError, ["7", "pattern"]),
    ("layout of another length", lambda: attend(layout=LONG), ValueError, ["120", "100", "layout["]),
    ("layout of another batch", lambda: attend(layout=THREE), ValueError, ["3", "1", "prompts"]),
    ("layout a list", lambda: attend(layout=[("text", 100)]), TypeError, ["list", "TokenLayout"]),
    ("M > N", lambda: attend(*make(m=120, n=100)), ValueError, ["120", "100", "M <= N"]),
    ("D differs", lambda: attend(k=make(dim=64)[1]), ValueError, ["32", "64", "agree"]),
    ("D too small", lambda: attend(*make(dim=8)), ValueError, ["8", "16", "256"]),
    ("D too large", lambda: attend(*make(dim=272)), ValueError, ["272", "16", "256"]),
    ("v of another length", lambda: attend(v=make(n=90)[2]), ValueError, ["90", "100"]),
    ("v of other heads", lambda: attend(v=make(kv_heads=4)[2]), ValueError, ["(1, 4, 100", "(1, 2, 100"]),
    ("batch differs", lambda: attend(k=make(batch=2)[1]), ValueError, ["2", "1", "batch"]),
    ("three dimensions", lambda: attend(q=Q[0]), ValueError, ["(4, 100, 32)", "[batch, heads, tokens, head_dim]"]),
    ("array", lambda: attend(q=Q.numpy()), TypeError, ["ndarray", "tensor"]),
    ("integers", lambda: attend(Q.int(), K.int(), V.int()), TypeError, ["int32", "float32"]),
    ("float64", lambda: attend(Q.double(), K.double(), V.double()), TypeError, ["float64", "float32"]),
    ("mixed dtypes", lambda: attend(k=K.bfloat16()), TypeError, ["bfloat16", "float32"]),
    ("v of another dtype", lambda: attend(v=V.half()), TypeError, ["float16", "float32"]),
    ("mixed devices", lambda: attend(k=K.to("meta")), TypeError, ["meta", "cpu"]),
    ("lse on cpu", lambda: attend(backend="cpu", return_lse=True), ValueError, ["return_lse", "'cpu'", "reference"]),
    ("unknown backend", lambda: attend(backend="cuda"), ValueError, ["'cuda'", "'triton'", "'cpu'", "'auto'"]),
    ("flash without CUDA", lambda: attend(backend="flash"), RuntimeError, ["'flash'", "cpu", "auto"]),
    ("triton without CUDA", lambda: attend(backend="triton"), RuntimeError, ["'triton'", "cpu", "auto"]),
    ("negative sink", lambda: AShape(-1, 5), ValueError, ["AShape.sink", "-1", "0"]),
    ("negative local", lambda: TriShape(1, -5), ValueError, ["TriShape.local", "-5", "0"]),
    ("negative budget", lambda: VerticalSlash(-3), ValueError, ["VerticalSlash.vertical", "-3", "0"]),
    ("no last query", lambda: VerticalSlash(last_q=0), ValueError, ["VerticalSlash.last_q", "0", "1"]),
    ("no blocks", lambda: BlockTopK(0), ValueError, ["BlockTopK.blocks", "0", "1"]),
    ("block of nothing", lambda: BlockTopK(3, 0), ValueError, ["BlockTopK.block_size", "0", "1"]),
    ("stride 0", lambda: Grid(0), ValueError, ["Grid.stride", "0", "1"]),
    ("stride by a wrong name", lambda: Grid("frames"), TypeError, ["Grid.stride", "'frames'"]),
    ("negative phase", lambda: Grid(4, phase=-1), ValueError, ["Grid.phase", "-1", "0"]),
    ("empty range", lambda: Grid("search", shortest=9, longest=8), ValueError, ["9", "8"]),
    ("strided 0", lambda: Strided(0), ValueError, ["Strided.stride", "0", "1"]),
    ("negative first", lambda: StridedFixed(4, -2), ValueError, ["StridedFixed.first", "-2", "0"]),
    ("dilation 0", lambda: Dilated(dilation=0), ValueError, ["Dilated.dilation", "0", "1"]),
    ("float budget", lambda: AShape(1.5, 2), TypeError, ["AShape.sink", "1.5", "int"]),
    ("boolean budget", lambda: AShape(True, 2), TypeError, ["AShape.sink", "True", "int"]),
    ("unknown modality", lambda: AShape().on("vision"), ValueError, ["'vision'", "'video'"]),
    ("unknown modality id", lambda: AShape().on(key=7), ValueError, ["7", "3"]),
    ("boundary of unknown", lambda: QBoundary({"vid": Dense()}), ValueError, ["'vid'", "'video'"]),
    ("pair of unknown", lambda: Boundary2D({("text", 9): Dense()}), ValueError, ["9", "'text'"]),
    ("boundary of no pattern", lambda: QBoundary({"video": 3}), TypeError, ["3", "pattern"]),
    ("pair of no pattern", lambda: Boundary2D({("text", "text"): None}), TypeError, ["pattern", "None"]),
    ("pair not a pair", lambda: Boundary2D({"text": Dense()}), ValueError, ["'text'", "pair"]),
    ("union with a number", lambda: AShape() | 3, TypeError, ["AShape", "int"]),
    ("frames without a video", lambda: attend(spec=Grid("frame")), ValueError, ["frame", "layout", "search"]),
    ("plan for another length", lambda: mmflex.plan(Q, K, Dense()).attend(*make(m=60)), ValueError, ["100", "60"]),
    ("why_not of unknown", lambda: mmflex.why_not("tpu", "cpu"), ValueError, ["'tpu'", "'cpu'"]),
]


@pytest.mark.parametrize(
    ("call", "error", "named"), [r[1:] for r in REFUSED], ids=[r[0].replace(" ", "-") for r in REFUSED]
)
def test_bad_input_is_refused_with_both_values_and_the_way_out(
    call: Callable[[], object], error: type[Exception], named: list[str]
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for word in named:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_a_spec_may_be_any_sequence() -> None:
    tuple_spec = attend(spec=(Dense(), AShape(1, 1)) * 2, backend="reference")
    assert torch.equal(tuple_spec, attend(spec=[Dense(), AShape(1, 1)] * 2, backend="reference"))


# ---- NaN ----


@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "spec",
    [
        Dense(),
        AShape(16, 32),
        Strided(9),
        VerticalSlash(40, 32, 16),
        BlockTopK(3, 16),
        Grid(20, rows=True, slash=True, local=16, sink=16, last_q=16),
        QBoundary({"text": VerticalSlash(30, 16), "video": AShape(0, 16)}),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_a_bad_number_touches_only_rows_that_attend_to_it(spec: mmflex.Pattern, bad: float, where: str) -> None:
    """NaN or infinity in one token; all rows that the mask keeps away from it are what they are without that token."""
    layout = mmflex.TokenLayout.from_segments([("text", 70), ("video", (8, 5, 5)), ("text", 90)])
    q, k, v = make(n=360, m=360)
    token = 133
    {"q": q, "k": k}[where][:, :, token, 3] = bad
    plan = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16)
    out, mask = plan.attend(q, k, v), oracle.token_mask(plan, (spec,) * 4)
    touched = mask[..., token].copy()
    if where == "q":
        touched[:] = False
        touched[:, :, token] = True
    assert (~touched).any()
    clean = [torch.nan_to_num(t, nan=0.0, posinf=0.0) for t in (q, k, v)]
    wanted, _ = oracle.softmax(*clean, mask)
    keep = torch.as_tensor(~touched)
    assert torch.isfinite(out[keep]).all()
    assert oracle.error(out[keep], wanted[~touched]) <= 2e-6


def test_nan_selects_as_if_it_had_no_attention() -> None:
    """A NaN key is not chosen as a column, and the choice among the others does not change."""
    q, k, _ = make(m=200)
    plain = mmflex.plan(q, k, VerticalSlash(60, 32, 16), backend="reference", block_size=16)
    columns = next(t for name, t in plain.selections.items() if name.startswith("columns"))
    unchosen = int((~columns.any(1)[0]).nonzero()[0])
    k[:, :, unchosen] = float("nan")
    after = mmflex.plan(q, k, VerticalSlash(60, 32, 16), backend="reference", block_size=16)
    now = next(t for name, t in after.selections.items() if name.startswith("columns"))
    assert not now[..., unchosen].any()
    assert (now == columns).float().mean() > 0.95


# ---- edges ----


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto", "dense"])
def test_no_tokens_and_no_queries(spec: mmflex.Pattern, backend: str) -> None:
    """N = 0 gives an empty output, M = 0 as well."""
    for m, n in ((0, 0), (0, 50)):
        q, k, v = make(m=m, n=n)
        out = mmflex.attention(q, k, v, spec, backend=backend)
        assert out.shape == q.shape
        assert mmflex.plan(q, k, spec, backend=backend).dense_mask().shape == (1, 4, m, n)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_one_token(spec: mmflex.Pattern) -> None:
    """N = 1: the token sees itself, or nothing where the pattern does not allow it."""
    q, k, v = make(m=1)
    plan = mmflex.plan(q, k, spec, backend="reference")
    mask = oracle.token_mask(plan, (spec,) * 4)
    assert (plan.dense_mask().numpy() == mask).all()
    wanted = v.repeat_interleave(2, 1) if mask.all() else torch.zeros_like(q)
    assert torch.allclose(plan.attend(q, k, v), wanted)


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
def test_empty_batch_and_one_head(backend: str) -> None:
    q, k, v = make(batch=0)
    assert mmflex.attention(q, k, v, AShape(), backend=backend).shape == q.shape
    q, k, v = make(heads=1, kv_heads=1, m=3)
    assert mmflex.attention(q, k, v, AShape(), backend=backend).shape == q.shape


@pytest.mark.parametrize(
    "spec",
    [
        AShape(10_000, 10_000),
        TriShape(10_000, 0, 0),
        TriShape(0, 1, 10_000),
        VerticalSlash(10_000, 10_000, 10_000),
        VerticalSlash(10_000, 0),
        VerticalSlash(0, 10_000),
        BlockTopK(10_000, 16),
        BlockTopK(1, 10_000),
        Grid(1, local=0, sink=0),
        StridedFixed(10_000),
        Strided(10_000),
        Dilated(10_000, 0),
        Dilated(0, 10_000, 1),
        Grid(10_000, local=10_000),
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [150, 7])
def test_budgets_beyond_the_sequence_are_dense(spec: mmflex.Pattern, m: int) -> None:
    q, k, v = make(m=m, n=150)
    plan = mmflex.plan(q, k, spec, backend="reference", block_size=16)
    causal = np.tri(150, dtype=bool)[150 - m :]
    assert (plan.dense_mask().numpy() == causal).all()
    wanted, _ = oracle.softmax(q, k, v, np.broadcast_to(causal, (1, 4, m, 150)))
    assert oracle.error(plan.attend(q, k, v), wanted) <= 2e-6


@pytest.mark.parametrize(
    "spec",
    [AShape(0, 0), TriShape(0, 0, 0), VerticalSlash(0, 0), Dense() - Dense(), Dense().on("video"), Dilated(0, 0)],
    ids=str,
)
def test_a_pattern_that_allows_nothing_gives_zeros(spec: mmflex.Pattern) -> None:
    q, k, v = make(m=150)
    plan = mmflex.plan(q, k, spec, backend="reference", block_size=16)
    assert not plan.dense_mask().any()
    out, lse = mmflex.attention(q, k, v, spec, backend="reference", return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert plan.density.total < 0.25
    assert isinstance(plan.explain(), str)


def test_a_layout_of_padding_alone_gives_zeros() -> None:
    """A prompt without a valid token, beside one that has some."""
    layout = mmflex.TokenLayout.batch([mmflex.TokenLayout.text(0), mmflex.TokenLayout.text(60)])
    q, k, v = make(batch=2, m=60)
    for spec in (Dense(), VerticalSlash(8, 16), Grid(7, slash=True, local=16, sink=16), BlockTopK(2, 16)):
        plan = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16)
        out = plan.attend(q, k, v)
        assert (out[0] == 0).all()
        wanted, _ = oracle.softmax(q, k, v, oracle.token_mask(plan, (spec,) * 4))
        assert oracle.error(out, wanted) <= 2e-6


@pytest.mark.parametrize("backend", ["auto", "dense", "reference", "cpu"])
def test_dense_everywhere_is_sdpa(backend: str) -> None:
    q, k, v = make(m=333)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(mmflex.attention(q, k, v, Dense(), backend=backend), wanted) or backend == "reference"
    assert torch.allclose(mmflex.attention(q, k, v, [Dense()] * 4, backend=backend), wanted, atol=1e-6)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_below_break_even_auto_runs_dense_attention(spec: mmflex.Pattern) -> None:
    """A sparse spec on a short sequence runs dense, and the plan says why; "auto" alone may do that."""
    layout = mmflex.TokenLayout.from_segments([("text", 30), ("image", (5, 5)), ("video", (3, 4, 4)), ("text", 20)])
    q, k, v = make(m=layout.length)
    plan = mmflex.plan(q, k, spec, layout=layout)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert [launch.name for launch in plan.program.launches] == ["dense"]
    assert spec == Dense() or "dense" in plan.note
    assert plan.note in plan.explain()
    assert torch.allclose(plan.attend(q, k, v), wanted, atol=1e-6)
    assert torch.allclose(mmflex.attention(q, k, v, spec, layout=layout), wanted, atol=1e-6)
    if spec != Dense():
        asked = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16)
        assert (asked.dense_mask().numpy() == oracle.token_mask(asked, (spec,) * 4)).all()


def test_the_dense_backend_gives_dense_attention_for_any_spec() -> None:
    q, k, v = make(m=100, n=130)
    wanted, sums = oracle.softmax(q, k, v, np.broadcast_to(np.tri(130, dtype=bool)[30:], (1, 4, 100, 130)))
    out, lse = mmflex.attention(q, k, v, AShape(1, 1), backend="dense", return_lse=True)
    assert oracle.error(out, wanted) <= 2e-6
    assert np.allclose(lse.numpy(), sums, atol=1e-5)


def test_log_sum_exp_of_the_public_call() -> None:
    q, k, v = make(m=150)
    for spec in (AShape(1, 1), VerticalSlash(10, 1), Strided(7), Dense()):
        out, lse = mmflex.attention(q, k, v, spec, backend="reference", return_lse=True, scale=0.5)
        plan = mmflex.plan(q, k, spec, backend="reference", scale=0.5)
        wanted, sums = oracle.softmax(q, k, v, oracle.token_mask(plan, (spec,) * 4), 0.5)
        assert lse.dtype == torch.float32
        assert oracle.error(out, wanted) <= 2e-6
        assert np.allclose(lse.numpy(), sums, atol=1e-5)


def test_a_plan_serves_other_v_and_other_q_and_k() -> None:
    """The mask stays that of the plan, whatever comes after."""
    q, k, v = make(m=150)
    spec = VerticalSlash(16, 32) | Strided(9)
    plan = mmflex.plan(q, k, spec, backend="reference", block_size=16)
    mask = oracle.token_mask(plan, (spec,) * 4)
    for other in ((q, k, v * 2), tuple(torch.flip(t, (2,)) for t in (q, k, v))):
        assert oracle.error(plan.attend(*other), oracle.softmax(*other, mask)[0]) <= 2e-6


def test_v_may_be_wider_or_strided() -> None:
    """Tensors of any strides: [B, N, H, D] storage seen as [B, H, N, D], and slices of a fused projection."""
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in make(m=150))
    fused = torch.cat([q, k, v], 1)
    q2, k2, v2 = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    spec = VerticalSlash(16, 32)
    assert torch.equal(
        mmflex.attention(q, k, v, spec, backend="reference"), mmflex.attention(q2, k2, v2, spec, backend="reference")
    )


# ---- backward ----


def test_backward_is_refused() -> None:
    q, k, v = (t.requires_grad_() for t in make(m=150))
    out = mmflex.attention(q, k, v, AShape(16, 16), backend="reference")
    with pytest.raises(RuntimeError, match="no backward"):
        out.sum().backward()
    out, lse = mmflex.attention(q, k, v, AShape(16, 16), backend="reference", return_lse=True)
    with pytest.raises(RuntimeError, match="no backward"):
        lse[..., -1].sum().backward()
    with torch.no_grad():
        assert not mmflex.attention(q, k, v, AShape(16, 16), backend="reference").requires_grad


# ---- why_not ----


def test_why_not_says_why() -> None:
    assert mmflex.why_not("cpu", "cpu") is None
    assert mmflex.why_not("reference", "cpu") is None
    assert mmflex.why_not("dense", "cpu") is None
    for name in ("flash", "triton"):
        reason = mmflex.why_not(name, "cpu")
        assert "cpu" in reason
        assert "CUDA" in reason
    assert "cuda" in mmflex.why_not("cpu", "cuda")
    for name in ("flash", "triton", "cpu"):
        with_reason = mmflex.why_not(name, "cuda:0" if name == "cpu" else "cpu", 64, torch.float32)
        assert re.search(r"the tensors are on (cpu|cuda:0)", with_reason)


# ---- a pattern of one's own ----


@dataclass(frozen=True)
class Ladder(mmflex.Pattern):
    """Every ``step``-th key, and the ``near`` keys before the query, token by token."""

    step: int = 8
    near: int = 4

    def mask(self, t: mmflex.Tokens):
        return sympy.Eq(sympy.Mod(t.k, self.step), 0) | (t.q - t.k < self.near)


@dataclass(frozen=True)
class FirstKeys(mmflex.Pattern):
    """Selects the keys that the mean query likes most; declares at most ``keep``, takes ``taken``."""

    keep: int = 8
    taken: int = 8

    def estimator(self):
        return MeanScores()

    def select(self, estimate: torch.Tensor, view: mmflex.View):
        best = estimate.topk(min(self.taken, view.size), -1).indices
        return {"keys": torch.zeros(estimate.shape, dtype=torch.bool).scatter_(-1, best, True)}

    def mask(self, t: mmflex.Tokens):
        return t.columns("keys", self.keep)


@dataclass(frozen=True)
class MeanScores:
    """Estimator: mean query times keys."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, view: mmflex.View, scale: float) -> torch.Tensor:
        return (q.mean(2, keepdim=True) @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT)[:, :, 0]


@dataclass(frozen=True)
class Diagonals(mmflex.Pattern):
    """Selects the first ``taken`` block diagonals, declares ``keep``."""

    keep: int = 2
    taken: int = 2

    def select(self, estimate: None, view: mmflex.View):
        return {"lines": (torch.arange(view.tiles) < self.taken)[None, None].expand(1, 4, -1)}

    def mask(self, t: mmflex.Tokens):
        return t.diagonals("lines", self.keep)


@dataclass(frozen=True)
class Table(mmflex.Pattern):
    """Names the first ``taken`` key tiles for every query tile, declares ``keep``."""

    keep: int = 2
    taken: int = 2

    def select(self, estimate: None, view: mmflex.View):
        return {"blocks": (torch.arange(view.tiles) < self.taken).expand(1, 4, -(-view.rows // view.tile), -1)}

    def mask(self, t: mmflex.Tokens):
        return t.blocks("blocks", self.keep)


def test_a_pattern_of_ones_own_is_exact_composes_and_travels_as_json() -> None:
    q, k, v = make(m=150)
    place = np.arange(150)
    plain = (place % 8 == 0) | (place[:, None] - place < 4)
    causal = np.tri(150, dtype=bool)
    for spec, pairs in (
        (Ladder(), plain),
        (Ladder() - Strided(2), plain & ~((place[:, None] - place) % 2 == 0) & (place[:, None] - place >= 2)),
        (Ladder(3, 2) & Ladder(2, 0), (place % 2 == 0) & ((place % 3 == 0) | (place[:, None] - place < 2))),
    ):
        again = from_json(json.loads(json.dumps(spec.to_json())))
        assert again == spec
        plan = mmflex.plan(q, k, again, backend="reference", block_size=16)
        assert (plan.dense_mask().numpy() == (pairs & causal)).all()
        mask = np.broadcast_to(pairs & causal, (1, 4, 150, 150))
        assert oracle.error(plan.attend(q, k, v), oracle.softmax(q, k, v, mask)[0]) <= 2e-6


def test_a_selecting_pattern_of_ones_own_is_exact() -> None:
    q, k, v = make(m=150)
    plan = mmflex.plan(q, k, FirstKeys(), backend="reference", block_size=16)
    mask = plan.dense_mask().numpy()
    assert (mask[:, :, -1].sum(-1) == 8).all()
    assert oracle.error(plan.attend(q, k, v), oracle.softmax(q, k, v, mask)[0]) <= 2e-6


@pytest.mark.parametrize("kind", [FirstKeys, Diagonals, Table], ids=lambda c: c.__name__)
@pytest.mark.parametrize("m", [800, 40])
def test_selecting_more_than_declared_is_loud(kind: type, m: int) -> None:
    """A pattern that breaks its promise stops the call: a block that no list holds would be a silent error."""
    q, k, v = make(m=m, n=800)
    kept = kind(16, 16)
    plan = mmflex.plan(q, k, kept, backend="reference", block_size=16)
    mask = plan.dense_mask().numpy()
    assert oracle.error(plan.attend(q, k, v), oracle.softmax(q, k, v, mask)[0]) <= 2e-6
    with pytest.raises(RuntimeError, match="at_most"):
        mmflex.plan(q, k, replace(kept, taken=40), backend="reference", block_size=16)


def test_a_pattern_without_a_mask_says_what_it_lacks() -> None:
    @dataclass(frozen=True)
    class Nothing(mmflex.Pattern):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing needs a mask\(t\)"):
        attend(spec=Nothing(), backend="reference")


# ---- JSON ----


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_json_round_trip(spec: mmflex.Pattern) -> None:
    """Through real JSON text: equal, same hash, same print, same mask."""
    text = json.dumps(spec.to_json())
    again = from_json(json.loads(text))
    assert again == spec
    assert hash(again) == hash(spec)
    assert str(again) == str(spec)
    assert type(again) is type(spec)
    assert json.dumps(again.to_json()) == text
    assert json.loads(text)["version"] == 1
    assert mmflex.Pattern.from_json(json.loads(text)) == spec


def test_patterns_are_values() -> None:
    """Frozen, hashable and told apart by what they print."""
    with pytest.raises(AttributeError):
        AShape().sink = 3
    assert len({str(p) for p in EVERY}) == len(set(EVERY)) == len(EVERY)
    assert AShape(1, 2) == AShape(1, 2)
    assert QBoundary({"text": Dense(), 2: AShape()}) == QBoundary({2: AShape(), 0: Dense()})


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"pattern": "AShape", "version": 1, "sink": 1, "width": 2}, ["width", "local", "sink"]),
        ({"pattern": "AShape", "version": 2, "sink": 1}, ["AShape", "2", "1"]),
        ({"pattern": "AShape", "sink": 1}, ["AShape", "None", "1"]),
        ({"pattern": "AShape", "version": "1", "sink": 1}, ["AShape", "'1'"]),
        ({"pattern": "Circle", "version": 1}, ["'Circle'", "AShape", "VerticalSlash"]),
        ({"version": 1}, ["pattern"]),
        ({"pattern": ["AShape"], "version": 1}, ["AShape"]),
        ([1, 2], ["pattern", "[1, 2]"]),
        (None, ["pattern", "None"]),
        ({"pattern": "AShape", "version": 1, "sink": -4}, ["AShape.sink", "-4"]),
        ({"pattern": "Union", "version": 1, "left": {"pattern": "Dense", "version": 1}}, ["Union", "right"]),
    ],
    ids=lambda x: json.dumps(x)[:50],
)
def test_json_that_does_not_fit_is_refused(data: object, named: list[str]) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, named))):
        from_json(data)


def test_json_of_a_part_that_is_no_pattern_is_refused() -> None:
    data = {"pattern": "Union", "version": 1, "left": 3, "right": {"pattern": "Dense", "version": 1}}
    with pytest.raises((TypeError, ValueError), match="3"):
        from_json(data)
