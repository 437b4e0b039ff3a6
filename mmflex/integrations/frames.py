"""Frames of a video file, by PyAV or torchcodec, whichever is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MOST = 128
"""Frames that are read where no number is asked for: one a second, at most so many."""


@dataclass(frozen=True)
class Frames:
    """Frames of a video, evenly spread over it.

    Attributes:
        pixels: uint8 ``[frames, height, width, 3]``, RGB.
        indices: number of each frame in the file.
        total: frames of the file.
        fps: frames a second of the file.
        reader: the package that read it.
    """

    pixels: np.ndarray
    indices: list[int]
    total: int
    fps: float
    reader: str

    @property
    def metadata(self) -> dict[str, Any]:
        """What transformers' video processors are told of frames that were chosen before."""
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "duration": self.total / self.fps,
            "height": self.pixels.shape[1],
            "width": self.pixels.shape[2],
            "frames_indices": self.indices,
            "video_backend": self.reader,
        }


def read_frames(path: str | Path, count: int | None = None) -> Frames:
    """Reads a video file.

    Args:
        path: the file.
        count: frames to take, evenly spread; None for one a second, at most `MOST`. All, where it has fewer.

    Raises:
        ImportError: neither PyAV nor torchcodec is installed.
        ValueError: no such file, no video in it, or a count below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"{count} frames were asked for: take 1 or more")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    if importlib.util.find_spec("av") is not None:
        return _by_pyav(path, count)
    if importlib.util.find_spec("torchcodec") is not None:
        return _by_torchcodec(path, count)
    raise ImportError("reading a video needs PyAV or torchcodec: pip install 'mmflex[video]'")


def spread(total: int, fps: float, count: int | None) -> list[int]:
    """Numbers of the frames to take of ``total``: the middles of equal parts."""
    if count is None:
        count = min(MOST, max(1, round(total / fps)))
    count = min(count, total)
    return [int((i + 0.5) * total / count) for i in range(count)]


def _by_pyav(path: str | Path, count: int | None) -> Frames:
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            fps = float(stream.average_rate or 24)
            # containers may not say how many frames they hold, or say it wrong
            total = sum(packet.pts is not None for packet in container.demux(stream))
        wanted = spread(total, fps, count) if total else []
        taken, kept = [], set(wanted)
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in kept:
                    taken.append((number, frame.to_ndarray(format="rgb24")))
                if wanted and number >= wanted[-1]:
                    break
    except av.FFmpegError as error:
        raise ValueError(f"{path} is not a video that PyAV can read: {error}") from error
    if not taken:
        raise ValueError(f"{path} holds no frames")
    numbers, pictures = zip(*taken, strict=True)
    return Frames(np.stack(pictures), list(numbers), total, fps, "pyav")


def _by_torchcodec(path: str | Path, count: int | None) -> Frames:
    from torchcodec.decoders import VideoDecoder

    try:
        decoder = VideoDecoder(str(path), dimension_order="NHWC")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a video that torchcodec can read: {error}") from error
    total, fps = int(decoder.metadata.num_frames), float(decoder.metadata.average_fps or 24)
    wanted = spread(total, fps, count)
    pixels = decoder.get_frames_at(indices=wanted).data.cpu().numpy()
    return Frames(pixels, wanted, total, fps, "torchcodec")
