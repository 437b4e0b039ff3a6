"""What a plan computes, as small arrays: the numbers behind `mmflex.plot`, the text pictures and their tests.

Everything is counted from the block lists, so a picture of one million tokens costs no more than its lists; nothing is
ever tokens x tokens. Two views of a head:

- `mask_raster`: in *token order*, every computed pair at the tokens that it joins, however the plan permuted them;
- `launch_raster`: in *launch order*, the blocks as one kernel call has them, its own section of gathered columns apart.

Both count pairs per pixel and kind (in full and in partial blocks), so sums can be compared with the plan's counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from .runtime.attention import Plan

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


def mask_raster(plan: Plan, head: int, batch: int = 0, pixels: int = PIXELS) -> Raster:
    """A head's computed pairs in token order: rows are the M queries, columns the N keys.

    Where a launch keeps the natural order its partial blocks are drawn whole. Where it moves tokens (sections, other
    orders) what falls after the query is left out: such pairs are computed and masked, and would only look like noise.
    """
    check_head(plan, head, batch)
    m, n, origin = *_sizes(plan), _sizes(plan)[1] - _sizes(plan)[0]
    rows, keys = min(m, pixels), min(n, pixels)
    # token * pixels // tokens, and how many tokens each pixel has
    row_pixel, key_pixel = np.arange(m) * rows // max(m, 1), np.arange(n) * keys // max(n, 1)
    row_count, key_count = np.bincount(row_pixel, minlength=rows), np.bincount(key_pixel, minlength=keys)
    row_last = origin + np.cumsum(row_count) - 1
    key_first = np.cumsum(key_count) - key_count
    later = key_first > row_last[:, None]
    full, partial = np.zeros((rows, keys)), np.zeros((rows, keys))
    pairs = np.outer(row_count, key_count).astype(float)
    for number, place in launches_of(plan, head):
        launch = plan.program.launches[number]
        if launch.kind == "dense":
            full += np.where(later, 0.0, pairs)
            continue
        slots = slot_tokens(plan, number, place, batch)
        row_slot, key_slot = slots.rows, slots.keys
        row_bins = _bins(row_slot, row_pixel, rows, plan.program.tile)
        main = launch.keys.slots
        still = np.arange(len(key_slot)) < (main if slots.natural else 0)
        for part, moved in ((np.where(still, key_slot, -1), False), (np.where(still, -1, key_slot), True)):
            if not (part >= 0).any():
                continue
            key_bins = _bins(part, key_pixel, keys, plan.program.tile)
            for out, (count, index) in zip((partial, full), _lists(plan, number, place, batch), strict=True):
                found = _spread(count, index, row_bins, key_bins)
                out += np.where(later, 0.0, found) if moved else found
    return Raster(full, partial, pairs, later)


def launch_raster(
    plan: Plan, head: int, number: int, batch: int = 0, pixels: int = PIXELS
) -> tuple[Raster, Raster | None]:
    """A head's blocks in one launch, in its order: (the main section, the head's own section of columns or None)."""
    check_head(plan, head, batch)
    launch = plan.program.launches[number]
    places = dict(launches_of(plan, head))
    if number not in places or launch.kind == "dense":
        raise ValueError(
            f"head {head} has no block lists in launch {number}: those it has are in launches {sorted(places)}"
        )
    place, tile = places[number], plan.program.tile
    main, own = section_slots(plan, head, number)

    def side(span: range) -> tuple[np.ndarray, int]:
        """The pixel of each slot (-1 outside the span)."""
        n = max(1, min(len(span), pixels))
        pixel = np.full(max(launch.key_slots, launch.row_slots), -1)
        pixel[span.start : span.stop] = np.arange(len(span)) * n // len(span)
        return pixel, n

    def count(span: range) -> Raster:
        (row_pixel, rows), (key_pixel, keys) = side(range(launch.row_slots)), side(span)
        slot = np.arange(launch.row_slots)
        row_bins = _bins(slot, row_pixel, rows, tile)
        slot = np.where(key_pixel[: launch.key_slots] >= 0, np.arange(launch.key_slots), -1)
        key_bins = _bins(slot, key_pixel, keys, tile)
        partial, full = (_spread(c, i, row_bins, key_bins) for c, i in _lists(plan, number, place, batch))
        sizes = (np.bincount(p[p >= 0], minlength=k) for p, k in ((row_pixel, rows), (key_pixel, keys)))
        pairs = np.outer(*sizes).astype(float)
        return Raster(full, partial, pairs, np.zeros(pairs.shape, bool))

    return count(main), None if own is None else count(own)


# ---- what stands where ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlotTokens:
    """int64 ``rows [S]`` (queries, from 0) and ``keys [S']`` (tokens): what stands in each slot, -1 for nothing.
    ``natural``: the main section and the rows are in token order."""

    rows: np.ndarray
    keys: np.ndarray
    natural: bool


def slot_tokens(plan: Plan, number: int, place: int, batch: int = 0) -> SlotTokens:
    """What stands in the slots of a launch for the head at ``place`` of its heads."""
    launch, ready = plan.program.launches[number], plan.state.ready[number]
    layout_row = batch % plan.layout.batch_size
    if ready.row_index is not None:
        rows = ready.row_index[batch, place].cpu().numpy().astype(np.int64)
        if ready.row_count is not None:
            rows[int(ready.row_count[batch, place]) :] = -1
    else:
        rows = launch.rows.index[layout_row].astype(np.int64)
    keys = np.full(launch.key_slots, -1, np.int64)
    main = launch.keys.slots
    if ready.key_index is not None:
        keys[:main] = _first(ready.key_index[batch, place].cpu().numpy())
    else:
        keys[:main] = launch.keys.index[layout_row]
    head = launch.heads.heads[place]
    if head in launch.section_slot and head in ready.section_heads and ready.section_index is not None:
        first = main + launch.section_slot[head] * launch.section
        columns = ready.section_index[batch, ready.section_heads.index(head)].cpu().numpy()
        keys[first : first + launch.section] = _first(columns)
    natural = ready.row_index is None and launch.rows.label == launch.keys.label == "natural"
    return SlotTokens(rows, keys, natural)


def _first(tokens: np.ndarray) -> np.ndarray:
    """The tokens with repetitions made -1: empty slots repeat a token."""
    out = np.full(len(tokens), -1, np.int64)
    at = np.unique(tokens, return_index=True)[1]
    out[at] = tokens[at]
    return out


def launches_of(plan: Plan, head: int) -> list[tuple[int, int]]:
    """(launch number, the head's place among its heads) of every launch that computes a head."""
    return [
        (number, launch.heads.heads.index(head))
        for number, launch in enumerate(plan.program.launches)
        if head in launch.heads.heads
    ]


def section_slots(plan: Plan, head: int, number: int) -> tuple[range, range | None]:
    """Slots of the main section, and of the head's own section of gathered columns (None without)."""
    launch = plan.program.launches[number]
    main = launch.keys.slots
    if head not in launch.section_slot or not launch.section:
        return range(main), None
    first = main + launch.section_slot[head] * launch.section
    return range(main), range(first, first + launch.section)


def head_counts(plan: Plan, head: int, batch: int = 0) -> tuple[int, int]:
    """(full, partial) blocks that a head lists, over all launches."""
    full = partial = 0
    for number, place in launches_of(plan, head):
        if plan.program.launches[number].kind != "dense":
            (few, _), (whole, _) = _lists(plan, number, place, batch)
            full, partial = full + int(whole.sum()), partial + int(few.sum())
    return full, partial


def check_head(plan: Plan, head: int, batch: int) -> None:
    """ValueError unless the plan has the head and the prompt."""
    if not 0 <= head < plan.program.heads:
        raise ValueError(f"head is {head}, the plan has {plan.program.heads} heads: give 0 to {plan.program.heads - 1}")
    if not 0 <= batch < plan.state.batch:
        raise ValueError(f"batch is {batch}, the plan has {plan.state.batch} prompts: give 0 to {plan.state.batch - 1}")


def _sizes(plan: Plan) -> tuple[int, int]:
    return plan.program.queries, plan.layout.length


def _lists(plan: Plan, number: int, place: int, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(counts, indices) of partial blocks, of full blocks], [row tiles] and [row tiles, width]."""
    tables = [t[min(batch, t.shape[0] - 1), place].cpu().numpy() for t in plan.state.ready[number].lists]
    return [(tables[0], tables[1]), (tables[2], tables[3])]


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


def _spread(count: np.ndarray, index: np.ndarray, rows: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """Pairs per pixel, float64 [row pixels, key pixels], of a block list."""
    listed = np.arange(index.shape[1]) < count[:, None]
    start = torch.as_tensor(np.concatenate([[0], np.cumsum(count, dtype=np.int64)]))
    columns = torch.as_tensor(index[listed].astype(np.int64))
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
    program, state, layout = plan.program, plan.state, plan.layout
    rows = rows.cpu()
    origin = layout.length - program.queries
    out = torch.zeros((state.batch, program.heads, len(rows), layout.length), dtype=torch.bool)
    for number, launch in enumerate(program.launches):
        for place, head in enumerate(launch.heads.heads):
            for batch in range(state.batch if head >= 0 else 0):
                if launch.kind == "dense":
                    position = torch.as_tensor(layout.position[batch % layout.batch_size])
                    own = position[origin + rows][:, None]
                    out[batch, head] |= (own >= position) & (position >= 0)
                else:
                    _add_rows(out[batch, head], plan, number, place, batch, rows)
    return out


def _add_rows(out: torch.Tensor, plan: Plan, number: int, place: int, batch: int, rows: torch.Tensor) -> None:
    ready, tile = plan.state.ready[number], plan.program.tile
    slots = slot_tokens(plan, number, place, batch)
    where = np.full(plan.program.queries, -1, np.int64)
    real = np.flatnonzero(slots.rows >= 0)
    where[slots.rows[real]] = real
    slot = torch.as_tensor(where)[rows]
    here = torch.nonzero(slot >= 0)[:, 0]
    slot = slot[here]
    keys = torch.as_tensor(slots.keys)
    listed = []
    for count, index in _lists(plan, number, place, batch):
        table = torch.zeros((len(slot), len(keys) // tile + 1), dtype=torch.bool)
        found = torch.as_tensor(index.astype(np.int64))[slot // tile]
        found[torch.arange(index.shape[1]) >= torch.as_tensor(count)[slot // tile][:, None]] = len(keys) // tile
        listed.append(table.scatter_(1, found, True)[:, :-1].repeat_interleave(tile, 1))
    device = plan.state.device
    b, h, kv = (torch.as_tensor(x, device=device) for x in (batch, place, torch.arange(len(keys))))
    allowed = ready.mask_mod(b, h, slot.to(device)[:, None], kv).cpu()
    pairs = (listed[1] | (listed[0] & allowed)) & (keys >= 0)
    row, column = pairs.nonzero(as_tuple=True)
    out[here[row], keys[column]] = True


def text_rows(values: np.ndarray, width: int = 64) -> Iterator[str]:
    """A share picture (0 to 1) in text, two rows of pixels to a line of characters."""
    shades = " ░▒▓█"
    rows, columns = values.shape
    height = max(1, round(width * rows / max(columns, 1) / 2))
    for top in np.array_split(np.arange(rows), min(height, rows)):
        line = (values[np.ix_(top, part)].mean() for part in np.array_split(np.arange(columns), min(width, columns)))
        yield "".join(shades[min(4, int(np.ceil(4 * value**0.5)))] for value in line)
