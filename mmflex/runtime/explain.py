"""`Plan.explain()`: a plan in words."""

from __future__ import annotations

import sympy

from ..compiler.plan import describe_modalities
from ..ir import expr as x
from .attention import Plan


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


def explain(plan: Plan) -> str:
    program, density = plan.program, plan.density
    (batch, heads, m, dim), (_, kv_heads, n, _) = plan.shape
    lines = [
        f"{batch} x {heads} query heads on {kv_heads} KV heads, {m} queries, {n} keys "
        f"({describe_modalities(plan.layout)}), head dimension {dim}",
        f"backend {plan.backend}, blocks of {program.tile}, density {density.total:.1%} of the causal pairs",
    ]
    if plan.note:
        lines.append(plan.note)
    lines.append("")
    for group in program.groups:
        share = density.heads[:, list(group.heads)].mean() if density.heads.size else 0.0
        lines.append(f"heads {_heads(group.heads)}: {group.pattern}")
        lines.append(f"  mask     q >= k and {readable(group.expr)}")
        lines.append(f"  density  {share:.1%}")
        for i, (label, price) in enumerate(group.weighed):
            mark = "chosen" if i == 0 else "instead of"
            lines.append(f"  {mark:<10} {label}: {price:.0f} blocks")
        lines.append(f"  {'dense':<10} {program.dense_cost / program.heads * len(group.heads):.0f} blocks")
    lines.append("")
    for number, launch in enumerate(program.launches):
        own = tuple(h for h in launch.heads.heads if h >= 0)
        lines.append(
            f"launch {number}: {launch.label}; heads {_heads(tuple(sorted(own)))}; predicted {launch.cost:.0f} blocks"
        )
        if launch.kind == "dense":
            lines.append("  SDPA, causal")
            continue
        ready = plan.state.ready[number]
        partial, full = (int(c.sum()) for c in (ready.lists[0], ready.lists[2]))
        tiles = (launch.row_slots // program.tile) * (launch.key_slots // program.tile) * len(own) * batch
        lines.append(
            f"  {full} full, {partial} partial, {tiles - full - partial} empty blocks; lists of width {launch.width}"
        )
        if launch.section:
            count = len(launch.section_slot)
            lines.append(
                f"  columns gathered into {count} sections of {launch.section} keys ({launch.sections} per KV head)"
            )
        if launch.kind == "rows":
            lines.append(
                f"  {launch.capacity} gathered rows a head see everything and replace those rows of the output"
            )
            others = len(program.launches) > 1 and plan.state.device.type == "cuda"
            if others and launch.beside(program.layout.length):
                lines.append("  runs beside the other launches")
        if launch.kind == "classes":
            lines.append("  rows and keys by residue, then position; merged with the others by log-sum-exp")
        if launch.compare:
            lines.append(f"  partial blocks: one comparison, {ready.mask_mod.comparison}")
        else:
            lines.append(f"  partial blocks: row >= limit[key], and looked up: {readable(launch.parts[0].mask)}")
    return "\n".join(lines)
