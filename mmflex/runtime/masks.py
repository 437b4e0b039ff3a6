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

from ..compiler.blocks import Values, side_attribute
from ..ir import expr as x
from .kernels.memory import kept


@dataclass(frozen=True, eq=False)
class MaskMod:
    """A mask_mod and the tensors that it captures, in order.

    Attributes:
        source: Python source of the mask_mod; two launches with equal source share one compiled kernel.
        captures: int32 tensors.
        comparison: what it compares, as people read it; "" where it looks things up.
        by_slot: it compares the number of the query's slot, and is the same for all prompts.
    """

    source: str
    captures: tuple[Tensor, ...]
    comparison: str = ""
    by_slot: bool = False

    def bind(self, *captures: Tensor) -> Callable[[Any, Any, Any, Any], Tensor]:
        """The mask_mod over given tensors."""
        return _maker(self.source)(*captures)

    def __call__(self, b: Any, h: Any, q: Any, kv: Any) -> Tensor:
        return self.bind(*self.captures)(b, h, q, kv)


@lru_cache(maxsize=256)
def _maker(source: str) -> Callable[..., Callable[[Any, Any, Any, Any], Tensor]]:
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
    """``row[b, q] >= limit[b, h, kv]``; row int32 [B, Q] or [B, H, Q] (None: the number of the slot), limit int32
    [B, H, KV] (None: the number of the slot, and nothing is read for a key).

    Limits are captured as one line, with where each head's begin: with one index a kernel adds constants to one
    address, with several it works out an address of 64 bits for every key (flash-attn-4: 6 instructions beside the
    load, a third of all that a block takes).
    """
    left, right, captures = "q", "kv", {}
    if row is not None:
        left, captures["row"] = _at(row), row
    if limit is not None:
        batch, heads, slots = limit.shape
        one = batch == 1
        right = f"limit[first[{'h' if one else 'b, h'}] + kv]"
        first = _first(batch, heads, slots, limit.device)
        captures |= {"limit": limit.flatten(), "first": first[0] if one else first}
    text = f"row >= {'key' if limit is None else 'limit[key]'}"
    by_slot = row is None and (limit is None or limit.shape[0] == 1)
    return MaskMod(_write(list(captures), f"{left} >= {right}"), tuple(captures.values()), text, by_slot)


def in_strips(mask_mod: MaskMod, strip: int) -> MaskMod:
    """A comparison by slots, of one prompt, for queries in strips of so many, of which ``b`` is the number."""
    assert mask_mod.by_slot
    return replace(mask_mod, source=mask_mod.source.replace("return q >=", f"return b * {strip} + q >="))


def _first(batch: int, heads: int, slots: int, device: torch.device) -> Tensor:
    """int32 [B, H]: where each head's limits begin in a line of all."""
    end = batch * heads * slots
    if end >= 1 << 31:
        raise ValueError(
            f"{batch} prompts x {heads} heads x {slots} key slots are more limits than 2^31 - 1: attend to fewer "
            "prompts at once"
        )
    first = kept(
        ("first slots", end, slots), device, lambda on: torch.arange(0, end, slots, dtype=torch.int32, device=on)
    )
    return first.view(batch, heads)


def _at(row: Tensor) -> str:
    return "row[b, q]" if row.dim() == 2 else "row[b, h, q]"


def looked_up(
    row: Tensor, limit: Tensor, expr: Boolean, values: Values, main_slots: int, key_slots: int, batch: int, heads: int
) -> MaskMod:
    """The comparison, and in the main section (the first ``main_slots`` slots) the expression as well."""
    names, captures = ["row", "limit", "numbers"], [row, limit]
    numbers: list[int] = [main_slots]
    held: dict[Any, str] = {}

    def capture(key: Any, make: Callable[[], Tensor]) -> str:
        if key not in held:
            held[key] = f"t{len(held)}"
            names.append(held[key])
            captures.append(make().contiguous())
        return held[key]

    def side(leaf: sympy.Basic, token: str, slots: int) -> str:
        order, index = (values.rows, values.row_index) if token == "q" else (values.keys, values.key_index)

        def make() -> Tensor:
            value = side_attribute(leaf, values.layout, order, index, values.device)
            value = pad(value, (0, slots - value.shape[-1])).expand(batch, -1, -1)
            return value[:, 0] if shared else value

        shared = index is None
        name = capture(leaf, make)
        return f"{name}[b, {token}]" if shared else f"{name}[b, h, {token}]"

    def number(value: int) -> str:
        numbers.append(value)
        return f"numbers[{len(numbers) - 1}, h]"

    def test(atom: Boolean) -> str:
        name = x.set_name(atom)
        if isinstance(atom, x.Member):
            at = x.source(atom.args[0], write)
            # Ranks may be -1 (before the first of a modality) or the size: tables start one early and end one late.
            table = capture(("member", name), lambda: pad(values.found[name].int(), (1, 1)))
            return f"({table}[b, h, {at} + 1] == 1)"
        if isinstance(atom, x.Touches):
            first, last, key = (x.source(a, write) for a in atom.args[:3])
            top = values.found[name].shape[-1]
            # below[j + top + 1]: members under j, for j from -top - 1 to top + 1, so that no index is negative.
            below = capture(("below", name), lambda: _below(values.found[name], top + 1))
            low, high = f"({first} - {key} + {top + 1})", f"({last} - {key} + {top + 2})"
            return f"({below}[b, h, {high}] > {below}[b, h, {low}])"
        a, b = (x.source(e, write) for e in atom.args[:2])
        table = capture(("listed", name), lambda: pad(values.found[name].int(), (1, 1, 1, 1)))
        return f"({table}[b, h, {a} + 1, {b} + 1] == 1)"

    def write(leaf: sympy.Basic) -> str:
        if isinstance(leaf, sympy.Integer):
            return number(int(leaf))
        if isinstance(leaf, x.SETS):
            return test(leaf)
        if isinstance(leaf, x.Number):
            return capture(leaf, lambda: values.found[str(leaf)].int()) + "[b, h]"
        if x.q in leaf.free_symbols:
            return side(leaf, "q", values.rows.slots)
        return side(leaf, "kv", key_slots)

    body = x.source(expr, write)
    full = f"({_at(row)} >= limit[b, h, kv]) & ((kv >= numbers[0, h]) | {body})"
    return MaskMod(_write(names, full), (row, limit, _table(tuple(numbers), heads, values.device), *captures[2:]))


@lru_cache(maxsize=256)
def _table(numbers: tuple[int, ...], heads: int, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)[:, None].expand(-1, heads).contiguous()


def _below(found: Tensor, reach: int) -> Tensor:
    """int32 [B, H, 2 reach + 2]: entry i is the number of members below ``i - reach``."""
    count = pad(found.int().cumsum(-1), (reach + 1, 0))
    return pad(count, (0, 2 * reach + 2 - count.shape[-1]), mode="replicate").int()
