"""What ranks run in `test_distributed`: functions of a mesh, importable by their processes."""

from __future__ import annotations

from typing import Any

import torch

import mmflex
from mmflex.distributed import Dealing, attention, shard, unshard
from mmflex.distributed.ranks import Ranks


def mine(mesh: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [shard(t, mesh=mesh) for t in tensors]


def attend(mesh: Any, q: Any, k: Any, v: Any, spec: Any, layout: Any, options: dict[str, Any]) -> Any:
    """(tokens, output, selections and masks of the plan) of this rank."""
    from mmflex.runtime.calls import observed

    plans: list[Any] = []
    ranks = Ranks.of(mesh)
    with observed(plans.append):
        out = attention(*mine(mesh, q, k, v), spec, mesh=mesh, layout=layout, **options)
    (plan,) = plans
    tokens = Dealing.head_tail(q.shape[2], ranks.size).queries(ranks.rank).numbers
    kinds = [launch.label for launch in plan.program.launches]
    return tokens, out, plan.dense_mask(), dict(plan.selections), kinds
