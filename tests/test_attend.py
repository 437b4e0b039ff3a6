"""What a launch becomes on its way to the kernel, and kernels that are made anew."""

from __future__ import annotations

import unittest.mock
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

import mmflex
from mask_builders import AShape, Dense, Grid, VerticalSlash, XAttention
from mmflex import TokenLayout
from mmflex.compiler.constants import GENERIC
from mmflex.compiler.launches import SIDE_STREAM_KEYS
from mmflex.compiler.lower import lower
from mmflex.compiler.prices import attend_ms, predict
from mmflex.ir.queries import QueryTokens
from mmflex.runtime import backends, masks, reference
from mmflex.runtime.launches import execution
from mmflex.runtime.streams import SideStream

TILE = 16
HEAD_AND_TAIL = QueryTokens(((0, 96), (288, 384)))


def planned(
    spec: mmflex.Pattern, queries: int | QueryTokens, keys: int, memory: str = "heads"
) -> tuple[mmflex.Plan, tuple[Tensor, ...]]:
    """A plan with tiles of 16, and q, k, v in the slots of its only launch."""
    torch.manual_seed(0)
    rows = QueryTokens.last(queries, keys) if isinstance(queries, int) else queries
    q, k, v = (torch.randn(1, heads, n, 32) for heads, n in ((6, rows.count), (2, keys), (2, keys)))
    if memory == "tokens":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    where = {"query_positions": rows, "backend": "reference", "block_size": TILE}
    plan = mmflex.plan(q, k, spec, layout=TokenLayout.text(keys), **where)
    assert len(plan.program.launches) == 1
    return plan, in_slots(plan, q, k, v)


def in_slots(plan: mmflex.Plan, q: Tensor, k: Tensor, v: Tensor, any_length: bool = False) -> tuple[Tensor, ...]:
    """q, k and v in the slots of a plan's only launch."""
    (launch,), prepared = plan.program.launches, plan.state.prepared[0]
    run = execution(launch)
    keys = run.keys(plan.state, launch, prepared, k, v, any_length)
    return run.queries(plan.state, launch, prepared, q, any_length), *keys


@pytest.mark.parametrize("memory", ["heads", "tokens"])
@pytest.mark.parametrize("strip", [1, 2, 6])
@pytest.mark.parametrize(("queries", "keys"), [(192, 192), (96, 192), (185, 185), (HEAD_AND_TAIL, 384)])
@pytest.mark.parametrize("spec", [VerticalSlash(40, 64, 16), AShape(20, 50)])
def test_strips_are_the_same_attention(
    monkeypatch: pytest.MonkeyPatch,
    spec: mmflex.Pattern,
    queries: int | QueryTokens,
    keys: int,
    strip: int,
    memory: str,
) -> None:
    """A prompt's queries in strips, as a batch over the same keys: same masks, lists and rows, and no copies."""
    monkeypatch.setattr(backends, "STRIP", strip)
    plan, (q, k, v) = planned(spec, queries, keys, memory)
    ready = plan.state.prepared[0]
    assert ready.mask_mod.one_for_all
    whole, lse = reference.attend(q, k, v, ready.mask_mod, ready.lists, TILE, plan.scale)
    dealt = backends._in_strips(q, k, v, ready.mask_mod, ready.lists, TILE)
    assert dealt[0].shape == (q.shape[2] // TILE // strip, 6, strip * TILE, 32)
    for one, other in zip((*dealt[:3], *dealt[4]), (q, k, v, *ready.lists), strict=True):
        assert one.data_ptr() == other.data_ptr()
    found, sums = reference.attend(*dealt, TILE, plan.scale)
    assert torch.equal(backends._joined(found), whole)
    assert sums is not None
    assert torch.equal(backends._joined(sums), lse)


def test_lists_of_what_is_given_end_where_it_ends() -> None:
    """185 tokens fill 12 tiles of 16; a launch of 13 with lists as wide names none of the last."""
    count, index = torch.arange(13).expand(1, 2, -1), torch.zeros(1, 2, 13, 13)
    lists = backends.BlockLists(count, index, count, index)
    assert backends._cut(lists, 13, 13) is lists
    assert [tuple(t.shape) for t in backends._cut(lists, 12, 12)] == [(1, 2, 12), (1, 2, 12, 12)] * 2
    assert [tuple(t.shape) for t in backends._cut(lists, 12, 40)] == [(1, 2, 12), (1, 2, 12, 13)] * 2
    assert [tuple(t.shape) for t in backends._cut(lists, 13, 12)] == [(1, 2, 13), (1, 2, 13, 12)] * 2


@pytest.mark.parametrize(
    ("queries", "in_place"),
    [
        (QueryTokens(((0, 96), (288, 384))), True),  # whole tiles
        (QueryTokens(((0, 96), (288, 381))), True),  # the last one is not full
        (QueryTokens(((100, 381),)), False),  # the first one begins within a tile
        (QueryTokens(((0, 90), (288, 384))), False),
        (QueryTokens(((96, 381),)), True),
    ],
)
def test_queries_that_fill_their_slots_in_order_are_not_copied(queries: QueryTokens, in_place: bool) -> None:
    plan, _ = planned(VerticalSlash(40, 64, 16), queries, 384)
    (launch,) = plan.program.launches
    assert launch.rows.stays(any_length=True) == in_place
    q, k, v = (torch.randn(1, heads, n, 32) for heads, n in ((6, queries.count), (2, 384), (2, 384)))
    assert (in_slots(plan, q, k, v, True)[0].data_ptr() == q.data_ptr()) == in_place
    if in_place and launch.rows.slots > queries.count:
        rows, keys, values = in_slots(plan, q, k, v, True)
        ready = plan.state.prepared[0]
        lists = backends._cut(ready.lists, -(-queries.count // TILE), keys.shape[2] // TILE)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[2] % TILE))
        found, _ = reference.attend(padded, keys, values, ready.mask_mod, lists, TILE, plan.scale)
        torch.testing.assert_close(found[:, :, : queries.count], plan.attend(q, k, v))


def test_only_long_prompts_go_in_strips() -> None:
    tiles = (1, 512, 1023, 1024, 1032, 1040, 8192)
    assert [n for n in tiles if backends._strips(n * 128, 128)] == [1024, 1040, 8192]
    assert not backends._strips(1040 * 128 + 1, 128)


@pytest.mark.parametrize(("queries", "keys"), [(200, 200), (96, 200), (96, 192), (40, 199)])
def test_masks_read_nothing_where_limits_are_slots(queries: int, keys: int) -> None:
    """From the first query on; the dense mask says what it must be."""
    q, k, v = (torch.randn(1, heads, n, 32) for heads, n in ((2, queries), (1, keys), (1, keys)))
    plan = mmflex.plan(q, k, AShape(20, 50), backend="reference", block_size=TILE)
    mask_mod = plan.state.prepared[0].mask_mod
    assert mask_mod.comparison == ("row >= key" if keys - queries < TILE else "row >= limit[key]")
    assert len(mask_mod.captures) == 2 * (keys - queries >= TILE)
    expected, _ = reference.softmax_attention(q.double(), k.double(), v.double(), plan.dense_mask(), 32**-0.5)
    assert (plan.attend(q, k, v) - expected).norm() <= 2e-6 * expected.norm()


def test_padding_and_gathered_columns_need_limits() -> None:
    layouts = [TokenLayout.text(150), TokenLayout.text(200)]
    q, k = torch.randn(2, 2, 200, 32), torch.randn(2, 1, 200, 32)
    padded = mmflex.plan(q, k, AShape(20, 50), layout=TokenLayout.batch(layouts, side="left"), backend="reference")
    mixed = mmflex.plan(q[:1], k[:1], [AShape(20, 50), VerticalSlash(5, 20)], backend="reference")
    for plan in (padded, mixed):
        assert plan.state.prepared[0].mask_mod.comparison == "row >= limit[key]"


def test_kernels_made_in_too_many_ways_are_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo refuses a code object that it has compiled eight times; the next one starts at none."""
    made: list[str] = []

    def compiled(function: Any, **options: Any) -> Any:
        made.append(function.__code__.co_name)
        calls = iter(range(100))

        def run(*args: Tensor) -> str:
            if next(calls) == 2:
                raise FailOnRecompileLimitHit("Hard failure due to fullgraph=True")
            return made[-1]

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    bucket = (torch.bfloat16, torch.device("cuda"), 1, 8, 2, 64, 64)
    kernel = backends._kernel.__wrapped__("make = None", "flash", 128, 1.0, False, bucket)
    args = (*[torch.zeros(1, 2, 256, 64)] * 3, *[torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, 2)] * 2)
    assert [kernel(*args) for _ in range(4)] == [made[0], made[0], made[1], made[1]]
    assert len(set(made)) == 2


@pytest.mark.parametrize("strips", [False, True])
def test_flash_kernels_are_compiled_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch, strips: bool) -> None:
    """Not for the first length, and again when there is a second one. The marks that this takes do not stay on the
    caller's tensors."""
    graphs: list[Any] = []

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def compiled(function: Any, *, dynamic: bool | None, fullgraph: bool, compile: Any = torch.compile) -> Any:
        return compile(function, backend=counted, dynamic=dynamic, fullgraph=fullgraph)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(backends, "LONG_QUERIES", 0 if strips else 1 << 20)
    heads, tile, unit = 4, 16, 16 * backends.STRIP
    backends._kernel.cache_clear()
    for m, n in ((2 * unit, 5 * unit), (3 * unit, 7 * unit), (2 * unit, 2 * unit), (4 * unit, 6 * unit)):
        q, k, v = torch.randn(1, heads, m, 32), torch.randn(1, 2, n, 32), torch.randn(1, 2, n, 32)
        rows, keys = m // tile, n // tile
        number = torch.arange(keys, dtype=torch.int32).expand(1, heads, rows, -1).contiguous()
        count = (torch.arange(rows, dtype=torch.int32) + keys - rows + 1).expand(1, heads, -1).contiguous()
        lists = backends.BlockLists(count, number, torch.zeros_like(count), torch.zeros_like(number))
        limit = torch.arange(n, dtype=torch.int32).expand(1, heads, -1).contiguous()
        mask_mod = masks.comparison((torch.arange(m, dtype=torch.int32) + n - m)[None], limit)
        out, _ = backends.attend(backends.BACKENDS["flash"], q, k, v, mask_mod, lists, tile, 0.2, True)
        seen = torch.arange(n) <= (torch.arange(m) + n - m)[:, None]
        expected, _ = reference.softmax_attention(q.double(), k.double(), v.double(), seen[None, None], 0.2)
        assert (out - expected).abs().max() < 2e-6
        assert not any(vars(t) for t in (q, k, v, *lists, *mask_mod.captures))
    assert len(graphs) == 1
    backends._kernel.cache_clear()


def test_a_side_stream_is_no_stream_off_a_gpu() -> None:
    with SideStream(torch.device("cpu")) as aside:
        assert aside.run(lambda: [1, 2])() == [1, 2]


@pytest.mark.parametrize(("backend", "tokens", "runs"), [
    ("triton", SIDE_STREAM_KEYS // 2, False), ("triton", SIDE_STREAM_KEYS, True), ("cpu", SIDE_STREAM_KEYS, False),
])  # fmt: skip
def test_few_rows_are_priced_as_overlapping_with_the_rest(backend: str, tokens: int, runs: bool) -> None:
    """On a GPU and from some length on: their longest tile counts no more than what else is done meanwhile."""
    q, k = torch.zeros(1, 2, tokens, 16), torch.zeros(1, 1, tokens, 16)
    spec = Grid(256, columns=True, rows=True)
    program = mmflex.plan(q, k, spec, layout=TokenLayout.text(tokens), backend="reference").program
    prices = replace(program.constants, backend=backend)
    one, wide = (predict(program, replace(prices, lanes=lanes)) for lanes in (1, 10_000))
    assert one.launches[1].kind == "gathered rows"
    assert (wide.launches[1].attend_ms == one.launches[1].attend_ms) == runs
    assert one.attend_ms == pytest.approx(sum(launch.attend_ms for launch in one.launches))
    alone = attend_ms(wide.launches[1].work, replace(prices, lanes=10_000))
    assert wide.attend_ms >= alone > 10 * one.attend_ms


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", [185, 165])
def test_what_need_not_fill_tiles_is_not_copied(queries: int, padded: bool) -> None:
    """Masks of one comparison hold for tokens as they stand, unless queries begin within a tile, or with padding."""
    n = 185
    layout = TokenLayout.batch([TokenLayout.text(n), TokenLayout.text(n - 9)], side="left") if padded else None
    q, k, v = (torch.randn(2, heads, tokens, 32) for heads, tokens in ((4, queries), (2, n), (2, n)))
    plan = mmflex.plan(q, k, AShape(20, 50), layout=layout, backend="reference", block_size=TILE)
    (launch,) = plan.program.launches
    for given in (False, True):
        rows, keys, values = in_slots(plan, q, k, v, given)
        assert (rows is q) == (given and not padded and queries == n)
        assert (keys is k) == (values is v) == (given and not padded)
        assert (launch.moved_tiles(plan.layout, 4, given) == 0) == (rows is q and keys is k)


def test_what_is_priced_is_what_backends_can_do() -> None:
    for name, backend in backends.BACKENDS.items():
        assert replace(GENERIC, backend=name).any_length == backend.any_length


def test_a_compiled_kernel_takes_tokens_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """4150 tokens fill 32.4 of 34 tiles: neither queries nor keys are padded, whole launches and some heads of them."""
    monkeypatch.setitem(backends.BACKENDS, "cpu", replace(backends.BACKENDS["cpu"], any_length=True))
    backends.resolve.cache_clear()
    try:
        torch.manual_seed(0)
        q, k, v = torch.randn(1, 2, 4150, 16), torch.randn(1, 1, 4150, 16), torch.randn(1, 1, 4150, 16)
        plan = mmflex.plan(q, k, [Grid(300, columns=False, rows=True, phase=7, local=300), Dense()], backend="cpu")
        assert [launch.name for launch in plan.program.launches] == ["blocks", "dense", "gathered rows"]
        assert plan.program.launches[0].row_slots == 34 * 128
        with unittest.mock.patch.object(backends, "_kernel", wraps=backends._kernel) as made:
            found = plan.attend(q, k, v)
        assert {call.args[-1][3][2] for call in made.call_args_list} == {4150}
        expected, _ = reference.softmax_attention(q.double(), k.double(), v.double(), plan.dense_mask(), 0.25)
        assert (found - expected).norm() <= 2e-6 * expected.norm()
    finally:
        backends.resolve.cache_clear()


@pytest.mark.parametrize("backend", ["flash", "triton"])
@pytest.mark.parametrize("tokens", [8192, 8200])
def test_dense_heads_of_a_whole_launch_are_not_copied(backend: str, tokens: int) -> None:
    """Whatever the length: a spec must not win against copies that dense attention never makes."""
    layout = TokenLayout.text(tokens)
    queries = QueryTokens.last(tokens, tokens)
    program = lower((Dense(),) * 4, layout, queries, 2, 128, lse=True, full_width=False)
    assert predict(program, replace(program.constants, backend=backend)).moving_ms == 0
    some = lower((Dense(), AShape(20, 50)) * 2, layout, queries, 2, 128, lse=True, full_width=False)
    launch = next(launch for launch in some.launches if launch.name == "dense")
    assert launch.expected_work(layout, 4).copies


@pytest.mark.parametrize(("pattern", "price"), [(XAttention(4, 0.9, 8, 16), "full"), (VerticalSlash(5, 20), "product")])
def test_products_of_estimates_are_priced_by_how_they_are_taken(pattern: mmflex.Pattern, price: str) -> None:
    """Those of matrices at the rate of attention, those of a few queries with all keys by themselves."""
    q, k = torch.zeros(1, 2, 640, 16), torch.zeros(1, 1, 640, 16)
    program = mmflex.plan(q, k, pattern, backend="reference", block_size=TILE).program
    before = predict(program, GENERIC).planning_ms
    for name in ("full", "product"):
        after = predict(program, replace(GENERIC, **{name: 1e3 * getattr(GENERIC, name) + 1.0})).planning_ms
        assert (after > 2 * before) == (name == price)
