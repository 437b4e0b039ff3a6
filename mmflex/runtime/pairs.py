"""Which pairs of queries and keys the launches of a plan compute, counted one by one from its block lists.

What verification knows of a plan's insides is in `head_launches`: which token stands in each slot, the lists, the mask
of partial blocks. The count is compared with the token mask, which knows none of them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..compiler.launches import BlockLaunch, GatheredRows
from ..compiler.program import Program
from .state import PlanState

PAIRS = 1 << 24
"""Pairs of a query and a key that are held at a time: bounds the memory at any length."""


class VerificationError(RuntimeError):
    """A plan does not compute what its spec means."""


class Planned(Protocol):
    """What verification asks of a `Plan`."""

    program: Program
    state: PlanState
    scale: float
    shape: tuple[tuple[int, ...], tuple[int, ...]]

    def dense_mask(self, rows: Sequence[int] | None = None, heads: Sequence[int] | None = None) -> Tensor: ...

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True, eq=False)
class HeadLaunch:
    """One launch as one head of one prompt sees it, in slots.

    Attributes:
        label: of the launch. replaces: whether its rows replace those of other launches. dense: it lists no blocks.
        slot_of: int64 [M], the slot of each query, -1 for none. token: int64 [key slots], the token of each, -1 for
            none of this head.
        partial, full: (count int32 [tiles], index int32 [tiles, width]), the listed key tiles of each query tile.
        allows: (query slots, key slots) -> bool, the mask of partial blocks.
    """

    label: str
    replaces: bool
    dense: bool
    slot_of: Tensor
    token: Tensor
    partial: tuple[Tensor, Tensor]
    full: tuple[Tensor, Tensor]
    allows: Callable[[Tensor, Tensor], Tensor]


def head_name(plan: Planned, b: int, head: int) -> str:
    """As errors call a head of a prompt."""
    pattern = next(group.pattern for group in plan.program.groups if head in group.heads)
    return f"head {head} of prompt {b}, {pattern}"


def head_launches(plan: Planned, b: int, head: int) -> list[HeadLaunch]:
    """The launches that compute a head of a prompt."""
    out = []
    for number, launch in enumerate(plan.program.launches):
        i = launch.heads.slot_of.get(head)
        if i is None:
            continue
        state, m, device = plan.state, plan.program.queries.count, plan.state.device
        slot_of = launch.rows.on("inverse", device)[b % len(launch.rows.index)]
        if not launch.lists_blocks:
            none = torch.zeros(0, dtype=torch.int64, device=device)
            out.append(HeadLaunch(launch.label, False, True, slot_of, none, (none, none), (none, none), torch.ge))
            continue
        prepared = state.prepared[number]
        if prepared.row_index is not None and prepared.row_count is not None:
            own = prepared.row_index[b, i, : int(prepared.row_count[b, i])]
            if len(own.unique()) != len(own):
                raise VerificationError(f"{head_name(plan, b, head)}: {launch.label} holds a query twice")
            slot_of = torch.full((m,), -1, dtype=torch.int64, device=device)
            slot_of[own] = torch.arange(len(own), device=device)
        token = torch.full((launch.key_slots,), -1, dtype=torch.int64, device=device)
        main = launch.keys.on("index", device)[b % len(launch.keys.index)]
        token[: len(main)] = main
        if prepared.key_index is not None:  # real keys come first
            real = torch.arange(len(main), device=device) < (main >= 0).sum()
            token[: len(main)] = torch.where(real, prepared.key_index[b, i], -1)
        if prepared.section_table is not None and isinstance(launch, BlockLaunch) and head in launch.table_slot:
            first = launch.keys.slots + launch.section_slot[head] * launch.section
            token[first : first + launch.section] = prepared.section_table[b, launch.table_slot[head]]
        lists = [t[b, i] for t in prepared.lists]

        def allows(q: Tensor, kv: Tensor, mask_mod: Callable[..., Tensor] = prepared.mask_mod, h: int = i) -> Tensor:
            return mask_mod(torch.tensor(b, device=q.device), torch.tensor(h, device=q.device), q, kv)

        partial, full, replaces = (lists[0], lists[1]), (lists[2], lists[3]), isinstance(launch, GatheredRows)
        out.append(HeadLaunch(launch.label, replaces, False, slot_of, token, partial, full, allows))
    return out


def rows_computing(launch: HeadLaunch, token: int, tile: int) -> Tensor:
    """bool [M]: the queries whose tile lists a block that holds a token's key, whether they see it or not."""
    blocks = torch.nonzero(launch.token == token)[:, 0] // tile
    tiles = torch.zeros(len(launch.partial[0]), dtype=torch.bool, device=launch.token.device)
    for counts, index in (launch.partial, launch.full):
        listed = torch.arange(index.shape[-1], device=index.device) < counts[:, None]
        tiles |= (listed & torch.isin(index, blocks)).any(-1)
    return (launch.slot_of >= 0) & tiles[launch.slot_of.clamp(min=0) // tile]


def verify_lists(plan: Planned, tiles: int, draw: random.Random) -> int:
    """Counts the pairs that so many query tiles compute, over all heads, prompts and launches in turn.

    Returns:
        How many listed blocks they have.

    Raises:
        VerificationError: a pair is computed that is not allowed, or more than once, or an allowed one not at all.
    """
    blocks = 0
    for b, head, launches, launch, tile in _sampled_tiles(plan, tiles, draw):
        size = plan.program.tile
        rows = torch.nonzero((launch.slot_of >= 0) & (launch.slot_of // size == tile))[:, 0]
        blocks += int(launch.partial[0][tile]) + int(launch.full[0][tile])
        step = max(1, PAIRS // max(1, plan.program.layout.length))
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            allowed = plan.dense_mask(some.tolist(), [head])[b, 0]
            computed = _times_computed(plan, b, head, launches, some, allowed)
            if not torch.equal(computed, allowed.to(computed.dtype)):
                raise VerificationError(_difference(plan, b, head, launches, some, allowed, computed))
    return blocks


def _sampled_tiles(
    plan: Planned, tiles: int, draw: random.Random
) -> Iterator[tuple[int, int, list[HeadLaunch], HeadLaunch, int]]:
    """(prompt, head, its launches, one of them, a query tile of that one with queries in it): at least one tile for
    every kind of launch, ``tiles`` if there are so many."""
    turns = []
    for b in range(plan.state.batch):
        for head in range(plan.program.heads):
            launches = head_launches(plan, b, head)
            for launch in launches:
                if not launch.dense:
                    own = launch.slot_of[launch.slot_of >= 0] // plan.program.tile
                    left = own.unique().tolist()
                    draw.shuffle(left)
                    turns.append((b, head, launches, launch, left))
    draw.shuffle(turns)
    before: Counter[str] = Counter()  # turns of each kind of launch: the kinds take turns
    rank = []
    for turn in turns:
        rank.append(before[turn[3].label])
        before[turn[3].label] += 1
    turns = [turns[i] for i in sorted(range(len(turns)), key=rank.__getitem__)]
    tiles = max(tiles, len(before))
    while turns:
        for turn in tuple(turns):
            if not turn[4]:
                turns.remove(turn)
            elif tiles:
                tiles -= 1
                yield (*turn[:4], turn[4].pop())
            else:
                return


def _times_computed(
    plan: Planned, b: int, head: int, launches: list[HeadLaunch], rows: Tensor, allowed: Tensor
) -> Tensor:
    """int32 [rows, N]: how often the launches together compute each pair. Rows that a launch replaces are its own."""
    count = torch.zeros_like(allowed, dtype=torch.int32)
    for launch in sorted(launches, key=lambda one: one.replaces):
        own = _computed_by(plan, b, head, launch, rows)
        count = torch.where((launch.slot_of[rows] >= 0)[:, None], own, count) if launch.replaces else count + own
    return count


def _computed_by(plan: Planned, b: int, head: int, launch: HeadLaunch, rows: Tensor) -> Tensor:
    """int32 [rows, N]: how often one launch computes each pair."""
    n, tile = plan.program.layout.length, plan.program.tile
    slot = launch.slot_of[rows]
    count = torch.zeros((len(rows), n), dtype=torch.int32, device=rows.device)
    if launch.dense:
        numbers = torch.tensor(plan.program.queries.numbers, device=rows.device)[rows]
        valid = torch.tensor(plan.program.layout.valid[b % plan.program.layout.batch_size], device=rows.device)
        return (valid & valid[numbers][:, None] & (torch.arange(n, device=rows.device) <= numbers[:, None])).int()
    where = f"{head_name(plan, b, head)}: {launch.label}"
    for kind, (counts, index) in (("partial", launch.partial), ("full", launch.full)):
        key_tiles = len(launch.token) // tile
        width = int(torch.where(slot >= 0, counts[slot.clamp(min=0) // tile], 0).max())
        if width > index.shape[-1]:
            raise VerificationError(f"{where} lists {width} {kind} blocks in a table that is {index.shape[-1]} wide")
        step = max(1, PAIRS // max(1, width * tile))
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            at = slot[part].clamp(min=0)
            listed = torch.arange(width, device=at.device) < counts[at // tile, None]
            listed &= (slot[part] >= 0)[:, None]
            block = torch.where(listed, index[at // tile, :width], 0).long()
            if bool(((block < 0) | (block >= key_tiles)).any()):
                raise VerificationError(f"{where} lists a {kind} block beyond its {key_tiles} key tiles")
            key = (block[..., None] * tile + torch.arange(tile, device=at.device)).flatten(1)
            computed = listed.repeat_interleave(tile, 1)
            if kind == "partial":
                computed &= launch.allows(at[:, None], key)
            token = launch.token[key]
            if bool((computed & (token < 0)).any()):
                raise VerificationError(f"{where} computes pairs with key slots that hold no key, in {kind} blocks")
            count[part].scatter_add_(1, token.clamp(min=0), computed.int())
    return count


def _difference(
    plan: Planned, b: int, head: int, launches: list[HeadLaunch], rows: Tensor, allowed: Tensor, computed: Tensor
) -> str:
    """What is wrong with the first pair that is not computed as often as it should be."""
    wrong = torch.nonzero(computed != allowed)
    row, key = (int(i) for i in wrong[0])
    query = rows[row : row + 1]
    by = {one.label: int(_computed_by(plan, b, head, one, query)[0, key]) for one in launches}
    times = ", ".join(f"{label}: {count}" for label, count in by.items())
    return (
        f"{head_name(plan, b, head)}: {len(wrong)} pairs of a query tile are not computed exactly as allowed, first "
        f"query {int(query)} with key {key}, which is {'allowed' if bool(allowed[row, key]) else 'forbidden'} and "
        f"computed {int(computed[row, key])} times ({times})"
    )
