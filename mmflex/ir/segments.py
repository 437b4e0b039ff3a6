"""The segments of a prompt: runs of text, images, videos and audio, with their sizes in tokens."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .shown import shown

MODALITIES = {"text": 0, "image": 1, "video": 2, "audio": 3}
"""Modality names and their ids, as transformers uses them in ``mm_token_type_ids``."""

MODALITY_NAMES = {number: name for name, number in MODALITIES.items()}

_SIZES = {
    MODALITIES["text"]: (1, "the size of text is a number of tokens", '("text", 40)'),
    MODALITIES["image"]: (2, "the size of an image is (height, width) in tokens", '("image", (24, 24))'),
    MODALITIES["video"]: (3, "the size of a video is (frames, height, width) in tokens", '("video", (8, 16, 16))'),
    MODALITIES["audio"]: (1, "the size of audio is a number of tokens", '("audio", 40)'),
}
"""How many numbers the size of a segment given as a tuple has, in words, and an example."""

LONGEST_PROMPT = 1 << 28
"""Tokens of a prompt, at most: positions, and small multiples of them, are int32 in the kernels."""


def modality_id(modality: str | int) -> int:
    """The id of a modality given by name or id; ValueError names the known ones."""
    if isinstance(modality, str) and modality in MODALITIES:
        return MODALITIES[modality]
    if isinstance(modality, int) and not isinstance(modality, bool) and modality in MODALITY_NAMES:
        return modality
    raise ValueError(
        f"unknown modality {shown(modality)}: use one of {sorted(MODALITIES)} or an id of {sorted(MODALITY_NAMES)}"
    )


@dataclass(frozen=True)
class Segment:
    """One piece of a prompt, in prompt order.

    Args:
        modality: "text", "image", "video" or "audio".
        frames, height, width: tokens (after any spatial merge). Text and audio use ``width`` alone.
        newline: where a model adds one separator token: None, "row", "frame" or "video" (once at the end). A
            separator belongs to the segment; those of rows and frames have a cell of their own in every frame.
        timestamps: text tokens in front of every frame, one number or one per frame (Qwen3-VL, GLM-4.1V). They are
            text, so the frames become separate runs of one segment.

    Raises:
        ValueError: sizes that are no numbers of tokens, or newlines and timestamps where there are no frames.
    """

    modality: str
    frames: int = 1
    height: int = 1
    width: int = 1
    newline: str | None = None
    timestamps: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        kind = modality_id(self.modality)
        for name in ("frames", "height", "width"):
            object.__setattr__(self, name, count_of(getattr(self, name), f"a segment's {name}"))
        if self.newline not in (None, "row", "frame", "video"):
            raise ValueError(f"newline is None, 'row', 'frame' or 'video', got {shown(self.newline)}")
        each = isinstance(self.timestamps, Sequence)
        if each and len(self.timestamps) != self.frames:  # type: ignore[arg-type]
            raise ValueError(
                f"timestamps names {len(self.timestamps)} lengths for {self.frames} frames: "  # type: ignore[arg-type]
                "give one number or one per frame"
            )
        stamps = tuple(count_of(n, "a timestamp") for n in (self.timestamps if each else (self.timestamps,)))  # type: ignore[union-attr]
        object.__setattr__(self, "timestamps", stamps if each else stamps[0])
        if kind in (MODALITIES["text"], MODALITIES["audio"]) and (self.newline is not None or any(stamps)):
            raise ValueError(
                f"newline={self.newline!r} and timestamps={shown(self.timestamps)} belong to the frames of images and "
                f"videos, and {MODALITY_NAMES[kind]} has none: leave them out"
            )

    @property
    def tokens(self) -> int:
        """How many tokens it is, separators and timestamps included."""
        stamps = self.timestamps * self.frames if isinstance(self.timestamps, int) else sum(self.timestamps)
        separators = {"row": self.height * self.frames, "frame": self.frames, "video": 1}.get(self.newline or "", 0)
        return self.frames * self.height * self.width + separators + stamps

    @classmethod
    def of(cls, item: Segment | Sequence[Any]) -> Segment:
        """A Segment from ``(modality, size)`` or ``(modality, size, options)``. The size of text and audio is a number
        of tokens, that of an image ``(height, width)`` or ``(1, height, width)``, that of a video ``(frames, height,
        width)``.

        Raises:
            ValueError: another form, or what `Segment` refuses.
        """
        if isinstance(item, Segment):
            return item
        if isinstance(item, str) or not isinstance(item, Sequence) or len(item) not in (2, 3):
            raise ValueError(
                f"a segment is (modality, size) or (modality, size, options), got {shown(item)}: give a list of those; "
                'the size of a video is a tuple too, ("video", (8, 16, 16))'
            )
        modality, size, *rest = item
        options = rest[0] if rest else {}
        if not isinstance(options, Mapping) or set(options) - {"newline", "timestamps"}:
            raise ValueError(
                f'the third item of a segment is {shown(options)}: use {{"newline": "row", "frame" or "video"}} and '
                '{"timestamps": number}'
            )
        kind = modality_id(modality)
        numbers, words, example = _SIZES[kind]
        try:
            each = size if isinstance(size, Sequence) else (size,)
            sizes: tuple[Any, ...] = tuple(map(operator.index, each))
        except TypeError:
            raise ValueError(f"a segment's size is in whole tokens, got {shown(size)}") from None
        image = kind == MODALITIES["image"]
        in_full = image and len(sizes) == 3 and sizes[0] == 1  # processors write the grid of an image as (1, h, w)
        if len(sizes) != numbers and not in_full:
            tiles = ', and the tiles of one image as Segment("image", frames, height, width)' if image else ""
            raise ValueError(f"{words}, got {shown(size)}: give it as {example}{tiles}")
        names = ("frames", "height", "width")[3 - len(sizes) :]
        return cls(modality, **dict(zip(names, sizes, strict=True)), **options)

    def columns(self, number: int) -> np.ndarray:
        """Rows of (modality, segment, frame, cell), int32 [tokens, 4]."""
        kind = modality_id(self.modality)
        if kind in (MODALITIES["text"], MODALITIES["audio"]):
            return np.tile(np.array([kind, number, -1, -1], np.int32), (self.frames * self.height * self.width, 1))
        cells = self.height * (self.width + (self.newline == "row")) + (self.newline == "frame")
        if not cells and not self.timestamps:  # any number of frames of nothing
            return np.array([[kind, number, -1, -1]] * self.tokens, np.int32).reshape(-1, 4)
        stamps = (self.timestamps,) * self.frames if isinstance(self.timestamps, int) else self.timestamps
        parts = []
        for frame, stamp in enumerate(stamps):
            parts.append(np.tile(np.array([MODALITIES["text"], number, -1, -1], np.int32), (stamp, 1)))
            block = np.empty((cells, 4), np.int32)
            block[:, 0], block[:, 1], block[:, 2], block[:, 3] = kind, number, frame, np.arange(cells)
            parts.append(block)
        if self.newline == "video":
            parts.append(np.array([[kind, number, -1, -1]], np.int32))
        return np.concatenate(parts) if parts else np.empty((0, 4), np.int32)


def count_of(value: Any, what: str) -> int:
    """A number of tokens."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{what} is in whole tokens, got {shown(value)}") from None
    if number < 0:
        raise ValueError(f"{what} is a number of tokens, got {shown(value)}: use 0 or more")
    return number


def check_length(tokens: int) -> None:
    if tokens > LONGEST_PROMPT:
        raise ValueError(f"a prompt of {shown(tokens)} tokens: at most {LONGEST_PROMPT} are supported")
