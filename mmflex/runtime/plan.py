"""`Plan`: what `attention` decides before it looks at v, and attention under it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..compiler.orders import given_order
from ..compiler.program import Program
from ..ir.pattern import EstimateFrom
from . import backends, dense, reference, replay
from .attend import Attending
from .backends import Backend
from .device import writing_to
from .explain import explain
from .inputs import check_numbers, check_planned, without_autocast
from .planning import after_estimates
from .state import PlanState
from .verify import Verification, verify


@dataclass(eq=False)
class HeadDensity:
    """Computed pairs divided by causal pairs: 1.0 is dense.

    Attributes:
        heads: float [B, Hq]. total: their mean.
    """

    heads: np.ndarray

    @property
    def total(self) -> float:
        return float(self.heads.mean()) if self.heads.size else 0.0

    def __float__(self) -> float:
        return self.total


outside_graphs = torch.compiler.disable(
    reason="planning is Python and sympy: call mmflex.attention inside of torch.compile, mmflex.plan outside"
)
"""For what torch.compile is not to trace: it would take minutes, and end in many small graphs."""

NO_BACKWARD = "mmflex.attention has no backward: it is for prefill; train with the model's own attention"


def wants_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether autograd records what is made of them."""
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


class ForwardOnly(torch.autograd.Function):
    """Prefill has no backward: asking for one is an error instead of a silent gap in the graph."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, return_lse: bool) -> Any:
        # detached: FlexAttention refuses tensors on the CPU that ask for gradients
        return plan._attend(q.detach(), k.detach(), v.detach(), return_lse)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(NO_BACKWARD)


class Plan:
    """A planned attention: reusable for other v, or for other q and k of the same shape (with this selection).

    Attributes:
        program: launches, orders and the graph of steps.
        layout, backend, scale: as given or chosen.
        note: why it runs dense, if the cost model decided so; else "".
    """

    def __init__(
        self,
        program: Program,
        backend: Backend,
        scale: float,
        q: Tensor,
        k: Tensor,
        note: str = "",
        once: bool = False,
        estimate_from: EstimateFrom | None = None,
        v: Tensor | None = None,
    ) -> None:
        """``once``: it attends before anything else is planned with its program, whose graph may then be replayed."""
        self.program, self._backend, self.scale, self.note = program, backend, scale, note
        # Kernels take the row maximum before they scale: the sign of a scale goes to the queries instead.
        self._kernel_scale = abs(scale) if scale else 1.0
        self.layout, self.backend = program.layout, backend.name
        self.shape = (tuple(q.shape), tuple(k.shape))
        self._device_type = q.device.type
        self.state = PlanState(program, q.device, q.shape[0])
        ends = program.queries.consecutive and program.queries.end == program.layout.length
        whole = program.is_dense and any(launch.heads.all(program.heads) for launch in program.launches)
        self.dense_alone = whole and ends and not self.layout.padded
        self._kernels: dict[Any, dense.Dense] = {}
        with writing_to(replay.inputs(self.state) if once else ()):
            self.state.estimate(q, k, scale, estimate_from, v)
        if not (once and replay.replayed(self.state)):
            after_estimates(self.state)

    @outside_graphs
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of these tensors under this plan's mask: shapes as planned."""
        check_planned(q, k, v, self.program.groups[0].pattern, self.shape, self.state.device)
        if wants_gradient(q, k, v):
            return ForwardOnly.apply(q, k, v, self, False)[0]
        with torch.no_grad():
            return self._attend(q, k, v, False)[0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        if torch.is_autocast_enabled(self._device_type):
            with without_autocast(q.device):
                return self._attend(q, k, v, need_lse)
        if self._device_type == "cpu" and not all(map(_finite, (q, k, v))):
            return self._eagerly(q, k, v, need_lse)
        if self.scale <= 0:
            q = q * (-1.0 if self.scale else 0.0)
        if self.dense_alone:
            return self._dense_alone(q, k, v, need_lse)
        return Attending(self.state, self._backend, q, k, v, self._kernel_scale, need_lse).run()

    def list_kernels(self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> None:
        """Goes through attention's launches on meta tensors, within `kernels.listing`."""
        Attending(self.state, self._backend, q, k, v, self._kernel_scale, need_lse).run()

    def _dense_alone(self, q: Tensor, k: Tensor, v: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
        """All heads dense: nothing but the kernel, chosen once for each way that the tensors lie in memory."""
        scale, strides = self._kernel_scale, (q.stride(), k.stride(), v.stride())
        kernel = None if need else self._kernels.get(strides)
        if kernel is None:
            if need or not q.is_cuda or not q.shape[2]:
                return dense.dense_attention(q, k, v, scale, need, self.backend)
            kernel = dense.dense_kernel(q, k, v, scale, self.backend)
            if len(self._kernels) < 8 and not torch.cuda.is_current_stream_capturing():  # where nothing is tried
                self._kernels[strides] = kernel
        return kernel(q, k, v, scale), None

    def _eagerly(self, q: Tensor, k: Tensor, v: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
        """Under the token mask itself: CPU kernels let non-finite values reach rows that do not see them."""

        def mask(first: int, last: int) -> Tensor:
            return self.dense_mask(range(first, last))

        out, lse = reference.in_strips(q, k, v, self.scale, mask)
        return out, lse if need else None

    # ---- what it is ------------------------------------------------------------------------------------------------

    def dense_mask(
        self, rows: Sequence[int] | None = None, heads: Sequence[int] | None = None, keys: int | None = None
    ) -> Tensor:
        """bool [B, Hq, M, N]: the token-level mask, from the expressions alone; of some ``rows`` (query numbers), query
        ``heads`` and the first ``keys`` tokens only, if given. For small N, or few rows: it is as large as it says."""
        program, state = self.program, self.state
        layout, queries = program.layout, program.queries
        n = layout.length if keys is None else keys
        if not 0 <= n <= layout.length:
            raise ValueError(f"keys is {n}: use a number of tokens from 0 to {layout.length}")
        chosen = np.arange(queries.count) if rows is None else check_numbers(rows, "rows", "queries", queries.count)
        asked = list(range(program.heads))
        if heads is not None:
            asked = check_numbers(heads, "heads", "heads", program.heads).tolist()
        out = torch.zeros((state.batch, len(asked), len(chosen), n), dtype=torch.bool, device=state.device)
        if not len(chosen) or not n:
            return out
        order = given_order(chosen, queries.count, layout.batch_size, queries)
        seen = given_order(np.arange(n), layout.length, layout.batch_size)
        position = torch.tensor(layout.position, device=state.device)
        row = position[:, torch.tensor(queries.numbers[chosen], dtype=torch.int64, device=state.device)]
        position = position[:, :n]
        causal = (row[:, None, :, None] >= position[:, None, None]) & (position >= 0)[:, None, None]
        for group in program.groups:
            own = tuple(h for h in asked if h in group.heads)
            if own:
                mask = state.values([group.expr], own, order, seen).of(group.expr)
                out[:, [asked.index(h) for h in own]] = mask & causal
        return out

    def verify(self, q: Tensor, k: Tensor, v: Tensor, rows: int = 64, seed: int = 0, lse: bool = False) -> Verification:
        """Whether this plan computes what its spec means, on samples, at any length.

        Recomputes ``rows`` query rows of every head in float64 under the token mask (which follows from the patterns'
        expressions and selected sets, never from block lists), and counts the pairs that ``rows`` query tiles compute,
        dealt out over heads and launches: each allowed pair once, no other. At 1M tokens it takes about 2 GB.

        Args:
            q, k, v: as planned, all finite.
            seed: of what is sampled. lse: check the log-sum-exp as well.

        Returns:
            The greatest errors, and how much was looked at.

        Raises:
            VerificationError: an error above rounding, or a pair that is not computed as allowed; it says which.
            ValueError, TypeError: tensors that the plan was not made for.
        """
        if lse and not self._backend.lse:
            raise ValueError(f"lse: backend {self.backend!r} returns no log-sum-exp; verify without")
        return verify(self, q, k, v, rows, seed, lse)

    @property
    def density(self) -> HeadDensity:
        """Pairs in listed blocks over causal pairs, per head and in all (reads the block counts back)."""
        program, tile = self.program, self.program.tile
        pairs = np.zeros((self.state.batch, program.heads))
        valid = program.queries.take(program.layout.position)
        causal = np.broadcast_to(np.where(valid >= 0, valid + 1.0, 0.0).sum(1)[:, None], (self.state.batch, 1))
        for number, launch in enumerate(program.launches):
            for i, h in enumerate(launch.heads.heads):
                if h < 0:
                    continue
                if not launch.lists_blocks:
                    pairs[:, h] += causal[:, 0]
                else:
                    lists = self.state.prepared[number].lists
                    pairs[:, h] += (lists.partial_count + lists.full_count)[:, i].sum(-1).cpu().numpy() * float(
                        tile * tile
                    )
        return HeadDensity(pairs / np.maximum(causal, 1.0))

    @property
    def block_masks(self) -> list[tuple[str, BlockMask]]:
        """(order, BlockMask) of every launch that runs FlexAttention; heads as in ``program.launches[i].heads``."""
        out = []
        for number, launch in enumerate(self.program.launches):
            if launch.lists_blocks:
                prepared = self.state.prepared[number]
                size = (launch.row_slots, launch.key_slots)
                mask = backends.block_mask(prepared.mask_mod, prepared.lists, self.program.tile, *size)
                out.append((launch.label, mask))
        return out

    @property
    def selections(self) -> dict[str, Tensor]:
        """What patterns have chosen, by name: sets as bool [B, H, keys] or [B, H, blocks, blocks], numbers as int [B,
        H], for the heads that have the pattern."""
        return self.state.selections

    def explain(self) -> str:
        """What was decided and why: expressions, orders with the cost of the alternatives, launches, blocks, steps."""
        heads = self.density.heads
        return explain(self.program, self.state.prepared, heads, self.shape, self.backend, self.note)

    def __repr__(self) -> str:
        kinds = ", ".join(launch.label for launch in self.program.launches)
        return f"Plan({self.shape[0]} x {self.shape[1]}, backend={self.backend!r}, launches: {kinds})"


def _finite(t: Tensor) -> bool:
    """Whether all of a tensor is finite. A sum is the quickest look; it may overflow, so only then every entry."""
    return math.isfinite(t.sum(dtype=torch.float32).item()) or bool(t.isfinite().all())
