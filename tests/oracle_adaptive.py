"""The oracle of patterns that keep a share of the mass: FlexPrefill and XAttention, in numpy and float64.

Written from the docstrings and the papers: pooled means and antidiagonal sums block by block, sets by what must hold of
them (heaviest, enough, none to spare), not by how they are found.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle

from mask_builders import FlexPrefill, XAttention

EPS = 1e-5
"""Rounding of float32 masses, as a share of all mass."""

Find = Callable[[str], np.ndarray]


def _softmax(score: np.ndarray) -> np.ndarray:
    """Of each row; rows without a finite score are 0."""
    top = score.max(-1, initial=-np.inf, keepdims=True)
    weight = np.exp(score - np.where(np.isfinite(top), top, 0.0))
    return weight / np.maximum(weight.sum(-1, keepdims=True), 1e-300)


class Blocks:
    """One head of one prompt in blocks of ``size``: who is in which, and what each query block sees."""

    def __init__(self, q: np.ndarray, k: np.ndarray, prompt: oracle.Prompt, scope: oracle.Scope, size: int) -> None:
        m, n = len(q), len(k)
        self.q, self.k, self.size = q, k, size
        self.queries, self.keys = prompt.of_modality(scope[0])[n - m :], prompt.of_modality(scope[1])
        self.own, self.at = prompt.place(scope[0])[n - m :], prompt.place(scope[1])
        self.stands = self.at[n - m :]

    def reach(self, rows: int, unit: int) -> np.ndarray:
        """The last run of ``unit`` keys at which a query of each run of ``unit`` queries stands, -1 for none."""
        out = np.full(rows, -1)
        for i in np.flatnonzero(self.queries):
            out[self.own[i] // unit] = max(out[self.own[i] // unit], self.stands[i] // unit)
        return out

    def mean_key(self, block: int) -> np.ndarray:
        members = self.keys & (self.at // self.size == block)
        return self.k[members].mean(0) if members.any() else np.zeros(self.k.shape[1])

    def pooled(self, rows: int, columns: int, scale: float) -> np.ndarray:
        """[rows, columns]: softmax of mean queries with mean keys."""
        score = np.full((rows, columns), -np.inf)
        keys = np.stack([self.mean_key(j) for j in range(columns)])
        for i, reach in enumerate(self.reach(rows, self.size)):
            members = self.queries & (self.own // self.size == i)
            if members.any():
                score[i, : reach + 1] = keys[: reach + 1] @ self.q[members].mean(0) * scale
        return _softmax(score)

    def antidiagonal(self, rows: int, columns: int, stride: int, scale: float) -> np.ndarray:
        """[rows, columns]: pairs whose places within runs of ``stride`` add up to stride - 1, summed over pairs of
        runs; a softmax over runs of keys; summed over blocks."""
        per = self.size // stride
        pairs = self.q @ self.k.T * scale / stride
        crossed = (self.own % stride)[:, None] + (self.at % stride)[None] == stride - 1
        pairs = np.where(crossed & self.queries[:, None] & self.keys, pairs, 0.0)
        runs = np.zeros((rows * per, columns * per))
        for i in np.flatnonzero(self.queries):
            np.add.at(runs[self.own[i] // stride], self.at[self.keys] // stride, pairs[i, self.keys])
        hidden = np.arange(columns * per) > self.reach(rows * per, stride)[:, None]
        mass = _softmax(np.where(hidden, -np.inf, runs))
        return mass.reshape(rows, per, columns, per).sum((1, 3))


def distance(pattern: FlexPrefill, blocks: Blocks, vertical: np.ndarray, columns: int, scale: float) -> float:
    """Square root of the Jensen-Shannon divergence of true and pooled attention of the last queries."""
    true = np.zeros(columns)
    np.add.at(true, np.arange(len(vertical)) // pattern.block_size, vertical)
    true = true / max(true.sum(), 1e-300)
    rows = np.flatnonzero(blocks.queries)[-pattern.last_q :]
    guess = np.full(columns, -np.inf)
    if len(rows):
        reach = int(blocks.stands[rows].max()) // blocks.size + 1
        keys = np.stack([blocks.mean_key(j) for j in range(columns)])[:reach]
        guess[:reach] = keys @ blocks.q[rows].mean(0) * scale
    guess = _softmax(guess)
    middle = (true + guess) / 2

    def against(p: np.ndarray) -> float:
        some = p > 0
        return float((p[some] * np.log(p[some] / middle[some])).sum())

    return float(np.sqrt(max(0.0, (against(true) + against(guess)) / 2)))


def check_fewest(
    chosen: np.ndarray, mass: np.ndarray, share: float, at_most: int, first: np.ndarray, least: int, what: str
) -> None:
    """The fewest that hold a share: ``first`` and the heaviest up to ``least`` in any case, never over ``at_most``."""
    eps = EPS * max(1.0, mass.sum())
    order = np.flatnonzero(first)[:at_most]
    assert chosen[order].all(), f"{what}: those that come first are missing"
    assert chosen.sum() <= at_most, f"{what}: {chosen.sum()} chosen, {at_most} allowed"
    required = min(at_most, len(mass), max(int(first.sum()), least))
    assert chosen.sum() >= required, f"{what}: {chosen.sum()} chosen, at least {required} wanted"
    free, left = chosen & ~first, ~chosen & ~first
    if free.any() and left.any():
        assert mass[free].min() >= mass[left].max() - eps, f"{what}: not the heaviest"
    wanted = share * mass.sum()
    if chosen.sum() > required:
        assert mass[chosen].sum() - mass[free].min() < wanted + eps, f"{what}: more than enough"
    if chosen.sum() < min(at_most, len(mass)):
        assert mass[chosen].sum() >= wanted - eps, f"{what}: holds {mass[chosen].sum()}, wanted {wanted}"


def check_map(chosen: np.ndarray, mass: np.ndarray, reach: np.ndarray, pattern: FlexPrefill) -> None:
    """The fewest blocks of the whole map, with at most ``blocks`` in a row."""
    eps = EPS * max(1.0, mass.sum())
    least = -(-pattern.minimum // pattern.block_size)
    optional, left, all_full = [], [0.0], True
    for i, last in enumerate(reach):
        here, row = chosen[i, : last + 1], mass[i, : last + 1]
        assert not chosen[i, last + 1 :].any(), "a key block after every query of its block"
        if last < 0:
            continue
        first = np.isin(np.arange(last + 1), (0, last))
        full = min(pattern.blocks, last + 1)
        required = min(full, max(int(first.sum()), least))
        assert required <= here.sum() <= full, f"{here.sum()} blocks of {required} to {full}"
        assert here[np.flatnonzero(first)[:full]].all(), "the first block or the last is missing"
        free = here & ~first
        if free.any() and (~here & ~first).any():
            assert row[free].min() >= row[~here & ~first].max() - eps, "not the heaviest of their row"
        optional += sorted(row[free])[: here.sum() - required]
        if here.sum() < full:
            all_full = False
            left.append(row[~here].max())
    wanted, held = pattern.gamma * mass.sum(), mass[chosen].sum()
    if optional:
        assert min(optional) >= max(left) - eps, "a heavier block was left out"
        assert held - min(optional) < wanted + eps, "more than enough"
    assert all_full or held >= wanted - eps, f"holds {held}, wanted {wanted}"


def check_flex_prefill(
    pattern: FlexPrefill, found: Find, blocks: Blocks, lines: tuple[np.ndarray, np.ndarray], tile: int, scale: float
) -> None:
    """``lines``: mass per key and per distance of the last queries."""
    vertical, by_distance = lines
    table, columns, diagonals = found("blocks"), found("columns"), found("diagonals")
    away = distance(pattern, blocks, vertical, table.shape[1], scale)
    aware = bool(table.any()) if abs(away - pattern.tau) < 1e-4 else away < pattern.tau
    if aware:
        assert not columns.any(), "a query-aware head has columns"
        assert not diagonals.any(), "a query-aware head has diagonals"
        check_map(table, blocks.pooled(*table.shape, scale), blocks.reach(len(table), pattern.block_size), pattern)
        return
    assert not table.any(), "a vertical-slash head has blocks"
    size, tiles = len(columns), len(diagonals)
    first = np.arange(size) < oracle.FORCED_COLUMNS
    check_fewest(columns, vertical, pattern.gamma, pattern.vertical, first, pattern.minimum, "columns")
    mass = oracle.block_diagonal_mass(by_distance, tile, tiles)
    near = np.arange(tiles) <= -(-(oracle.FORCED_DISTANCES - 1) // tile)
    slash, least = -(-pattern.slash // tile), -(-pattern.minimum // tile)
    check_fewest(diagonals, mass, pattern.gamma, slash, near, least, "diagonals")


def check_x_attention(pattern: XAttention, found: Find, blocks: Blocks, scale: float) -> None:
    table = found("blocks")
    mass = blocks.antidiagonal(*table.shape, pattern.stride, scale)
    for i, last in enumerate(blocks.reach(len(table), pattern.block_size)):
        assert not table[i, last + 1 :].any(), "a key block after every query of its block"
        if last >= 0:
            first = np.isin(np.arange(last + 1), (0, last))
            row, here = mass[i, : last + 1], table[i, : last + 1]
            check_fewest(here, row, pattern.threshold, pattern.blocks, first, 0, f"row {i}")
