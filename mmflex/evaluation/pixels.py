"""What the evaluation's videos look like: glyphs, drifting textures, moving sprites and noise.

A vision token is a tile of 8 x 8 RGB pixels: 2 x 2 patches of 4 x 4 that the vision tower merges into one. Tiles are
handled flat, as 192 numbers in the order of transformers' Qwen2.5-VL processor: (patch row, patch column, channel, row
in the patch, column in the patch). Pixels are about -1 to 1, as after a processor's normalisation.
"""

import math
import random
from functools import lru_cache

import torch
from torch import Tensor

from mmflex.evaluation.vocabulary import SIZE

SIDE = 8
"""Pixels a side of the tile that one vision token stands for."""
TILE = 3 * SIDE * SIDE
NOISE = 0.1
_WAVES = 4
_KEY_COLOUR, _VALUE_COLOUR = (1.0, 0.5, -0.5), (-0.5, 0.5, 1.0)


def tiles_of(frames: Tensor) -> Tensor:
    """Frames ``[..., 3, height, width]`` (multiples of 8 pixels) as tiles ``[..., height / 8 * width / 8, 192]``."""
    *lead, channels, height, width = frames.shape
    split = frames.reshape(-1, channels, height // SIDE, 2, SIDE // 2, width // SIDE, 2, SIDE // 2)
    return split.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(*lead, height // SIDE * (width // SIDE), TILE)


@lru_cache(maxsize=8)
def glyphs(device: torch.device | str = "cpu") -> Tensor:
    """The glyphs as tiles, float32 ``[128, 192]``: 64 keys (warm), then 64 values (cold).

    Each is a fixed random pattern of 8 x 8 pixels in two colours; no two differ in fewer than 12 pixels.
    """
    draw, patterns = random.Random("mmflex glyphs"), list[int]()
    while len(patterns) < 2 * SIZE:
        pattern = draw.getrandbits(SIDE * SIDE)
        if all((pattern ^ other).bit_count() >= 12 for other in patterns):
            patterns.append(pattern)
    bits = torch.tensor([[2.0 * (p >> i & 1) - 1 for i in range(SIDE * SIDE)] for p in patterns])
    colour = torch.tensor([_KEY_COLOUR] * SIZE + [_VALUE_COLOUR] * SIZE)
    return tiles_of((bits[:, None] * colour[:, :, None]).view(-1, 3, SIDE, SIDE))[:, 0].to(device)


def videos(batch: int, frames: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Videos without glyphs or noise, on the generator's device, as tiles.

    Args:
        batch: how many; each has its own textures, sprites and motions.
        frames: frames a video.
        rows, columns: tiles a frame.
        generator: where all randomness comes from.

    Returns:
        float32 ``[batch, frames, rows * columns, 192]``.
    """
    device, height, width = generator.device, rows * SIDE, columns * SIDE

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=device) * (high - low) + low

    time = torch.arange(frames, device=device, dtype=torch.float32)
    across = torch.arange(width, device=device, dtype=torch.float32)
    down = torch.arange(height, device=device, dtype=torch.float32)

    def wave(places: Tensor) -> Tensor:
        """Drifting sines ``[batch, frames, waves, places]``: 0.5 to 2 periods on 64 pixels."""
        turns, drift, phase = uniform(0.5, 2, _WAVES), uniform(-0.3, 0.3, _WAVES), uniform(0, 2 * math.pi, _WAVES)
        angle = turns[:, None, :, None] * (2 * math.pi / 64) * places
        return torch.sin(angle + drift[:, None, :, None] * time[:, None, None] + phase[:, None, :, None])

    # A sum of products of a wave across and a wave down, each in its own colour: one small matrix product a frame.
    colour = uniform(-0.4, 0.4, _WAVES, 3)
    tall = (wave(down)[:, :, :, None] * colour[:, None, :, :, None]).flatten(3)
    picture = tall.transpose(2, 3) @ wave(across)
    picture = picture.view(batch, frames, 3, height, width)
    for _ in range(2):
        radius, paint = uniform(3, 7, 1), uniform(-1, 1, 1, 3, 1, 1)

        def path(span: int) -> Tensor:
            """A sprite's centre, bouncing between the edges ``[batch, frames]``."""
            return ((uniform(0, 2, 1) + uniform(-0.05, 0.05, 1) * time) % 2 - 1).abs() * span

        beside = (across - path(width)[..., None]).abs() < radius[..., None]
        above = (down - path(height)[..., None]).abs() < radius[..., None]
        inside = above[:, :, None, :, None] & beside[:, :, None, None, :]
        picture = torch.where(inside, paint, picture)
    return tiles_of(picture)
