"""What a plan computes, as small arrays: the numbers behind `mmflex.plot`, the text pictures and their tests.

Everything is counted from the block lists, so a picture of one million tokens costs no more than its lists; nothing is
ever tokens x tokens. Two views of a head:

- `mask_raster`: in *token order*, every computed pair at the tokens that it joins, however the plan permuted them;
- `launch_raster`: in *launch order*, the blocks as one kernel call has them, its own section of gathered columns apart.

Both count pairs per pixel and kind (in full and in partial blocks), so sums can be compared with the plan's counts.
Both take a `Plan` or a `Snapshot`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .snapshot import LaunchInfo, Lists, SlotTokens, Snapshot, snapshot

if TYPE_CHECKING:
    from ..runtime.plan import Plan

PIXELS = 1000
"""Pixels along the longer side, at most."""


@dataclass(frozen=True)
class Raster:
    """Pairs per pixel, float64 ``[row pixels, key pixels]``.

    Attributes:
        full, partial: pairs of tokens (or of slots, in launch order) in full and in partial blocks.
        pairs: pairs there are.
        later: bool, pixels whose keys all come after their queries; in launch order all False.
    """

    full: np.ndarray
    partial: np.ndarray
    pairs: np.ndarray
    later: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """Computed pairs over all pairs of a pixel, 0 to 1."""
        return np.clip((self.full + self.partial) / np.maximum(self.pairs, 1), 0.0, 1.0)


# ---- views ----------------------------------------------------------------------------------------------------------


def mask_raster(
    plan: Plan | Snapshot, head: int, batch: int = 0, pixels: int = PIXELS, rows: int | None = None
) -> Raster:
    """A head's computed pairs in token order: the M queries down, the N keys to the right, in ``pixels`` columns and
    ``rows`` rows (as many, if None) at most.

    Where a launch keeps the natural order its partial blocks are drawn whole. Where it moves tokens (sections, other
    orders) what falls after the query is left out: such pairs are computed and masked, and would only look like noise.
    """
    snap = snapshot(plan)
    snap.check(head, batch)
    m, n, tile = snap.queries, snap.length, snap.tile
    height, width = min(m, pixels if rows is None else rows), min(n, pixels)
    # token * pixels // tokens, and how many tokens each pixel has
    row_pixel, key_pixel = np.arange(m) * height // max(m, 1), np.arange(n) * width // max(n, 1)
    row_count, key_count = np.bincount(row_pixel, minlength=height), np.bincount(key_pixel, minlength=width)
    row_last = snap.query_tokens.numbers[np.cumsum(row_count) - 1] if m else np.empty(0, np.int32)
    key_first = np.cumsum(key_count) - key_count
    later = key_first > row_last[:, None]
    full, partial = np.zeros((height, width)), np.zeros((height, width))
    pairs = np.outer(row_count, key_count).astype(float)
    for number, place in snap.launches_of(head):
        launch = snap.launches[number]
        if launch.kind == "dense":
            full += np.where(later, 0.0, pairs)
            continue
        slots = snap.reader.tokens(number, place, batch)
        row_bins = _bins(slots.rows, row_pixel, height, tile)
        lists = snap.reader.lists(number, place, batch)
        for keys, moved in _sides(launch, slots, head):
            key_bins = _bins(keys, key_pixel, width, tile)
            for out, listed in zip((partial, full), lists, strict=True):
                found = _spread(listed, row_bins, key_bins)
                out += np.where(later, 0.0, found) if moved else found
    return Raster(full, partial, pairs, later)


def _sides(launch: LaunchInfo, slots: SlotTokens, head: int) -> list[tuple[np.ndarray, bool]]:
    """(token of every key slot, whether they have moved) of the main section and of the head's own one."""
    parts = []
    for keys, first, moved in (
        (slots.keys, 0, not launch.natural),
        (slots.own, (launch.own(head) or range(1)).start, True),
    ):
        if keys is not None and (keys >= 0).any():
            out = np.full(launch.key_slots, -1, np.int64)
            out[first : first + len(keys)] = keys
            parts.append((out, moved))
    return parts


def launch_raster(
    plan: Plan | Snapshot, head: int, number: int, batch: int = 0, pixels: int = PIXELS
) -> tuple[Raster, Raster | None]:
    """A head's blocks in one launch, in its order: (the main section, the head's own section of columns or None)."""
    snap = snapshot(plan)
    snap.check(head, batch)
    places = {n: place for n, place in snap.launches_of(head) if snap.launches[n].kind != "dense"}
    if number not in places:
        raise ValueError(
            f"head {head} has no block lists in launch {number}: those it has are in launches {sorted(places)}"
        )
    launch, tile = snap.launches[number], snap.tile
    lists = snap.reader.lists(number, places[number], batch)
    rows = np.arange(launch.row_slots)
    row_pixel, height = _pixel(range(launch.row_slots), launch.row_slots, pixels)
    row_bins = _bins(rows, row_pixel, height, tile)

    def count(span: range) -> Raster:
        key_pixel, width = _pixel(span, launch.key_slots, pixels)
        keys = np.where(key_pixel >= 0, np.arange(launch.key_slots), -1)
        key_bins = _bins(keys, key_pixel, width, tile)
        partial, full = (_spread(listed, row_bins, key_bins) for listed in lists)
        sizes = (np.bincount(p[p >= 0], minlength=k) for p, k in ((row_pixel, height), (key_pixel, width)))
        pairs = np.outer(*sizes).astype(float)
        return Raster(full, partial, pairs, np.zeros(pairs.shape, bool))

    own = launch.own(head)
    return count(range(launch.main_slots)), None if own is None else count(own)


def _pixel(span: range, slots: int, pixels: int) -> tuple[np.ndarray, int]:
    """The pixel of each slot (-1 outside the span), and how many pixels there are."""
    n = max(1, min(len(span), pixels))
    pixel = np.full(slots, -1)
    pixel[span.start : span.stop] = np.arange(len(span)) * n // max(len(span), 1)
    return pixel, n


# ---- counting -------------------------------------------------------------------------------------------------------


def _bins(token: np.ndarray, pixel: np.ndarray, pixels: int, tile: int) -> torch.Tensor:
    """Sparse float32 ``[tiles, pixels]``: how many slots of each tile fall into each pixel."""
    slot = np.flatnonzero(token >= 0)
    flat, count = np.unique(slot // tile * pixels + pixel[token[slot]], return_counts=True)
    tiles = -(-len(token) // tile)
    rows = np.bincount(flat // pixels, minlength=tiles).cumsum()
    start = torch.as_tensor(np.concatenate([[0], rows]))
    values = torch.as_tensor(count, dtype=torch.float32)
    return _csr(start, torch.as_tensor(flat % pixels), values, (tiles, pixels))


def _spread(listed: Lists, rows: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """Pairs per pixel, float64 [row pixels, key pixels], of a block list."""
    count, index = listed
    start = torch.as_tensor(np.concatenate([[0], np.cumsum(count, dtype=np.int64)]))
    columns = torch.as_tensor(index.astype(np.int64))
    blocks = _csr(start, columns, torch.ones(len(columns)), (len(count), keys.shape[0]))
    per_tile = blocks @ keys.to_dense()  # [row tiles, key pixels]
    rows = rows.to_dense() if rows.shape[0] * rows.shape[1] < 1 << 24 else rows
    return (rows.mT @ per_tile).numpy().astype(float)


def _csr(start: torch.Tensor, column: torch.Tensor, value: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse.*")
        return torch.sparse_csr_tensor(start, column, value, size)


# ---- single rows ----------------------------------------------------------------------------------------------------


def allowed_rows(plan: Plan, rows: torch.Tensor) -> torch.Tensor:
    """bool ``[B, Hq, R, N]``: which keys these queries (int64 ``[R]``, counted from the first query) attend to.

    From the block lists and the mask of partial blocks, as the kernel has them; `Plan.dense_mask` is from expressions.
    """
    snap, rows = snapshot(plan), rows.cpu()
    layout = snap.layout
    row_tokens = snap.query_tokens.numbers[rows.numpy()]
    out = torch.zeros((snap.batch, snap.heads, len(rows), layout.length), dtype=torch.bool)
    for number, launch in enumerate(snap.launches):
        for place, head in enumerate(launch.heads):
            for batch in range(snap.batch if head >= 0 else 0):
                if launch.kind == "dense":
                    position = torch.tensor(layout.position[batch % layout.batch_size])
                    own = position[row_tokens][:, None]
                    out[batch, head] |= (own >= position) & (position >= 0)
                else:
                    _add_rows(out[batch, head], plan, snap, number, place, batch, rows)
    return out


def _add_rows(
    out: torch.Tensor, plan: Plan, snap: Snapshot, number: int, place: int, batch: int, rows: torch.Tensor
) -> None:
    launch, tile = snap.launches[number], snap.tile
    slots = snap.reader.tokens(number, place, batch)
    where = np.full(snap.queries, -1, np.int64)
    real = np.flatnonzero(slots.rows >= 0)
    where[slots.rows[real]] = real
    slot = torch.as_tensor(where)[rows]
    here = torch.nonzero(slot >= 0)[:, 0]
    slot = slot[here]
    keys = torch.full((launch.key_slots,), -1)
    for part, _ in _sides(launch, slots, launch.heads[place]):
        keys = torch.where(torch.as_tensor(part) >= 0, torch.as_tensor(part), keys)
    tiles = launch.key_slots // tile
    found = []
    for count, index in snap.reader.lists(number, place, batch):
        table = np.zeros((len(count), tiles), bool)
        table[np.repeat(np.arange(len(count)), count), index] = True
        found.append(torch.as_tensor(table[(slot // tile).numpy()]).repeat_interleave(tile, 1))
    device = plan.state.device
    b, h, kv = (torch.as_tensor(x, device=device) for x in (batch, place, torch.arange(len(keys))))
    allowed = plan.state.prepared[number].mask_mod(b, h, slot.to(device)[:, None], kv).cpu()
    pairs = (found[1] | (found[0] & allowed)) & (keys >= 0)
    row, column = pairs.nonzero(as_tuple=True)
    out[here[row], keys[column]] = True
