"""What the steps of a program have found so far, for one plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from ..compiler.launches import Launch, Part, view_of
from ..compiler.orders import TokenOrder
from ..compiler.program import Leaf, Program
from ..compiler.terms import selected_names
from ..ir.pattern import EstimateFrom, Scope, View
from ..ir.shown import shown
from .backends import BlockLists
from .classify import Values
from .device import index_constant
from .masks import MaskMod
from .selected import check_selected


@dataclass(eq=False)
class PreparedLaunch:
    """What planning leaves for a launch.

    Attributes:
        lists: the block lists. mask_mod: the mask of partial blocks.
        row_index: int64 [B, H, S], the query in each slot, where rows differ by head; the first ``row_count`` int64
            [B, H] of them are real. key_index: likewise the key.
        section_table: int64 [B, sections of all KV heads, slots], the token in each slot of the gathered sections (-1:
            none); a head's own is number ``launch.table_slot[head]``.
    """

    lists: BlockLists
    mask_mod: MaskMod
    row_index: Tensor | None = None
    row_count: Tensor | None = None
    key_index: Tensor | None = None
    section_table: Tensor | None = None


@dataclass(eq=False)
class PlanState:
    """What the steps of one plan have found so far.

    Attributes:
        program, device, batch: of the plan.
        estimates: (estimator, scope) -> (its result, query head of the layer -> head in the result).
        selections: sets and numbers by name (`Leaf` says how they are named), for the heads of their leaf.
        gathered: launch number -> what its ``gather`` step left for ``list``.
        prepared: launch number -> what attending reads.
    """

    program: Program
    device: torch.device
    batch: int
    estimates: dict[Any, tuple[Any, dict[int, int]]] = field(default_factory=dict)
    selections: dict[str, Tensor] = field(default_factory=dict)
    gathered: dict[int, Any] = field(default_factory=dict)
    prepared: dict[int, PreparedLaunch] = field(default_factory=dict)

    def index(self, values: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
        """An index tensor on the device."""
        return index_constant(values, self.device, dtype)

    def view(self, scope: Scope, estimate_from: EstimateFrom | None = None, values: Tensor | None = None) -> View:
        """The prompt as a pattern sees it in a scope."""
        program = self.program
        group = program.heads // program.kv_heads
        return View(program.layout, scope, program.queries, program.tile, group, estimate_from, values)

    def values(
        self,
        exprs: Iterable[sympy.Basic],
        heads: tuple[int, ...],
        rows: TokenOrder,
        keys: TokenOrder,
        row_index: Tensor | None = None,
        key_index: Tensor | None = None,
    ) -> Values:
        """What expressions read, for some heads that share them."""
        selections = {}
        for name in sorted(frozenset().union(*map(selected_names, exprs))):
            short, leaf_name = name.split("@", 1)
            if name not in self.selections:
                raise ValueError(
                    f"{leaf_name}: its mask names {short!r}, which select() did not return: return it there"
                )
            leaf, table = self.program.leaves[leaf_name], self.selections[name]
            if leaf.heads != heads:
                table = table.index_select(1, self.index(tuple(leaf.heads.index(h) for h in heads)))
            selections[name] = table
        return Values(self.program.layout, rows, keys, selections, self.device, row_index, key_index)

    def part_values(self, launch: Launch, part: Part, *index: Tensor) -> Values:
        """What a part's expressions read."""
        return self.values(part.exprs, part.heads, launch.rows, launch.keys, *index)

    # ---- planning --------------------------------------------------------------------------------------------------

    def estimate(
        self, q: Tensor, k: Tensor, scale: float, given: EstimateFrom | None = None, v: Tensor | None = None
    ) -> None:
        """Runs every estimator once for all heads that select from it.

        Args:
            q: [B, Hq, M, D], k: [B, Hkv, N, D], scale: of the scores.
            given: queries [B, Hq, L, D] that estimators of the last queries look at instead of those of the call.
            v: [B, Hkv, N, Dv], for estimators that ask for it.

        Raises:
            ValueError: an estimator asks for v, and there is none.
        """
        for estimator, scope, heads in self.program.estimates:
            query, key = take_heads(q, heads.heads, self.device), take_heads(k, heads.kv_heads, self.device)
            other, values = None, None
            if given is not None:
                other = replace(given, q=take_heads(given.q, heads.heads, self.device))
            if getattr(estimator, "values", False):
                if v is None:
                    raise ValueError(f"{estimator} also reads v, but the plan is made without it: give v=")
                values = take_heads(v, heads.kv_heads, self.device)
            result = estimator(query, key, self.view(scope, other, values), scale)
            self.estimates[estimator, scope] = (result, heads.slot_of)

    def _estimate_of(self, leaf: Leaf) -> tuple[Any, tuple[int, ...], int]:
        """(result, the head in it of each head of a leaf, its heads) of the estimator that a leaf selects from."""
        if leaf.estimator is None:
            return None, tuple(range(len(leaf.heads))), len(leaf.heads)
        key = leaf.estimator, leaf.scope
        result, slot_of = self.estimates[key]
        estimated = next(heads for *other, heads in self.program.estimates if tuple(other) == key)
        return result, tuple(slot_of[h] for h in leaf.heads), len(estimated.heads)

    def select(self, name: str) -> None:
        """Lets a pattern choose its sets and numbers."""
        leaf = self.program.leaves[name]
        result, slots, heads = self._estimate_of(leaf)
        view = self.view(leaf.scope)
        chosen = leaf.pattern.select(result, view)
        if not isinstance(chosen, Mapping):
            raise TypeError(f"{name}: select() returned {shown(chosen)}: return a dictionary of tensors by name")
        exprs = [group.expr for group in self.program.groups]
        for short, table in chosen.items():
            table = check_selected(table, f"{short}@{name}", exprs, view, self.batch, heads, self.device)
            if table.shape[1:2] == (heads,) and slots != tuple(range(heads)):
                table = table.index_select(1, self.index(slots))
            self.selections[f"{short}@{name}"] = table


def take_heads(t: Tensor, heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Heads of a tensor [B, H, ...], a view where they can be. Empty heads (-1) get any head's rows."""
    view = view_of(heads, t.shape[1])
    if view is not None:
        return t if len(heads) == t.shape[1] else t[:, view]
    return t.index_select(1, index_constant(tuple(max(h, 0) for h in heads), device))


def put_heads(state: PlanState, heads: tuple[int, ...], t: Tensor, out: Tensor) -> None:
    """Writes t [B, h, ...] over some heads of out [B, H, ...]."""
    view = view_of(heads, out.shape[1])
    if view is not None:
        out[:, view] = t
    else:
        out.index_copy_(1, state.index(heads), t)
