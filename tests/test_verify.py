"""`Plan.verify`: says nothing against what is right, and names what is wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch

import mmflex
from mask_builders import AShape, Boundary2D, Dense, Grid, QBoundary, VerticalSlash
from mmflex.runtime import backends
from mmflex.runtime.pairs import VerificationError, verify_lists
from mmflex.runtime.verify import sampled_rows, softmax_rows

torch.set_num_threads(1)

LAYOUT = mmflex.TokenLayout.batch(
    [
        mmflex.TokenLayout.from_segments([("text", 120), ("video", (8, 6, 6)), ("text", 120)]),
        mmflex.TokenLayout.from_segments([("video", (7, 6, 6)), ("text", 200)]),
    ],
    side="left",
)
GRID = Grid(25, rows=True, slash=True, local=16, sink=16)
FORCED = mmflex.Lowering("modality-major", "modality-major", gather_rows=True, residue_launches=True)


def tensors(m: int = LAYOUT.length, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, m, 32), (2, 2, LAYOUT.length, 32), (2, 2, LAYOUT.length, 32))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def planned(spec: object, m: int = LAYOUT.length, **how: object) -> tuple[mmflex.Plan, list[torch.Tensor]]:
    qkv = tensors(m)
    how = {"lowering": FORCED, "block_size": 16, "backend": "reference", **how}
    return mmflex.plan(*qkv[:2], spec, layout=LAYOUT, **how), qkv


def number(plan: mmflex.Plan, name: str) -> int:
    return next(i for i, launch in enumerate(plan.program.launches) if launch.name == name)


MIXED = [GRID, VerticalSlash(40, 48), Dense(), QBoundary({"text": AShape(1, 30), "video": VerticalSlash(9, 20)})]


@pytest.mark.parametrize("m", [LAYOUT.length, 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_passes_with_figures(m: int, dtype: torch.dtype) -> None:
    q, k, v = tensors(m, dtype)
    plan = mmflex.plan(q, k, MIXED, layout=LAYOUT, backend="reference", block_size=16, lowering=FORCED)
    kinds = {launch.name for launch in plan.program.launches}
    assert kinds == {"blocks", "dense", "residue-major", "gathered rows"}
    found = plan.verify(q, k, v, rows=40, lse=True)
    assert 0 < found.output_error <= found.bound
    assert 2e-6 <= found.bound < 4e-6 if dtype == torch.float32 else found.bound == 4e-3
    assert found.output_error <= found.row_error <= 5 * found.bound
    assert found.lse_error is not None
    assert 0 <= found.lse_error <= 1e-4
    assert found.rows == 40 * 2 * 4
    assert found.blocks > 40
    assert plan.verify(q, k, v, rows=40).lse_error is None
    assert plan.verify(q, k, v, rows=40, seed=1) == plan.verify(q, k, v, rows=40, seed=1)
    assert plan.verify(q, k, v, rows=40, seed=1) != plan.verify(q, k, v, rows=40, seed=2)


@pytest.mark.parametrize("where", [{"query_start": 33}, {"query_positions": [*range(5, 40), *range(300, 342)]}])
def test_queries_anywhere(where: dict) -> None:
    q, k, v = tensors(77)
    plan = mmflex.plan(
        q, k, MIXED, layout=LAYOUT, backend="reference", block_size=16, lowering=FORCED, **where
    )  # fmt: skip
    assert plan.verify(q, k, v, rows=1000).rows == 77 * 2 * 4


def test_the_figures_are_those_of_the_oracle() -> None:
    """All rows: the same error as by an independent computation."""
    plan, (q, k, v) = planned(MIXED)
    found = plan.verify(q, k, v, rows=10_000, lse=True)
    out, lse = plan._attend(q, k, v, True)
    wanted, sums = oracle.softmax(q, k, v, oracle.token_mask(plan, tuple(MIXED)))
    worst = max(oracle.error(out[b, h], wanted[b, h]) for b in range(2) for h in range(4))
    assert found.output_error == pytest.approx(worst, rel=1e-6)
    some = np.isfinite(sums)
    assert found.lse_error == pytest.approx(np.abs(lse.double().numpy()[some] - sums[some]).max(), rel=1e-6)


def test_dense_and_empty_plans_pass() -> None:
    for spec in (Dense(), Dense() - Dense(), AShape(0, 0)):
        plan, qkv = planned(spec)
        assert plan.verify(*qkv, rows=10, lse=True).lse_error is not None
    plan = mmflex.plan(*(t[:, :, :0] for t in qkv[:2]), AShape(1, 1), backend="reference")
    assert plan.verify(*(t[:, :, :0] for t in qkv)).rows == 0


# ---- lists and masks that are wrong ----------------------------------------------------------------------------------


def _missing(plan: mmflex.Plan, i: int) -> None:
    for which in (0, 2):
        counts = plan.state.prepared[i].lists[which]
        counts -= (counts > 0).int()


def _full_for_partial(plan: mmflex.Plan, i: int) -> None:
    partial, index, full, full_index = plan.state.prepared[i].lists
    move = (partial > 0) & (full < index.shape[-1])
    block = index.gather(-1, (partial - 1).clamp(min=0).long()[..., None])
    place = full.clamp(max=index.shape[-1] - 1).long()[..., None]
    full_index.scatter_(-1, place, torch.where(move[..., None], block, full_index.gather(-1, place)))
    partial -= move.int()
    full += move.int()


def _twice(plan: mmflex.Plan, i: int) -> None:
    partial, index, _, _ = plan.state.prepared[i].lists
    index[..., 1] = torch.where(partial > 1, index[..., 0], index[..., 1])


def _out_of_range(plan: mmflex.Plan, i: int) -> None:
    for which in (1, 3):
        plan.state.prepared[i].lists[which][:] += plan.program.launches[i].key_slots // plan.program.tile


def _too_many(plan: mmflex.Plan, i: int) -> None:
    lists = plan.state.prepared[i].lists
    lists[0][lists[0] > 0] += lists[1].shape[-1]


def _other_limits(plan: mmflex.Plan, i: int) -> None:
    mask_mod = plan.state.prepared[i].mask_mod
    names = mask_mod.source.split("(")[1].split(")")[0].split(", ")
    shift = {"limit": 40, "row": -40}
    captures = tuple(t + shift.get(name, 0) for name, t in zip(names, mask_mod.captures, strict=True))
    plan.state.prepared[i].mask_mod = replace(mask_mod, captures=captures)


@pytest.mark.parametrize("launch", ["blocks", "gathered rows", "residue-major"])
@pytest.mark.parametrize("spoil", [_missing, _full_for_partial, _twice, _out_of_range, _too_many, _other_limits])
def test_lists_alone_tell(spoil: Callable[[mmflex.Plan, int], None], launch: str) -> None:
    """Whatever is wrong in a block list or a mask is found without computing attention, and is named."""
    plan, _ = planned(GRID)
    assert verify_lists(plan, 60, random.Random(0)) > 100
    spoil(plan, number(plan, launch))
    with pytest.raises(VerificationError, match=rf"head \d of prompt \d, Grid.*{launch}( lists| computes|: \d)"):
        verify_lists(plan, 60, random.Random(0))


def test_a_pair_that_two_launches_compute() -> None:
    """Residue-major launches leave out what the main launch computes. Both are named with their counts."""
    plan, qkv = planned(Grid(25, slash=True, local=16, sink=16))
    partial, index, full, full_index = plan.state.prepared[number(plan, "residue-major")].lists
    listed = torch.where(partial > 0, index[..., 0], full_index[..., 0])
    full_index[..., 0], full[:], partial[:] = listed, ((partial + full) > 0).int(), 0
    with pytest.raises(VerificationError, match=r"computed \d times \(blocks: \d, residue-major: \d\)"):
        plan.verify(*qkv, rows=500)


def test_a_query_that_is_gathered_twice() -> None:
    plan, qkv = planned(GRID)
    plan.state.prepared[number(plan, "gathered rows")].row_index[..., 1] = 0
    plan.state.prepared[number(plan, "gathered rows")].row_index[..., 0] = 0
    with pytest.raises(VerificationError, match="gathered rows holds a query twice"):
        plan.verify(*qkv)


def test_every_kind_of_launch_is_sampled_however_few_rows() -> None:
    for name in ("blocks", "gathered rows", "residue-major"):
        plan, qkv = planned(MIXED)
        for which in (0, 2):
            plan.state.prepared[number(plan, name)].lists[which].zero_()
        with pytest.raises(VerificationError):
            plan.verify(*qkv, rows=1)


# ---- kernels that are wrong ------------------------------------------------------------------------------------------


def test_a_kernel_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong outputs and wrong log-sum-exps, though all lists are right."""
    plan, qkv = planned(VerticalSlash(40, 48))
    attend = backends.attend

    def off(factor: float, of_lse: float) -> None:
        def spoiled(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = attend(*args)  # type: ignore[arg-type]
            return out * factor, lse * of_lse

        monkeypatch.setattr(backends, "attend", spoiled)

    off(1.0, math.log(2))  # as flash's with torch 2.11
    plan.verify(*qkv)
    with pytest.raises(VerificationError, match=r"VerticalSlash.*the log-sum-exp is off by \d.*in query \d+"):
        plan.verify(*qkv, lse=True)
    off(1.00001, 1.0)
    with pytest.raises(VerificationError, match=r"the output is off by 1.0e-05 .*float32 stays below 2.\de"):
        plan.verify(*qkv)
    off(float("nan"), 1.0)
    with pytest.raises(VerificationError, match="the output is off by nan"):
        plan.verify(*qkv)


def test_one_wrong_gathered_row_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are gathered, and a random sample of rows would seldom meet one."""
    plan, qkv = planned(Grid(200, rows=True, columns=False, local=16, sink=16, phase=7))
    assert int(plan.state.prepared[number(plan, "gathered rows")].row_count.max()) <= 3
    attend = plan._attend

    def spoiled(*args: object) -> object:
        out, lse = attend(*args)
        rows = plan.state.prepared[number(plan, "gathered rows")].row_index
        out[torch.arange(2)[:, None], torch.arange(4), rows[..., 0]] *= 1.1
        return out, lse

    monkeypatch.setattr(plan, "_attend", spoiled)
    assert len(sampled_rows(plan, 16, random.Random(0))) == 16
    with pytest.raises(VerificationError, match="the output is off by"):
        plan.verify(*qkv, rows=16)


# ---- arguments and arithmetic ----------------------------------------------------------------------------------------


def test_arguments() -> None:
    plan, (q, k, v) = planned(Boundary2D({("text", "text"): AShape(1, 40)}))
    with pytest.raises(ValueError, match=r"rows is 0: .*1 or more"):
        plan.verify(q, k, v, rows=0)
    with pytest.raises(ValueError, match="planned for q and k of shapes"):
        plan.verify(q[:, :, 1:], k, v)
    v[0, 0, 5, 3] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        plan.verify(q, k, v)
    plan = mmflex.plan(q, k, AShape(1, 40), layout=LAYOUT, backend="cpu")
    with pytest.raises(ValueError, match="'cpu' returns no log-sum-exp"):
        plan.verify(q, k, v, lse=True)


def test_the_mask_of_some_heads() -> None:
    plan, _ = planned(MIXED)
    assert torch.equal(plan.dense_mask([3, 90], [2, 0, 3]), plan.dense_mask()[:, [2, 0, 3]][:, :, [3, 90]])


def test_the_reference_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own, in float64; keys in pieces."""
    monkeypatch.setattr("mmflex.runtime.verify._KEYS", 64)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape, generator=generator).double() for shape in ((3, 300, 32), (300, 32), (300, 48)))
    mask = torch.ones(300, 300, dtype=torch.bool).tril().expand(3, -1, -1).clone()
    out, lse, greatest = softmax_rows(q, k, v, mask, 0.2)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q[None], k.expand(1, 3, -1, -1), v.expand(1, 3, -1, -1), is_causal=True, scale=0.2
    )
    assert (out - wanted[0]).abs().max() <= 1e-12
    scores = (q @ k.mT * 0.2).masked_fill(~mask, float("-inf"))
    assert (lse - scores.logsumexp(-1)).abs().max() <= 1e-12
    assert float(greatest) == pytest.approx(scores[scores.isfinite()].abs().max().item())
    mask[:, 5] = False
    out, lse, _ = softmax_rows(q, k, v, mask, 0.2)
    assert (out[:, 5] == 0).all()
    assert (lse[:, 5] == -math.inf).all()
