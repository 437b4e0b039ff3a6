"""The arithmetic: perplexity, KL divergence and agreement of a sparse model with the dense one, with intervals.

Every token of a window but the first is predicted from those before it. A *row* is the query whose prediction it is:
row i predicts token i + 1. Rows are summed by blocks of `BLOCK` consecutive ones, and the bootstrap draws whole blocks:
neighbouring tokens are not independent, so drawing tokens would make intervals too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...integrations.predictions import kl_divergence

BLOCK = 128
"""Rows of a unit of the bootstrap: a tile of queries."""

FIRST = 16
"""The first rows of a tile, which are reported beside the others."""

DRAWS = 2000


@torch.no_grad()
def compare(log_p: Tensor, log_q: Tensor, targets: Tensor) -> Tensor:
    """float64 [4, rows]: negative log-likelihood of the sparse and of the dense model, KL(dense || sparse), and whether
    both have the same first choice.

    log_p, log_q: `log_probabilities` of the dense and of the sparse model; targets int64 [rows]. In nats.
    """
    index = targets[:, None]
    same = log_p.argmax(-1) == log_q.argmax(-1)
    nll_sparse, nll_dense = (-x.gather(-1, index)[:, 0] for x in (log_q, log_p))
    return torch.stack([nll_sparse, nll_dense, kl_divergence(log_p, log_q), same.double()])


@dataclass(frozen=True)
class Interval:
    """A value with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Scores:
    """What a method's predictions are, beside the dense model's, over some windows of a text.

    Attributes:
        perplexity, dense: over all rows.
        excess: relative increase of the perplexity, paired by row.
        kl, kl_last: mean KL to dense over all rows and over the last ones of each window, nats.
        top1, top1_last: share of rows with the dense model's first choice.
        kl_first, kl_rest: mean KL of rows 0-15 of every tile of 128 queries, and of the others.
        loss_first, loss_rest: likewise the mean increase of the negative log-likelihood, nats.
        offsets: mean KL of rows 0-15, 16-31, ... of every tile.
        rows, last: how many rows there are, and how many of a window are its last ones.
    """

    perplexity: float
    dense: float
    excess: Interval
    kl: Interval
    kl_last: Interval
    top1: float
    top1_last: float
    kl_first: float
    kl_rest: float
    loss_first: float
    loss_rest: float
    offsets: tuple[float, ...]
    rows: int
    last: int


def summarise(windows: Sequence[np.ndarray], last: int = 512) -> Scores:
    """Scores of windows, each float64 [4, rows] as from `compare`, from the first row of the window on."""
    every = np.concatenate(windows, axis=1)
    ends = np.concatenate([w[:, -last:] for w in windows], axis=1)
    offset = np.concatenate([np.arange(w.shape[1]) % BLOCK for w in windows])
    first = offset < FIRST
    sparse, dense, kl, same = every
    loss = sparse - dense

    def mean(values: np.ndarray, chosen: np.ndarray) -> float:
        return float(values[chosen].mean()) if chosen.any() else float("nan")

    change = bootstrap([w[0] - w[1] for w in windows])
    return Scores(
        perplexity=float(np.exp(sparse.mean())),
        dense=float(np.exp(dense.mean())),
        excess=Interval(*(float(np.expm1(x)) for x in (change.value, change.low, change.high))),
        kl=bootstrap([w[2] for w in windows]),
        kl_last=bootstrap([w[2, -last:] for w in windows]),
        top1=float(same.mean()),
        top1_last=float(ends[3].mean()),
        kl_first=mean(kl, first),
        kl_rest=mean(kl, ~first),
        loss_first=mean(loss, first),
        loss_rest=mean(loss, ~first),
        offsets=tuple(mean(kl, offset // FIRST == i) for i in range(BLOCK // FIRST)),
        rows=every.shape[1],
        last=last,
    )


def bootstrap(windows: Sequence[np.ndarray], *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean of values float64 [rows] of some windows with a 95% percentile interval: blocks of `BLOCK` consecutive
    rows of a window are drawn with replacement, as many as there are. One block alone has no interval: it is NaN."""
    blocks = [w[i : i + BLOCK] for w in windows for i in range(0, len(w), BLOCK)]
    sums, counts = np.array([b.sum() for b in blocks]), np.array([float(len(b)) for b in blocks])
    mean = float(sums.sum() / counts.sum())
    if len(blocks) == 1:
        return Interval(mean, float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), size=draws)
    low, high = np.quantile((weights @ sums) / (weights @ counts), (0.025, 0.975))
    return Interval(mean, float(low), float(high))
