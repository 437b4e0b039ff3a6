"""Milliseconds of a program: the work of its launches (expected, or counted) times the constants of the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..ir import expr as x
from ..ir.pattern import View
from .constants import Constants
from .expected import Work, work

if TYPE_CHECKING:
    from ..ir.layout import TokenLayout
    from .plan import Launch, Program

MARGIN = 0.1
"""A spec runs sparse where it is predicted to take less than dense by this share: predictions are off by as much."""


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
        total_ms: the sum of the following five.
        attend_ms: block-sparse launches. dense_ms: plain attention. moving_ms: rows copied in, out, and merged.
        planning_ms: estimates, selections, block lists. waiting_ms: the host's part that nothing hides.
        launches: attending and moving, launch by launch.
        exact: from the block lists of a plan; else expected from the expressions.
        constants: what was reckoned with.
    """

    attend_ms: float
    dense_ms: float
    moving_ms: float
    planning_ms: float
    waiting_ms: float
    launches: tuple[LaunchPrediction, ...]
    exact: bool
    constants: Constants

    @property
    def total_ms(self) -> float:
        return self.attend_ms + self.dense_ms + self.moving_ms + self.planning_ms + self.waiting_ms


def attend_ms(work: Work, constants: Constants, tile: int = 128, beside: bool = False) -> float:
    """A launch's kernel: all its tiles spread over the device, or its longest query tile where that takes longer and
    nothing runs beside it."""
    if work.dense:
        return constants.dense_call + constants.dense * work.dense * (tile / 128) ** 2
    full, partial = constants.full, constants.partial
    if work.looked_up:
        full, partial = constants.looked_full, constants.lookup
    unit = (tile / 128) ** 2
    spread = unit * (work.full * full + work.partial * partial) + work.tiles * constants.tile
    alone = constants.lanes * (unit * work.longest * full + constants.tile) if work.tiles else 0.0
    return (spread if beside else max(spread, alone)) + constants.launch


def moving_ms(work: Work, constants: Constants, tile: int = 128) -> float:
    """Copies of rows before and after a launch."""
    return constants.moved * work.moved * tile / 128 + constants.copy * work.copies


def runs_beside(launch: Launch, layout: TokenLayout, constants: Constants) -> bool:
    """Whether a launch runs beside the others, on a device that can."""
    return constants.beside and launch.beside(layout.length)


def blocks(launch: Launch, layout: TokenLayout, constants: Constants) -> float:
    """A launch's expected cost for one prompt in full blocks, planning left out: what orders are weighed by."""
    expected = work(launch, layout, any_length=constants.any_length)
    return (
        attend_ms(expected, constants, beside=runs_beside(launch, layout, constants)) + moving_ms(expected, constants)
    ) / constants.full


def estimates(program: Program) -> list[tuple[int, float | None]]:
    """Of each estimate, its heads and the query-key products that it takes for one head and prompt (None: it does not
    say)."""
    found = []
    for op, key in program.graph.nodes:
        if op == "estimate":
            estimator, scope = key
            heads = sum(h >= 0 for h in program.graph.nodes[op, key]["heads"].heads)
            scored = getattr(estimator, "scored", None)
            view = View(program.layout, scope, program.queries, program.tile)
            found.append((heads, None if scored is None else float(scored(view))))
    return found


def planning_steps(program: Program, batch: int) -> dict[str, float]:
    """What planning does, by the names of the constants: estimates with their tokens and products, launches, slots,
    table entries."""
    steps = dict.fromkeys(("plan", "estimate", "token", "product", "planned", "slot", "entry"), 0.0)
    for heads, products in estimates(program):
        steps["estimate"] += 1
        steps["token"] += float(heads * program.layout.length * batch)
        steps["product"] += heads * (products or 0.0) * batch
    for launch in program.launches:
        if launch.kind != "dense":
            passes = 8 if launch.kind == "classes" else 1  # sorting by residue takes several
            steps["planned"] += 1
            steps["slot"] += float(passes * len(launch.heads.heads) * launch.key_slots * batch)
    for group in program.groups:
        for table in group.expr.atoms(x.Listed):
            rows, keys = (t.args[1] if isinstance(t, x.Tile) else 1 for t in table.args[:2])
            size = program.queries / int(rows) * program.layout.length / int(keys)
            steps["entry"] += float(len(group.heads) * size * batch)
    steps["plan"] = float(steps["planned"] > 0)
    return steps


def host_ms(program: Program, constants: Constants) -> float:
    """What the host needs for a call, beside an asynchronous device."""
    steps = planning_steps(program, 1)
    return (
        constants.host * steps["plan"]
        + constants.host_estimate * steps["estimate"]
        + constants.host_launch * steps["planned"]
    )


def least_ms(constants: Constants) -> float:
    """What a call with one sparse launch takes, however little that computes."""
    return max(constants.plan + constants.planned + constants.launch, constants.host + constants.host_launch)


def expected_work(program: Program, batch: int, any_length: bool | None = None) -> dict[int, Work]:
    """Launch number -> what it is expected to do for a batch (cached with the program). ``any_length``: tokens need not
    fill whole tiles; as the program's constants say, if None."""
    any_length = program.constants.any_length if any_length is None else any_length
    key = ("work", any_length)
    if key not in program.memo:
        program.memo[key] = {
            i: work(launch, program.layout, program.heads, any_length) for i, launch in enumerate(program.launches)
        }
    return {number: times(one, batch) for number, one in program.memo[key].items()}


def times(work: Work, batch: int) -> Work:
    """The same for several prompts."""
    full, partial, tiles, moved, dense = (
        batch * v for v in (work.full, work.partial, work.tiles, work.moved, work.dense)
    )
    return Work(full, partial, work.looked_up, tiles, work.longest, moved, work.copies, dense)


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
    for number, done in sorted((counted or expected_work(program, batch, constants.any_length)).items()):
        launch = program.launches[number]
        beside = runs_beside(launch, program.layout, constants)
        ms = attend_ms(done, constants, program.tile, beside)
        longest = max(longest, attend_ms(done, constants, program.tile) if beside else 0.0)
        dense += ms if launch.kind == "dense" else 0.0
        attend += 0.0 if launch.kind == "dense" else ms
        moving = moving_ms(done, constants, program.tile)
        launches.append(LaunchPrediction(launch.label, launch.kind, done, ms, moving))
    attend = max(attend, longest)  # what runs beside the rest takes its time as well
    moving = float(np.sum([one.moving_ms for one in launches]))
    planning = sum(getattr(constants, name) * n for name, n in planning_steps(program, batch).items())
    waiting = max(0.0, host_ms(program, constants) - planning - attend - moving - dense)
    return Prediction(attend, dense, moving, planning, waiting, tuple(launches), counted is not None, constants)
