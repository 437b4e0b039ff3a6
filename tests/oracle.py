"""An independent oracle: what a spec means, pair by pair, in numpy and float64.

Written from the docstrings of the patterns and from the papers, not from the compiler: no sympy, no orders, no blocks.
`token_mask` is the mask of a plan (what was selected is read from the plan; `check_selection` proves that selection by
itself), `softmax` the attention under a mask, `launch_cover` what the block lists of a plan really compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import mmflex
from mask_builders import (
    AShape,
    BlockPeaks,
    BlockTopK,
    Boundary2D,
    Dense,
    Dilated,
    FlashPrefill,
    FlexPrefill,
    Grid,
    Prism,
    ProxyAttn,
    QBoundary,
    Strided,
    StridedFixed,
    TriShape,
    VerticalSlash,
    XAttention,
)
from mmflex.ir.pattern import Difference, Intersection, Pattern, Restricted, Union

Scope = tuple[int | None, int | None]
"""The query and the key modality that a pattern is restricted to (None: all)."""

NO_KEY = 1 << 29
"""Limits from here on are of empty key slots."""

BEYOND = 1 << 40
"""More than any position: from here on strides are all alike."""

FORCED_COLUMNS = 30


# ---- one prompt ----


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row of a layout; ``place(m)``: tokens of modality m (None: all) up to and including each token, less one."""

    valid: np.ndarray
    modality: np.ndarray
    segment: np.ndarray
    frame: np.ndarray
    cell: np.ndarray
    present: tuple[int, ...]

    @classmethod
    def of(cls, layout: mmflex.TokenLayout, row: int) -> Prompt:
        row = min(row, layout.modality.shape[0] - 1)
        valid = layout.position >= 0
        present = tuple(sorted(set(layout.modality[valid].tolist())))
        return cls(valid[row], layout.modality[row], layout.segment[row], layout.frame[row], layout.cell[row], present)

    def of_modality(self, m: int | None) -> np.ndarray:
        return self.valid if m is None else self.valid & (self.modality == m)

    def place(self, m: int | None) -> np.ndarray:
        out, seen = np.empty(len(self.valid), np.int64), -1
        for i, there in enumerate(self.of_modality(m)):
            seen += bool(there)
            out[i] = seen
        return out

    def causal(self) -> np.ndarray:
        """bool [N, N]: valid key at or before a valid query."""
        order = np.arange(len(self.valid))
        return (order[:, None] >= order) & self.valid[:, None] & self.valid


def frame_stride(layout: mmflex.TokenLayout, m: int | None) -> int | None:
    """The commonest distance between first cells of neighbouring frames of a segment, the shorter of equals."""
    seen: dict[int, int] = {}
    for b in range(layout.modality.shape[0]):
        prompt = Prompt.of(layout, b)
        place, last = prompt.place(m), None
        for i in np.flatnonzero(prompt.of_modality(m) & (prompt.cell == 0)):
            if last is not None and prompt.segment[last] == prompt.segment[i]:
                seen[int(place[i] - place[last])] = seen.get(int(place[i] - place[last]), 0) + 1
            last = i
    return min(seen, key=lambda d: (-seen[d], d)) if seen else None


# ---- the meaning of a pattern ----


class Meaning:
    """The mask of patterns for one prompt and one head.

    Args:
        found: (pattern, scope, name) -> what was selected for this prompt and head.
    """

    def __init__(
        self, layout: mmflex.TokenLayout, row: int, tile: int, found: Callable[[Pattern, Scope, str], np.ndarray]
    ) -> None:
        self.layout, self.prompt, self.tile, self.found = layout, Prompt.of(layout, row), tile, found

    def pairs(self, pattern: Pattern, scope: Scope = (None, None)) -> np.ndarray:
        """bool [N, N], causality left out."""
        n = len(self.prompt.valid)
        if isinstance(pattern, Union):
            return self.pairs(pattern.left, scope) | self.pairs(pattern.right, scope)
        if isinstance(pattern, Intersection):
            return self.pairs(pattern.left, scope) & self.pairs(pattern.right, scope)
        if isinstance(pattern, Difference):
            return self.pairs(pattern.left, scope) & ~self.pairs(pattern.right, scope)
        if isinstance(pattern, Restricted):
            return self._restricted(pattern.inner, pattern.query, pattern.key, scope)
        if isinstance(pattern, QBoundary):
            parts, out = dict(pattern.parts), np.zeros((n, n), bool)
            for m in self.prompt.present:
                out |= self._restricted(parts.get(m, Dense()), m, None, scope)
            return out
        if isinstance(pattern, Boundary2D):
            parts, out = dict(pattern.parts), np.zeros((n, n), bool)
            for a in self.prompt.present:
                for b in self.prompt.present:
                    out |= self._restricted(parts.get((a, b), Dense()), a, b, scope)
            return out
        return self._leaf(pattern, scope)

    def _restricted(self, pattern: Pattern, query: int | None, key: int | None, scope: Scope) -> np.ndarray:
        n = len(self.prompt.valid)
        if (query is not None and scope[0] not in (None, query)) or (key is not None and scope[1] not in (None, key)):
            return np.zeros((n, n), bool)
        inner = (scope[0] if query is None else query, scope[1] if key is None else key)
        inside = self.prompt.of_modality(query)[:, None] & self.prompt.of_modality(key)
        if not inside.any():
            return inside
        return inside & self.pairs(pattern, inner)

    # Parts, "rounded outwards to tiles".

    def _sink(self, count: int, scope: Scope) -> np.ndarray:
        whole = -(-min(count, BEYOND) // self.tile) * self.tile
        return np.broadcast_to(self.prompt.place(scope[1])[None] < whole, (len(self.prompt.valid),) * 2)

    def _stands(self, scope: Scope) -> list[tuple[int, int]]:
        """For each token, the first and last key tile at which a query of its tile stands."""
        if scope[0] == scope[1]:
            return [(p // self.tile, p // self.tile) for p in self.prompt.place(scope[1])]
        own, at = self.prompt.place(scope[0]) // self.tile, self.prompt.place(scope[1]) // self.tile
        queries = self.prompt.of_modality(scope[0])
        found: dict[int, tuple[int, int]] = {}
        for tile in set(own[queries].tolist()):
            there = at[queries & (own == tile)]
            found[tile] = (int(there.min()), int(there.max()))
        return [found[int(t)] if real else (0, 0) for t, real in zip(own, queries, strict=True)]

    def _local(self, count: int, scope: Scope) -> np.ndarray:
        n, tile, count = len(self.prompt.valid), self.tile, min(count, BEYOND)
        out = np.zeros((n, n), bool)
        if count == 0:
            return out
        key_tile = self.prompt.place(scope[1]) // tile
        for i, (first, _) in enumerate(self._stands(scope)):
            nearest = first * tile - (count - 1)  # of the last `count` keys of a query at the start of that key tile
            out[i] = key_tile >= nearest // tile
        return out

    def _last(self, count: int, scope: Scope) -> np.ndarray:
        queries, place = self.prompt.of_modality(scope[0]), self.prompt.place(scope[0])
        last = {int(p) // self.tile for p in place[queries][-count:]} if count else set()
        rows = np.array([int(p) // self.tile in last for p in place], bool) & queries
        return np.broadcast_to(rows[:, None], (len(rows),) * 2)

    # What was found.

    def _lines(self, pattern: Pattern, scope: Scope) -> np.ndarray:
        """Columns, and block diagonals as whole tiles."""
        n, tile, k = len(self.prompt.valid), self.tile, self.prompt.place(scope[1])
        columns, diagonals = self.found(pattern, scope, "columns"), self.found(pattern, scope, "diagonals")
        out = np.broadcast_to(columns[np.maximum(k, 0)] & (k >= 0), (n, n)).copy()
        chosen = np.flatnonzero(diagonals)
        for i, (first, last) in enumerate(self._stands(scope)):
            met = {int(p) // tile for p in k}
            hit = {t for t in met if ((chosen >= first - t) & (chosen <= last - t)).any()}
            out[i] |= np.isin(k // tile, list(hit))
        return out

    def _blocks(self, pattern: Any, scope: Scope) -> np.ndarray:
        table, size = self.found(pattern, scope, "blocks"), min(pattern.block_size, BEYOND)
        row, k = self.prompt.place(scope[0])[:, None], self.prompt.place(scope[1])[None]
        a = np.clip(row // size, 0, table.shape[0] - 1)
        b = np.clip(k // size, 0, table.shape[1] - 1)
        return table[a, b] & (row >= 0) & (k >= 0)

    def _leaf(self, pattern: Pattern, scope: Scope) -> np.ndarray:
        prompt, n = self.prompt, len(self.prompt.valid)
        q, k, row = prompt.place(scope[1])[:, None], prompt.place(scope[1])[None], prompt.place(scope[0])[:, None]
        if isinstance(pattern, Dense):
            return np.ones((n, n), bool)
        if isinstance(pattern, AShape):
            return self._sink(pattern.sink, scope) | self._local(pattern.local, scope)
        if isinstance(pattern, TriShape):
            near = self._sink(pattern.sink, scope) | self._local(pattern.local, scope)
            return near | self._last(pattern.last, scope)
        if isinstance(pattern, VerticalSlash):
            return self._lines(pattern, scope)
        if isinstance(pattern, FlexPrefill):
            return self._lines(pattern, scope) | self._blocks(pattern, scope)
        if isinstance(pattern, (BlockPeaks, BlockTopK, Prism, ProxyAttn, XAttention)):
            return self._blocks(pattern, scope)
        if isinstance(pattern, FlashPrefill):
            return self._blocks(pattern, scope) | self._last(pattern.last, scope)
        stride = getattr(pattern, "stride", None)
        if stride == "frame":
            stride = frame_stride(self.layout, scope[1])
            assert stride is not None, f"{pattern} has no frames in {scope}"
        if isinstance(pattern, StridedFixed):
            stride = min(stride, BEYOND)
            return (q // stride == k // stride) | np.broadcast_to(k % stride < pattern.first, (n, n))
        if isinstance(pattern, Strided):
            return (q - k < stride) | _residue(q - k, stride, 0)
        if isinstance(pattern, Dilated):
            return (k < pattern.sink) | ((q - k < pattern.local) & _residue(q - k, pattern.dilation, 0))
        assert isinstance(pattern, Grid), f"the oracle does not know {pattern!r}"
        if stride == "search":
            stride = int(self.found(pattern, scope, "stride"))
        phase = pattern.phase
        if phase == "search":
            phase = int(self.found(pattern, scope, "phase")) if pattern.columns or pattern.rows else 0
        out = self._sink(pattern.sink, scope) | self._local(pattern.local, scope)
        if pattern.columns:
            out = out | _residue(k, stride, phase)
        if pattern.rows:
            out = out | _residue(row, stride, phase)
        if pattern.slash:
            out = out | _residue(q - k, stride, 0)
        return out


def _residue(value: np.ndarray, stride: int, phase: int) -> np.ndarray:
    """``value = phase (mod stride)``, for strides and phases of any size."""
    phase %= stride
    if stride <= BEYOND:
        return value % stride == phase
    return (value == phase) | (value == phase - stride)


def selected(plan: mmflex.Plan, row: int, head: int) -> Callable[[Pattern, Scope, str], np.ndarray]:
    """What a plan selected for a prompt and a head. Sets that the plan dropped as irrelevant are made up at random: the
    mask must not depend on them."""

    def find(pattern: Pattern, scope: Scope, name: str) -> np.ndarray:
        for leaf in plan.program.leaves.values():
            if leaf.pattern == pattern and (leaf.scope.query, leaf.scope.key) == scope and head in leaf.heads:
                table = plan.selections[f"{name}@{leaf.name}"]
                return table[min(row, len(table) - 1), leaf.heads.index(head)].numpy()
        rng = np.random.default_rng(abs(hash((pattern, scope, name))) % 1000)
        n = plan.layout.length
        if name in ("stride", "phase"):
            return rng.integers(1, 50)
        return rng.random((n, n) if name == "blocks" else n) < 0.5

    return find


def token_mask(plan: mmflex.Plan, patterns: tuple[Pattern, ...], tokens: Sequence[int] | None = None) -> np.ndarray:
    """bool [B, Hq, M, N]: the mask of a plan's spec, one pattern per head, given what the plan selected. ``tokens``:
    which of the N the queries are, if not the last M."""
    batch, m, n = plan.shape[0][0], plan.shape[0][2], plan.shape[1][2]
    out = np.zeros((batch, len(patterns), m, n), bool)
    for b in range(batch):
        causal = Prompt.of(plan.layout, b).causal()
        for h, pattern in enumerate(patterns):
            meaning = Meaning(plan.layout, b, plan.program.tile, selected(plan, b, h))
            out[b, h] = (meaning.pairs(pattern) & causal)[range(n - m, n) if tokens is None else tokens]
    return out


# ---- attention under a mask ----


def softmax(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: np.ndarray, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(output [B, Hq, M, D], log-sum-exp [B, Hq, M]) in float64; rows without a key give 0 and -inf."""
    qs, ks, vs = (t.detach().cpu().double().numpy() for t in (q, k, v))
    group = qs.shape[1] // ks.shape[1]
    scale = qs.shape[3] ** -0.5 if scale is None else scale
    out, sums = np.zeros((*qs.shape[:3], vs.shape[3])), np.full(qs.shape[:3], -np.inf)
    for b in range(qs.shape[0]):
        for h in range(qs.shape[1]):
            score = np.where(mask[b, h], qs[b, h] @ ks[b, h // group].T * scale, -np.inf)
            top = score.max(-1, initial=-np.inf)
            some = np.isfinite(top)
            weight = np.exp(score[some] - top[some, None])
            total = weight.sum(-1)
            out[b, h, some] = weight @ vs[b, h // group] / total[:, None]
            sums[b, h, some] = np.log(total) + top[some]
    return out, sums


def error(found: torch.Tensor, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference (the plain norm where the reference is 0)."""
    difference = np.linalg.norm(found.detach().cpu().double().numpy() - wanted)
    return float(difference / (np.linalg.norm(wanted) or 1.0))


# ---- what the block lists compute ----


@dataclass(frozen=True, eq=False)
class Cover:
    """One head of one prompt in one launch, in slots.

    Attributes:
        rows, keys: the token in each slot, -1 for none.
        full, partial: bool [row tiles, key tiles].
        computed: bool [rows, keys]: full blocks whole, partial ones under the mask_mod.
        tile: block size.
    """

    kind: str
    compare: bool
    row: int
    head: int
    rows: np.ndarray
    keys: np.ndarray
    full: np.ndarray
    partial: np.ndarray
    computed: np.ndarray
    tile: int

    def tokens(self, m: int, n: int) -> np.ndarray:
        """int [M, N]: how often each pair of tokens is computed."""
        out = np.zeros((m, n), np.int64)
        real_rows, real_keys = np.flatnonzero(self.rows >= 0), np.flatnonzero(self.keys >= 0)
        a, b = np.nonzero(self.computed[np.ix_(real_rows, real_keys)])
        np.add.at(out, (self.rows[real_rows[a]], self.keys[real_keys[b]]), 1)
        return out

    def loose(self) -> tuple[int, int]:
        """(listed blocks that compute no pair, listed blocks)."""
        shape = (self.full.shape[0], self.tile, self.full.shape[1], self.tile)
        real = self.computed & (self.rows >= 0)[:, None] & (self.keys >= 0)
        some = real.reshape(shape).any((1, 3))
        listed = self.full | self.partial
        return int((listed & ~some).sum()), int(listed.sum())

    def stray(self) -> int:
        """Pairs of a real query with an empty key slot that would be computed: always forbidden."""
        return int(self.computed[np.ix_(self.rows >= 0, self.keys < 0)].sum())


def _table(count: torch.Tensor, index: torch.Tensor, tiles: int) -> np.ndarray:
    """A block list as a table, with all that must hold of a list: within the width, in range, no block twice."""
    out = np.zeros((count.shape[0], tiles), bool)
    assert int(count.max()) <= index.shape[-1], "more blocks than the list is wide"
    for i, n in enumerate(count.tolist()):
        blocks = index[i, :n].tolist()
        assert len(set(blocks)) == n, f"a block is listed twice: {blocks}"
        assert all(0 <= j < tiles for j in blocks), f"a block out of range: {blocks} of {tiles}"
        out[i, blocks] = True
    return out


def _limit(mask_mod: Any, b: int, h: int) -> np.ndarray | None:
    """int32 [KV]: the least row that sees each key slot, as the mask_mod captures it; None where it is the slot."""
    names = mask_mod.source.split("(", 1)[1].split(")", 1)[0].replace(" ", "").split(",")
    if "limit" not in names:
        return None
    limit = mask_mod.captures[names.index("limit")]
    if "first" in names:
        first = mask_mod.captures[names.index("first")]
        limit = limit.view(-1, first.shape[-1], limit.numel() // first.numel())
    return limit[b if len(limit) > 1 else 0, h].numpy()


def launch_cover(plan: mmflex.Plan) -> Iterator[Cover]:
    """What every launch of a plan computes, from its lists, its mask_mod and its slots alone."""
    tile = plan.program.tile
    for number, launch in enumerate(plan.program.launches):
        if launch.name == "dense":
            continue
        ready = plan.state.prepared[number]
        partial_count, partial_index, full_count, full_index = ready.lists
        assert partial_index.shape == full_index.shape, "both lists must have one width (Triton's strides)"
        row_slots, key_slots = launch.row_slots, launch.key_slots
        at_q, at_k = torch.arange(row_slots)[:, None], torch.arange(key_slots)[None]
        for b in range(plan.shape[0][0]):
            order_row = min(b, launch.rows.index.shape[0] - 1)
            for i, head in enumerate(launch.heads.heads):
                if head < 0:
                    assert not partial_count[b, i].any(), "an empty head has blocks"
                    assert not full_count[b, i].any(), "an empty head has blocks"
                    continue
                rows = launch.rows.index[order_row].astype(np.int64)
                if ready.row_index is not None:
                    there = np.arange(row_slots) < int(ready.row_count[b, i])
                    rows = np.where(there, ready.row_index[b, i].numpy(), -1)
                keys = np.full(key_slots, -1, np.int64)
                keys[: launch.keys.slots] = launch.keys.index[min(b, len(launch.keys.index) - 1)]
                limit = _limit(ready.mask_mod, b, i)
                if ready.key_index is not None:
                    keys = np.where(limit < NO_KEY, ready.key_index[b, i].numpy(), -1)
                if head in getattr(launch, "table_slot", {}):
                    first = launch.keys.slots + launch.section_slot[head] * launch.section
                    own = slice(first, first + launch.section)
                    tokens = ready.section_table[b, launch.table_slot[head]].numpy()
                    keys[own] = np.where(limit[own] < NO_KEY, tokens, -1)
                tiles = key_slots // tile
                partial = _table(partial_count[b, i], partial_index[b, i], tiles)
                full = _table(full_count[b, i], full_index[b, i], tiles)
                assert not (partial & full).any(), "a block is both full and partial"
                allowed = ready.mask_mod(b, i, at_q, at_k).numpy()
                wide_full, wide_partial = (t.repeat(tile, 0).repeat(tile, 1) for t in (full, partial))
                computed = wide_full | (wide_partial & allowed)
                yield Cover(launch.name, launch.compares, b, head, rows, keys, full, partial, computed, tile)


# ---- selection ----


def last_mass(
    q: np.ndarray, k: np.ndarray, prompt: Prompt, scope: Scope, last_q: int, scale: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(mass per key, mass per distance), float64, of the last ``last_q`` queries in scope; q [M, D], k [N, D].

    Attention is over all keys before a query; what falls on keys in scope is counted, in keys in scope.
    """
    m, n = len(q), len(k)
    at, inside = prompt.place(scope[1]), prompt.of_modality(scope[1])
    vertical, diagonal = np.zeros(size), np.zeros(size)
    rows = [i for i in range(m) if prompt.of_modality(scope[0])[n - m + i]][-last_q:]
    for i in rows:
        keys = np.flatnonzero(prompt.valid & (np.arange(n) <= n - m + i))
        score = k[keys] @ q[i] * scale
        weight = np.exp(score - score.max())
        weight /= weight.sum()
        for key, mass in zip(keys, weight, strict=True):
            if inside[key]:
                vertical[at[key]] += mass
                diagonal[at[n - m + i] - at[key]] += mass
    return vertical, diagonal


def _check_best(chosen: np.ndarray, mass: np.ndarray, budget: int, forced: np.ndarray, what: str) -> None:
    """The forced ones and then the heaviest, ``budget`` in all (or all that are forced), up to ties in rounding; of a
    budget of 0 nothing."""
    budget = min(max(budget, int(forced.sum())), len(mass)) if budget else 0
    assert chosen.sum() == budget, f"{what}: {chosen.sum()} chosen of a budget of {budget}"
    assert chosen[forced].all() or not budget, f"{what}: forced ones missing"
    rest = np.sort(mass[~forced])[::-1][: budget - int(forced.sum())].sum() if budget else 0.0
    got = mass[chosen & ~forced].sum()
    assert got >= rest - 1e-5 * max(1.0, mass.sum()), f"{what}: holds {got}, the best hold {rest}"


def near_diagonals(tiles: int, near: int, tile: int) -> np.ndarray:
    """bool [tiles]: the block diagonals on which one of the ``near`` nearest keys of a query lies, wherever in its tile
    that stands."""
    out = np.zeros(tiles, bool)
    for place in range(tile):
        for distance in range(near):
            block = -((place - distance) // tile)
            if block < tiles:
                out[block] = True
    return out


def block_diagonal_mass(diagonal: np.ndarray, tile: int, tiles: int) -> np.ndarray:
    """Mass of each block diagonal if queries at every place of a tile saw each distance alike."""
    out = np.zeros(tiles)
    for distance, mass in enumerate(diagonal):
        for place in range(tile):
            block = -((place - distance) // tile)
            if block < tiles:
                out[block] += mass / tile
    return out


def comb_excess(mass: np.ndarray, stride: int, phase: int) -> float:
    """What a comb holds beyond an even share."""
    return float(mass[phase::stride].sum() - mass.sum() / stride)


def grid_mass(
    pattern: Grid, vertical: np.ndarray, diagonal: np.ndarray, count: int, last_q: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mass that the search looks at: without sink, window and the last queries' own neighbourhood."""
    place = np.arange(len(vertical))
    keep = (place >= pattern.sink) & (place < count - pattern.local - last_q)
    return np.where(keep, vertical, 0.0), np.where(place >= pattern.local, diagonal, 0.0)


def check_selection(plan: mmflex.Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None) -> int:
    """Everything that a plan selected is what the docstrings say; returns how many choices were checked."""
    import oracle_adaptive

    layout, tile, checked = plan.layout, plan.program.tile, 0
    qs, ks = q.double().numpy(), k.double().numpy()
    vs = None if v is None else v.double().numpy()
    group = qs.shape[1] // ks.shape[1]
    for leaf in plan.program.leaves.values():
        pattern, scope = leaf.pattern, (leaf.scope.query, leaf.scope.key)
        if not isinstance(pattern, (VerticalSlash, Grid, *oracle_adaptive.CHECKS)):
            continue
        prompts = [Prompt.of(layout, b) for b in range(layout.modality.shape[0])]
        size = max(1, *(int(p.of_modality(scope[1]).sum()) for p in prompts)) if prompts else 1
        for b in range(qs.shape[0]):
            prompt = prompts[min(b, len(prompts) - 1)]
            for h in leaf.heads:
                found = functools.partial(selected(plan, b, h), pattern, scope)
                query, key = qs[b, h], ks[b, h // group]
                if type(pattern) in oracle_adaptive.CHECKS:
                    values = None if vs is None else vs[b]
                    head = oracle_adaptive.Head(plan, scope, prompt, qs[b], ks[b], values, h, found, size)
                    oracle_adaptive.CHECKS[type(pattern)](pattern, head)
                elif isinstance(pattern, VerticalSlash):
                    vertical, diagonal = last_mass(query, key, prompt, scope, pattern.last_q, plan.scale, size)
                    forced = np.arange(size) < FORCED_COLUMNS
                    _check_best(found("columns"), vertical, pattern.vertical, forced, "columns")
                    tiles = -(-size // tile)
                    mass = block_diagonal_mass(diagonal, tile, tiles)
                    nearest, budget = near_diagonals(tiles, pattern.near, tile), -(-pattern.slash // tile)
                    _check_best(found("diagonals"), mass, budget, nearest, "diagonals")
                elif pattern.phase == "search" and (pattern.columns or pattern.rows) and pattern.stride != "search":
                    vertical, diagonal = last_mass(query, key, prompt, scope, pattern.last_q, plan.scale, size)
                    count = int(prompt.of_modality(scope[1]).sum())
                    vertical, diagonal = grid_mass(pattern, vertical, diagonal, count, pattern.last_q)
                    stride = frame_stride(layout, scope[1]) if pattern.stride == "frame" else pattern.stride
                    got = comb_excess(vertical, stride, int(found("phase")))
                    best = max(comb_excess(vertical, stride, phase) for phase in range(stride))
                    assert got >= best - 1e-5, f"{pattern}: the chosen phase holds {got}, the best {best}"
                else:
                    continue
                checked += 1
    return checked
