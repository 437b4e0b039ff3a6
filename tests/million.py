"""Draws one of 28 heads at a million tokens; prints counted pairs, listed pairs and the process's peak memory in GB.

Its lists are made up, because estimating such a plan on a CPU would take minutes; `test_plot` runs it as a process.
"""

from __future__ import annotations

import resource

import matplotlib
import torch

import mask_builders
import mmflex
from mmflex import plot
from mmflex.compiler.lower import lower
from mmflex.ir.queries import QueryTokens
from mmflex.plot import raster
from mmflex.plot.snapshot import snapshot
from mmflex.runtime import masks
from mmflex.runtime.backends import BlockLists
from mmflex.runtime.plan import Plan
from mmflex.runtime.state import PlanState, PreparedLaunch


def million(heads: int = 28, kv_heads: int = 4) -> Plan:
    """A plan for 1,048,576 tokens of which every query block lists up to 30 key blocks."""
    layout = mmflex.TokenLayout.from_segments([("text", 64), ("video", (4095, 16, 16)), ("text", 192)])
    spec = [mask_builders.AShape(128, 4096)] * heads
    queries = QueryTokens.last(layout.length, layout.length)
    program = lower(spec, layout, queries, kv_heads, 128, lse=True, full_width=False)
    plan = object.__new__(Plan)
    plan.program, plan.layout, plan.backend, plan.note = program, layout, "reference", ""
    plan.scale, plan.shape = 1.0, ((1, heads, layout.length, 64), (1, kv_heads, layout.length, 64))
    plan.state = PlanState(program, torch.device("cpu"), 1)
    launch = program.launches[0]
    own = torch.arange(launch.row_slots // 128)
    index = (own[:, None] - torch.tensor([0, 1, 2, 40, 700, 2000, *range(8, 32)])).clamp(min=-1)
    count = (index >= 0).sum(-1)
    index = index.sort(-1, descending=True).values.clamp(min=0)
    lists = BlockLists(
        torch.ones(1, heads, len(own), dtype=torch.int32),
        own.int()[None, None, :, None].expand(1, heads, -1, index.shape[1]),
        (count - 1).int().expand(1, heads, -1),
        index.roll(-1, -1).int().expand(1, heads, -1, -1),
    )
    limit = torch.arange(launch.key_slots, dtype=torch.int32).expand(1, heads, -1)
    plan.state.prepared[0] = PreparedLaunch(lists, masks.comparison(None, limit))
    return plan


def main() -> None:
    matplotlib.use("Agg")
    plan = million()
    plot.plot_mask(plan, 13).savefig("/dev/null", format="png")
    found = raster.mask_raster(plan, 13)
    counted = int(found.full.sum() + found.partial.sum())
    print(counted, sum(snapshot(plan).counts(13)) * plan.program.tile**2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


if __name__ == "__main__":
    main()
