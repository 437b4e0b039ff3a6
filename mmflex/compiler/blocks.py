"""From an expression to token masks and to full / partial / empty blocks.

Both evaluate the same expression: on tokens with plain values, on blocks with bounds. Relations come apart into
``f(q) op g(k)``, so a block needs only the least and greatest f of its queries and g of its keys; what holds *somewhere*
may come out too wide and *everywhere* too narrow, never the other way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ..ir import expr as x
from ..ir.layout import TokenLayout
from .orders import Order


@dataclass(eq=False)
class Values:
    """Values of leaves and sets for the heads of a group, broadcastable over [B, H, queries, keys].

    Attributes:
        layout, rows, keys: whose attributes.
        found: sets and numbers from selection, by name: bool [B, H, n] or [B, H, n, m], int [B, H].
        row_index: int64 [B, H, S], where the rows differ by head: the query in each slot. Likewise key_index.
    """

    layout: TokenLayout
    rows: Order
    keys: Order
    found: dict[str, Tensor]
    device: torch.device
    row_index: Tensor | None = None
    key_index: Tensor | None = None
    memo: dict[Any, Tensor] = field(default_factory=dict)

    def leaf(self, e: sympy.Basic) -> Tensor:
        """An attribute [B, 1|H, S, 1] or [B, 1|H, 1, S], a number [B, H, 1, 1]."""
        if e not in self.memo:
            self.memo[e] = self._leaf(e)
        return self.memo[e]

    def _leaf(self, e: sympy.Basic) -> Tensor:
        if isinstance(e, x.Number):
            return self.found[str(e)][:, :, None, None]
        side = x.q if x.q in e.free_symbols else x.k
        order, index = (self.rows, self.row_index) if side == x.q else (self.keys, self.key_index)
        token = side_attribute(e, self.layout, order, index, self.device)
        return token[..., None] if side == x.q else token[:, :, None]

    def test(self, atom: Boolean, *at: Tensor) -> Tensor:
        """A set test at the given coordinates."""
        table = self.found[x.set_name(atom)]
        b = torch.arange(table.shape[0], device=self.device)[:, None, None, None]
        h = torch.arange(table.shape[1], device=self.device)[None, :, None, None]
        if isinstance(atom, x.Member):
            return table[b, h, at[0].clamp(0, table.shape[-1] - 1)] & (at[0] >= 0)
        if isinstance(atom, x.Touches):
            below = self._below(x.set_name(atom))
            top = below.shape[-1] - 1
            return below[b, h, (at[1] + 1).clamp(0, top)] > below[b, h, at[0].clamp(0, top)]
        return table[b, h, at[0].clamp(0, table.shape[-2] - 1), at[1].clamp(0, table.shape[-1] - 1)]

    def _below(self, name: str) -> Tensor:
        """int32 [B, H, n + 1]: how many members of a set are below each number."""
        key = ("below", name)
        if key not in self.memo:
            self.memo[key] = torch.nn.functional.pad(self.found[name].int().cumsum(-1), (1, 0)).int()
        return self.memo[key]

    def of(self, e: sympy.Basic) -> Tensor:
        """Any expression, value by value."""
        names: dict[str, Tensor] = {}

        def write(leaf: sympy.Basic) -> str:
            if isinstance(leaf, sympy.Integer):
                return str(int(leaf))
            name = f"v{len(names)}"
            names[name] = self._test_tokens(leaf) if isinstance(leaf, x.SETS) else self.leaf(leaf)
            return name

        text = x.source(e, write)
        value = eval(text, {"__builtins__": {}}, names)  # our own source: operators, integers and v0, v1, ...
        return value if isinstance(value, Tensor) else torch.tensor(value, device=self.device)[None, None, None, None]

    def _test_tokens(self, atom: Boolean) -> Tensor:
        if isinstance(atom, x.Member):
            return self.test(atom, self.of(atom.args[0]))
        if isinstance(atom, x.Touches):
            first, last, key = (self.of(a) for a in atom.args[:3])
            return self.test(atom, first - key, last - key)
        return self.test(atom, self.of(atom.args[0]), self.of(atom.args[1]))


def side_attribute(
    e: sympy.Basic, layout: TokenLayout, order: Order, index: Tensor | None, device: torch.device
) -> Tensor:
    """int32 [B, 1|H, S]: an attribute of the tokens of one side, in slot order."""
    if index is None:
        memo = order.__dict__.setdefault("_attributes", {})
        key = (e, device)
        if key not in memo:
            memo[key] = torch.as_tensor(order.attribute(e, layout), dtype=torch.int32).to(device)[:, None]
        return memo[key]
    from .orders import attribute

    token = torch.as_tensor(attribute(e, layout), dtype=torch.int32).to(device)[:, None]
    return token.expand(len(index), index.shape[1], -1).gather(-1, index + order.origin)


def token_mask(expr: Boolean, values: Values) -> Tensor:
    """bool, broadcastable over [B, H, queries, keys]: the expression on every pair of tokens."""
    return values.of(expr)


def _tiled(value: Tensor, tile: int, low: bool) -> Tensor:
    """Least or greatest value in each tile of the dimensions of size > 1."""
    for dim in (2, 3):
        if value.shape[dim] > 1:
            value = value.unflatten(dim, (-1, tile))
            value = value.amin(dim + 1) if low else value.amax(dim + 1)
    return value


def bounds(value: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each tile."""
    return _tiled(value, tile, True), _tiled(value, tile, False)


def block_bounds(expr: Boolean, values: Values) -> tuple[Tensor, Tensor]:
    """(somewhere, everywhere), bool, broadcastable over [B, H, query tiles, key tiles]."""
    tile = values.rows.tile
    if expr in (sympy.true, sympy.false):
        constant = torch.tensor(bool(expr), device=values.device)[None, None, None, None]
        return constant, constant
    if isinstance(expr, (sympy.And, sympy.Or)):
        parts = [block_bounds(arg, values) for arg in expr.args]
        some, every = parts[0]
        for a, b in parts[1:]:
            some, every = (some & a, every & b) if isinstance(expr, sympy.And) else (some | a, every | b)
        return some, every
    if isinstance(expr, sympy.Not):
        some, every = block_bounds(expr.args[0], values)
        return ~every, ~some
    if len(x.sides(expr)) < 2:
        value = values.of(expr)
        return _tiled(value, tile, False), _tiled(value, tile, True)
    if isinstance(expr, Relational):
        parts = x.separate(expr)
        if parts is None:
            return torch.ones((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)
        f, op, g = parts
        return _compare(bounds(values.of(f), tile), op, bounds(values.of(g), tile))
    if isinstance(expr, x.Touches):
        (a0, a1), (b0, b1), (k0, k1) = (bounds(values.of(e), tile) for e in expr.args[:3])
        some = values.test(expr, a0 - k1, b1 - k0)
        return some, some & (a0 == a1) & (b0 == b1) & (k0 == k1)
    (a0, a1), (b0, b1) = (bounds(values.of(e), tile) for e in expr.args[:2])
    corners = [values.test(expr, a, b) for a in (a0, a1) for b in (b0, b1)]
    close = (a1 - a0 <= 1) & (b1 - b0 <= 1)
    some = corners[0] | corners[1] | corners[2] | corners[3] | ~close
    return some, corners[0] & corners[1] & corners[2] & corners[3] & close


def _compare(f: tuple[Tensor, Tensor], op: type[Relational], g: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (f0, f1), (g0, g1) = f, g
    if op is sympy.GreaterThan:
        return f1 >= g0, f0 >= g1
    if op is sympy.StrictGreaterThan:
        return f1 > g0, f0 > g1
    if op is sympy.LessThan:
        return f0 <= g1, f1 <= g0
    if op is sympy.StrictLessThan:
        return f0 < g1, f1 < g0
    some, every = (f0 <= g1) & (g0 <= f1), (f0 == f1) & (g0 == g1) & (f0 == g0)
    return (some, every) if op is sympy.Eq else (~every, ~some)


def compact(listed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Block lists of a boolean table [..., n]: (counts int32 [...], indices int32 [..., width], ascending).

    Entries past the count are 0. The caller checks counts against the width.
    """
    place = listed.cumsum(-1, dtype=torch.int32)
    count = place[..., -1]
    index = torch.zeros((*listed.shape[:-1], width + 1), dtype=torch.int32, device=listed.device)
    number = torch.arange(listed.shape[-1], dtype=torch.int32, device=listed.device).expand(listed.shape)
    index.scatter_(-1, torch.where(listed & (place <= width), place - 1, width).long(), number)
    return count.contiguous(), index[..., :-1].contiguous()
