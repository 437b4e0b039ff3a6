"""One case: its plan with the lowering forced, and everything about it held against the token mask."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from ..compiler.launches import BlockLaunch
from ..runtime import attention, backends
from ..runtime.pairs import VerificationError, verify_lists
from ..runtime.plan import Plan
from ..runtime.verify import measure
from .cases import DTYPES, SHAPES, Case, layout_of, query_tokens, tensors
from .oracle import token_mask
from .works import WORKS, Work

TILES = 16
"""Query tiles of a case whose block lists are gone through."""


def features(plan: Plan) -> set[str]:
    """What a plan's launches are."""
    out = set()
    for launch in plan.program.launches:
        out.add(launch.name)
        if isinstance(launch, BlockLaunch):
            out |= {"gathered keys"} if launch.section else set()
            out |= set() if launch.compares else {"looked up"}
        out |= {"several patterns"} if len(launch.parts) > 1 else set()
        out |= {"queries by modality"} if launch.rows.modality is not None else set()
        out |= set() if launch.keys.natural else {"keys by modality"}
    return out


def prove(case: Case, device: str) -> dict[str, Any]:
    """Runs a case; facts about it, or VerificationError and whatever else goes wrong."""
    work, layout, queries = WORKS[case.work], layout_of(case.prompt), query_tokens(case.prompt)
    heads = SHAPES[case.shape][0]
    q, k, v = tensors(case, device)
    plan = attention.plan(
        q, k, work.spec(heads), layout=layout, scale=None if case.scale == "usual" else case.scale_value,
        backend=case.backend, lowering=work.lowering, query_positions=queries.tolist(), v=v,
    )  # fmt: skip
    launches = [launch.label + ("" if launch.compares else " (looked up)") for launch in plan.program.launches]
    _check_lowering(plan, work)
    mask = plan.dense_mask()
    _check_mask(mask, work, case, heads)
    blocks = verify_lists(plan, TILES, random.Random(0))
    with torch.no_grad():
        out, lse = plan._attend(q, k, v, case.need_lse)
    if out.dtype != q.dtype or out.shape != q.shape:
        raise VerificationError(f"the output is {out.dtype} {list(out.shape)} for q {q.dtype} {list(q.shape)}")
    if bool(out[~mask.any(-1)].any()):
        raise VerificationError("rows without a key are not 0")

    def masks(heads: list[int], first: int, last: int) -> Tensor:
        return mask[:, heads, first:last]

    measured = measure(q, k, v, masks, case.scale_value, out, lse)
    measured.judge(plan, DTYPES[case.dtype])
    return {
        "error": measured.output_error,
        "row_error": measured.row_error,
        "lse_error": measured.lse_error,
        "bound": measured.bound(DTYPES[case.dtype]),
        "blocks": blocks,
        "launches": launches,
    }


def _check_lowering(plan: Plan, work: Work) -> None:
    """The launches that the lowering is to force are there."""
    have = features(plan)
    needs = set() if plan.backend == "dense" and "dense" in work.needs else set(work.needs)
    never = set(work.never)
    if not backends.BACKENDS[plan.backend].lse:
        needs -= {"residue-major"}
    if not plan.program.queries.consecutive:  # a tile has queries of two chunks: windows are constant on no block
        needs, never = needs - {"several patterns"}, never - {"looked up"}
    if needs - have or never & have:
        raise VerificationError(f"the plan has {sorted(have)}: it needs {sorted(needs)}, and none of {sorted(never)}")


def _check_mask(mask: Tensor, work: Work, case: Case, heads: int) -> None:
    """The plan's token mask is that of the heads whose meaning is known independently."""
    meanings = work.meanings(heads)
    known = [h for h, meaning in enumerate(meanings) if meaning is not None]
    fixed = [meaning for meaning in meanings if meaning is not None]
    wanted = torch.from_numpy(token_mask(fixed, layout_of(case.prompt), case.batch, query_tokens(case.prompt)))
    wrong = torch.nonzero(mask[:, known].cpu() != wanted)
    if len(wrong):
        b, h, row, key = (int(i) for i in wrong[0])
        raise VerificationError(
            f"the plan's token mask differs in {len(wrong)} pairs: head {known[h]} ({work.spec(heads)[known[h]]}) of "
            f"prompt {b}, query {row} with key {key} is {'forbidden' if wanted[b, h, row, key] else 'allowed'}"
        )
