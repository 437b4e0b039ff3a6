"""One token that is not finite in q, k or v: it reaches the rows that see it and no other.

Compiled kernels on CUDA devices multiply a value by weights of 0 for the rows of a query tile that do not see its key:
there, a value that is not finite may reach any row of a tile that computes a block with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..runtime.attention import plan
from ..runtime.pairs import VerificationError, head_launches, rows_computing
from ..runtime.plan import Plan
from ..runtime.verify import ROW_FACTOR, measure
from .cases import SHAPES, Case, layout_of, tensors
from .jobs import Job, Options
from .works import ALL_LINES, EVERYTHING, GATHERED, LINES, NEAR

SPEC = [pattern for pattern, _ in (ALL_LINES, NEAR, EVERYTHING, LINES)]
CHANNEL = 5

DENSE_TILE = 256
"""At most how many queries a tile of a dense kernel holds."""


def jobs(options: Options) -> list[Job]:
    out = []
    for number, backend in enumerate(options.backends):
        # On a CPU all backends do the same: half of them is enough.
        for prompt in ("plain", "padded left") if options.device == "cuda" else (("plain", "padded left")[number % 2],):
            dtype = "bfloat16" if options.device == "cuda" else "float32"
            case = Case(backend, "mixed", prompt, dtype, "no lse", "heads first", "8/2 x 64", "usual")
            settings = {"backend": backend, "prompt": prompt, "dtype": dtype}
            weight = 25.0 if backend in ("flash", "triton") else 6.0
            out.append(Job("not finite", f"{backend}, {prompt}", settings, f"not finite/{case.kernels}", weight))
    return out


def run(settings: dict[str, Any], device: str) -> dict[str, Any]:
    case = Case(settings["backend"], "mixed", settings["prompt"], settings["dtype"], "no lse", "heads first",
                "8/2 x 64", "usual")  # fmt: skip
    heads = SHAPES[case.shape][0]
    reached = 0
    for side, value, token in _spoilers(case):
        qkv = dict(zip("qkv", tensors(case, device), strict=True))
        clean = qkv[side].clone()
        qkv[side][0, 0, token, CHANNEL] = value
        planned = plan(qkv["q"], qkv["k"], (SPEC * heads)[:heads], layout=layout_of(case.prompt), backend=case.backend,
                       lowering=GATHERED)  # fmt: skip
        out = planned.attend(**qkv)
        qkv[side] = clean
        reached += _check(planned, qkv, out, side, value, token)
    return {"rows_reached": reached}


def _spoilers(case: Case) -> Iterator[tuple[str, float, int]]:
    """(which tensor, what, at which token): the first token that is there, one in the middle, one in the last tile."""
    first = int(layout_of(case.prompt).valid[0].argmax())
    for side in "qkv":
        yield from ((side, math.nan, first), (side, math.nan, 450), (side, math.inf, 450), (side, -math.inf, 870))


def _check(planned: Plan, clean: dict[str, Tensor], out: Tensor, side: str, value: float, token: int) -> int:
    """Rows that it reached, all heads together; VerificationError if one of them may not be, or another is wrong."""
    q, k, v = clean["q"], clean["k"], clean["v"]
    mask = planned.dense_mask()
    group = q.shape[1] // k.shape[1]
    sees = torch.zeros(out.shape[:3], dtype=torch.bool, device=out.device)
    if side == "q":
        sees[0, 0, token] = True
    else:
        sees[0, :group] = mask[0, :group, :, token]
    may = sees | _computing(planned, token, group, out) if side == "v" and q.is_cuda else sees
    spoiled = ~out.isfinite()
    rows = spoiled.any(-1)
    where = f"{value} in {side} of token {token}"
    if bool((rows & ~may).any()):
        h, row = (int(i) for i in torch.nonzero((rows & ~may)[0])[0])
        raise VerificationError(f"{where} reaches query {row} of head {h}, which does not see it")
    if side == "v":
        if bool((sees & ~rows).any()):
            raise VerificationError(f"{where} is missing in rows that see it")
        if bool(spoiled[..., torch.arange(v.shape[-1], device=v.device) != CHANNEL].any()):
            raise VerificationError(f"{where} reaches other channels")
    elif side == "k" and math.isnan(value) and bool((sees & ~rows).any()):
        raise VerificationError(f"{where} is missing in rows that see it")

    def masks(heads: list[int], first: int, last: int) -> Tensor:
        return mask[:, heads, first:last]

    measured = measure(q, k, v, masks, planned.scale, out.nan_to_num(0.0, 0.0, 0.0))
    worst = float(measured.row_errors[~(rows | sees)].max())
    if not worst <= ROW_FACTOR * measured.bound(q.dtype):
        raise VerificationError(f"{where}: a row that it does not reach is off by {worst:.1e}")
    return int(rows.sum())


def _computing(planned: Plan, token: int, group: int, out: Tensor) -> Tensor:
    """bool [B, H, M]: rows whose query tile computes a block with a key of the first prompt's first KV head."""
    reached = torch.zeros(out.shape[:3], dtype=torch.bool, device=out.device)
    number = torch.arange(out.shape[2], device=out.device)
    for h in range(group):
        for launch in sorted(head_launches(planned, 0, h), key=lambda one: one.replaces):
            if launch.dense:
                reached[0, h] |= number > token - DENSE_TILE
            elif planned.backend != "reference":
                own = rows_computing(launch, token, planned.program.tile)
                here = launch.slot_of >= 0
                reached[0, h] = torch.where(here, own, reached[0, h]) if launch.replaces else reached[0, h] | own
    return reached
