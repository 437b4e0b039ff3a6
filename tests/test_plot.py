"""Pictures agree with the plan: drawn blocks are counted, drawn tokens compared with `dense_mask`."""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

import mmflex  # noqa: E402
from mask_builders import (  # noqa: E402
    AShape,
    BlockTopK,
    Boundary2D,
    Dense,
    Grid,
    QBoundary,
    VerticalSlash,
)
from mmflex import plot, raster  # noqa: E402
from mmflex.compiler.plan import build  # noqa: E402
from mmflex.runtime import masks, steps  # noqa: E402
from mmflex.runtime.attention import Plan  # noqa: E402
from mmflex.tuning.config import Config  # noqa: E402

VIDEO = mmflex.TokenLayout.from_segments(
    [("text", 40), ("video", (12, 8, 8)), ("text", 60), ("image", (6, 7)), ("text", 30)]
)
SPEC = [
    VerticalSlash(60, 200),
    Grid(columns=True, rows=True, local=64, sink=16),
    Grid(columns=False, slash=True, local=64),
    QBoundary({"video": Grid(local=64), "text": VerticalSlash(40, 100)}),
    Boundary2D({("video", "video"): Grid(local=64), ("text", "video"): VerticalSlash(40, 100)}),
    AShape(30, 100),
    BlockTopK(3, 64),
    Dense(),
]


def make_plan(layout: mmflex.TokenLayout = VIDEO, spec: Any = None, queries: int | None = None, **options: Any) -> Plan:
    torch.manual_seed(0)
    n = layout.length
    spec = SPEC if spec is None else spec
    q = torch.randn(layout.batch_size, len(spec), n if queries is None else queries, 16)
    k = torch.randn(layout.batch_size, len(spec) // 2, n, 16)
    return mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=32, **options)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan()


def every_launch(plan: Plan, head: int) -> list[int]:
    return [n for n, _ in raster.launches_of(plan, head) if plan.program.launches[n].kind != "dense"]


@pytest.mark.parametrize("head", range(len(SPEC)))
@pytest.mark.parametrize("pixels", [1000, 77])
def test_drawn_blocks_are_the_plans_blocks(plan: Plan, head: int, pixels: int) -> None:
    tile = plan.program.tile
    full = partial = 0.0
    for number in every_launch(plan, head):
        place = plan.program.launches[number].heads.heads.index(head)
        lists = plan.state.ready[number].lists
        sections = [r for r in raster.launch_raster(plan, head, number, pixels=pixels) if r is not None]
        assert sum(r.partial.sum() for r in sections) == lists[0][0, place].sum() * tile**2
        assert sum(r.full.sum() for r in sections) == lists[2][0, place].sum() * tile**2
        full, partial = full + int(lists[2][0, place].sum()), partial + int(lists[0][0, place].sum())
    assert raster.head_counts(plan, head) == (full, partial)


@pytest.mark.parametrize("head", range(len(SPEC)))
def test_drawn_tokens_are_the_dense_mask(plan: Plan, head: int) -> None:
    figure = plot.plot_mask(plan, head, level="token")
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    dark = (np.abs(drawn - plot._rgb(plot.FULL)[0]) < 1e-6).all(-1)
    np.testing.assert_array_equal(dark, plan.dense_mask()[0, head].numpy())


@pytest.mark.parametrize("head", range(len(SPEC)))
def test_no_allowed_pair_is_drawn_as_skipped(plan: Plan, head: int) -> None:
    found = raster.mask_raster(plan, head, pixels=VIDEO.length)
    allowed = plan.dense_mask()[0, head].numpy()
    assert not (allowed & (found.share == 0)).any()
    # and what is drawn as full is allowed (rows and columns may be computed twice, so counts are at least the mask's)
    assert found.full[found.later].sum() == 0


def test_the_block_picture_is_exact_where_nothing_moves() -> None:
    layout = mmflex.TokenLayout.text(512)
    plan = make_plan(layout, [AShape(64, 64)] * 2)
    found = raster.mask_raster(plan, 0, pixels=512)
    lists = plan.state.ready[0].lists
    table = torch.zeros(16, 16)
    for row in range(16):
        table[row, lists[1][0, 0, row, : lists[0][0, 0, row]].long()] = 1
        table[row, lists[3][0, 0, row, : lists[2][0, 0, row]].long()] = 2
    drawn = torch.tensor(found.full * 2 + found.partial)
    torch.testing.assert_close(drawn.float(), table.repeat_interleave(32, 0).repeat_interleave(32, 1))


@pytest.mark.parametrize("queries", [None, 100])
def test_rows_read_from_lists_are_those_of_the_mask(queries: int | None) -> None:
    plan = make_plan(queries=queries)
    mask = plan.dense_mask()
    rows = torch.arange(0, mask.shape[2], 7)
    torch.testing.assert_close(raster.allowed_rows(plan, rows), mask[:, :, rows])


def test_batches_with_padding() -> None:
    layout = mmflex.TokenLayout.batch([VIDEO, mmflex.TokenLayout.text(300)], side="left")
    plan = make_plan(layout, [VerticalSlash(60, 200), AShape(30, 100)])
    mask = plan.dense_mask()
    rows = torch.arange(0, layout.length, 11)
    torch.testing.assert_close(raster.allowed_rows(plan, rows), mask[:, :, rows])
    for batch in range(2):
        figure = plot.plot_mask(plan, 0, batch, level="token")
        drawn = np.asarray(figure.axes[0].images[0].get_array())
        dark = (np.abs(drawn - plot._rgb(plot.FULL)[0]) < 1e-6).all(-1)
        np.testing.assert_array_equal(dark, mask[batch, 0].numpy())


def million(heads: int = 28, kv_heads: int = 4) -> Plan:
    """A plan for a million tokens whose lists are made up: estimating it on a CPU would take minutes."""
    layout = mmflex.TokenLayout.from_segments([("text", 64), ("video", (4095, 16, 16)), ("text", 192)])
    program = build([AShape(128, 4096)] * heads, layout, layout.length, kv_heads, 128, lse=True, full_width=False)
    plan = object.__new__(Plan)
    plan.program, plan.layout, plan.backend, plan.note = program, layout, "reference", ""
    plan.scale, plan.shape = 1.0, ((1, heads, layout.length, 64), (1, kv_heads, layout.length, 64))
    plan.state = steps.State(program, torch.device("cpu"), 1)
    launch = program.launches[0]
    tiles = launch.row_slots // 128
    own = torch.arange(tiles)
    index = (own[:, None] - torch.tensor([0, 1, 2, 40, 700, 2000, *range(8, 32)])).clamp(min=-1)
    count = (index >= 0).sum(-1)
    index = index.sort(-1, descending=True).values.clamp(min=0)
    few = torch.ones(1, heads, tiles, dtype=torch.int32)
    lists = (
        few,
        own.int()[None, None, :, None].expand(1, heads, -1, index.shape[1]),
        (count - 1).int().expand(1, heads, -1),
        index.roll(-1, -1).int().expand(1, heads, -1, -1),
    )
    limit = torch.arange(launch.key_slots, dtype=torch.int32).expand(1, heads, -1)
    plan.state.ready[0] = steps.Ready(lists, masks.comparison(None, limit))
    return plan


def test_a_million_tokens_are_drawn_in_five_seconds_and_two_gigabytes() -> None:
    plan = million()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    figure = plot.plot_mask(plan, 13)
    figure.savefig("/dev/null", format="png")
    assert time.process_time() - start < 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6 < 2
    found = raster.mask_raster(plan, 13)
    tile = plan.program.tile
    assert found.full.sum() == raster.head_counts(plan, 13)[0] * tile**2
    assert found.partial.sum() == raster.head_counts(plan, 13)[1] * tile**2


@pytest.mark.parametrize("head", range(len(SPEC)))
def test_every_picture_is_drawn(plan: Plan, head: int) -> None:
    plot.plot_mask(plan, head, level="block").savefig("/dev/null", format="png")
    plot.plot_orders(plan, head).savefig("/dev/null", format="png")
    if SPEC[head] in (SPEC[2], SPEC[5], SPEC[7]):
        with pytest.raises(ValueError, match=r"estimates nothing.*VerticalSlash"):
            plot.plot_estimate(plan, head)
    else:
        plot.plot_estimate(plan, head).savefig("/dev/null", format="png")


def test_overviews(plan: Plan) -> None:
    figure = plot.plot_heads(plan)
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert all(f"{share:.1%}" in words for share in plan.density.heads[0])
    config = Config.of(
        {0: AShape(), 2: [Grid(), Dense(), AShape() | Grid(), VerticalSlash().on("video")]}, 3, 4, model="m"
    )
    figure = plot.plot_config(config)
    letters = [text.get_text() for text in figure.axes[0].texts]
    assert letters == ["A"] * 4 + ["G", "D", "A|G", "V"]


def test_recall_is_one_for_dense_and_grows_with_the_budget() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 600, 16), torch.randn(1, 2, 600, 16)
    recall = [
        plot.attention_recall(q, k, mmflex.plan(q, k, p, backend="reference", block_size=32), rows=50).mean()
        for p in (AShape(32, 64), AShape(32, 200), Dense())
    ]
    assert recall[0] < recall[1] < recall[2] == pytest.approx(1)
    figure = plot.plot_recall(q, k, {"windows": [AShape(32, 64), AShape(32, 200)], "lines": [VerticalSlash(64, 128)]})
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["windows", "lines", "dense"]


def test_the_callers_axes_are_used(plan: Plan) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.add_subplot()
    assert plot.plot_mask(plan, 0, ax=ax) is figure
    assert ax.images


def test_errors_name_both_values(plan: Plan) -> None:
    with pytest.raises(ValueError, match="head is 8, the plan has 8 heads"):
        plot.plot_mask(plan, 8)
    with pytest.raises(ValueError, match="batch is 1, the plan has 1 prompts"):
        plot.plot_mask(plan, 0, 1)
    with pytest.raises(ValueError, match="level is 'pixel'"):
        plot.plot_mask(plan, 0, level="pixel")
    with pytest.raises(ValueError, match="patterns is empty"):
        plot.plot_recall(torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16), [])
