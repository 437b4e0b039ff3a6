"""The steps of a program on tensors: estimate, select, gather and list, attend and merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ..compiler.blocks import BlockSource, Extremes, Values, block_source, side_attribute
from ..compiler.orders import BIG, Order
from ..compiler.plan import HeadMap, Launch, Part, Program, names_of
from ..ir import expr as x
from ..ir.pattern import View
from ..ir.shown import shown
from . import backends, masks
from .kernels.lists import dialect, list_blocks
from .kernels.rows import fill_slots, put_rows, take_rows
from .kernels.sections import fill_sections
from .kernels.select import gathered
from .selected import check_selected


@dataclass(eq=False)
class Ready:
    """What planning leaves for a launch.

    Attributes:
        lists: the block lists. mask_mod: the mask of partial blocks.
        row_index: int64 [B, H, S], the query in each slot, where rows differ by head, and how many are real
            (``row_count`` int64 [B, H]). key_index: likewise the key.
        section_table: int64 [B, sections of all KV heads, slots], the token in each slot of the gathered sections (-1:
            none); a head's own is number ``launch.table_slot[head]``.
    """

    lists: backends.Lists
    mask_mod: masks.MaskMod
    row_index: Tensor | None = None
    row_count: Tensor | None = None
    key_index: Tensor | None = None
    section_table: Tensor | None = None


@dataclass(eq=False)
class State:
    """Values of the steps done so far, of one plan."""

    program: Program
    device: torch.device
    batch: int
    found: dict[str, Tensor] = field(default_factory=dict)
    estimates: dict[Any, tuple[Any, dict[int, int]]] = field(default_factory=dict)
    ready: dict[int, Ready] = field(default_factory=dict)

    def const(self, values: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
        """An index tensor on the device, copied there once per program."""
        key = ("const", values, dtype, self.device)
        if key not in self.program.memo:
            self.program.memo[key] = torch.tensor(values, dtype=dtype, device=self.device)
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
            short, of = name.split("@", 1)
            if name not in self.found:
                raise ValueError(f"{of}: its mask names {short!r}, which select() did not return: return it there")
            leaf, table = self.program.leaves[of], self.found[name]
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
    heads: HeadMap = program.graph.nodes["estimate", key]["heads"]
    view = View(program.layout, scope, program.queries, program.tile)
    result = estimator(take_heads(q, heads.heads, state), take_heads(k, heads.kv_heads, state), view, scale)
    state.estimates[key] = (result, heads.place)


def select(state: State, name: str) -> None:
    """Lets a pattern choose its sets and numbers."""
    leaf = state.program.leaves[name]
    view = View(state.program.layout, leaf.scope, state.program.queries, state.program.tile)
    estimator = leaf.pattern.estimator()
    result: Any = None
    place: dict[int, int] = {}
    if estimator is not None:
        if (estimator, leaf.scope) not in state.estimates:
            raise TypeError(
                f"{name}: estimator() returned {shown(estimator)}, which equals none that it returned before: make it "
                "a frozen dataclass, so that equal ones are run once"
            )
        result, place = state.estimates[estimator, leaf.scope]
    chosen = leaf.pattern.select(result, view)
    index = tuple(place[h] for h in leaf.heads) if place else ()
    if not isinstance(chosen, Mapping):
        raise TypeError(f"{name}: select() returned {shown(chosen)}: return a dictionary of tensors by name")
    exprs, heads = [group.expr for group in state.program.groups], len(leaf.heads)
    if place:
        heads = len(state.program.graph.nodes["estimate", (estimator, leaf.scope)]["heads"].heads)
    for short, table in chosen.items():
        table = check_selected(table, f"{short}@{name}", exprs, view, state.batch, heads, state.device)
        if place and table.shape[1:2] == (heads,) and index != tuple(range(heads)):
            table = table.index_select(1, state.const(index))
        state.found[f"{short}@{name}"] = table


def after_estimates(state: State) -> None:
    """Selecting, gathering and listing, in an order that respects the graph of steps."""
    for op, key in state.program.steps("plan"):
        if op == "select":
            select(state, key)
        elif op == "gather":
            gather_and_list(state, key)


def _positions(launch: Launch, state: State) -> tuple[Tensor, Tensor]:
    """(row [B, S], key [B, S]) int32: positions in slot order, -1 for no query and BIG for no key. Cached."""
    memo = state.program.memo
    key = ("positions", launch.rows, launch.keys, state.device)
    if key not in memo:
        layout = state.program.layout
        row = side_attribute(x.q, layout, launch.rows, None, state.device)[:, 0]
        # Empty slots repeat a neighbour, so that they spoil no block's bounds; a tile of nothing else lists nothing.
        real = (launch.rows.on("index", state.device) >= 0).unflatten(-1, (-1, launch.rows.tile)).any(-1)
        row = torch.where(real.repeat_interleave(launch.rows.tile, -1), row, -1)
        at = side_attribute(x.k, layout, launch.keys, None, state.device)[:, 0]
        at = torch.where(launch.keys.on("index", state.device) >= 0, at, BIG).int()
        memo[key] = (row.contiguous(), at.contiguous())
    row, at = memo[key]
    return row.expand(state.batch, -1), at.expand(state.batch, -1)


def gather_and_list(state: State, number: int) -> None:
    """Gathered rows and columns, residue orders, limits and block lists of a launch."""
    launch = state.program.launches[number]
    state.ready[number] = {"main": _main, "rows": _rows, "classes": _classes}[launch.kind](state, launch)


class _Lists:
    """Block lists of a launch in the making. ``fits`` int32 [1] becomes 0 where a static bound is passed."""

    def __init__(self, state: State, launch: Launch) -> None:
        self.state, self.launch, self.tile = state, launch, state.program.tile
        shape = (2, state.batch, len(launch.heads.heads), launch.row_slots // self.tile)
        both = torch.zeros(math.prod(shape) * (launch.width + 1), dtype=torch.int32, device=state.device)
        self.counts, table = both[: math.prod(shape)].view(shape), both[math.prod(shape) :]
        self.table = table.view(*shape, launch.width)
        self.fits = torch.ones(1, dtype=torch.int32, device=state.device)

    def add(
        self,
        place: tuple[int, ...],
        mask: Boolean,
        values: Values | None,
        ends: Extremes,
    ) -> None:
        """Lists the blocks of some heads, by number in the launch; values None: all pairs."""
        triton = dialect(ends.low)
        empty = BlockSource("True", "True", {}, {}, triton)
        source = empty if values is None else block_source(mask, values, triton)
        sections = self.launch.section // self.tile
        slot, heads = self.launch.section_slot, self.launch.heads.heads
        shift = tuple(slot.get(heads[i], 0) * sections for i in place)
        at, moved = self.state.const(place, torch.int32), self.state.const(shift, torch.int32)
        list_blocks(source, ends, self.table, self.counts, self.fits, at, moved)

    def done(self) -> backends.Lists:
        """The lists. A loud error where something does not fit (on CUDA when the device gets there), never a dropped
        block."""
        what = "key blocks of a query block, gathered columns or gathered rows"
        message = f"more {what} than the spec's budget allows: a pattern selected more than it declared (at_most)"
        torch._assert_async(self.fits, message)
        return self.counts[0], self.table[0], self.counts[1], self.table[1]


def _main(state: State, launch: Launch) -> Ready:
    heads, batch, main = launch.heads.heads, state.batch, launch.keys.slots
    row, at, base = _based(launch, state)
    place = launch.heads.place
    limit = None
    # Else a key's limit is the number of its slot.
    if base != 0 or launch.section or not launch.keys.in_place(state.program.layout):
        limit = torch.empty((batch, len(heads), launch.key_slots), dtype=torch.int32, device=state.device)
        limit[..., main if all(h >= 0 for h in heads) else 0 :] = BIG
    table = None
    if launch.section:
        shape = (batch, len(launch.heads.kv_heads) * launch.sections, launch.section)
        table = torch.full(shape, -1, dtype=torch.int64, device=state.device)
    lists = _Lists(state, launch)
    residual = None
    for part in launch.parts:
        values = state.part_values(launch, part)
        here = tuple(place[h] for h in part.heads)
        if part.columns == sympy.false:
            if limit is not None:
                limit[:, state.const(here), :main] = at[:, None]
            lists.add(here, part.mask, values, _ends(launch, state, len(part.heads)))
        else:
            assert limit is not None
            assert table is not None
            sections = tuple(launch.table_slot[h] for h in part.heads)
            end, usable = _until(launch, part, state)
            chosen = values.of(part.columns)[:, :, 0]
            chosen = chosen if usable is None else chosen & usable[:, None]
            low, high, tail_low, tail_high = fill_sections(
                chosen.expand(batch, len(here), -1),
                at,
                end,
                None if launch.keys.identity else launch.keys.on("filled", state.device).expand(batch, -1),
                state.const(here, torch.int32),
                state.const(sections, torch.int32),
                limit,
                table,
                state.program.tile,
                lists.fits,
            )
            ends = replace(_ends(launch, state, len(here)), low=low, high=high, tail_low=tail_low, tail_high=tail_high)
            lists.add(here, part.mask, values, ends)
        if not launch.compare:
            residual = (part.mask, values)
    if residual is not None:
        _spread(residual[1], launch.parts[0].heads, heads, state)
        assert limit is not None
        mask_mod = masks.looked_up(row.contiguous(), limit, *residual, main, launch.key_slots, batch, len(heads))
    else:
        mask_mod = masks.comparison(row.contiguous() if base is None else None, limit)
    return Ready(lists.done(), mask_mod, section_table=table)


def _spread(values: Values, own: tuple[int, ...], heads: tuple[int, ...], state: State) -> None:
    """Gives the values of a part's heads to the heads of its launch; empty heads repeat the first one's."""
    if own != heads:
        pick = state.const(tuple(own.index(h) if h >= 0 else 0 for h in heads))
        values.found = {name: table.index_select(1, pick) for name, table in values.found.items()}
        values.memo = {}


def _based(launch: Launch, state: State) -> tuple[Tensor, Tensor, int | None]:
    """`_positions`, counted from the first row slot where slots run with positions: the mask then compares the slot
    itself. The third is what was taken off, None where slots do not."""
    program, memo = state.program, state.program.memo
    row, at = _positions(launch, state)
    if program.layout.padded or launch.rows.label != "natural" or not launch.compare:
        return row, at, None
    base = (program.layout.length - program.queries) // program.tile * program.tile
    key = ("based", launch.rows, launch.keys, state.device)
    if key not in memo:
        # Natural queries without padding are the same for all prompts. Keys are not: their order may go by modality.
        memo[key] = (row[:1] - base, at[: program.layout.batch_size] - base)
    row, at = memo[key]
    return row.expand(state.batch, -1), at.expand(state.batch, -1), base


def _ends(launch: Launch, state: State, heads: int, based: bool = True) -> Extremes:
    """Extremes of the positions of a launch's tiles, before anything is selected (cached). ``based``: counted as by
    `_based`, else as by `_positions`."""
    memo = state.program.memo
    key = ("ends", launch.rows, launch.keys, launch.compare, based, heads, state.batch, state.device)
    if key not in memo:
        row, at = _based(launch, state)[:2] if based else _positions(launch, state)
        memo[key] = Extremes.of(row[:, None], at[:, None].expand(-1, heads, -1), state.program.tile)
    return memo[key]


def _until(launch: Launch, part: Part, state: State) -> tuple[Tensor | None, Tensor | None]:
    """`Part.until` on the device, and which keys may be gathered, bool [B, S] (None: all): those that are there, less
    those that the mask shows to the end (cached)."""
    memo = state.program.memo
    key = ("until", part, launch.compare, state.batch, state.device)
    if key not in memo:
        _, at, base = _based(launch, state)
        there = at < BIG // 2
        usable, end = None if (launch.keys.index >= 0).all() else there, None
        if part.until is not None:
            found = torch.tensor(part.until, device=state.device).expand(state.batch, -1)
            usable, end = there & (found < BIG), (found - (base or 0)).int().contiguous()
        memo[key] = (end, usable)
    return memo[key]


def _rows(state: State, launch: Launch) -> Ready:
    row, at = _positions(launch, state)
    heads, batch = launch.heads.heads, state.batch
    place = launch.heads.place
    lists = _Lists(state, launch)
    found = []
    for part in launch.parts:
        chosen = state.part_values(launch, part).of(part.chosen)[..., 0].expand(batch, len(part.heads), -1)
        if not launch.rows.identity:  # some slots are empty
            chosen = chosen & (launch.rows.on("index", state.device) >= 0)[:, None]
        found.append(gathered(chosen, launch.capacity, lists.fits))
    if launch.parts[0].heads == heads:
        ((index, count),) = found
    else:
        index = torch.zeros((batch, len(heads), launch.capacity), dtype=torch.int64, device=state.device)
        count = torch.zeros((batch, len(heads)), dtype=torch.int64, device=state.device)
        for part, (slots, many) in zip(launch.parts, found, strict=True):
            here = state.const(tuple(place[h] for h in part.heads))
            index[:, here], count[:, here] = slots, many
    filled = torch.arange(launch.capacity, device=state.device) < count[..., None]
    position = row[:, None].expand(-1, len(heads), -1).gather(-1, index)
    position = torch.where(filled, position, -1).int()
    tiled = position.unflatten(-1, (-1, state.program.tile))
    ends = replace(_ends(launch, state, len(heads), based=False), row_low=tiled.amin(-1), row_high=tiled.amax(-1))
    lists.add(tuple(range(len(heads))), sympy.true, None, ends)
    token_index = index
    if not launch.rows.identity:
        token = launch.rows.on("filled", state.device).expand(batch, -1)
        token_index = token[:, None].expand(-1, len(heads), -1).gather(-1, index)
    limit = None  # a key's limit is the number of its slot
    if not launch.keys.in_place(state.program.layout):
        limit = at[:, None].expand(-1, len(heads), -1).contiguous()
    mask_mod = masks.comparison(position, limit)
    return Ready(lists.done(), mask_mod, row_index=token_index, row_count=count)


def _classes(state: State, launch: Launch) -> Ready:
    row, at = _positions(launch, state)
    heads, batch = launch.heads.heads, state.batch
    (part,) = launch.parts
    assert part.classes is not None
    values = state.part_values(launch, part)
    (row_index, row_at, row_real), (key_index, key_at, key_real) = (
        _by_residue(state, values.of(residue).squeeze(dim), position, side, len(part.heads))
        for residue, position, side, dim in (
            (part.classes[0], row, launch.rows, 3),
            (part.classes[1], at, launch.keys, 2),
        )
    )
    row_at, key_at = torch.where(row_real, row_at, -1).int(), torch.where(key_real, key_at, BIG).int()
    there = state.part_values(launch, part, row_index, key_index)
    place = launch.heads.place
    lists = _Lists(state, launch)
    ends = Extremes.of(row_at, key_at, state.program.tile)
    lists.add(tuple(place[h] for h in part.heads), part.mask, there, ends)
    if part.heads != heads:  # empty heads repeat the first one's rows
        pick = state.const(tuple(part.heads.index(h) if h >= 0 else 0 for h in heads))
        row_at, key_at, row_index, key_index, row_real = (
            t.index_select(1, pick) for t in (row_at, key_at, row_index, key_index, row_real)
        )
        there = state.part_values(launch, part, row_index, key_index)
        _spread(there, part.heads, heads, state)
    slots = launch.keys.slots
    mask_mod = masks.looked_up(row_at, key_at, part.mask, there, slots, slots, batch, len(heads))
    return Ready(lists.done(), mask_mod, row_index=row_index, row_count=row_real.sum(-1), key_index=key_index)


def _by_residue(
    state: State, residue: Tensor, position: Tensor, side: Order, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of one side sorted by (residue, position): tokens, positions and which are real, [B, H, S].

    Empty slots come last and repeat the last token, so that they widen no block's bounds.
    """
    real = (side.on("index", state.device) >= 0)[:, None].expand(state.batch, heads, -1)
    key = residue.expand(real.shape).long() * (BIG << 1) + position[:, None]
    slot = torch.where(real, key, torch.iinfo(torch.int64).max).argsort(-1)
    last = real.sum(-1, keepdim=True) - 1
    number = torch.arange(slot.shape[-1], device=state.device).expand(slot.shape)
    slot = slot.gather(-1, number.minimum(last.clamp(min=0)))
    token = side.on("filled", state.device).expand(state.batch, -1)[:, None].expand(real.shape).gather(-1, slot)
    return token, position[:, None].expand(real.shape).gather(-1, slot), number <= last


# ---- attending -----------------------------------------------------------------------------------------------------


def keys(state: State, number: int, k: Tensor, v: Tensor, given: bool = False) -> tuple[Tensor, Tensor]:
    """k and v [B, Hkv, N, D] in the slots of a launch: main section, then the gathered sections; themselves where
    nothing moves. ``given``: they need not fill all slots."""
    launch, ready = state.program.launches[number], state.ready[number]
    heads, main = launch.heads.kv_heads, launch.keys.slots
    if ready.key_index is not None:
        kv = tuple(max(h, 0) * k.shape[1] // state.program.heads for h in launch.heads.heads)
        k, v = (take_rows(take_heads(t, kv, state), ready.key_index) for t in (k, v))
        return k, v
    if ready.section_table is None and launch.keys.stays(state.program.layout, given):
        return take_heads(k, heads, state), take_heads(v, heads, state)
    out = tuple(t.new_empty((t.shape[0], len(heads), launch.key_slots, t.shape[3])) for t in (k, v))
    first = 0
    if not launch.keys.in_place(state.program.layout):
        index = launch.keys.on("index", state.device)[:, None].expand(state.batch, len(heads), -1)
        for t, to in zip((k, v), out, strict=True):
            take_rows(take_heads(t, heads, state), index, to[:, :, :main])
        first = main
    table = ready.section_table
    if table is not None:
        table = table.unflatten(1, (len(heads), -1)).flatten(2)
    if first < launch.key_slots:
        fill_slots(k, v, out[0], out[1], state.const(heads), main, table, first, launch.key_slots)
    return out[0], out[1]


def queries(state: State, number: int, q: Tensor, given: bool = False) -> Tensor:
    """q [B, H, M, D] in the slots of a launch."""
    launch, ready = state.program.launches[number], state.ready[number]
    q = take_heads(q, launch.heads.heads, state)
    if ready.row_index is not None:
        return take_rows(q, ready.row_index)
    if launch.rows.stays(state.program.layout, given):
        return q
    return take_rows(q, launch.rows.on("index", state.device)[:, None].expand(state.batch, q.shape[1], -1))


def place(state: State, number: int, out: Tensor, lse: Tensor | None, found: Tensor, sums: Tensor | None) -> None:
    """Writes the rows of a launch to out [B, Hq, M, D] and lse [B, Hq, M]; residue classes merge by log-sum-exp."""
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
        assert ready is not None
        assert ready.row_index is not None
        assert ready.row_count is not None
        index, count = (take_heads(t, keep, state) for t in (ready.row_index, ready.row_count))
        put_rows(found, index, count, here, out)
        if lse is not None and sums is not None:
            put_rows(sums[..., None], index, count, here, lse[..., None])
        return
    if launch.kind == "classes":
        assert ready is not None
        assert ready.row_index is not None
        assert ready.row_count is not None
        assert lse is not None
        assert sums is not None
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
    rows = found.shape[2]  # all slots, or tokens as given
    index = launch.rows.on("index", state.device)[:, None, :rows].expand(state.batch, len(heads), -1)
    count = torch.full((state.batch, len(heads)), rows, device=state.device)
    put_rows(found, index, count, here, out)
    if lse is not None and sums is not None:
        put_rows(sums[..., None], index, count, here, lse[..., None])


def _wide(index: Tensor, t: Tensor) -> Tensor:
    """An index [B, H, S] over the rows of t [B, H, R, D]."""
    return index[..., None].expand(-1, -1, -1, t.shape[-1])
