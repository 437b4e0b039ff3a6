"""The token mask of a plan, from its expressions and what was selected: no orders, no block lists, no kernels."""

from __future__ import annotations

import numpy as np
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ..compiler.orders import Order
from .steps import State


class TokenMask:
    """Rows of the mask of a planned state, causality and padding included.

    Args:
        state: after planning, so that all sets and numbers are known.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        layout = state.program.layout
        number = np.arange(layout.length, dtype=np.int32)
        self._keys = Order("tokens", np.tile(number, (layout.batch_size, 1)), layout.length, 1)
        self._position = torch.as_tensor(layout.position).to(state.device)

    def rows(self, expr: Boolean, heads: tuple[int, ...], queries: np.ndarray) -> Tensor:
        """bool [B, heads, queries, N]: the keys that some queries (numbers below M) of some heads see, all of
        them with the expression ``expr``. Broadcastable: B and heads are 1 where all are alike."""
        program = self.state.program
        layout, m = program.layout, program.queries
        first = layout.length - m
        index = np.tile(queries.astype(np.int32), (layout.batch_size, 1))
        mask = self.state.values([expr], heads, Order("tokens", index, m, 1, first), self._keys).of(expr)
        row = self._position[:, torch.as_tensor(queries + first).to(self.state.device)]
        key = self._position[:, None, None]
        return mask & (row[:, None, :, None] >= key) & (key >= 0)
