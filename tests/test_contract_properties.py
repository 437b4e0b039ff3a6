"""The contract as properties, over random cases: unlike prompts in a batch, budgets of any size, scales that are not
positive, values that are not finite, the log-sum-exp of every backend. `test_contract` has what was wrong once."""

from __future__ import annotations

import dataclasses
import math
import sys

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from test_exactness import Case, cases, leaves, patterns, prompts, prove, run_settings, tensors

import mmflex
from mask_builders import AShape, Boundary2D, Dense, Dilated, QBoundary, VerticalSlash
from mmflex.compiler.lower import Lowering

torch.set_num_threads(1)

# ---- a batch of prompts of equal length, with modalities anywhere ----------------------------------------------------


@st.composite
def unlike(draw: st.DrawFn) -> Case:
    """Two or three prompts cut to one length, none of them padded."""
    case = draw(cases(nested=2))
    several = [draw(prompts(120)) for _ in range(draw(st.integers(2, 3)))]
    length = min(layout.length for layout in several)
    case["layout"] = mmflex.TokenLayout.batch([layout[:length] for layout in several])
    case["batch"], case["queries"] = len(several), draw(st.sampled_from([length, max(1, length // 3)]))
    different = [draw(patterns(case["layout"], case["tile"])) for _ in range(2)]
    case["spec"] = tuple(different[i % 2] for i in range(len(case["spec"])))
    return case


@run_settings(120)
@given(unlike())
def test_unlike_prompts_of_equal_length(case: Case) -> None:
    prove(case)


# ---- budgets beyond any prompt ---------------------------------------------------------------------------------------

HUGE = (2**31 - 1, 2**31, 2**32, sys.maxsize, 2**63, 2**70)


def counts(pattern: mmflex.Pattern) -> list[str]:
    """Fields that are budgets: those whose size beyond the prompt makes no difference; a grid's ``slash`` is a flag."""
    names = {"sink", "local", "last", "vertical", "slash", "blocks", "minimum", "first", "last_q"}
    fields = (f.name for f in dataclasses.fields(pattern))  # type: ignore[arg-type]
    return [name for name in fields if name in names and not isinstance(getattr(pattern, name), bool)]


@st.composite
def budgets(draw: st.DrawFn) -> tuple[Case, dict[str, int]]:
    """A case of one pattern, and huge values for some of its budgets."""
    case = draw(cases(nested=0))
    pattern = draw(leaves(case["layout"], case["tile"], None).filter(lambda p: bool(counts(p))))
    chosen = draw(st.lists(st.sampled_from(counts(pattern)), min_size=1, unique=True))
    case["spec"] = (pattern,) * len(case["spec"])
    return case, {name: draw(st.sampled_from(HUGE)) for name in chosen}


@run_settings(150)
@given(budgets())
def test_budgets_beyond_the_prompt_are_those_of_the_prompt(case_and_huge: tuple[Case, dict[str, int]]) -> None:
    """Mask and output of a budget that no int64 holds are those of one that is just large enough."""
    case, huge = case_and_huge
    q, k, v = tensors(case)
    pattern, heads = case["spec"][0], len(case["spec"])
    # Forced keys and diagonals stay within budgets: a prompt and a tile more than everything.
    enough = 2 * case["layout"].length + 4 * case["tile"] + 64
    how = {"v": v, "layout": case["layout"], "backend": "reference", "block_size": case["tile"]}
    plans = [
        mmflex.plan(q, k, [dataclasses.replace(pattern, **values)] * heads, **how)
        for values in (huge, dict.fromkeys(huge, enough))
    ]
    assert torch.equal(plans[0].dense_mask(), plans[1].dense_mask())
    plans[0].verify(q, k, v, rows=20)


# ---- scales ----------------------------------------------------------------------------------------------------------


@run_settings(60)
@given(cases(nested=1), st.sampled_from([-0.3, -1e-3, 0.0, -2.0]))
def test_scales_that_are_not_positive(case: Case, scale: float) -> None:
    case["scale"] = scale
    prove(case)


# ---- values that are not finite --------------------------------------------------------------------------------------


@run_settings(150)
@given(
    cases(nested=1),
    st.sampled_from("qkv"),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.sampled_from(["reference", "dense"]),
    st.data(),
)
def test_what_is_not_finite_reaches_the_rows_that_see_it(
    case: Case, side: str, value: float, backend: str, data: st.DataObject
) -> None:
    """No row that does not see it changes; with v, all that see it do, in that channel alone."""
    qkv = dict(zip("qkv", tensors(case), strict=True))
    clean = {name: t.clone() for name, t in qkv.items()}
    index = tuple(data.draw(st.integers(0, size - 1)) for size in qkv[side].shape)
    b, head, token, channel = index
    qkv[side][index] = value
    clean[side][index] = 0.0
    plan = mmflex.plan(
        qkv["q"], qkv["k"], case["spec"], v=qkv["v"], layout=case["layout"], backend=backend,
        block_size=case["tile"] if backend == "reference" else 128,
    )  # fmt: skip
    out, lse = plan._attend(*qkv.values(), True)
    mask = plan.dense_mask().numpy()
    sees = np.zeros(out.shape[:3], bool)
    group = case["queries"] and out.shape[1] // qkv["k"].shape[1]
    if side == "q":
        sees[b, head, token] = True
    else:
        sees[b, head * group : (head + 1) * group] = mask[b, head * group : (head + 1) * group, :, token]
    wanted, sums = oracle.softmax(*clean.values(), mask)
    untouched = torch.from_numpy(~sees)
    bound = 2e-6 if case["dtype"] == torch.float32 else 4e-3
    assert oracle.error(out[untouched], wanted[~sees]) <= bound
    some = ~sees & np.isfinite(sums)
    assert lse is not None
    assert np.abs(lse.double().numpy()[some] - sums[some]).max(initial=0) <= 1e-4
    if side == "v":
        spoiled = ~out.isfinite()
        assert torch.equal(spoiled.any(-1), torch.from_numpy(sees))
        assert not spoiled[..., torch.arange(out.shape[-1]) != channel].any()
        assert np.abs(lse.double().numpy()[sees] - sums[sees]).max(initial=0) <= 1e-4, "v is in no log-sum-exp"


# ---- the log-sum-exp -------------------------------------------------------------------------------------------------


@run_settings(60)
@given(cases(nested=1))
def test_log_sum_exp_of_dense_attention(case: Case) -> None:
    """The backend that runs everything dense: padding, chunks and both precisions."""
    q, k, v = tensors(case)
    spec = case["spec"]
    out, lse = mmflex.attention(
        q, k, v, spec, layout=case["layout"], scale=case["scale"], backend="dense", return_lse=True
    )
    plan = mmflex.plan(q, k, Dense(), layout=case["layout"], backend="reference")
    mask = oracle.token_mask(plan, (Dense(),) * len(spec))
    wanted, sums = oracle.softmax(q, k, v, mask, case["scale"])
    assert oracle.error(out, wanted) <= (2e-6 if case["dtype"] == torch.float32 else 4e-3)
    some = np.isfinite(sums)
    assert np.abs(lse.double().numpy()[some] - sums[some]).max(initial=0) <= 1e-4
    assert (lse.numpy()[~some] == -math.inf).all()


def test_a_backend_without_log_sum_exp_says_so() -> None:
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    with pytest.raises(ValueError, match=r"return_lse: backend 'cpu' does not give it"):
        mmflex.attention(q, k, v, AShape(1, 1), backend="cpu", return_lse=True)


# ---- where the compiled kernel is lowered differently ----------------------------------------------------------------

TWO = mmflex.TokenLayout.batch(
    [
        mmflex.TokenLayout.from_segments([("text", 200), ("video", (5, 8, 8)), ("text", 180)]),
        mmflex.TokenLayout.from_segments([("video", (5, 8, 8)), ("text", 380)]),
    ]
)
"""Text and video of three tiles each: their launches share a kernel."""


@pytest.mark.parametrize("scale", [None, -(32**-0.5)])
@pytest.mark.parametrize(
    ("spec", "lowering"),
    [
        (
            [
                Boundary2D({("text", "text"): VerticalSlash(100, 128), ("video", "video"): AShape(100, 2**40)}),
                QBoundary({"text": VerticalSlash(2**40, 1), "video": AShape(2**70, 0)}),
            ],
            Lowering("modality-major", "modality-major", gather_rows=True, residue_launches=True),
        ),
        ([Dilated(2**40, 0, 3) & AShape(100, 2**33), Dilated(5, 300, 2**35)], Lowering("natural", "natural")),
    ],
    ids=["modality-major", "looked up"],
)
def test_unlike_prompts_huge_budgets_and_negative_scales_on_the_compiled_kernel(
    spec: list[mmflex.Pattern], lowering: Lowering, scale: float | None
) -> None:
    """The kernel has no log-sum-exp and wants lists of full width. A negative scale shares its kernels."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, TWO.length, 32, generator=generator) for h in (4, 2, 2))
    plan = mmflex.plan(q, k, spec * 2, layout=TWO, scale=scale, backend="cpu", lowering=lowering)
    found = plan.verify(q, k, v, rows=10_000)
    assert found.rows == 8 * TWO.length
    assert found.output_error <= found.bound
    out = plan.attend(q, k, v)
    wanted, _ = oracle.softmax(q, k, v, plan.dense_mask().numpy(), scale)
    for b in range(2):
        assert oracle.error(out[b], wanted[b]) <= found.bound
