"""From an expression to token masks and to full / partial / empty blocks.

Both evaluate the same expression: on tokens with plain values, on blocks with bounds. Relations come apart into
``f(q) op g(k)``, so a block needs only the least and greatest f of its queries and g of its keys; what holds
*somewhere* may come out too wide and *everywhere* too narrow, never the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ..ir import expr as x
from ..ir.layout import TokenLayout
from .orders import Order, attribute


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
        side = x.q if x.q in x.sides(e) else x.k
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
            below = self.below(x.set_name(atom))
            top = below.shape[-1] - 1
            return below[b, h, (at[1] + 1).clamp(0, top)] > below[b, h, at[0].clamp(0, top)]
        return table[b, h, at[0].clamp(0, table.shape[-2] - 1), at[1].clamp(0, table.shape[-1] - 1)]

    def below(self, name: str) -> Tensor:
        """int32 [B, H, n + 1]: how many members of a set are below each number."""
        key = ("below", name)
        if key not in self.memo:
            self.memo[key] = torch.nn.functional.pad(self.found[name].int(), (1, 0)).cumsum(-1, dtype=torch.int32)
        return self.memo[key]

    def of(self, e: sympy.Basic) -> Tensor:
        """Any expression, value by value."""
        code, reads = x.compiled(e)
        names = {n: self._test_tokens(leaf) if isinstance(leaf, x.SETS) else self.leaf(leaf) for n, leaf in reads}
        value = eval(code, names)
        return value if isinstance(value, Tensor) else torch.tensor(value, device=self.device)[None, None, None, None]

    def bounds(self, e: sympy.Basic) -> tuple[Tensor, Tensor]:
        """Least and greatest value of an expression of one side on each tile; kept with the order where they
        follow from the layout."""
        side = x.q if x.q in x.sides(e) else x.k
        order, index = (self.rows, self.row_index) if side == x.q else (self.keys, self.key_index)
        if index is not None or x.selected(e):
            return bounds(self.of(e), self.rows.tile)
        memo = order.__dict__.setdefault("_bounds", {})
        key = (e, self.device)
        if key not in memo:
            memo[key] = bounds(self.of(e), self.rows.tile)
        return memo[key]

    def _test_tokens(self, atom: Boolean) -> Tensor:
        if isinstance(atom, x.Member):
            if atom.args[0] == x.k and self.key_index is None and self.keys.in_place(self.layout):
                table = self.found[x.set_name(atom)]  # slots are positions
                return torch.nn.functional.pad(table, (0, self.keys.slots - table.shape[-1]))[:, :, None]
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
            memo[key] = torch.tensor(order.attribute(e, layout), dtype=torch.int32, device=device)[:, None]
        return memo[key]
    token = layout._once(
        ("on", e, device), lambda: torch.tensor(attribute(e, layout), dtype=torch.int32, device=device)[:, None]
    )
    return token.expand(len(index), index.shape[1], -1).gather(-1, index + order.origin)


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


@dataclass(frozen=True, eq=False)
class BlockSource:
    """When an expression holds on blocks, as source over named tensors broadcastable over [B, H, query, key tiles].

    Attributes:
        some: holds on some pair (may be too wide). every: holds on every pair (may be too narrow).
        names: bounds that the source reads. tables: sets that it looks up, [B, H, n] or [B, H, n, m].
        triton: the source is for a Triton kernel, not for torch. Sources are equal for expressions of equal structure.
    """

    some: str
    every: str
    names: dict[str, Tensor]
    tables: dict[str, Tensor]
    triton: bool = False


def block_source(expr: Boolean, values: Values, triton: bool = False) -> BlockSource:
    """The block classifier of an expression, by bounds of f and g on each side's tiles."""
    recipe = _recipe(expr, triton)
    names: dict[str, Tensor] = {}
    for i, e in enumerate(recipe.sides):
        names[f"t{2 * i}"], names[f"t{2 * i + 1}"] = values.bounds(e)
    tables = {
        f"s{i}": values.below(name) if below else values.found[name] for i, (name, below) in enumerate(recipe.tables)
    }
    return BlockSource(recipe.some, recipe.every, names, tables, triton)


@dataclass(frozen=True, eq=False)
class _Recipe:
    """A classifier's source, the expressions whose bounds it reads (t0, t1: of the first, ...), and its tables."""

    some: str
    every: str
    sides: tuple[sympy.Basic, ...]
    tables: tuple[tuple[str, bool], ...]


@lru_cache(maxsize=1024)
def _recipe(expr: Boolean, triton: bool) -> _Recipe:
    held: dict[sympy.Basic, int] = {}
    tables: dict[tuple[str, bool], int] = {}

    def both(e: sympy.Basic) -> tuple[str, str]:
        """Names of the least and greatest value on each tile."""
        number = held.setdefault(e, len(held))
        return f"t{2 * number}", f"t{2 * number + 1}"

    def look_up(atom: Boolean, *at: str) -> str:
        """An entry of a set's table, indices clamped into it."""
        below = isinstance(atom, x.Touches)
        table = f"s{tables.setdefault((x.set_name(atom), below), len(tables))}"
        if not triton:
            sizes = [f"{table}.shape[{i - len(at)}]" for i in range(len(at))]
            index = [f"({a}).clamp(0, {size} - 1)" for a, size in zip(at, sizes, strict=True)]
            return f"{table}[b, h, {', '.join(index)}]"
        index = [f"tl.minimum(tl.maximum({a}, 0), {table}_n{i} - 1)" for i, a in enumerate(at)]
        value = f"tl.load({table} + {f' * {table}_n1 + '.join(index)})"
        return value if below else f"({value} != 0)"

    def write(e: Boolean) -> tuple[str, str]:
        if e in (sympy.true, sympy.false):
            return str(bool(e)), str(bool(e))
        if isinstance(e, (sympy.And, sympy.Or)):
            sign = " & " if isinstance(e, sympy.And) else " | "
            parts = [write(arg) for arg in e.args]
            return "(" + sign.join(p[0] for p in parts) + ")", "(" + sign.join(p[1] for p in parts) + ")"
        if isinstance(e, sympy.Not):
            some, every = write(e.args[0])
            flip = {"True": "False", "False": "True"}
            return flip.get(every, f"(~{every})"), flip.get(some, f"(~{some})")
        if len(x.sides(e)) < 2:
            low, high = both(e)
            return high, low
        if isinstance(e, Relational):
            apart = x.separate(e)
            if apart is None:
                return "True", "False"
            return _compare(both(apart[0]), apart[1], both(apart[2]))
        if isinstance(e, x.Touches):
            (a0, a1), (b0, b1), (k0, k1) = (both(arg) for arg in e.args[:3])
            some = f"({look_up(e, f'{b1} - {k0} + 1')} > {look_up(e, f'{a0} - {k1}')})"
            return some, f"({some} & ({a0} == {a1}) & ({b0} == {b1}) & ({k0} == {k1}))"
        (a0, a1), (b0, b1) = (both(arg) for arg in e.args[:2])
        corners = [look_up(e, a, b) for a in (a0, a1) for b in (b0, b1)]
        close = f"(({a1} - {a0} <= 1) & ({b1} - {b0} <= 1))"
        return f"({' | '.join(corners)} | ~{close})", f"({' & '.join(corners)} & {close})"

    some, every = write(expr)
    return _Recipe(some, every, tuple(held), tuple(tables))


def _compare(f: tuple[str, str], op: type[Relational], g: tuple[str, str]) -> tuple[str, str]:
    (f0, f1), (g0, g1) = f, g
    sign = x.OPERATOR[op]
    if op in (sympy.GreaterThan, sympy.StrictGreaterThan):
        return f"({f1} {sign} {g0})", f"({f0} {sign} {g1})"
    if op in (sympy.LessThan, sympy.StrictLessThan):
        return f"({f0} {sign} {g1})", f"({f1} {sign} {g0})"
    some, every = f"(({f0} <= {g1}) & ({g0} <= {f1}))", f"(({f0} == {f1}) & ({g0} == {g1}) & ({f0} == {g0}))"
    return (some, every) if op is sympy.Eq else (f"(~{every})", f"(~{some})")


@dataclass(frozen=True, eq=False)
class Extremes:
    """Least and greatest position of each query tile [B, 1|H, tiles] and limit of each key tile [B, H, tiles], of the
    main section and (optionally) of the heads' own sections, int32."""

    row_low: Tensor
    row_high: Tensor
    low: Tensor
    high: Tensor
    tail_low: Tensor | None = None
    tail_high: Tensor | None = None

    @classmethod
    def of(cls, row: Tensor, limit: Tensor, tile: int) -> Extremes:
        """From row [B, 1|H, Q] and limit [B, H, main slots], without sections."""
        return cls(*_extremes(row, tile), *_extremes(limit, tile))


@lru_cache(maxsize=256)
def _classifier(some: str, every: str, names: tuple[str, ...]) -> Callable[..., Tensor]:
    lines = [
        f"def classify({', '.join(['b', 'h', 'row_low', 'row_high', 'low', 'high', *names])}):",
        f"    some = (row_high >= low) & {some}",
        f"    every = (row_low >= high) & {every}",
        "    return torch.where(some, torch.where(every, 2, 1), 0).to(torch.int8)",
    ]
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile("\n".join(lines), "<mmflex classify>", "exec"), namespace)  # our own source
    return namespace["classify"]


def classify(source: BlockSource, ends: Extremes) -> Tensor:
    """int8 [B, H, query tiles, key tiles (+ section tiles)]: 0 empty, 1 partial, 2 full; ``row >= limit`` is part of
    the mask. The torch twin of `mmflex.runtime.kernels.lists`."""
    b = torch.arange(ends.low.shape[0], device=ends.low.device)[:, None, None, None]
    h = torch.arange(ends.low.shape[1], device=ends.low.device)[None, :, None, None]
    function = _classifier(source.some, source.every, (*source.names, *source.tables))
    rows = ends.row_low[..., None], ends.row_high[..., None]
    out = function(
        b, h, *rows, ends.low[:, :, None], ends.high[:, :, None], *source.names.values(), *source.tables.values()
    )
    if ends.tail_low is None or ends.tail_high is None:
        return out
    partial, full = rows[1] >= ends.tail_low[:, :, None], rows[0] >= ends.tail_high[:, :, None]
    return torch.cat([out, torch.where(partial, torch.where(full, 2, 1), 0).to(torch.int8)], -1)


def _extremes(t: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    tiled = t.unflatten(-1, (-1, tile))
    return tiled.amin(-1), tiled.amax(-1)


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
