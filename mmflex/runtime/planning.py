"""The planning steps of a program on tensors, in the order of its graph."""

from __future__ import annotations

from .launches import execution
from .state import PlanState


def after_estimates(state: PlanState) -> None:
    """Selecting, gathering and listing."""
    for step in state.program.graph.planning:
        if step.op == "select":
            state.select(step.of)
    prepare(state)


def prepare(state: PlanState) -> None:
    """Gathering and listing, once everything is selected."""
    for step in state.program.graph.planning:
        if step.op == "gather":
            launch = state.program.launches[step.of]
            state.gathered[step.of] = execution(launch).gather(state, launch)
        elif step.op == "list":
            launch = state.program.launches[step.of]
            state.prepared[step.of] = execution(launch).list(state, launch, state.gathered.pop(step.of))
