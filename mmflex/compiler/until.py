"""Masks that show a key to an unbroken run of queries from the key itself on: sinks and local windows.

A column that such a mask shows for a while needs no hole there: gathered into its section, it is simply shown from
where the mask leaves off. One comparison says both, and no block of the window becomes partial.
"""

from __future__ import annotations

from functools import reduce
from typing import Literal

import numpy as np
import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from ..ir import expr as x
from .cost import Tiles
from .orders import BIG


def until(mask: Boolean, tiles: Tiles) -> np.ndarray | None:
    """int32 [B, key slots]: for each key the position from which on the mask, one value on every block, holds for no
    query of the launch (0: for none, `BIG`: it never ends); None where queries that see a key are not an unbroken run
    from the key on."""
    found = _until(mask, tiles)
    shape = len(tiles.keys.real), tiles.key_tiles
    return None if found is None else np.broadcast_to(found, shape).astype(np.int32).repeat(tiles.keys.tile, 1)


def _until(mask: Boolean, tiles: Tiles) -> np.ndarray | None:
    """int [B or 1, key tiles or 1]: the same for the keys of a tile."""
    if mask in (sympy.true, sympy.false):
        return np.array([[BIG if mask == sympy.true else 0]])
    if isinstance(mask, (sympy.And, sympy.Or)):
        ends = [_until(arg, tiles) for arg in mask.args]
        known = [end for end in ends if end is not None]
        return (
            reduce(np.maximum if isinstance(mask, sympy.Or) else np.minimum, known) if len(known) == len(ends) else None
        )
    if x.selected(mask):
        return None
    if x.sides(mask) <= {x.k}:
        return np.where(tiles.bounds(mask)[0], BIG, 0)
    parts = x.separate(mask) if isinstance(mask, Relational) else None
    if parts is None or x.sides(mask) != {x.q, x.k} or parts[1] not in (sympy.LessThan, sympy.StrictLessThan):
        return None
    values, of_k, (positions, last) = tiles.bounds(parts[0])[0], tiles.bounds(parts[2])[0], tiles.bounds(x.q)
    side: Literal["left", "right"] = "left" if parts[1] is sympy.StrictLessThan else "right"
    out = []
    for real, value, position, end, key in zip(tiles.rows.real, values, positions, last, of_k, strict=True):
        value, position = value[real], position[real]
        if (np.diff(value) < 0).any() or (position[1:] <= end[real][:-1]).any():
            return None
        out.append(np.append(position, BIG)[np.searchsorted(value, key, side)])
    return np.stack(out)
