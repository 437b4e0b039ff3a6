"""`Plan.verify`: sampled rows and sampled block lists of a plan, recomputed from what its spec means.

Two things can be wrong with a plan, and each is compared with the token mask, which `Plan.dense_mask` evaluates from
the patterns' expressions and selected sets, never from block lists:

- the output (and log-sum-exp) of sampled query rows, against softmax attention in float64;
- the block lists of sampled query tiles: every allowed pair of their queries is computed exactly once by the launches
  together and no other pair is, full blocks included, which run without a mask.

Memory is bounded at any length: rows, heads and keys are gone through in pieces.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..compiler.launches import GatheredRows
from ..ir.shown import shown
from .inputs import check_planned
from .pairs import PAIRS, Planned, VerificationError, head_launches, head_name, verify_lists

OUTPUT_ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
"""Greatest relative error of an output (norm of the difference over norm of the reference), by dtype."""

SCORE_ROUNDING = 1.2e-7
"""Added to it in float32 for every unit of the greatest score: a score of 100 is itself known only to 1.2e-5."""

ROW_FACTOR = 5
"""How much more a single row may err than all rows of a head: rounding errors differ from row to row, while a lost or
doubled key among a thousand shows as several per cent."""

LSE_ERROR = 1e-4
"""Greatest absolute error of a log-sum-exp, of half precision too: kernels sum scores and weights in float32 whatever
the dtype of q and k, whose values both sides are given."""

_KEYS = 1 << 16
"""Keys whose scores are held at a time."""


@dataclass(frozen=True)
class Verification:
    """What `Plan.verify` has measured.

    Attributes:
        output_error: of the worst head, over its sampled rows: norm of the difference over norm of the reference.
        row_error: the same of the worst single row.
        lse_error: greatest absolute error of the log-sum-exp; None where it was not asked for.
        bound: the greatest output error that passes, from the dtype and the greatest score seen.
        rows: query rows recomputed, over all heads and prompts.
        blocks: listed blocks whose pairs were counted, over all heads and prompts.
    """

    output_error: float
    row_error: float
    lse_error: float | None
    bound: float
    rows: int
    blocks: int


def verify(plan: Planned, q: Tensor, k: Tensor, v: Tensor, rows: int, seed: int, lse: bool) -> Verification:
    """See `Plan.verify`."""
    check_planned(q, k, v, plan.program.groups[0].pattern, plan.shape, plan.state.device)
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows is {shown(rows)}: give the number of query rows to recompute, 1 or more")
    if not all(bool(t.isfinite().all()) for t in (q, k, v)):
        raise ValueError("q, k or v holds a value that is not finite, so there is no error to measure: verify without")
    if not q.numel():
        return Verification(0.0, 0.0, 0.0 if lse else None, _output_bound(q.dtype, 0.0), 0, 0)
    draw = random.Random(seed)
    blocks = verify_lists(plan, rows, draw)
    chosen = sampled_rows(plan, rows, draw)
    with torch.no_grad():
        out, sums = plan._attend(q, k, v, lse)
    index = torch.tensor(chosen, device=q.device)
    q, out = q.index_select(2, index), out.index_select(2, index)
    sums = sums.index_select(2, index) if lse and sums is not None else None

    def masks(heads: list[int], first: int, last: int) -> Tensor:
        return plan.dense_mask(chosen[first:last].tolist(), heads)

    measured = measure(q, k, v, masks, plan.scale, out, sums)
    measured.judge(plan, q.dtype, chosen)
    errors, bound = (measured.output_error, measured.row_error, measured.lse_error), measured.bound(q.dtype)
    return Verification(*errors, bound, len(chosen) * q.shape[0] * q.shape[1], blocks)


def sampled_rows(plan: Planned, rows: int, draw: random.Random) -> np.ndarray:
    """Query numbers to look at, ascending: the first, the last, those around the first tile edge, some of the few that
    launches gather (any sample would seldom meet one), and any."""
    m, tile = plan.program.queries.count, plan.program.tile
    if rows >= m:
        return np.arange(m)
    chosen = [row for row in (m - 1, 0, tile - 1, tile) if row < m]
    heads = [h for launch in plan.program.launches if isinstance(launch, GatheredRows) for h in launch.heads.real]
    for head in draw.sample(heads, min(len(heads), max(1, rows // 8))):
        for launch in head_launches(plan, draw.randrange(plan.state.batch), head):
            gathered = torch.nonzero(launch.slot_of >= 0)[:, 0].tolist() if launch.replaces else []
            chosen += draw.sample(gathered, min(len(gathered), 2))
    chosen += draw.sample(range(m), rows)
    return np.array(sorted(list(dict.fromkeys(chosen))[:rows]), np.int64)


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Errors of an output against float64, head by head.

    Attributes:
        greatest: the greatest absolute score among allowed pairs.
        head_errors: float64 [B, Hq]. row_errors: float64 [B, Hq, M]. lse_errors: the same, or None.
    """

    greatest: float
    head_errors: Tensor
    row_errors: Tensor
    lse_errors: Tensor | None

    @property
    def output_error(self) -> float:
        return float(self.head_errors.max())

    @property
    def row_error(self) -> float:
        return float(self.row_errors.max())

    @property
    def lse_error(self) -> float | None:
        return None if self.lse_errors is None else float(self.lse_errors.max())

    def bound(self, dtype: torch.dtype) -> float:
        return _output_bound(dtype, self.greatest)

    def judge(self, plan: Planned, dtype: torch.dtype, rows: np.ndarray | None = None) -> None:
        """VerificationError where an error is more than rounding. ``rows``: the query number of each row."""
        bound = self.bound(dtype)
        for what, errors, most in (
            ("output", self.head_errors, bound),
            ("output", self.row_errors, ROW_FACTOR * bound),
            ("log-sum-exp", self.lse_errors, LSE_ERROR + SCORE_ROUNDING * self.greatest),
        ):
            if errors is None or bool((errors <= most).all()):
                continue
            flat = int(torch.where(errors.isnan(), math.inf, errors).argmax())
            b, h, *row = (int(i) for i in np.unravel_index(flat, errors.shape))
            query = row[0] if row else int(self.row_errors[b, h].nan_to_num(math.inf).argmax())
            query = query if rows is None else int(rows[query])
            raise VerificationError(
                f"{head_name(plan, b, h)}: the {what} is off by {float(errors.flatten()[flat]):.1e} "
                f"({'' if row else 'all rows together, most '}in query {query}), where rounding in "
                f"{str(dtype).removeprefix('torch.')} stays below {most:.1e}"
            )


def _output_bound(dtype: torch.dtype, greatest: float) -> float:
    return OUTPUT_ERROR[dtype] + (SCORE_ROUNDING * greatest if dtype == torch.float32 else 0.0)


def measure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Callable[[list[int], int, int], Tensor],
    scale: float,
    out: Tensor,
    lse: Tensor | None = None,
) -> Measured:
    """Errors of an attention's output against softmax attention in float64 under a token mask.

    Args:
        q: [B, Hq, M, D]. k, v: [B, Hkv, N, D].
        masks: (heads, first row, last row + 1) -> bool [B, heads, rows, N], the pairs that are allowed.
        out: [B, Hq, M, Dv] and lse float32 [B, Hq, M], what is to be judged.
    """
    batch, heads, m, n = *q.shape[:3], k.shape[2]
    group = heads // k.shape[1]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=q.device)

    head_errors, row_errors, greatest = zeros(batch, heads), zeros(batch, heads, m), zeros()
    lse_errors = None if lse is None else zeros(batch, heads, m)
    step = max(1, PAIRS // max(1, batch * group * n))
    for kv_head in range(k.shape[1]):
        own = list(range(kv_head * group, (kv_head + 1) * group))
        squares = zeros(2, batch, group)
        for first in range(0, m, step):
            rows = slice(first, min(first + step, m))
            mask = masks(own, rows.start, rows.stop)
            for b in range(batch):
                wanted, sums, most = softmax_rows(q[b, own, rows], k[b, kv_head], v[b, kv_head], mask[b], scale)
                greatest = torch.maximum(greatest, most)
                difference = (out[b, own, rows].double() - wanted).square().sum(-1)
                norm = wanted.square().sum(-1)
                row_errors[b, own, rows] = _relative(difference, norm)
                squares[0, b] += difference.sum(-1)
                squares[1, b] += norm.sum(-1)
                if lse_errors is not None and lse is not None:
                    lse_errors[b, own, rows] = _apart(lse[b, own, rows].double(), sums)
        head_errors[:, own] = _relative(squares[0], squares[1])
    return Measured(float(greatest), head_errors, row_errors, lse_errors)


def _relative(difference: Tensor, norm: Tensor) -> Tensor:
    """Root of the quotient of two squared norms; where the reference is 0, of the difference alone."""
    return (difference / torch.where(norm == 0, 1.0, norm)).sqrt()


def _apart(given: Tensor, wanted: Tensor) -> Tensor:
    """Absolute differences; rows without a key have -inf on both sides, or are infinitely far apart."""
    return torch.where(given == wanted, 0.0, (given - wanted).abs())


def softmax_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention of heads that share a KV head, in float64, keys in pieces.

    Args:
        q: [h, R, D]. k: [N, D]. v: [N, Dv]. mask: bool [h, R, N].

    Returns:
        Output [h, R, Dv] and log-sum-exp [h, R] (0 and -inf for rows without a key), and the greatest absolute score.
    """
    q = q.double() * scale
    top = q.new_full(q.shape[:2], -math.inf)
    total, out = torch.zeros_like(top), q.new_zeros(*q.shape[:2], v.shape[1])
    greatest = q.new_zeros(())
    for first in range(0, k.shape[0], _KEYS):
        keys = slice(first, first + _KEYS)
        seen = mask[..., keys]
        scores = torch.where(seen, q @ k[keys].double().mT, -math.inf)
        greatest = torch.maximum(greatest, torch.where(seen, scores, 0.0).abs().amax())
        highest = torch.maximum(top, scores.amax(-1))
        base = torch.where(highest == -math.inf, 0.0, highest)
        before, weights = (top - base).exp(), (scores - base[..., None]).exp()
        total = total * before + weights.sum(-1)
        out = out * before[..., None] + weights @ v[keys].double()
        top = highest
    lse = torch.where(total > 0, top + total.log(), -math.inf)
    return out / torch.where(total > 0, total, 1.0)[..., None], lse, greatest
