"""From units to a layout: units on the placeholders of their prompts, pieces joined, what is between them filled in.

Placeholders are handed to the units in order and never by a stride, and all must be used up. What stands between two
tokens of one unit (timestamps, break tokens) is found from the tokens themselves, so a stride that varies inside one
video is no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmflex.ir.layout import MODALITIES, TokenLayout

from .inputs import WAY_OUT
from .units import Unit, Units, placeholders_in

STAMP = 32
"""Text between two runs of placeholders of one family without grids: up to this many tokens it is a frame's timestamp
(``Frame from 00:12:`` and the like), more is prose. Nothing in the inputs says which."""

# Separators between the tiles of one image ("\n", a fake token, "<row_1_col_2>") are fewer than these.
_SEPARATORS = 4


@dataclass(frozen=True)
class Placed:
    """A unit with the places of its tokens in the prompt, int ``[n]``."""

    row: int
    at: np.ndarray
    modality: str
    cells: np.ndarray

    def gap(self, before: Placed) -> int:
        """Tokens between an earlier unit of the same prompt and this one."""
        return int(self.at[0] - before.at[-1]) - 1


def consume(
    family: str, masks: Mapping[str, np.ndarray], units: Units, valid: np.ndarray, missing: Sequence[str]
) -> list[Placed]:
    """Hand the placeholders to the units in order; ValueError unless that comes out even."""
    taken = np.zeros(valid.shape, bool)
    for mask in masks.values():
        taken |= mask
    placed = []
    for name, mask in masks.items():
        rows, columns = np.nonzero(mask)
        described = placeholders_in(units.get(name, ()))
        if described != len(rows):
            hint = f" (not given: {', '.join(missing)})" if missing else ""
            raise ValueError(
                f"{family}: the prompts hold {len(rows)} {name} placeholder tokens but the inputs describe {described}"
                f"{hint}: pass the processor's output unchanged, or {WAY_OUT}"
            )
        start = 0
        for number, unit in enumerate(units.get(name, ())):
            stop = start + unit.placeholders
            if stop == start:
                continue
            row = int(rows[start])
            if rows[stop - 1] != row:
                raise ValueError(
                    f"{family}: {name} {number} of {unit.placeholders} tokens would reach from prompt {row} into "
                    f"prompt {int(rows[stop - 1])}: the order of the {name}s and of the prompts differ, or {WAY_OUT}"
                )
            placed.append(_place(row, columns[start:stop], unit, valid[row] & ~taken[row]))
            start = stop
    return sorted(placed, key=lambda unit: (unit.row, int(unit.at[0])))


def _place(row: int, at: np.ndarray, unit: Unit, free: np.ndarray) -> Placed:
    """A unit on its placeholders ``at``; ``free`` bool ``[N]``: tokens of the prompt that are no placeholders."""
    if unit.foreign is None:
        return Placed(row, at, unit.modality, unit.cells)
    whole = int(at[0]) + np.arange(len(unit.cells))
    if whole[-1] < len(free) and np.array_equal(whole[~unit.foreign], at) and free[whole[unit.foreign]].all():
        return Placed(row, whole, unit.modality, unit.cells)
    # The prompt has no separators here (an own template): the rows follow one another.
    cells = unit.cells[~unit.foreign].copy()
    cells[:, 1] = np.arange(len(cells))
    return Placed(row, at, unit.modality, cells)


Tiling = Callable[[np.ndarray, Sequence[Placed]], list[bool]]
"""From the ids of a prompt and its units in order: for each, whether it is a tile of the image of the one before."""


def touching(ids: np.ndarray, units: Sequence[Placed]) -> list[bool]:
    """Tiles of one image stand side by side."""
    return [False, *(b.gap(a) == 0 for a, b in pairwise(units))]


def until_global(ids: np.ndarray, units: Sequence[Placed]) -> list[bool]:
    """Tiles end with the whole image, which has a token of its own in front: that of a prompt's last run always."""
    front = [int(ids[unit.at[0] - 1]) if unit.at[0] else -1 for unit in units]
    return [False, *(front[n] != front[-1] and b.gap(a) <= _SEPARATORS for n, (a, b) in enumerate(pairwise(units)))]


def join(ids: np.ndarray, units: Sequence[Placed], tiling: Tiling) -> Iterator[Placed]:
    """Tiles of one image as one unit; lone pieces with a timestamp's worth of text between them as one video."""
    if not units:
        return
    tile = tiling(ids, units)
    lone = [not (own or after) for own, after in zip(tile, [*tile[1:], False], strict=True)]
    group = [units[0]]
    for number in range(1, len(units)):
        stamped = _SEPARATORS < units[number].gap(units[number - 1]) <= STAMP
        if not (tile[number] or (stamped and lone[number] and lone[number - 1])):
            yield united(group, "video" if lone[number - 1] else "image")
            group = []
        group.append(units[number])
    yield united(group, "video" if lone[-1] else "image")


def united(group: Sequence[Placed], modality: str) -> Placed:
    """Single frames as one unit, its frames numbered in order; one alone stays what it is."""
    if len(group) == 1:
        return group[0]
    cells = np.concatenate([unit.cells for unit in group])
    cells[:, 0] = np.repeat(np.arange(len(group)), [len(unit.at) for unit in group])
    return Placed(group[0].row, np.concatenate([unit.at for unit in group]), modality, cells)


def assemble(placed: Iterable[Placed], valid: np.ndarray) -> TokenLayout:
    """The layout of units on their places; everything else is text, padding is blank."""
    modality = np.zeros(valid.shape, np.int32)
    segment, frame, cell = (np.full(valid.shape, -1, np.int32) for _ in range(3))
    owner = np.full(valid.shape, -1, np.int64)
    for number, unit in enumerate(placed):
        inside = owner[unit.row, unit.at[0] : unit.at[-1] + 1]
        inside[inside < 0] = number  # timestamps and separators belong to the unit they stand in
        owner[unit.row, unit.at] = number
        modality[unit.row, unit.at] = MODALITIES[unit.modality]
        frame[unit.row, unit.at], cell[unit.row, unit.at] = unit.cells.T
    for row in range(len(valid)):
        keys = owner[row, valid[row]]
        stretch = np.cumsum(np.diff(keys, prepend=keys[:1]) != 0)
        keys = np.where(keys < 0, -1 - stretch, keys)  # every stretch of text is a segment of its own
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        segment[row, valid[row]] = np.argsort(np.argsort(first))[inverse.reshape(-1)]
    return TokenLayout.from_modality_ids(modality, segment=segment, frame=frame, cell=cell, valid=valid)
