"""The program behind a plan: what is shared, what is cached, what is bounded, and who may import whom."""

from __future__ import annotations

from collections import Counter

import numpy as np
import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmflex
from mask_builders import (
    AShape,
    BlockTopK,
    Boundary2D,
    Dense,
    Grid,
    QBoundary,
    Strided,
    TriShape,
    VerticalSlash,
)
from mmflex.compiler import lower as compiler


def make(heads: int, kv_heads: int, m: int, n: int | None = None, dim: int = 16, seed: int = 0, batch: int = 1):
    generator = torch.Generator().manual_seed(seed)
    n = m if n is None else n
    return tuple(
        torch.randn(batch, h, t, dim, generator=generator) for h, t in ((heads, m), (kv_heads, n), (kv_heads, n))
    )


def mixed_layout() -> mmflex.TokenLayout:
    return mmflex.TokenLayout.from_segments(
        [("text", 40), ("video", (9, 5, 5), {"timestamps": 3}), ("text", 60), ("image", (7, 9)), ("text", 30)]
    )


# ---- sharing ----


def steps_of(plan: mmflex.Plan) -> Counter[str]:
    return Counter(step.op for step in plan.program.graph.order)


def test_heads_with_the_same_estimate_share_it() -> None:
    """Eight heads, four patterns, one estimate: vertical-slash and searched grids look at the same last queries."""
    q, k, _ = make(8, 4, 500)
    grid = Grid("search", local=16, sink=16, shortest=8, longest=60)
    spec = [VerticalSlash(40, 64), VerticalSlash(60, 32), grid, Grid(30, local=16)] * 2
    plan = mmflex.plan(q, k, spec, backend="reference", block_size=16)
    count = steps_of(plan)
    assert count["estimate"] == 1
    assert count["select"] == 4
    different = [VerticalSlash(40, 64), VerticalSlash(40, 64, last_q=32), BlockTopK(4, 16), BlockTopK(6, 16)] * 2
    count = steps_of(mmflex.plan(q, k, different, backend="reference", block_size=16))
    assert count["estimate"] == 3
    assert count["select"] == 4


def test_an_estimator_runs_once_for_the_heads_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only for those: heads whose patterns select nothing are not estimated."""
    runs: list[tuple[int, ...]] = []
    from mask_builders.estimate import LastQueries

    original = LastQueries.__call__

    def counted(self: LastQueries, q: torch.Tensor, *args: object) -> object:
        runs.append(tuple(q.shape))
        return original(self, q, *args)

    monkeypatch.setattr(LastQueries, "__call__", counted)
    q, k, _ = make(8, 4, 300)
    mmflex.plan(q, k, VerticalSlash(40, 64), backend="reference", block_size=16)
    assert [shape[1] for shape in runs] == [8]
    runs.clear()
    spec = [VerticalSlash(40, 64), Dense(), AShape(16, 16), Dense(), VerticalSlash(9, 64), Dense(), Dense(), Strided(7)]
    mmflex.plan(q, k, spec, backend="reference", block_size=16)
    assert [shape[1] for shape in runs] == [2]
    runs.clear()
    mmflex.plan(q, k, [Dense(), AShape(1, 1)] * 4, backend="reference", block_size=16)
    assert not runs


def test_modalities_are_estimated_apart() -> None:
    """Q-boundary: an estimate per query modality, shared between heads and patterns."""
    layout = mixed_layout()
    q, k, _ = make(4, 2, layout.length)
    both = QBoundary({"text": VerticalSlash(20, 32), "video": VerticalSlash(20, 32)})
    grid = QBoundary({"text": VerticalSlash(40, 16), "video": Grid(25, local=16, sink=16)})
    plan = mmflex.plan(q, k, [both, grid, both, grid], layout=layout, backend="reference", block_size=16)
    count = steps_of(plan)
    assert count["estimate"] == 2
    assert count["select"] == 4


def test_equal_parts_of_compositions_are_selected_once() -> None:
    """The same pattern inside several compositions is one node, and one set."""
    q, k, _ = make(4, 2, 300)
    lines = VerticalSlash(40, 64)
    spec = [lines, lines | AShape(16, 16), Dense() - lines, lines & Strided(7)]
    plan = mmflex.plan(q, k, spec, backend="reference", block_size=16)
    selecting = [leaf for leaf in plan.program.leaves.values() if isinstance(leaf.pattern, VerticalSlash)]
    assert len(selecting) == 1
    assert selecting[0].heads == (0, 1, 2, 3)


def test_heads_share_launches() -> None:
    """Masks of one comparison are one launch for all heads, whatever their patterns; dense heads are one more."""
    q, k, _ = make(8, 4, 600)
    spec = [AShape(16, 64), VerticalSlash(32, 64), BlockTopK(4, 16), TriShape(16, 32, 16)] * 2
    plan = mmflex.plan(q, k, spec, backend="reference", block_size=16)
    assert [launch.name for launch in plan.program.launches] == ["blocks"]
    assert plan.program.launches[0].compares
    spec[5] = Dense()
    plan = mmflex.plan(q, k, spec, backend="reference", block_size=16)
    assert [launch.name for launch in plan.program.launches] == ["blocks", "dense"]


def test_the_graph_is_acyclic_and_ordered() -> None:
    """Every step comes after what it needs, planning before attending."""
    import networkx as nx

    layout = mixed_layout()
    q, k, _ = make(4, 2, layout.length)
    spec = [
        Grid(25, rows=True, slash=True, local=16),
        VerticalSlash(20, 32),
        Dense(),
        QBoundary({"text": AShape(1, 1)}),
    ]
    program = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16).program
    graph = program.graph.graph
    assert nx.is_directed_acyclic_graph(graph)
    order = program.graph.order
    assert sorted(map(str, order)) == sorted(map(str, graph.nodes))
    assert all(order.index(a) < order.index(b) for a, b in graph.edges)
    assert sorted(map(str, program.graph.planning + program.graph.attending)) == sorted(map(str, order))


# ---- caching ----


def test_a_second_call_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a program nor an order: only the tensors of this input are computed."""
    layout = mixed_layout()
    spec = [VerticalSlash(20, 32), QBoundary({"video": Grid("frame", local=16)}), AShape(1, 1), Grid(25, rows=True)]
    q, k, v = make(4, 2, layout.length)
    first = mmflex.plan(q, k, spec, layout=layout, backend="reference")
    memo = set(layout.memo)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("built again")

    for name in ("lower", "_ways", "_joined"):
        monkeypatch.setattr(compiler, name, refuse)
    monkeypatch.setattr("mmflex.runtime.calls.lower", refuse)
    second = mmflex.plan(*make(4, 2, layout.length, seed=1)[:2], list(spec), layout=layout, backend="reference")
    mmflex.attention(q, k, v, tuple(spec), layout=layout, backend="reference")
    assert second.program is first.program
    assert set(layout.memo) == memo


def test_equal_texts_share_a_program_without_a_layout() -> None:
    q, k, _ = make(2, 1, 777)
    first, second = (mmflex.plan(q, k, AShape(16, 16), backend="reference").program for _ in range(2))
    assert first is second
    assert mmflex.plan(q, k, AShape(16, 32), backend="reference").program is not first
    assert mmflex.plan(q[:, :, 1:], k, AShape(16, 16), backend="reference").program is not first


def test_block_lists_do_not_depend_on_earlier_calls() -> None:
    """Planning twice with other inputs in between gives the same lists: nothing of an input stays in a program."""
    layout = mixed_layout()
    spec = [VerticalSlash(20, 32), Grid("search", local=16, shortest=8, longest=40, slash=True)]
    q, k, v = make(2, 1, layout.length)
    a = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16)
    before = a.attend(q, k, v)
    other = mmflex.plan(*make(2, 1, layout.length, seed=5)[:2], spec, layout=layout, backend="reference", block_size=16)
    b = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16)
    assert torch.equal(b.attend(q, k, v), before)
    assert torch.equal(a.attend(q, k, v), before)
    assert not torch.equal(a.dense_mask(), other.dense_mask())


# ---- bounds ----


@pytest.mark.parametrize("shape", ["ones", "peaks", "far", "random", "equal"])
@pytest.mark.parametrize("m", [640, 100])
def test_widths_hold_for_any_input(shape: str, m: int) -> None:
    """Widths follow from spec and layout alone: inputs made to spread or to pile up selections never pass them."""
    n, tile = 640, 16
    layout = mmflex.TokenLayout.from_segments([("text", 90), ("video", (17, 5, 5), {"timestamps": 1}), ("text", 108)])
    assert layout.length == n
    lines = VerticalSlash(50, 100, last_q=16)
    spec = [
        lines,
        BlockTopK(5, tile),
        BlockTopK(3, 24),
        Grid("search", rows=True, slash=True, local=32, sink=16, last_q=16, shortest=10, longest=60),
        QBoundary({"text": lines, "video": Grid("frame", local=32, sink=16, last_q=16)}),
        Boundary2D(
            {("text", "video"): lines, ("video", "video"): BlockTopK(3, tile), ("video", "text"): AShape(16, 16)}
        ),
        lines.on("video", "text") | lines.on("text"),
        (Dense() - lines) & AShape(16, 160),
    ]
    for seed in range(6):
        q, k, _ = make(8, 4, m, n, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        if shape == "ones":
            q, k = torch.ones_like(q), torch.ones_like(k)
        elif shape == "peaks":
            k[:, :, torch.randperm(n, generator=generator)[:60]] *= 20
        elif shape == "far":
            k[:, :, :: seed + 3] *= 8
        elif shape == "equal":
            k = k[:, :, :1].expand_as(k).contiguous()
        plan = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=tile)
        for number, ready in plan.state.prepared.items():
            launch = plan.program.launches[number]
            assert ready.lists[1].shape[-1] == ready.lists[3].shape[-1] == launch.width
            assert max(int(ready.lists[0].max()), int(ready.lists[2].max())) <= launch.width
            tiles = launch.key_slots // tile
            assert launch.width <= tiles


def test_the_width_of_a_sparse_head_follows_its_budget() -> None:
    """Four times the tokens, the same budget: the same width, far below the number of key blocks."""
    widths = []
    for n in (4096, 16384):
        q, k, _ = make(2, 1, n)
        program = mmflex.plan(q, k, VerticalSlash(512, 1024), backend="reference").program
        (launch,) = program.launches
        widths.append(launch.width)
        assert launch.width <= 512 // 128 + 1024 // 128 + 3
    assert widths[0] == widths[1]


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.where = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                held = t.untyped_storage().nbytes()
                if held > self.numel:
                    self.numel, self.where = held, f"{function} {tuple(t.shape)} {t.dtype}"
        return out


@pytest.mark.parametrize(
    "spec",
    [
        AShape(128, 1024),
        TriShape(128, 1024, 128),
        VerticalSlash(1000, 2048),
        BlockTopK(20, 128),
        Grid("frame", rows=True, local=1024),
        Grid("frame", slash=True, local=1024),
        Grid("search", slash=True, local=1024),
        Strided("frame"),
        QBoundary({"text": VerticalSlash(1000, 1024), "video": Grid("frame")}),
        Boundary2D({("video", "video"): Grid("frame", slash=True), ("text", "video"): VerticalSlash(1000, 1024)}),
        VerticalSlash(1000, 1024) - AShape(128, 128),
    ],
    ids=str,
)
def test_planning_holds_nothing_of_n_by_n(spec: mmflex.Pattern) -> None:
    """At N = 32768 the largest tensor of a plan stays under 1/32 of a boolean N x N mask of one head (32 MiB)."""
    layout = mmflex.TokenLayout.from_segments([("text", 200), ("video", (126, 16, 16)), ("text", 312)])
    n = layout.length
    assert n == 32768
    q, k, _ = make(2, 1, n)
    with Largest() as largest:
        mmflex.plan(q, k, spec, layout=layout, backend="reference")
    assert largest.numel <= n * n // 32, f"{largest.numel / 2**20:.0f} MiB by {largest.where}"


# ---- what a plan says ----


def test_density_counts_listed_blocks() -> None:
    """Pairs in listed blocks over causal pairs, per head; dense heads have 1."""
    q, k, _ = make(4, 2, 320)
    spec = [Dense(), AShape(16, 16), VerticalSlash(30, 32), BlockTopK(2, 16)]
    plan = mmflex.plan(q, k, spec, backend="reference", block_size=16)
    pairs = 320 * 321 / 2
    listed = np.zeros(4)
    for cover in oracle.launch_cover(plan):
        listed[cover.head] += (cover.full | cover.partial).sum() * 16 * 16
    assert plan.density.heads.shape == (1, 4)
    assert plan.density.heads[0, 0] == 1.0
    assert np.allclose(plan.density.heads[0, 1:], listed[1:] / pairs)
    assert plan.density.total == pytest.approx(plan.density.heads.mean())
    assert float(plan.density) == plan.density.total


def test_block_masks_are_flex_attention_s() -> None:
    """`Plan.block_masks` are real BlockMasks of the launches, with the order that they are in."""
    from torch.nn.attention.flex_attention import BlockMask

    layout = mixed_layout()
    q, k, _ = make(4, 2, layout.length)
    spec = [AShape(16, 16), QBoundary({"text": AShape(16, 32), "video": Strided(5)}), Dense(), VerticalSlash(30, 16)]
    plan = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16)
    masks = plan.block_masks
    assert len(masks) == sum(launch.name != "dense" for launch in plan.program.launches)
    for label, mask in masks:
        assert isinstance(label, str)
        assert isinstance(mask, BlockMask)
        assert mask.BLOCK_SIZE == (16, 16)


def test_explain_names_what_was_decided() -> None:
    """Expressions, alternatives with their price, launches, sections and blocks, head group by head group."""
    layout = mixed_layout()
    q, k, _ = make(6, 2, layout.length)
    spec = [
        VerticalSlash(30, 16),
        Dense(),
        Grid(25, rows=True, columns=True, local=16, sink=16),
        QBoundary({"text": AShape(16, 32), "video": VerticalSlash(30, 16)}),
        VerticalSlash(30, 16),
        AShape(16, 16),
    ]
    text = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16).explain()
    for word in ("heads 0, 4", "columns", "diagonals", "instead of", "dense", "partial", "full", "empty", "SDPA"):
        assert word in text, word
    for pattern in dict.fromkeys(spec):
        assert str(pattern) in text
    assert "backend reference" in text
    assert "@" not in text


def test_planning_runs_under_a_dispatch_mode() -> None:
    """Flop counters, fake tensors and profilers see the operators of a plan like any others."""
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = make(2, 1, 200)
    spec = VerticalSlash(30, 16) | Strided(7)
    with FlopCounterMode(display=False) as counter:
        mmflex.plan(q, k, spec, backend="reference", block_size=16).attend(q, k, v)
    assert counter.get_total_flops() > 0


def test_no_value_is_read_back_while_planning() -> None:
    """No host sync on the hot path: on a second call no operator returns a Python number to steer by."""

    class NoReadBack(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            assert "_local_scalar_dense" not in name, "a device value is read back"
            assert "nonzero" not in name, "nonzero synchronises"
            assert not (
                "index.Tensor" in name
                and any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in args[1] or () if t is not None)
            ), "indexing by a mask synchronises"
            return function(*args, **(kwargs or {}))

    layout = mixed_layout()
    q, k, v = make(6, 2, layout.length)
    spec = [
        VerticalSlash(30, 16),
        BlockTopK(3, 16),
        Grid("search", rows=True, slash=True, local=16, sink=16, shortest=8, longest=40),
        QBoundary({"text": AShape(16, 32), "video": VerticalSlash(30, 16)}),
        Boundary2D({("video", "video"): Grid("frame", local=16), ("text", "video"): VerticalSlash(20, 16)}),
        TriShape(16, 16, 20) - Strided(7),
    ]
    mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16).attend(q, k, v)
    with NoReadBack():
        plan = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16)
    assert plan.program.graph.planning


def test_spec_order_does_not_matter() -> None:
    """Permuting heads permutes the output: grouping by pattern puts every head back in its place."""
    layout = mixed_layout()
    q, k, v = make(4, 4, layout.length)
    spec = [Grid(25, rows=True, slash=True, local=16), VerticalSlash(30, 16), Dense(), QBoundary({"video": Strided(9)})]
    out = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16).attend(q, k, v)
    order = [2, 0, 3, 1]
    moved = mmflex.plan(
        q[:, order], k[:, order], [spec[i] for i in order], layout=layout, backend="reference", block_size=16
    ).attend(q[:, order], k[:, order], v[:, order])
    assert torch.allclose(moved, out[:, order], atol=1e-6)


@pytest.mark.parametrize("ratio", [2, 4])
def test_looked_up_masks_with_unequally_many_heads_per_kv_head(ratio: int) -> None:
    """A launch whose KV heads serve different numbers of heads is filled up: every head reads its own sets."""
    q, k, v = make(2 * ratio, 2, 80)
    small = BlockTopK(2, 8)
    spec = tuple([AShape(11, 11)] + [small] * (2 * ratio - 1))
    plan = mmflex.plan(q, k, spec, backend="reference", block_size=16)
    assert any(-1 in launch.heads.heads for launch in plan.program.launches)
    wanted, _ = oracle.softmax(q, k, v, oracle.token_mask(plan, spec))
    assert oracle.error(plan.attend(q, k, v), wanted) <= 2e-6
