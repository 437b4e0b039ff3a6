"""Prism, FlashPrefill, ProxyAttn, Stem's refinements of block top-k and TriangleMix: what each is for is found.

Selection against the numpy oracle on random cases: test_exactness.py, test_adaptive_inputs.py; here planted heads whose
structure the pattern's own idea finds, and others miss.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from test_adaptive import found, random
from test_selection import DIM, TILE, Planted, outer, recall

import mmflex
from mask_builders import (
    AShape,
    BlockTopK,
    Dense,
    FlashPrefill,
    Prism,
    ProxyAttn,
    TriShape,
    flash_prefill,
    proxy_attn,
    triangle_mix,
)

torch.set_num_threads(1)
SMALL = {"block_size": TILE, "near": 1}


def mask_of(plan: mmflex.Plan, head: int = 0) -> np.ndarray:
    return plan.dense_mask()[0, head].numpy()


# ---- Prism -----------------------------------------------------------------------------------------------------------


def rotary(n: int, distance: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k [1, 1, N, 64] of a head that looks ``distance`` back by its fast pairs, beside slow ones full of content:
    channels i and i + 32 turn by 0.25 radians a token and less."""
    generator = torch.Generator().manual_seed(seed)
    rate = 0.25 * 0.75 ** torch.arange(32)
    angle = torch.arange(n)[:, None] * rate
    turned = torch.randn(32, generator=generator) * torch.where(torch.arange(32) < 8, 3.0, 0.0)

    def wave(shift: int) -> torch.Tensor:
        at = angle + shift * rate
        return torch.cat([turned * at.cos(), turned * at.sin()], 1)

    q, k = wave(0), wave(distance)
    for t in (q, k):
        t[:, [*range(16, 32), *range(48, 64)]] += 1.2 * torch.randn(n, 32, generator=generator)
    # Content drifts: means of slow channels differ from block to block, wherever the head looks.
    for t in (q, k):
        drift = 4.0 * torch.randn(-(-n // TILE), 32, generator=generator).repeat_interleave(TILE, 0)[:n]
        t[:, [*range(16, 32), *range(48, 64)]] += drift
    return q[None, None], k[None, None]


def test_the_high_band_knows_where_a_block_is() -> None:
    """Pooling shrinks the fast pairs below the content of the slow ones; the high band's temperature makes up for
    it."""
    n, distance = 800, 5 * TILE
    q, k = rotary(n, distance)
    rows, blocks = np.arange(distance // TILE + 1, n // TILE), n // TILE
    options = {"backend": "reference", "block_size": TILE}
    table = found(mmflex.plan(q, k, Prism(0.5, 3, near=0, block_size=TILE), **options), "blocks")[0, 0]
    pooled = found(mmflex.plan(q, k, BlockTopK(6, TILE, near=0), **options), "blocks")[0, 0]
    hit = table[rows, rows - distance // TILE].float().mean()
    assert hit > 0.9, f"{hit:.0%} of the blocks that the head looks at"
    assert pooled[rows, rows - distance // TILE].float().mean() < 0.6, "even with twice the blocks"
    assert table.sum(-1).max() <= 2 * 3
    assert table.shape == (blocks, blocks)


def test_bands_of_rotary_channels() -> None:
    high, low = Prism().bands(128)
    assert sorted(high) == [*range(32), *range(64, 96)]
    assert sorted(low) == [*range(16, 64), *range(80, 128)]
    high, low = Prism(pairs="interleaved", rotary_dim=8).bands(16)
    assert sorted(high) == [0, 1, 2, 3]
    assert sorted(low) == [*range(2, 16)], "channels that are not rotated are slow"
    assert Prism(rotary_dim=200).bands(17) == Prism().bands(17)


def test_a_band_that_pooling_has_emptied_is_no_error() -> None:
    q, k, _ = random(200)
    q[..., [*range(8), *range(16, 24)]] = 0.0
    plan = mmflex.plan(q, k, Prism(0.9, 5, TILE), backend="reference", block_size=TILE)
    assert oracle.check_selection(plan, q, k) == 4
    nothing = mmflex.plan(q * 0, k, Prism(0.9, 5, TILE), backend="reference", block_size=TILE)
    assert nothing.dense_mask().any(-1).all()


# ---- FlashPrefill ----------------------------------------------------------------------------------------------------


def single_queries(n: int = 640) -> tuple[Planted, np.ndarray]:
    """One query of every block wants the keys of one block alike; the others want none."""
    planted, rng = Planted(n), np.random.default_rng(3)
    pairs = np.zeros((n, n), bool)
    for block in range(10, n // TILE):
        target = int(rng.integers(4, block - 4))
        rows, keys = np.array([block * TILE + 5]), np.arange(TILE) + target * TILE
        planted.link(rows, keys, 22.0)
        pairs |= outer(rows, keys, n)
    return planted, pairs


def test_a_single_query_of_a_block_is_heard() -> None:
    """A mean over the block's queries drowns it; a sum of exponentials does not."""
    planted, pairs = single_queries()
    spec = FlashPrefill(0.3, 3, near=1, sink=1, last=0, block_size=TILE)
    assert recall(planted, spec, pairs)[0] >= 0.95
    # The others have a taste of their own, weak but common.
    blocks = torch.randn(640 // TILE, 1, generator=torch.Generator().manual_seed(1)).repeat_interleave(TILE, 0)
    planted.q[:, :, ~pairs.any(1)] += planted.basis[-1] * 6
    planted.k += planted.basis[-1] * blocks * 6
    assert recall(planted, spec, pairs)[0] >= 0.95
    assert recall(planted, BlockTopK(3, TILE, near=1), pairs)[0] < 0.5


def single_keys(n: int = 640) -> tuple[Planted, np.ndarray]:
    """All queries want five single keys, far from the others of their blocks, whose mean hides them."""
    planted = Planted(n)
    keys = np.array([101, 203, 254, 310, 399])
    planted.link(np.arange(n), keys, 14.0)
    for key in keys:  # neighbours point away by as much, so that the block's mean says nothing
        block = np.setdiff1d(np.arange(key // TILE * TILE, key // TILE * TILE + TILE), keys)
        planted.k[:, :, block] -= planted.basis[0] * (14.0 * DIM**0.5) ** 0.5 / len(block)
    pairs = outer(np.arange(n), keys, n)
    pairs[: keys.max() + 1] = False
    return planted, pairs


def test_the_rescue_branch_finds_single_keys_that_means_hide() -> None:
    planted, pairs = single_keys()
    plain = FlashPrefill(0.9, 9, near=1, sink=1, last=0, block_size=TILE)
    rescued = FlashPrefill(0.9, 9, 0.5, near=1, sink=1, last=0, block_size=TILE)
    assert recall(planted, rescued, pairs)[0] >= 0.95
    assert recall(planted, plain, pairs)[0] < 0.5


def test_the_cut_is_by_the_heaviest_block_and_not_by_a_share() -> None:
    """A flat row keeps all it has room for, a peaked one its peak."""
    q, k, _ = random(640)
    spec = FlashPrefill(0.5, 12, near=1, sink=0, last=0, block_size=TILE)
    flat = found(mmflex.plan(q * 0, k, spec, backend="reference", block_size=TILE), "blocks")[0, 0]
    count = torch.arange(1, 641 // TILE + 1)
    assert torch.equal(flat.sum(-1), count.clamp(max=12))
    planted, _ = single_queries()
    peaked = found(mmflex.plan(planted.q, planted.k, spec, backend="reference", block_size=TILE), "blocks")[0, 0]
    assert peaked[10:].sum(-1).float().mean() < 4


def test_last_queries_see_everything() -> None:
    q, k, _ = random(333)
    spec = FlashPrefill(1.0, 1, near=1, sink=0, last=17, block_size=TILE)
    mask = mask_of(mmflex.plan(q, k, spec, backend="reference", block_size=TILE))
    assert (mask[-17:].sum(1) == np.arange(317, 334)).all()


# ---- ProxyAttn -------------------------------------------------------------------------------------------------------


def needles(n: int = 640, heads: int = 4, strength: float = 12.0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Single keys that the heads of a KV head want together, each a little; head 0 looks at nothing else, the others at
    everything a little more."""
    planted = Planted(n)
    keys = np.random.default_rng(0).choice(np.arange(40, n - 64), 6, replace=False)
    planted.link(np.arange(n), keys, strength)
    q, k = planted.q[:, :1].repeat(1, heads, 1, 1), planted.k[:, :1]
    for head in range(1, heads):
        q[:, head] *= 1.0 - 0.2 * head
    return q, k, np.sort(keys)


def test_the_greatest_weight_decides_and_heads_share_it() -> None:
    q, k, keys = needles()
    spec = ProxyAttn(0.5, 24, 9 * TILE, **SMALL)
    plan = mmflex.plan(q, k, spec, backend="reference", block_size=TILE)
    table = found(plan, "blocks")[0]
    late = slice((keys.max() + TILE) // TILE + 1, None)
    assert table[:, late][:, :, keys // TILE].all(), "a head misses a needle"
    assert table.sum(-1).max() <= 24
    assert oracle.check_selection(plan, q, k) == 4


def test_every_head_has_a_budget_of_its_own() -> None:
    q, k, _ = needles()
    count = found(mmflex.plan(q, k, ProxyAttn(0.9, 99, 0, **SMALL), backend="reference", block_size=TILE), "blocks")
    budgets = count.sum(-1)[0, :, -1].tolist()
    assert budgets == sorted(budgets), "the flatter a head's own attention, the more blocks"
    assert budgets[-1] >= 2 * budgets[0]
    least = found(mmflex.plan(q, k, ProxyAttn(0.9, 99, 320, **SMALL), backend="reference", block_size=TILE), "blocks")
    assert torch.equal(least.sum(-1)[0, 0], torch.arange(1, 41).clamp(max=20))
    bound = found(mmflex.plan(q, k, ProxyAttn(0.9, 7, 320, **SMALL), backend="reference", block_size=TILE), "blocks")
    assert bound.sum(-1).max() == 7


def test_proxies_are_of_all_heads_whichever_have_the_pattern() -> None:
    q, k, _ = random(400)
    spec = ProxyAttn(0.7, 9, 0, **SMALL)
    options = {"backend": "reference", "block_size": TILE}
    whole = mmflex.plan(q, k, spec, **options).dense_mask()
    for heads in ((0,), (3,), (1, 2), (0, 1, 3)):
        mixed = [spec if h in heads else AShape(16, 32) for h in range(4)]
        part = mmflex.plan(q, k, mixed, **options).dense_mask()
        assert torch.equal(part[:, list(heads)], whole[:, list(heads)])


def test_budgets_go_by_the_queries_that_are_given_to_estimate_from() -> None:
    q, k, _ = random(400)
    spec, options = ProxyAttn(0.7, 9, 0, **SMALL), {"backend": "reference", "block_size": TILE}
    whole = mmflex.plan(q, k, spec, **options).dense_mask()
    for first, end in ((0, 160), (160, 400)):
        part = mmflex.plan(q[:, :, first:end], k, spec, query_start=first, estimate_from=(q, None), **options)
        assert torch.equal(part.dense_mask(), whole[:, :, first:end])
    alone = mmflex.plan(q[:, :, :160], k, spec, query_start=0, **options).dense_mask()
    assert not torch.equal(alone, whole[:, :, :160])


# ---- Stem's refinements of block top-k -------------------------------------------------------------------------------


def test_budgets_fall_along_the_prompt() -> None:
    q, k, _ = random(50 * TILE)
    plan = mmflex.plan(q, k, BlockTopK(20, TILE, 1, decay=0.7), backend="reference", block_size=TILE)
    count = found(plan, "blocks").sum(-1)
    wanted = [min(i + 1, 20 if i <= 20 else int(20 - 6 * (i - 20) / 29 + 1e-9)) for i in range(50)]
    assert count[0, 3].tolist() == wanted
    assert wanted[-1] == 14
    even = mmflex.plan(q, k, BlockTopK(20, TILE, 1), backend="reference", block_size=TILE)
    early = found(even, "blocks")[:, :, :21]
    assert torch.equal(found(plan, "blocks")[:, :, :21], early)
    assert not (found(plan, "blocks") & ~found(even, "blocks")).any(), "of the same ranking, fewer"


def test_blocks_of_great_values_come_first() -> None:
    q, k, v = random(40 * TILE, sharp=0.1)
    v[:, :, 7 * TILE + 3] *= 30
    v[:, :, 22 * TILE] *= 30
    spec, options = BlockTopK(4, TILE, 1, values=5.0), {"backend": "reference", "block_size": TILE}
    table = found(mmflex.plan(q, k, spec, v=v, **options), "blocks")
    assert table[:, :, 8:, 7].all()
    assert table[:, :, 23:, 22].all()
    without = found(mmflex.plan(q, k, BlockTopK(4, TILE, 1), **options), "blocks")
    assert not without[:, :, 23:, 22].all()
    out = mmflex.attention(q, k, v, BlockTopK(1, values=0.2), backend="reference")
    assert out.isfinite().all()


def test_values_are_asked_for_by_name() -> None:
    q, k, v = random(100)
    with pytest.raises(ValueError, match=r"PooledBlocks.*values=True.*give v="):
        mmflex.plan(q, k, BlockTopK(4, TILE, values=0.2), backend="reference")
    bad = v.clone()
    bad[:, :, 40] = float("nan")
    plan = mmflex.plan(q, k, BlockTopK(2, TILE, 1, values=0.2), v=bad, backend="reference", block_size=TILE)
    out, mask = plan.attend(q, k, bad), plan.dense_mask()
    assert out[~mask[..., 40]].isfinite().all()


# ---- TriangleMix -----------------------------------------------------------------------------------------------------


def test_triangle_mix_is_a_spec_by_layers() -> None:
    spec = triangle_mix(28, 20)
    assert sorted(spec) == list(range(28))
    assert all(spec[i] == Dense() for i in range(20))
    assert all(spec[i] == TriShape(8, 512, 128) for i in range(20, 28))
    assert triangle_mix(3)[1] == Dense()
    assert triangle_mix(3)[2] == TriShape(8, 512, 128)
    assert triangle_mix(2, 0, upper=AShape())[0] == AShape()
    assert triangle_mix(2, 2, lower=BlockTopK()) == {0: BlockTopK(), 1: BlockTopK()}
    config = mmflex.Config.of(spec, layers=28, heads=4)
    assert config.patterns[27] == (TriShape(8, 512, 128),) * 4


@pytest.mark.parametrize(("layers", "first", "words"), [(0, None, ["0 layers"]), (4, 5, ["5", "4"]), (4, -1, ["-1"])])
def test_triangle_mix_refuses(layers: int, first: int | None, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"triangle_mix") as error:
        triangle_mix(layers, first)
    assert all(word in str(error.value) for word in words)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "spec"),
    [(flash_prefill, FlashPrefill(0.2, 6, 0.3, 20, 16, 0, TILE)), (proxy_attn, ProxyAttn(0.8, 6, 0, **SMALL))],
    ids=["FlashPrefill", "ProxyAttn"],
)
def test_strips_are_those_of_one_piece(module: object, spec: mmflex.Pattern) -> None:
    """The same selection with a few scores at a time, in chunks, for two prompts."""
    q, k, _ = random(500, 333, batch=2)
    whole = mmflex.plan(q, k, spec, backend="reference", block_size=TILE)
    with mock.patch.object(module, "_STRIP", 20_000):
        parts = mmflex.plan(q, k, spec, backend="reference", block_size=TILE)
    assert torch.equal(found(parts, "blocks"), found(whole, "blocks"))
