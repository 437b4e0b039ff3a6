"""What a prompt holds: its images, videos and stretches of audio, token by token, and what a rule finds them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmflex.ir.layout import Segment

from .inputs import host, shapes_of


@dataclass(frozen=True)
class Unit:
    """One image or video (or stretch of audio): what its tokens are, in order.

    Args:
        modality: "image", "video" or "audio".
        cells: int32 ``[n, 2]``, frame and cell of each token (-1 where there is none, as in `TokenLayout`).
        foreign: bool ``[n]`` or None. True for tokens with an id of their own that stand between the placeholders
            (Pixtral's break token after every row). They belong to the unit where the prompt has them.
    """

    modality: str
    cells: np.ndarray
    foreign: np.ndarray | None = None

    @property
    def placeholders(self) -> int:
        """How many placeholder tokens the unit takes."""
        return len(self.cells) if self.foreign is None else int((~self.foreign).sum())


Units = dict[str, list[Unit]]
"""The units of a batch of prompts in order, by the name of their placeholders."""


@dataclass(frozen=True)
class Batch:
    """What a rule reads: the config, the processor's output, and the placeholders' masks, bool ``[B, N]`` by name."""

    config: Any
    inputs: Mapping[str, Any]
    masks: Mapping[str, np.ndarray]

    def table(self, name: str) -> np.ndarray | None:
        """An input as an int array on the host, None where absent."""
        value = self.inputs.get(name)
        return None if value is None else host(value)

    def shapes(self, name: str) -> tuple[tuple[int, ...], ...] | None:
        """The shape of every item of an input of pixels, None where absent."""
        value = self.inputs.get(name)
        return None if value is None else shapes_of(value).shapes

    def tiles(self, name: str, size: int) -> int:
        """How many equal pieces of ``size`` tokens there are: from the placeholders of this name alone."""
        return -(-int(self.masks[name].sum()) // size) if name in self.masks else 0


def grid(modality: str, frames: int, height: int, width: int, newline: str | None = None, first: int = 0) -> np.ndarray:
    """(frame, cell) of a grid in reading order, int32 ``[n, 2]``; frames are numbered from ``first``."""
    cells = Segment(modality, frames, height, width, newline).columns(0)[:, 2:].copy()
    cells[cells[:, 0] >= 0, 0] += first
    return cells


def loose(n: int, frame: int = -1) -> np.ndarray:
    """``n`` tokens without a place of their own (a class token, a separator between two crops)."""
    cells = np.full((n, 2), -1, np.int32)
    cells[:, 0] = frame
    return cells


def placeholders_in(units: Iterable[Unit]) -> int:
    """How many placeholder tokens several units take."""
    return sum(unit.placeholders for unit in units)
