"""Every query sees its nearest keys, whatever its place in a tile: patterns that promise a neighbourhood, at budgets
too small for it, in chunks, in batches of unlike prompts, per modality in ranks, and whatever a search offers.

Found on a real model: in the first rows of a tile a single block diagonal is hardly any neighbourhood at all, and they
lost six times as much as the others.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

import mask_builders
import mmflex
from mask_builders import (
    AShape,
    BlockPeaks,
    BlockTopK,
    Boundary2D,
    FlexPrefill,
    Grid,
    QBoundary,
    TriShape,
    VerticalSlash,
    XAttention,
)

torch.set_num_threads(1)
NEAR = 100
"""Nearest keys, the query's own included."""

VIDEO = mmflex.TokenLayout.from_segments(
    [("text", 150), ("video", (9, 6, 7), {"timestamps": 3}), ("text", 160), ("image", (11, 13)), ("text", 141)]
)
LAYOUTS = {
    "text": mmflex.TokenLayout.text(777),
    "video": VIDEO,
    "padded": mmflex.TokenLayout.batch([VIDEO, mmflex.TokenLayout.text(500)], side="left", length=VIDEO.length + 3),
    "unlike": mmflex.TokenLayout.batch([VIDEO, VIDEO[130:640]]),
}

SMALLEST = [
    VerticalSlash(0, 1),
    VerticalSlash(64, 100),
    VerticalSlash(30, 128),
    BlockTopK(1),
    BlockTopK(2, 64),
    BlockTopK(1, 40),
    FlexPrefill(0.01, 0.0, 1, 1, 1, 0),
    FlexPrefill(0.01, 1.0, 1, 1, 1, 0),
    FlexPrefill(0.01, 1.0, 1, 1, 1, 0, block_size=48),
    XAttention(8, 0.01, 1),
    XAttention(8, 0.01, 2, 32),
    BlockPeaks(1.0, 8, 1),
    BlockPeaks(1.0, 8, 2, 32),
    AShape(0, NEAR),
    TriShape(0, NEAR, 0),
    Grid(64, local=NEAR, sink=0),
    Grid("search", columns=False, slash=True, local=NEAR, sink=0),
]
"""Patterns that promise a neighbourhood, with budgets that have no room for it."""


def missing(plan: mmflex.Plan, scope: oracle.Scope = (None, None), near: int = NEAR) -> np.ndarray:
    """[n, 4]: (prompt, head, query, key) of keys in scope among the ``near`` nearest of a query in scope, which do not
    see each other. Brute force over tokens."""
    mask, out = plan.dense_mask().numpy(), []
    numbers = plan.program.queries.numbers
    for b in range(mask.shape[0]):
        prompt = oracle.Prompt.of(plan.layout, b)
        queries, keys = (np.flatnonzero(prompt.of_modality(m)) for m in scope)
        for row, token in enumerate(numbers):
            if token in set(queries.tolist()):
                nearest = keys[keys <= token][-near:]
                for h in range(mask.shape[1]):
                    out += [(b, h, token, key) for key in nearest[~mask[b, h, row, nearest]]]
    return np.array(out).reshape(-1, 4)


def planned(
    spec: mmflex.Pattern, layout: mmflex.TokenLayout, rows: np.ndarray | None = None, seed: int = 0
) -> mmflex.Plan:
    """A plan of two heads whose attention goes anywhere but to what is near."""
    generator = torch.Generator().manual_seed(seed)
    n, batch = layout.length, layout.batch_size
    q, k = (torch.randn(batch, heads, n, 32, generator=generator) for heads in (2, 1))
    k[:, :, 3 * n // 8 : n // 2] += 3 * q[:, :1].mean(2, keepdim=True)
    q = q + q.mean(2, keepdim=True) * 20
    rows = np.arange(n) if rows is None else rows
    return mmflex.plan(
        q[:, :, torch.as_tensor(rows)], k, spec, layout=layout, backend="reference", query_positions=rows
    )


def proved(plan: mmflex.Plan, scope: oracle.Scope = (None, None)) -> None:
    lost = missing(plan, scope)
    assert not len(lost), f"{len(lost)} near pairs are not seen, first (prompt, head, query, key) = {lost[0].tolist()}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SMALLEST, ids=str)
def test_every_query_sees_its_nearest_keys(spec: mmflex.Pattern, layout: str) -> None:
    proved(planned(spec, LAYOUTS[layout]))


@pytest.mark.parametrize("spec", SMALLEST, ids=str)
def test_in_chunks_and_scattered_rows(spec: mmflex.Pattern) -> None:
    n = VIDEO.length
    for rows in (np.arange(300, 430), np.arange(n - 1, n), np.r_[5:40, 250:260, 500:700]):
        proved(planned(spec, VIDEO, rows))


@pytest.mark.parametrize("scope", [("video", "video"), ("text", None), ("text", "video"), (None, "text")])
@pytest.mark.parametrize("spec", SMALLEST, ids=str)
def test_in_ranks_within_a_modality(spec: mmflex.Pattern, scope: tuple[str | None, str | None]) -> None:
    """Queries of text between frames see the frame before them, whichever tile they share with others."""
    query, key = scope
    ids = tuple(None if m is None else mmflex.ir.layout.modality_id(m) for m in scope)
    for layout in (LAYOUTS["video"], LAYOUTS["unlike"]):
        proved(planned(spec.on(query=query, key=key), layout), ids)


@pytest.mark.parametrize("spec", SMALLEST[:11], ids=str)
def test_under_boundaries(spec: mmflex.Pattern) -> None:
    text, video = 0, 2
    plan = planned(QBoundary({"text": spec, "video": spec}), VIDEO)
    proved(plan, (text, None))
    proved(plan, (video, None))
    pairs = [(a, b) for a in (text, video) for b in (text, video)]
    names = {text: "text", video: "video"}
    plan = planned(Boundary2D({(names[a], names[b]): spec for a, b in pairs}), VIDEO)
    for pair in pairs:
        proved(plan, pair)


def offered() -> list[mmflex.Pattern]:
    classes = [c for c in vars(mask_builders).values() if isinstance(c, type) and issubclass(c, mmflex.Pattern)]
    return [pattern for c in classes for pattern in c.candidates()]


@pytest.mark.parametrize("pattern", offered(), ids=str)
def test_whatever_a_search_offers_keeps_the_near(pattern: mmflex.Pattern) -> None:
    """At whatever cost: candidates, and what scaling makes of them."""
    layout = mmflex.TokenLayout.from_segments([("text", 130), ("video", (9, 8, 8)), ("text", 61)])
    for factor in (1 / 256, 0.03, 1.0):
        proved(planned(pattern.scaled(factor), layout))


def test_a_budget_of_none_selects_none() -> None:
    """Columns alone, and diagonals alone."""
    plan = planned(VerticalSlash(40, 0), LAYOUTS["text"])
    assert not any(t.any() for name, t in plan.selections.items() if name.startswith("diagonals"))
    plan = planned(VerticalSlash(0, 128), LAYOUTS["text"])
    assert not any(t.any() for name, t in plan.selections.items() if name.startswith("columns"))
