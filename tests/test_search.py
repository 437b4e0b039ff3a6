"""The offline search: budgets, prices, errors against an oracle, planted heads, models, checkpoints, bad input."""

from __future__ import annotations

import io
import itertools
import json
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import mmflex
from benchmarks import planted
from mask_builders import AShape, BlockTopK, Boundary2D, Dense, Grid, QBoundary, VerticalSlash
from mmflex.cli import app
from mmflex.integrations.progress import LayerProgress
from mmflex.tuning import candidates, probe
from mmflex.tuning.budget import Budget, Option, Unreachable, allocate, knapsack
from mmflex.tuning.config import load_config, save_config
from mmflex.tuning.pricing import Prices
from mmflex.tuning.probe import Layer, Probe, denote
from mmflex.tuning.rows import Rows
from mmflex.tuning.search import Search, Settings

LAYOUT = mmflex.TokenLayout.from_segments(
    [("text", 45), ("video", (8, 5, 5), {"timestamps": (3, 6, 2, 7, 1, 4, 9, 0)}), ("text", 60), ("video", (6, 4, 4))]
)
TEXT, VIDEO = 0, 2
TABLE = (
    AShape(16, 48),
    VerticalSlash(40, 48, 16, near=1),
    BlockTopK(4, 16, near=1),
    Grid(27, local=32, sink=16, last_q=16),
)
"""On prompts of which 100 nearest keys would be a good part."""


def qkv(heads: int = 4, kv_heads: int = 2, n: int = LAYOUT.length, dim: int = 16, seed: int = 0, sharp: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, n, dim), (1, kv_heads, n, dim), (1, kv_heads, n, 24))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return sharp * q, k, v


def layer(**options: Any) -> Layer:
    return Layer(0, *qkv(**options), LAYOUT, tile=16)


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_the_knapsack_is_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        items = int(rng.integers(1, 6))
        weights = [rng.random(int(rng.integers(1, 5))) for _ in range(items)]
        values = [rng.random(len(w)) for w in weights]
        capacity = float(rng.uniform(sum(w.min() for w in weights), sum(w.max() for w in weights)))
        picked = knapsack(weights, values, capacity)
        best = min(
            sum(v[i] for v, i in zip(values, choice, strict=True))
            for choice in itertools.product(*(range(len(w)) for w in weights))
            if sum(w[i] for w, i in zip(weights, choice, strict=True)) <= capacity
        )
        assert sum(w[i] for w, i in zip(weights, picked, strict=True)) <= capacity * (1 + 1e-9)
        assert sum(v[i] for v, i in zip(values, picked, strict=True)) <= best + 0.01


def test_the_knapsack_takes_the_least_where_there_is_room_for_no_more() -> None:
    weights, values = [np.array([1.0, 2.0, 1.0])] * 3, [np.array([5.0, 1.0, 4.0])] * 3
    assert knapsack(weights, values, 3.0) == [2, 2, 2]
    with pytest.raises(ValueError, match=r"the least weights sum to 3, more than the capacity of 2\.9"):
        knapsack(weights, values, 2.9)


def options(*rows: tuple[float, float]) -> list[Option]:
    """(ms, error) of each; density is a tenth of the ms."""
    return [Option(Dense(), "none", ms, ms / 10, error, 1 - error) for ms, error in rows]


HEADS = [options((1, 0.5), (2, 0.1), (10, 0)), options((1, 0.01), (2, 0.005), (10, 0)), options((1, 0.4), (10, 0.0))]


def test_heads_that_need_more_get_it_from_those_that_need_less() -> None:
    shared = allocate(Budget.cost(0.434), HEADS, 10.0)
    assert shared == [1, 0, 1], "13 of 30 ms: the last head needs dense, the second nothing"
    assert allocate(Budget.cost(0.434, shared=False), HEADS, 10.0) == [1, 1, 0]
    assert allocate(Budget.cost(ms=13.0), HEADS, 10.0) == shared
    assert allocate(Budget.density(0.434), HEADS, 10.0) == shared


def test_an_error_budget_takes_the_cheapest() -> None:
    assert allocate(Budget.error(0.1, shared=False), HEADS, 10.0) == [1, 0, 1]
    picked = allocate(Budget.error(0.24), HEADS, 10.0)
    assert picked == [1, 0, 0], "0.1, 0.01 and 0.4 have a root mean square of 0.238"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("budget", "told"), [("cost=0.05", "cost="), ("cost=1ms", "ms"), ("density=0.01", "density=")])
def test_an_unreachable_budget_names_the_least_that_is(budget: str, told: str, shared: bool) -> None:
    asked = Budget.parse(budget, shared=shared)
    with pytest.raises(Unreachable, match=re.escape(f"the budget {asked} cannot be reached")) as error:
        allocate(asked, HEADS, 10.0)
    named = re.search(r"take (\S+?)\. Give", str(error.value))
    assert named is not None
    assert told in named[1]
    assert allocate(Budget.parse(named[1], shared=shared), HEADS, 10.0) == [0, 0, 0]


@pytest.mark.parametrize("text", ["cost", "speed=2", "cost=fast", "density=12ms", "error=-1", "density=1.5", ""])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"write cost=0\.2"):
        Budget.parse(text)


def test_budgets_as_text() -> None:
    assert Budget.parse("cost=0.2") == Budget.cost(0.2)
    assert Budget.parse("cost = 12ms") == Budget.cost(ms=12.0)
    assert Budget.parse("error=0.05", shared=False) == Budget.error(0.05, shared=False)
    assert str(Budget.parse("density=0.15", shared=False)) == "density=0.15 per head"


# ---- rows and errors -------------------------------------------------------------------------------------------------


def test_sampled_rows_stand_for_all() -> None:
    for count in (5, 40, 1000, None):
        groups = Rows(count, last=20).groups(LAYOUT)
        assert [group.modality for group in groups] == [TEXT, VIDEO]
        total = np.zeros(3)
        for group in groups:
            own = LAYOUT.of(group.modality)[0]
            assert own[group.rows].all()
            assert (np.diff(group.rows) > 0).all()
            total += group.share.sum(1)
        assert total.tolist() == pytest.approx([LAYOUT.of(TEXT).sum(), LAYOUT.of(VIDEO).sum(), 20])
    tail = set(range(LAYOUT.length - 20, LAYOUT.length))
    assert tail <= {int(r) for group in groups for r in group.rows}
    (even,) = Rows(10, last=0, even=False).groups(mmflex.TokenLayout.text(1000))
    assert len(even.rows) == 10
    assert (even.rows // 100).tolist() == list(range(10)), "one in each equal stretch"


def oracle(held: Layer, pattern: mmflex.Pattern, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(error, recall) of each head from the plan's token mask and plain softmax attention in float64."""
    mask = mmflex.plan(held.q, held.k, pattern, layout=LAYOUT, backend="reference", block_size=16).dense_mask()[0]
    group = held.heads // held.kv_heads
    k, v = (t[0].double().repeat_interleave(group, 0) for t in (held.k, held.v))
    score = held.q[0].double() @ k.mT * held.q.shape[-1] ** -0.5
    score = score.masked_fill(~torch.ones(score.shape[1:], dtype=torch.bool).tril(), float("-inf"))
    weights = score.softmax(-1)
    dense, kept = weights @ v, weights * mask
    difference = ((kept @ v / kept.sum(-1, keepdim=True) - dense).square().sum(-1)).numpy()
    lost, held_, strata = 0.0, 0.0, rows.groups(LAYOUT)
    norm = sum(g.share @ dense.square().sum(-1).numpy()[:, g.rows].T for g in strata)
    lost = sum(g.share @ difference[:, g.rows].T for g in strata)
    held_ = sum(g.share @ kept.sum(-1).numpy()[:, g.rows].T for g in strata)
    return np.sqrt((lost / norm).mean(0)), (held_ / sum(g.share.sum(1) for g in strata)[:, None]).mean(0)


@pytest.mark.parametrize("rows", [Rows(None), Rows(30, last=10), Rows(30, even=False)])
def test_errors_of_options_are_those_of_their_plans(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the search offers for a head has the error and recall that its plan's mask has: single patterns and both
    kinds of boundaries, heads in portions or at once."""
    monkeypatch.setitem(probe._HELD, "cpu", 1)  # one KV head at a time
    held = layer()
    run = Search(Settings(TABLE, Budget.density(0.4, shared=False), rows, "reference"), held.heads)
    run.prepare(held)
    found: dict[str, int] = {}
    groups = rows.groups(LAYOUT)
    from mmflex.tuning.search import _Heads

    for number, kv in enumerate(probe.chunks(held, groups)):
        heads = _Heads(run, held, groups, (TEXT, VIDEO), kv)
        assert heads.count == 2
        for h in range(2):
            tried = (heads._single(h, 0.4), heads._query_boundary(h, 0.4), heads._boundary_2d(h, 0.4))
            for option in tried:
                assert option is not None
                found[option.boundary] = found.get(option.boundary, 0) + 1
                error, recall = oracle(held, option.pattern, rows)
                assert option.error == pytest.approx(error[2 * number + h], rel=1e-4)
                assert option.recall == pytest.approx(recall[2 * number + h], rel=1e-4)
    assert found == {"none": 4, "query": 4, "2d": 4}


def test_a_mask_by_tiles_is_the_mask() -> None:
    """Set tests are looked up once a key tile; the mask is that of the plan, for keys of all and of one modality."""
    held = layer()
    group = Rows(None).groups(LAYOUT)[1]
    look = Probe(held, group, slice(0, 2), (TEXT, VIDEO))
    for pattern, key in (
        (VerticalSlash(40, 64, 16, near=1) | BlockTopK(3, 16, near=1), None),
        (VerticalSlash(40, 64, 16, near=1).on(query="video", key="video"), VIDEO),
        (BlockTopK(3, 32, near=1).on(query="video", key="text") | AShape(16, 20).on("video", "text"), TEXT),
    ):
        plan = mmflex.plan(held.q, held.k, pattern, layout=LAYOUT, backend="reference", block_size=16)
        mask = plan.dense_mask(group.rows.tolist())[0]
        weights, v, keys = look._sides[key]
        want = look._times(weights * mask[:, :, keys.index[0]], v)
        got = look.keep(denote(pattern, LAYOUT, 16), key)
        assert torch.allclose(got.mass, want.mass, rtol=1e-5)
        assert torch.allclose(got.sums, want.sums, rtol=1e-4, atol=1e-5)
        assert 0 < float(got.mass.sum()) < float(look.whole[key].mass.sum())


# ---- prices and candidates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [*TABLE, Dense(), QBoundary({"video": TABLE[1]}), TABLE[3].on("video", "video")])
def test_prices_are_those_of_plans(pattern: mmflex.Pattern) -> None:
    held = layer()
    prices = Prices(held, "reference")
    plan = mmflex.plan(held.q, held.k, pattern, layout=LAYOUT, backend="reference", block_size=16)
    found = prices.of(pattern)
    assert found.density.mean() == pytest.approx(plan.density.total, rel=1e-6)
    assert (found.ms > 0).all()
    assert prices.of(pattern).ms is prices.of(pattern).ms, "asked once"


def test_candidates_are_brought_to_equal_cost() -> None:
    held = Layer(0, *qkv(n=1600), mmflex.TokenLayout.text(1600), tile=16)
    prices = Prices(held, "reference")

    def price(pattern: mmflex.Pattern) -> float:
        return float(prices.of(pattern).density.mean())

    for pattern in (*TABLE, TABLE[3] | TABLE[1]):
        for target in (0.25, 0.5, 0.7):
            scaled = candidates.Curve(pattern, price).scaled_to(target)
            assert scaled is not None, pattern
            assert price(scaled) <= target * (1 + 1e-9)
            if not isinstance(pattern, BlockTopK):  # whose steps are coarse
                assert price(scaled) > 0.75 * target, f"{scaled} is too far below {target}"
    assert candidates.Curve(AShape(200, 10), price).scaled_to(0.05) is None, "a sink of 200 of 1600 tokens cannot be"
    assert candidates.Curve(Dense(), price).scaled_to(1.0) == Dense(), "it has no budgets"


def test_the_table_leaves_out_what_makes_no_sense_and_what_is_alike() -> None:
    table = candidates.at_costs([Grid("frame"), AShape(16, 48), AShape(16, 50), AShape(16, 400)], [0.3], _no_frames)
    assert table == (AShape(16, 48), AShape(16, 400))
    with pytest.raises(ValueError, match="no frames here"):
        candidates.at_costs([Grid("frame")], [0.3], _no_frames)


def _no_frames(pattern: mmflex.Pattern) -> float:
    if isinstance(pattern, Grid):
        raise ValueError("no frames here")
    return 0.3


def test_the_papers_table() -> None:
    table = candidates.paper()
    assert isinstance(table[0], AShape)
    names = {planted.family(p) for p in table}
    assert {"AShape", "VerticalSlash", "BlockTopK", "Grid", "Grid | VerticalSlash"} <= names
    assert VerticalSlash(1000, 6096) in table
    composed = table[-1].scaled(0.25)
    assert type(composed).__name__ == "Union"
    assert composed.right == VerticalSlash(candidates.COLUMNS, 0), "its columns are not scaled"
    assert composed.left == table[-1].left.scaled(0.25)


def test_scaling() -> None:
    boundary = Boundary2D({("video", "video"): Grid(20, local=512) | VerticalSlash(100, 0)})
    scaled = boundary.scaled(0.5)
    ((_, inner),) = scaled.parts
    assert inner == Grid(20, local=256) | VerticalSlash(50, 0)
    assert mmflex.Pattern.from_json(scaled.to_json()) == scaled
    assert boundary.scaled(1.0) is boundary
    assert BlockTopK(3).scaled(0.01) == BlockTopK(1)


def test_errors_are_measured_at_every_place_in_a_tile() -> None:
    """Of a length that is a multiple of the tile as of others, in the last rows and in the sampled ones."""
    for n in (1024, 1500, 2048):
        (group,) = Rows().groups(mmflex.TokenLayout.text(n))
        sampled, last = (np.bincount(group.rows % 128, weights=share, minlength=128) for share in group.share)
        assert (last == 1).all(), "the last rows stand at every place once"
        sixteenths = sampled.reshape(8, 16).sum(1)
        assert sixteenths.min() >= 0.6 * sixteenths.mean()


# ---- planted heads ---------------------------------------------------------------------------------------------------


def test_planted_heads_are_found() -> None:
    """A head of each boundary type with a family each (all of them, and 100 heads, in benchmarks.search)."""
    scale = planted.Scale(frames=16)
    every = planted.kinds()
    chosen = [every[i] for i in (0, 2, 5, 6, 8, 12, 17)]
    heads, q, k, v = planted.plant(scale, len(chosen), seed=5, every=chosen)
    tile, last_q = scale.tile, scale.last_q
    wanted = (
        AShape(2 * tile, 8 * tile),
        VerticalSlash(64, 32, last_q, near=1),
        BlockTopK(5, 2 * tile, near=1),
        Grid("search", local=4 * tile, sink=2 * tile, last_q=last_q, shortest=tile, longest=8 * tile),
        Grid("frame", local=4 * tile, sink=2 * tile, last_q=last_q),
        Grid("search", False, False, True, 4 * tile, 2 * tile, last_q=last_q, shortest=tile, longest=8 * tile),
        Grid("frame", False, False, True, 4 * tile, 2 * tile, last_q=last_q),
        candidates.Besides(
            Grid("search", False, False, True, 4 * tile, 2 * tile, last_q=last_q, shortest=tile, longest=8 * tile),
            VerticalSlash(62, 0, last_q),
        ),
    )
    config = mmflex.search(
        (q, k, v),
        budget=Budget.density(0.4, shared=False),
        candidates=wanted,
        layout=scale.layout,
        backend="reference",
        rows=Rows(count=96, last=last_q),
        block_size=tile,
        progress=False,
    )
    for head, pattern, error in zip(
        heads, config.patterns[0], config.provenance["per_head"]["error"]["0"], strict=True
    ):
        assert planted.recognised(head, pattern), f"{head.boundary} {head.structures}: {pattern}"
        assert error < 0.05, f"{head.boundary} {head.structures}: {pattern}"
    assert max(config.provenance["per_head"]["density"]["0"]) <= 0.4


# ---- models ----------------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")

from families import FAMILIES, text_config  # noqa: E402

from mmflex.integrations.capture import capture  # noqa: E402

SMALL = (AShape(16, 128), VerticalSlash(32, 128, 16))


def llama(layers: int = 3, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**text_config(num_hidden_layers=layers))).eval()


def ids(n: int = 1024, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 60, (1, n), generator=torch.Generator().manual_seed(seed))


def outputs(model: Any) -> list[torch.Tensor]:
    """Collects the attention outputs (before the output projection) of a model's layers, as it runs."""
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if hasattr(module, "o_proj"):
            module.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


def test_capture_gives_what_attention_is_given_one_layer_at_a_time() -> None:
    model = llama()
    before, state = outputs(model), set(vars(model))
    with torch.no_grad():
        model(ids())
    want = list(before)
    before.clear()
    last: weakref.ref[torch.Tensor] | None = None
    for number, held in enumerate(capture(model, {"input_ids": ids(), "labels": ids()})):
        assert isinstance(held, Layer)
        assert held.index == number
        assert last is None or last() is None, "the layer before is gone"
        assert len(before) == number, "the model waits for the caller"
        out = mmflex.attention(held.q, held.k, held.v, Dense(), scale=held.scale, backend="reference")
        assert torch.allclose(out.transpose(1, 2).flatten(2), want[number], atol=1e-5)
        last = weakref.ref(held.q)
        del held
    assert number == 2
    assert set(vars(model)) == state
    assert model.config._attn_implementation == "sdpa"


def test_capture_can_be_left_early() -> None:
    model = llama()
    layers = capture(model, ids())
    assert isinstance(next(layers), Layer)
    layers.close()
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert model(ids()).logits.shape[1] == 1024
    mmflex.unpatch(mmflex.patch(model, Dense()))


def test_a_vision_language_model_is_searched_with_its_layout() -> None:
    family = FAMILIES["qwen2_5_vl"]
    model = family.model()
    batch = family.batch(model.config, text=900, frames=8)
    config = mmflex.search(
        model, batch.inputs, candidates=SMALL, budget="density=0.9", backend="reference", rows=20, progress=False
    )
    assert "video" in config.provenance["prompt"]
    assert (config.layers, config.heads) == (
        model.config.text_config.num_hidden_layers, model.config.text_config.num_attention_heads
    )  # fmt: skip
    with torch.no_grad(), mmflex.patched(model, config, backend="reference"):
        assert torch.isfinite(model(**batch.inputs).logits).all()


def find(model: Any, sample: Any = None, **more: Any) -> mmflex.Config:
    given: dict[str, Any] = {"candidates": SMALL, "budget": "density=0.9", "backend": "reference", "rows": 20}
    return mmflex.search(model, ids() if sample is None else sample, progress=False, **(given | more))


def test_layers_with_a_window_keep_it() -> None:
    torch.manual_seed(0)
    window = transformers.MistralConfig(**text_config(num_hidden_layers=2), sliding_window=50)
    with pytest.raises(ValueError, match="no layer could be searched: a sliding window of 50 tokens"):
        find(transformers.MistralForCausalLM(window).eval())


def stopping(after: int) -> Any:
    """`Search.run` that fails after some layers."""
    real, count = Search.run, [0]

    def run(self: Search, held: Layer) -> Any:
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        return real(self, held)

    return run


def test_a_search_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "search.jsonl", llama()
    whole = find(model)
    with monkeypatch.context() as patch:
        patch.setattr(Search, "run", stopping(1))
        with pytest.raises(KeyboardInterrupt):
            find(model, checkpoint=path)
    assert [json.loads(line).get("layer") for line in path.read_text().splitlines()] == [None, 0]
    searched: list[int] = []
    real = Search.run
    monkeypatch.setattr(Search, "run", lambda self, held: (searched.append(held.index), real(self, held))[1])
    assert find(model, checkpoint=path) == whole
    assert searched == [1, 2]
    monkeypatch.setattr(Search, "run", None)
    assert find(model, checkpoint=path) == whole, "all layers are there: the model does not run"
    assert [p.name for p in tmp_path.iterdir()] == ["search.jsonl"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": "other"}, "another model"),
        ({"sample": "other"}, "another sample"),
        ({"candidates": SMALL[:1]}, "other settings"),
        ({"budget": "density=0.8"}, "other settings"),
    ],
)
def test_another_search_is_refused(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    path = tmp_path / "search.jsonl"
    find(llama(1), checkpoint=path)
    before = path.read_bytes()
    head = json.loads(before.splitlines()[0])
    model = llama(1, seed=1) if "model" in change else llama(1)
    sample = ids(seed=1) if "sample" in change else ids()
    more = {name: value for name, value in change.items() if name in ("candidates", "budget")}
    with pytest.raises(ValueError, match=f"it is of {what}") as error:
        find(model, sample, checkpoint=path, **more)
    name = next(iter(set(change) & {"model", "sample"}), "settings")
    assert head[name] in str(error.value)
    assert re.search(r"[0-9a-f]{16} there, [0-9a-f]{16} here", str(error.value))
    assert path.read_bytes() == before


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    options: dict[str, Any] = {
        "candidates": TABLE, "budget": "density=0.5", "layout": LAYOUT, "backend": "reference", "rows": 20,
        "block_size": 16, "progress": False, "checkpoint": path,
    }  # fmt: skip
    first = mmflex.search([(0, *qkv()), (1, *qkv(seed=1))], **options)
    assert mmflex.search(iter([(0, *qkv()), (1, *qkv(seed=1))]), **options) == first
    with pytest.raises(ValueError, match=r"layer 1 has hash [0-9a-f]{16} there, [0-9a-f]{16} here"):
        mmflex.search([(0, *qkv()), (1, *qkv(seed=2))], **options)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda text: text[:-40], "line 2 is cut off or not JSON"),
        (lambda text: "", "not a checkpoint of a search"),
        (lambda text: text.replace('"mmflex.search"', '"mmflex.config"', 1), "not a checkpoint of a search"),
        (lambda text: text.replace('"heads": [[[0', '"heads": [[["x"'), "not a checkpoint that this version reads"),
    ],
)
def test_a_spoilt_checkpoint_is_named(tmp_path: Path, spoil: Any, match: str) -> None:
    path = tmp_path / "search.jsonl"
    find(llama(1), checkpoint=path)
    path.write_text(spoil(path.read_text()))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=match):
        find(llama(1), checkpoint=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("model", "sample", "error", "match"),
    [
        (lambda: llama(1), lambda: ids(63), ValueError, "the sample has 63 tokens: .* the last 64 queries"),
        (lambda: llama(1), lambda: ids(32769), ValueError, "32769 tokens: a search takes at most 32768"),
        (lambda: llama(1), lambda: torch.cat([ids(), ids()]), ValueError, "holds 2 prompts"),
        (lambda: llama(1), lambda: {"pixel_values": ids()}, TypeError, "give what a processor returns"),
        (lambda: llama(1), lambda: None, TypeError, "search\\(model, sample\\)"),
        (lambda: llama(1).train(), ids, ValueError, "call model.eval"),
        (lambda: torch.nn.Linear(3, 3), ids, TypeError, "Linear holds no transformers language model: pass one"),
        (lambda: "a model", ids, TypeError, "search takes a transformers model and a sample"),
    ],
)
def test_what_cannot_be_searched(model: Any, sample: Any, error: type[Exception], match: str, tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    with pytest.raises(error, match=match):
        mmflex.search(model(), sample(), candidates=SMALL, checkpoint=path, progress=False)
    assert not list(tmp_path.iterdir())


def test_tensors_that_cannot_be_searched() -> None:
    q, k, v = qkv()
    n = LAYOUT.length
    for given, match in (
        ((q[:, :, :63], k[:, :, :63], v[:, :, :63]), "63 tokens"),
        ((q[:, :, 10:], k, v), f"layer 0 has {n - 10} queries but {n} keys"),
        ((q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)), "layer 0 holds 2 prompts"),
        ((q, k, v[:, :, 1:]), "layer 0: v has shape"),
        ([(0, q, k, v), (1, q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])], "another layout"),
        ([], "none was given"),
    ):
        with pytest.raises(ValueError, match=match):
            mmflex.search(given, candidates=TABLE[:1], budget="density=0.9", progress=False, rows=10, block_size=16)


def test_an_unreachable_budget_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    with pytest.raises(Unreachable) as error:
        find(llama(1), budget="density=0.001", checkpoint=path)
    least = re.search(r"density=(\S+?)\. Give", str(error.value))
    assert least is not None
    assert not list(tmp_path.iterdir())
    config = find(llama(1), budget=f"density={least[1]}", checkpoint=path)
    assert config.provenance["density"] <= float(least[1])


# ---- the command line ------------------------------------------------------------------------------------------------

runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"})


def output_of(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, ["search", *arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    path = tmp_path / "qkv.safetensors"
    made = {f"{i}.{side}": t.contiguous() for i in range(2) for side, t in zip("qkv", qkv(n=1024, seed=i), strict=True)}
    save_file(made, path)
    return path


SEGMENTS = "text 45, video 8x5x5, text 779"


def test_search_on_the_command_line(tensors: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "table.json", tmp_path / "found.json"
    table.write_text(json.dumps([p.to_json() for p in SMALL]))
    arguments = ("--qkv", str(tensors), "--segments", SEGMENTS, "--candidates", str(table), "--rows", "20")
    text = output_of(*arguments, "--budget", "density=0.95", "--backend", "reference", "-o", str(out))
    assert "2 layers x 4 heads" in text
    assert "budget density=0.95" in text
    config = load_config(out)
    assert set(config.patterns) == {0, 1}
    assert config.provenance["prompt"].startswith("text 45 | video 200")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.json", "qkv.safetensors", "table.json"]


def test_a_search_for_other_lengths_on_the_command_line(tensors: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "table.json", tmp_path / "found.json"
    table.write_text(json.dumps([VerticalSlash(40, 128, 16, near=1).to_json()]))
    arguments = ("--qkv", str(tensors), "--candidates", str(table), "--rows", "20", "--backend", "reference")
    arguments = (*arguments, "--budget", "density=0.9", "-o", str(out))
    text = output_of(*arguments)
    tokens = load_config(out).provenance["tokens"]
    assert f"the figures hold for {tokens:,} tokens; on prompts twice as long, about half the density" in text
    found = load_config(out)
    text = output_of(*arguments, "--for", str(3 * tokens))
    assert f"budgets resized from {tokens:,} to {3 * tokens:,} tokens" in text
    assert load_config(out) == found.resized(3 * tokens) != found
    assert "--for is 0: give the tokens of a prompt" in output_of(*arguments, "--for", "0", code=1)


def test_candidates_that_are_no_list_of_patterns() -> None:
    q, k, v = (torch.randn(1, heads, 160, 16) for heads in (2, 1, 1))
    with pytest.raises(TypeError, match=r"candidates is one pattern, AShape.*: give a list of patterns"):
        mmflex.search((q, k, v), candidates=AShape(16, 48), progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="candidates holds 'AShape': give patterns"):
        mmflex.search((q, k, v), candidates=["AShape"], progress=False)  # type: ignore[list-item]


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    q, k, v = qkv()
    layers = [(i, q, k, v) for i in (0, 2, 5)]
    options: dict[str, Any] = {"candidates": TABLE[:1], "budget": "density=0.9", "rows": 10, "layout": LAYOUT}
    mmflex.search(layers, block_size=16, **options)
    printed = capsys.readouterr()
    first, second, last = printed.err.splitlines()
    assert first == "searching patterns in 3 layers"
    assert re.fullmatch(r"layer 0: 1 of 3, \d+ s, about \d+ s left", second)
    assert re.fullmatch(r"layer 5: 3 of 3, \d+ s", last)
    assert not printed.out
    mmflex.search(layers, block_size=16, progress=False, **options)
    assert not capsys.readouterr().err


def test_progress_estimates_from_the_layers_that_took_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("mmflex.integrations.progress.time.monotonic", lambda: now[0])
    text = io.StringIO()
    with LayerProgress(10, console=Console(file=text)) as shown:
        for layer in range(4):  # of an earlier run
            shown.end(layer, searched=False)
        for layer in range(4, 7):
            now[0] += 8
            shown.end(layer)
    want = ["searching patterns in 10 layers", "layer 4: 5 of 10, 8 s, about 40 s left"]
    assert text.getvalue().splitlines() == [*want, "layer 6: 7 of 10, 24 s, about 24 s left"]


def test_an_interrupted_search_on_the_command_line(
    tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, out = tmp_path / "table.json", tmp_path / "found.json"
    table.write_text(json.dumps([p.to_json() for p in SMALL]))
    arguments = ("--qkv", str(tensors), "--candidates", str(table), "--rows", "20", "--backend", "reference")
    with monkeypatch.context() as patch:
        patch.setattr(Search, "run", stopping(1))
        runner.invoke(app, ["search", *arguments, "--budget", "density=0.9", "-o", str(out)])
    assert not out.exists()
    assert (tmp_path / "found.json.progress").exists()
    assert "go on with --resume" in output_of(*arguments, "--budget", "density=0.9", "-o", str(out), code=1)
    output_of(*arguments, "--budget", "density=0.9", "-o", str(out), "--resume")
    assert load_config(out).layers == 2
    assert not (tmp_path / "found.json.progress").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a model (a folder, a name or a task) or --qkv FILE"),
        (("nowhere",), "nowhere is none of the tasks v-niah, mm-niah, retrieval, tracking, and a model needs a sample"),
        (("./nowhere", "--text", "w"), "there is no folder ./nowhere: give one with a transformers model"),
        (("v-niah", "--backend", "flas"), "--backend is 'flas': give auto, flash"),
        (("v-niah", "--device", "gpu"), "--device is 'gpu': give cpu, cuda"),
        (("--qkv", "nowhere.safetensors"), "there is no file nowhere.safetensors"),
        (("v-niah", "--budget", "cost=much"), "write cost=0.2"),
        (("v-niah", "-o", "nowhere/found.json"), "there is no folder nowhere"),
        (("--qkv", "QKV", "--segments", "video"), "'video' is no segment"),
    ],
)
def test_errors_on_the_command_line(
    arguments: tuple[str, ...], message: str, tensors: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in output_of(*(a.replace("QKV", str(tensors)) for a in arguments), code=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["qkv.safetensors"]


def test_a_model_in_a_folder_and_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama(1).save_pretrained(tmp_path / "model")
    assert "a model needs a sample" in output_of("model", code=1)
    text = output_of("model", "--video", "model/config.json", code=1)
    assert "(llama) is a model of text alone: leave --video out" in text
    assert "there is no file film.mp4" in output_of("model", "--video", "film.mp4", code=1)
    text = output_of("--help")
    for word in ("density=0.15", "--resume", "v-niah", "mmflex.patch"):
        assert word in text


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from mmflex.cli import search as module

    monkeypatch.chdir(tmp_path)
    model = llama(1)
    asked = []

    def config(name: str) -> Any:
        asked.append(name)
        return model.config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)
    ids = torch.arange(300)[None] % 64
    tokenizer = lambda text, return_tensors: {"input_ids": ids}  # noqa: E731
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.setattr(module, "load", lambda *args: pytest.fail("weights were loaded"))
    arguments = ("owner/model", "--text", "words", "--tokens", "256", "--device", "cpu", "-o", "found.json")
    text = output_of(*arguments, "--dry-run")
    assert "sample: 256 tokens" in text
    size = sum(p.numel() for p in model.parameters())
    assert f"model: owner/model, {size / 1e3:.1f}k parameters, 1 layer x 4 heads; on cpu, weights are not" in text
    assert "would write: found.json" in text
    assert not list(tmp_path.iterdir())
    (tmp_path / "table.json").write_text(json.dumps([p.to_json() for p in SMALL]))
    monkeypatch.setattr(module, "load", lambda name, device: model)
    output_of(*arguments, "--candidates", "table.json", "--budget", "density=1", "--rows", "20")
    assert load_config(Path("found.json")).provenance["tokens"] == 256
    assert set(asked) == {"owner/model"}


def test_a_model_is_searched_on_the_prompt_that_run_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut out of its middle, in the chat template where answers count, and with frames as `mmflex run` takes them."""
    import transformers

    from mmflex.cli import search as module
    from mmflex.integrations import frames

    class Tokenizer:
        chat_template = "yes"

        def apply_chat_template(self, messages: Any, **options: Any) -> Any:
            assert messages == [{"role": "user", "content": "words"}]
            return {"input_ids": torch.arange(10, 310)[None]}

        def __call__(self, text: str, return_tensors: str) -> Any:
            return {"input_ids": torch.arange(500, 800)[None]}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name: llama(1).config)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    searched: list[Any] = []

    def stop(given: Any, sample: Any, **options: Any) -> Any:
        searched.append(sample["input_ids"][0].tolist())
        raise ValueError("enough")

    monkeypatch.setattr("mmflex.integrations.search.search", stop)
    monkeypatch.setattr(module, "load", lambda name, device: None)
    common = ("owner/model", "--text", "words", "--device", "cpu")
    text = output_of(*common, "--tokens", "101", code=1)
    assert "199 tokens are left out of its middle (--tokens 101)" in text
    assert searched.pop() == [*range(10, 61), *range(260, 310)]
    assert "left out" not in output_of(*common, "--objective", "outputs", code=1)
    assert searched.pop() == [*range(500, 800)]
    assert "the sample has 9 tokens" in output_of(*common, "--tokens", "9", "--dry-run", code=1)
    assert "--objective is 'answer': give answers or outputs" in output_of(*common, "--objective", "answer", code=1)

    monkeypatch.setattr(module, "check_media", lambda *args: None)
    monkeypatch.setattr(frames, "read_frames", lambda path, count: (path, count))
    given: list[Any] = []

    def prepare(*args: Any, **options: Any) -> Any:
        given.append(args)
        return {"input_ids": torch.arange(300)[None]}, None

    monkeypatch.setattr(module, "prepare", prepare)
    output_of(*common, "--video", "film.mp4", "--frames", "6", "--image", "a.png", "--dry-run")
    assert given == [("owner/model", "words", (Path("film.mp4"), 6), [Path("a.png")])]
    text = output_of(*common, "--image", "a.png", "--tokens", "100", code=1)
    assert "--tokens is 100, and prompts with images or video are not cut" in text


def test_dry_runs_of_tensors_and_tasks(tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = output_of("--qkv", str(tensors), "--dry-run")
    assert "sample: 1,024 tokens model: tensors, 2 layers x 4 heads" in text
    text = output_of("v-niah", "--tokens", "1024", "--dry-run", "--device", "cpu", "--budget", "density=0.3")
    assert "sample: 1,024 tokens model: v-niah, " in text
    assert "budget: density=0.3" in text
    assert re.search(r"would take: about [\d.]+ m?s(econds)? for those passes \(2 operations for every weight", text)
    assert [p.name for p in tmp_path.iterdir()] == ["qkv.safetensors"]


def test_the_model_that_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small untrained model of the same class in its place."""
    from mmflex.evaluation import models

    monkeypatch.setattr(models, "load", lambda task, device: models.build("vision", hidden=64, layers=1).eval())
    table, out = tmp_path / "table.json", tmp_path / "found.json"
    table.write_text(json.dumps([p.to_json() for p in SMALL]))
    output_of(
        "v-niah", "--tokens", "1024", "--budget", "density=0.9", "--candidates", str(table), "--rows", "20",
        "--backend", "reference", "--device", "cpu", "-o", str(out),
    )  # fmt: skip
    config = load_config(out)
    assert config.provenance["tokens"] == 1024
    assert "video" in config.provenance["prompt"]


def test_a_config_of_a_search_is_a_file_as_any(tmp_path: Path) -> None:
    config = find(llama(1))
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert set(config.provenance["per_head"]) == {"error", "recall", "density", "ms", "weight"}
    assert len(config.provenance["per_head"]["error"]["0"]) == config.heads
    assert config.provenance["versions"]["torch"] == torch.__version__
