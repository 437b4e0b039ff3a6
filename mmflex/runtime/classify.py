"""Which blocks are full, partial or empty: an expression evaluated on tokens, and on the bounds of whole tiles.

Both walk over the same expression: on tokens with plain values, on blocks with bounds. A relation comes apart into
``f(q) op g(k)``, so a block needs only the least and greatest f of its queries and g of its keys. What holds
*somewhere* may come out too wide and *everywhere* too narrow, never the other way: a block may be computed for nothing,
or masked without need, but no pair is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ..compiler.orders import TokenOrder, attribute
from ..ir import expr as x
from ..ir.atoms import Touches, atom_of
from ..ir.layout import TokenLayout

# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Values:
    """Values of leaves and sets for the heads of a group, broadcastable over [B, H, queries, keys].

    Attributes:
        layout, rows, keys: whose attributes.
        selections: sets and numbers by name: bool [B, H, n] or [B, H, n, m], int [B, H].
        row_index: int64 [B, H, S], where the rows differ by head: the query in each slot. Likewise key_index.
    """

    layout: TokenLayout
    rows: TokenOrder
    keys: TokenOrder
    selections: dict[str, Tensor]
    device: torch.device
    row_index: Tensor | None = None
    key_index: Tensor | None = None
    memo: dict[Any, Tensor] = field(default_factory=dict)

    def of(self, e: sympy.Basic) -> Tensor:
        """Any expression, value by value."""
        code, reads = x.compiled(e)
        names = {n: self.set_test(leaf) if isinstance(leaf, x.SetTest) else self.leaf(leaf) for n, leaf in reads}
        value = eval(code, names)  # our own source, from a sympy expression
        return value if isinstance(value, Tensor) else torch.tensor(value, device=self.device)[None, None, None, None]

    def set_test(self, atom: Any) -> Tensor:
        """A set test on the tokens of both sides."""
        return atom.on_tokens(self)

    def leaf(self, e: sympy.Basic) -> Tensor:
        """An attribute [B, 1|H, S, 1] or [B, 1|H, 1, S], a number [B, H, 1, 1]."""
        if e not in self.memo:
            self.memo[e] = self._leaf(e)
        return self.memo[e]

    def _leaf(self, e: sympy.Basic) -> Tensor:
        if isinstance(e, x.Number):
            return self.selections[str(e)][:, :, None, None]
        order, index, of_queries = self._side(e)
        value = slot_attribute(e, self.layout, order, index, self.device)
        return value[..., None] if of_queries else value[:, :, None]

    def _side(self, e: sympy.Basic) -> tuple[TokenOrder, Tensor | None, bool]:
        """(order, index, whether it is of the queries) of an expression of one side."""
        if x.q in x.sides(e):
            return self.rows, self.row_index, True
        return self.keys, self.key_index, False

    def bounds(self, e: sympy.Basic) -> tuple[Tensor, Tensor]:
        """Least and greatest value of an expression of one side on each tile; kept with the order where they follow
        from the layout."""
        order, index, _ = self._side(e)
        if index is not None or x.selected(e):
            return tile_extremes(self.of(e), self.rows.tile)
        memo = order.__dict__.setdefault("_bounds", {})
        key = (e, self.device)
        if key not in memo:
            memo[key] = tile_extremes(self.of(e), self.rows.tile)
        return memo[key]

    # What set tests ask (`mmflex.ir.atoms`).

    def bitmap_of_keys(self, name: str) -> Tensor | None:
        """bool [B, H, 1, S], a set of key positions in slot order, where slots are positions; else None."""
        if self.key_index is not None or not self.keys.slots_are_positions(self.layout):
            return None
        table = self.selections[name]
        return torch.nn.functional.pad(table, (0, self.keys.slots - table.shape[-1]))[:, :, None]

    def test(self, atom: Any, *index: Tensor) -> Tensor:
        """A set test at coordinates; those beyond the table are clamped into it, those below 0 are in no set."""
        table = self.selections[atom.set_name]
        b = torch.arange(table.shape[0], device=self.device)[:, None, None, None]
        h = torch.arange(table.shape[1], device=self.device)[None, :, None, None]
        if isinstance(atom, Touches):
            below = self.count_below(atom.set_name)
            top = below.shape[-1] - 1
            return below[b, h, (index[1] + 1).clamp(0, top)] > below[b, h, index[0].clamp(0, top)]
        inside = [i.clamp(0, size - 1) for i, size in zip(index, table.shape[2:], strict=True)]
        value = table[(b, h, *inside)]
        return value & (index[0] >= 0) if len(index) == 1 else value

    def count_below(self, name: str) -> Tensor:
        """int32 [B, H, n + 1]: how many members of a set are below each number."""
        key = ("below", name)
        if key not in self.memo:
            counts = torch.nn.functional.pad(self.selections[name].int(), (1, 0))
            self.memo[key] = counts.cumsum(-1, dtype=torch.int32)
        return self.memo[key]


def slot_attribute(
    e: sympy.Basic, layout: TokenLayout, order: TokenOrder, index: Tensor | None, device: torch.device
) -> Tensor:
    """int32 [B, 1|H, S]: an attribute of the tokens of one side, in slot order; ``index`` int64 [B, H, S] says which
    query or key stands in each slot, where heads differ."""
    if index is None:
        memo = order.__dict__.setdefault("_attributes", {})
        key = (e, device)
        if key not in memo:
            memo[key] = torch.tensor(order.attribute(e, layout), dtype=torch.int32, device=device)[:, None]
        return memo[key]
    value = layout.once(
        ("on", e, device), lambda: torch.tensor(attribute(e, layout), dtype=torch.int32, device=device)[:, None]
    )
    return value.expand(len(index), index.shape[1], -1).gather(-1, order.token_numbers(index))


def tile_extremes(value: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Least and greatest value of every tile, of values [B, H, S, 1] of queries or [B, H, 1, S] of keys."""
    low = high = value
    for dim in (2, 3):
        if value.shape[dim] > 1:
            low, high = low.unflatten(dim, (-1, tile)).amin(dim + 1), high.unflatten(dim, (-1, tile)).amax(dim + 1)
    return low, high


# ---- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlockTest:
    """When an expression holds on blocks, as source over named tensors broadcastable over [B, H, query, key tiles].

    Attributes:
        some: holds on some pair (may be too wide). every: holds on every pair (may be too narrow).
        bounds: tensors that the source reads, by name. tables: sets that it looks up, [B, H, n] or [B, H, n, m].
        triton: the source is for a Triton kernel, not for torch. Sources are equal for expressions of equal structure.
    """

    some: str
    every: str
    bounds: dict[str, Tensor]
    tables: dict[str, Tensor]
    triton: bool = False


def everything(triton: bool) -> BlockTest:
    """The test that every pair passes."""
    return BlockTest("True", "True", {}, {}, triton)


def block_test(expr: Boolean, values: Values, triton: bool = False) -> BlockTest:
    """The classifier of an expression, by bounds of f and g on each side's tiles."""
    recipe = _recipe(expr, triton)
    bounds: dict[str, Tensor] = {}
    for i, e in enumerate(recipe.sides):
        bounds[f"t{2 * i}"], bounds[f"t{2 * i + 1}"] = values.bounds(e)
    tables = {
        f"s{i}": values.count_below(name) if below else values.selections[name]
        for i, (name, below) in enumerate(recipe.tables)
    }
    return BlockTest(recipe.some, recipe.every, bounds, tables, triton)


@dataclass(frozen=True, eq=False)
class _Recipe:
    """A classifier's source, the expressions whose bounds it reads (t0, t1: of the first, ...), and its tables: (name,
    whether as counts of the members below)."""

    some: str
    every: str
    sides: tuple[sympy.Basic, ...]
    tables: tuple[tuple[str, bool], ...]


def _joined(e: Boolean, parts: list[str]) -> str:
    """The parts of a conjunction or disjunction; constants are worked out, since ``~`` of Python's True is -2."""
    sign, neutral, decisive = ("&", "True", "False") if isinstance(e, sympy.And) else ("|", "False", "True")
    if decisive in parts:
        return decisive
    left = [part for part in parts if part != neutral]
    return f"({f' {sign} '.join(left)})" if left else neutral


class _Writer:
    """Names and source for what atoms read (`mmflex.ir.atoms`)."""

    def __init__(self, triton: bool) -> None:
        self.triton = triton
        self.sides: dict[sympy.Basic, int] = {}
        self.tables: dict[tuple[str, bool], int] = {}

    def bounds(self, e: sympy.Basic) -> tuple[str, str]:
        """Names of the least and greatest value of an expression on each tile."""
        number = self.sides.setdefault(e, len(self.sides))
        return f"t{2 * number}", f"t{2 * number + 1}"

    def entry(self, name: str, *index: str) -> str:
        """An entry of a set's table, indices clamped into it."""
        value, _ = self._entry(name, False, index)
        return f"({value} != 0)" if self.triton else value

    def count_below(self, name: str, index: str) -> str:
        """How many members of a set are below a number."""
        return self._entry(name, True, (index,))[0]

    def _entry(self, name: str, below: bool, index: tuple[str, ...]) -> tuple[str, str]:
        table = f"s{self.tables.setdefault((name, below), len(self.tables))}"
        if not self.triton:
            sizes = [f"{table}.shape[{i - len(index)}]" for i in range(len(index))]
            inside = [f"({a}).clamp(0, {size} - 1)" for a, size in zip(index, sizes, strict=True)]
            return f"{table}[b, h, {', '.join(inside)}]", table
        inside = [f"tl.minimum(tl.maximum({a}, 0), {table}_n{i} - 1)" for i, a in enumerate(index)]
        return f"tl.load({table} + {f' * {table}_n1 + '.join(inside)})", table

    def write(self, e: Boolean) -> tuple[str, str]:
        """Source of "somewhere" and "everywhere"."""
        if e in (sympy.true, sympy.false):
            return str(bool(e)), str(bool(e))
        if isinstance(e, (sympy.And, sympy.Or)):
            parts = [self.write(arg) for arg in e.args]
            return _joined(e, [part[0] for part in parts]), _joined(e, [part[1] for part in parts])
        if isinstance(e, sympy.Not):
            some, every = self.write(e.args[0])
            flip = {"True": "False", "False": "True"}
            return flip.get(every, f"(~{every})"), flip.get(some, f"(~{some})")
        if len(x.sides(e)) < 2:
            low, high = self.bounds(e)
            return high, low
        return atom_of(e).classify(self)


@lru_cache(maxsize=1024)
def _recipe(expr: Boolean, triton: bool) -> _Recipe:
    writer = _Writer(triton)
    some, every = writer.write(expr)
    return _Recipe(some, every, tuple(writer.sides), tuple(writer.tables))


@dataclass(frozen=True, eq=False)
class Extremes:
    """Least and greatest position of each query tile [B, 1|H, tiles] and limit of each key tile [B, H, tiles], of the
    main section and (optionally) of the heads' own gathered sections, int32."""

    row_low: Tensor
    row_high: Tensor
    low: Tensor
    high: Tensor
    gathered_low: Tensor | None = None
    gathered_high: Tensor | None = None

    @classmethod
    def of(cls, row: Tensor, limit: Tensor, tile: int) -> Extremes:
        """From row [B, 1|H, Q] and limit [B, H, main slots], without gathered sections."""
        tiled = [t.unflatten(-1, (-1, tile)) for t in (row, limit)]
        return cls(*(extreme for t in tiled for extreme in (t.amin(-1), t.amax(-1))))


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


def classify(test: BlockTest, ends: Extremes) -> Tensor:
    """int8 [B, H, query tiles, key tiles (+ tiles of the gathered section)]: 0 empty, 1 partial, 2 full; ``row >=
    limit`` is part of the mask. The torch twin of `mmflex.runtime.kernels.lists`."""
    b = torch.arange(ends.low.shape[0], device=ends.low.device)[:, None, None, None]
    h = torch.arange(ends.low.shape[1], device=ends.low.device)[None, :, None, None]
    function = _classifier(test.some, test.every, (*test.bounds, *test.tables))
    rows = ends.row_low[..., None], ends.row_high[..., None]
    limits = ends.low[:, :, None], ends.high[:, :, None]
    out = function(b, h, *rows, *limits, *test.bounds.values(), *test.tables.values())
    if ends.gathered_low is None or ends.gathered_high is None:
        return out
    partial, full = rows[1] >= ends.gathered_low[:, :, None], rows[0] >= ends.gathered_high[:, :, None]
    return torch.cat([out, torch.where(partial, torch.where(full, 2, 1), 0).to(torch.int8)], -1)


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
