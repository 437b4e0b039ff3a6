"""Milliseconds of a program: how often each price counts (`attend_terms`, `moving_terms`, `planning_terms`) times what
it is on the device. Prediction, calibration and the search of patterns all go by these counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..ir.atoms import Listed
from ..ir.layout import TokenLayout
from ..ir.pattern import View
from .constants import PRICED_TILE, Constants
from .launches import Launch, ResidueLaunch, Work

if TYPE_CHECKING:
    from .program import Program

MARGIN = 0.1
"""A spec runs sparse only where it is predicted to beat dense by this share, about the error of predictions."""

SORTING = 8
"""Passes over the key slots of a residue launch, which sorts them; other launches take one."""


@dataclass(frozen=True)
class LaunchPrediction:
    """One launch: what it does (over all heads and prompts) and how long it takes, in milliseconds."""

    label: str
    kind: str
    work: Work
    attend_ms: float
    moving_ms: float


@dataclass(frozen=True)
class Prediction:
    """Predicted milliseconds of one call, planning counted.

    Attributes:
        total_ms: the sum of the following six.
        attend_ms: block-sparse launches. dense_ms: plain attention. moving_ms: rows copied in, out, and merged.
        planning_ms: estimates, selections, block lists. waiting_ms: exposed host time.
        communication_ms: of one of several ranks, what it waits for keys, values and queries of the others.
        launches: attending and moving, launch by launch.
        exact: from the block lists of a plan; else expected from the expressions.
        constants: the prices.
    """

    attend_ms: float
    dense_ms: float
    moving_ms: float
    planning_ms: float
    waiting_ms: float
    launches: tuple[LaunchPrediction, ...]
    exact: bool
    constants: Constants
    communication_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        parts = (self.attend_ms, self.dense_ms, self.moving_ms, self.planning_ms, self.waiting_ms)
        return sum(parts) + self.communication_ms


# ---- how often each price counts -------------------------------------------------------------------------------------

Terms = dict[str, float]
"""Name of a price in `Constants` -> how often it counts."""


def total_ms(terms: Mapping[str, float], constants: Constants) -> float:
    return sum(getattr(constants, name) * count for name, count in terms.items())


def attend_terms(work: Work, constants: Constants, tile: int = PRICED_TILE, overlaps: bool = False) -> Terms:
    """Terms of a launch's kernel: all its tiles spread over the device, or its longest query tile where that
    takes longer and nothing overlaps with it."""
    unit = (tile / PRICED_TILE) ** 2
    if work.dense:
        return {"dense_call": 1.0, "dense": work.dense * unit}
    full, partial = ("looked_full", "lookup") if work.looked_up else ("full", "partial")
    spread = {full: unit * work.full, partial: unit * work.partial, "tile": work.tiles}
    lanes = float(constants.lanes) if work.tiles else 0.0
    alone = {full: lanes * unit * work.longest, "tile": lanes}
    longer = not overlaps and total_ms(alone, constants) > total_ms(spread, constants)
    return (alone if longer else spread) | {"launch": 1.0}


def moving_terms(work: Work, tile: int = PRICED_TILE) -> Terms:
    """Terms of the row copies before and after a launch."""
    return {"moved": work.moved * tile / PRICED_TILE, "copy": float(work.copies)}


def planning_terms(program: Program, batch: int) -> Terms:
    """Terms of planning: estimates with their tokens and products, launches, slots, table entries."""
    steps = dict.fromkeys(("plan", "estimate", "token", "product", "planned", "slot", "entry", "full"), 0.0)
    for heads, products, matrices in estimates(program):
        steps["estimate"] += 1
        steps["token"] += float(heads * program.layout.length * batch)
        taken = heads * (products or 0.0) * batch
        if matrices:
            # at the rate of attention's own products, with room for what follows them
            steps["full"] += taken / PRICED_TILE**2
        else:
            steps["product"] += taken
    for launch in program.launches:
        if launch.lists_blocks:
            passes = SORTING if isinstance(launch, ResidueLaunch) else 1
            steps["planned"] += 1
            steps["slot"] += float(passes * len(launch.heads.heads) * launch.key_slots * batch)
    for group in program.groups:
        for table in group.expr.atoms(Listed):
            size = table.table_entries(program.queries.count, program.layout.length)
            steps["entry"] += float(len(group.heads) * size * batch)
    steps["plan"] = float(steps["planned"] > 0)
    return steps


def estimates(program: Program) -> list[tuple[int, float | None, bool]]:
    """For each estimate, its heads, the query-key products that it takes for one head and prompt (None: not declared),
    and whether they are products of matrices."""
    out = []
    for estimator, scope, heads in program.estimates:
        scored = getattr(estimator, "scored", None)
        view = View(program.layout, scope, program.queries, program.tile, program.heads // program.kv_heads)
        products = None if scored is None else float(scored(view))
        out.append((len(heads.real), products, bool(getattr(estimator, "matrices", False))))
    return out


# ---- milliseconds ----------------------------------------------------------------------------------------------------


def attend_ms(work: Work, constants: Constants, tile: int = PRICED_TILE, overlaps: bool = False) -> float:
    """A launch's kernel (`attend_terms`)."""
    return total_ms(attend_terms(work, constants, tile, overlaps), constants)


def moving_ms(work: Work, constants: Constants, tile: int = PRICED_TILE) -> float:
    """Copies of rows before and after a launch (`moving_terms`)."""
    return total_ms(moving_terms(work, tile), constants)


def overlaps(launch: Launch, layout: TokenLayout, constants: Constants) -> bool:
    """Whether a launch runs on a side stream, on a device that has them."""
    return constants.streams and launch.underfills(layout.length)


def cost_in_blocks(launch: Launch, layout: TokenLayout, constants: Constants) -> float:
    """A launch's expected cost for one prompt in full blocks, planning left out: what orders are weighed by."""
    work = launch.expected_work(layout, any_length=constants.any_length)
    ms = attend_ms(work, constants, overlaps=overlaps(launch, layout, constants)) + moving_ms(work, constants)
    return ms / constants.full


def host_ms(program: Program, constants: Constants) -> float:
    """Host time of a call, which overlaps with an asynchronous device."""
    steps = planning_terms(program, 1)
    return (
        constants.host * steps["plan"]
        + constants.host_estimate * steps["estimate"]
        + constants.host_launch * steps["planned"]
    )


def least_ms(constants: Constants) -> float:
    """What a call with one sparse launch takes, however little that computes."""
    return max(constants.plan + constants.planned + constants.launch, constants.host + constants.host_launch)


def expected_work(program: Program, batch: int, any_length: bool | None = None) -> dict[int, Work]:
    """Launch number -> what it is expected to do for a batch (kept with the program).

    Args:
        any_length: tokens need not fill whole tiles; as the program's constants say, if None.
    """
    any_length = program.constants.any_length if any_length is None else any_length

    def build() -> dict[int, Work]:
        launches = enumerate(program.launches)
        return {i: launch.expected_work(program.layout, program.heads, any_length) for i, launch in launches}

    return {i: work.times(batch) for i, work in program.once(("work", any_length), build).items()}


def predict(
    program: Program, constants: Constants | None = None, batch: int = 1, counted: Mapping[int, Work] | None = None
) -> Prediction:
    """Milliseconds of one call of a program.

    Args:
        constants: those that the program was built with, if None.
        batch: prompts.
        counted: launch number -> its work over the batch, where a plan's block lists are known.
    """
    constants = program.constants if constants is None else constants
    launches, dense, attend, longest = [], 0.0, 0.0, 0.0
    for number, work in sorted((counted or expected_work(program, batch, constants.any_length)).items()):
        launch = program.launches[number]
        aside = overlaps(launch, program.layout, constants)
        ms = attend_ms(work, constants, program.tile, aside)
        longest = max(longest, attend_ms(work, constants, program.tile) if aside else 0.0)
        if work.dense:
            dense += ms
        else:
            attend += ms
        launches.append(LaunchPrediction(launch.label, launch.name, work, ms, moving_ms(work, constants, program.tile)))
    attend = max(attend, longest)  # what runs on a side stream takes its time as well
    moving = float(np.sum([one.moving_ms for one in launches]))
    planning = total_ms(planning_terms(program, batch), constants)
    waiting = max(0.0, host_ms(program, constants) - planning - attend - moving - dense)
    return Prediction(attend, dense, moving, planning, waiting, tuple(launches), counted is not None, constants)
