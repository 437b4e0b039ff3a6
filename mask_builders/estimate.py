"""What patterns select from: attention of the last queries, pooled scores, and how the heaviest are kept.

Estimates are in float32, in the coordinates of a `View`: keys in scope, in order. No device value is read back.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmflex.ir.pattern import SharedQueries, View
from mmflex.ir.queries import QueryTokens
from mmflex.runtime.device import device_constant
from mmflex.runtime.kernels import use_triton
from mmflex.runtime.kernels.mass import SPAN, block_diagonals, last_mass
from mmflex.runtime.kernels.rows import take_rows
from mmflex.runtime.kernels.select import heaviest

__all__ = ["LastMass", "LastQueries", "Pooled", "PooledBlocks", "comb_excess", "combed", "heaviest", "likely_strides"]

_CHUNK = 1 << 27
"""Scores held at a time, in elements: bounds the memory of an estimate at any length."""


@dataclass(frozen=True)
class LastMass:
    """Attention mass of the last queries, summed over them; float32.

    Attributes:
        vertical: [B, H, keys], per key.
        diagonal: [B, H, keys], per distance between query and key (None unless asked for).
        block_diagonals: [B, H, tiles], what each block diagonal would hold (`mmflex.runtime.kernels.mass`).
        view: where it was measured.
    """

    vertical: Tensor
    diagonal: Tensor | None
    block_diagonals: Tensor
    view: View


@dataclass(frozen=True)
class LastQueries:
    """Estimator: softmax attention of the last ``last_q`` queries in scope over all keys before them (MInference,
    section 3.2; per modality: MMInference, section 3.2); ``distances``: also the mass at every distance."""

    last_q: int = 64
    distances: bool = False

    def scored(self, view: View) -> float:
        """Query-key products for one head and prompt: two sweeps over the keys."""
        return 2.0 * min(self.last_q, view.rows) * view.size

    def __call__(self, q: Tensor, k: Tensor, view: View, scale: float) -> LastMass:
        """q [B, H, M, D], k [B, Hkv, N, D] -> `LastMass`. Scores that are not finite count as no attention."""
        q, queries = view.last_queries(q)
        last = _last(view, self.last_q, queries)
        rows, limit, stand, position, keys = (None if a is None else _on(a, q.device) for a in last.arrays)
        assert rows is not None
        assert limit is not None
        assert stand is not None
        assert position is not None
        limit, stand = limit.expand(len(q), -1).contiguous(), stand.expand(len(q), -1).contiguous()
        keys = None if keys is None else keys.expand(len(q), -1).contiguous()
        if use_triton(q) and last.spread <= SPAN - 128 and view.tile % 128 == 0:
            return LastMass(
                *last_mass(
                    q, rows, k, scale, limit, position, stand, keys, view.size, view.tile, self.distances, last.spread
                ),
                view,
            )
        query = take_rows(q, rows[:, None].expand(q.shape[0], q.shape[1], -1))
        vertical, diagonal = _twin(query, k, scale, limit, position, last.stand, keys, view.size)
        return LastMass(vertical, diagonal, block_diagonals(diagonal, view.tile), view)


def _twin(
    q: Tensor,
    k: Tensor,
    scale: float,
    limit: Tensor,
    position: Tensor,
    stand: np.ndarray,
    keys: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """`mmflex.runtime.kernels.mass.last_mass` in torch, some KV heads at a time."""
    batch, heads, rows, _ = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    seen = (position[:, None] <= limit[..., None]) & (position >= 0)[:, None]
    vertical = torch.zeros((batch, heads, size), device=q.device)
    diagonal = torch.zeros_like(vertical)
    group = heads // kv_heads
    step = max(1, _CHUNK // max(1, batch * group * rows * length))
    for first in range(0, kv_heads, step):
        part = slice(first * group, (first + step) * group)
        query = q[:, part].unflatten(1, (-1, group)).flatten(2, 3).float()
        scores = (query @ k[:, first : first + step].float().mT * scale).unflatten(2, (group, -1)).flatten(1, 2)
        scores = torch.where((scores.abs() < float("inf")) & seen[:, None], scores, float("-inf"))
        mass = scores.softmax(-1).nan_to_num_(0.0)
        if keys is not None:
            inside = (keys >= 0)[:, None, None].expand(batch, mass.shape[1], mass.shape[2], -1)
            mass = mass.gather(3, keys.long().clamp(min=0)[:, None, None].expand(inside.shape)) * inside
        else:
            mass = mass[..., :size]
        vertical[:, part] = mass.sum(2)
        _add_diagonals(diagonal[:, part], mass, stand)
    return vertical, diagonal


def _add_diagonals(out: Tensor, mass: Tensor, at: np.ndarray) -> None:
    """Adds mass [B, H, rows, keys] along distances ``at[b, row] - key`` into out [B, H, keys]."""
    size = mass.shape[-1]
    for b in range(mass.shape[0]):
        stands = at[b % len(at)].tolist()
        top = max(stands)
        if top < 0:
            continue
        low = min(stand for stand in stands if stand >= 0)
        # Slot x collects distance top - x: rows only shift, and one flip at the end turns slots into distances.
        slots = mass.new_zeros((mass.shape[1], size + top - low))
        for row, stand in enumerate(stands):
            if stand >= 0:
                slots[:, top - stand : top - stand + size] += mass[b, :, row]
        out[b, :, : top + 1] += slots[:, : top + 1].flip(-1)


@dataclass(frozen=True)
class Pooled:
    """Mean-pooled queries [B, H, query blocks, D] and keys [B, Hkv, key blocks, D], scaled, and the last key block that
    the queries of a block stand at, int32 [B, query blocks] (-1: no query)."""

    q: Tensor
    k: Tensor
    reach: Tensor

    def scores(self, rows: slice) -> Tensor:
        """float32 [B, H, rows, key blocks] of some query blocks; -inf where no key is before a query."""
        group = self.q.shape[1] // self.k.shape[1]
        scores = self.q[:, :, rows].unflatten(1, (-1, group)) @ self.k[:, :, None].mT
        seen = self.reach[:, rows, None] >= torch.arange(self.k.shape[2], device=self.k.device)
        return scores.flatten(1, 2).nan_to_num(0.0).masked_fill(~seen[:, None], float("-inf"))


@dataclass(frozen=True)
class PooledBlocks:
    """Estimator: queries and keys mean-pooled over blocks (MInference, block-sparse heads)."""

    block_size: int

    def scored(self, view: View) -> float:
        """Query-key products for one head and prompt: of every block of queries with every block of keys before it."""
        return view.rows / self.block_size * (view.size / self.block_size) / 2

    def __call__(self, q: Tensor, k: Tensor, view: View, scale: float) -> Pooled:
        """q [B, H, M, D], k [B, Hkv, N, D] -> `Pooled`."""
        layout, size = view.layout, view.block_size(self.block_size)
        every = view.queries if view.shared is None else view.shared.queries

        def build() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            in_scope = layout.of(view.scope.query)
            block = np.where(in_scope, layout.coordinate(view.scope.query) // size, -1)
            key_block = np.where(layout.of(view.scope.key), layout.coordinate(view.scope.key) // size, -1)
            row_block, rows = view.queries.take(block), every.take(block)
            stand = every.take(np.where(in_scope, layout.coordinate(view.scope.key) // size, -1))
            reach = np.full((len(stand), -(-view.rows // size) + 1), -1)
            for b in range(len(stand)):
                np.maximum.at(reach[b], rows[b], stand[b])
            return row_block, key_block, np.ascontiguousarray(reach[:, :-1])

        row_block, key_block, reach = layout.once(("pooled", view.scope, view.queries, every, size), build)
        pooled_q = _pool(q, row_block, reach.shape[1], size, view.shared) * scale
        return Pooled(pooled_q, _pool(k, key_block, -(-view.size // size), size), _on(reach, q.device))


def _pool(x: Tensor, block: np.ndarray, blocks: int, size: int, shared: SharedQueries | None = None) -> Tensor:
    """Means of x [B, H, T, D] over tokens of equal ``block`` [B, T] (-1: none) -> float32 [B, H, blocks, D]. Where x is
    ``shared``, over the tokens of all processes."""
    tokens = x.shape[2]
    if shared is None and tokens == blocks * size and len(block) == 1 and (block[0] == np.arange(tokens) // size).all():
        return x.unflatten(2, (blocks, size)).mean(3, dtype=torch.float32)
    index = _on(block, x.device).long().expand(len(x), -1)
    index = torch.where(index < 0, blocks, index)
    total = x.new_zeros((x.shape[0], x.shape[1], blocks + 1, x.shape[3]), dtype=torch.float32)
    total.scatter_add_(2, index[:, None, :, None].expand(x.shape), x.float().nan_to_num(0.0))
    count = torch.zeros((len(index), blocks + 1), device=x.device).scatter_add_(
        1, index, torch.ones_like(index).float()
    )
    if shared is not None:
        total, count = shared.sum(total), shared.sum(count)
    return total[:, :, :-1] / count[:, None, :-1, None].clamp(min=1.0)


@dataclass(frozen=True, eq=False)
class _Last:
    """The last queries in scope, host data: indices into the queries (-1: none), the position up to which each sees,
    where each stands in keys in scope, positions of all keys, tokens in scope (None: all, in place); [B, ...] int32."""

    rows: np.ndarray
    limit: np.ndarray
    stand: np.ndarray
    position: np.ndarray
    keys: np.ndarray | None

    @property
    def arrays(self) -> tuple[np.ndarray | None, ...]:
        return self.rows, self.limit, self.stand, self.position, self.keys

    @cached_property
    def spread(self) -> int:
        """Keys between the first and the last place at which the queries stand, at most over the prompts."""
        inside = self.stand >= 0
        least = np.where(inside, self.stand, 1 << 30).min(axis=1)
        return int(np.where(inside.any(axis=1), self.stand.max(axis=1) - least, 0).max(initial=0))


def _last(view: View, last_q: int, queries: QueryTokens) -> _Last:
    layout, scope = view.layout, view.scope
    last_q = min(last_q, max(1, queries.count))

    def build() -> _Last:
        rows = _last_true(queries.take(layout.of(scope.query)), max(16, 1 << (last_q - 1).bit_length()), last_q)
        at = np.maximum(rows, 0)
        limit = np.where(rows >= 0, np.take_along_axis(queries.take(layout.position), at, axis=1), -1)
        stand = np.where(rows >= 0, np.take_along_axis(queries.take(layout.coordinate(scope.key)), at, axis=1), -1)
        keys = None
        if scope.key is not None or layout.padded:
            keys = np.full((layout.batch_size, view.size), -1, np.int64)
            for b in range(layout.batch_size):
                found = np.flatnonzero(layout.of(scope.key)[b])
                keys[b, : len(found)] = found
        return _Last(rows, limit, stand, layout.position, keys)

    return layout.once(("last queries", scope, queries, last_q), build)


def _last_true(mask: np.ndarray, width: int, n: int) -> np.ndarray:
    """Indices of the last n true values of each row, [B, width], -1 in front where there are fewer."""
    out = np.full((len(mask), width), -1, np.int64)
    for b, row in enumerate(mask):
        found = np.flatnonzero(row)[-n:]
        out[b, width - len(found) :] = found
    return out


_held: dict[tuple[int, torch.device], tuple[weakref.ref, Tensor]] = {}


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    """An int32 copy of a host array on a device, made once in the array's life."""
    key = (id(array), device)
    if key not in _held or _held[key][0]() is not array:
        tensor = torch.as_tensor(array.astype(np.int32)).to(device)
        _held[key] = (weakref.ref(array, lambda _: _held.pop(key, None)), tensor)
    return _held[key][1]


def _ramp(n: int, device: torch.device) -> Tensor:
    """int64 [n], from 0 on; kept."""
    return device_constant(("ramp", n), device, lambda on: torch.arange(n, device=on))


def first_of(n: int, count: int, device: torch.device) -> Tensor:
    """bool [n], true for the first ``count``; kept."""
    return device_constant(("first of", n, count), device, lambda on: torch.arange(n, device=on) < count)


def combed(mass: Tensor, stride: int, first: int, last: int) -> Tensor:
    """[B, H, stride]: mass [B, H, n] of the places from ``first`` to before ``last`` on each comb ``phase, phase +
    stride, ...`` (`comb_excess` for one stride, with the even share left in)."""
    out = mass.new_zeros((*mass.shape[:-1], stride))
    last = max(first, last)
    whole, end = min(-(-first // stride) * stride, last), max(first, last // stride * stride)
    if whole < end:
        torch.sum(mass[..., whole:end].unflatten(-1, (-1, stride)), -2, out=out)
    for low, high in ((first, whole), (max(whole, end), last)):  # periods of which only a part is inside
        if low < high:
            out[..., low % stride : low % stride + high - low] += mass[..., low:high]
    return out


def comb_excess(mass: Tensor, strides: Tensor, widest: int) -> Tensor:
    """Mass beyond an even share that lies on each comb ``phase, phase + stride, ...``.

    mass [B, H, n], strides [B, H, S] -> [B, H, S, widest] over phases; -inf for phases past the stride. This is what
    makes strides comparable: a comb of stride s is charged the ``total / s`` that any comb of its density would hold,
    so neither dense combs (they catch everything) nor multiples of the true stride (they miss half) win.
    """
    batch, heads, n = mass.shape
    shape = (batch, heads, strides.shape[-1], n)
    phase = (_ramp(n, mass.device) % strides[..., None]).expand(shape)
    held = mass.new_zeros((*shape[:-1], widest)).scatter_add_(-1, phase, mass[:, :, None].expand(shape))
    share = mass.sum(-1)[..., None, None] / strides[..., None]
    return (held - share).masked_fill(_ramp(widest, mass.device) >= strides[..., None], float("-inf"))


def likely_strides(mass: Tensor, shortest: int, longest: int, count: int) -> Tensor:
    """int64 [B, H, count]: the lags between ``shortest`` and ``longest`` at which mass [B, H, n] resembles itself most
    (autocorrelation by FFT)."""
    n = mass.shape[-1]
    longest = max(shortest, min(longest, n - 1))
    centred = mass - mass.mean(-1, keepdim=True)
    power = torch.fft.rfft(centred, n=2 * n).abs().square()
    lags = torch.fft.irfft(power, n=2 * n)[..., : longest + 1]
    lags = torch.nn.functional.pad(lags, (0, max(0, longest + 1 - lags.shape[-1])))[..., shortest:]
    return lags.topk(min(count, lags.shape[-1]), dim=-1).indices + shortest
