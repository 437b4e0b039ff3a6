"""What `Pattern.select` returned, checked against what its mask reads: kernels look it up without asking."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor

from ..ir import expr as x
from ..ir.pattern import View
from ..ir.shown import shown
from ..ir.validate import NUMBER, reader, set_shape

_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_selected(
    table: Any, name: str, exprs: Iterable[sympy.Basic], view: View, batch: int, heads: int, device: torch.device
) -> Tensor:
    """A set bool [B, H, ...] or a number int [B, H] as masks read it; what is the same for all prompts or heads may
    have size 1 there.

    Args:
        name: "set@pattern". exprs: masks that may read it; what none of them reads is returned as it is.

    Raises:
        TypeError, ValueError: another type, device or shape. RuntimeError: a number that its mask is not made for (on
        CUDA when the device gets there).
    """
    short, _, pattern = name.partition("@")
    said = f"{pattern}: select() returned {short!r}"
    if not isinstance(table, Tensor):
        raise TypeError(f"{said} as {shown(table)}: a set is a bool tensor, a number an int tensor")
    read = reader(exprs, name)
    if read is None:
        return table
    wanted = (batch, heads, *set_shape(read, view))
    is_number = isinstance(read, x.Number)
    if table.dtype not in (_INTEGERS if is_number else (torch.bool,)):
        kind = "a number is an int" if is_number else "a set is a bool"
        raise TypeError(f"{said} as {table.dtype} {list(table.shape)}: {kind} tensor {list(wanted)}")
    if table.device != device:
        raise TypeError(f"{said} on {table.device} but q is on {device}: make it there")
    sizes = tuple(table.shape)
    fits = len(sizes) == len(wanted) and sizes[2:] == wanted[2:]
    if not fits or any(size not in (1, other) for size, other in zip(sizes[:2], wanted[:2], strict=True)):
        raise ValueError(
            f"{said} as {list(sizes)}, and {list(wanted)} is needed: prompts, heads"
            + ("" if is_number else ", and one place for each key, diagonal or block in scope")
        )
    if is_number:
        allowed = (table >= read.at_least) & (table <= NUMBER)
        torch._assert_async(
            allowed.all(), f"{said} below the {read.at_least} that it declared (at_least), or above {NUMBER}"
        )
    return table.expand(wanted).contiguous()
