"""Measuring a device: the constants of `mmflex.compiler.constants`, fitted to timed plans by least squares."""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..compiler.constants import COSTS, Constants, device_name
from ..compiler.launches import Work
from ..compiler.lower import lower
from ..compiler.prices import (
    Prediction,
    attend_terms,
    expected_work,
    moving_terms,
    overlaps,
    planning_terms,
    predict,
)
from ..compiler.program import Program
from ..ir.layout import TokenLayout
from ..ir.pattern import Dense
from ..ir.queries import QueryTokens
from ..runtime import backends
from ..runtime.attention import attention
from .cases import Sample, fit_cases, held_out_cases, inputs, measure, milliseconds

BUSY = 1.25
"""A sample tells about the device where it takes at least this many times as long as the host needs for it."""


@dataclass(frozen=True)
class Settings:
    """What to measure with.

    Attributes:
        lengths: tokens; constants are fitted at the least and the greatest, predictions tested at all but the least.
        heads, kv_heads, head_dim, dtype: of the tensors.
        seconds: budget of one backend; the least informative cases are left out when it is used up.
        each: seconds for the runs of one timing.
    """

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    seconds: float
    each: float

    def __post_init__(self) -> None:
        if len(set(self.lengths)) < 2 or min(self.lengths) < 256:
            raise ValueError(f"lengths are {self.lengths}: give at least two, of 256 tokens or more")
        if self.kv_heads < 1 or self.heads % self.kv_heads or self.heads < 1:
            raise ValueError(f"{self.heads} query heads and {self.kv_heads} KV heads: one must divide the other")
        if not 16 <= self.head_dim <= 256:
            raise ValueError(f"the head dimension is {self.head_dim}: from 16 to 256 are supported")


def settings_for(device: torch.device, quick: bool = False, seconds: float | None = None, **given: Any) -> Settings:
    """Settings that suit a device, in its time budget (GPU: under 3 minutes for two backends; CPU: under 4)."""
    if device.type == "cuda":
        base = Settings((16384, 32768, 131072), 28, 4, 128, torch.bfloat16, 80.0, 0.15)
        fast = replace(base, lengths=(8192, 65536), seconds=40.0)
    else:
        base = Settings((2048, 4096, 8192), 4, 2, 64, torch.bfloat16, 200.0, 0.4)
        fast = replace(base, lengths=(1024, 4096), seconds=110.0, each=0.15)
    given = {name: value for name, value in given.items() if value is not None}
    if seconds is not None:
        given["seconds"] = seconds
    return replace(fast if quick else base, **given)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured.

    Attributes:
        constants: the record. samples: what it was fitted to. held_out: what it is tested on.
        dense: (tokens, block pairs, milliseconds) of dense attention.
        left_out: cases that there was no time for, or that failed, with the reason.
    """

    constants: Constants
    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    dense: tuple[tuple[int, float, float], ...]
    left_out: tuple[tuple[str, str], ...]

    def predictions(self, sample: Sample) -> tuple[Prediction, Prediction]:
        """(before planning, from the expressions; after planning, from the block lists)."""
        return tuple(  # type: ignore[return-value]
            predict(sample.program, self.constants, counted=works) for works in (sample.expected, sample.works)
        )


# ---- least squares ---------------------------------------------------------------------------------------------------


def least_squares(features: np.ndarray, ms: np.ndarray) -> np.ndarray:
    """Coefficients >= 0 that predict times best.

    Errors are relative, so that short and long runs weigh the same. Every set of features is tried (there are few), and
    of those whose plain least squares come out positive the best is taken: that is the constrained optimum.

    Args:
        features: float [samples, features]. ms: float [samples], positive.

    Returns:
        float [features]; 0 for features that do not occur or do not help.
    """
    features, ms = np.asarray(features, float), np.asarray(ms, float)
    if features.ndim != 2 or ms.shape != (len(features),) or not len(ms):
        raise ValueError(f"features {features.shape} and times {ms.shape} do not fit: one row for every time")
    if not (np.isfinite(ms).all() and (ms > 0).all()):
        raise ValueError(f"times must be positive, got {ms.min()} to {ms.max()} ms")
    rows = features / ms[:, None]
    scale = np.abs(rows).max(0)
    used = np.flatnonzero(scale > 0)
    best, error = np.zeros(features.shape[1]), float(len(ms))
    for count in range(1, min(len(used), len(ms)) + 1):
        for chosen in itertools.combinations(used, count):
            part = rows[:, chosen] / scale[list(chosen)]
            found, _, rank, _ = np.linalg.lstsq(part, np.ones(len(ms)), rcond=1e-9)
            if rank < count or (found < 0).any():
                continue
            left = float(np.square(part @ found - 1).sum())
            if left < error * (1 - 1e-9) - 1e-15:
                best, error = np.zeros_like(best), left
                best[list(chosen)] = found / scale[list(chosen)]
    return best


ATTEND = ("full", "partial", "looked_full", "lookup", "tile", "launch", "copy", "moved")


def attend_features(program: Program, works: Mapping[int, Work], before: Constants, apart: bool) -> np.ndarray:
    """How often each of `ATTEND` counts in a plan, by the works of its launches; partial blocks as what they cost
    beyond full ones.

    Args:
        before: which launches are as long as their longest tile is judged by these constants.
        apart: launches with looked-up masks run on another kernel, whose full blocks have a price of their own.
    """
    out = dict.fromkeys(ATTEND, 0.0)
    for number, work in works.items():
        aside = overlaps(program.launches[number], program.layout, before)
        for name, count in (attend_terms(work, before, overlaps=aside) | moving_terms(work)).items():
            if name in ("partial", "lookup"):
                out["looked_full" if name == "lookup" and apart else "full"] += count
            out["full" if name == "looked_full" and not apart else name] += count
    return np.array([out[name] for name in ATTEND])


def fit_attend(samples: Sequence[Sample], start: Constants) -> Constants:
    """Constants of attending."""
    apart = start.backend == "flash"
    useful = [s for s in samples if s.attend > BUSY * s.attend_host] or list(samples)
    found = start
    for _ in range(5):  # until it is settled which launches are as long as their longest tile
        rows = np.stack([attend_features(s.program, s.works, found, apart) for s in useful])
        cost = dict(zip(ATTEND, least_squares(rows, np.array([s.attend for s in useful])), strict=True))
        seen = {name: bool(column.any()) for name, column in zip(ATTEND, rows.T, strict=True)}
        if cost["full"] <= 0:
            raise RuntimeError("the runs do not tell what a block costs: take longer lengths, or a quieter machine")
        looked = cost["looked_full"] if apart and cost["looked_full"] > 0 else cost["full"]
        extra = cost["partial"] if seen["partial"] else 0.2 * cost["full"]
        lookup = cost["lookup"] if seen["lookup"] else 3 * looked
        before, found = found, replace(
            found, full=cost["full"], partial=cost["full"] + extra, looked_full=looked, lookup=looked + lookup,
            **{name: cost[name] for name in ("tile", "launch", "copy", "moved")},
        )  # fmt: skip
        if before == found:
            break
    return found


SHORT = 256
"""Tokens of a dense call that tells what a call costs by itself: where it breaks even with a sparse one."""

PLAN = ("plan", "estimate", "token", "product", "planned", "slot", "entry")
HOST = ("host", "host_estimate", "host_launch")


def fit_planning(samples: Sequence[Sample], start: Constants) -> Constants:
    """Constants of planning, and of the host beside a GPU."""
    timed = [s for s in samples if s.planning > 0]
    device = [s for s in timed if s.total > BUSY * s.host] or timed
    rows = np.array([[planning_terms(s.program, 1)[name] for name in PLAN] for s in device])
    cost = dict(zip(PLAN, least_squares(rows, np.array([s.planning for s in device])), strict=True))
    busy = [s for s in samples if s.host > 0]
    host = np.zeros(3)
    if busy:
        steps = [planning_terms(s.program, 1) for s in busy]
        host = least_squares(
            np.array([[1.0, s["estimate"], s["planned"]] for s in steps]), np.array([s.host for s in busy])
        )
    values: dict[str, Any] = {name: float(ms) for name, ms in cost.items()}
    return replace(start, **values | {name: float(ms) for name, ms in zip(HOST, host, strict=True)})


# ---- measuring -------------------------------------------------------------------------------------------------------


def lanes(device: torch.device) -> int:
    """Query tiles that a device computes at once."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return torch.get_num_threads()


def calibrate(
    backend: str, device: torch.device, settings: Settings, say: Callable[[str], None] = lambda text: None
) -> Calibration:
    """Measures a backend on a device.

    Args:
        say: is told what is being measured.

    Raises:
        ValueError: unknown backend or settings. RuntimeError: it cannot run here (`mmflex.why_not`), or the runs do not
            tell enough.
    """
    if backend in ("auto", "dense"):
        raise ValueError(f"backend {backend!r} cannot be calibrated: use 'flash', 'triton', 'cpu' or 'reference'")
    backends.resolve(backend, device, settings.head_dim, settings.dtype)
    begin = time.perf_counter()
    held: dict[int, Any] = {}

    def tensors(tokens: int) -> Any:
        if tokens not in held:
            held.clear()
            shape = settings.heads, settings.kv_heads, settings.head_dim
            held[tokens] = inputs(tokens, *shape, settings.dtype, device)
        return held[tokens]

    lengths = sorted(set(settings.lengths))
    cases = fit_cases(lengths[0], lengths[-1])
    tested = held_out_cases(lengths[1:])
    needed = {case.name for case in cases[:7]}
    samples: list[Sample] = []
    left: list[tuple[str, str]] = []
    dense = []
    with torch.no_grad():
        for n in (SHORT, *lengths):
            say(f"dense, {n} tokens")
            dense.append(_dense(n, tensors(n), backend, settings))
        # The time budget is for the cases that say less; half of what is left after the first is for those held out.
        for group in (cases, tested):
            until = settings.seconds * (0.62 if group is cases else 1.0)
            for case in sorted(group, key=lambda case: -case.tokens) if group is tested else group:
                label = f"{case.name}, {case.tokens} tokens"
                must = case.name in needed and case.tokens == lengths[-1] and group is cases
                if time.perf_counter() - begin > until and not must:
                    left.append((label, "no time left"))
                    continue
                say(label)
                try:
                    q, k, v = tensors(case.tokens)
                    samples.append(measure(case, q, k, v, backend, settings.each))
                except Exception as problem:  # a kernel that one launch cannot have: the others still tell
                    left.append((label, f"{type(problem).__name__}: {str(problem)[:200]}"))
    fitted = tuple(s for s in samples if not s.case.held_out)
    held_out = tuple(s for s in samples if s.case.held_out)
    if not fitted:
        raise RuntimeError(f"no plan could be run with backend {backend!r}: {left[0][0]}: {left[0][1]}")
    constants = fit(fitted, dense, blank(backend, device, settings))
    made = Calibration(constants, fitted, held_out, tuple(dense), tuple(left))
    errors = [abs(made.predictions(s)[1].total_ms / s.total - 1) for s in held_out]
    return replace(made, constants=replace(constants, error=round(max(errors, default=0.0), 4)))


def blank(backend: str, device: torch.device, settings: Settings) -> Constants:
    """A record without measurements: rough ones to start from."""
    return Constants(
        device_name(device), torch.__version__, backend, str(settings.dtype).removeprefix("torch."), settings.head_dim,
        lanes(device), full=1e-5, partial=1.2e-5, looked_full=1e-5, lookup=4e-5, dense=1e-5,
        measured=datetime.date.today().isoformat(),
    )  # fmt: skip


def fit(samples: Sequence[Sample], dense: Sequence[tuple[int, float, float]], start: Constants) -> Constants:
    """All constants, from runs."""
    rows = np.array([[blocks, 1.0] for _, blocks, _ in dense])
    pair, call = least_squares(rows, np.array([ms for _, _, ms in dense]))
    if pair <= 0:
        raise RuntimeError("dense attention takes no longer at longer lengths: take lengths that lie further apart")
    found = fit_planning(samples, fit_attend(samples, replace(start, dense=float(pair), dense_call=float(call))))
    values: dict[str, Any] = {name: float(f"{getattr(found, name):.5g}") for name in COSTS}
    return replace(found, **values)


def _dense(n: int, qkv: Any, backend: str, settings: Settings) -> tuple[int, float, float]:
    """(tokens, block pairs, milliseconds) of the dense attention that mmflex takes beside a backend."""
    q, k, v = qkv
    layout, spec = TokenLayout.text(n), Dense()
    queries = QueryTokens.last(n, n)
    program = lower((spec,) * settings.heads, layout, queries, settings.kv_heads, 128, lse=True, full_width=False)
    blocks = sum(work.dense for work in expected_work(program, 1).values())
    ms = milliseconds(lambda: attention(q, k, v, spec, layout=layout, backend=backend), q.device, settings.each)
    return n, blocks, ms
