"""The mask_mod of a launch, written from its expression as Python source: one comparison, and a look-up only where the
expression does not reduce to block lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.nn.functional import pad

from ..ir import expr as x
from .classify import Values, slot_attribute
from .device import device_constant


@dataclass(frozen=True, eq=False)
class MaskMod:
    """A mask_mod and the tensors that it captures, in order.

    Attributes:
        source: Python source of the mask_mod; two launches with equal source share one compiled kernel.
        captures: int32 tensors.
        comparison: what it compares, as people read it; "" where it looks things up.
        one_for_all: it is the same for all prompts and reads its tensors with one index each, so that queries may be
            dealt out as a batch.
    """

    source: str
    captures: tuple[Tensor, ...]
    comparison: str = ""
    one_for_all: bool = False

    def bind(self, *captures: Tensor) -> Callable[[Any, Any, Any, Any], Tensor]:
        """The mask_mod over given tensors."""
        return maker(self.source)(*captures)

    def __call__(self, b: Any, h: Any, q: Any, kv: Any) -> Tensor:
        return self.bind(*self.captures)(b, h, q, kv)


@lru_cache(maxsize=256)
def maker(source: str) -> Callable[..., Callable[[Any, Any, Any, Any], Tensor]]:
    """The function of captures that a source defines, which returns the mask_mod."""
    namespace: dict[str, Any] = {}
    exec(compile(source, "<mmflex mask_mod>", "exec"), namespace)  # our own source, from a sympy expression
    return namespace["make"]


def _write(names: list[str], body: str) -> str:
    lines = [
        f"def make({', '.join(names)}):",
        "    def mask_mod(b, h, q, kv):",
        f"        return {body}",
        "    return mask_mod",
    ]
    return "\n".join(lines) + "\n"


def comparison(row: Tensor | None, limit: Tensor | None) -> MaskMod:
    """``row[b, q] >= limit[b, h, kv]``; row int32 [B, Q] (with one prompt read as a line) or [B, H, Q] (None: the
    number of the slot), limit int32 [B, H, KV] (None: the number of the slot, and nothing is read for a key).

    Limits are captured as one line, with where each head's begin: with one index a kernel adds constants to one
    address, with several it works out an address of 64 bits for every key (flash-attn-4: 6 instructions beside the
    load, a third of all that a block takes).
    """
    left, right, captures = "q", "kv", {}
    if row is not None:
        row = row[0] if row.dim() == 2 and row.shape[0] == 1 else row
        left, captures["row"] = _query(row), row
    if limit is not None:
        batch, heads, slots = limit.shape
        one = batch == 1
        right = f"limit[first[{'h' if one else 'b, h'}] + kv]"
        first = _first_limits(batch, heads, slots, limit.device)
        captures |= {"limit": limit.flatten(), "first": first[0] if one else first}
    text = f"row >= {'key' if limit is None else 'limit[key]'}"
    one_for_all = (row is None or row.dim() == 1) and (limit is None or limit.shape[0] == 1)
    return MaskMod(_write(list(captures), f"{left} >= {right}"), tuple(captures.values()), text, one_for_all)


def in_strips(mask_mod: MaskMod, strip: int) -> MaskMod:
    """The comparison of a single prompt, for queries in strips of ``strip`` slots; ``b`` is the number of the strip."""
    assert mask_mod.one_for_all
    slot = f"b * {strip} + q"
    source = mask_mod.source.replace("return q >=", f"return {slot} >=").replace(
        "return row[q] >=", f"return row[{slot}] >="
    )
    return replace(mask_mod, source=source)


def _first_limits(batch: int, heads: int, slots: int, device: torch.device) -> Tensor:
    """int32 [B, H]: where each head's limits begin in a line of all."""
    end = batch * heads * slots
    if end >= 1 << 31:
        raise ValueError(
            f"{batch} prompts x {heads} heads x {slots} key slots are more limits than 2^31 - 1: attend to fewer "
            "prompts at once"
        )
    first = device_constant(
        ("first limit", end, slots), device, lambda on: torch.arange(0, end, slots, dtype=torch.int32, device=on)
    )
    return first.view(batch, heads)


def _query(row: Tensor) -> str:
    return {1: "row[q]", 2: "row[b, q]", 3: "row[b, h, q]"}[row.dim()]


def looked_up(
    row: Tensor, limit: Tensor, expr: Boolean, values: Values, main_slots: int, key_slots: int, batch: int, heads: int
) -> MaskMod:
    """The comparison, and in the main section (the first ``main_slots`` slots) the expression as well."""
    writer = _Writer(values, main_slots, key_slots, batch)
    body = writer.source(expr)
    full = f"({_query(row)} >= limit[b, h, kv]) & ((kv >= numbers[0, h]) | {body})"
    numbers = device_constant(
        ("numbers", tuple(writer.numbers), heads), values.device, lambda on: _rows_of(writer.numbers, heads, on)
    )
    names = ["row", "limit", "numbers", *writer.names]
    return MaskMod(_write(names, full), (row, limit, numbers, *writer.captures))


def _rows_of(numbers: list[int], heads: int, device: torch.device) -> Tensor:
    """int32 [numbers, heads]: constants of a mask, as a table, since kernels are compiled for captured tensors alone.
    Made without a copy from the host, which no graph may capture."""
    return torch.stack([torch.full((heads,), number, dtype=torch.int32, device=device) for number in numbers])


class _Writer:
    """Source of an expression within a mask_mod, and the tensors that it captures (see `mmflex.ir.atoms`)."""

    def __init__(self, values: Values, main_slots: int, key_slots: int, batch: int) -> None:
        self.values, self.key_slots, self.batch = values, key_slots, batch
        self.numbers = [main_slots]
        self.names: list[str] = []
        self.captures: list[Tensor] = []
        self._name_of: dict[Any, str] = {}

    def source(self, e: sympy.Basic) -> str:
        return x.source(e, self._leaf)

    def _leaf(self, leaf: sympy.Basic) -> str:
        if isinstance(leaf, sympy.Integer):
            self.numbers.append(int(leaf))
            return f"numbers[{len(self.numbers) - 1}, h]"
        if isinstance(leaf, x.SetTest):
            return leaf.look_up(self)  # type: ignore[attr-defined]
        if isinstance(leaf, x.Number):
            return self._capture(leaf, lambda: self.values.selections[str(leaf)].int()) + "[b, h]"
        if x.q in leaf.free_symbols:
            return self._attribute(leaf, "q", self.values.rows.slots)
        return self._attribute(leaf, "kv", self.key_slots)

    def _attribute(self, leaf: sympy.Basic, token: str, slots: int) -> str:
        values = self.values
        order, index = (values.rows, values.row_index) if token == "q" else (values.keys, values.key_index)
        shared = index is None

        def make() -> Tensor:
            value = slot_attribute(leaf, values.layout, order, index, values.device)
            value = pad(value, (0, slots - value.shape[-1])).expand(self.batch, -1, -1)
            return value[:, 0] if shared else value

        name = self._capture(leaf, make)
        return f"{name}[b, {token}]" if shared else f"{name}[b, h, {token}]"

    def _capture(self, key: Any, make: Callable[[], Tensor]) -> str:
        if key not in self._name_of:
            self._name_of[key] = f"t{len(self._name_of)}"
            self.names.append(self._name_of[key])
            self.captures.append(make().contiguous())
        return self._name_of[key]

    # What set tests ask.

    def bitmap(self, name: str) -> str:
        """int32 [B, H, n + 2]: whether each number from -1 to n is a member."""
        return self._capture(("member", name), lambda: pad(self.values.selections[name].int(), (1, 1)))

    def counts_below(self, name: str) -> tuple[str, int]:
        """(int32 [B, H, ...], r): entry ``i`` is how many members are below ``i - r``, for every distance that can
        occur, so that no index is negative."""
        reach = self.values.selections[name].shape[-1] + 1
        return self._capture(("below", name), lambda: _counts_below(self.values.selections[name], reach)), reach

    def table(self, name: str) -> str:
        """int32 [B, H, rows + 2, columns + 2]: whether each pair from -1 on is a member."""
        return self._capture(("listed", name), lambda: pad(self.values.selections[name].int(), (1, 1, 1, 1)))


def _counts_below(members: Tensor, reach: int) -> Tensor:
    """int32 [B, H, 2 reach + 2]: entry i is the number of members below ``i - reach``."""
    count = pad(members.int().cumsum(-1), (reach + 1, 0))
    return pad(count, (0, 2 * reach + 2 - count.shape[-1]), mode="replicate").int()
