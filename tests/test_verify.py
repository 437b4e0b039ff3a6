"""`Plan.verify`: says nothing against what is right, and names what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import mmflex
from mask_builders import AShape, Boundary2D, Dense, Grid, QBoundary, VerticalSlash
from mmflex.runtime import backends
from mmflex.runtime.verify import exact_attention

torch.set_num_threads(1)

LAYOUT = mmflex.TokenLayout.batch(
    [
        mmflex.TokenLayout.from_segments([("text", 120), ("video", (8, 6, 6)), ("text", 120)]),
        mmflex.TokenLayout.from_segments([("video", (7, 6, 6)), ("text", 200)]),
    ],
    side="left",
)
GRID = Grid(25, rows=True, slash=True, local=16, sink=16)
FORCED = mmflex.Lowering(rows="gathered", residues="residue-major")


def tensors(m: int = LAYOUT.length, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, 4, m, 32), (batch, 2, LAYOUT.length, 32), (batch, 2, LAYOUT.length, 32))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def planned(spec: object, m: int = LAYOUT.length, **how: object) -> tuple[mmflex.Plan, list[torch.Tensor]]:
    qkv = tensors(m)
    how = {"lowering": FORCED, "block_size": 16, "backend": "reference", **how}
    return mmflex.plan(*qkv[:2], spec, layout=LAYOUT, **how), qkv


def number(plan: mmflex.Plan, kind: str) -> int:
    return next(i for i, launch in enumerate(plan.program.launches) if launch.kind == kind)


@pytest.mark.parametrize("m", [LAYOUT.length, 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_passes_with_figures(m: int, dtype: torch.dtype) -> None:
    spec = [GRID, VerticalSlash(40, 48), Dense(), QBoundary({"text": AShape(1, 30), "video": VerticalSlash(9, 20)})]
    q, k, v = tensors(m, dtype=dtype)
    plan = mmflex.plan(q, k, spec, layout=LAYOUT, backend="reference", block_size=16, lowering=FORCED)
    checked = plan.verify(q, k, v, rows=40, lse=True)
    assert 0 < checked.out_error <= checked.out_bound
    assert checked.out_bound >= (2e-6 if dtype == torch.float32 else 4e-3)
    assert checked.lse_error is not None
    assert 0 <= checked.lse_error <= 1e-4
    assert checked.rows >= 40 * 2 * 4
    assert checked.tiles >= 2 * sum(launch.kind != "dense" for launch in plan.program.launches)
    assert checked.blocks > checked.tiles
    assert plan.verify(q, k, v, rows=40).lse_error is None
    assert plan.verify(q, k, v, rows=40, seed=1) != plan.verify(q, k, v, rows=40, seed=2)


def test_dense_and_empty_plans_pass() -> None:
    for spec in (Dense(), Dense() - Dense(), AShape(0, 0)):
        plan, qkv = planned(spec)
        assert plan.verify(*qkv, rows=10, lse=True).lse_error is not None
    plan = mmflex.plan(*(t[:, :, :0] for t in qkv[:2]), AShape(1, 1), backend="reference")
    assert plan.verify(*(t[:, :, :0] for t in qkv)).rows == 0


def _drop_last(counts: torch.Tensor) -> None:
    counts -= (counts > 0).int()


@pytest.mark.parametrize("kind", ["main", "rows", "classes"])
@pytest.mark.parametrize("which", [0, 2])
def test_a_block_that_is_missing(kind: str, which: int) -> None:
    plan, qkv = planned(GRID)
    counts = plan.state.ready[number(plan, kind)].lists[which]
    if not counts.any():
        pytest.skip(f"no {'full' if which else 'partial'} blocks in this launch")
    _drop_last(counts)
    with pytest.raises(RuntimeError, match=r"may see key \d+, but the pair is computed 0 times|off by"):
        plan.verify(*qkv, rows=500)


def _no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that only the lists can tell."""
    monkeypatch.setattr("mmflex.runtime.verify._rows_compared", lambda *_: (0.0, None, 2e-6, 0))


def _missing(plan: mmflex.Plan, i: int) -> None:
    for which in (0, 2):
        _drop_last(plan.state.ready[i].lists[which])


def _full_for_partial(plan: mmflex.Plan, i: int) -> None:
    partial, index, full, full_index = plan.state.ready[i].lists
    move = (partial > 0) & (full < index.shape[-1])
    block = index.gather(-1, (partial - 1).clamp(min=0).long()[..., None])
    place = full.clamp(max=index.shape[-1] - 1).long()[..., None]
    full_index.scatter_(-1, place, torch.where(move[..., None], block, full_index.gather(-1, place)))
    partial -= move.int()
    full += move.int()


def _twice(plan: mmflex.Plan, i: int) -> None:
    partial, index, _, _ = plan.state.ready[i].lists
    two = partial > 1
    index[..., 1] = torch.where(two, index[..., 0], index[..., 1])


def _out_of_range(plan: mmflex.Plan, i: int) -> None:
    ready = plan.state.ready[i]
    for which in (1, 3):
        ready.lists[which][:] += plan.program.launches[i].key_slots // plan.program.tile


def _other_limits(plan: mmflex.Plan, i: int) -> None:
    mask_mod = plan.state.ready[i].mask_mod
    for name, t in zip(mask_mod.source.split("(")[1].split(")")[0].split(", "), mask_mod.captures, strict=True):
        if name == "limit":
            t -= 3
        elif name == "row":
            t += 3


@pytest.mark.parametrize("kind", ["main", "rows", "classes"])
@pytest.mark.parametrize("spoil", [_missing, _full_for_partial, _twice, _out_of_range, _other_limits])
def test_lists_alone_tell(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[mmflex.Plan, int], None], kind: str
) -> None:
    """Whatever is wrong in a block list or mask is found without computing attention."""
    _no_attention(monkeypatch)
    plan, qkv = planned(GRID)
    plan.verify(*qkv, rows=800)
    spoil(plan, number(plan, kind))
    with pytest.raises(RuntimeError, match=r"head \d, Grid\(.*(pair is computed|lists key tiles|holds no key)"):
        plan.verify(*qkv, rows=800)


def test_launches_that_compute_a_pair_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Residue classes leave out what the main launch computes. Both at once are named with their counts."""
    _no_attention(monkeypatch)
    plan, qkv = planned(Grid(25, slash=True, local=16, sink=16))
    ready, i = plan.state.ready[number(plan, "classes")], number(plan, "classes")
    partial, index, full, full_index = ready.lists
    listed = torch.where(partial > 0, index[..., 0], full_index[..., 0])
    full_index[..., 0], full[:], partial[:] = listed, ((partial + full) > 0).int(), 0
    with pytest.raises(RuntimeError, match=rf"launch 0 \(blocks\) \d, launch {i} \(residue-major\) \d"):
        plan.verify(*qkv, rows=500)


def test_a_kernel_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong outputs and wrong log-sum-exps, though all lists are right."""
    plan, qkv = planned(VerticalSlash(40, 48))
    attend = backends.attend

    def off(factor: float, of_lse: float) -> None:
        def spoiled(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = attend(*args)  # type: ignore[arg-type]
            return out * factor, lse * of_lse

        monkeypatch.setattr(backends, "attend", spoiled)

    off(1.0, math.log(2))
    plan.verify(*qkv)
    with pytest.raises(RuntimeError, match=r"the log-sum-exp is off by"):
        plan.verify(*qkv, lse=True)
    off(1.00001, 1.0)
    with pytest.raises(RuntimeError, match=r"the output is off by 1e-05 .* head \d, VerticalSlash"):
        plan.verify(*qkv)
    off(float("nan"), 1.0)
    with pytest.raises(RuntimeError, match=r"the output is off by nan"):
        plan.verify(*qkv)


def test_one_wrong_gathered_row_is_found() -> None:
    """A random sample of rows seldom meets one."""
    plan, qkv = planned(Grid(200, rows=True, columns=False, local=16, sink=16, phase=7))
    i = number(plan, "rows")
    assert int(plan.state.ready[i].row_count.max()) <= 3
    plan.verify(*qkv, rows=1)
    for which in (0, 2):
        plan.state.ready[i].lists[which].zero_()
    with pytest.raises(RuntimeError, match=r"the output is off"):
        plan.verify(*qkv, rows=1)


def test_arguments() -> None:
    plan, (q, k, v) = planned(Boundary2D({("text", "text"): AShape(1, 40)}))
    with pytest.raises(ValueError, match="rows is 0: .*1 or more"):
        plan.verify(q, k, v, rows=0)
    with pytest.raises(ValueError, match="planned for q and k of shapes"):
        plan.verify(q[:, :, 1:], k, v)
    plan = mmflex.plan(q, k, AShape(1, 40), layout=LAYOUT, backend="cpu")
    with pytest.raises(ValueError, match="'cpu' returns no log-sum-exp"):
        plan.verify(q, k, v, lse=True)


def test_the_reference_is_attention() -> None:
    """Against torch's own, in float64."""
    q, k, v = (t.double() for t in tensors())
    n = LAYOUT.length
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    out, lse, greatest = exact_attention(q, k, v, mask, 0.2)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)
    assert (out - wanted).abs().max() <= 1e-12
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.2).masked_fill(~mask, float("-inf"))
    assert (lse - scores.logsumexp(-1)).abs().max() <= 1e-12
    assert greatest == pytest.approx(scores[scores.isfinite()].abs().max().item())
    mask[5] = False
    out, lse, _ = exact_attention(q, k, v, mask, 0.2)
    assert (out[:, :, 5] == 0).all()
    assert (lse[:, :, 5] == -math.inf).all()
