"""The oracle of patterns that select blocks, in numpy and float64: top-k, shares of the mass, cuts.

Written from the docstrings and the papers: pooled means and antidiagonal sums block by block, sets by what must hold of
them (heaviest, enough, none to spare), not by how they are found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import oracle

import mmflex
from mask_builders import BlockPeaks, BlockTopK, FlashPrefill, FlexPrefill, Prism, ProxyAttn, XAttention

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

    def forced(self, rows: int, columns: int, near: int, sink: int = 1) -> np.ndarray:
        """bool [rows, columns]: the first ``sink`` blocks, and all that hold one of the ``near`` nearest keys of a
        query, of those that a query block reaches. Token by token."""
        out = np.zeros((rows, columns), bool)
        out[:, :sink] = True
        for i in np.flatnonzero(self.queries):
            for key in range(max(0, self.stands[i] - near + 1), self.stands[i] + 1):
                out[self.own[i] // self.size, key // self.size] = True
        return out & (np.arange(columns) <= self.reach(rows, self.size)[:, None])

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
        """[rows, runs of a block, columns]: pairs whose places within runs of ``stride`` add up to stride - 1, summed
        over pairs of runs; a softmax over runs of keys; summed over the keys of a block."""
        per = self.size // stride
        pairs = self.q @ self.k.T * scale / stride
        crossed = (self.own % stride)[:, None] + (self.at % stride)[None] == stride - 1
        pairs = np.where(crossed & self.queries[:, None] & self.keys, pairs, 0.0)
        runs = np.zeros((rows * per, columns * per))
        for i in np.flatnonzero(self.queries):
            np.add.at(runs[self.own[i] // stride], self.at[self.keys] // stride, pairs[i, self.keys])
        hidden = np.arange(columns * per) > self.reach(rows * per, stride)[:, None]
        mass = _softmax(np.where(hidden, -np.inf, runs))
        return mass.reshape(rows, per, columns, per).sum(3)

    def peaks(self, rows: int, columns: int, stride: int, scale: float) -> np.ndarray:
        """[rows, columns]: the most that a run of queries gives to a block, or the longest query of one (of equals the
        last), times the square root of the keys up to the end of the last block that is seen over 4096."""
        found = self.antidiagonal(rows, columns, stride, scale).max(1)
        for run in range(rows * self.size // stride):
            members = np.flatnonzero(self.queries & (self.own // stride == run))
            if len(members):
                i = max(members, key=lambda m: (float((self.q[m] ** 2).sum()), m))
                score = np.where(self.keys & (self.at <= self.stands[i]), self.k @ self.q[i] * scale, -np.inf)
                share = np.bincount(np.maximum(self.at, 0) // self.size, _softmax(score[None])[0], minlength=columns)
                row = run * stride // self.size
                found[row] = np.maximum(found[row], share)
        keys = (self.reach(rows, self.size) + 1) * self.size
        return found * np.sqrt(keys / 4096)[:, None]


@dataclass(frozen=True, eq=False)
class Head:
    """One head of one prompt, and what a plan selected for it.

    Attributes:
        plan, scope, prompt: of the plan. q [H, M, D], k [Hkv, N, D], v [Hkv, N, D] (None: not given): of the prompt.
        head: number of the query head. found: name -> what was selected. size: keys in scope, of the longest prompt.
    """

    plan: mmflex.Plan
    scope: oracle.Scope
    prompt: oracle.Prompt
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray | None
    head: int
    found: Find
    size: int

    @property
    def group(self) -> int:
        return len(self.q) // len(self.k)

    def blocks(self, size: int) -> Blocks:
        return Blocks(self.q[self.head], self.k[self.head // self.group], self.prompt, self.scope, size)

    def lines(self, last_q: int) -> tuple[np.ndarray, np.ndarray]:
        """Mass per key and per distance of the last queries."""
        q, k = self.q[self.head], self.k[self.head // self.group]
        return oracle.last_mass(q, k, self.prompt, self.scope, last_q, self.plan.scale, self.size)


# ---- top-k -----------------------------------------------------------------------------------------------------------


def prominence(v: np.ndarray, blocks: Blocks, columns: int) -> np.ndarray:
    """[columns]: relu of the standardised log of the greatest norm in every run of 8 keys, mean over a block's runs."""
    norm = np.maximum(np.linalg.norm(v, axis=1), 1e-6)
    greatest: dict[tuple[int, int], float] = {}
    for i in np.flatnonzero(blocks.keys):
        block, place = divmod(int(blocks.at[i]), blocks.size)
        run = (block, place // 8)
        greatest[run] = max(greatest.get(run, 0.0), float(norm[i]))
    logs = np.log(list(greatest.values())) if greatest else np.zeros(1)
    mean, deviation = logs.mean(), max(logs.std(), 1e-6)
    out = np.zeros(columns)
    for j in range(columns):
        lifted = [max(0.0, (np.log(n) - mean) / deviation) for (block, _), n in greatest.items() if block == j]
        out[j] = np.mean(lifted) if lifted else 0.0
    return out


def check_block_top_k(pattern: BlockTopK, head: Head) -> None:
    """The best by mean-pooled scores, row of blocks by row of blocks."""
    table, blocks = head.found("blocks"), head.blocks(pattern.block_size)
    rows, columns = table.shape
    assert columns == -(-head.size // pattern.block_size)
    forced, reach = blocks.forced(rows, columns, pattern.near), blocks.reach(rows, pattern.block_size)
    keys = np.stack([blocks.mean_key(j) for j in range(columns)])
    extra = np.zeros(columns)
    if pattern.values:
        assert head.v is not None, "it selects by values"
        extra = pattern.values * prominence(head.v[head.head // head.group], blocks, columns)
    end = (int(blocks.keys.sum()) - 1) // pattern.block_size
    full = min(pattern.blocks, columns)
    for i, last in enumerate(reach):
        assert not table[i, last + 1 :].any(), "a key block after every query of its block"
        if last < 0:
            continue
        budget = full
        if last > full:
            fallen = (1 - Fraction(str(pattern.decay))) * full * Fraction(int(last) - full, max(1, end - full))
            budget = max(1, int(full - fallen))
        members = blocks.queries & (blocks.own // blocks.size == i)
        score = keys[: last + 1] @ blocks.q[members].mean(0) * head.plan.scale + extra[: last + 1]
        first, here = forced[i, : last + 1], table[i, : last + 1]
        budget = min(max(budget, int(first.sum())), int(last) + 1)
        assert here.sum() == budget, f"{here.sum()} blocks of a budget of {budget}"
        assert here[first].all(), "the first block or one of the nearest is missing"
        free, left = here & ~first, ~here & ~first
        if free.any() and left.any():
            assert score[free].min() >= score[left].max() - 1e-4, "not the best blocks"


# ---- shares of the mass ----------------------------------------------------------------------------------------------


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
    """The fewest that hold a share: ``first`` and the heaviest up to ``least`` in any case, never over ``at_most``
    unless the first are more."""
    eps, at_most = EPS * max(1.0, mass.sum()), max(at_most, int(first.sum()))
    assert chosen[first].all(), f"{what}: those that come first are missing"
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


def check_map(chosen: np.ndarray, mass: np.ndarray, blocks: Blocks, pattern: FlexPrefill) -> None:
    """The fewest blocks of the whole map, with at most ``blocks`` in a row."""
    eps = EPS * max(1.0, mass.sum())
    least = -(-pattern.minimum // pattern.block_size)
    optional, left, all_full = [], [0.0], True
    forced = blocks.forced(*chosen.shape, pattern.near)
    for i, last in enumerate(blocks.reach(len(chosen), pattern.block_size)):
        here, row = chosen[i, : last + 1], mass[i, : last + 1]
        assert not chosen[i, last + 1 :].any(), "a key block after every query of its block"
        if last < 0:
            continue
        first = forced[i, : last + 1]
        full = min(max(pattern.blocks, int(first.sum())), last + 1)
        required = min(full, max(int(first.sum()), least))
        assert required <= here.sum() <= full, f"{here.sum()} blocks of {required} to {full}"
        assert here[first].all(), "the first block or one of the nearest is missing"
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


def check_flex_prefill(pattern: FlexPrefill, head: Head) -> None:
    blocks, (vertical, by_distance) = head.blocks(pattern.block_size), head.lines(pattern.last_q)
    tile, scale = head.plan.program.tile, head.plan.scale
    table, columns, diagonals = head.found("blocks"), head.found("columns"), head.found("diagonals")
    away = distance(pattern, blocks, vertical, table.shape[1], scale)
    aware = bool(table.any()) if abs(away - pattern.tau) < 1e-4 else away < pattern.tau
    if aware:
        assert not columns.any(), "a query-aware head has columns"
        assert not diagonals.any(), "a query-aware head has diagonals"
        check_map(table, blocks.pooled(*table.shape, scale), blocks, pattern)
        return
    assert not table.any(), "a vertical-slash head has blocks"
    size, tiles = len(columns), len(diagonals)
    first = np.arange(size) < oracle.FORCED_COLUMNS
    check_fewest(columns, vertical, pattern.gamma, pattern.vertical, first, pattern.minimum, "columns")
    mass = oracle.block_diagonal_mass(by_distance, tile, tiles)
    near = oracle.near_diagonals(tiles, pattern.near, tile)
    slash, least = -(-pattern.slash // tile), -(-pattern.minimum // tile)
    check_fewest(diagonals, mass, pattern.gamma, slash, near, least, "diagonals")


def check_x_attention(pattern: XAttention, head: Head) -> None:
    table, blocks = head.found("blocks"), head.blocks(pattern.block_size)
    mass = blocks.antidiagonal(*table.shape, pattern.stride, head.plan.scale).sum(1)
    forced = blocks.forced(*table.shape, pattern.near)
    for i, last in enumerate(blocks.reach(len(table), pattern.block_size)):
        assert not table[i, last + 1 :].any(), "a key block after every query of its block"
        if last >= 0:
            row, here = mass[i, : last + 1], table[i, : last + 1]
            check_fewest(here, row, pattern.threshold, pattern.blocks, forced[i, : last + 1], 0, f"row {i}")


# ---- cuts: each block is kept or not by itself -----------------------------------------------------------------------


def listed(mass: np.ndarray, first: np.ndarray, at_most: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(surely, possibly) among the ``at_most`` greatest of a row, the first ahead of all; masses closer than ``eps``
    (relative) cannot be told apart."""
    room = at_most - int(first.sum())
    others = np.where(first, -1.0, mass)
    above = np.array([(others > m * (1 + eps)).sum() for m in mass])
    equal = np.array([(others >= m * (1 - eps)).sum() for m in mass]) - ~first
    return first | (equal < room), first | (above < room)


def check_between(chosen: np.ndarray, surely: np.ndarray, possibly: np.ndarray, what: str) -> None:
    assert not (surely & ~chosen).any(), f"{what}: {np.flatnonzero(surely & ~chosen)} are missing"
    assert not (chosen & ~possibly).any(), f"{what}: {np.flatnonzero(chosen & ~possibly)} are too many"


def prism_bands(pattern: Prism, dim: int) -> tuple[list[int], list[int]]:
    """Channels of the high and of the low band, pair by pair."""
    rotary = min(pattern.rotary_dim or dim, dim)
    count = rotary // 2
    pairs = [(i, i + count) if pattern.pairs == "halves" else (2 * i, 2 * i + 1) for i in range(count)]
    high = [c for i, pair in enumerate(pairs) if i < count // 2 for c in pair]
    low = [c for i, pair in enumerate(pairs) if i >= count // 4 for c in pair]
    return high, low + list(range(2 * count, dim))


def check_block_peaks(pattern: BlockPeaks, head: Head) -> None:
    table, blocks = head.found("blocks"), head.blocks(pattern.block_size)
    peaks = blocks.peaks(*table.shape, pattern.stride, head.plan.scale)
    forced = blocks.forced(*table.shape, pattern.near)
    for i, last in enumerate(blocks.reach(len(table), pattern.block_size)):
        assert not table[i, last + 1 :].any(), "a key block after every query of its block"
        if last >= 0:
            first, row = forced[i, : last + 1], peaks[i, : last + 1]
            surely, possibly = listed(row, first, pattern.blocks, 1e-5)
            surely &= first | (row > pattern.peak * (1 + 1e-5))
            possibly &= first | (row > pattern.peak * (1 - 1e-5))
            check_between(table[i, : last + 1], surely, possibly, f"row {i}")


def check_prism(pattern: Prism, head: Head) -> None:
    table, blocks = head.found("blocks"), head.blocks(pattern.block_size)
    rows, columns = table.shape
    keys = np.stack([blocks.mean_key(j) for j in range(columns)])
    queries = np.zeros((rows, keys.shape[1]))
    for i in range(rows):
        members = blocks.queries & (blocks.own // blocks.size == i)
        queries[i] = blocks.q[members].mean(0) if members.any() else 0.0
    forced = blocks.forced(rows, columns, pattern.near)

    def rms(x: np.ndarray) -> float:
        return max(float(np.sqrt((x**2).mean())), 1e-30)

    dim = keys.shape[1]
    scores = []
    for band in prism_bands(pattern, dim):
        q, k = queries[:, band], keys[:, band]
        loss = rms(q) / rms(queries) * rms(k) / rms(keys)
        scores.append(head.plan.scale * (q @ k.T) * dim / (len(band) * loss))
    for i, last in enumerate(blocks.reach(rows, pattern.block_size)):
        assert not table[i, last + 1 :].any(), "a key block after every query of its block"
        if last < 0:
            continue
        first = forced[i, : last + 1]
        surely, possibly = first.copy(), first.copy()
        for score in scores:
            mass, eps = _softmax(score[i, : last + 1]), 1e-5 * (1 + np.abs(score[i]).max())
            before = np.array([mass[mass > m * (1 + eps)].sum() for m in mass])
            beside = np.array([mass[mass >= m * (1 - eps)].sum() for m in mass]) - mass
            sure, may = listed(mass, first, max(pattern.blocks, int(first.sum())), eps)
            surely |= sure & (beside < pattern.threshold - eps)
            possibly |= may & (before < pattern.threshold + eps)
        check_between(table[i, : last + 1], surely, possibly, f"row {i}")


def check_flash_prefill(pattern: FlashPrefill, head: Head) -> None:
    table, blocks, scale = head.found("blocks"), head.blocks(pattern.block_size), head.plan.scale
    rows, columns = table.shape
    size, count = blocks.size, int(blocks.keys.sum())
    means = np.stack([blocks.mean_key(j) for j in range(columns)])
    forced = blocks.forced(rows, columns, pattern.near, -(-pattern.sink // size))
    lift = np.zeros(columns)
    if pattern.rescue:
        radius = np.zeros(columns)
        for i in np.flatnonzero(blocks.keys):
            j = blocks.at[i] // size
            radius[j] = max(radius[j], np.linalg.norm(blocks.k[i] - means[j]))
        own = radius[: max(1, -(-count // size))]
        middle, high = np.quantile(own, 0.5), np.quantile(own, 0.9)
        place = np.clip((radius - middle) / max(high - middle, 1e-30), 0.0, 0.9)
        lift = abs(scale) * place * radius
    weights = [np.full((rows, columns), -np.inf) for _ in range(2)]
    greatest = 0.0
    for i in np.flatnonzero(blocks.queries):
        row = blocks.own[i] // size
        for j in range(columns):
            if min(count, (j + 1) * size) - 1 <= blocks.stands[i] and j * size < count:
                score = blocks.q[i] @ means[j] * scale
                for weight, more in zip(weights, (0.0, np.linalg.norm(blocks.q[i]) * lift[j]), strict=True):
                    weight[row, j] = np.logaddexp(weight[row, j], score + more)
                    greatest = max(greatest, abs(score + more))
    eps = 1e-5 * (1 + greatest)
    cuts = [(weights[0], pattern.alpha)] + ([(weights[1], pattern.rescue)] if pattern.rescue else [])
    for i, last in enumerate(blocks.reach(rows, size)):
        assert not table[i, last + 1 :].any(), "a key block after every query of its block"
        if last < 0:
            continue
        first = forced[i, : last + 1]
        surely, possibly = first.copy(), first.copy()
        for weight, cut in cuts:
            row = weight[i, : last + 1]
            share = np.exp(row - row.max()) if np.isfinite(row.max()) else np.zeros(len(row))
            sure, may = listed(share, first, max(pattern.blocks, int(first.sum())), eps)
            surely |= sure & (share >= cut * (1 + eps))
            possibly |= may & (share >= cut * (1 - eps))
        check_between(table[i, : last + 1], surely, possibly, f"row {i}")


def check_proxy_attn(pattern: ProxyAttn, head: Head) -> None:
    table, size, scale = head.found("blocks"), pattern.block_size, head.plan.scale
    rows, columns = table.shape
    first_kv = head.head // head.group // pattern.kv_heads * pattern.kv_heads
    kv = range(first_kv, min(first_kv + pattern.kv_heads, len(head.k)))
    q = head.q[kv.start * head.group : kv.stop * head.group].mean(0)
    proxy = Blocks(q, head.k[kv.start : kv.stop].mean(0), head.prompt, head.scope, size)
    mass = np.zeros((rows, columns))
    taken: set[tuple[int, int]] = set()
    for i in np.flatnonzero(proxy.queries):
        row, place = divmod(int(proxy.own[i]), size)
        if (row, place // pattern.stride) in taken:
            continue
        taken.add((row, place // pattern.stride))
        seen = np.flatnonzero(proxy.keys & (proxy.at <= proxy.stands[i]))
        if len(seen):
            weight = _softmax(proxy.k[seen] @ proxy.q[i] * scale)
            np.maximum.at(mass[row], proxy.at[seen] // size, weight)
    vertical, _ = head.lines(pattern.last_q)
    held = np.zeros(columns)
    np.add.at(held, np.arange(len(vertical)) // size, vertical)
    heavy = np.sort(held)[::-1]
    needed = [int(((heavy.cumsum() - heavy) < pattern.gamma * heavy.sum() + eps).sum()) for eps in (-1e-5, 1e-5)]
    count = max(1, -(-int(proxy.keys.sum()) // size))
    least = max(1, min(-(-pattern.minimum // size), columns))
    forced = proxy.forced(rows, columns, pattern.near)
    for i, last in enumerate(proxy.reach(rows, size)):
        assert not table[i, last + 1 :].any(), "a key block after every query of its block"
        if last < 0:
            continue
        here, first, row = table[i, : last + 1], forced[i, : last + 1], mass[i, : last + 1]
        budgets = [max(least, -(-n * (int(last) + 1) // count)) for n in needed]
        low, high = (min(max(min(b, pattern.blocks), int(first.sum())), int(last) + 1) for b in budgets)
        assert low <= here.sum() <= high, f"row {i}: {here.sum()} blocks, {low} to {high} wanted"
        assert here[first].all(), "the first block or one of the nearest is missing"
        free, left = here & ~first, ~here & ~first
        if free.any() and left.any():
            assert row[free].min() >= row[left].max() * (1 - 1e-3) - 1e-30, f"row {i}: not the greatest"


CHECKS: dict[type, Callable[[Any, Head], None]] = {
    BlockPeaks: check_block_peaks,
    BlockTopK: check_block_top_k,
    FlashPrefill: check_flash_prefill,
    FlexPrefill: check_flex_prefill,
    Prism: check_prism,
    ProxyAttn: check_proxy_attn,
    XAttention: check_x_attention,
}
"""Pattern class -> what proves its selection for a head."""
