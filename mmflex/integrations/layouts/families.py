"""The table: per family its rule, what that reads, and which tokens of its prompts are placeholders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmflex.ir.layout import MODALITIES

from . import rules
from .inputs import host, setting
from .placing import Tiling, touching, until_global
from .units import Batch, Units

_NAMES = ("image", "video", "audio")


def _token_ids(config: Any) -> dict[str, int]:
    """The placeholder ids a config names, by "image", "video", "audio"."""
    found = {}
    for name in _NAMES:
        for owner in ((), ("vision_config",), ("audio_config",)):
            for suffix in ("token_id", "token_index"):
                value = setting(config, *owner, f"{name}_{suffix}")
                if isinstance(value, int) and name not in found:
                    found[name] = value
    return found


def by_id(config: Any, inputs: Mapping[str, Any], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Every kind of placeholder has an id of its own, which the config names."""
    return {name: ids == number for name, number in _token_ids(config).items()}


def by_type(config: Any, inputs: Mapping[str, Any], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Frames of a video use the image's id: the type ids tell them, or the tokens around the video."""
    placeholder = ids == setting(config, "image_token_id")
    kinds = inputs.get("mm_token_type_ids")
    if kinds is not None:
        video = host(kinds).reshape(ids.shape) == MODALITIES["video"]
    else:
        starts = np.cumsum(ids == setting(config, "video_start_token_id"), axis=1)
        video = starts > np.cumsum(ids == setting(config, "video_end_token_id"), axis=1)
    return {"image": placeholder & ~video, "video": placeholder & video}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        rule: the units of the prompts of a batch, by placeholder name.
        reads: names in the processor's output that the rule reads (an error says which are missing).
        placeholders: bool ``[B, N]`` masks of the placeholder tokens by name, from (config, inputs, ids).
        tiling: for families whose inputs don't say which pieces belong together.
        holds: what its prompts may hold besides text.
    """

    rule: Callable[[Batch], Units]
    reads: tuple[str, ...] = ()
    placeholders: Callable[[Any, Mapping[str, Any], np.ndarray], dict[str, np.ndarray]] = by_id
    tiling: Tiling | None = None
    holds: tuple[str, ...] = ("image", "video")


GRIDS = ("image_grid_thw", "video_grid_thw")
"""Inputs int ``[items, 3]``: frames, and rows and columns of patches before any merge."""

_QWEN = Family(rules.grid_thw, GRIDS)
_GLM = Family(rules.grid_thw, GRIDS, by_type)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": _GLM,
    "video_llama_3": Family(
        rules.video_llama_3, (*GRIDS, "image_merge_sizes", "video_merge_sizes", "video_compression_mask")
    ),
    "llava": Family(rules.llava, ("pixel_values", "image_sizes"), holds=("image",)),
    "llava_next": Family(rules.llava_next, ("image_sizes", "pixel_values_videos"), holds=("image",)),
    "llava_next_video": Family(rules.llava_next, ("image_sizes", "pixel_values_videos")),
    "llava_onevision": Family(rules.llava_onevision, ("image_sizes", "batch_num_images", "pixel_values_videos")),
    "video_llava": Family(rules.video_llava, ("pixel_values", "pixel_values_images", "pixel_values_videos")),
    "internvl": Family(rules.internvl, tiling=touching),
    "idefics3": Family(rules.idefics3, tiling=until_global, holds=("image",)),
    "smolvlm": Family(rules.idefics3, tiling=until_global),
    "mistral3": Family(rules.pixtral, ("image_sizes",), holds=("image",)),
    "perception_lm": Family(rules.perception_lm, ("pixel_values", "pixel_values_videos")),
    "phi4_multimodal": Family(
        rules.phi4_multimodal, ("image_sizes", "image_attention_mask", "audio_embed_sizes"), holds=("image", "audio")
    ),
    "gemma3": Family(rules.gemma3, holds=("image",)),
    "paligemma": Family(rules.paligemma, holds=("image",)),
}
"""What is known per ``config.model_type``. Text-only models need no row."""
