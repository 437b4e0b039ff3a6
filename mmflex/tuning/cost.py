"""What a plan, a program or a spec costs in milliseconds (`predict`), before or after planning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..compiler.constants import Constants, constants_for
from ..compiler.launches import Work
from ..compiler.lower import lower
from ..compiler.prices import Prediction, expected_work
from ..compiler.prices import predict as _predict
from ..compiler.program import Program
from ..distributed.dealing import Dealing
from ..distributed.estimates import estimates_from_values
from ..ir.layout import TokenLayout
from ..ir.pattern import Pattern
from ..ir.queries import QueryTokens
from ..runtime import backends
from ..runtime.calls import TILE
from ..runtime.plan import Plan


@dataclass(frozen=True)
class Link:
    """What ranks send each other. The numbers are those of two H200 over NVLink, by NCCL.

    Attributes:
        gbs: 1e9 bytes a second that a rank receives in an all-gather.
        call_ms: of one collective, however little it moves.
        key_bytes: of one key of one head: 128 numbers of two bytes.
    """

    gbs: float = 271.0
    call_ms: float = 0.03
    key_bytes: int = 256

    def gather_ms(self, tokens: int, kv_heads: int, ranks: int) -> float:
        """Milliseconds for the keys (or values) of ``tokens`` tokens, of which every rank lacks what the others
        hold."""
        received = tokens * kv_heads * self.key_bytes * (ranks - 1) / ranks
        return self.call_ms + received / (self.gbs * 1e6)


NVLINK = Link()


def predict(
    planned: Plan | Program, constants: Constants | None = None, batch: int = 1, ranks: int = 1, link: Link = NVLINK
) -> Prediction:
    """Predicted milliseconds of ``mmflex.attention``, planning counted.

    Args:
        planned: a plan (its block lists are counted, which waits for the device), or a program (expected from the
            expressions alone; see `program_of`).
        constants: those of the device and backend that it was made for, if None.
        batch: prompts, for a program; a plan knows its own.
        ranks: GPUs over which the prompt of a program is dealt out (`mmflex.distributed.attention`): what the
            slowest of them takes. Estimates and selections are made by each; values arrive while it plans, unless
            patterns select by them.
        link: what connects the ranks.

    Raises:
        TypeError: ``planned`` is neither. ValueError: ranks for a plan or a chunk, or more of them than the tokens go
            round.
    """
    if ranks != 1:
        if not isinstance(planned, Program) or planned.queries.count != planned.layout.length:
            raise ValueError(f"ranks is {ranks}: give the program of a whole prompt (program_of), no plan and no chunk")
        return _predict_rank(planned, constants, batch, ranks, link)
    if isinstance(planned, Plan):
        return _predict(planned.program, constants, planned.shape[0][0], counted(planned))
    if not isinstance(planned, Program):
        raise TypeError(f"predict takes a plan (mmflex.plan(...)) or a program, got {type(planned).__name__}")
    return _predict(planned, constants, batch)


def _predict_rank(program: Program, constants: Constants | None, batch: int, ranks: int, link: Link) -> Prediction:
    dealing = Dealing.head_tail(program.layout.length, ranks)
    by_head = {h: group.pattern for group in program.groups for h in group.heads}
    patterns = tuple(by_head[h] for h in range(program.heads))
    prices = program.constants if constants is None else constants
    how: Any = {"lse": True, "full_width": False, "constants": prices}
    # The first rank has the prompt's last queries, which may see most; the last one has no chunk of early ones, which
    # see least.
    shares = [
        lower(patterns, program.layout, dealing.queries(rank), program.kv_heads, program.tile, **how)
        for rank in (0, ranks - 1)
    ]
    alone = max((_predict(share, prices, batch) for share in shares), key=lambda prediction: prediction.total_ms)
    each = link.gather_ms(batch * dealing.total, program.kv_heads, ranks)
    queries = link.call_ms if shares[0].estimates else 0.0
    hidden = 0.0 if estimates_from_values(patterns, program.layout) else alone.planning_ms
    return replace(alone, communication_ms=queries + each + max(0.0, each - hidden))


def counted(plan: Plan) -> dict[int, Work]:
    """Launch number -> what it does over the whole batch, from the block lists."""
    out = expected_work(plan.program, plan.shape[0][0])
    for number, launch in enumerate(plan.program.launches):
        if launch.lists_blocks:
            out[number] = listed(out[number], plan.state.prepared[number].lists)
    return out


def listed(expected: Work, lists: backends.BlockLists) -> Work:
    """The work of a launch with its blocks as they are listed, for what was expected."""
    partial, _, full, _ = lists
    longest = int((full + partial).max()) if partial.numel() else 0
    return replace(expected, full=float(full.sum()), partial=float(partial.sum()), longest=longest)


def program_of(
    spec: Pattern | Sequence[Pattern],
    layout: TokenLayout,
    heads: int,
    kv_heads: int,
    *,
    queries: int | None = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
) -> Program:
    """The program of a spec without any tensors, to predict what it would cost; never dense by break-even.

    Args:
        spec: one pattern for all heads, or one for each. queries: the last so many tokens; all if None.
        backend, device, dtype, head_dim: whose constants to reckon with. A backend that cannot run here is an error;
            give `predict` other constants to ask about another device.
    """
    patterns = (spec,) * heads if isinstance(spec, Pattern) else tuple(spec)
    if len(patterns) != heads or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{len(patterns)} patterns for {heads} query and {kv_heads} KV heads do not fit")
    runs = backends.resolve(backend, torch.device(device), head_dim, dtype)
    how: Any = {"lse": runs.lse, "full_width": runs.full_width}
    how["constants"] = constants_for(device, runs.name, dtype, head_dim)
    tokens = QueryTokens.last(layout.length if queries is None else queries, layout.length)
    return lower(patterns, layout, tokens, kv_heads, TILE, **how)
