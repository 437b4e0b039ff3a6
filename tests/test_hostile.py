"""Input that nobody should give, and what is said of it: never a crash of something deeper, a wrong answer or unbounded
work. Errors name the value and the way out, in a message of bounded length."""

from __future__ import annotations

import copy
import dataclasses
import json
import operator
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import oracle
import pytest
import sympy
import torch
from torch._dynamo.testing import CompileCounter

import mmflex
from mask_builders import (
    AShape,
    BlockPeaks,
    BlockTopK,
    Boundary2D,
    Dense,
    Dilated,
    FlexPrefill,
    Grid,
    QBoundary,
    Strided,
    VerticalSlash,
    XAttention,
    estimate,
)
from mmflex import TokenLayout
from mmflex.ir import atoms
from mmflex.ir import expr as x
from mmflex.ir.pattern import find, from_json
from mmflex.runtime import backends

torch.set_num_threads(1)

N = 97


def tensors(n: int = N, heads: int = 2, batch: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = ((batch, heads, n, 16), (batch, 1, n, 16), (batch, 1, n, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def plan(spec: Any, n: int = N, batch: int = 1, **options: Any) -> mmflex.Plan:
    q, k, _ = tensors(n, batch=batch)
    return mmflex.plan(q, k, spec, **{"backend": "reference", "block_size": 16} | options)


def refused(call: Callable[[], object], error: type[Exception], *named: str) -> None:
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is error, text
    assert len(text) <= 1000, len(text)
    for name in named:
        assert name in text, text


# ---- mask expressions ------------------------------------------------------------------------------------------------


def own(write: Callable[[mmflex.Tokens], Any]) -> mmflex.Pattern:
    """A pattern of one's own with a given mask."""

    @dataclass(frozen=True)
    class Own(mmflex.Pattern):
        def mask(self, t: mmflex.Tokens) -> Any:
            return write(t)

    return Own()


MASKS: dict[str, tuple[Callable[[mmflex.Tokens], Any], type[Exception], list[str]]] = {
    "free symbol": (lambda t: sympy.Symbol("n") > t.k, ValueError, ["n is neither t.q nor t.k"]),
    "a symbol alone": (lambda t: sympy.Symbol("n"), TypeError, ["n"]),
    "product wraps": (lambda t: t.q * 2**28 > t.k * 2**27, ValueError, ["268435456*q", "2147483647"]),
    "constant wraps": (lambda t: t.q > 2**40, ValueError, [str(2**40), "2147483647"]),
    "sum wraps": (lambda t: t.q + 2**30 > t.k - 2**30 - t.q, ValueError, ["2147483647"]),
    "residue wraps": (lambda t: sympy.Eq(sympy.Mod(t.q * 2**26, 2**27 + 1), 0), ValueError, ["67108864*q"]),
    "a product of both": (lambda t: t.q * t.k * 2**20 > 3, ValueError, ["2147483647"]),
    "modulus beyond int32": (lambda t: sympy.Eq(t.q % 2**33, 0), ValueError, [str(2**33)]),
    "xor": (lambda t: (t.q > 3) ^ (t.k > 3), TypeError, ["Xor", "& | ~"]),
    "implies": (lambda t: sympy.Implies(t.q > 3, t.k > 3), TypeError, ["Implies", "& | ~"]),
    "if then else": (lambda t: sympy.ITE(t.q > 3, t.k > 3, t.k < 50), TypeError, ["ITE", "& | ~"]),
    "conditions compared": (lambda t: sympy.Eq(t.q > 3, t.k > 3), TypeError, ["q > 3"]),
    "half": (lambda t: t.q / 2 > t.k, TypeError, ["Half"]),
    "float": (lambda t: t.q > 2.5, TypeError, ["Float"]),
    "modulus by a token": (lambda t: sympy.Eq(t.q % (t.k + 1), 0), ValueError, ["k + 1"]),
    "modulus 0": (lambda t: sympy.Eq(t.q % 0, 0), ValueError, ["zero"]),
    "negative modulus": (lambda t: sympy.Eq(t.q % -3, 0), ValueError, ["-3"]),
    "nothing": (lambda t: None, TypeError, ["None", "mask"]),
    "a number": (lambda t: 3, TypeError, ["3", "mask"]),
    "no condition": (lambda t: t.q + t.k, TypeError, ["k + q"]),
    "text": (lambda t: "q > k", TypeError, ["'q > k'"]),
    "a tensor": (lambda t: torch.ones(3), TypeError, ["tensor"]),
    "a set by hand": (lambda t: atoms.Member(t.k, sympy.Symbol("s"), 3), ValueError, ["'s'", "t.columns"]),
    "a number by hand": (lambda t: x.Number("n") > t.k, ValueError, ["'n'", "t.number"]),
    "a number that may be 0": (lambda t: sympy.Eq(x.mod(t.k, t.number("s")), 0), ValueError, ["'s'", "at_least=1"]),
    "name with a mark": (lambda t: t.columns("a@b", 3), ValueError, ["'a@b'"]),
    "negative budget": (lambda t: t.columns("a", -3), ValueError, ["-3"]),
    "half a budget": (lambda t: t.sink(2.5), TypeError, ["2.5"]),  # type: ignore[arg-type]
    "blocks of nothing": (lambda t: t.blocks("b", 3, 0), ValueError, ["0"]),
    "one name for two sets": (lambda t: t.columns("a", 3) | t.diagonals("a", 3), ValueError, ["'a'", "of its own"]),
    "one name for tables of two sizes": (lambda t: t.blocks("a", 3, 8) | t.blocks("a", 3, 16), ValueError, ["'a'"]),
    "past a set": (lambda t: atoms.Member(t.k * 3, t._name("s"), 3), ValueError, ["3*k", "0 to 96"]),
    "past a table": (
        lambda t: atoms.Listed(t.q, x.Tile(t.k, 4), t._name("s"), 3).subs(x.q, t.q + 9),
        ValueError,
        ["q + 9"],
    ),
    "thousands of parts": (
        lambda t: sympy.Or(*(sympy.Eq(t.q - t.k, i, evaluate=False) for i in range(9_000)), evaluate=False),
        ValueError,
        ["parts"],
    ),
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("case", MASKS)
def test_masks_that_make_no_sense(case: str, backend: str) -> None:
    """Also where a short prompt runs dense anyway."""
    write, error, named = MASKS[case]
    refused(lambda: plan(own(write), backend=backend), error, *named)


def test_the_bound_of_int32_is_that_of_the_prompt() -> None:
    """The same mask fits a short prompt, and is computed right to the last value that fits."""
    factor = (2**31 - 1) // (2 * (N - 1))
    spec = own(lambda t: t.q * factor > t.k * factor + 3)
    mask = plan(spec).dense_mask()[0, 0].numpy()
    rows, keys = np.arange(N)[:, None], np.arange(N)
    assert (mask == (rows * factor > keys * factor + 3) & (rows >= keys)).all()
    refused(lambda: plan(spec, n=2 * N), ValueError, str(factor))


@pytest.mark.parametrize("joined", [sympy.Or, sympy.And])
def test_parts_that_no_bound_decides_may_be_negated_together(joined: Any) -> None:
    """Products of both tokens: of no block is it known whether it holds anything."""
    spec = own(lambda t: ~joined(t.q * t.k < 100, (t.q + 3) * t.k <= 400))
    made = plan(spec)
    rows, keys = np.arange(N)[:, None], np.arange(N)
    both = rows * keys < 100, (rows + 3) * keys <= 400
    wanted = ~(both[0] | both[1] if joined is sympy.Or else both[0] & both[1])
    assert (made.dense_mask()[0, 0].numpy() == wanted & (rows >= keys)).all()
    made.verify(*(torch.randn(1, heads, N, 16) for heads in (2, 1, 1)), rows=20)


def test_segments_may_have_any_number() -> None:
    """Values that are only compared need not be added."""
    segment = np.where(np.arange(N) < 40, 2**31 - 1, -(2**31))
    layout = TokenLayout.from_modality_ids(np.zeros(N, int), segment=segment)
    mask = plan(own(lambda t: sympy.Eq(t.q_segment, t.k_segment)), layout=layout).dense_mask()[0, 0].numpy()
    assert (mask == (segment[:, None] == segment) & np.tri(N, dtype=bool)).all()


def test_padded_prompts_may_be_longer_than_their_tokens() -> None:
    layout = TokenLayout.batch([TokenLayout.text(40), TokenLayout.text(30)], length=N)
    made = plan(VerticalSlash(9, 20), batch=2, layout=layout)
    assert made.dense_mask().any()


@pytest.mark.parametrize("parts", [5, 9, 40])
def test_intersections_of_unions_are_refused_with_their_size(parts: int) -> None:
    """They come apart into 4^n alternatives."""
    sides: list[mmflex.Pattern] = [Strided(5 + i) | VerticalSlash(10 + i, 20) for i in range(parts)]
    refused(lambda: plan(reduce(operator.and_, sides)), ValueError, "alternatives", "512")
    assert plan(reduce(operator.and_, sides[:4])).dense_mask().any()
    many = [Boundary2D({("text", "text"): Strided(i + 3) | AShape(i, 9) | Dilated(i)}) for i in range(parts + 1)]
    refused(lambda: plan(reduce(operator.and_, many)), ValueError, "alternatives")


def test_compositions_are_bounded_in_depth_and_number() -> None:
    def deep(step: Callable[[mmflex.Pattern], mmflex.Pattern], levels: int) -> mmflex.Pattern:
        return reduce(lambda pattern, _: step(pattern), range(levels), AShape(1, 2))  # type: ignore[arg-type,return-value]

    steps: list[Callable[[mmflex.Pattern], mmflex.Pattern]] = [
        lambda p: p | AShape(3, 4),
        lambda p: Strided(3) - p,
        lambda p: p.on("text"),
        lambda p: QBoundary({"text": p}),
        lambda p: Boundary2D({("text", "text"): p}),
    ]
    for step in steps:
        refused(lambda step=step: deep(step, 3000), ValueError, "100 levels")  # type: ignore[misc]
        assert plan(deep(step, 30)).dense_mask().any()
    doubled = [lambda p: p | p, lambda p: Boundary2D({("text", "text"): p, ("text", "video"): p})]
    for step in doubled:
        refused(lambda step=step: deep(step, 90), ValueError, "1000 patterns")  # type: ignore[misc]
    data: Any = AShape(1, 2).to_json()
    for _ in range(3000):
        data = {"pattern": "Union", "version": 1, "left": data, "right": Dense().to_json()}
    refused(lambda: from_json(data), ValueError, "100")
    listed: Any = []
    for _ in range(3000):
        listed = [listed]
    refused(lambda: from_json({"pattern": "QBoundary", "version": 1, "parts": listed}), ValueError, "100")


# ---- what selection returns ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen(mmflex.Pattern):
    """Selects what ``CHOSEN[case]`` makes of (prompts, heads, view)."""

    case: str

    def select(self, estimate: None, view: mmflex.View) -> Any:
        return CHOSEN[self.case](view)

    def mask(self, t: mmflex.Tokens) -> Any:
        lines = t.columns("columns", N) | t.diagonals("diagonals", N) | t.blocks("blocks", N, 8)
        return lines | sympy.Eq(x.mod(t.k, t.number("stride", at_least=2)), 0)


def chosen(view: mmflex.View, **changes: Any) -> dict[str, Any]:
    right = {
        "columns": torch.zeros(1, 2, view.size, dtype=torch.bool),
        "diagonals": torch.zeros(1, 2, view.tiles, dtype=torch.bool),
        "blocks": torch.zeros(1, 2, -(-view.rows // 8), -(-view.size // 8), dtype=torch.bool),
        "stride": torch.full((1, 2), 7),
    }
    return right | changes


CHOSEN: dict[str, Callable[[mmflex.View], Any]] = {
    "right": chosen,
    "one for all heads": lambda view: chosen(view, columns=chosen(view)["columns"][:, :1]),
    "longer": lambda view: chosen(view, columns=torch.ones(1, 2, view.size + 1, dtype=torch.bool)),
    "shorter": lambda view: chosen(view, columns=torch.ones(1, 2, view.size - 1, dtype=torch.bool)),
    "diagonals of tokens": lambda view: chosen(view, diagonals=torch.ones(1, 2, view.size, dtype=torch.bool)),
    "blocks of another size": lambda view: chosen(view, blocks=torch.ones(1, 2, view.tiles, view.tiles).bool()),
    "too many heads": lambda view: chosen(view, columns=torch.ones(1, 3, view.size, dtype=torch.bool)),
    "too many prompts": lambda view: chosen(view, columns=torch.ones(2, 2, view.size, dtype=torch.bool)),
    "no heads": lambda view: chosen(view, columns=torch.ones(view.size, dtype=torch.bool)),
    "floats": lambda view: chosen(view, columns=torch.ones(1, 2, view.size)),
    "half a stride": lambda view: chosen(view, stride=torch.full((1, 2), 7.5)),
    "stride by key": lambda view: chosen(view, stride=torch.full((1, 2, view.size), 7)),
    "elsewhere": lambda view: chosen(view, columns=torch.ones(1, 2, view.size, dtype=torch.bool, device="meta")),
    "an array": lambda view: chosen(view, columns=np.ones((1, 2, view.size), bool)),
    "nothing": lambda view: None,
    "stride 0": lambda view: chosen(view, stride=torch.zeros(1, 2, dtype=torch.int32)),
    "stride beyond int32": lambda view: chosen(view, stride=torch.full((1, 2), 2**40)),
}


@pytest.mark.parametrize(
    ("case", "error", "named"),
    [
        ("longer", ValueError, ["'columns'", "98", "97"]),
        ("shorter", ValueError, ["'columns'", "96", "97"]),
        ("diagonals of tokens", ValueError, ["'diagonals'", "97", "7"]),
        ("blocks of another size", ValueError, ["'blocks'", "7, 7", "13, 13"]),
        ("too many heads", ValueError, ["'columns'", "[1, 3, 97]", "[1, 2, 97]"]),
        ("too many prompts", ValueError, ["'columns'", "[2, 2, 97]", "[1, 2, 97]"]),
        ("no heads", ValueError, ["'columns'", "[97]", "[1, 2, 97]"]),
        ("floats", TypeError, ["'columns'", "float32", "bool"]),
        ("half a stride", TypeError, ["'stride'", "float32", "int"]),
        ("stride by key", ValueError, ["'stride'", "[1, 2, 97]", "[1, 2]"]),
        ("elsewhere", TypeError, ["'columns'", "meta", "cpu"]),
        ("an array", TypeError, ["'columns'"]),
        ("nothing", TypeError, ["None", "dictionary"]),
        ("stride 0", RuntimeError, ["'stride'", "at_least", "2"]),
        ("stride beyond int32", RuntimeError, ["'stride'", "at_least", "2"]),
    ],
)
def test_selections_that_do_not_fit_their_mask(case: str, error: type[Exception], named: list[str]) -> None:
    refused(lambda: plan(Chosen(case)), error, "Chosen", *named)


@dataclass(frozen=True)
class Comb(mmflex.Pattern):
    """Every ``stride``-th key, or every key as many apart as there are."""

    stride: int = 12

    def select(self, estimate: None, view: mmflex.View) -> Any:
        return {"stride": torch.full((1, 1), min(self.stride, view.layout.length))}

    def mask(self, t: mmflex.Tokens) -> Any:
        return sympy.Eq(x.mod(t.k, t.number("stride", at_least=self.stride)), 0)


def test_the_least_of_a_number_is_that_of_its_prompt() -> None:
    """Expressions of a short prompt are not changed by those of a long one."""
    for n in (9, 97, 9, 97):
        assert plan(Comb(), n).dense_mask()[0, 0, -1].nonzero().flatten().tolist() == list(range(0, n, min(12, n)))


class Fresh:
    """An estimator that equals no other."""

    def __call__(self, *args: Any) -> torch.Tensor:
        return torch.zeros(3)


@dataclass
class Thawed(Fresh):
    """An estimator that cannot be hashed."""


ESTIMATORS = {"fresh": Fresh, "thawed": Thawed, "a number": lambda: 5}


@dataclass(frozen=True)
class Estimating(mmflex.Pattern):
    kind: str

    def estimator(self) -> Any:
        return ESTIMATORS[self.kind]()

    def mask(self, t: mmflex.Tokens) -> Any:
        return t.columns("columns", 3)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_estimators_that_cannot_be_told_apart(kind: str) -> None:
    refused(lambda: plan(Estimating(kind)), TypeError, "Estimating", "frozen dataclass")


@pytest.mark.parametrize("case", ["right", "one for all heads"])
def test_a_selection_for_all_prompts_or_heads(case: str) -> None:
    """What is the same for all may be given once, also for a batch."""
    made, (q, k, v) = plan(Chosen(case), batch=3), tensors(batch=3)
    mask = made.dense_mask().numpy()
    keys = np.arange(N)
    assert (mask == ((keys % 7 == 0) & (keys[:, None] >= keys))).all()
    assert oracle.error(made.attend(q, k, v), oracle.softmax(q, k, v, mask)[0]) <= 2e-6


# ---- calls -----------------------------------------------------------------------------------------------------------

Q, K, V = tensors()


def attend(q: Any = Q, k: Any = K, v: Any = V, spec: Any = None, **options: Any) -> Any:
    spec = AShape(16, 16) if spec is None else spec
    return mmflex.attention(q, k, v, spec, **{"backend": "reference"} | options)


NESTED = torch.nested.nested_tensor([Q[0], Q[0]])


@dataclass(frozen=True)
class Holding(mmflex.Pattern):
    """Allows everything, whatever it holds."""

    value: Any

    def mask(self, t: mmflex.Tokens) -> Any:
        return sympy.true


CALLS: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "block_size 0": (lambda: plan(Dense(), block_size=0), ValueError, ["block_size is 0", "1 to 1024"]),
    "block_size -1": (lambda: plan(Dense(), block_size=-1), ValueError, ["block_size is -1", "1 to 1024"]),
    "block_size 10^9": (lambda: plan(Dense(), block_size=10**9), ValueError, ["block_size is 1000000000", "1 to 1024"]),
    "block_size True": (lambda: plan(Dense(), block_size=True), TypeError, ["block_size is True"]),
    "block_size 1.5": (lambda: plan(Dense(), block_size=1.5), TypeError, ["block_size is 1.5"]),
    "block_size text": (lambda: plan(Dense(), block_size="16"), TypeError, ["block_size is '16'"]),
    "no v": (lambda: attend(v=None), TypeError, ["v is None", "mmflex.plan"]),
    "no v for a plan": (lambda: plan(Dense()).attend(Q, K, None), TypeError, ["v is None"]),  # type: ignore[arg-type]
    "sparse": (lambda: attend(Q.to_sparse()), TypeError, ["q is of layout torch.sparse_coo"]),
    "sparse v": (lambda: attend(v=V.to_sparse()), TypeError, ["v is of layout torch.sparse_coo"]),
    "mkldnn": (lambda: attend(k=K.to_mkldnn()), TypeError, ["k is of layout torch._mkldnn"]),
    "nested": (lambda: attend(NESTED), TypeError, ["q is nested"]),
    "meta": (lambda: attend(*(t.to("meta") for t in (Q, K, V))), ValueError, ["q is on the meta device"]),
    "meta auto": (lambda: attend(*(t.to("meta") for t in (Q, K, V)), backend="auto"), ValueError, ["meta"]),
    "v on meta": (lambda: attend(v=V.to("meta")), TypeError, ["meta", "cpu"]),
    "scale nan": (lambda: attend(scale=float("nan")), ValueError, ["scale is nan", "finite"]),
    "scale inf": (lambda: attend(scale=float("inf")), ValueError, ["scale is inf", "finite"]),
    "scale 1e300": (lambda: attend(scale=1e300), ValueError, ["scale is 1e+300", "float32"]),
    "scale 10^400": (lambda: attend(scale=10**400), ValueError, ["scale", "float32"]),
    "scale text": (lambda: attend(scale="0.1"), TypeError, ["scale is '0.1'"]),
    "scale True": (lambda: attend(scale=True), TypeError, ["scale is True"]),
    "scale a tensor": (lambda: attend(scale=torch.tensor(0.1)), TypeError, ["scale is tensor"]),
    "lse no": (lambda: attend(return_lse="no"), TypeError, ["return_lse is 'no'"]),
    "backend a list": (lambda: attend(backend=["cpu"]), ValueError, ["['cpu']", "'auto'"]),
    "backend None": (lambda: attend(backend=None), ValueError, ["None", "'auto'"]),
    "a megabyte of backend": (lambda: attend(backend="x" * 10**6), ValueError, ["xxx", "'auto'"]),
    "a megabyte of spec": (lambda: attend(spec="x" * 10**6), TypeError, ["xxx", "pattern"]),
    "a list in a pattern": (lambda: attend(spec=Holding([1])), TypeError, ["Holding", "list", "tuples"]),
    "v of no width": (lambda: attend(v=V[..., :0]), ValueError, ["v has head dimension 0", "1 to 256"]),
    "v too wide": (lambda: attend(v=V.repeat(1, 1, 1, 20)), ValueError, ["v has head dimension 320", "1 to 256"]),
    "row -1": (lambda: plan(Dense()).dense_mask([-1]), ValueError, ["[-1]", "0 to 96"]),
    "row 97": (lambda: plan(Dense()).dense_mask([97]), ValueError, ["[97]", "0 to 96"]),
    "half a row": (lambda: plan(Dense()).dense_mask([1.5]), TypeError, ["[1.5]", "range"]),  # type: ignore[list-item]
    "rows of rows": (lambda: plan(Dense()).dense_mask([[1], [2]]), TypeError, ["[[1], [2]]"]),  # type: ignore[list-item]
    "no device": (lambda: mmflex.why_not("cpu", "nowhere"), ValueError, ["'nowhere'", "cuda:0"]),
    "scaled by 0": (lambda: AShape().scaled(0), ValueError, ["0", "finite"]),
    "scaled by nan": (lambda: AShape().scaled(float("nan")), ValueError, ["nan", "finite"]),
    "scaled by inf": (lambda: AShape().scaled(float("inf")), ValueError, ["inf", "finite"]),
    "scaled beyond": (lambda: AShape(1, 2**1000).scaled(1e300), ValueError, ["AShape.local", "1024 bits"]),
    "grid columns": (lambda: Grid(columns="no"), TypeError, ["Grid.columns", "'no'", "True or False"]),
    "grid longest": (lambda: Grid("search", longest=1e9), TypeError, ["Grid.longest"]),
    "a budget of 5000 digits": (lambda: AShape(10**5000), ValueError, ["AShape.sink", "1024 bits"]),
    "a boundary of a number": (lambda: QBoundary(5), TypeError, ["5", "modalities"]),
    "a boundary of triples": (lambda: QBoundary([(1, 2, 3)]), TypeError, ["(1, 2, 3)", "modalities"]),
    "a modality twice": (lambda: QBoundary([("video", Dense()), (2, AShape())]), ValueError, ["2", "more than once"]),
    "a pair twice": (
        lambda: Boundary2D([(("text", "video"), Dense()), ((0, 2), AShape())]),
        ValueError,
        ["(0, 2)", "more than once"],
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_make_no_sense(case: str) -> None:
    call, error, named = CALLS[case]
    attend()  # a call of the same shapes is kept
    attend(backend="auto")
    refused(call, error, *named)


def test_numbers_of_other_libraries_are_scales() -> None:
    assert torch.equal(attend(scale=np.float32(0.5)), attend(scale=0.5))
    assert torch.equal(attend(scale=1), attend(scale=1.0))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1024])
def test_odd_block_sizes(size: int) -> None:
    spec = Grid(7, slash=True, local=9, sink=3) | VerticalSlash(9, 20) | BlockTopK(2, 8)
    q, k, v = tensors()
    made = plan(spec, block_size=size)
    mask = oracle.token_mask(made, (spec,) * 2)
    assert (made.dense_mask().numpy() == mask).all()
    assert oracle.error(made.attend(q, k, v), oracle.softmax(q, k, v, mask)[0]) <= 2e-6


@pytest.mark.parametrize("first", [0, 1])
def test_constants_of_one_block_size_are_not_those_of_another(first: int) -> None:
    """Where the limits of 2 heads begin in 60 slots, and which of 60 keys are the first 30, were one constant."""
    padded = TokenLayout.batch([TokenLayout.text(29)], length=30)
    calls = [lambda: plan(AShape(4, 4), 30, layout=padded, block_size=2), lambda: plan(VerticalSlash(40, 20), 60)]
    for made in (calls[first](), calls[1 - first]()):
        q, k, v = tensors(made.layout.length)
        assert oracle.error(made.attend(q, k, v), oracle.softmax(q, k, v, made.dense_mask().numpy())[0]) <= 2e-6


@pytest.mark.parametrize("backend", ["flash", "triton"])
def test_kernels_of_blocks_of_128_say_so(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "resolve", lambda *_: backends.BACKENDS[backend])
    refused(lambda: plan(AShape(3, 5), block_size=64), ValueError, "64", backend, "128", "reference")


def test_tables_of_tokens_are_refused() -> None:
    """Blocks of one token make a table of N x N."""
    q = k = torch.zeros(1, 1, 1, 16).expand(1, 1, 1 << 15, 16)
    for spec in (BlockTopK(1, 1), XAttention(1, 0.9, 3, 1), FlexPrefill(block_size=1)):
        refused(lambda spec=spec: mmflex.plan(q, k, spec), ValueError, "32768 x 32768", str(1 << 28))  # type: ignore[misc]


@pytest.mark.parametrize("chunk", [1, 5000, 40_000])
def test_estimates_of_many_last_queries_are_made_in_parts(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many last queries as there are tokens, whose attention is not held at once."""
    layout = TokenLayout.batch([TokenLayout.from_segments([("text", 90), ("image", (10, 10))]), TokenLayout.text(170)])
    spec = VerticalSlash(30, 40, last_q=10**9)
    for pattern in (spec, spec.on("image", "text"), Grid("search", slash=True, last_q=10**9)):
        wanted = plan(pattern, 190, batch=2, layout=layout).dense_mask()
        monkeypatch.setattr(estimate, "_CHUNK", chunk)
        found = plan(pattern, 190, batch=2, layout=copy.copy(layout)).dense_mask()
        monkeypatch.undo()
        assert torch.equal(found, wanted)


def test_a_stride_beyond_memory() -> None:
    """Eight terabytes of phases for a grid that has one line."""
    made = plan(Grid(10**12, local=0, sink=0))
    phase = made.dense_mask()[0, 0, -1].nonzero().flatten()
    assert len(phase) == 1
    assert torch.equal(made.dense_mask(), plan(Grid(2 * N, local=0, sink=0)).dense_mask())


def test_budgets_beyond_floats_are_scaled() -> None:
    assert AShape(1, 2**1000).scaled(2.0) == AShape(1, 2**1001)
    assert AShape(1, 1000).scaled(1.5) == AShape(1, 1472)


@pytest.mark.parametrize("way", ["plan", "attend"])
def test_plans_are_made_outside_of_graphs(way: str) -> None:
    """Planning inside of torch.compile breaks the graph once, instead of being traced for minutes."""
    spec = VerticalSlash(9, 20) | Strided(7)
    made = mmflex.plan(Q, K, spec, backend="reference")

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (made if way == "attend" else mmflex.plan(q, k, spec, backend="reference")).attend(q * 1, k, v) + 1

    counted = CompileCounter()
    compiled = torch.compile(call, backend=counted)
    assert torch.allclose(compiled(Q, K, V), made.attend(Q, K, V) + 1)
    assert counted.frame_count <= 2
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"mmflex.attention inside"):
        torch.compile(call, fullgraph=True)(Q, K, V)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["eager", "log-sum-exp", "plan", "compiled", "compiled log-sum-exp", "dynamic"])
def test_one_refusal_of_backward(way: str) -> None:
    """Forward runs and says that it has a gradient; backward refuses, however the call was made."""
    spec, q = AShape(16, 16), Q.clone().requires_grad_()
    options: dict[str, Any] = {"backend": "reference", "return_lse": "log-sum-exp" in way}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return mmflex.attention(q, k, v, spec, **options)

    if way == "plan":
        call = mmflex.plan(q, K, spec, backend="reference").attend
    elif way.startswith("compiled"):
        call = torch.compile(call, fullgraph=True)
    elif way == "dynamic":
        call = torch.compile(call, dynamic=True)
    found = call(q, K, V)
    out = found[0] if isinstance(found, tuple) else found
    assert out.requires_grad
    with torch.no_grad():
        again = call(q, K, V)
    assert torch.equal(out, again[0] if isinstance(again, tuple) else again)
    refused(lambda: (out.sum() * 2).backward(), RuntimeError, "no backward", "prefill")


# ---- what a process has set ------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    """Also fills memory that nobody has written to with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[str], Any]] = {
    "default dtype float64": lambda device: default_dtype(torch.float64),
    "default dtype bfloat16": lambda device: default_dtype(torch.bfloat16),
    "default device meta": lambda device: default_device("meta"),
    "autocast": lambda device: torch.autocast(device, torch.bfloat16),
    "inference mode": lambda device: torch.inference_mode(),
    "deterministic algorithms": lambda device: deterministic(),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SPECS = [
    VerticalSlash(20, 40, 16),
    FlexPrefill(0.8, 0.2, 20, 40, 3, 16, 16, 16),
    XAttention(4, 0.8, 3, 16),
    BlockPeaks(0.02, 4, 3, 16),
    BlockTopK(3, 16),
    Grid("search", rows=True, slash=True, local=16, sink=16, last_q=16, shortest=8, longest=40),
    [Dense(), Strided(7) | AShape(3, 9)],
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_results_do_not_depend_on_what_a_process_has_set(setting: str, device: str) -> None:
    """Not even the first ones, which leave constants behind for all others."""
    length = 150 + list(SETTINGS).index(setting)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (t.to(device) for t in tensors(length, batch=2, dtype=dtype))
        layouts = [TokenLayout.text(length - 30), TokenLayout.from_segments([("image", (10, length // 10))])]
        for spec in SPECS:
            found = []
            for where in (SETTINGS[setting](device), torch.no_grad()):
                layout = TokenLayout.batch(layouts, side="left", length=length)
                with where:
                    options: dict[str, Any] = {"layout": layout, "backend": "reference"}
                    made = mmflex.plan(q, k, spec, **options, block_size=16)
                    found.append((made.attend(q, k, v), *mmflex.attention(q, k, v, spec, **options, return_lse=True)))
            for first, second in zip(*found, strict=True):
                assert first.dtype == second.dtype
                assert torch.allclose(first, second, rtol=1e-6, atol=1e-6)


def test_arrays_that_are_read_only_warn_of_nothing() -> None:
    code = """
import warnings
warnings.simplefilter("error")
import torch, mmflex
from mask_builders import *
layout = mmflex.TokenLayout.from_segments([("text", 30), ("video", (4, 5, 6)), ("text", 20)])
q, k, v = torch.randn(1, 2, 170, 16), torch.randn(1, 1, 170, 16), torch.randn(1, 1, 170, 16)
for spec in (Grid("frame", rows=True, slash=True), VerticalSlash(9, 9).on("video"), BlockTopK(2, 16), XAttention(4)):
    plan = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16)
    plan.attend(q, k, v), plan.dense_mask(), plan.explain(), plan.density
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- layouts ---------------------------------------------------------------------------------------------------------

ZEROS = np.zeros((1, 4), np.int32)
LAYOUTS: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "a modality past int32": (lambda: TokenLayout.from_modality_ids([2**32 + 2]), ValueError, [str(2**32 + 2)]),
    "a frame past int32": (
        lambda: TokenLayout.from_modality_ids([2], frame=[2**40]),
        ValueError,
        ["frame", str(2**40)],
    ),
    "half a modality": (lambda: TokenLayout.from_modality_ids([0.5]), TypeError, ["float64"]),
    "ragged": (lambda: TokenLayout.from_modality_ids([[1, 2], [3]]), TypeError, ["ids"]),
    "ids on meta": (lambda: TokenLayout.from_modality_ids(torch.zeros(3, device="meta").int()), TypeError, ["meta"]),
    "timestamps on text": (
        lambda: TokenLayout.from_segments([("text", 5, {"timestamps": 3})]),
        ValueError,
        ["timestamps=3", "text has none"],
    ),
    "newlines on audio": (
        lambda: TokenLayout.from_segments([("audio", 5, {"newline": "row"})]),
        ValueError,
        ["newline='row'", "audio has none"],
    ),
    "negative timestamps": (
        lambda: TokenLayout.from_segments([("video", (2, 2, 2), {"timestamps": -1})]),
        ValueError,
        ["-1"],
    ),
    "half a timestamp": (
        lambda: TokenLayout.from_segments([("video", (2, 2, 2), {"timestamps": (1, 1.5)})]),
        ValueError,
        ["1.5"],
    ),
    "a trillion tokens": (lambda: TokenLayout.text(10**12), ValueError, [str(10**12), str(1 << 28)]),
    "a trillion frames": (lambda: TokenLayout.from_segments([("video", (10**12, 1, 1))]), ValueError, [str(10**12)]),
    "a trillion of padding": (
        lambda: TokenLayout.batch([TokenLayout.text(3)], length=10**12),
        ValueError,
        [str(10**12)],
    ),
    "text of a text": (lambda: TokenLayout.text("5"), ValueError, ["'5'"]),  # type: ignore[arg-type]
    "batch of numbers": (lambda: TokenLayout.batch([TokenLayout.text(3), 3]), TypeError, ["layouts[1] is 3"]),  # type: ignore[list-item]
    "batch of one": (lambda: TokenLayout.batch(TokenLayout.text(3)), TypeError, ["list of layouts"]),  # type: ignore[arg-type]
    "positions that do not count": (
        lambda: TokenLayout(ZEROS, ZEROS, ZEROS, ZEROS, ZEROS),
        ValueError,
        ["position[0, 1]"],
    ),
    "unlike arrays": (
        lambda: TokenLayout(np.arange(4)[None], ZEROS, ZEROS, ZEROS, ZEROS[:, :3]),
        ValueError,
        ["cell", "(1, 3)", "(1, 4)"],
    ),
    "a megabyte of modality": (lambda: TokenLayout.from_segments([("x" * 10**6, 3)]), ValueError, ["xxx", "'text'"]),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_that_make_no_sense(case: str) -> None:
    call, error, named = LAYOUTS[case]
    refused(call, error, *named)


def test_frames_of_nothing_take_no_time() -> None:
    assert TokenLayout.from_segments([("video", (1 << 28, 0, 0))]).length == 0
    assert TokenLayout.from_segments([("video", (1 << 28, 0, 0), {"newline": "video"})]).length == 1


def test_layouts_cannot_be_written_to() -> None:
    layout = TokenLayout.from_segments([("text", 3), ("video", (2, 2, 2)), ("text", 4)])
    given = layout.modality.copy()
    other = TokenLayout.from_modality_ids(given)
    given[:] = 1  # a copy was taken
    assert (other.modality == layout.modality).all()
    arrays = [getattr(layout, f.name) for f in dataclasses.fields(layout) if f.type == "np.ndarray"]
    for array in (*arrays, layout.rank, layout.coordinate("video")):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


def test_copies_of_layouts_share_nothing_that_was_computed() -> None:
    layout = TokenLayout.from_segments([("text", 3), ("video", (2, 2, 2)), ("text", 4)])
    assert layout.modalities == (0, 2)
    text = dataclasses.replace(layout, modality=np.zeros_like(layout.modality))
    assert text.modalities == (0,)
    for again in (copy.copy(layout), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert again.fingerprint == layout.fingerprint
        assert not again.cell.flags.writeable


# ---- patterns from strangers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Touchy(mmflex.Pattern):
    """Raises something of its own where its fields are wrong."""

    size: int = 1

    def __post_init__(self) -> None:
        assert {1: True}[self.size]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"pattern": "AShape", "version": True}, ["AShape", "True", "version 1"]),
        ({"pattern": "AShape", "version": 1.0}, ["AShape", "1.0", "version 1"]),
        ({"pattern": "x" * 10**6, "version": 1}, ["xxx", "AShape"]),
        ({"pattern": "AShape", "version": 1, "x" * 10**6: 1}, ["AShape has no field", "local"]),
        ({"pattern": "AShape", "version": "x" * 10**6}, ["AShape", "xxx"]),
        ({"pattern": "AShape", "version": 1, "sink": "x" * 10**6}, ["AShape.sink", "xxx"]),
        ({"pattern": "AShape", "version": 1, "sink": [1] * 10**5}, ["AShape.sink"]),
        ({"pattern": "_Pair", "version": 1}, ["'_Pair'", "known are"]),
        ({"pattern": "QBoundary", "version": 1, "parts": 5}, ["QBoundary", "5"]),
        ({"pattern": "QBoundary", "version": 1, "parts": [[1, 2, 3]]}, ["(1, 2, 3)"]),
        ({"pattern": "Boundary2D", "version": 1, "parts": [[0, Dense().to_json()]]}, ["pair", "0"]),
        ({"pattern": "Restricted", "version": 1, "inner": 3}, ["Restricted", "3"]),
        ({"pattern": "Touchy", "version": 1, "size": 7}, ["Touchy", "7", "size"]),
        ({"pattern": "Grid", "version": 1, "columns": "no"}, ["Grid.columns", "'no'"]),
        ({"pattern": "FlexPrefill", "version": 1, "tau": float("nan")}, ["FlexPrefill.tau", "nan"]),
        ("x" * 10**6, ["pattern", "xxx"]),
    ],
    ids=lambda data: json.dumps(data)[:50],
)
def test_json_of_strangers_is_refused(data: object, named: list[str]) -> None:
    refused(lambda: from_json(data), ValueError, *named)


def test_an_entry_point_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from mmflex.ir import names

    point = EntryPoint("Nowhere", "no_such_package:Nowhere", "mmflex.patterns")
    monkeypatch.setattr(names, "_offers", lambda: {"Nowhere": [point]})
    refused(lambda: find("Nowhere"), ValueError, "'Nowhere'", "no_such_package:Nowhere", "ModuleNotFoundError")


def test_restrictions_by_name_are_those_by_id() -> None:
    data = {"pattern": "Restricted", "version": 1, "inner": Dense().to_json(), "query": "video"}
    assert from_json(data) == Dense().on("video")
