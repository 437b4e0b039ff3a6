"""For whoever hooks a model: what to keep of its calls, so that the layout is known inside forward() and generate().

1. In a pre-hook of the top-level ``forward`` keep ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` and
   ``geometry(call_arguments(...))``, which keeps shapes and grids but no pixels. When the language model is entered,
   call ``layout_for(config, {**notes, **kept})``.
2. From transformers 5.18 on ``generate()`` encodes images and videos before that and pops their inputs. So also wrap
   ``get_image_features`` and ``get_video_features`` of the model that owns them (``functools.wraps`` keeps the
   signature that ``generate()`` inspects) and ``notes.update(geometry(call_arguments(fn, args, kwargs)))``, but only
   for the *outermost* call and *outside* of ``forward``: in Qwen3-VL and VideoLLaMA 3 the video function calls the
   image function under the image's names, and Perception-LM's forward encodes videos by the image function. Rows that
   beam search repeats after the encoding are recognised.
3. Where only a vision tower can be hooked: ``geometry_of_tower_calls(config, ids, calls)`` turns the keyword
   arguments of its calls into the same names. Where only the language model can be: `layout_from_positions` on its
   ``position_ids [3 | 4, B, N]`` (M-RoPE families).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .families import FAMILIES, GRIDS, by_type
from .inputs import WAY_OUT, host, setting, shapes_of, tokens_of

_KEPT = (
    *GRIDS,
    "image_merge_sizes",
    "video_merge_sizes",
    "video_compression_mask",
    "image_sizes",
    "batch_num_images",
    "image_attention_mask",
    "audio_embed_sizes",
)


def geometry(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What `layout_for` needs of a processor's output besides the tokens, small and on the host: to keep for later.

    Use it where pixels and grids are last seen, for instance on the arguments of ``get_image_features``. Pixels
    become `PixelShapes`, grids and sizes arrays; everything else is left out. The result can be merged into the
    inputs of `layout_for`.
    """
    found: dict[str, Any] = {}
    for name, value in dict(inputs).items():
        if value is None:
            continue
        if name in _KEPT:
            found[name] = host(value)
        elif name.startswith("pixel_values") or name == "image_pixel_values":
            found[name] = shapes_of(value)
    return found


def call_arguments(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name: ``call_arguments(model.get_video_features, args, kwargs)``.

    Extra keyword arguments of the call are kept under their own names. TypeError where the call itself would raise
    one.
    """
    bound = inspect.signature(function).bind(*args, **kwargs)
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        found.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return found


def geometry_of_tower_calls(
    config: Any, inputs: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """As `geometry`, from the calls of the vision tower itself (a fallback: it isn't told images from videos).

    Args:
        config: the model's config.
        inputs: ``input_ids`` and, where there are, ``attention_mask`` and ``mm_token_type_ids``.
        calls: keyword arguments of the tower's calls in order: ``grid_thw [n, 3]`` and ``merge_sizes [n]``. Images
            are encoded before videos in every family.

    Raises:
        ValueError: no placeholders for a call, or a family whose tower sees no grids (the LLaVA families; hook
            ``get_image_features`` there).
    """
    inputs = dict(inputs)
    model_type = str(setting(config, "model_type"))
    row = FAMILIES.get(model_type)
    ids, valid = tokens_of(inputs, embeds_do=row is None)
    if row is None or "image_grid_thw" not in row.reads or any(call.get("grid_thw") is None for call in calls):
        raise ValueError(
            f"{model_type}: its vision tower is not told grids, so they can't be read off its calls: take "
            f"geometry(call_arguments(model.get_image_features, args, kwargs)) instead, or {WAY_OUT}"
        )
    masks = {name: mask & valid for name, mask in row.placeholders(config, inputs, ids).items()}
    names = [name for name in ("image", "video") if name in masks and masks[name].any()]
    if len(names) != len(calls):
        raise ValueError(
            f"{model_type}: the vision tower was called {len(calls)} times but the prompts hold placeholders of "
            f"{len(names)} kinds ({', '.join(names) or 'none'}): {WAY_OUT}"
        )
    found: dict[str, Any] = {}
    for name, call in zip(names, calls, strict=True):
        grids = host(call["grid_thw"]).reshape(-1, 3)
        if name == "video" and row.placeholders is by_type:
            grids = _whole_videos(config, ids, masks["video"], grids)
        found[f"{name}_grid_thw"] = grids
        if call.get("merge_sizes") is not None:
            found[f"{name}_merge_sizes"] = host(call["merge_sizes"]).reshape(-1)
    return found


def _whole_videos(config: Any, ids: np.ndarray, video: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """GLM encodes every frame as a video of its own: put those between one start token and its end together."""
    model_type = setting(config, "model_type")
    merge = int(setting(config, "vision_config", "spatial_merge_size", default=2))
    starts = np.cumsum(ids == setting(config, "video_start_token_id"), axis=1)
    rows, columns = np.nonzero(video)
    first = np.cumsum([0, *(grids[:-1].prod(axis=1) // merge**2)])
    if first[-1] >= len(rows):
        raise ValueError(
            f"{model_type}: the prompts hold {len(rows)} video placeholder tokens but the vision tower "
            f"was given frames of {int(grids.prod(axis=1).sum()) // merge**2}: {WAY_OUT}"
        )
    keys = np.stack([rows[first], starts[rows[first], columns[first]], grids[:, 1], grids[:, 2]], axis=1)
    change = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    return np.array([[len(part), part[0, 1], part[0, 2]] for part in np.split(grids, change)])
