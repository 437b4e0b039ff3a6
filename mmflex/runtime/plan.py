"""`Plan`: what `attention` decides before it looks at v, and attention under it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..compiler.orders import Order
from ..compiler.plan import Launch, Program
from ..ir.shown import shown
from . import backends, dense, graphs, reference, steps
from .backends import Backend
from .beside import Beside
from .inputs import check, without_autocast
from .kernels.memory import writing_to


@dataclass(eq=False)
class HeadDensity:
    """Computed over causal pairs: 1.0 is dense.

    Attributes:
        heads: float [B, Hq]. total: their mean.
    """

    heads: np.ndarray

    @property
    def total(self) -> float:
        return float(self.heads.mean()) if self.heads.size else 0.0

    def __float__(self) -> float:
        return self.total


def _query_numbers(rows: Any, queries: int) -> np.ndarray:
    """int64 [R]: numbers of queries, from 0; TypeError, ValueError for anything else."""
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise TypeError(f"rows is {shown(rows)}: give a list of query numbers, such as range(128)")
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < queries:
        raise ValueError(f"rows is {shown(rows)}: the plan has the queries 0 to {queries - 1}")
    return numbers.astype(np.int64)


def _no_sums(q: Tensor) -> Tensor:
    """float32 [B, H, M]: log-sum-exps of rows that have seen no key."""
    return torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)


def _finite(t: Tensor) -> bool:
    """Whether all of a tensor is finite. A sum is the quickest look; it may overflow, so only then every entry."""
    return bool(t.sum(dtype=torch.float32).isfinite()) or bool(t.isfinite().all())


outside_graphs = torch.compiler.disable(
    reason="planning is Python and sympy: call mmflex.attention inside of torch.compile, mmflex.plan outside"
)
"""For what torch.compile is not to trace: it would take minutes, and end in many small graphs."""

NO_BACKWARD = "mmflex.attention has no backward: it is for prefill; train with the model's own attention"


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records what is made of them."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


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
        self, program: Program, backend: Backend, scale: float, q: Tensor, k: Tensor, note: str = "", once: bool = False
    ) -> None:
        """``once``: it attends before anything else is planned with its program, whose graph may then be replayed."""
        self.program, self._backend, self.scale, self.note = program, backend, scale, note
        # Kernels take the row maximum before they scale: a scale that turns it round goes to the queries instead.
        self._scale = abs(scale) if scale else 1.0
        self.layout, self.backend = program.layout, backend.name
        self.shape = (tuple(q.shape), tuple(k.shape))
        self.state = steps.State(program, q.device, q.shape[0])
        whole = [launch.kind == "dense" and launch.heads.all(program.heads) for launch in program.launches]
        self.dense_alone = whole == [True] and not self.layout.padded
        self._kernels: dict[Any, dense.Dense] = {}
        with writing_to(graphs.inputs(self.state) if once else ()):
            for op, key in program.steps("plan"):
                if op == "estimate":
                    steps.estimate(self.state, key, q, k, scale)
        if not (once and graphs.replayed(self.state)):
            steps.after_estimates(self.state)

    @outside_graphs
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of these tensors under this plan's mask: shapes as planned."""
        if v is None:
            raise TypeError("v is None: give a tensor [batch, heads, tokens, head_dim]")
        check(q, k, v, self.program.groups[0].pattern, None)
        if q.device != self.state.device:
            raise TypeError(f"planned on {self.state.device}, q is on {q.device}: plan again, or move it with .to()")
        if (tuple(q.shape), tuple(k.shape)) != self.shape:
            raise ValueError(
                f"planned for q and k of shapes {self.shape}, got {tuple(q.shape)}, {tuple(k.shape)}: plan again"
            )
        if wants_gradient(q, k, v):
            return ForwardOnly.apply(q, k, v, self, False)[0]
        with torch.no_grad():
            return self._attend(q, k, v, False)[0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        with without_autocast(q.device):
            return self._attended(q, k, v, need_lse)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        program, state = self.program, self.state
        if q.device.type == "cpu" and not all(map(_finite, (q, k, v))):
            return self._eagerly(q, k, v, need_lse)
        if self.scale <= 0:
            q = q * (-1.0 if self.scale else 0.0)
        if self.dense_alone:
            return self._alone(q, k, v, need_lse)
        # Dense heads are never merged, so they need it only if it is asked for.
        need = need_lse or any(launch.kind == "classes" for launch in program.launches)
        out: Tensor | None = None
        lse: Tensor | None = None
        with Beside(q.device) as aside:
            launched = self._begun(aside, q, k, v, need)
            for _, number in program.steps("attend"):
                launch = program.launches[number]
                if launch.kind == "dense":
                    found, sums = self._dense(q, k, v, launch, need_lse)
                else:
                    found, sums = launched[number]()
                ordered = launch.rows.stays(self.layout, found.shape[2] == q.shape[2])
                whole = launch.kind == "dense" or (launch.kind == "main" and ordered)
                if whole and launch.heads.all(program.heads):
                    out, lse = found, sums
                    continue
                if out is None:
                    out = q.new_zeros((*q.shape[:3], v.shape[3]))
                    lse = _no_sums(q) if need else None
                steps.place(state, number, out, lse, found, sums)
        if out is None:  # nothing allows anything
            out = q.new_zeros((*q.shape[:3], v.shape[3]))
            lse = _no_sums(q)
        return out, lse if need_lse else None

    def _eagerly(self, q: Tensor, k: Tensor, v: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
        """Under the token mask itself: kernels on the CPU let what is not finite reach rows that do not see it."""

        def mask(first: int, last: int) -> Tensor:
            return self.dense_mask(range(first, last))

        out, lse = reference.in_strips(q, k, v, self.scale, mask)
        return out, lse if need else None

    def _begun(
        self, aside: Beside, q: Tensor, k: Tensor, v: Tensor, need: bool
    ) -> dict[int, Callable[[], tuple[Tensor, Tensor | None]]]:
        """Launch number -> what gives the result of a block-sparse launch. Begins what runs beside the rest: gathered
        rows, few queries that see much, which alone would leave most of the device idle."""
        out: dict[int, Callable[[], tuple[Tensor, Tensor | None]]] = {}
        for number, launch in enumerate(self.program.launches):
            if launch.kind == "dense":
                continue
            out[number] = partial(self._launch, number, q, k, v, need)
            if launch.beside(self.layout.length):
                out[number] = aside.run(out[number])
        return out

    def _given(self, number: int) -> bool:
        """Whether the kernel of a launch takes tokens as they stand, though they do not fill their slots."""
        return self._backend.any_length and bool(self.state.ready[number].mask_mod.comparison)

    def _launch(self, number: int, q: Tensor, k: Tensor, v: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
        """Runs a block-sparse launch."""
        state, given = self.state, self._given(number)
        keys, values = steps.keys(state, number, k, v, given)
        rows, ready = steps.queries(state, number, q, given), state.ready[number]
        return backends.attend(
            self._backend, rows, keys, values, ready.mask_mod, ready.lists, self.program.tile, self._scale, need
        )

    def _alone(self, q: Tensor, k: Tensor, v: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
        """All heads dense: nothing but the kernel, found once for each way that the tensors lie in memory."""
        if need or not q.is_cuda:
            return dense.dense_attention(q, k, v, self._scale, need, self.backend)
        strides = (q.stride(), k.stride(), v.stride())
        kernel = self._kernels.get(strides)
        if kernel is None:
            kernel = dense.dense_kernel(q, k, v, self._scale, self.backend)
            if len(self._kernels) < 8 and not torch.cuda.is_current_stream_capturing():  # where nothing is tried
                self._kernels[strides] = kernel
        return kernel(q, k, v, self._scale), None

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, launch: Launch, need: bool) -> tuple[Tensor, Tensor | None]:
        """SDPA for the dense heads, prompt by prompt where there is padding."""
        state, layout = self.state, self.layout
        q = steps.take_heads(q, launch.heads.heads, state)
        k, v = (steps.take_heads(t, launch.heads.kv_heads, state) for t in (k, v))
        if not layout.padded:
            return dense.dense_attention(q, k, v, self._scale, need, self.backend)
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        lse = _no_sums(q) if need else None
        for b in range(q.shape[0]):
            row = b % layout.batch_size
            valid = layout.valid[row]
            for_q = valid[layout.length - q.shape[2] :]
            at_q, at_k = (torch.tensor(np.flatnonzero(x), device=q.device) for x in (for_q, valid))
            own = [t[b : b + 1].index_select(2, at) for t, at in ((q, at_q), (k, at_k), (v, at_k))]
            found, sums = dense.dense_attention(own[0], own[1], own[2], self._scale, need, self.backend)
            out[b].index_copy_(1, at_q, found[0])
            if lse is not None and sums is not None:
                lse[b].index_copy_(1, at_q, sums[0].float())
        return out, lse

    # ---- what it is ----------------------------------------------------------------------------------------------

    def dense_mask(self, rows: Sequence[int] | None = None) -> Tensor:
        """bool [B, Hq, M, N]: the token-level mask, from the expressions alone; of some ``rows`` (query numbers) only,
        if given. For small N, or few rows: it is as large as it says."""
        program, state = self.program, self.state
        layout, m, n = program.layout, program.queries, program.layout.length
        chosen = np.arange(m) if rows is None else _query_numbers(rows, m)
        out = torch.zeros((state.batch, program.heads, len(chosen), n), dtype=torch.bool, device=state.device)
        if not len(chosen) or not n:
            return out
        batch = (layout.batch_size, 1)
        order = Order("tokens", np.tile(chosen.astype(np.int32), batch), m, 1, n - m)
        keys = Order("tokens", np.tile(np.arange(n, dtype=np.int32), batch), n, 1)
        position = torch.tensor(layout.position, device=state.device)
        row = position[:, torch.tensor(chosen + n - m, device=state.device)]
        causal = (row[:, None, :, None] >= position[:, None, None]) & (position >= 0)[:, None, None]
        for group in program.groups:
            mask = state.values([group.expr], group.heads, order, keys).of(group.expr)
            out[:, list(group.heads)] = mask & causal
        return out

    @property
    def density(self) -> HeadDensity:
        """Pairs in listed blocks over causal pairs, per head and in all (reads the block counts back)."""
        program, tile = self.program, self.program.tile
        pairs = np.zeros((self.state.batch, program.heads))
        layout, m = program.layout, program.queries
        valid = layout.position[:, layout.length - m :]
        causal = np.broadcast_to(np.where(valid >= 0, valid + 1.0, 0.0).sum(1)[:, None], (self.state.batch, 1))
        for number, launch in enumerate(program.launches):
            for i, h in enumerate(launch.heads.heads):
                if h < 0:
                    continue
                if launch.kind == "dense":
                    pairs[:, h] += causal[:, 0]
                else:
                    lists = self.state.ready[number].lists
                    pairs[:, h] += (lists[0] + lists[2])[:, i].sum(-1).cpu().numpy() * float(tile * tile)
        return HeadDensity(pairs / np.maximum(causal, 1.0))

    @property
    def block_masks(self) -> list[tuple[str, BlockMask]]:
        """(order, BlockMask) of every launch that runs FlexAttention; heads as in ``program.launches[i].heads``."""
        out = []
        for number, launch in enumerate(self.program.launches):
            if launch.kind != "dense":
                ready = self.state.ready[number]
                size = (launch.row_slots, launch.key_slots)
                out.append((launch.label, backends.block_mask(ready.mask_mod, ready.lists, self.program.tile, *size)))
        return out

    def explain(self) -> str:
        """What was decided and why: expressions, orders with the cost of the alternatives, launches, blocks."""
        from .explain import explain

        return explain(self)

    def _repr_html_(self) -> str:
        from ..plot import plan_html

        return plan_html(self)

    def __repr__(self) -> str:
        kinds = ", ".join(launch.label for launch in self.program.launches)
        return f"Plan({self.shape[0]} x {self.shape[1]}, backend={self.backend!r}, launches: {kinds})"
