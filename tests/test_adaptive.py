"""Patterns that keep a share of the mass: FlexPrefill and XAttention.

Planted heads whose kind is known, shares that are reached where no budget binds, budgets that hold where one does,
and selection against the numpy oracle of `oracle_adaptive`. Odd shapes and inputs: test_adaptive_inputs.py.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import oracle
import oracle_adaptive
import pytest
import torch
from test_selection import TILE, Planted, diagonal, outer, recall

import mmflex
from mask_builders import BlockPeaks, FlexPrefill, VerticalSlash, XAttention, x_attention
from mask_builders.shares import Shortlist, fewest, top_share

SMALL = {"minimum": 0, "block_size": TILE, "last_q": 4 * TILE, "near": 1}
"""Of FlexPrefill on prompts of some hundred tokens: of which 100 nearest keys would be a good part."""


def found(plan: mmflex.Plan, name: str) -> torch.Tensor:
    """The set of a name, [B, H, ...]."""
    (table,) = (t for key, t in plan.selections.items() if key.split("@")[0] == name)
    return table


def random(n: int = 600, m: int | None = None, batch: int = 1, seed: int = 0, sharp: float = 2.0) -> list[torch.Tensor]:
    """q with 4 heads, k and v with 2: some attention goes far."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, n, 32, generator=generator) for h in (4, 2, 2))
    return [q[:, :, n - (m or n) :] * sharp, k, v]


# ---- the set of fewest ----


def by_sorting(mass: np.ndarray, wanted: float, always: np.ndarray) -> np.ndarray:
    out = always.copy()
    held = mass[always].sum()
    for i in sorted(np.flatnonzero(~always), key=lambda i: (-mass[i], i)):
        if held >= wanted or mass[i] <= 0:
            break
        out[i], held = True, held + mass[i]
    return out


@pytest.mark.parametrize("values", ["random", "ties", "heavy", "zeros", "tiny"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 1.0])
def test_fewest_is_a_prefix_of_the_sorted(values: str, share: float) -> None:
    """Exactly the prefix of a stable sort, with forced entries, empty ones and ties."""
    rng = np.random.default_rng(len(values))
    for n in (1, 2, 7, 500):
        mass = {
            "random": rng.random((3, n)),
            "ties": rng.integers(0, 3, (3, n)) / 4,
            "heavy": rng.random((3, n)) ** 4,
            "zeros": np.zeros((3, n)),
            "tiny": rng.integers(0, 3, (3, n)) * 1e-30,
        }[values].astype(np.float32)
        # Ranks leave out the last bit: no two values that differ in nothing else.
        mass = (mass.view(np.int32) & ~1).view(np.float32)
        always = rng.random((3, n)) < 0.1
        mass[(rng.random((3, n)) < 0.2) & ~always] = -1
        total = np.where(mass > 0, mass, 0).astype(np.float64).sum(-1)
        kept = fewest(torch.tensor(mass), torch.tensor(share * total)[:, None], torch.tensor(always)).numpy()
        for row in range(3):
            assert (kept[row] == by_sorting(mass[row].astype(np.float64), share * total[row], always[row])).all()


def test_a_shortlist_holds_the_heaviest_and_spreads_back() -> None:
    mass = torch.tensor([[0.1, 0.5, -1.0, 0.2, 0.2, 0.0], [-1.0, -1.0, -1.0, -1.0, 0.3, -1.0], [-1.0] * 6])
    listed = Shortlist.of(mass, 3, torch.tensor([True, False, False, False, False, False]))
    assert listed.index.tolist() == [[0, 1, 3], [4, 4, 4], [0, 0, 0]]
    assert torch.equal(listed.mass, torch.tensor([[0.1, 0.5, 0.2], [0.3, -1, -1], [-1, -1, -1]]))
    assert listed.first.tolist() == [[True, False, False], [False] * 3, [False] * 3]
    assert torch.allclose(listed.total[:, 0], torch.tensor([1.0, 0.3, 0.0]).double())
    whole = listed.spread(torch.ones(3, 3, dtype=torch.bool), 6)
    assert whole.tolist() == [[i in (0, 1, 3) for i in range(6)], [i == 4 for i in range(6)], [False] * 6]
    assert not listed.spread(torch.zeros(3, 3, dtype=torch.bool), 6).any()


def test_top_share_of_columns_with_room_for_less_than_the_forced() -> None:
    mass = torch.tensor([[0.0, 0.1, 0.5, 0.4]])
    first = torch.tensor([True, True, False, False])
    assert top_share(mass, 0.9, 1, first).tolist() == [[True, False, False, False]]
    assert top_share(mass, 0.9, 3, first).tolist() == [[True, True, True, False]]
    assert top_share(mass, 0.55, 4, first).tolist() == [[True, True, True, False]]
    assert top_share(mass, 0.55, 4, first, 4).tolist() == [[True, True, True, True]]


# ---- FlexPrefill: which kind a head is ----


def blocks_of_shared_content(n: int = 640) -> tuple[Planted, np.ndarray]:
    """Every block of queries wants the keys of one block alike: what a mean of a block tells."""
    planted, rng = Planted(n), np.random.default_rng(1)
    pairs = np.zeros((n, n), bool)
    for block in range(2, n // TILE):
        target = int(rng.integers(0, block))
        rows, keys = (np.arange(TILE) + i * TILE for i in (block, target))
        planted.link(rows, keys, 20.0)
        pairs |= outer(rows, keys, n)
    return planted, pairs


def columns_and_diagonal(n: int = 640) -> tuple[Planted, np.ndarray]:
    """Every query wants ten single keys: what a mean of a block does not tell."""
    planted = Planted(n)
    keys = np.random.default_rng(0).choice(np.arange(40, n - 64), 10, replace=False)
    planted.link(np.arange(n), keys)
    pairs = outer(np.arange(n), keys, n)
    pairs[: keys.min()] = False
    return planted, pairs


def test_a_head_of_blocks_goes_query_aware() -> None:
    planted, pairs = blocks_of_shared_content()
    pattern = FlexPrefill(0.95, 0.1, 64, 64, 6, **SMALL | {"last_q": TILE})
    kept, plan = recall(planted, pattern, pairs)
    assert kept >= 0.95
    assert found(plan, "blocks").any()
    assert not found(plan, "columns").any()
    assert not found(plan, "diagonals").any()
    assert found(plan, "blocks").sum(-1).max() <= 6
    assert plan.dense_mask()[0, 0].sum() < 0.2 * 640 * 640, "the map is sparse, and so is the mask"


def test_a_head_of_columns_goes_vertical_slash() -> None:
    planted, pairs = columns_and_diagonal()
    kept, plan = recall(planted, FlexPrefill(0.95, 0.1, 64, 256, 6, **SMALL), pairs)
    assert kept >= 0.95
    assert not found(plan, "blocks").any()
    wanted = np.flatnonzero(pairs.any(0))
    assert found(plan, "columns")[0, 0][wanted].all()
    assert found(plan, "columns")[0, 0].sum() <= 30 + 10 + 2, "the forced 30, the ten, and hardly any besides"


def test_a_head_of_a_diagonal_goes_vertical_slash() -> None:
    planted, pairs = diagonal(700, 311)
    kept, plan = recall(planted, FlexPrefill(0.95, 0.1, 64, 20 * TILE, 6, **SMALL), pairs)
    assert kept >= 0.95
    assert not found(plan, "blocks").any()
    chosen = found(plan, "diagonals")[0, 0].nonzero().flatten().tolist()
    assert {311 // TILE, 311 // TILE + 1} <= set(chosen)
    assert len(chosen) <= 1 + 2 + 2


def test_every_head_of_a_call_decides_for_itself() -> None:
    """Prompts and heads of both kinds in one call, with one pattern."""
    made = (blocks_of_shared_content()[0], columns_and_diagonal()[0])
    kinds = [[0, 1, 1, 0], [1, 1, 0, 1]]
    q, k = (torch.cat([torch.cat([getattr(made[i], s)[:, :1] for i in row], 1) for row in kinds]) for s in "qk")
    pattern = FlexPrefill(0.95, 0.1, 64, 256, 6, **SMALL | {"last_q": TILE})
    plan = mmflex.plan(q, k, pattern, backend="reference", block_size=TILE)
    aware = torch.tensor(kinds) == 0
    assert torch.equal(found(plan, "blocks").any(-1).any(-1), aware)
    assert torch.equal(found(plan, "columns").any(-1), ~aware)
    assert torch.equal(found(plan, "diagonals").any(-1), ~aware)
    assert oracle.check_selection(plan, q, k) == 8


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_tau_at_its_ends_fixes_the_kind(tau: float) -> None:
    q, k, _ = random()
    plan = mmflex.plan(q, k, FlexPrefill(0.9, tau, 64, 64, 4, **SMALL), backend="reference", block_size=TILE)
    assert bool(found(plan, "blocks").any(-1).any(-1).all()) == (tau == 1.0)
    assert bool(found(plan, "columns").any(-1).all()) == (tau == 0.0)


# ---- FlexPrefill: how much ----


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_lines_hold_gamma_of_the_last_queries_mass(gamma: float) -> None:
    """On random input, with room: each of the two holds gamma of the last queries' attention, and not much more."""
    q, k, _ = random(sharp=3.0)
    pattern = FlexPrefill(gamma, 0.0, 600, 600, 4, **SMALL)
    plan = mmflex.plan(q, k, pattern, backend="reference", block_size=TILE)
    columns, diagonals = found(plan, "columns"), found(plan, "diagonals")
    last = plan.state.estimates[next(iter(plan.state.estimates))][0]
    total = last.vertical.sum(-1)
    assert torch.allclose(total, torch.tensor(64.0), rtol=1e-4)
    for mass, chosen in ((last.vertical, columns), (last.block_diagonals, diagonals)):
        held = (mass * chosen).sum(-1)
        assert (held >= (gamma - 1e-5) * mass.sum(-1)).all()
        free = chosen & (torch.arange(mass.shape[-1]) >= (30 if mass.shape[-1] == 600 else 1))
        least = torch.where(free, mass, torch.inf).amin(-1)
        assert (held - least < (gamma + 1e-5) * mass.sum(-1)).all(), "one less would have been enough"
    causal = np.broadcast_to(np.tri(600, dtype=bool), (1, 4, 600, 600))
    weights, _ = oracle.softmax(q, k, torch.eye(600).expand(1, 2, -1, -1), causal)
    kept = (weights * plan.dense_mask().numpy())[:, :, -64:].sum((2, 3))
    assert (kept >= gamma * 64 - 1e-3).all(), "columns alone hold gamma already"


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_the_map_holds_gamma_as_a_whole_not_row_by_row(gamma: float) -> None:
    q, k, _ = random(sharp=6.0)
    pattern = FlexPrefill(gamma, 1.0, 64, 64, 64, **SMALL)
    plan = mmflex.plan(q, k, pattern, backend="reference", block_size=TILE)
    table = found(plan, "blocks")[0, 0].numpy()
    prompt = oracle.Prompt.of(plan.layout, 0)
    blocks = oracle_adaptive.Blocks(q[0, 0].double().numpy(), k[0, 0].double().numpy(), prompt, (None, None), TILE)
    mass = blocks.pooled(*table.shape, plan.scale)
    assert gamma * mass.sum() - 1e-3 <= mass[table].sum() <= gamma * mass.sum() + 1.0
    shares = (mass * table).sum(1)
    assert shares.min() < gamma - 0.05
    assert shares.max() > gamma + 0.05


def test_a_budget_that_binds_keeps_the_heaviest() -> None:
    """Exactly as many as the budget, those that top-k would keep."""
    q, k, _ = random()
    lines = FlexPrefill(0.999, 0.0, 77, 12 * TILE, 4, **SMALL)
    plan = mmflex.plan(q, k, lines, backend="reference", block_size=TILE)
    same = mmflex.plan(q, k, VerticalSlash(77, 12 * TILE, 4 * TILE, near=1), backend="reference", block_size=TILE)
    assert torch.equal(found(plan, "columns"), found(same, "columns"))
    assert torch.equal(found(plan, "diagonals"), found(same, "diagonals"))
    blocks = FlexPrefill(0.999, 1.0, 77, 64, 5, **SMALL)
    plan = mmflex.plan(q, k, blocks, backend="reference", block_size=TILE)
    table = found(plan, "blocks")
    assert torch.equal(table.sum(-1), torch.arange(1, table.shape[-1] + 1).clamp(max=5).expand(table.shape[:-1]))
    assert oracle.check_selection(plan, q, k) == 4


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_the_minimum_is_kept_where_less_would_do(tau: float) -> None:
    """A gamma of next to nothing leaves the forced ones and the minimum."""
    q, k, _ = random()
    pattern = FlexPrefill(1e-6, tau, 200, 400, 8, minimum=100, block_size=TILE, last_q=32, near=40)
    plan = mmflex.plan(q, k, pattern, backend="reference", block_size=TILE)
    if tau:
        count = found(plan, "blocks").sum(-1)
        assert torch.equal(count[0, 0], torch.arange(1, count.shape[-1] + 1).clamp(max=-(-100 // TILE)))
    else:
        assert (found(plan, "columns").sum(-1) == 100).all()
        assert (found(plan, "diagonals").sum(-1) == -(-100 // TILE)).all()


# ---- XAttention ----


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_antidiagonals_find_blocks_columns_and_diagonals(stride: int) -> None:
    """What mean-pooling averages away (a column, a diagonal), an antidiagonal crosses."""
    pattern = XAttention(stride, 0.9, 14, TILE)
    for planted, pairs in (blocks_of_shared_content(), columns_and_diagonal(), diagonal(700, 311)):
        planted.q = planted.q * (stride / 2)  # a run's score is a mean: a stride-th of that of one strong pair
        kept, plan = recall(planted, pattern, pairs)
        assert kept >= 0.9
        assert found(plan, "blocks").sum(-1).max() <= 14


@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.95])
def test_every_row_holds_its_threshold(threshold: float) -> None:
    q, k, _ = random(sharp=6.0)
    pattern = XAttention(4, threshold, 64, TILE)
    plan = mmflex.plan(q, k, pattern, backend="reference", block_size=TILE)
    table = found(plan, "blocks")[0, 1].numpy()
    prompt = oracle.Prompt.of(plan.layout, 0)
    blocks = oracle_adaptive.Blocks(q[0, 1].double().numpy(), k[0, 0].double().numpy(), prompt, (None, None), TILE)
    mass = blocks.antidiagonal(*table.shape, 4, plan.scale).sum(1)
    share = (mass * table).sum(1) / mass.sum(1)
    assert share.min() >= threshold - 1e-5
    assert oracle.check_selection(plan, q, k) == 4
    assert table.sum() < np.tri(len(table)).sum(), "not all blocks are needed"


def test_a_budget_of_blocks_keeps_the_heaviest_of_each_row() -> None:
    q, k, _ = random()
    plan = mmflex.plan(q, k, XAttention(4, 1.0, 3, TILE, near=1), backend="reference", block_size=TILE)
    table = found(plan, "blocks")
    assert torch.equal(table.sum(-1), torch.arange(1, table.shape[-1] + 1).clamp(max=3).expand(table.shape[:-1]))
    assert table[..., 0].all()
    assert table.diagonal(dim1=2, dim2=3).all()
    assert oracle.check_selection(plan, q, k) == 4


@pytest.mark.parametrize("peak", [0.01, 0.05, 0.2])
def test_a_block_that_one_run_of_queries_looks_for_is_kept(peak: float) -> None:
    q, k, _ = random(sharp=6.0)
    plan = mmflex.plan(q, k, BlockPeaks(peak, 4, 64, TILE), backend="reference", block_size=TILE)
    table = found(plan, "blocks")[0, 1].numpy()
    prompt = oracle.Prompt.of(plan.layout, 0)
    blocks = oracle_adaptive.Blocks(q[0, 1].double().numpy(), k[0, 0].double().numpy(), prompt, (None, None), TILE)
    peaks = blocks.peaks(*table.shape, 4, plan.scale)
    assert peaks[table < 0.5].max() < peak * (1 + 1e-5)
    assert oracle.check_selection(plan, q, k) == 4
    mass = found(mmflex.plan(q, k, XAttention(4, 0.8, 64, TILE), backend="reference", block_size=TILE), "blocks")
    assert table.sum() < np.tri(len(table)).sum(), "not all blocks are needed"
    assert not np.array_equal(table, mass[0, 1].numpy()), "a share of the mass asks for others"


def test_heads_of_one_cut_differ_in_what_they_compute() -> None:
    """A head that looks everywhere has no peak; one that looks for single blocks has one in each."""
    q, k, _ = random(1024)
    q[:, :2] = 0.0  # attention is even: a block of 16 keys holds 16/1024 of it at the end
    q[:, 2:] *= 8.0
    pattern = BlockPeaks(0.1, 4, 64, TILE, near=1)
    table = found(mmflex.plan(q, k, pattern, backend="reference", block_size=TILE), "blocks")
    kept = table.float().mean((0, 2, 3))
    assert table[:, :2, 16:].sum(-1).max() == 2, "the first block and the own one alone"
    assert kept[2:].min() > 2 * kept[:2].max()


def test_scores_in_chunks_are_those_of_one_piece() -> None:
    """The same selection with a few scores at a time, and nothing larger than they allow."""
    q, k, _ = random(500, 333, batch=2)
    pattern = XAttention(4, 0.8, 6, TILE)
    whole = mmflex.plan(q, k, pattern, backend="reference", block_size=TILE)
    held: list[int] = []
    run_mass = x_attention.run_mass

    def watched(q: torch.Tensor, k: torch.Tensor, *more: Any) -> torch.Tensor:
        held.append(q.shape[:3].numel() * k.shape[2])
        return run_mass(q, k, *more)

    with mock.patch.object(x_attention, "_SCORES", 20_000), mock.patch.object(x_attention, "run_mass", watched):
        parts = mmflex.plan(q, k, pattern, backend="reference", block_size=TILE)
    assert len(held) > 5
    assert max(held) <= 20_000
    assert torch.equal(found(parts, "blocks"), found(whole, "blocks"))


def test_keys_after_a_chunk_of_queries_are_not_multiplied() -> None:
    """Causality halves the work: products are as long as the last key block that a chunk sees."""
    q, k, _ = random(512)
    lengths: list[int] = []
    run_mass = x_attention.run_mass

    def watched(q: torch.Tensor, k: torch.Tensor, *more: Any) -> torch.Tensor:
        lengths.append(k.shape[2])
        return run_mass(q, k, *more)

    with mock.patch.object(x_attention, "_SCORES", 1), mock.patch.object(x_attention, "run_mass", watched):
        mmflex.plan(q, k, XAttention(4, 0.8, 6, TILE), backend="reference", block_size=TILE)
    assert lengths == [(i + 1) * TILE // 4 for i in range(512 // TILE)]
