"""VideoChat-Flash: clips of four frames, whose tokens are merged together into 64.

Merged tokens mix the frames of their clip and have no rows and columns, so the clip is the unit that others call a
frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from mmflex.ir.layout import Segment, TokenLayout

from ..intercept import LayoutReader
from .llava_video import LlavaReader
from .pieces import Image, Piece, Video, expect, joined, tokens_of

_NEWLINES = {"nothing": None, "frame": "frame", "one_token": "video"}


def videochat_flash_layout(
    prompt: Sequence[Piece],
    *,
    frames_per_clip: int = 4,
    tokens_per_clip: int = 64,
    tokens_per_image: int = 64,
    newline: str = "nothing",
    length: int | None = None,
) -> TokenLayout:
    """The layout of a VideoChat-Flash prompt, before its language model drops any tokens.

    A video of T frames has T / 4 clips of 64 tokens, one more per clip with newline "frame", one more at the end with
    "one_token". Its units ("frames" of the layout) are the clips.

    Args:
        prompt: text lengths in tokens, `Video` and `Image`, in order. A placeholder is no text.
        frames_per_clip: ``config.mm_local_num_frames``; 1 where frames are encoded as images.
        tokens_per_clip: what the projector leaves of a clip (``tome16_mlp_hd64``: 64).
        tokens_per_image: what it leaves of an image, or of each tile of an image.
        newline: ``config.mm_newline_position``: "nothing", "frame" or "one_token"; "nothing" also where
            ``mm_patch_merge_type`` is "flat" or "spatial".
        length: tokens of the whole prompt, to compare with.

    Raises:
        ValueError: another number of tokens than ``length``, a number of frames that is no multiple of a clip's, or an
            unknown option.
    """

    def media(piece: Video | Image) -> list[Segment]:
        if isinstance(piece, Video):
            return _video(piece.frames, frames_per_clip, tokens_per_clip, newline)
        tiles = 1 if piece.tiles is None else piece.tiles[0] * piece.tiles[1]
        return [Segment("image", 1, 1, tokens_per_image) for _ in range(tiles)]

    return joined(prompt, media, length, "VideoChat-Flash")


def _video(frames: int, frames_per_clip: int, tokens_per_clip: int, newline: str) -> list[Segment]:
    if newline not in _NEWLINES:
        raise ValueError(f"newline is {newline!r}: mm_newline_position is one of {', '.join(_NEWLINES)}")
    if frames % frames_per_clip:
        raise ValueError(
            f"{frames} frames are no whole clips of {frames_per_clip}: sample a multiple of {frames_per_clip}"
        )
    return [Segment("video", frames // frames_per_clip, 1, tokens_per_clip, _NEWLINES[newline])]


def read_videochat_flash(model: nn.Module) -> LayoutReader:
    """What reads the layout of a prompt while VideoChat-Flash's code runs:
    ``intercept(..., layout=read_videochat_flash(model))``.

    Args:
        model: LlavaQwenForCausalLM_Flash or another with ``prepare_inputs_labels_for_multimodal`` and a projector
            ``get_model().mm_projector``, whose output ``[clips, tokens, width]`` tells the tokens of a clip.

    With ``mm_llm_compress`` the layers behind a drop of tokens run dense, with a warning.
    """
    return FlashReader(model)


class FlashReader(LlavaReader):
    """Reads prompts of VideoChat-Flash's code; see `read_videochat_flash`."""

    def watch(self) -> None:
        self.tokens_per_clip: set[int] = set()
        projector = self.model.get_model().mm_projector
        self.undo.append(projector.register_forward_hook(self.projected).remove)

    def projected(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Notes how many tokens the projector leaves of a clip."""
        self.tokens_per_clip.add(int(output.shape[-2]))

    def media(self, call: dict[str, Any], ids: list[np.ndarray], tokens: list[list[int]]) -> list[list[list[Segment]]]:
        try:
            return super().media(call, ids, tokens)
        finally:
            self.tokens_per_clip.clear()

    def video(self, frames: int, tokens: int) -> list[Segment]:
        padded = "pad" in getattr(
            self.model.config, "mm_patch_merge_type", "flat"
        )  # "spatial_nopad" counts: it ends so
        newline = getattr(self.model.config, "mm_newline_position", "nothing") if padded else "nothing"
        per_clip = int(getattr(self.model.config, "mm_local_num_frames", 4))
        options = [_video(frames, per_clip, size, newline) for size in sorted(self.tokens_per_clip)]
        segments = next((option for option in options if tokens_of(option) == tokens), options[0] if options else [])
        return expect(segments, tokens, f"a video of {frames} frames")

    def image(self, tokens: int) -> list[Segment]:
        return [Segment("image", 1, 1, tokens)]
