"""Attending under a plan: the steps from k and v in slots to the output, in the order of the program's graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..compiler.graph import Step
from . import backends
from .backends import Backend
from .kernels import listing
from .launches import execution
from .state import PlanState
from .streams import SideStream


class Attending:
    """One attention of q, k and v under what a plan has prepared.

    Args:
        scale: positive. lse: whether the log-sum-exp is asked for.
    """

    def __init__(
        self, state: PlanState, backend: Backend, q: Tensor, k: Tensor, v: Tensor, scale: float, lse: bool
    ) -> None:
        self.state, self.backend, self.scale, self.lse = state, backend, scale, lse
        self.q, self.k, self.v = q, k, v
        self.launches, self.graph = state.program.launches, state.program.graph
        # Dense heads are never merged, so they need it only if it is asked for.
        self.merging = lse or any(launch.merges for launch in self.launches)
        self.results: dict[Step, Any] = {}
        self.users = dict(self.graph.users)
        self.out: Tensor | None = None
        self.sums: Tensor | None = None

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Output [B, Hq, M, Dv], and log-sum-exp float32 [B, Hq, M] if asked for."""
        waits: dict[Step, Callable[[], Any]] = {}
        with SideStream(self.q.device) as side:
            for stream, group in groupby(self.graph.attending, self.graph.stream):
                steps = tuple(group)
                if stream == "side":
                    wait = side.run(partial(self._do_all, steps))
                    waits.update(dict.fromkeys(steps, wait))
                    continue
                for step in steps:
                    for needed in self.graph.needs(step):
                        if needed in waits:
                            waits.pop(needed)()
                    self._do(step)
        if self.out is None:  # no launches: no head sees a key
            self._begin_output()
        assert self.out is not None
        return self.out, self.sums if self.lse else None

    def _do_all(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            self._do(step)

    def _do(self, step: Step) -> None:
        """One step; lets results go that nothing needs any more."""
        self.results[step] = getattr(self, f"_{step.op}")(step)
        for needed in self.graph.needs(step):
            self.users[needed] -= 1
            if not self.users[needed]:
                self.results.pop(needed, None)

    def _any_length(self, number: int) -> bool:
        """Whether the kernel of a launch takes tokens as they stand, though they do not fill their slots."""
        return self.backend.any_length and self.launches[number].compares

    def _keys(self, step: Step) -> tuple[Tensor, Tensor]:
        number = self.graph.launch_of_keys(step)
        launch, prepared = self.launches[number], self.state.prepared[number]
        return execution(launch).keys(self.state, launch, prepared, self.k, self.v, self._any_length(number))

    def _queries(self, step: Step) -> Tensor:
        launch, prepared = self.launches[step.of], self.state.prepared[step.of]
        return execution(launch).queries(self.state, launch, prepared, self.q, self._any_length(step.of))

    def _attend(self, step: Step) -> tuple[Tensor, Tensor | None]:
        launch = self.launches[step.of]
        run = execution(launch)
        if not launch.lists_blocks:
            if listing.current() is not None:  # PyTorch's kernels are not ours to list
                shape = (self.q.shape[0], len(launch.heads.heads), self.q.shape[2])
                return self.q.new_empty((*shape, self.v.shape[3])), self.q.new_empty(shape, dtype=torch.float32)
            return run.attend(self.state, launch, self.q, self.k, self.v, self.scale, self.lse, self.backend.name)
        keys, values = self.results[Step("keys", self.graph.keys_of(step.of))]
        prepared, rows = self.state.prepared[step.of], self.results[Step("queries", step.of)]
        masked = (prepared.mask_mod, prepared.lists, self.state.program.tile)
        return backends.attend(self.backend, rows, keys, values, *masked, self.scale, self.merging)

    def _merge(self, step: Step) -> None:
        launch, (result, sums) = self.launches[step.of], self.results[Step("attend", step.of)]
        run = execution(launch)
        if self.out is None and run.covers(self.state, launch, result.shape[2], self.q.shape[2]):
            self.out, self.sums = result, sums
            return
        if self.out is None:
            self._begin_output()
        assert self.out is not None
        prepared = self.state.prepared.get(step.of)
        run.merge(self.state, launch, prepared, self.out, self.sums, result, sums)

    def _begin_output(self) -> None:
        """An output in which no row sees a key."""
        shape, width = self.q.shape[:3], self.v.shape[3]
        if width == self.q.shape[3]:
            self.out = torch.zeros_like(self.q)  # as q lies in memory: heads or tokens first
        else:
            self.out = self.q.new_zeros((*shape, width))
        self.sums = (
            torch.full(shape, float("-inf"), dtype=torch.float32, device=self.q.device) if self.merging else None
        )
