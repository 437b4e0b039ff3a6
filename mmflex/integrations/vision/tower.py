"""A vision tower that runs a prompt's frames in chunks, with everything that follows from the grid ready-made."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmflex.runtime.varlen import Segments

from .families import Tower
from .sequence import READY_MADE, Geometry, frame_chunks, host_grid, ready_made

CHUNK_PATCHES = 65_536
"""Patches that a tower is given at a time: they fill a GPU, and temporaries of a tower of 1280 channels take 2 GB."""


class ChunkedTower:
    """In place of a tower's ``forward``.

    Args:
        module: the tower, a transformers model whose forward takes patches ``[T, channels]`` and ``grid_thw [n, 3]``.
        row: its row in `TOWERS`.
        limit: patches at a time.
    """

    def __init__(self, module: nn.Module, row: Tower, limit: int = CHUNK_PATCHES) -> None:
        self.module, self.row, self.limit = module, row, limit
        self.before = vars(module).get("forward")
        self.inner = module.forward
        self.names = list(inspect.signature(self.inner).parameters)
        self.patches = self.names[0]
        module.forward = self.forward  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the tower its own forward back."""
        vars(self.module).pop("forward", None)
        if self.before is not None:
            self.module.forward = self.before  # type: ignore[method-assign]

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tower's forward, same arguments and result."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        patches, grid_thw = given.get(self.patches), given.get("grid_thw")
        known = [name for name in READY_MADE if given.get(name) is not None]
        if known or patches is None or grid_thw is None:
            for name in {"cu_seqlens", "cu_window_seqlens"}.intersection(known):  # read once, not in every layer
                kwargs[name] = Segments.of(given[name]).boundaries(given[name].device)
            return self.inner(*args, **kwargs)
        grid = host_grid(grid_thw)
        chunks = frame_chunks(grid, self.limit)
        if not chunks or chunks[-1].last != len(patches):
            return self.inner(*args, **kwargs)  # patches of another number: the tower's own error says so
        merges = [int(m) for m in given["merge_sizes"].tolist()] if self.row.merge_sizes else []
        rest = {name: value for name, value in given.items() if name not in (self.patches, "grid_thw", "merge_sizes")}
        geometry, made = Geometry.of(self.module, self.row), []
        for chunk in chunks:
            of_chunk = tuple(merges[picture] for picture in chunk.pictures) if merges else ()
            made.append(ready_made(geometry, chunk.grid, of_chunk, patches.device))
        if patches.device.type == "cuda" and any(new for _, new in made):
            torch.cuda.current_stream(patches.device).synchronize()  # later calls may come on other streams
        outputs = []
        for chunk, (ready, _) in zip(chunks, made, strict=True):
            rows = patches[chunk.first : chunk.last]
            outputs.append(self.inner(**{self.patches: rows}, **ready.arguments, **rest))
        return _joined(outputs)


def _joined(outputs: Sequence[Any]) -> Any:
    """Outputs of chunks as one: tensors ``[rows, ...]`` one after the other, inside lists, tuples and model outputs."""
    first = outputs[0]
    if len(outputs) == 1 or first is None:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, dict):
        joined = copy.copy(first)
        for name in first:
            joined[name] = _joined([output[name] for output in outputs])
        return joined
    if isinstance(first, list | tuple):
        return type(first)(_joined(parts) for parts in zip(*outputs, strict=True))
    return first
