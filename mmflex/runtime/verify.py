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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..compiler.launches import BlockLaunch, DenseLaunch, GatheredRows
from .inputs import check

if TYPE_CHECKING:
    from .plan import Plan

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

_PAIRS = 1 << 24
"""Pairs of a query and a key that are held at a time."""

_KEYS = 1 << 16
"""Keys whose scores are held at a time."""


class VerificationError(RuntimeError):
    """A plan does not compute what its spec means."""


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


def verify(plan: Plan, q: Tensor, k: Tensor, v: Tensor, rows: int = 64, seed: int = 0, lse: bool = False) -> Verification:
    """See `Plan.verify`."""
    check(q, k, v, plan.program.groups[0].pattern, None)
    if (tuple(q.shape), tuple(k.shape)) != plan.shape:
        raise ValueError(f"planned for q and k of shapes {plan.shape}, got {tuple(q.shape)}, {tuple(k.shape)}")
    if rows < 1:
        raise ValueError(f"rows is {rows}: give the number of query rows to recompute, 1 or more")
    if not all(bool(t.isfinite().all()) for t in (q, k, v)):
        raise ValueError("q, k or v holds a value that is not finite, so there is no error to measure: verify without")
    if not q.numel():
        return Verification(0.0, 0.0, 0.0 if lse else None, _output_bound(q.dtype, 0.0), 0, 0)
    draw = random.Random(seed)
    blocks = verify_lists(plan, rows, draw)
    chosen = sampled_rows(plan, rows, draw)
    with torch.no_grad():
        out, sums = plan._attend(q, k, v, lse)
    index = torch.as_tensor(chosen).to(q.device)
    part = out.index_select(2, index), None if sums is None else sums.index_select(2, index)
    masks = _RowMasks(plan, chosen)
    measured = measure(q.index_select(2, index), k, v, masks, plan.scale, part[0], part[1] if lse else None)
    measured.judge(plan, q.dtype, chosen)
    shown = measured.lse_error if lse else None
    count = len(chosen) * q.shape[0] * q.shape[1]
    return Verification(measured.output_error, measured.row_error, shown, measured.bound(q.dtype), count, blocks)


def sampled_rows(plan: Plan, rows: int, draw: random.Random) -> np.ndarray:
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


class _RowMasks:
    """The token mask of some query rows, in pieces: ``masks(heads, first, last)`` is bool [B, heads, rows, N]."""

    def __init__(self, plan: Plan, rows: np.ndarray) -> None:
        self.plan, self.rows = plan, rows

    def __call__(self, heads: list[int], first: int, last: int) -> Tensor:
        return self.plan.dense_mask(self.rows[first:last].tolist(), heads)


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

    def judge(self, plan: Plan, dtype: torch.dtype, rows: np.ndarray | None = None) -> None:
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
    wide = {"dtype": torch.float64, "device": q.device}
    head_errors, row_errors = torch.zeros(batch, heads, **wide), torch.zeros(batch, heads, m, **wide)
    lse_errors = None if lse is None else torch.zeros(batch, heads, m, **wide)
    greatest = torch.zeros((), **wide)
    step = max(1, _PAIRS // max(1, batch * group * n))
    for kv_head in range(k.shape[1]):
        own = list(range(kv_head * group, (kv_head + 1) * group))
        squares = torch.zeros(2, batch, group, **wide)
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


# ---- block lists -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadLaunch:
    """One launch as one head of one prompt sees it, in slots: all that verification knows of a plan's insides.

    Attributes:
        label: of the launch. replaces: whether its rows replace those of other launches. dense: it lists no blocks.
        slot_of: int64 [M], the slot of each query, -1 for none. token: int64 [key slots], the token of each, -1 for
            none of this head.
        partial, full: (count int32 [tiles], index int32 [tiles, width]), the listed key tiles of each query tile.
        allows: (query slots, key slots) -> bool, the mask of partial blocks.
    """

    label: str
    replaces: bool
    dense: bool
    slot_of: Tensor
    token: Tensor
    partial: tuple[Tensor, Tensor]
    full: tuple[Tensor, Tensor]
    allows: Callable[[Tensor, Tensor], Tensor]


def head_name(plan: Plan, b: int, head: int) -> str:
    """As errors call a head of a prompt."""
    pattern = next(group.pattern for group in plan.program.groups if head in group.heads)
    return f"head {head} of prompt {b}, {pattern}"


def head_launches(plan: Plan, b: int, head: int) -> list[HeadLaunch]:
    """The launches that compute a head of a prompt."""
    out = []
    for number, launch in enumerate(plan.program.launches):
        i = launch.heads.slot_of.get(head)
        if i is None:
            continue
        state, m, device = plan.state, plan.program.queries.count, plan.state.device
        slot_of = launch.rows.on("inverse", device)[b % len(launch.rows.index)]
        if isinstance(launch, DenseLaunch):
            none = torch.zeros(0, dtype=torch.int64, device=device)
            out.append(HeadLaunch(launch.label, False, True, slot_of, none, (none, none), (none, none), torch.ge))
            continue
        prepared = state.prepared[number]
        if prepared.row_index is not None and prepared.row_count is not None:
            own = prepared.row_index[b, i, : int(prepared.row_count[b, i])]
            if len(own.unique()) != len(own):
                raise VerificationError(f"{head_name(plan, b, head)}: {launch.label} holds a query twice")
            slot_of = torch.full((m,), -1, dtype=torch.int64, device=device)
            slot_of[own] = torch.arange(len(own), device=device)
        token = torch.full((launch.key_slots,), -1, dtype=torch.int64, device=device)
        main = launch.keys.on("index", device)[b % len(launch.keys.index)]
        token[: len(main)] = main
        if prepared.key_index is not None:  # real keys come first
            real = torch.arange(len(main), device=device) < (main >= 0).sum()
            token[: len(main)] = torch.where(real, prepared.key_index[b, i], -1)
        if prepared.section_table is not None and isinstance(launch, BlockLaunch) and head in launch.table_slot:
            first = launch.keys.slots + launch.section_slot[head] * launch.section
            token[first : first + launch.section] = prepared.section_table[b, launch.table_slot[head]]
        lists = [t[b, i] for t in prepared.lists]

        def allows(q: Tensor, kv: Tensor, mask_mod: Callable[..., Tensor] = prepared.mask_mod, h: int = i) -> Tensor:
            return mask_mod(torch.tensor(b, device=q.device), torch.tensor(h, device=q.device), q, kv)

        replaces = isinstance(launch, GatheredRows)
        out.append(
            HeadLaunch(launch.label, replaces, False, slot_of, token, (lists[0], lists[1]), (lists[2], lists[3]), allows)
        )
    return out


def rows_computing(launch: HeadLaunch, token: int, tile: int) -> Tensor:
    """bool [M]: the queries whose tile lists a block that holds a token's key, whether they see it or not."""
    blocks = torch.nonzero(launch.token == token)[:, 0] // tile
    tiles = torch.zeros(len(launch.partial[0]), dtype=torch.bool, device=launch.token.device)
    for counts, index in (launch.partial, launch.full):
        listed = torch.arange(index.shape[-1], device=index.device) < counts[:, None]
        tiles |= (listed & torch.isin(index, blocks)).any(-1)
    return (launch.slot_of >= 0) & tiles[launch.slot_of.clamp(min=0) // tile]


def verify_lists(plan: Plan, tiles: int, draw: random.Random) -> int:
    """Counts the pairs that so many query tiles compute, over all heads, prompts and launches in turn.

    Returns:
        How many listed blocks they have.

    Raises:
        VerificationError: a pair is computed that is not allowed, or more than once, or an allowed one not at all.
    """
    blocks = 0
    for b, head, launches, launch, tile in _sampled_tiles(plan, tiles, draw):
        size = plan.program.tile
        rows = torch.nonzero((launch.slot_of >= 0) & (launch.slot_of // size == tile))[:, 0]
        blocks += int(launch.partial[0][tile]) + int(launch.full[0][tile])
        step = max(1, _PAIRS // max(1, plan.layout.length))
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            allowed = plan.dense_mask(some.tolist(), [head])[b, 0]
            computed = _times_computed(plan, b, head, launches, some, allowed)
            if not torch.equal(computed, allowed.to(computed.dtype)):
                raise VerificationError(_difference(plan, b, head, launches, some, allowed, computed))
    return blocks


def _sampled_tiles(
    plan: Plan, tiles: int, draw: random.Random
) -> Iterator[tuple[int, int, list[HeadLaunch], HeadLaunch, int]]:
    """(prompt, head, its launches, one of them, a query tile of that one with queries in it): at least one tile for
    every kind of launch, ``tiles`` if there are so many."""
    turns = []
    for b in range(plan.state.batch):
        for head in range(plan.program.heads):
            launches = head_launches(plan, b, head)
            for launch in launches:
                if not launch.dense:
                    own = launch.slot_of[launch.slot_of >= 0] // plan.program.tile
                    left = own.unique().tolist()
                    draw.shuffle(left)
                    turns.append((b, head, launches, launch, left))
    draw.shuffle(turns)
    before: Counter[str] = Counter()  # turns of each kind of launch: the kinds take turns
    rank = []
    for turn in turns:
        rank.append(before[turn[3].label])
        before[turn[3].label] += 1
    turns = [turns[i] for i in sorted(range(len(turns)), key=rank.__getitem__)]
    tiles = max(tiles, len(before))
    while turns:
        for turn in tuple(turns):
            if not turn[4]:
                turns.remove(turn)
            elif tiles:
                tiles -= 1
                yield (*turn[:4], turn[4].pop())
            else:
                return


def _times_computed(
    plan: Plan, b: int, head: int, launches: list[HeadLaunch], rows: Tensor, allowed: Tensor
) -> Tensor:
    """int32 [rows, N]: how often the launches together compute each pair. Rows that a launch replaces are its own."""
    count = torch.zeros_like(allowed, dtype=torch.int32)
    for launch in sorted(launches, key=lambda one: one.replaces):
        own = _computed_by(plan, b, head, launch, rows)
        count = torch.where((launch.slot_of[rows] >= 0)[:, None], own, count) if launch.replaces else count + own
    return count


def _computed_by(plan: Plan, b: int, head: int, launch: HeadLaunch, rows: Tensor) -> Tensor:
    """int32 [rows, N]: how often one launch computes each pair."""
    n, tile = plan.layout.length, plan.program.tile
    slot = launch.slot_of[rows]
    count = torch.zeros((len(rows), n), dtype=torch.int32, device=rows.device)
    if launch.dense:
        numbers = torch.as_tensor(plan.program.queries.numbers).to(rows.device)[rows]
        valid = torch.as_tensor(plan.layout.valid[b % plan.layout.batch_size]).to(rows.device)
        return (valid & valid[numbers][:, None] & (torch.arange(n, device=rows.device) <= numbers[:, None])).int()
    where = f"{head_name(plan, b, head)}: {launch.label}"
    for kind, (counts, index) in (("partial", launch.partial), ("full", launch.full)):
        key_tiles = len(launch.token) // tile
        width = int(torch.where(slot >= 0, counts[slot.clamp(min=0) // tile], 0).max())
        if width > index.shape[-1]:
            raise VerificationError(f"{where} lists {width} {kind} blocks in a table that is {index.shape[-1]} wide")
        step = max(1, _PAIRS // max(1, width * tile))
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            at = slot[part].clamp(min=0)
            listed = torch.arange(width, device=at.device) < counts[at // tile, None]
            listed &= (slot[part] >= 0)[:, None]
            block = torch.where(listed, index[at // tile, :width], 0).long()
            if bool(((block < 0) | (block >= key_tiles)).any()):
                raise VerificationError(f"{where} lists a {kind} block beyond its {key_tiles} key tiles")
            key = (block[..., None] * tile + torch.arange(tile, device=at.device)).flatten(1)
            computed = listed.repeat_interleave(tile, 1)
            if kind == "partial":
                computed &= launch.allows(at[:, None], key)
            token = launch.token[key]
            if bool((computed & (token < 0)).any()):
                raise VerificationError(f"{where} computes pairs with key slots that hold no key, in {kind} blocks")
            count[part].scatter_add_(1, token.clamp(min=0), computed.int())
    return count


def _difference(
    plan: Plan, b: int, head: int, launches: list[HeadLaunch], rows: Tensor, allowed: Tensor, computed: Tensor
) -> str:
    """What is wrong with the first pair that is not computed as often as it should be."""
    wrong = torch.nonzero(computed != allowed)
    row, key = (int(i) for i in wrong[0])
    query = rows[row : row + 1]
    by = {one.label: int(_computed_by(plan, b, head, one, query)[0, key]) for one in launches}
    times = ", ".join(f"{label}: {count}" for label, count in by.items())
    return (
        f"{head_name(plan, b, head)}: {len(wrong)} pairs of a query tile are not computed exactly as allowed, first query "
        f"{int(query)} with key {key}, which is {'allowed' if bool(allowed[row, key]) else 'forbidden'} and computed "
        f"{int(computed[row, key])} times ({times})"
    )
