"""Prompts as their authors' code joins them: text, videos and images in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmflex.ir.layout import Segment, TokenLayout


@dataclass(frozen=True)
class Video:
    """A video of a prompt: how many frames the vision tower was given."""

    frames: int


@dataclass(frozen=True)
class Image:
    """An image of a prompt.

    Args:
        tiles: of an image in tiles, rows and columns of the map that they form behind the small whole image, in tokens,
            newlines not counted; None for an image without tiles.
    """

    tiles: tuple[int, int] | None = None


Piece = int | Video | Image
"""A number of text tokens, a video or an image."""


def joined(
    prompt: Sequence[Piece],
    media: Callable[[Video | Image], list[Segment]],
    length: int | None,
    family: str,
) -> TokenLayout:
    """The layout of pieces one after the other.

    Args:
        prompt: the pieces. media: the segments of a video or an image.
        length: tokens of the prompt that the model sees, to compare with.

    Raises:
        ValueError: the pieces have another number of tokens than ``length``; says how many each has.
    """
    segments: list[Segment] = []
    counts: list[str] = []
    for piece in prompt:
        if not isinstance(piece, (int, Video, Image)) or isinstance(piece, bool):
            raise TypeError(f"{family}: {piece!r} in a prompt: give numbers of text tokens, Video(...) and Image(...)")
        if isinstance(piece, Video) and piece.frames < 1:
            raise ValueError(f"{family}: a video has 1 frame or more, got {piece.frames}")
        parts = [Segment("text", width=piece)] if isinstance(piece, int) else media(piece)
        segments += parts
        tokens = tokens_of(parts)
        counts.append(f"text {tokens}" if isinstance(piece, int) else f"{piece} {tokens}")
    layout = TokenLayout.from_segments(segments)
    if length is not None and layout.length != length:
        raise ValueError(
            f"{family}: the pieces have {layout.length} tokens but the prompt {length} ({', '.join(counts)}): check "
            "the text lengths (a placeholder is no text), the number of frames and the model's config"
        )
    return layout


def tokens_of(segments: Sequence[Segment]) -> int:
    """How many tokens several segments have."""
    return sum(len(segment.columns(0)) for segment in segments)


def expect(segments: list[Segment], tokens: int, what: str) -> list[Segment]:
    """The segments; ValueError unless they have so many tokens."""
    if tokens_of(segments) != tokens:
        raise ValueError(
            f"{what} has become {tokens} tokens but by the model's config it has {tokens_of(segments)}: this "
            "checkpoint's code builds prompts otherwise; give its layout yourself"
        )
    return segments
