"""LongVILA, VILA and NVILA: every frame's tokens and a newline token.

The projector halves the sides of a frame's P x P patches (odd ones padded): LongVILA's 384 pixels give 14 x 14 tokens
and 197 with the newline, 448 pixels 16 x 16 and 257. Videos are handed on as a placeholder per frame, or whole to a
video encoder, which pools at several sizes in `TSPVideoEncoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from torch import nn

from mmflex.ir.layout import Segment, TokenLayout

from ..intercept import LayoutReader
from .pieces import Image, Piece, Video, expect, joined
from .reading import JoinReader

Pool = tuple[int, int, int]
"""What one pass of `TSPVideoEncoder` averages over: frames, rows and columns."""


def longvila_layout(
    prompt: Sequence[Piece],
    *,
    side: int = 14,
    end: int = 1,
    start: int = 0,
    pools: Sequence[Pool] = ((1, 1, 1),),
    separator: int = 0,
    length: int | None = None,
) -> TokenLayout:
    """The layout of a prompt of LongVILA, VILA or NVILA.

    A video of T frames has T (start + side side + end) tokens: per pool (a, b, c), T / a frames of side / b rows and
    side / c columns, and a separator.

    Args:
        prompt: text lengths in tokens, `Video` and `Image`, in order. A placeholder is no text.
        side: tokens along a side of a frame, behind the projector: 14 for LongVILA, 16 at 448 pixels, 11 with the
            projector "mlp_downsample_3x3_fix" there.
        end: tokens behind every frame and image, ``end_tokens`` of the encoder: 1, or 0 for none.
        start: tokens in front of every frame, ``start_tokens``.
        pools: ``pool_sizes`` of a `TSPVideoEncoder`.
        separator: tokens behind every pool, its ``sep_tokens``.
        length: tokens of the whole prompt, to compare with.

    Raises:
        ValueError: another number of tokens than ``length``, sides or frames that the pools do not divide.
    """

    def media(piece: Video | Image) -> list[Segment]:
        if isinstance(piece, Video):
            return _video(piece.frames, side, start, end, pools, separator)
        if piece.tiles is not None:
            raise ValueError("VILA hands on an image's tiles as images of their own: give an Image() for each")
        return _frames("image", 1, side, side, start, end)

    return joined(prompt, media, length, "LongVILA")


def _frames(modality: str, frames: int, height: int, width: int, start: int, end: int) -> list[Segment]:
    if end not in (0, 1):
        raise ValueError(f"end is {end}: the layout of more than one token behind a frame is not known")
    return [Segment(modality, frames, height, width, "frame" if end else None, start)]


def _video(frames: int, side: int, start: int, end: int, pools: Sequence[Pool], separator: int) -> list[Segment]:
    segments = []
    for pool in pools:
        if frames % pool[0] or side % pool[1] or side % pool[2]:
            raise ValueError(
                f"{frames} frames of {side} x {side} tokens cannot be pooled by {tuple(pool)}: they must divide"
            )
        segments += _frames("video", frames // pool[0], side // pool[1], side // pool[2], start, end)
        segments += [Segment("text", width=separator)] if separator else []
    return segments


def read_longvila(model: nn.Module) -> LayoutReader:
    """What reads the layout of a prompt while VILA's code runs: ``intercept(..., layout=read_longvila(model))``.

    Args:
        model: LlavaLlamaModel or another with ``_embed``, ``encoders`` and a tokenizer with ``media_token_ids``.

    Images side by side are the frames of one video: so VILA's loader hands on videos.
    """
    return VilaReader(model)


class VilaReader(JoinReader):
    """Reads prompts of VILA's code; see `read_longvila`."""

    function = "_embed"
    result = 0

    @property
    def side(self) -> str:
        return str(self.model.tokenizer.padding_side)

    def placeholders(self, ids: np.ndarray) -> np.ndarray:
        return np.isin(ids, list(self.model.tokenizer.media_token_ids.values()))

    def media(self, call: dict[str, Any], ids: list[np.ndarray], tokens: list[list[int]]) -> list[list[list[Segment]]]:
        names = {number: name for name, number in self.model.tokenizer.media_token_ids.items()}
        videos = iter(call["media"].get("video", ()))
        rows = []
        for row, counts in zip(ids, tokens, strict=True):
            places = np.flatnonzero(self.placeholders(row))
            media: list[list[Segment]] = []
            # A run: placeholders side by side that have become equally many tokens.
            items = [(place - n, names[int(row[place])], counts[n]) for n, place in enumerate(places.tolist())]
            for (_, name, count), run in groupby(items):
                number = len(list(run))
                if name == "video":
                    media += [self.video(len(next(videos)), count) for _ in range(number)]
                else:
                    # The placeholders behind the first of a video have no segment of their own.
                    media += [self.images(number, count), *([] for _ in range(number - 1))]
            rows.append(media)
        return rows

    def video(self, frames: int, tokens: int) -> list[Segment]:
        """The segments of a video that its encoder has made so many tokens of."""
        encoder = self.model.encoders["video"]
        start, end, separator = (self._length(encoder, name) for name in ("start_tokens", "end_tokens", "sep_tokens"))
        pools = getattr(encoder, "pool_sizes", ((1, 1, 1),))
        # tokens = sum over pools (a, b, c) of T / a (side / b side / c + start + end) + separator
        ends = sum(frames // a * (start + end) + separator for a, _, _ in pools)
        side = round(max(0.0, (tokens - ends) / sum(frames / a / b / c for a, b, c in pools)) ** 0.5)
        return expect(_video(frames, side, start, end, pools, separator), tokens, f"a video of {frames} frames")

    def images(self, number: int, tokens: int) -> list[Segment]:
        """The segments of so many images side by side, of so many tokens each."""
        encoder = self.model.encoders["image"]
        start, end = self._length(encoder, "start_tokens"), self._length(encoder, "end_tokens")
        side = round(max(0, tokens - start - end) ** 0.5)
        segments = _frames("video" if number > 1 else "image", number, side, side, start, end)
        return expect(segments, number * tokens, f"{number} images")

    def _length(self, encoder: Any, name: str) -> int:
        text = getattr(encoder, name, None)
        return 0 if text is None else len(self.model.tokenizer(text).input_ids)
