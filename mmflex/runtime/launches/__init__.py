"""How each kind of launch is planned, fed and put into the output: one module a kind."""

from __future__ import annotations

from typing import Any

from ...compiler.launches import BlockLaunch, DenseLaunch, GatheredRows, Launch, ResidueLaunch
from .base import Execution
from .blocks import BlockExecution
from .dense import DenseExecution
from .residue import ResidueExecution
from .rows import RowsExecution

__all__ = ["BlockExecution", "DenseExecution", "Execution", "execution"]

_EXECUTIONS: dict[type[Launch], Execution[Any]] = {
    BlockLaunch: BlockExecution(),
    GatheredRows: RowsExecution(),
    ResidueLaunch: ResidueExecution(),
    DenseLaunch: DenseExecution(),
}


def execution(launch: Launch) -> Execution[Any]:
    """What runs launches of this kind."""
    return _EXECUTIONS[type(launch)]
