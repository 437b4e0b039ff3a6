"""Pictures agree with the plan: drawn blocks are counted, drawn tokens compared with `dense_mask`."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

import matplotlib.colors  # noqa: E402
import matplotlib.style  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

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
from mmflex import plot  # noqa: E402
from mmflex.plot import (  # noqa: E402
    bands,
    raster,
    style,
)
from mmflex.plot.snapshot import snapshot  # noqa: E402
from mmflex.runtime.plan import Plan  # noqa: E402
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
WEIGHTS = {0: torch.rand(2, VIDEO.length, generator=torch.Generator().manual_seed(0)), 3: torch.ones(2, VIDEO.length)}
SELECTS_NOTHING = (SPEC[2], SPEC[5], SPEC[7])


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


def every_launch(plan: Plan, head: int) -> list[tuple[int, int]]:
    """(number, place of the head) of its launches with lists, read from the program."""
    found = [(n, launch.heads.heads.index(head)) for n, launch in enumerate(plan.program.launches)
             if launch.name != "dense" and head in launch.heads.heads]  # fmt: skip
    assert found or SPEC[head] == Dense()
    return found


def dark(figure: Figure) -> np.ndarray:
    """bool, the pixels of the first picture that have the tone of what is attended to."""
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    return (np.abs(drawn - style.rgb(style.FULL)[0]) < 1e-6).all(-1)


def pixels(figure: Figure) -> np.ndarray:
    """RGB of the saved figure, uint8 [height, width, 3]."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return (matplotlib.image.imread(file)[..., :3] * 255).round().astype(np.uint8)


# ---- what is drawn is what is computed ----


@pytest.mark.parametrize("head", range(len(SPEC)))
@pytest.mark.parametrize("size", [1000, 77])
def test_drawn_blocks_are_the_plans_blocks(plan: Plan, head: int, size: int) -> None:
    tile = plan.program.tile
    full = partial = 0
    for number, place in every_launch(plan, head):
        lists = plan.state.prepared[number].lists
        few, whole = int(lists[0][0, place].sum()), int(lists[2][0, place].sum())
        sections = [r for r in raster.launch_raster(plan, head, number, pixels=size) if r is not None]
        assert sum(r.partial.sum() for r in sections) == few * tile**2
        assert sum(r.full.sum() for r in sections) == whole * tile**2
        full, partial = full + whole, partial + few
    assert snapshot(plan).counts(head) == (full, partial)
    title = plot.plot_mask(plan, head, level="block").axes[0].get_title(loc="left")
    assert f"{full:,} full, {partial:,} partial" in title or SPEC[head] == Dense()


@pytest.mark.parametrize("head", range(len(SPEC)))
def test_drawn_tokens_are_the_dense_mask(plan: Plan, head: int) -> None:
    figure = plot.plot_mask(plan, head, level="token")
    np.testing.assert_array_equal(dark(figure), plan.dense_mask()[0, head].numpy())


@pytest.mark.parametrize("head", range(len(SPEC)))
def test_no_allowed_pair_is_drawn_as_skipped(plan: Plan, head: int) -> None:
    found = raster.mask_raster(plan, head, pixels=VIDEO.length)
    allowed = plan.dense_mask()[0, head].numpy()
    assert not (allowed & (found.share == 0)).any()
    # and nothing after the query is drawn as full
    assert found.full[found.later].sum() == 0


def test_the_block_picture_is_exact_where_nothing_moves() -> None:
    layout = mmflex.TokenLayout.text(512)
    plan = make_plan(layout, [AShape(64, 64)] * 2)
    found = raster.mask_raster(plan, 0, pixels=512)
    lists = plan.state.prepared[0].lists
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
    assert raster.allowed_rows(plan, rows[:1]).shape[2] == 1


def test_batches_with_padding() -> None:
    layout = mmflex.TokenLayout.batch([VIDEO, mmflex.TokenLayout.text(300)], side="left")
    plan = make_plan(layout, [VerticalSlash(60, 200), AShape(30, 100)])
    mask = plan.dense_mask()
    rows = torch.arange(0, layout.length, 11)
    torch.testing.assert_close(raster.allowed_rows(plan, rows), mask[:, :, rows])
    for batch in range(2):
        figure = plot.plot_mask(plan, 0, batch, level="token")
        np.testing.assert_array_equal(dark(figure), mask[batch, 0].numpy())
    words = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert words[-1] == "padding (bands)"


def test_a_million_tokens_are_drawn_from_the_lists() -> None:
    """28 heads, a million tokens: every block is counted, and a whole process that draws them stays under two GB."""
    script = Path(__file__).with_name("million.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    counted, listed, gigabytes = done.stdout.split()
    assert int(counted) == int(listed) > 1_000_000
    assert float(gigabytes) < 2


# ---- every picture ----


@pytest.mark.parametrize("head", range(len(SPEC)))
def test_every_picture_is_drawn(plan: Plan, head: int) -> None:
    plot.plot_mask(plan, head, level="block").savefig("/dev/null", format="png")
    plot.plot_orders(plan, head).savefig("/dev/null", format="png")
    if SPEC[head] in SELECTS_NOTHING:
        with pytest.raises(ValueError, match=r"estimates nothing.*VerticalSlash"):
            plot.plot_estimate(plan, head)
    else:
        plot.plot_estimate(plan, head).savefig("/dev/null", format="png")


def draw_each(plan: Plan, **options: Any) -> dict[str, Any]:
    """Every public function that draws, called with options."""
    q, k = torch.randn(1, 2, 200, 16), torch.randn(1, 2, 200, 16)
    config = Config.of({0: AShape(), 2: AShape() | Grid()}, 3, 4, model="m")
    return {
        "plot_mask": lambda: plot.plot_mask(plan, 0, **options),
        "plot_masks": lambda: plot.plot_masks(plan, [0, 1], **options),
        "plot_orders": lambda: plot.plot_orders(plan, 1, **options),
        "plot_estimate": lambda: plot.plot_estimate(plan, 0, **options),
        "plot_graph": lambda: plot.plot_graph(plan, **options),
        "plot_heads": lambda: plot.plot_heads(plan, **options),
        "plot_config": lambda: plot.plot_config(config, **options),
        "plot_importance": lambda: plot.plot_importance(WEIGHTS, VIDEO, {"questions": [890, 900]}, **options),
        "plot_recall": lambda: plot.plot_recall(q, k, [AShape(16, 32)], **options),
    }


NAMES = [name for name in plot.__all__ if name.startswith("plot_")]


@pytest.mark.parametrize("name", NAMES)
def test_the_figure_is_returned_and_the_callers_axes_are_used(plan: Plan, name: str) -> None:
    assert isinstance(draw_each(plan)[name](), Figure)
    figure = Figure()
    ax = figure.add_subplot()
    assert draw_each(plan, ax=ax)[name]() is figure
    assert ax.get_legend() or any(panel.get_legend() for panel in descendants(ax)), "there is no legend"
    figure.savefig("/dev/null", format="png")


def descendants(ax: Any) -> list[Any]:
    return [found for child in ax.child_axes for found in (child, *descendants(child))]


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_light_in_dark_themes(plan: Plan, name: str) -> None:
    """Also where the style has savefig paint every figure dark: corners stay white, text stays dark."""
    light = pixels(draw_each(plan)[name]())
    with matplotlib.style.context("dark_background"):
        found = pixels(draw_each(plan)[name]())
    assert (found[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    if name != "plot_recall":  # its input is random
        np.testing.assert_array_equal(found, light)


def test_what_a_notebooks_backend_turns_on_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "interactive", False)

    @style.styled
    def draw() -> Figure:
        matplotlib.interactive(True)  # as a backend does that the first figure loads
        return Figure()

    draw()
    assert matplotlib.is_interactive()


def test_legend_on_white_ground_is_dark_in_dark_axes(plan: Plan) -> None:
    with matplotlib.style.context("dark_background"):
        ax = Figure().add_subplot()
        plot.plot_mask(plan, 0, ax=ax)
    assert {matplotlib.colors.to_hex(text.get_color()) for text in ax.get_legend().get_texts()} == {style.INK}


def test_tones_and_bands_differ_in_black_and_white() -> None:
    def grey(*colours: str) -> np.ndarray:
        return np.sort(style.rgb(*colours) @ (0.299, 0.587, 0.114))

    assert np.diff(grey(style.FULL, style.PARTIAL, style.SKIPPED)).min() > 0.2
    unhatched = [colour for m, colour in style.MODALITY_COLOURS.items() if m not in style.MODALITY_HATCHES]
    assert np.diff(grey(*unhatched)).min() > 0.3
    hatches = list(style.MODALITY_HATCHES.values())
    assert len(set(hatches)) == len(hatches)


def test_every_pattern_has_a_letter_of_its_own() -> None:
    letters = [letter for letter, _ in style.FAMILIES.values()]
    assert len(set(letters)) == len(letters)
    assert {point.name for point in entry_points(group="mmflex.patterns")} <= set(style.FAMILIES)


def test_bands_show_every_run(plan: Plan) -> None:
    ax = plot.plot_mask(plan, 0).axes[0]
    top = ax.child_axes[0]
    drawn = sum(len(collection.get_paths()) for collection in top.collections)
    assert drawn == len(bands.runs(bands.modality_ids(VIDEO, 0))) == 5
    assert [int(t.get_text().split()[-1]) for t in top.get_xticklabels()] == [0, 2, 4, 6, 8, 10]


# ---- overviews ----


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


def test_numbers_of_a_search_are_written_on_the_heads() -> None:
    found = {"recall": {"0": [0.5, 0.914], "2": [1.0, 0.25]}, "ms": {"0": [0.12345, 2], "2": [3, 4]}}
    config = Config.of({0: AShape(), 2: Grid()}, 3, 2, per_head=found)
    ax = plot.plot_config(config, "recall").axes[0]
    assert [t.get_text() for t in ax.texts] == ["A", "50.0%", "A", "91.4%", "G", "100.0%", "G", "25.0%"]
    assert "recall" in ax.get_title(loc="left")
    assert "0.123" in [t.get_text() for t in plot.plot_config(config, "ms").axes[0].texts]
    with pytest.raises(ValueError, match=r"no 'error' per head; those it has are 'recall', 'ms'"):
        plot.plot_config(config, "error")
    with pytest.raises(ValueError, match=r"no 'recall' per head; it has none"):
        plot.plot_config(Config.of(AShape(), 1, 1), "recall")


def test_the_selected_phase_is_the_highest_bar(plan: Plan) -> None:
    """The picture leaves out what selection leaves out."""
    axes = descendants(plot.plot_estimate(plan, 1).axes[0])
    ((phase,), (mass,)) = axes[2].lines[0].get_data()
    bars = axes[2].collections[0].get_paths()[0].vertices
    assert mass == pytest.approx(bars[:, 1].max())
    (chosen,) = (value for name, value in plan.selections.items() if name.startswith("phase@Grid(rows"))
    assert phase == int(chosen[0, 0])


def test_estimates_without_every_distance_are_drawn_by_block_diagonal() -> None:
    """As CUDA kernels leave them: mass per distance only where a pattern asks for it."""
    plan = make_plan(spec=SPEC[:2])
    for key, (mass, places) in plan.state.estimates.items():
        plan.state.estimates[key] = (dataclasses.replace(mass, diagonal=None), places)
    panel = descendants(plot.plot_estimate(plan, 0).axes[0])[1]
    assert panel.get_ylabel() == "mass per 32 distances (%)"
    assert panel.get_xlim()[1] >= VIDEO.length
    assert "block diagonals" in panel.get_title(loc="left")


def test_layers_by_heads(plan: Plan) -> None:
    figure = plot.plot_heads({3: plan, 7: plan})
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["3", "7"]
    words = [text.get_text() for text in ax.texts]
    assert words[::2] == ["V", "G", "G", "Q", "B", "A", "K", "D"] * 2
    assert words[1::2] == [f"{share:.0%}" for share in plan.density.heads[0]] * 2
    assert len(plot.plot_heads([plan]).axes[0].texts) == 16
    with pytest.raises(ValueError, match="there are no plans"):
        plot.plot_heads([])


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


def test_importance_is_drawn_as_shares_of_each_head() -> None:
    weights = {2: torch.zeros(2, 100), 5: torch.zeros(2, 100)}
    weights[2][0, [3, 50]] = torch.tensor([9.0, 1.0])  # 0.9 and 0.1 of its head
    weights[2][1, 7] = 30.0
    weights[5][:, 99] = 30.0
    figure = plot.plot_importance(weights, mmflex.TokenLayout.text(100), {"needles": [3, 7], "questions": [99]})
    ax = figure.axes[0]
    drawn = np.asarray(ax.images[0].get_array())
    assert drawn.shape == (4, 100)
    np.testing.assert_allclose(drawn[0, [3, 50]], [0.9, 0.1])
    assert [np.flatnonzero(row > 0.5).tolist() for row in drawn] == [[3], [7], [99], [99]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["2", "5"]
    bars = next(panel for panel in ax.child_axes if panel.patches)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([0.1, 0.3, 0.3, 0.3])
    marked = {
        line.get_marker(): (line.get_xdata() - 0.5).tolist() for line in ax.lines if line.get_linestyle() == "None"
    }
    assert list(marked.values()) == [[3, 7], [99]], "each kind has a marker of its own"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["text (bands)", "needles", "questions"]
    grey = ax.images[0].cmap(np.linspace(0, 1, 32))[:, :3] @ (0.299, 0.587, 0.114)
    assert np.diff(grey).max() < 0, "tones get darker all the way"


def test_importance_of_a_long_prompt_keeps_single_tokens() -> None:
    weights = torch.zeros(1, 50_000)
    weights[0, 12_345] = 1.0
    drawn = np.asarray(plot.plot_importance({0: weights}).axes[0].images[0].get_array())
    assert drawn.shape[1] < 2000
    assert drawn.max() == 1


def test_importance_that_makes_no_sense_is_refused() -> None:
    ones = torch.ones(2, 100)
    for weights in ({}, {0: ones, 1: torch.ones(2, 99)}, {0: torch.ones(100)}):
        with pytest.raises(ValueError, match="all of one shape"):
            plot.plot_importance(weights)
    for bad in (-ones, ones * float("nan"), ones * 0):
        with pytest.raises(ValueError, match="finite, 0 or more, and not all 0"):
            plot.plot_importance({0: bad})
    with pytest.raises(ValueError, match="1 prompts of 90 tokens, the importance of one of 100"):
        plot.plot_importance({0: ones}, mmflex.TokenLayout.text(90))
    with pytest.raises(ValueError, match="marks 'needles' has token 100: there are 100"):
        plot.plot_importance({0: ones}, marks={"needles": [100]})
    with pytest.raises(ValueError, match="6 kinds of marks: give at most 5"):
        plot.plot_importance({0: ones}, marks={str(i): [i] for i in range(6)})


def test_recorded_plans_are_those_that_ran(plan: Plan) -> None:
    torch.manual_seed(1)
    inputs = [[torch.randn(1, 2, 300, 16) for _ in range(3)] for _ in range(3)]
    patterns = [AShape(16, 100), VerticalSlash(40, 128), VerticalSlash(40, 128)]
    with plot.recorded() as plans:
        out = [mmflex.attention(*qkv, p, backend="reference") for qkv, p in zip(inputs, patterns, strict=True)]
    assert [snapshot(p).families[0] for p in plans] == ["AShape", "VerticalSlash", "VerticalSlash"]
    for made, qkv, expected in zip(plans, inputs, out, strict=True):
        torch.testing.assert_close(made.attend(*qkv), expected)
    q, k, v = inputs[0]
    mmflex.attention(q, k, v, AShape(), backend="reference")
    assert len(plans) == 3


# ---- text and HTML ----


def test_text_picture() -> None:
    plan = make_plan(mmflex.TokenLayout.text(512), [AShape(32, 64)] * 2)
    lines = plot.mask_text(plan, 0, width=16, characters="#+:. ")
    assert lines == [
        "#+              ",
        "###+            ",
        "#.###+          ",
        "#...###+        ",
        "#.....###+      ",
        "#.......###+    ",
        "#.........###+  ",
        "#...........###+",
    ]  # a character is two blocks of 32 x 32, one above the other: sink, window, diagonal
    assert [len(line) for line in plot.mask_text(plan, 0, width=40)] == [40] * 20


def test_plan_html_has_the_picture_and_the_numbers(plan: Plan) -> None:
    text = plan._repr_html_()
    assert text.count("<img") == 6
    for words in (
        "940 queries",
        "backend reference",
        f"{plan.density.total:.1%}",
        "VerticalSlash(vertical=60",
        "text&gt;",
    ):
        assert words in text, words
    for group, share in ((0, plan.density.heads[0, 0]), (7, 1.0)):
        assert f"{share:.1%}" in text, group
    assert all(launch.label in text for launch in plan.program.launches)


def test_plan_html_without_matplotlib_is_the_numbers(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.image", None)
    text = plan._repr_html_()
    assert "<img" not in text
    assert f"{plan.density.total:.1%}" in text


def test_layout_html() -> None:
    batch = mmflex.TokenLayout.batch([VIDEO, mmflex.TokenLayout.text(300)], side="left")
    text = batch._repr_html_()
    assert text.count("<svg") == 2
    assert text.count("<rect") == 5 + 2
    for words in ("2 prompts, 940 tokens", "64 tokens from frame to frame (video)", "padding 640", "video 768"):
        assert words in text, words
    many = mmflex.TokenLayout.batch([mmflex.TokenLayout.text(5)] * 20)._repr_html_()
    assert many.count("<svg") == 8
    assert "12 more prompts" in many
    assert "0 tokens" in mmflex.TokenLayout.text(0)._repr_html_()


def test_errors_name_both_values(plan: Plan) -> None:
    with pytest.raises(ValueError, match="head is 8, the plan has 8 heads"):
        plot.plot_mask(plan, 8)
    with pytest.raises(ValueError, match="batch is 1, the plan has 1 prompts"):
        plot.plot_mask(plan, 0, 1)
    with pytest.raises(ValueError, match="level is 'pixel'"):
        plot.plot_mask(plan, 0, level="pixel")
    with pytest.raises(ValueError, match="patterns is empty"):
        plot.plot_recall(torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16), [])
    with pytest.raises(ValueError, match="1 titles for 2 heads"):
        plot.plot_masks(plan, [0, 1], titles=["one"])
    with pytest.raises(ValueError, match="heads is empty"):
        plot.plot_masks(plan, [])
