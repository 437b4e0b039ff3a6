"""A snapshot of a plan: what pictures need of it, as numpy arrays on the host.

`snapshot` wraps a live plan, whose arrays are then read head by head when a picture asks for them;
`mmflex.plot.load_plan` gives the same from a file. Everything in `mmflex.plot` is drawn from here,
so it is the one place that knows how a `Plan` keeps its lists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..compiler.launches import BlockLaunch, DenseLaunch, GatheredRows, Launch, ResidueLaunch
from ..ir.layout import TokenLayout
from ..ir.pattern import Pattern, Restricted, _Pair
from ..ir.queries import QueryTokens
from ..ir.shown import shown

if TYPE_CHECKING:
    from ..runtime.plan import Plan

KINDS: dict[type[Launch], str] = {
    BlockLaunch: "main",
    GatheredRows: "rows",
    ResidueLaunch: "classes",
    DenseLaunch: "dense",
}
"""What snapshots and saved plans call the kinds of launches."""

Lists = tuple[np.ndarray, np.ndarray]
"""The blocks of one head in one launch: how many each row of blocks lists, int32 ``[row blocks]``, and the key blocks
row after row, int32 ``[their sum]``."""


@dataclass(frozen=True)
class SlotTokens:
    """What stands in the slots of a launch for one head, -1 for nothing: int64 ``rows [S]`` (queries, from 0), ``keys
    [S']`` (tokens of the main section) and ``own [C]`` (tokens of the head's gathered columns; None without)."""

    rows: np.ndarray
    keys: np.ndarray
    own: np.ndarray | None


@dataclass(frozen=True)
class LaunchInfo:
    """One call of the attention kernel.

    Attributes:
        kind: one of `KINDS`. label: the same for people.
        rows, keys: names of the token orders.
        heads: query heads, -1 for an empty one.
        row_slots, main_slots: slots for queries, and for keys without the gathered ones.
        section: slots of a section of gathered columns, 0 for none. section_slot: head -> which section is its own.
        natural: rows and main section are in token order.
    """

    kind: str
    label: str
    rows: str
    keys: str
    heads: tuple[int, ...]
    row_slots: int
    main_slots: int
    section: int
    section_slot: Mapping[int, int]
    natural: bool

    @property
    def key_slots(self) -> int:
        """Slots for keys, all sections included."""
        return self.main_slots + self.section * (1 + max(self.section_slot.values(), default=-1))

    def own(self, head: int) -> range | None:
        """Slots of a head's own section of gathered columns; None without."""
        if head not in self.section_slot or not self.section:
            return None
        first = self.main_slots + self.section_slot[head] * self.section
        return range(first, first + self.section)


class Reader(Protocol):
    """Where a snapshot's arrays come from; ``place`` is the number of a head in its launch."""

    def lists(self, number: int, place: int, batch: int) -> tuple[Lists, Lists]:
        """(partial, full) blocks."""
        ...

    def tokens(self, number: int, place: int, batch: int) -> SlotTokens:
        """What stands in the slots."""
        ...

    def allowed(self, head: int, batch: int) -> np.ndarray | None:
        """bool ``[M, N]``, the token mask; None where it was not kept."""
        ...


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What pictures need of a plan.

    Attributes:
        q, k: shapes ``(B, H, M, D)`` and ``(B, Hkv, N, D)``.
        tile: tokens per block. backend, note: as in `Plan`.
        layout: of the N keys. query_tokens: which of them the M queries are.
        patterns, families: of each query head, as text (see `family`).
        density: float ``[B, H]``, pairs in listed blocks over causal pairs.
        live: the plan that it was taken from, None if it was loaded.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    tile: int
    backend: str
    note: str
    layout: TokenLayout
    query_tokens: QueryTokens
    patterns: tuple[str, ...]
    families: tuple[str, ...]
    density: np.ndarray
    launches: tuple[LaunchInfo, ...]
    reader: Reader
    live: Plan | None = None

    @property
    def batch(self) -> int:
        return self.q[0]

    @property
    def heads(self) -> int:
        return self.q[1]

    @property
    def kv_heads(self) -> int:
        return self.k[1]

    @property
    def queries(self) -> int:
        """M."""
        return self.q[2]

    @property
    def length(self) -> int:
        """N."""
        return self.k[2]

    @property
    def groups(self) -> list[tuple[str, tuple[int, ...]]]:
        """(pattern, its heads), in the order of their first heads."""
        found: dict[str, list[int]] = {}
        for head, pattern in enumerate(self.patterns):
            found.setdefault(pattern, []).append(head)
        return [(pattern, tuple(heads)) for pattern, heads in found.items()]

    def launches_of(self, head: int) -> list[tuple[int, int]]:
        """(launch number, the head's place among its heads) of every launch that computes a head."""
        return [(n, launch.heads.index(head)) for n, launch in enumerate(self.launches) if head in launch.heads]

    def counts(self, head: int, batch: int = 0) -> tuple[int, int]:
        """(full, partial) blocks that a head lists, over all launches."""
        full = partial = 0
        for number, place in self.launches_of(head):
            if self.launches[number].kind != "dense":
                few, whole = self.reader.lists(number, place, batch)
                full, partial = full + int(whole[0].sum()), partial + int(few[0].sum())
        return full, partial

    def check(self, head: int, batch: int) -> None:
        """ValueError, TypeError unless there is such a head and such a prompt."""
        for name, number in (("head", head), ("batch", batch)):
            if not isinstance(number, (int, np.integer)) or isinstance(number, bool):
                raise TypeError(f"{name} is {shown(number)}: give its number")
        if not 0 <= head < self.heads:
            raise ValueError(f"head is {head}, the plan has {self.heads} heads: give 0 to {self.heads - 1}")
        if not 0 <= batch < self.batch:
            raise ValueError(f"batch is {batch}, the plan has {self.batch} prompts: give 0 to {self.batch - 1}")

    def __repr__(self) -> str:
        kinds = ", ".join(launch.label for launch in self.launches)
        return f"Snapshot({self.q} x {self.k}, backend={self.backend!r}, launches: {kinds})"


def snapshot(plan: Plan | Snapshot) -> Snapshot:
    """The snapshot of a plan (itself, if it is one)."""
    if isinstance(plan, Snapshot):
        return plan
    if not hasattr(plan, "program"):
        raise TypeError(f"{shown(plan)} is no plan: make one with mmflex.plan, or load one with mmflex.plot.load_plan")
    program = plan.program
    patterns: list[Pattern] = [next(g.pattern for g in program.groups if h in g.heads) for h in range(program.heads)]
    launches = tuple(
        LaunchInfo(
            KINDS[type(launch)],
            launch.label,
            launch.rows.label,
            launch.keys.label,
            launch.heads.heads,
            launch.row_slots,
            launch.keys.slots,
            launch.section if isinstance(launch, BlockLaunch) else 0,
            dict(launch.section_slot) if isinstance(launch, BlockLaunch) else {},
            isinstance(launch, BlockLaunch) and launch.rows.natural and launch.keys.natural,
        )
        for launch in program.launches
    )
    return Snapshot(
        *plan.shape,
        program.tile,
        plan.backend,
        plan.note,
        plan.layout,
        program.queries,
        tuple(str(p) for p in patterns),
        tuple(family(p) for p in patterns),
        plan.density.heads,
        launches,
        _Live(plan),
        plan,
    )


@dataclass(frozen=True)
class _Live:
    """Reads from a plan, wherever its tensors are."""

    plan: Plan

    def lists(self, number: int, place: int, batch: int) -> tuple[Lists, Lists]:
        tables = self.plan.state.prepared[number].lists
        few, columns, whole, all_columns = (t[min(batch, t.shape[0] - 1), place].cpu().numpy() for t in tables)
        return _listed(few, columns), _listed(whole, all_columns)

    def tokens(self, number: int, place: int, batch: int) -> SlotTokens:
        launch, prepared = self.plan.program.launches[number], self.plan.state.prepared[number]
        layout_row = batch % self.plan.layout.batch_size
        if prepared.row_index is not None:
            rows = prepared.row_index[batch, place].cpu().numpy().astype(np.int64)
            if prepared.row_count is not None:
                rows[int(prepared.row_count[batch, place]) :] = -1
        else:
            rows = launch.rows.index[layout_row].astype(np.int64)
        if prepared.key_index is not None:
            keys = _first(prepared.key_index[batch, place].cpu().numpy())
        else:
            keys = launch.keys.index[layout_row].astype(np.int64)
        own = None
        head = launch.heads.heads[place]
        table = prepared.section_table
        if isinstance(launch, BlockLaunch) and head in launch.table_slot and table is not None:
            own = table[batch, launch.table_slot[head]].cpu().numpy().astype(np.int64)
        return SlotTokens(rows, keys, own)

    def allowed(self, head: int, batch: int) -> np.ndarray | None:
        return self.plan.dense_mask()[batch, head].cpu().numpy()


def _listed(count: np.ndarray, table: np.ndarray) -> Lists:
    """The listed entries of a table ``[row blocks, width]``."""
    return count, table[np.arange(table.shape[1]) < count[:, None]]


def _first(tokens: np.ndarray) -> np.ndarray:
    """The tokens with repetitions made -1: empty slots repeat a token."""
    out = np.full(len(tokens), -1, np.int64)
    at = np.unique(tokens, return_index=True)[1]
    out[at] = tokens[at]
    return out


def family(pattern: Pattern) -> str:
    """A pattern's family: its class, that of what a restriction restricts, or the families that a composition joins."""
    if isinstance(pattern, Restricted):
        inner = (getattr(pattern, field.name) for field in dataclasses.fields(pattern))
        return family(next(value for value in inner if isinstance(value, Pattern)))
    if isinstance(pattern, _Pair):
        left, right = family(pattern.left), family(pattern.right)
        return left if left == right else f"{left} {pattern.sign} {right}"
    return type(pattern).__name__
