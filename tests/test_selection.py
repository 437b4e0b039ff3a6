"""Planted structure is found: columns, diagonals, grids and modalities that look elsewhere.

Keys and queries are built so that attention goes to known pairs; the *recall* of a plan is the share of that attention
mass (of full causal softmax, on the planted pairs, over all queries) that its mask keeps. At the budget that fits the
structure it must be at least 0.99, and without the right pattern clearly less: there is something to find.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

import mmflex
from mask_builders import AShape, BlockTopK, Boundary2D, Grid, QBoundary, VerticalSlash

DIM = 64
TILE = 16
STRONG = 14.0
"""Score of a planted pair over the noise of the others."""


class Planted:
    """q and k of one head whose scores are ``STRONG`` on chosen pairs and near 0 elsewhere.

    Every structure has directions of its own; a query and a key are the sums of the directions that they take part in.
    """

    def __init__(self, n: int, seed: int = 0, heads: int = 2) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0]
        self.q, self.k = (0.05 * torch.randn(1, heads, n, DIM, generator=generator) for _ in range(2))
        self.used = 0

    def link(self, queries: np.ndarray, keys: np.ndarray, strength: float = STRONG) -> None:
        """Every one of the queries wants every one of the keys."""
        direction = self.basis[self.used] * (strength * DIM**0.5) ** 0.5
        self.used += 1
        self.q[:, :, queries] += direction
        self.k[:, :, keys] += direction

    def rotate(self, stride: int, where: np.ndarray, strength: float = STRONG, sharp: int = 12) -> None:
        """Tokens at equal residues want each other: sums of cosines of the place modulo the stride."""
        place = torch.arange(len(where))
        for harmonic in range(1, sharp + 1):
            angle = 2 * np.pi * harmonic * place / stride
            wave = torch.outer(angle.cos(), self.basis[self.used]) + torch.outer(angle.sin(), self.basis[self.used + 1])
            self.used += 2
            wave = wave * (strength * DIM**0.5 / sharp) ** 0.5
            self.q[:, :, where] += wave
            self.k[:, :, where] += wave


def weights(planted: Planted) -> np.ndarray:
    """float64 [N, N], full causal attention of head 0."""
    q, k = planted.q[0, 0].double().numpy(), planted.k[0, 0].double().numpy()
    score = np.where(np.tri(len(q), dtype=bool), q @ k.T * DIM**-0.5, -np.inf)
    score = np.exp(score - score.max(-1, keepdims=True))
    return score / score.sum(-1, keepdims=True)


def recall(
    planted: Planted, spec: mmflex.Pattern, pairs: np.ndarray, layout: mmflex.TokenLayout | None = None
) -> tuple[float, mmflex.Plan]:
    """Kept share of the attention mass on the planted pairs bool [N, N]; the plan."""
    plan = mmflex.plan(planted.q, planted.k, spec, layout=layout, backend="reference", block_size=TILE)
    mask = plan.dense_mask()[0, 0].numpy()
    mass = weights(planted) * (pairs & np.tri(len(pairs), dtype=bool))
    assert mass.sum() > 0.5 * pairs.any(1).sum(), "the planted pairs hold most of the attention of their queries"
    return float((mass * mask).sum() / mass.sum()), plan


def outer(rows: np.ndarray, keys: np.ndarray, n: int) -> np.ndarray:
    out = np.zeros((n, n), bool)
    out[np.ix_(rows, keys)] = True
    return out


def test_columns_that_every_query_wants() -> None:
    """40 key columns all over the prompt: vertical-slash keeps them with room for 40 and its 30 forced ones."""
    n = 700
    planted = Planted(n)
    keys = np.random.default_rng(0).choice(np.arange(40, n - 64), 40, replace=False)
    planted.link(np.arange(n), keys)
    pairs = outer(np.arange(n), keys, n)
    pairs[: keys.min()] = False
    kept, plan = recall(planted, VerticalSlash(70, 128), pairs)
    assert kept >= 0.99
    assert plan.dense_mask()[0, 0, -1].sum() <= 70 + 128 + 2 * TILE
    assert recall(planted, AShape(32, 192), pairs)[0] < 0.7


def test_one_column() -> None:
    """A single key is found by a budget of one above the forced 30."""
    n = 500
    planted = Planted(n)
    planted.link(np.arange(n), np.array([217]))
    pairs = outer(np.arange(217, n), np.array([217]), n)
    assert recall(planted, VerticalSlash(31, 0), pairs)[0] >= 0.99
    assert recall(planted, VerticalSlash(30, 0), pairs)[0] < 0.01


def diagonal(n: int, distance: int, seed: int = 0) -> tuple[Planted, np.ndarray]:
    """Every query wants the key ``distance`` before it, and no other: one random code per token."""
    planted = Planted(n, seed)
    codes = torch.nn.functional.normalize(
        torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed + 1)), dim=-1
    )
    codes = codes * (22.0 * DIM**0.5) ** 0.5
    planted.k[:, :] += codes
    planted.q[:, :, distance:] += codes[: n - distance]
    pairs = np.zeros((n, n), bool)
    pairs[np.arange(distance, n), np.arange(n - distance)] = True
    return planted, pairs


@pytest.mark.parametrize("distance", [128, 250, 311, 403])
def test_a_diagonal(distance: int) -> None:
    """A distance between tiles lies on two block diagonals: vertical-slash keeps both, next to the 8 nearest."""
    planted, pairs = diagonal(700, distance)
    kept, _ = recall(planted, VerticalSlash(0, (8 + 2) * TILE), pairs)
    assert kept >= 0.99
    assert recall(planted, AShape(32, 100), pairs)[0] < 0.15


def grid(n: int, stride: int, phase: int, rows: np.ndarray | None = None) -> tuple[Planted, np.ndarray]:
    planted = Planted(n)
    keys = np.arange(phase, n, stride)
    rows = np.arange(n) if rows is None else rows
    planted.link(rows, keys)
    pairs = outer(rows, keys, n)
    pairs[:phase] = False
    return planted, pairs


@pytest.mark.parametrize(("stride", "phase"), [(25, 7), (32, 0), (47, 46), (64, 13), (101, 60)])
def test_a_grid_of_columns_with_stride_and_phase_searched(stride: int, phase: int) -> None:
    planted, pairs = grid(1100, stride, phase)
    spec = Grid("search", columns=True, local=32, sink=16, last_q=32, shortest=16, longest=200)
    kept, plan = recall(planted, spec, pairs)
    found = {name.split("@")[0]: int(t[0, 0]) for name, t in plan.selections.items()}
    assert found == {"stride": stride, "phase": phase}
    assert kept >= 0.99
    wrong = Grid(stride + 1, columns=True, local=32, sink=16, last_q=32)
    assert recall(planted, wrong, pairs)[0] < 0.5


@pytest.mark.parametrize("phase", [0, 5, 29])
def test_a_grid_of_columns_with_the_phase_searched(phase: int) -> None:
    planted, pairs = grid(700, 30, phase)
    kept, plan = recall(planted, Grid(30, columns=True, local=32, sink=16, last_q=32), pairs)
    assert [int(t[0, 0]) for name, t in plan.selections.items() if name.startswith("phase")] == [phase]
    assert kept >= 0.99
    assert recall(planted, Grid(30, columns=True, local=32, sink=16, phase=(phase + 3) % 30), pairs)[0] < 0.4


@pytest.mark.parametrize("stride", [31, 48, 80])
def test_a_grid_of_diagonals_with_the_stride_searched(stride: int) -> None:
    """Tokens at equal residues want each other, as the same cell of every frame does."""
    n = 1000
    planted = Planted(n)
    planted.rotate(stride, np.arange(n), strength=22.0)
    place = np.arange(n)
    pairs = (place[:, None] - place) % stride == 0
    spec = Grid("search", columns=False, slash=True, local=16, sink=16, last_q=64, shortest=16, longest=200)
    kept, plan = recall(planted, spec, pairs)
    assert [int(t[0, 0]) for name, t in plan.selections.items() if name.startswith("stride")] == [stride]
    assert kept >= 0.99
    wrong = Grid(stride + 1, columns=False, slash=True, local=16, sink=16)
    assert recall(planted, wrong, pairs)[0] < 0.5


VIDEO = mmflex.TokenLayout.from_segments(
    [
        ("text", 40),
        ("video", (12, 5, 5), {"timestamps": (3, 6, 2, 7, 1, 4, 9, 0, 5, 3, 8, 2)}),
        ("text", 100),
        ("video", (8, 5, 5)),
        ("text", 80),
    ]
)
"""Text with video in between; the first video's frames are interrupted by timestamps of unequal length."""


def modality(number: int) -> np.ndarray:
    return np.flatnonzero(VIDEO.modality[0] == number)


def test_q_boundary_finds_what_text_and_video_each_want() -> None:
    """Text looks at some columns, video at others. The last queries are text, so that video's are missed."""
    n = VIDEO.length
    text, video = modality(0), modality(2)
    rng = np.random.default_rng(0)
    for_text, for_video = rng.choice(np.arange(32, 400), (2, 12), replace=False)
    planted = Planted(n)
    planted.link(text, for_text)
    planted.link(video, for_video)
    rows = np.arange(60, n)
    pairs = outer(np.intersect1d(text, rows), for_text, n) | outer(np.intersect1d(video, rows), for_video, n)
    pairs[: max(for_text.min(), for_video.min())] = False
    spec = VerticalSlash(30 + 12, 0, last_q=32)
    assert recall(planted, QBoundary({"text": spec, "video": spec}), pairs, VIDEO)[0] >= 0.99
    missed = recall(planted, spec, pairs, VIDEO)[0]
    assert missed < 0.6
    video_alone = pairs & np.isin(np.arange(n), video)[:, None]
    assert recall(planted, spec, video_alone, VIDEO)[0] < 0.05


def test_boundary_2d_finds_a_grid_in_ranks_across_timestamps() -> None:
    """Video looks at one cell of every frame of the interrupted video: even in ranks within video, not in positions."""
    n, stride, phase = VIDEO.length, 25, 11
    text, video = modality(0), modality(2)
    keys = video[phase::stride]
    wanted = text[np.array([20, 90, 130])]
    planted = Planted(n)
    planted.link(video, keys)
    planted.link(text, wanted)
    pairs = outer(video, keys, n) | outer(text[text > wanted.min()], wanted, n)
    pairs[: keys.min()] = False
    lines = Grid("frame", columns=True, local=16, sink=0, last_q=32)
    columns = VerticalSlash(33, 0, last_q=32)
    boundary = Boundary2D(
        {
            ("video", "video"): lines,
            ("video", "text"): AShape(0, 1),
            ("text", "text"): columns,
            ("text", "video"): columns,
        }
    )
    kept, plan = recall(planted, boundary, pairs, VIDEO)
    assert kept >= 0.99
    assert [int(t[0, 0]) for name, t in plan.selections.items() if name.startswith("phase")] == [phase]
    for flat in (lines, QBoundary({"video": lines, "text": columns})):
        assert recall(planted, flat, pairs & np.isin(np.arange(n), video)[:, None], VIDEO)[0] < 0.7
    assert recall(planted, columns, pairs, VIDEO)[0] < 0.7


def test_block_top_k_finds_blocks_of_shared_content() -> None:
    """Blocks of queries that want one block of keys each."""
    n, size = 640, 32
    planted = Planted(n)
    rng = np.random.default_rng(1)
    pairs = np.zeros((n, n), bool)
    for block in range(4, n // size):
        target = int(rng.integers(1, block - 2))
        if planted.used >= DIM - 1:
            break
        rows, keys = np.arange(block * size, (block + 1) * size), np.arange(target * size, (target + 1) * size)
        planted.link(rows, keys, 20.0)
        pairs |= outer(rows, keys, n)
    assert recall(planted, BlockTopK(3, size, near=1), pairs)[0] >= 0.99
    assert recall(planted, BlockTopK(2, size, near=1), pairs)[0] < 0.05, "two blocks are the forced first and own"


@pytest.mark.parametrize("queries", [None, 64, 5])
def test_selection_is_the_docstrings(queries: int | None) -> None:
    """What is chosen on random input: forced ones first, then the heaviest, also in chunks and per modality."""
    generator = torch.Generator().manual_seed(3)
    n = VIDEO.length
    q, k = (torch.randn(2, h, n, 32, generator=generator) for h in (4, 2))
    m = n if queries is None else queries
    spec = [
        VerticalSlash(64, 200, last_q=16),
        QBoundary({"text": VerticalSlash(50, 150), "video": Grid("frame", local=32, sink=16, last_q=16)}),
        BlockTopK(4, 16, near=20) | Grid(28, rows=True, local=16, sink=16),
        Boundary2D({("video", "video"): BlockTopK(3, 16), ("text", "video"): VerticalSlash(40, 48, 8, near=0)}),
    ]
    plan = mmflex.plan(q[:, :, n - m :], k, spec, layout=VIDEO, backend="reference", block_size=16)
    assert oracle.check_selection(plan, q[:, :, n - m :], k) >= 10


def test_a_stride_search_prefers_the_true_stride_to_its_divisors_and_multiples() -> None:
    """The excess over an even share: a comb of half the stride holds the same mass at twice the cost, one of twice the
    stride half of it."""
    for stride in (24, 36, 50):
        planted, _ = grid(900, stride, 3)
        spec = Grid("search", columns=True, local=16, sink=16, last_q=32, shortest=6, longest=300)
        plan = mmflex.plan(planted.q, planted.k, spec, backend="reference", block_size=TILE)
        assert [int(t[0, 0]) for name, t in plan.selections.items() if name.startswith("stride")] == [stride]


def test_every_head_finds_its_own_stride() -> None:
    """Heads of one call with one pattern, each with a grid of its own."""
    n, strides = 900, (20, 33, 47, 64)
    parts = [grid(n, stride, i)[0] for i, stride in enumerate(strides)]
    q, k = (torch.cat([getattr(p, side)[:, :1] for p in parts], 1) for side in "qk")
    spec = Grid("search", columns=True, local=16, sink=16, last_q=32, shortest=16, longest=200)
    plan = mmflex.plan(q, k, spec, backend="reference", block_size=TILE)
    found = {name.split("@")[0]: t[0].tolist() for name, t in plan.selections.items()}
    assert found == {"stride": list(strides), "phase": [0, 1, 2, 3]}
