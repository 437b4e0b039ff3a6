"""`DenseLaunch`: heads that see every key before them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...compiler.launches import DenseLaunch
from .. import dense
from ..state import PlanState, PreparedLaunch, put_heads, take_heads
from .base import Execution


class DenseExecution(Execution[DenseLaunch]):
    def attend(
        self,
        state: PlanState,
        launch: DenseLaunch,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, H, M, D] of its heads, prompt by prompt where there is padding, run by run where queries are not one."""
        layout, queries = state.program.layout, state.program.queries
        q = take_heads(q, launch.heads.heads, state.device)
        k, v = (take_heads(t, launch.heads.kv_heads, state.device) for t in (k, v))
        if queries.consecutive and not layout.padded:
            return dense.dense_attention(q, k[:, :, : queries.end], v[:, :, : queries.end], scale, lse, backend)
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        sums = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device) if lse else None
        row = 0
        for first, end in queries.runs:
            rows = slice(row, row + end - first)
            row = rows.stop
            if not layout.padded:
                part = dense.dense_attention(q[:, :, rows], k[:, :, :end], v[:, :, :end], scale, lse, backend)
                out[:, :, rows] = part[0]
                if sums is not None and part[1] is not None:
                    sums[:, :, rows] = part[1]
                continue
            for b in range(q.shape[0]):
                valid = layout.valid[b % layout.batch_size]
                index_q = _indices(np.flatnonzero(valid[first:end]) + rows.start, q.device)
                index_k = _indices(np.flatnonzero(valid[:end]), q.device)
                pairs = ((q, index_q), (k, index_k), (v, index_k))
                own = [t[b : b + 1].index_select(2, index) for t, index in pairs]
                part = dense.dense_attention(own[0], own[1], own[2], scale, lse, backend)
                out[b].index_copy_(1, index_q, part[0][0])
                if sums is not None and part[1] is not None:
                    sums[b].index_copy_(1, index_q, part[1][0].float())
        return out, sums

    def covers(self, state: PlanState, launch: DenseLaunch, slots: int, queries: int) -> bool:
        return launch.heads.all(state.program.heads)

    def merge(
        self,
        state: PlanState,
        launch: DenseLaunch,
        prepared: PreparedLaunch | None,
        out: Tensor,
        lse: Tensor | None,
        result: Tensor,
        sums: Tensor | None,
    ) -> None:
        real = tuple(i for i, h in enumerate(launch.heads.heads) if h >= 0)
        put_heads(state, launch.heads.real, take_heads(result, real, state.device), out)
        if lse is not None and sums is not None:
            put_heads(state, launch.heads.real, take_heads(sums, real, state.device), lse)


def _indices(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)
