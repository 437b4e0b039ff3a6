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
    """int32 [B, key slots]: for each key the position from which on the mask holds for no query of the launch (0: for
    none, `BIG`: it never ends); None where queries that see a key are not an unbroken run from the key on."""
    shape = (max(len(tiles.rows.index), len(tiles.keys.index)), tiles.keys.slots)
    if mask in (sympy.true, sympy.false):
        return np.full(shape, BIG if mask == sympy.true else 0, np.int32)
    if isinstance(mask, (sympy.And, sympy.Or)):
        ends = [until(arg, tiles) for arg in mask.args]
        known = [end for end in ends if end is not None]
        return (
            reduce(np.maximum if isinstance(mask, sympy.Or) else np.minimum, known) if len(known) == len(ends) else None
        )
    if x.selected(mask):
        return None
    if x.sides(mask) <= {x.k}:
        return np.broadcast_to(np.where(tiles.value(mask), BIG, 0), shape).astype(np.int32)
    parts = x.separate(mask) if isinstance(mask, Relational) else None
    if parts is None or x.sides(mask) != {x.q, x.k} or parts[1] not in (sympy.LessThan, sympy.StrictLessThan):
        return None
    of_q, of_k = tiles.value(parts[0]), tiles.value(parts[2])
    out = np.zeros(shape, np.int32)
    for b in range(shape[0]):
        row = b % len(tiles.rows.index)
        real = tiles.rows.index[row] >= 0
        value, position = of_q[row][real], tiles.rows.attribute(x.q, tiles.layout)[row][real]
        if (np.diff(value) < 0).any() or (np.diff(position) < 0).any():
            return None
        side: Literal["left", "right"] = "left" if parts[1] is sympy.StrictLessThan else "right"
        out[b] = np.append(position, BIG)[np.searchsorted(value, of_k[b % len(of_k)], side)]
    return out
