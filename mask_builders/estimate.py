"""What patterns select from: attention of the last queries, pooled scores, and how the heaviest are kept.

Estimates are in float32, in the coordinates of a `View`: keys in scope, in order. No device value is read back.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmflex.ir.pattern import SharedQueries, View
from mmflex.ir.queries import QueryTokens
from mmflex.runtime.device import array_constant, device_constant
from mmflex.runtime.kernels import use_triton
from mmflex.runtime.kernels.mass import SPAN, block_diagonals, last_mass
from mmflex.runtime.kernels.rows import take_rows
from mmflex.runtime.kernels.select import heaviest

from .near import NEAR, NearBlocks
from .values import block_prominence

__all__ = [
    "LastMass",
    "LastQueries",
    "Pooled",
    "PooledBlocks",
    "comb_excess",
    "combed",
    "heaviest",
    "likely_strides",
]

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
        rows, limit, stand, position, keys = (None if a is None else array_constant(a, q.device) for a in last.arrays)
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
    """`mmflex.runtime.kernels.mass.last_mass` in torch, some KV heads and rows at a time."""
    batch, heads, rows, _ = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    vertical = torch.zeros((batch, heads, size), dtype=torch.float32, device=q.device)
    diagonal = torch.zeros_like(vertical)
    group = heads // kv_heads
    step = max(1, _CHUNK // max(1, batch * group * rows * length))
    many = max(1, min(rows, _CHUNK // max(1, batch * group * step * length)))
    for first, row in itertools.product(range(0, kv_heads, step), range(0, rows, many)):
        part, some = slice(first * group, (first + step) * group), slice(row, row + many)
        seen = (position[:, None] <= limit[:, some, None]) & (position >= 0)[:, None]
        query = q[:, part, some].unflatten(1, (-1, group)).flatten(2, 3).float()
        scores = (query @ k[:, first : first + step].float().mT * scale).unflatten(2, (group, -1)).flatten(1, 2)
        scores = torch.where((scores.abs() < float("inf")) & seen[:, None], scores, float("-inf"))
        mass = scores.softmax(-1).nan_to_num_(0.0)
        if keys is not None:
            inside = (keys >= 0)[:, None, None].expand(batch, mass.shape[1], mass.shape[2], -1)
            mass = mass.gather(3, keys.long().clamp(min=0)[:, None, None].expand(inside.shape)) * inside
        else:
            mass = mass[..., :size]
        vertical[:, part] += mass.sum(2)
        _add_diagonals(diagonal[:, part], mass, stand[:, some])
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
    """Means of blocks of queries and keys, float32.

    Attributes:
        q: [B, H, query blocks, D], scaled. k: [B, Hkv, key blocks, D].
        reach: int32 [B|1, query blocks], the last key block that the queries of a block stand at (-1: no query).
        near: the key blocks that hold their nearest keys.
        prominence: [B, Hkv, key blocks], how far values stand out (`block_prominence`); None unless asked for.
    """

    q: Tensor
    k: Tensor
    reach: Tensor
    near: NearBlocks
    prominence: Tensor | None = None

    def scores(self, rows: slice, weight: float = 0.0) -> Tensor:
        """float32 [B, H, rows, key blocks] of some query blocks, -inf where no key is before a query; ``weight`` of the
        prominence is added."""
        group = self.q.shape[1] // self.k.shape[1]
        scores = mean_products(self.q[:, :, rows], self.k)
        if self.prominence is not None and weight:
            scores += weight * self.prominence.repeat_interleave(group, 1)[:, :, None]
        number = torch.arange(self.k.shape[2], device=self.k.device)
        return scores.masked_fill(number > self.reach[:, None, rows, None], float("-inf"))


def mean_products(q: Tensor, k: Tensor) -> Tensor:
    """float32 [B, H, rows, keys] of q [B, H, rows, D] and k [B, Hkv, keys, D]; what is not finite is 0."""
    group = q.shape[1] // k.shape[1]
    return (q.unflatten(1, (-1, group)) @ k[:, :, None].mT).flatten(1, 2).nan_to_num(0.0)


@dataclass(frozen=True)
class PooledBlocks:
    """Estimator: queries and keys mean-pooled over blocks (MInference, block-sparse heads).

    Attributes:
        block_size: tokens. near: how many nearest keys of every query `Pooled.near` covers.
        values: the prominence of values is estimated as well.
    """

    block_size: int
    near: int = NEAR
    values: bool = False

    def scored(self, view: View) -> float:
        """Query-key products for one head and prompt: of every block of queries with every block of keys before it."""
        return view.rows / self.block_size * (view.size / self.block_size) / 2

    def __call__(self, q: Tensor, k: Tensor, view: View, scale: float) -> Pooled:
        """q [B, H, M, D], k [B, Hkv, N, D] -> `Pooled`."""
        size = view.block_size(self.block_size)
        every = view.shared_queries
        (row_block, key_block, _), reach = blocks_of(view, size), blocks_of(every, size)[2]
        return Pooled(
            block_means(q, row_block, reach.shape[1], size, view.shared) * scale,
            block_means(k, key_block, -(-view.size // size), size),
            array_constant(reach, q.device),
            NearBlocks.of(every, size, self.near, q.device),
            block_prominence(view, size) if self.values else None,
        )


def blocks_of(view: View, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Host data: the block of each query, int [B, M], and of each key, int [B, N] (-1: out of scope), and the last key
    block that the queries of each block stand at, int [B, query blocks] (-1: none)."""
    layout, take = view.layout, view.queries.take

    def build() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        in_rows = take(layout.of(view.scope.query))
        row_block = np.where(in_rows, take(layout.coordinate(view.scope.query)) // size, -1)
        key_block = np.where(layout.of(view.scope.key), layout.coordinate(view.scope.key) // size, -1)
        key_reached = np.where(in_rows, take(layout.coordinate(view.scope.key)) // size, -1)
        reach = np.full((len(row_block), -(-view.rows // size) + 1), -1)
        for b in range(len(row_block)):
            np.maximum.at(reach[b], row_block[b], key_reached[b])
        return row_block, key_block, np.ascontiguousarray(reach[:, :-1])

    return layout.once(("pooled", view.scope, view.queries, size), build)


def block_means(x: Tensor, block: np.ndarray, blocks: int, size: int, shared: SharedQueries | None = None) -> Tensor:
    """Means of x [B, H, T, D] over tokens of equal ``block`` [B, T] (-1: none) -> float32 [B, H, blocks, D]. Where x is
    ``shared``, over the tokens of all processes."""
    tokens = x.shape[2]
    if shared is None and tokens == blocks * size and len(block) == 1 and (block[0] == np.arange(tokens) // size).all():
        return x.unflatten(2, (blocks, size)).mean(3, dtype=torch.float32)
    index = array_constant(block, x.device).long().expand(len(x), -1)
    index = torch.where(index < 0, blocks, index)
    total = x.new_zeros((x.shape[0], x.shape[1], blocks + 1, x.shape[3]), dtype=torch.float32)
    total.scatter_add_(2, index[:, None, :, None].expand(x.shape), x.float().nan_to_num(0.0))
    count = torch.zeros((len(index), blocks + 1), dtype=torch.float32, device=x.device)
    count.scatter_add_(1, index, torch.ones_like(index).float())
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
