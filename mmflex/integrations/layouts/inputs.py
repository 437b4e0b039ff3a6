"""Reading configs and processor output: by attribute and by key, onto the host, of pixels no more than the shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

WAY_OUT = (
    "build the layout with mmflex.TokenLayout.from_segments(...) or .from_modality_ids(...) "
    "and run the model inside `with mmflex.token_layout(layout):`"
)
"""How to go on where the inputs don't tell: the end of every error message here."""


@dataclass(frozen=True)
class PixelShapes:
    """What `geometry` keeps of pixels: the shape of every image or video, without the leading axis of the batch."""

    shapes: tuple[tuple[int, ...], ...]


def host(value: Any) -> np.ndarray:
    """A tensor, an array or (nested) lists of numbers as an array on the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, (list, tuple)):
        return np.array([host(item) if hasattr(item, "__len__") else int(item) for item in value])
    return np.asarray(value)


def shapes_of(value: Any) -> PixelShapes:
    """The shapes of pixels: of a batch ``[images, ...]``, of a list of images, or as `geometry` left them."""
    if isinstance(value, PixelShapes):
        return value
    if isinstance(value, (list, tuple)):
        return PixelShapes(tuple(tuple(int(n) for n in np.shape(item)) for item in value))
    shape = tuple(int(n) for n in value.shape)
    return PixelShapes((shape[1:],) * shape[0])


def setting(config: Any, *path: str, default: Any = None) -> Any:
    """A nested attribute (or key) of a config."""
    for name in path:
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if config is None:
            return default
    return config


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of a config entry that is a number or a pair."""
    if isinstance(value, Sequence):
        return int(value[0]), int(value[-1])
    return int(value), int(value)


def tokens_of(inputs: Mapping[str, Any], *, embeds_do: bool) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and the boolean attention mask, ``[B, N]`` each on the host.

    ``embeds_do``: whether ``inputs_embeds`` may stand for absent ids, which are -1 then.
    """
    given = inputs.get("input_ids")
    if given is None:
        embeds = inputs.get("inputs_embeds")
        if embeds is None or not embeds_do:
            raise ValueError(
                f"layout_for needs input_ids to see where the images and videos are, got {sorted(inputs)}: "
                f"pass the processor's output, or {WAY_OUT}"
            )
        given = np.full(tuple(embeds.shape[:2]), -1)
    ids = host(given)
    ids = ids[None] if ids.ndim == 1 else ids
    mask = inputs.get("attention_mask")
    if mask is None:
        return ids, np.ones(ids.shape, bool)
    if getattr(mask, "ndim", 2) > 2 or isinstance(mask, Mapping):
        raise ValueError(
            f"attention_mask is {_describe(mask)} but input_ids has shape {ids.shape}: a layout needs the processor's "
            f"mask [batch, tokens], with 0 for padding; or {WAY_OUT}"
        )
    valid = host(mask) != 0
    valid = valid[None] if valid.ndim == 1 else valid
    if valid.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {valid.shape} but input_ids {ids.shape}: give both for the whole prompt; with a "
            f"cache of earlier tokens, {WAY_OUT}"
        )
    return ids, valid


def _describe(mask: Any) -> str:
    return f"a {type(mask).__name__}" if isinstance(mask, Mapping) else f"of shape {tuple(mask.shape)}"


def holds_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether there are images or videos in the inputs, of whatever family."""
    return any(value is not None and ("pixel" in name or "grid_thw" in name) for name, value in inputs.items())
