"""`Plan.explain()`: a plan in words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import sympy

from ..compiler.launches import BlockLaunch, DenseLaunch, GatheredRows, ResidueLaunch
from ..compiler.lower import modality_counts
from ..compiler.program import Program
from ..ir import expr as x
from .state import PreparedLaunch


def _heads(heads: tuple[int, ...]) -> str:
    """0-3, 7."""
    runs: list[list[int]] = []
    for h in heads:
        if runs and h == runs[-1][1] + 1:
            runs[-1][1] = h
        else:
            runs.append([h, h])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def readable(expr: sympy.Basic) -> str:
    """An expression as text, sets without the name of their pattern."""
    short = {s: sympy.Symbol(x.short(str(s))) for s in expr.free_symbols if "@" in str(s)}
    return "everything" if expr == sympy.true else str(expr.xreplace(short)).replace("-k//", "- k//")


def explain(
    program: Program,
    prepared: Mapping[int, PreparedLaunch],
    density: np.ndarray,
    shape: tuple[tuple[int, ...], tuple[int, ...]],
    backend: str,
    note: str,
) -> str:
    """A plan in words: see `Plan.explain`. ``density`` float [B, Hq]; ``shape`` of q and of k."""
    (batch, heads, m, dim), (_, kv_heads, n, _) = shape
    total = float(density.mean()) if density.size else 0.0
    lines = [
        f"{batch} x {heads} query heads on {kv_heads} KV heads, {m} queries, {n} keys "
        f"({modality_counts(program.layout)}), head dimension {dim}",
        f"backend {backend}, blocks of {program.tile}, density {total:.1%} of the causal pairs",
    ]
    if note:
        lines.append(note)
    lines.append("")
    for group in program.groups:
        share = density[:, list(group.heads)].mean() if density.size else 0.0
        lines.append(f"heads {_heads(group.heads)}: {group.pattern}")
        lines.append(f"  mask     q >= k and {readable(group.expr)}")
        lines.append(f"  density  {share:.1%}")
        for i, way in enumerate(group.alternatives):
            mark = "chosen" if i == 0 else "instead of"
            lines.append(f"  {mark:<10} {way.label}: {way.cost:.0f} blocks")
        lines.append(f"  {'dense':<10} {program.dense_cost / program.heads * len(group.heads):.0f} blocks")
    lines.append("")
    for number, launch in enumerate(program.launches):
        own = launch.heads.real
        lines.append(
            f"launch {number}: {launch.label}; heads {_heads(tuple(sorted(own)))}; predicted {launch.cost:.0f} blocks"
        )
        if isinstance(launch, DenseLaunch):
            lines.append("  SDPA, causal")
            continue
        ready = prepared[number]
        partial, full = (int(c.sum()) for c in (ready.lists.partial_count, ready.lists.full_count))
        tiles = (launch.row_slots // program.tile) * (launch.key_slots // program.tile) * len(own) * batch
        lines.append(
            f"  {full} full, {partial} partial, {tiles - full - partial} empty blocks; lists of width {launch.width}"
        )
        if isinstance(launch, BlockLaunch) and launch.section:
            count = len(launch.section_slot)
            lines.append(
                f"  columns gathered into {count} sections of {launch.section} keys ({launch.sections} per KV head)"
            )
        if isinstance(launch, GatheredRows):
            lines.append(
                f"  {launch.capacity} gathered rows a head see everything and replace those rows of the output"
            )
        if isinstance(launch, ResidueLaunch):
            lines.append("  rows and keys by residue, then position; merged with the others by log-sum-exp")
        if launch.compares:
            lines.append(f"  partial blocks: one comparison, {ready.mask_mod.comparison}")
        else:
            lines.append(f"  partial blocks: row >= limit[key], and looked up: {readable(launch.parts[0].mask)}")
    lines += ["", "steps", *(f"  {line}" for line in program.graph.lines())]
    return "\n".join(lines)
