"""The steps of a program on tensors: estimate, select, gather, blocks, keys, attend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from ..compiler.blocks import Values, block_bounds, compact, side_attribute
from ..compiler.orders import BIG, Order, gathered
from ..compiler.plan import HeadMap, Launch, Part, Program, names_of
from ..ir import expr as x
from ..ir.pattern import View
from . import backends, masks


@dataclass(eq=False)
class Ready:
    """What planning leaves for a launch.

    Attributes:
        row_index: int64 [B, H, S], the query in each slot, where rows differ by head; else None. So key_index.
        section_index: int64 [B, H, C], tokens of each head's section.
        section_heads: heads of ``section_index``.
        row: int32 [B, S] or [B, H, S], positions of the queries, -1 for none.
        limit: int32 [B, H, KV].
        lists: the block lists. mask_mod: the mask of partial blocks.
    """

    row: Tensor
    limit: Tensor
    lists: backends.Lists
    mask_mod: masks.MaskMod
    row_index: Tensor | None = None
    row_count: Tensor | None = None
    key_index: Tensor | None = None
    section_index: Tensor | None = None
    section_heads: tuple[int, ...] = ()


@dataclass(eq=False)
class State:
    """Values of the steps done so far, of one plan."""

    program: Program
    device: torch.device
    batch: int
    found: dict[str, Tensor] = field(default_factory=dict)
    estimates: dict[Any, tuple[Any, dict[int, int]]] = field(default_factory=dict)
    ready: dict[int, Ready] = field(default_factory=dict)

    def const(self, values: tuple[int, ...]) -> Tensor:
        """An index tensor on the device, copied there once per program."""
        key = ("const", values, self.device)
        if key not in self.program.memo:
            self.program.memo[key] = torch.tensor(values, dtype=torch.int64).to(self.device)
        return self.program.memo[key]

    def values(
        self,
        exprs: Iterable[sympy.Basic],
        heads: tuple[int, ...],
        rows: Order,
        keys: Order,
        row_index: Tensor | None = None,
        key_index: Tensor | None = None,
    ) -> Values:
        """What expressions read, for some heads that share them."""
        found = {}
        for name in sorted(frozenset().union(*map(names_of, exprs))):
            leaf, table = self.program.leaves[name.split("@", 1)[1]], self.found[name]
            if leaf.heads != heads:
                table = table.index_select(1, self.const(tuple(leaf.heads.index(h) for h in heads)))
            found[name] = table
        return Values(self.program.layout, rows, keys, found, self.device, row_index, key_index)

    def part_values(self, launch: Launch, part: Part, *index: Tensor) -> Values:
        """What a part's expressions read."""
        exprs = (part.mask, part.columns, part.chosen, *(part.classes or ()))
        return self.values(exprs, part.heads, launch.rows, launch.keys, *index)


def take_heads(t: Tensor, heads: tuple[int, ...], state: State) -> Tensor:
    """Heads of a tensor [B, H, ...]; itself where they are all, in order. Empty heads (-1) get any head's rows."""
    if heads == tuple(range(t.shape[1])):
        return t
    return t.index_select(1, state.const(tuple(max(h, 0) for h in heads)))


def estimate(state: State, key: Any, q: Tensor, k: Tensor, scale: float) -> None:
    """Runs an estimator once for all heads that select from it."""
    estimator, scope = key
    program = state.program
    wanted = {
        h for leaf in program.leaves.values() if (leaf.pattern.estimator(), leaf.scope) == key for h in leaf.heads
    }
    heads = HeadMap.of(sorted(wanted), program.heads // program.kv_heads)
    view = View(program.layout, scope, program.queries, program.tile)
    result = estimator(take_heads(q, heads.heads, state), take_heads(k, heads.kv_heads, state), view, scale)
    state.estimates[key] = (result, {h: i for i, h in enumerate(heads.heads) if h >= 0})


def select(state: State, name: str) -> None:
    """Lets a pattern choose its sets and numbers."""
    leaf = state.program.leaves[name]
    view = View(state.program.layout, leaf.scope, state.program.queries, state.program.tile)
    result, place = state.estimates.get((leaf.pattern.estimator(), leaf.scope), (None, {}))
    chosen = leaf.pattern.select(result, view)
    index = tuple(place[h] for h in leaf.heads) if place else ()
    for short, table in chosen.items():
        if place and index != tuple(range(table.shape[1])):
            table = table.index_select(1, state.const(index))
        state.found[f"{short}@{name}"] = table


def _positions(launch: Launch, state: State) -> tuple[Tensor, Tensor]:
    """(row [B, S], key [B, S]) int32: positions in slot order, -1 for no query and BIG for no key. Cached."""
    memo = state.program.memo
    key = ("positions", launch.rows, launch.keys, state.device)
    if key not in memo:
        layout = state.program.layout
        row = side_attribute(x.q, layout, launch.rows, None, state.device)[:, 0]
        at = side_attribute(x.k, layout, launch.keys, None, state.device)[:, 0]
        at = torch.where(launch.keys.on("index", state.device) >= 0, at, BIG).int()
        memo[key] = (row.contiguous(), at.contiguous())
    row, at = memo[key]
    return row.expand(state.batch, -1), at.expand(state.batch, -1)


def gather_and_list(state: State, number: int) -> None:
    """Gathered rows and columns, residue orders, limits and block lists of a launch."""
    launch = state.program.launches[number]
    {"main": _main, "rows": _rows, "classes": _classes}[launch.kind](state, number, launch)


def _main(state: State, number: int, launch: Launch) -> None:
    program, tile = state.program, state.program.tile
    row, at = _positions(launch, state)
    heads = launch.heads.heads
    batch, main = state.batch, launch.keys.slots
    limit = torch.full((batch, len(heads), launch.key_slots), BIG, dtype=torch.int32, device=state.device)
    place = {h: i for i, h in enumerate(heads) if h >= 0}
    slot_of, blocks = launch.section_slot, launch.section // tile
    tables: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(heads)
    sections, section_heads, residual = [], [], None
    row_low, row_high = _row_bounds(row, tile)
    for part in launch.parts:
        values = state.part_values(launch, part)
        here = state.const(tuple(place[h] for h in part.heads))
        own = at[:, None].expand(-1, len(part.heads), -1)
        tail = None
        if part.columns != sympy.false:
            chosen = values.of(part.columns)[:, :, 0].expand(batch, len(part.heads), -1) & (own < BIG)
            index, count = gathered(chosen, launch.section)
            _check(count <= launch.section, "gathered columns")
            own = torch.where(chosen, BIG, own)
            tail = torch.where(
                torch.arange(launch.section, device=state.device) < count[..., None],
                at[:, None].expand(-1, len(part.heads), -1).gather(-1, index),
                BIG,
            ).int()
            if not launch.keys.identity:
                index = launch.keys.on("filled", state.device).expand(batch, -1)[:, None].expand(
                    -1, len(part.heads), -1
                ).gather(-1, index)
            sections.append(index)
            section_heads.extend(part.heads)
        limit[:, here, :main] = own.int()
        some, every = block_bounds(part.mask, values)
        low, high = own.unflatten(-1, (-1, tile)).amin(-1), own.unflatten(-1, (-1, tile)).amax(-1)
        some = some & (row_high >= low[:, :, None])
        every = every & (row_low >= high[:, :, None]) & some
        full_shape = (batch, len(part.heads), launch.row_slots // tile, main // tile)
        some, every = some.expand(full_shape), every.expand(full_shape)
        if launch.section:
            if tail is None:
                tail = torch.full((batch, len(part.heads), launch.section), BIG, dtype=torch.int32, device=state.device)
            low, high = tail.unflatten(-1, (-1, tile)).amin(-1), tail.unflatten(-1, (-1, tile)).amax(-1)
            some = torch.cat([some, row_high >= low[:, :, None]], -1)
            every = torch.cat([every, row_low >= high[:, :, None]], -1)
            for i, h in enumerate(part.heads):
                if h in slot_of:
                    first = main + slot_of[h] * launch.section
                    limit[:, place[h], first : first + launch.section] = tail[:, i]
        for i, h in enumerate(part.heads):
            tables[place[h]] = (some[:, i], every[:, i])
        if not launch.compare:
            residual = (part.mask, values)
    lists = _lists(state, launch, tables, main // tile, blocks)
    if residual is None:
        mask_mod = masks.comparison(row.contiguous(), limit)
    else:
        mask_mod = masks.looked_up(row.contiguous(), limit, *residual, main, launch.key_slots, batch, len(heads))
    state.ready[number] = Ready(
        row,
        limit,
        lists,
        mask_mod,
        section_index=torch.cat(sections, 1) if sections else None,
        section_heads=tuple(section_heads),
    )


def _row_bounds(row: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Least and greatest position of each query tile, [B, 1|H, tiles, 1]."""
    row = row[:, None] if row.dim() == 2 else row
    tiled = row.unflatten(-1, (-1, tile))
    return tiled.amin(-1)[..., None], tiled.amax(-1)[..., None]


def _lists(
    state: State, launch: Launch, tables: list[tuple[Tensor, Tensor]], main_tiles: int, blocks: int
) -> backends.Lists:
    """Block lists of all heads of a launch from (somewhere, everywhere) tables over [main | own section] tiles."""
    rows = launch.row_slots // state.program.tile
    empty = torch.zeros((state.batch, rows, main_tiles + blocks), dtype=torch.bool, device=state.device)
    some = torch.stack([t[0] if t[0].numel() else empty for t in tables], 1)
    every = torch.stack([t[1] if t[1].numel() else empty for t in tables], 1)
    shift = tuple(launch.section_slot.get(h, 0) * blocks for h in launch.heads.heads)
    out: list[Tensor] = []
    for listed in (some & ~every, some & every):
        count, index = compact(listed, launch.width)
        _check(count <= launch.width, "key blocks of a query block")
        if any(shift):
            move = state.const(shift).int()[:, None, None]
            index = torch.where(index >= main_tiles, index + move, index)
        out += [count, index]
    return out[0], out[1], out[2], out[3]


def _check(fits: Tensor, what: str) -> None:
    """A loud error where a static bound is passed (on CUDA when the device gets there), never a dropped block."""
    message = f"more {what} than the spec's budget allows: a pattern selected more than it declared (at_most)"
    torch._assert_async(fits.all(), message)


def _rows(state: State, number: int, launch: Launch) -> None:
    tile = state.program.tile
    row, at = _positions(launch, state)
    heads, batch = launch.heads.heads, state.batch
    token = launch.rows.on("filled", state.device).expand(batch, -1)
    real = (launch.rows.on("index", state.device) >= 0).expand(batch, -1)
    place = {h: i for i, h in enumerate(heads) if h >= 0}
    index = torch.zeros((batch, len(heads), launch.capacity), dtype=torch.int64, device=state.device)
    count = torch.zeros((batch, len(heads)), dtype=torch.int64, device=state.device)
    for part in launch.parts:
        values = state.part_values(launch, part)
        chosen = values.of(part.chosen)[..., 0].expand(batch, len(part.heads), -1) & real[:, None]
        slots, found = gathered(chosen, launch.capacity)
        _check(found <= launch.capacity, "gathered rows")
        here = state.const(tuple(place[h] for h in part.heads))
        index[:, here], count[:, here] = slots, found
    filled = torch.arange(launch.capacity, device=state.device) < count[..., None]
    position = row[:, None].expand(-1, len(heads), -1).gather(-1, index)
    position = torch.where(filled.any(-1, keepdim=True), position, -1).int()
    limit = at[:, None].expand(-1, len(heads), -1).contiguous().int()
    row_low, row_high = _row_bounds(position, tile)
    low, high = limit.unflatten(-1, (-1, tile)).amin(-1), limit.unflatten(-1, (-1, tile)).amax(-1)
    some, every = row_high >= low[:, :, None], row_low >= high[:, :, None]
    some = some & filled.unflatten(-1, (-1, tile)).any(-1)[..., None]
    tables = [(some[:, i], every[:, i] & some[:, i]) for i in range(len(heads))]
    lists = _lists(state, launch, tables, launch.keys.slots // tile, 0)
    token_index = token[:, None].expand(-1, len(heads), -1).gather(-1, index)
    state.ready[number] = Ready(
        position, limit, lists, masks.comparison(position, limit), row_index=token_index, row_count=count
    )


def _classes(state: State, number: int, launch: Launch) -> None:
    tile = state.program.tile
    row, at = _positions(launch, state)
    heads, batch = launch.heads.heads, state.batch
    (part,) = launch.parts
    assert part.classes is not None
    values = state.part_values(launch, part)
    order = []
    for residue, position, side, dim in ((part.classes[0], row, launch.rows, 3), (part.classes[1], at, launch.keys, 2)):
        real = (side.on("index", state.device) >= 0)[:, None].expand(batch, len(part.heads), -1)
        key = values.of(residue).squeeze(dim).expand(real.shape).long() * (BIG << 1) + position[:, None]
        slot = torch.where(real, key, torch.iinfo(torch.int64).max).argsort(-1)
        # Empty slots come last; they repeat the last token, so that they widen no block's bounds.
        last = (real.sum(-1, keepdim=True) - 1).clamp(min=0)
        sorted_real = torch.arange(slot.shape[-1], device=state.device) <= last
        slot = slot.gather(-1, torch.arange(slot.shape[-1], device=state.device).expand(slot.shape).minimum(last))
        sorted_real = sorted_real & real.any(-1, keepdim=True)
        token = side.on("filled", state.device).expand(batch, -1)[:, None].expand(real.shape).gather(-1, slot)
        order.append((token, position[:, None].expand(real.shape).gather(-1, slot), sorted_real))
    (row_index, row_at, row_real), (key_index, key_at, key_real) = order
    row_at, key_at = torch.where(row_real, row_at, -1).int(), torch.where(key_real, key_at, BIG).int()
    there = state.part_values(launch, part, row_index, key_index)
    some, every = block_bounds(part.mask, there)
    row_low, row_high = _row_bounds(row_at, tile)
    low, high = key_at.unflatten(-1, (-1, tile)).amin(-1), key_at.unflatten(-1, (-1, tile)).amax(-1)
    some = some & (row_high >= low[:, :, None])
    every = every & (row_low >= high[:, :, None]) & some
    place = {h: i for i, h in enumerate(part.heads)}
    tables = [(some[:, place[h]], every[:, place[h]]) if h >= 0 else (torch.empty(0),) * 2 for h in heads]
    lists = _lists(state, launch, tables, launch.keys.slots // tile, 0)
    pick = state.const(tuple(place.get(h, 0) for h in heads))
    row_at, key_at, row_index, key_index = (t.index_select(1, pick) for t in (row_at, key_at, row_index, key_index))
    there = state.part_values(launch, part, row_index, key_index)
    there.found = {name: table.index_select(1, pick) for name, table in there.found.items()}
    mask_mod = masks.looked_up(
        row_at, key_at, part.mask, there, launch.keys.slots, launch.keys.slots, batch, len(heads)
    )
    state.ready[number] = Ready(
        row_at, key_at, lists, mask_mod, row_index=row_index, row_count=row_real.sum(-1).index_select(1, pick), key_index=key_index
    )


# ---- attending ---------------------------------------------------------------------------------------------------------


def keys(state: State, number: int, t: Tensor) -> Tensor:
    """k or v [B, Hkv, N, D] in the slots of a launch: main section, then the gathered sections."""
    launch, ready = state.program.launches[number], state.ready[number]
    if ready.key_index is not None:
        per_head = take_heads(t, tuple(max(h, 0) * t.shape[1] // state.program.heads for h in launch.heads.heads), state)
        return per_head.gather(2, ready.key_index[..., None].expand(-1, -1, -1, t.shape[-1]))
    t = take_heads(t, launch.heads.kv_heads, state)
    if not launch.keys.identity:
        index = launch.keys.on("filled", state.device).expand(state.batch, -1)
        main = t.gather(2, index[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[-1]))
    else:
        main = t
    if ready.section_index is None:
        return main
    kv_heads, sections = len(launch.heads.kv_heads), launch.sections
    out = t.new_empty((state.batch, kv_heads, launch.key_slots, t.shape[-1]))
    out[:, :, : launch.keys.slots] = main
    tail = out[:, :, launch.keys.slots :].unflatten(2, (sections, launch.section))
    index = torch.zeros((state.batch, kv_heads, sections, launch.section), dtype=torch.int64, device=state.device)
    group = state.program.heads // state.program.kv_heads
    kv_place = {kv: i for i, kv in enumerate(launch.heads.kv_heads)}
    at_kv = state.const(tuple(kv_place[h // group] for h in ready.section_heads))
    at_slot = state.const(tuple(launch.section_slot[h] for h in ready.section_heads))
    index[:, at_kv, at_slot] = ready.section_index
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, t.shape[-1])
    tail.copy_(t.gather(2, flat).unflatten(2, (sections, launch.section)))
    return out


def queries(state: State, number: int, q: Tensor) -> Tensor:
    """q [B, H, M, D] in the slots of a launch."""
    launch, ready = state.program.launches[number], state.ready[number]
    q = take_heads(q, launch.heads.heads, state)
    if ready.row_index is not None:
        return q.gather(2, ready.row_index[..., None].expand(-1, -1, -1, q.shape[-1]))
    if launch.rows.identity:
        return q
    index = launch.rows.on("filled", state.device).expand(state.batch, -1)
    return q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1]))


def place(state: State, number: int, out: Tensor, lse: Tensor | None, found: Tensor, sums: Tensor | None) -> None:
    """Writes the rows of a launch to out [B, Hq, M, D] and lse [B, Hq, M]; residue classes are merged by log-sum-exp."""
    launch, ready = state.program.launches[number], state.ready.get(number)
    keep = tuple(i for i, h in enumerate(launch.heads.heads) if h >= 0)
    heads = tuple(launch.heads.heads[i] for i in keep)
    found = found if len(keep) == len(launch.heads.heads) else found.index_select(1, state.const(keep))
    if sums is not None and len(keep) != len(launch.heads.heads):
        sums = sums.index_select(1, state.const(keep))
    here = state.const(heads)
    if launch.kind == "dense":
        out.index_copy_(1, here, found)
        if lse is not None and sums is not None:
            lse.index_copy_(1, here, sums)
        return
    if launch.kind == "rows":
        assert ready is not None and ready.row_index is not None and ready.row_count is not None
        index, count = ready.row_index[:, state.const(keep)], ready.row_count[:, state.const(keep)]
        # Slots past the count repeat the last row's index and get its value; without any row, what is there already.
        slot = torch.arange(launch.capacity, device=state.device).clamp(max=(count[..., None] - 1).clamp(min=0))
        _scatter(out, here, index, found.gather(2, _wide(slot, found)), count)
        if lse is not None and sums is not None:
            _scatter(lse, here, index, sums.gather(2, slot), count)
        return
    if launch.kind == "classes":
        assert ready is not None and ready.row_index is not None and ready.row_count is not None
        assert lse is not None and sums is not None
        index, count = ready.row_index[:, state.const(keep)], ready.row_count[:, state.const(keep)]
        slot = torch.arange(index.shape[-1], device=state.device).expand(index.shape)
        real = slot < count[..., None]
        tokens = out.shape[2]
        inverse = torch.full((*index.shape[:2], tokens + 1), -1, dtype=torch.int64, device=state.device)
        inverse.scatter_(2, torch.where(real, index, tokens), slot)
        inverse = inverse[..., :-1]
        first, second = lse.index_select(1, here), sums.gather(2, inverse.clamp(min=0))
        second = torch.where(inverse >= 0, second, float("-inf"))
        total = torch.logaddexp(first, second)
        base = torch.where(total == float("-inf"), 0.0, total)
        other = found.gather(2, _wide(inverse.clamp(min=0), found))
        mixed = out.index_select(1, here) * (first - base).exp()[..., None] + other * (second - base).exp()[..., None]
        out.index_copy_(1, here, mixed.to(out.dtype))
        lse.index_copy_(1, here, total)
        return
    inverse = launch.rows.on("inverse", state.device).expand(state.batch, -1)[:, None].expand(-1, len(heads), -1)
    there = inverse >= 0
    new = found.gather(2, _wide(inverse.clamp(min=0), found))
    out.index_copy_(1, here, torch.where(there[..., None], new, out.index_select(1, here)))
    if lse is not None and sums is not None:
        lse.index_copy_(1, here, torch.where(there, sums.gather(2, inverse.clamp(min=0)), lse.index_select(1, here)))


def _wide(index: Tensor, t: Tensor) -> Tensor:
    """An index [B, H, S] over the rows of t [B, H, R, D]."""
    return index[..., None].expand(-1, -1, -1, t.shape[-1])


def _scatter(out: Tensor, heads: Tensor, index: Tensor, value: Tensor, count: Tensor) -> None:
    """Writes value [B, H, R, ...] to rows ``index`` [B, H, R] of the heads of out, unless count [B, H] is 0."""
    part = out.index_select(1, heads)
    at = index if value.dim() == 3 else _wide(index, value)
    some = (count > 0)[..., None] if value.dim() == 3 else (count > 0)[..., None, None]
    part.scatter_(2, at, torch.where(some, value, part.gather(2, at)))
    out.index_copy_(1, heads, part)
