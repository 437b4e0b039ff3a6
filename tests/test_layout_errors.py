"""A layout given by hand: what goes wrong first, and modalities by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mask_builders import Grid
from mmflex import Segment, TokenLayout


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([("video", 8, 16, 16)], r"got \('video', 8, 16, 16\).*tuple too, \(\"video\", \(8, 16, 16\)\)"),
        (("text", 8), r"got 'text': give a list"),
        ([("video", (8, 4, 4), "row")], r"third item of a segment is 'row': use \{\"newline\": \"row\""),
        ([("video", (8, 4, 4), {"newlines": "row"})], r"is \{'newlines': 'row'\}: use .*timestamps"),
        ([("text", 5.0)], r"size is in whole tokens, got 5.0"),
        ([("video", (1, 2, 3, 4))], r"size of a video is \(frames, height, width\) in tokens, got \(1, 2, 3, 4\)"),
        ([("video", (3, 4))], r"size of a video is \(frames, height, width\) in tokens, got \(3, 4\)"),
        ([(2, [3, 4])], r"size of a video is \(frames, height, width\) in tokens, got \[3, 4\]"),
        ([("video", 12)], r"size of a video is \(frames, height, width\) in tokens, got 12"),
        ([("image", (2, 3, 4))], r"size of an image is \(height, width\) in tokens, got \(2, 3, 4\).*Segment"),
        ([("image", (0, 3, 4))], r"size of an image is \(height, width\) in tokens, got \(0, 3, 4\)"),
        ([("image", 12)], r"size of an image is \(height, width\) in tokens, got 12"),
        ([("image", ())], r"size of an image is \(height, width\) in tokens, got \(\)"),
        ([("text", (3, 4))], r"size of text is a number of tokens, got \(3, 4\)"),
        ([("audio", (3, 4))], r"size of audio is a number of tokens, got \(3, 4\)"),
        ([("speech", (3, 4))], r"unknown modality 'speech'"),
    ],
)
def test_a_wrong_segment_is_shown_beside_a_right_one(segments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_segments(segments)


def test_sizes_may_be_numpy_integers() -> None:
    given = TokenLayout.from_segments([("text", np.int64(5)), ("video", (np.int32(2), 3, 4))])
    assert given.fingerprint == TokenLayout.from_segments([("text", 5), ("video", (2, 3, 4))]).fingerprint


def test_an_image_may_have_one_frame_as_processors_write_its_grid() -> None:
    plain = TokenLayout.from_segments([("image", (3, 4))])
    assert plain.fingerprint == TokenLayout.from_segments([("image", [1, 3, 4])]).fingerprint
    assert TokenLayout.from_segments([("text", (5,))]).fingerprint == TokenLayout.text(5).fingerprint


def test_the_tiles_of_an_image_are_its_frames() -> None:
    tiles = TokenLayout.from_segments([Segment("image", frames=2, height=3, width=4)])
    assert tiles.frame[0].tolist() == [0] * 12 + [1] * 12
    assert tiles.cell[0].tolist() == [*range(12)] * 2


def test_modalities_go_by_name() -> None:
    layout = TokenLayout.from_segments([("text", 7), ("video", (4, 2, 3), {"timestamps": 2}), ("text", 5)])
    assert layout.frame_stride("video") == layout.frame_stride(2) == 6
    assert layout.frame_stride(None) == 8
    assert (layout.of("text") == layout.of(0)).all()
    assert layout.of("video").sum() == 24
    assert (layout.coordinate("video") == layout.coordinate(2)).all()
    with pytest.raises(ValueError, match="unknown modality 'vision'"):
        layout.of("vision")


def test_a_misspelt_stride_names_the_choices() -> None:
    with pytest.raises(TypeError, match=r"stride is 'frames': use \"frame\", \"search\" or a number of tokens"):
        Grid("frames")
