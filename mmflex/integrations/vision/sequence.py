"""Which patches a tower's forward gets at a time, and what follows from their grid: positions, segments, windows.

All of it depends on ``grid_thw`` alone. transformers computes it in every forward, on the device, and waits for the
device several times; its towers also take it ready-made, as keyword arguments. So it is computed on the host, once for
every grid, by transformers' own functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmflex.runtime.caches import bounded
from mmflex.runtime.varlen import Segments, upload

from .families import Tower

Grid = tuple[int, int, int]
"""Frames (of ``temporal_patch_size`` pictures each), rows and columns of patches."""

READY_MADE = (
    "cu_seqlens",
    "max_seqlen",
    "position_ids",
    "window_index",
    "cu_window_seqlens",
    "max_window_seqlen",
    "interp_indices",
    "interp_weights",
)
"""Keyword arguments by which a tower's forward takes what it would else compute from the grid."""


@dataclass(frozen=True)
class Chunk:
    """Some frames of a prompt, in order.

    Attributes:
        grid: frames of the same picture together, as in ``grid_thw``.
        pictures: for each of them, its row in the whole ``grid_thw``.
        first, last: its patches in the prompt.
    """

    grid: tuple[Grid, ...]
    pictures: tuple[int, ...]
    first: int
    last: int


def frame_chunks(grid: Sequence[Grid], limit: int) -> list[Chunk]:
    """A prompt cut between frames into chunks of up to ``limit`` patches; a frame larger than that is a chunk."""
    chunks: list[Chunk] = []
    rows: list[Grid] = []
    pictures: list[int] = []
    first = last = 0

    def cut() -> None:
        nonlocal first
        if rows:
            chunks.append(Chunk(tuple(rows), tuple(pictures), first, last))
        rows.clear()
        pictures.clear()
        first = last

    for picture, (frames, height, width) in enumerate(grid):
        size = height * width
        while frames > 0:
            fitting = (limit - (last - first)) // max(size, 1)
            if fitting < 1 and rows:
                cut()
                continue
            taken = min(frames, max(fitting, 1))
            rows.append((taken, height, width))
            pictures.append(picture)
            last += taken * size
            frames -= taken
    cut()
    return chunks


@dataclass(frozen=True)
class Geometry:
    """What a tower's positions, windows and segments depend on beside the grid.

    Attributes:
        row: of `TOWERS`.
        merge: patches along each side of what becomes one token; None where images bring their own.
        window: (size in pixels, patch size in pixels), where there are windows.
        interpolation: (positions along a side, mode, whether corners are aligned), where positions are resampled.
    """

    row: Tower
    merge: int | None
    window: tuple[int, int] | None
    interpolation: tuple[int, str, bool] | None

    @classmethod
    def of(cls, module: Any, row: Tower) -> Geometry:
        """That of a tower."""
        config = module.config
        interpolation = None
        if row.interpolates:
            interpolation = (
                int(module.num_grid_per_side),
                str(module.interpolation_mode),
                bool(module.interpolation_align_corners),
            )
        return cls(
            row,
            None if row.merge_sizes else int(config.spatial_merge_size),
            (int(config.window_size), int(config.patch_size)) if row.windows else None,
            interpolation,
        )


_remembered = bounded(16)
"""`ReadyMade` by geometry and grid, up to 4 MB on the device each."""


def ready_made(
    geometry: Geometry, grid: tuple[Grid, ...], merges: tuple[int, ...], device: torch.device
) -> tuple[ReadyMade, bool]:
    """(what a tower's forward would compute from a grid, whether it was computed only now).

    Args:
        geometry: of the tower.
        grid: of the patches of one forward.
        merges: a merge size for each picture, where these bring their own.
        device: where the tower is.
    """
    key = (geometry, grid, merges, device)
    known: ReadyMade | None = _remembered.recall(key)
    if known is not None:
        return known, False
    return _remembered.keep(key, _made(geometry, grid, merges, device)), True


def _made(geometry: Geometry, grid: Sequence[Grid], merges: Sequence[int], device: torch.device) -> ReadyMade:
    from transformers import vision_utils

    thw = torch.tensor(grid, dtype=torch.int64).reshape(-1, 3)
    merge: Any = torch.tensor(merges, dtype=torch.int64) if geometry.merge is None else geometry.merge
    values: dict[str, Any] = {"position_ids": vision_utils.get_vision_position_ids(thw, merge)}
    frames = Segments(vision_utils.get_vision_cu_seqlens(thw).numpy())
    values.update(cu_seqlens=frames, max_seqlen=frames.longest)
    if geometry.window is not None:
        index, boundaries = vision_utils.get_vision_window_index(
            thw, spatial_merge_size=merge, window_size=geometry.window[0], patch_size=geometry.window[1]
        )
        windows = Segments(boundaries.numpy())
        values.update(window_index=index, cu_window_seqlens=windows, max_window_seqlen=windows.longest)
    if geometry.interpolation is not None:
        side, mode, aligned = geometry.interpolation
        values["interp_indices"], values["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            thw, num_grid_per_side=side, mode=mode, align_corners=aligned, spatial_merge_size=merge
        )
    segments = [value for value in values.values() if isinstance(value, Segments)]
    where = device if geometry.row.grid_on_device else torch.device("cpu")
    arguments = {"grid_thw": upload(thw, where)}
    if geometry.merge is None:
        arguments["merge_sizes"] = merge
    for name, value in values.items():
        if isinstance(value, Segments):
            arguments[name] = value.boundaries(device)
        else:
            arguments[name] = upload(value, device) if isinstance(value, torch.Tensor) else value
    return ReadyMade(arguments, segments)


@dataclass(frozen=True)
class ReadyMade:
    """Keyword arguments of a tower's forward, and the segments whose boundaries are among them: attention finds them
    as long as this object holds them."""

    arguments: dict[str, Any]
    segments: list[Segments]


def host_grid(grid_thw: torch.Tensor) -> list[Grid]:
    """``grid_thw [n, 3]`` on the host; waits for the device."""
    rows = np.asarray(grid_thw.tolist(), dtype=np.int64).reshape(-1, 3)
    return [(int(t), int(h), int(w)) for t, h, w in rows]
