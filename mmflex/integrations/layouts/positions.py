"""The layout from multimodal rotary positions (M-RoPE), for a language model of which nothing else can be seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mmflex.ir.layout import MODALITIES, MODALITY_NAMES, TokenLayout

from .inputs import WAY_OUT, host
from .placing import STAMP, Placed, assemble, united


def layout_from_positions(position_ids: Any, *, modality: Any = None, valid: Any = None) -> TokenLayout:
    """The layout from M-RoPE positions alone, for a language model of which nothing else can be seen.

    Args:
        position_ids: ``[3, B, N]`` (time, height, width), or ``[4, B, N]`` with the plain positions in front, as
            Qwen-VL and GLM-V pass them to their language model.
        modality: ``[B, N]`` as in ``mm_token_type_ids``. Without it, a token is visual where height or width do
            not go beyond all before, and a run with more than one time is a video (a grid of a single cell then
            passes for text, and images of one size with little text between for the frames of a video).
        valid: boolean ``[B, N]``, the attention mask. Without it every token counts.

    Within a run of visual tokens a frame starts where height and width are both minimal. Runs of one frame of equal
    size with a timestamp's worth of text between them are the frames of one video (Qwen3-VL, GLM-4.1V).

    Raises:
        ValueError: a shape other than these, or a run that is no whole number of frames.
    """
    positions = host(position_ids)
    if positions.ndim != 3 or positions.shape[0] not in (3, 4):
        raise ValueError(
            f"position_ids has shape {positions.shape}: [3, batch, tokens] or [4, batch, tokens] (M-RoPE) is needed; "
            f"for a model without, {WAY_OUT}"
        )
    time, height, width = positions[-3:]
    mask = np.ones(time.shape, bool) if valid is None else host(valid).reshape(time.shape) != 0
    kinds = None if modality is None else np.where(mask, host(modality).reshape(time.shape), 0)
    placed: list[Placed] = []
    for row in range(len(time)):
        visual = _visual(height[row], width[row], mask[row]) if kinds is None else kinds[row]
        edges = [0, *(np.flatnonzero(np.diff(visual)) + 1).tolist(), len(visual)]
        runs = [np.arange(a, b) for a, b in pairwise(edges) if b > a and visual[a]]
        found = []
        for at in runs:
            kind = int(visual[at[0]])
            if kinds is None:
                kind = MODALITIES["video" if len(np.unique(time[row, at])) > 1 else "image"]
            found.append(_framed(row, at, MODALITY_NAMES[kind], height[row], width[row]))
        placed += _stamped(found, sure=kinds is not None)
    return assemble(placed, mask)


def _visual(height: np.ndarray, width: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """0 / 1 per token. Text goes beyond every height and width before it, in both; of an image or video only the
    first cell does, and the next one tells."""

    def again(position: np.ndarray) -> np.ndarray:
        reached = np.maximum.accumulate(np.where(valid, position, -1))
        return position <= np.append(-1, reached[:-1])

    inside = (again(height) | again(width)) & valid
    visual: np.ndarray = (inside | (np.append(inside[1:], False) & valid)).astype(np.int32)
    return visual


def _framed(
    row: int, at: np.ndarray, modality: str, height: np.ndarray, width: np.ndarray
) -> tuple[Placed, tuple[int, int]]:
    """A run of visual tokens as whole frames, and their height and width in cells."""
    h, w = height[at] - height[at].min(), width[at] - width[at].min()
    tall, wide = int(h.max()) + 1, int(w.max()) + 1
    frame = np.cumsum((h == 0) & (w == 0)) - 1
    if frame[0] != 0 or len(at) != (int(frame[-1]) + 1) * tall * wide:
        raise ValueError(
            f"prompt {row}: the positions of tokens {int(at[0])} to {int(at[-1])} are no whole number of frames of "
            f"{tall} x {wide} cells ({len(at)} tokens, {int(frame[-1]) + 1} frames): {WAY_OUT}"
        )
    cells = np.stack([frame, h * wide + w], axis=1).astype(np.int32)
    return Placed(row, at, modality, cells), (tall, wide)


def _stamped(runs: Sequence[tuple[Placed, tuple[int, int]]], sure: bool) -> Iterator[Placed]:
    """Single frames of one size with timestamps between them as one video (``sure``: only what is known as video)."""
    group: list[Placed] = []
    sizes: tuple[int, int] | None = None
    for unit, size in runs:
        single = int(unit.cells[-1, 0]) == 0 and (unit.modality == "video" or not sure)
        if group and not (single and size == sizes and unit.gap(group[-1]) <= STAMP):
            yield united(group, "video")
            group = []
        group.append(unit)
        sizes = size if single else None
    if group:
        yield united(group, "video")
