"""What a search offers heads, and a searched config beside uniform ones: rivals within a budget, KL against a model
that is given its masks as tensors, and the better one is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_search import ids, llama

import mmflex
from mask_builders import AShape, BlockPeaks, BlockTopK, Dense, Grid, Prism, VerticalSlash, XAttention
from mask_builders.shares import SHARES
from mmflex.integrations import search as module
from mmflex.integrations.capture import inputs_of
from mmflex.integrations.comparison import compare, rivals_of
from mmflex.tuning import candidates
from mmflex.tuning.budget import Budget, Option, allocate
from mmflex.tuning.checkpoint import Checkpoint, Done
from mmflex.tuning.pricing import Prices
from mmflex.tuning.probe import Layer
from mmflex.tuning.search import Search, Settings

N = 1600


# ---- options ---------------------------------------------------------------------------------------------------------


def near_and_far(near: int, far: int, n: int = N, dim: int = 16) -> Layer:
    """A layer of heads that see little but their nearest keys, and of heads that see all keys alike."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.arange(n)[:, None] * torch.logspace(-1, 0, dim // 2)
    turning = torch.cat([angles.cos(), angles.sin()], 1)
    q = torch.stack([40 * turning] * near + [0 * turning] * far)[None]
    k, v = turning.expand(1, near + far, n, dim), torch.randn(1, near + far, n, dim, generator=generator)
    return Layer(0, q, k, v, mmflex.TokenLayout.text(n), tile=16)


def test_heads_that_need_little_leave_the_rest_to_those_that_need_all() -> None:
    """All candidates at the budget's mean would leave nothing to share."""
    layer = near_and_far(near=5, far=1)
    table = (AShape(16, 48), BlockTopK(4, 16, near=1))
    search = Search(Settings(table, Budget.density(0.2), backend="reference"), total=layer.heads)
    search.prepare(layer)
    heads = search.run(layer).heads
    least = min(Prices(layer, "reference").of(AShape(16, 1)).density)
    for options in heads[:5]:
        assert options[0].density <= 1.2 * least, "the cheapest that a candidate can be is among the options"
    by_pattern = {option.pattern: option for option in search.run(layer).uniform}
    v, weights = layer.v[0].double(), []
    for h in range(6):
        scores = (layer.q[0, h].double() @ layer.k[0, h].double().T) * layer.scale
        weights.append(
            float((scores.masked_fill(~torch.ones(N, N).tril().bool(), -torch.inf).softmax(-1) @ v[h]).square().sum())
        )
    assert set(search.table) == set(by_pattern)
    for option in by_pattern.values():
        assert option.weight == pytest.approx(np.mean(weights), rel=0.05), "squared outputs, from sampled rows"
    for options in heads:
        densities, errors = [o.density for o in options], [o.error for o in options]
        assert densities == sorted(densities)
        assert min(errors) == errors[-1] == 0.0
    picked = [options[i] for options, i in zip(heads, allocate(search.budget, heads, search.dense), strict=True)]
    assert np.mean([o.density for o in picked]) <= 0.2 * (1 + 1e-9)
    assert picked[5].density > 3 * max(o.density for o in picked[:5])


def test_a_threshold_gives_heads_what_they_need() -> None:
    """It is tried as it is: a bound that brings it to a cost would give all heads and rows alike."""
    layer = near_and_far(near=1, far=1)
    prices = Prices(layer, "reference")
    base = XAttention(4, 0.9, 64, 16, near=1)
    table = candidates.at_costs(
        candidates.at_levels([base, AShape(16, 48)]), [0.1], lambda p: prices.of(p).density.mean()
    )
    assert [p for p in table if isinstance(p, XAttention)] == [
        XAttention(4, share, 64, 16, near=1) for share in SHARES
    ], "dearer than the target as well"
    assert sum(isinstance(p, AShape) for p in table) == 1
    near, far = prices.of(table[0]).density
    assert far > 2 * near


def test_what_keeps_as_much_as_it_needs_is_priced_in_every_layer() -> None:
    """The heads of a first layer that are all alike do not tell what others cost."""
    diffuse, sharp = near_and_far(near=0, far=2), near_and_far(near=2, far=0)
    pattern = XAttention(4, 0.9, 100, 16, near=1)
    prices = Prices(diffuse, "reference")
    first = prices.of(pattern).density
    prices.move_to(sharp)
    second = prices.of(pattern).density
    for layer, found in ((diffuse, first), (sharp, second)):
        plan = mmflex.plan(layer.q, layer.k, [pattern] * 2, layout=layer.layout, backend="reference", block_size=16)
        assert found.mean() == pytest.approx(plan.density.total, rel=1e-6)
    assert first.mean() > 2 * second.mean()


def test_a_threshold_that_makes_no_sense_here_is_left_out() -> None:
    def price(pattern: mmflex.Pattern) -> float:
        if isinstance(pattern, XAttention):
            raise ValueError("not with this prompt")
        return 0.2

    assert candidates.at_costs(candidates.at_levels([XAttention(), AShape()]), [0.3], price) == (AShape(),)


def test_levels_of_the_table() -> None:
    levels = [p.base for p in candidates.at_levels(candidates.paper()) if isinstance(p, candidates.AsIs)]
    assert {type(p) for p in levels} == {BlockPeaks, Prism, XAttention}
    assert {p.threshold for p in levels if not isinstance(p, BlockPeaks)} == set(SHARES)
    assert {p.peak for p in levels if isinstance(p, BlockPeaks)} == set(BlockPeaks.levels["peak"])
    assert len(set(levels)) == len(levels)


def test_candidates_of_a_caller_are_tried_at_levels_and_at_their_own() -> None:
    """As those of the table: a share is not the caller's guess, and blocks are not what is scaled."""
    layer = near_and_far(near=2, far=2, n=640)
    q, k, v = layer.q, layer.k, layer.v
    given = XAttention(4, 0.5, 64, 16, near=1)
    taken: set[mmflex.Pattern] = set()
    for density in (0.35, 0.5, 0.7, 0.9):
        config = mmflex.search(
            (q, k, v), candidates=[given], budget=f"density={density}", backend="reference", rows=20, block_size=16,
            progress=False,
        )  # fmt: skip
        taken |= set(config.patterns[0]) - {Dense()}
    assert taken <= {replace(given, threshold=share) for share in (0.5, *SHARES)}
    assert len(taken) > 1
    alone = mmflex.search(
        (q, k, v), candidates=[candidates.AsIs(given)], budget="density=0.9", backend="reference", rows=20,
        block_size=16, progress=False,
    )  # fmt: skip
    assert set(alone.patterns[0]) - {Dense()} == {given}


def test_grids_are_for_more_than_text() -> None:
    def grids(layout: mmflex.TokenLayout, table: Any) -> int:
        patterns = candidates.for_layout(table, layout)
        return sum(isinstance(p.left if isinstance(p, candidates.Besides) else p, Grid) for p in patterns)

    text = mmflex.TokenLayout.text(400)
    mixed = mmflex.TokenLayout.from_segments([("text", 40), ("video", (8, 5, 5))])
    assert grids(text, candidates.paper()) == 0
    assert grids(mixed, candidates.paper()) == 24
    assert grids(text, (Grid(20), AShape())) == 1, "who gives one, gets it tried"


# ---- rivals ----------------------------------------------------------------------------------------------------------


def uniform(pattern: mmflex.Pattern, density: float, error: float, weight: float = 1.0) -> Option:
    return Option(pattern, "none", 10 * density, density, error, 1 - error, weight)


def test_rivals_are_the_best_of_each_family_within_the_budget() -> None:
    heads = (((uniform(Dense(), 1.0, 0.0),)) * 2,) * 4
    both = [
        *(uniform(AShape(local=100 * i), 0.1 * i, 0.5 - 0.1 * i) for i in (2, 3, 4)),
        uniform(VerticalSlash(100, 100), 0.2, 0.25),
    ]  # fmt: skip
    first = [*both, uniform(XAttention(threshold=0.8), 0.25, 0.22), uniform(BlockTopK(3), 0.1, 0.01)]
    second = [*both, uniform(XAttention(threshold=0.8), 0.33, 0.22, weight=4.0)]
    layers = {0: Done("", heads, tuple(first)), 2: Done("", heads, tuple(second))}
    found = [str(r.option.pattern) for r in rivals_of(layers, Budget.density(0.3), 1.0, 3)]
    assert found == ["AShape(local=300)", "VerticalSlash(vertical=100, slash=100)", "XAttention(threshold=0.8)"], (
        "AShape(local=400) is over the budget, BlockTopK makes no sense in layer 2"
    )
    assert len(rivals_of(layers, Budget.density(0.3), 1.0, 1)) == 1
    assert [str(r.option.pattern) for r in rivals_of(layers, Budget.cost(ms=16.8), 10.0, 2)] == [
        "VerticalSlash(vertical=100, slash=100)", "AShape(local=200)"
    ]  # fmt: skip


def test_a_checkpoint_has_what_rivals_are_chosen_from(tmp_path: Any) -> None:
    done = Done("x", ((uniform(Dense(), 1.0, 0.0),),), (uniform(AShape(local=200), 0.25, 0.5, 2.0),))
    assert Done.from_json(done.to_json(3)) == done


# ---- the model's own predictions -------------------------------------------------------------------------------------


def masked(model: Any, given: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """float64 log-probabilities [N, vocabulary] of a model that is given its mask, bool [N, N], as a tensor."""
    n = given.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    seen = seen if allowed is None else seen & allowed
    mask = torch.zeros(1, 1, n, n, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    with torch.no_grad():
        return model(given, attention_mask=mask).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("last", [None, 64])
def test_the_kl_is_that_of_a_model_with_its_masks_given(last: int | None) -> None:
    model, given, n = llama(2), ids(500), 500
    for parameter in model.parameters():
        parameter.data *= 4  # untrained, it attends to all keys alike
    tile = torch.arange(n) // 128
    first_and_own = (tile[:, None] == tile[None]) | (tile[None] == 0)
    pattern = AShape(128, 1)
    spec = dict.fromkeys(range(2), (pattern,) * model.config.num_attention_heads)
    (found,) = compare(model, inputs_of(model, given), None, {"some": spec}, backend="auto", last=last)
    exact = model.double()
    p, q = masked(exact, given, None), masked(exact, given, first_and_own)
    kl = (p.exp() * (p - q)).sum(-1)
    want = float((kl if last is None else kl[-last:]).mean())
    assert want > 1e-3
    assert found.kl == pytest.approx(want, rel=1e-3)
    assert 0 < found.density < 1


def test_one_pattern_on_all_heads_is_taken_where_it_is_better(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model, sample = llama(2), {"input_ids": ids(1600)}
    options: dict[str, Any] = {"budget": "density=0.8", "candidates": (AShape(), VerticalSlash(200, 300))}
    config = mmflex.search(model, sample, objective="outputs", **options)
    told = config.provenance["compared"]
    assert set(told) == {"searched", *(name for name in told if name.startswith(("AShape", "VerticalSlash")))}
    assert len(told) == 3
    best = min(told, key=lambda name: told[name]["KL"])
    assert config.provenance["taken"] == best
    assert f"taken: {best}" in " ".join(capsys.readouterr().err.split())

    def poor(held: Checkpoint) -> module.Chosen:
        return {n: [min(options, key=lambda o: o.density) for options in done.heads] for n, done in held.layers.items()}

    monkeypatch.setattr(module, "_chosen", poor)
    config = mmflex.search(model, sample, objective="outputs", **options)
    taken = config.provenance["taken"]
    assert taken != "searched"
    assert {str(p) for patterns in config.patterns.values() for p in patterns} == {taken}
    assert config.provenance["density"] == pytest.approx(config.provenance["compared"][taken]["density"], rel=0.02)
    kept = mmflex.search(model, sample, objective="outputs", rivals=0, progress=False, **options)
    assert "compared" not in kept.provenance
    assert kept.provenance["density"] < config.provenance["density"]


def test_what_cannot_be_compared_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(module, "compare", fails)
    sample = {"input_ids": ids(1200)}
    config = mmflex.search(llama(1), sample, budget="density=0.7", candidates=(AShape(),), objective="outputs")
    assert config.provenance["compared"] == "no compiler here"
    assert "not compared: no compiler here" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rivals is -1"):
        mmflex.search(llama(1), sample, rivals=-1)
