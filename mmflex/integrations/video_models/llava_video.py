"""LLaVA-Video and others on the code of LLaVA-NeXT.

A frame of P x P patches is pooled to p x p tokens: bilinear gives p = ceil(P / 2), average and max p = floor(P / 2).
``mm_newline_position`` adds newline tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from mmflex.ir.layout import Segment, TokenLayout

from ..intercept import LayoutReader
from .pieces import Image, Piece, Video, expect, joined
from .reading import JoinReader

IMAGE_TOKEN = -200
"""What stands for an image or a video among the ids."""

_NEWLINES = {"grid": "row", "frame": "frame", "one_token": "video", "no_token": None}
_POOLS = ("bilinear", "average", "max")


def llava_video_layout(
    prompt: Sequence[Piece],
    *,
    patches: int = 27,
    pooling: str = "bilinear",
    newline: str = "grid",
    merge: str = "spatial_unpad",
    length: int | None = None,
) -> TokenLayout:
    """The layout of a LLaVA-Video prompt.

    A video of T frames has T p (p + 1) tokens with newline "grid", T (p p + 1) with "frame", T p p + 1 with
    "one_token", T p p with "no_token". An image has P P + 1 tokens, or P P and h (w + 1) where it is in tiles.

    Args:
        prompt: text lengths in tokens, `Video` and `Image`, in order. A placeholder is no text.
        patches: P, patches along a side of a frame (SigLIP at 384 pixels: 27).
        pooling: ``config.mm_spatial_pool_mode``: "bilinear", "average" or "max".
        newline: ``config.mm_newline_position``: "grid", "frame", "one_token" or "no_token".
        merge: ``config.mm_patch_merge_type``; newlines are there with "unpad" in it, and none in videos with "flat".
        length: tokens of the whole prompt, to compare with.

    Raises:
        ValueError: another number of tokens than ``length``, or an unknown option.
    """
    unpad = "unpad" in merge

    def media(piece: Video | Image) -> list[Segment]:
        if isinstance(piece, Video):
            return _video(piece.frames, patches, pooling, newline, merge)
        if piece.tiles is None:
            return [Segment("image", 1, patches, patches, "video" if unpad else None)]
        whole = Segment("image", 1, patches, patches)
        return [whole, Segment("image", 1, *piece.tiles, "row" if unpad else None)]

    return joined(prompt, media, length, "LLaVA-Video")


def _video(frames: int, patches: int, pooling: str, newline: str, merge: str) -> list[Segment]:
    if pooling not in _POOLS:
        raise ValueError(f"pooling is {pooling!r}: mm_spatial_pool_mode is one of {', '.join(_POOLS)}")
    if newline not in _NEWLINES:
        raise ValueError(f"newline is {newline!r}: mm_newline_position is one of {', '.join(_NEWLINES)}")
    pooled = -(-patches // 2) if pooling == "bilinear" else patches // 2
    plain = merge == "flat" or (newline == "one_token" and "unpad" not in merge)
    return [Segment("video", frames, pooled, pooled, None if plain else _NEWLINES[newline])]


def read_llava_video(model: nn.Module) -> LayoutReader:
    """What reads the layout of a prompt while LLaVA-NeXT's code runs: ``intercept(...,
    layout=read_llava_video(model))``.

    Args:
        model: LlavaQwenForCausalLM or another with ``prepare_inputs_labels_for_multimodal``.

    Videos by the config's pooling and newlines; of an image in tiles the map is one row of tokens. Prompts that the
    formula does not give (slow-fast frames) run dense, with a warning.
    """
    return LlavaReader(model)


class LlavaReader(JoinReader):
    """Reads prompts of LLaVA-NeXT's code; see `read_llava_video`."""

    function = "prepare_inputs_labels_for_multimodal"
    result = 4

    def placeholders(self, ids: np.ndarray) -> np.ndarray:
        return ids == IMAGE_TOKEN

    def media(self, call: dict[str, Any], ids: list[np.ndarray], tokens: list[list[int]]) -> list[list[list[Segment]]]:
        images, modalities = list(call["images"]), call.get("modalities", ["image"])
        modalities = [modalities] if isinstance(modalities, str) else list(modalities)
        rows: list[list[list[Segment]]] = []
        number = 0
        for row in tokens:
            rows.append([])
            for count in row:
                video = number < len(modalities) and modalities[number] == "video"
                rows[-1].append(self.video(len(images[number]), count) if video else self.image(count))
                number += 1
            number += not row  # a prompt of text alone has one image, which is not joined
        return rows

    def video(self, frames: int, tokens: int) -> list[Segment]:
        """The segments of a video that has become so many tokens."""
        config = self.model.config
        segments = _video(
            frames,
            int(self.model.get_vision_tower().num_patches_per_side),
            getattr(config, "mm_spatial_pool_mode", "bilinear"),
            getattr(config, "mm_newline_position", "one_token"),
            getattr(config, "mm_patch_merge_type", "flat"),
        )
        return expect(segments, tokens, f"a video of {frames} frames")

    def image(self, tokens: int) -> list[Segment]:
        """The segments of an image: of its tiles nothing tells rows from columns."""
        side = int(self.model.get_vision_tower().num_patches_per_side)
        if tokens < side * side:
            return [Segment("image", 1, 1, tokens)]
        rest = tokens - side * side
        return [Segment("image", 1, side, side), *([Segment("image", 1, 1, rest)] if rest else [])]
