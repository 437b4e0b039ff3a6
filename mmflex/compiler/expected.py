"""What a launch is expected to do, before any input is seen: full and partial blocks of every query tile.

`cost.touched` bounds the same numbers from above, which index tables need. Here what selection finds is taken to be
spread evenly: sets are filled to their budget, columns and rows over the tokens that they may come from, block
diagonals over all distances, strides that are searched for at four times the least. What follows from the layout is
counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import sympy

from ..ir import expr as x
from ..ir.layout import TokenLayout
from . import cost
from .orders import BIG
from .spans import FAR, Counts, hits, modulus, population, together, union

if TYPE_CHECKING:
    from .plan import Launch, Part


@dataclass(frozen=True)
class Work:
    """What a launch does, over all its heads; expected for one prompt, or counted.

    Attributes:
        full, partial: blocks. looked_up: whether partial blocks look things up.
        tiles: query tiles. longest: blocks of the query tile that has most of them.
        moved: tiles of rows copied. copies: whether any are.
        dense: causal block pairs of plain attention.
    """

    full: float = 0.0
    partial: float = 0.0
    looked_up: bool = False
    tiles: float = 0.0
    longest: float = 0.0
    moved: float = 0.0
    copies: bool = False
    dense: float = 0.0


def work(launch: Launch, layout: TokenLayout, heads: int | None = None, any_length: bool = False) -> Work:
    """The expected work of a launch for one prompt of a batch; ``heads``: of the layer (None: as if all were here).
    ``any_length``: tokens need not fill whole tiles."""
    tiles = cost.Tiles.between(layout, launch.rows, launch.keys)
    if launch.kind == "dense":
        own = sum(h >= 0 for h in launch.heads.heads)
        blocks = float(cost.causal(tiles).sum() / max(1, layout.batch_size)) * own
        alone = (heads is None or launch.heads.all(heads)) and not layout.padded
        copied = 0.0 if alone else moved(launch, layout, heads)
        return Work(dense=blocks, moved=copied, copies=copied > 0)
    full = partial = longest = 0.0
    for part in launch.parts:
        sure, rest, most = _counts(launch.kind, part, tiles)
        full, partial, longest = full + sure * len(part.heads), partial + rest * len(part.heads), max(longest, most)
    copied = moved(launch, layout, heads, any_length)
    rows = launch.row_slots // launch.rows.tile * len(launch.heads.heads)
    return Work(full, partial, not launch.compare, rows, longest, copied, copied > 0)


def _counts(kind: str, part: Part, tiles: cost.Tiles) -> tuple[float, float, float]:
    """Full and partial blocks of a head, and blocks of its longest query tile; kept with the part."""
    held = part.__dict__  # a part belongs to one launch, or to several of the same tiles
    if "_counts" not in held:
        touched, sure = {"main": _main, "rows": _rows, "classes": _classes}[kind](part, tiles)
        touched = np.maximum(touched, 0.0)
        sure = np.clip(sure, 0.0, touched)
        partial = float((touched - sure).mean(0).sum())
        held["_counts"] = float(sure.mean(0).sum()), partial, float(touched.max(initial=0.0))
    return held["_counts"]


def moved(launch: Launch, layout: TokenLayout, heads: int | None = None, any_length: bool = False) -> float:
    """Tiles of rows that a launch copies: queries in, keys and values, output back (read and written once each).
    ``heads``: of the layer; a launch of some of them picks its rows out."""
    any_length = any_length and launch.compare
    whole = heads is None or launch.heads.all(heads)
    tile, own = launch.rows.tile, len(launch.heads.heads)
    rows, keys = launch.row_slots // tile, launch.key_slots // tile
    if launch.kind == "classes":  # sorted keys for every head; merging reads and writes both outputs
        return own * (2.0 * keys + 5.0 * rows)
    if launch.kind == "rows":
        stay = whole and launch.keys.stays(layout, any_length)
        return 2.0 * own * rows + (0 if stay else 2 * len(launch.heads.kv_heads) * keys)
    out = 0.0
    if not (whole and launch.rows.stays(layout, any_length)):
        out += 2.0 * own * rows
    if launch.section or not launch.keys.stays(layout, any_length) or not whole:
        out += 2.0 * len(launch.heads.kv_heads) * keys
    return out


# ---- the kinds of launches -------------------------------------------------------------------------------------------


def _main(part: Part, tiles: cost.Tiles) -> Counts:
    found = [span for term in cost.terms(part.mask) for span in together(cost.causally(term), tiles)]
    seen = np.clip(cost.causal(tiles), 0, None)
    each = np.ones((len(tiles.keys.index), tiles.key_tiles))
    # What is gathered leaves a hole, unless the section takes over where the main section leaves off.
    holes = part.columns != sympy.false and part.until is None
    whole = each - hits(part.columns, x.k, tiles) if holes else each
    ranges = [span for span in found if span.solid]
    touched = union([(span.first, span.last) for span in ranges], each, tiles)
    sure = union([span.inside for span in ranges], whole, tiles)
    free = 1 - touched / np.maximum(seen, 1)  # selection may take what is there already
    for span in found:
        if not span.solid:
            some, all_ = span.counts()
            if holes:
                all_ = all_ * union([span.inside], whole, tiles) / np.maximum(union([span.inside], each, tiles), 1)
            touched, sure = touched + some * free, sure + all_ * free
    over = np.maximum(1.0, touched / np.maximum(seen, 1))
    touched, sure = touched / over, np.minimum(sure / over, seen)
    if part.columns != sympy.false:
        low, high = _seen(part, tiles)
        listed, whole = np.ceil(high / tiles.rows.tile), np.floor(low / tiles.rows.tile)
        touched, sure = touched + listed, sure + whole
    real = tiles.rows.real
    return np.where(real, touched, 0), np.where(real, sure, 0)


def _seen(part: Part, tiles: cost.Tiles) -> Counts:
    """Gathered columns that all queries of a tile see, and that some do, expected, [B, tiles]."""
    layout = tiles.layout
    start = layout.position
    if part.until is not None:  # the main section shows a key for a while
        slot = tiles.keys.inverse
        shown = np.take_along_axis(np.broadcast_to(part.until, (len(slot), tiles.keys.slots)), np.maximum(slot, 0), 1)
        start = np.maximum(start, np.where(slot >= 0, shown, BIG))
    first, last = tiles.bounds(x.q)
    low, high = np.zeros((2, len(layout.valid), tiles.row_tiles))
    for term in x.alternatives(part.columns):
        pool, count = population(term, layout)
        for b, own in enumerate(pool.may):
            begin = np.sort(start[b % len(start)][own], kind="stable")  # fast where sorted already
            rate = count / max(1, len(begin))
            low[b] += rate * np.searchsorted(begin, first[b % len(first)], "right")
            high[b] += rate * np.searchsorted(begin, last[b % len(last)], "right")
    return low, high


def _rows(part: Part, tiles: cost.Tiles) -> Counts:
    """Gathered rows see all keys before them: those between the first and the last row of a tile are partial."""
    tile, layout = tiles.rows.tile, tiles.layout
    first, last = (np.sort(np.where(tiles.keys.real, b, FAR), 1) for b in tiles.bounds(x.k))
    inside = np.zeros(layout.valid.shape, bool)
    for b, index in enumerate(tiles.rows.index):
        inside[b % len(inside), index[index >= 0] + tiles.rows.origin] = True
    found = []
    for b in range(len(inside)):
        place: list[np.ndarray] = []
        for term in x.alternatives(part.chosen):
            pool, count = population(term, layout)
            may = pool.may
            at = layout.position[b][may[b % len(may)] & inside[b]]
            count = min(count * len(at) / max(1, int(may[b % len(may)].sum())), len(at))
            place.append(at[np.linspace(0, len(at) - 1, round(count)).astype(int)] if len(at) else at)
        at = np.unique(np.concatenate(place)) if place else np.zeros(0, int)
        low, high = at[::tile], np.append(at[tile - 1 :: tile], at[-1:] if len(at) % tile else [])
        touched = np.searchsorted(first[b % len(first)], high, "right")
        sure = np.searchsorted(last[b % len(last)], low, "right")
        if len(at) % tile:  # slots without a row spoil the last tile
            sure[-1] = 0
        found.append((touched, sure))
    most = max(len(t) for t, _ in found)
    pad = [[np.pad(t.astype(float), (0, most - len(t))) for t in pair] for pair in found]
    return np.stack([p[0] for p in pad]), np.stack([p[1] for p in pad])


def _classes(part: Part, tiles: cost.Tiles) -> Counts:
    """Residue-major order: a tile of queries sees the keys of its classes that come before."""
    assert part.classes is not None
    tile, stride = tiles.rows.tile, modulus(part.classes[1])
    rows, keys = (order.tokens / stride / tile for order in (tiles.rows, tiles.keys))
    others = x.all_of(*(e for e in x.conditions(part.mask) if cost.class_pair(e) != part.classes))
    seen = float(cost.causal(tiles).sum())
    wanted = sum(float(span.counts()[0].sum()) for term in cost.terms(others)
                 for span in together(cost.causally(term), tiles))  # fmt: skip
    before = min(1.0, wanted / max(1.0, seen)) * keys / 2
    both = min(1.0, 1 / max(rows, 1e-9))  # of the tiles: those with the end of a class and the start of the next
    touched = (1 - both) * (before + 2) + both * (2 * max(keys, 1.0) + 1)
    there = np.asarray(tiles.rows.real, float)
    return touched * there, (1 - both) * max(before - 1, 0.0) * there
