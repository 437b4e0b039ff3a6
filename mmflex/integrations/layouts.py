"""Token layouts of transformers' models: which token of a processed prompt is which cell of which frame.

The one function most callers want is `layout_for(config, inputs)`. It needs no transformers import: configs are read
by attribute, inputs by key, tensors are copied to the host. Per family (``config.model_type``) one row of `FAMILIES`
names a *rule*, which lists the units of the prompt (an image, a video) in order, each with a frame and a cell per
placeholder token. One shared consumer then hands the placeholder tokens of the prompt to the units, in order and
never by a stride, and raises unless all are used up. What stands between two tokens of one unit (timestamps, break
tokens) is found from the tokens themselves, so a stride that varies inside one video is no special case.

**For whoever hooks a model** (the layout must be known inside ``forward()`` and ``generate()``):

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

Models that are fed ``inputs_embeds`` by their own code have nothing to read here: ``mmflex.token_layout(layout)``.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from mmflex.ir.layout import MODALITIES, MODALITY_NAMES, Segment, TokenLayout

WAY_OUT = (
    "build the layout with mmflex.TokenLayout.from_segments(...) or .from_modality_ids(...) "
    "and run the model inside `with mmflex.token_layout(layout):`"
)

_NAMES = ("image", "video", "audio")

# Text between two runs of placeholders of one family without grids: up to this many tokens it is a frame's timestamp
# ("\nFrame from 00:12:" and the like), more is prose. Nothing in the inputs says which.
_STAMP = 32
# Separators between the tiles of one image ("\n", a fake token, "<row_1_col_2>") are fewer than these.
_SEPARATORS = 4


# ---- what a prompt holds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """One image or video (or stretch of audio): what its tokens are, in order.

    Args:
        modality: "image", "video" or "audio".
        cells: int32 ``[n, 2]``, frame and cell of each token (-1 where there is none, as in `TokenLayout`).
        foreign: bool ``[n]`` or None. True for tokens with an id of their own that stand between the placeholders
            (Pixtral's break token after every row). They belong to the unit where the prompt has them.
    """

    modality: str
    cells: np.ndarray
    foreign: np.ndarray | None = None

    @property
    def placeholders(self) -> int:
        """How many placeholder tokens the unit takes."""
        return len(self.cells) if self.foreign is None else int((~self.foreign).sum())


@dataclass(frozen=True)
class PixelShapes:
    """What `geometry` keeps of pixels: the shape of every image or video, without the leading axis of the batch."""

    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Prompt:
    """What a rule reads: the config, the processor's output and the placeholder masks, bool ``[B, N]`` by name."""

    config: Any
    inputs: Mapping[str, Any]
    masks: Mapping[str, np.ndarray]

    def count(self, name: str) -> int:
        """How many placeholder tokens of this name the prompts hold."""
        return int(self.masks[name].sum()) if name in self.masks else 0

    def table(self, name: str) -> np.ndarray | None:
        """An input as an int array on the host, None where absent."""
        value = self.inputs.get(name)
        return None if value is None else _host(value)

    def shapes(self, name: str) -> tuple[tuple[int, ...], ...] | None:
        """The shape of every item of an input of pixels, None where absent."""
        value = self.inputs.get(name)
        return None if value is None else _shapes(value).shapes

    def tiles(self, name: str, size: int) -> int:
        """How many equal pieces of ``size`` tokens there are: from the placeholders of this name alone."""
        return -(-self.count(name) // size)


def _host(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, (list, tuple)):
        return np.array([_host(item) if hasattr(item, "__len__") else int(item) for item in value])
    return np.asarray(value)


def _shapes(value: Any) -> PixelShapes:
    if isinstance(value, PixelShapes):
        return value
    if isinstance(value, (list, tuple)):
        return PixelShapes(tuple(tuple(int(n) for n in np.shape(item)) for item in value))
    shape = tuple(int(n) for n in value.shape)
    return PixelShapes((shape[1:],) * shape[0])


def _get(config: Any, *path: str, default: Any = None) -> Any:
    """A nested attribute (or key) of a config."""
    for name in path:
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if config is None:
            return default
    return config


def _pair(value: Any) -> tuple[int, int]:
    """(height, width) of a config entry that is a number or a pair."""
    if isinstance(value, Sequence):
        return int(value[0]), int(value[-1])
    return int(value), int(value)


def _grid(
    modality: str, frames: int, height: int, width: int, newline: str | None = None, first: int = 0
) -> np.ndarray:
    """(frame, cell) of a grid in reading order, int32 ``[n, 2]``; frames are numbered from ``first``."""
    cells = Segment(modality, frames, height, width, newline).columns(0)[:, 2:].copy()
    cells[cells[:, 0] >= 0, 0] += first
    return cells


def _loose(n: int, frame: int = -1) -> np.ndarray:
    """``n`` tokens without a place of their own (a class token, a separator between two crops)."""
    cells = np.full((n, 2), -1, np.int32)
    cells[:, 0] = frame
    return cells


# ---- rules: the units of a prompt, by family ----------------------------------------------------------------------

Units = dict[str, list[Unit]]


def _patches(config: Any) -> tuple[int, int]:
    """Patches per column and row of the vision tower's own image size."""
    height, width = _pair(_get(config, "vision_config", "image_size"))
    patch_h, patch_w = _pair(_get(config, "vision_config", "patch_size"))
    return height // patch_h, width // patch_w


def _grid_thw(prompt: _Prompt) -> Units:
    """Grids in patches, merged ``spatial_merge_size`` x ``spatial_merge_size``: Qwen-VL, GLM-V."""
    merge = int(_get(prompt.config, "vision_config", "spatial_merge_size", default=2))
    units: Units = {}
    for name in ("image", "video"):
        grids = prompt.table(f"{name}_grid_thw")
        rows = [] if grids is None else grids.reshape(-1, 3).tolist()
        units[name] = [Unit(name, _grid(name, t, h // merge, w // merge)) for t, h, w in rows]
    return units


def _video_llama_3(prompt: _Prompt) -> Units:
    """Grids with a merge size each; of a video only the tokens that ``video_compression_mask`` keeps."""
    units: Units = {}
    for name, usual in (("image", 1), ("video", 2)):
        grids = prompt.table(f"{name}_grid_thw")
        rows = [] if grids is None else grids.reshape(-1, 3).tolist()
        merges = prompt.table(f"{name}_merge_sizes")
        sizes = [usual] * len(rows) if merges is None else merges.reshape(-1).tolist()
        units[name] = [Unit(name, _grid(name, t, h // m, w // m)) for (t, h, w), m in zip(rows, sizes, strict=True)]
    kept = prompt.table("video_compression_mask")
    if kept is not None and units["video"]:
        kept, total = kept.reshape(-1) != 0, _total(units["video"])
        if len(kept) != total:
            raise ValueError(
                f"video_llama_3: video_compression_mask has {len(kept)} entries but the grids describe {total} tokens: "
                f"pass both from the same processor output, or {WAY_OUT}"
            )
        parts = np.split(kept, np.cumsum([unit.placeholders for unit in units["video"]])[:-1])
        units["video"] = [Unit("video", u.cells[k]) for u, k in zip(units["video"], parts, strict=True)]
    return units


def _class_tokens(config: Any) -> int:
    """Class tokens that stay in front of an image's patches (only CLIP towers have one)."""
    full = _get(config, "vision_feature_select_strategy", default="default") == "full"
    return int(full and "clip" in str(_get(config, "vision_config", "model_type", default="")))


def _llava(prompt: _Prompt) -> Units:
    """One grid of patches per image, or with a Pixtral tower one of its own size with a break token per row."""
    config = prompt.config
    if _get(config, "vision_config", "model_type") == "pixtral":
        return _pixtral(prompt)
    patch_h, patch_w = _pair(_get(config, "vision_config", "patch_size"))
    height, width = _patches(config)
    extra = _class_tokens(config)
    shapes = prompt.shapes("pixel_values")
    sizes = [(s[-2] // patch_h, s[-1] // patch_w) for s in shapes] if shapes is not None else None
    if sizes is None:
        sizes = [(height, width)] * prompt.tiles("image", height * width + extra)
    return {"image": [Unit("image", np.concatenate([_loose(extra, 0), _grid("image", 1, h, w)])) for h, w in sizes]}


def _pixtral(prompt: _Prompt) -> Units:
    """``image_sizes`` in pixels; a break token of another id after every row, an end token after the last."""
    patch = _pair(_get(prompt.config, "vision_config", "patch_size"))[0]
    patch *= int(_get(prompt.config, "spatial_merge_size", default=1))
    sizes = prompt.table("image_sizes")
    units = []
    for height, width in [] if sizes is None else sizes.reshape(-1, 2).tolist():
        h, w = height // patch, width // patch
        cells = _grid("image", 1, h, w, "row")
        units.append(Unit("image", cells, cells[:, 1] % (w + 1) == w))
    return {"image": units}


def _best_resolution(size: tuple[int, int], choices: Iterable[Sequence[int]]) -> tuple[int, int]:
    """The (height, width) among ``choices`` that keeps most of an image's pixels, then wastes least."""
    height, width = size

    def merit(choice: Sequence[int]) -> tuple[int, int]:
        scale = min(choice[1] / width, choice[0] / height)
        kept = min(int(width * scale) * int(height * scale), height * width)
        return kept, kept - choice[0] * choice[1]

    best = max(choices, key=merit)
    return int(best[0]), int(best[1])


def _unpadded(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a ``height`` x ``width`` map that hold the image of ``size``, padding cut off both sides."""
    if size[1] / size[0] > width / height:
        return height - 2 * ((height - int(round(size[0] * (width / size[1]), 7))) // 2), width
    return height, width - 2 * ((width - int(round(size[1] * (height / size[0]), 7))) // 2)


def _anyres(prompt: _Prompt, base_extra: int, most: int | None) -> list[Unit]:
    """LLaVA-NeXT images: the whole image small (frame 0), then its tiles as one map, a newline per row (frame 1).

    ``most``: LLaVA-OneVision's bound on tiles, above which the map is scaled down. An image among several in one
    prompt has no tiles there, only one newline.
    """
    config = prompt.config
    side = _patches(config)[0]
    pixels = _pair(_get(config, "vision_config", "image_size"))[0]
    sizes = prompt.table("image_sizes")
    rows = [] if sizes is None else sizes.reshape(-1, 2).tolist()
    numbers = prompt.table("batch_num_images")
    alone = [n == 1 for n in numbers.reshape(-1).tolist() for _ in range(n)] if numbers is not None else []
    alone += [True] * (len(rows) - len(alone))
    base = np.concatenate([_loose(base_extra, 0), _grid("image", 1, side, side)])
    units = []
    for (height, width), tiled in zip(rows, alone, strict=False):
        if not tiled:
            units.append(Unit("image", np.concatenate([base, _loose(1)])))
            continue
        tall, wide = _best_resolution((height, width), _get(config, "image_grid_pinpoints"))
        h, w = _unpadded((height, width), tall // pixels * side, wide // pixels * side)
        if most is not None:
            ratio = math.sqrt(h * w / (most * side**2))
            if ratio > 1.1:
                h, w = int(h // ratio), int(w // ratio)
        units.append(Unit("image", np.concatenate([base, _grid("image", 1, h, w, "row", first=1)])))
    return units


def _llava_next(prompt: _Prompt) -> Units:
    """Images as `_anyres`; videos pooled by ``spatial_pool_stride``, frames without newlines."""
    stride = int(_get(prompt.config, "spatial_pool_stride", default=2))
    patch_h, patch_w = _pair(_get(prompt.config, "vision_config", "patch_size"))
    videos = [
        Unit("video", _grid("video", s[0], s[-2] // patch_h // stride, s[-1] // patch_w // stride))
        for s in prompt.shapes("pixel_values_videos") or ()
    ]
    return {"image": _anyres(prompt, _class_tokens(prompt.config), None), "video": videos}


def _llava_onevision(prompt: _Prompt) -> Units:
    """Images as `_anyres`; videos pooled to half a side, rounded up, and one newline per video."""
    half = -(-_patches(prompt.config)[0] // 2)
    bound = re.search(r"\d+", str(_get(prompt.config, "vision_aspect_ratio", default="")))
    videos = [
        Unit("video", _grid("video", s[0], half, half, "video")) for s in prompt.shapes("pixel_values_videos") or ()
    ]
    return {"image": _anyres(prompt, 0, int(bound[0]) if bound else 9), "video": videos}


def _video_llava(prompt: _Prompt) -> Units:
    """A grid of patches and a class token in front of it, per image and per frame."""
    height, width = _patches(prompt.config)
    extra = 1 if _get(prompt.config, "vision_feature_select_strategy", default="default") == "full" else 0

    def frames(n: int, name: str) -> Unit:
        parts = [part for f in range(n) for part in (_loose(extra, f), _grid(name, 1, height, width, first=f))]
        return Unit(name, np.concatenate(parts))

    images = prompt.shapes("pixel_values") or prompt.shapes("pixel_values_images") or ()
    videos = prompt.shapes("pixel_values_videos") or ()
    return {"image": [frames(1, "image") for _ in images], "video": [frames(s[0], "video") for s in videos]}


def _tiles(prompt: _Prompt, height: int, width: int) -> Units:
    """As many equal grids as the placeholders fill; what belongs together is seen from the text between them."""
    return {"image": [Unit("image", _grid("image", 1, height, width))] * prompt.tiles("image", height * width)}


def _internvl(prompt: _Prompt) -> Units:
    """Tiles of ``image_seq_length`` tokens: side by side in an image, ``Frame1:`` text between them in a video."""
    ratio = float(_get(prompt.config, "downsample_ratio", default=0.5))
    height, width = _patches(prompt.config)
    return _tiles(prompt, int(height * ratio), int(width * ratio))


def _idefics3(prompt: _Prompt) -> Units:
    """A run per tile or frame, each with its own text in front."""
    factor = int(_get(prompt.config, "scale_factor", default=2))
    height, width = _patches(prompt.config)
    return _tiles(prompt, height // factor, width // factor)


def _gemma3(prompt: _Prompt) -> Units:
    """``mm_tokens_per_image`` per image or crop, each an image of its own."""
    side = math.isqrt(int(_get(prompt.config, "mm_tokens_per_image", default=256)))
    return _tiles(prompt, side, side)


def _paligemma(prompt: _Prompt) -> Units:
    """A grid of patches per image, no text between."""
    return _tiles(prompt, *_patches(prompt.config))


def _perception_lm(prompt: _Prompt) -> Units:
    """Pooled patches per tile of an image (thumbnail first) or frame of a video."""
    config = prompt.config
    pool = int(_get(config, "projector_pooling_ratio", default=1))
    units: Units = {}
    for name, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        units[name] = []
        for shape in prompt.shapes(key) or ():
            patch = _timm_patch(_get(config, "vision_config"), shape[-2])
            units[name].append(
                Unit(name, _grid(name, shape[0], shape[-2] // patch // pool, shape[-1] // patch // pool))
            )
    return units


def _timm_patch(vision: Any, pixels: int) -> int:
    """Patch size of a timm tower, which its config tells in one of several ways."""
    args = _get(vision, "model_args", default={})
    given = _get(vision, "patch_size") or _get(args, "patch_size")
    if given:
        return _pair(given)[0]
    if reference := _get(args, "ref_feat_shape"):
        return _pair(_get(args, "img_size", default=pixels))[0] // _pair(reference)[0]
    if named := re.search(r"patch(\d+)", str(_get(vision, "architecture", default=""))):
        return int(named[1])
    raise ValueError(
        f"perception_lm: the patch size is neither in vision_config.model_args ({sorted(args)}) nor in the name of the "
        f"architecture ({_get(vision, 'architecture')!r}): {WAY_OUT}"
    )


def _phi4_multimodal(prompt: _Prompt) -> Units:
    """The crops as one map with a newline per row (frame 0), a separator, the whole image small (frame 1)."""
    config = prompt.config
    base = -(-_patches(config)[0] // 2)
    crop = int(_get(config, "vision_config", "crop_size", default=448))
    sizes, masks = prompt.table("image_sizes"), prompt.table("image_attention_mask")
    images = []
    for number, (height, width) in enumerate([] if sizes is None else sizes.reshape(-1, 2).tolist()):
        tall, wide = height // crop, width // crop
        h, w = tall * base, wide * base
        if masks is not None:
            # Padding is at the bottom and at the right, so the first column and the first row tell what is used.
            used = masks.reshape(-1, *masks.shape[-3:])[number, 1 : tall * wide + 1, ::2, ::2]
            used = used.reshape(tall, wide, base, base)
            h, w = int(used[:, 0, :, 0].sum()), int(used[0, :, 0, :].sum())
        parts = [_grid("image", 1, h, w, "row"), _loose(1), _grid("image", 1, base, base, "row", first=1)]
        images.append(Unit("image", np.concatenate(parts)))
    lengths = prompt.table("audio_embed_sizes")
    audio = [Unit("audio", _loose(n)) for n in ([] if lengths is None else lengths.reshape(-1).tolist())]
    return {"image": images, "audio": audio}


# ---- which placeholders are which, and which pieces belong together -----------------------------------------------


def _token_ids(config: Any) -> dict[str, int]:
    """The placeholder ids a config names, by "image", "video", "audio"."""
    found = {}
    for name in _NAMES:
        for owner in ((), ("vision_config",), ("audio_config",)):
            for suffix in ("token_id", "token_index"):
                value = _get(config, *owner, f"{name}_{suffix}")
                if isinstance(value, int) and name not in found:
                    found[name] = value
    return found


def _by_id(config: Any, inputs: Mapping[str, Any], ids: np.ndarray) -> dict[str, np.ndarray]:
    return {name: ids == number for name, number in _token_ids(config).items()}


def _glm(config: Any, inputs: Mapping[str, Any], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Frames of a video use the image's id: the type ids tell them, or the tokens around the video."""
    placeholder = ids == _get(config, "image_token_id")
    kinds = inputs.get("mm_token_type_ids")
    if kinds is not None:
        video = _host(kinds).reshape(ids.shape) == MODALITIES["video"]
    else:
        starts = np.cumsum(ids == _get(config, "video_start_token_id"), axis=1)
        video = starts > np.cumsum(ids == _get(config, "video_end_token_id"), axis=1)
    return {"image": placeholder & ~video, "video": placeholder & video}


@dataclass(frozen=True)
class _Placed:
    """A unit with the places of its tokens in the prompt, int ``[n]``."""

    row: int
    at: np.ndarray
    modality: str
    cells: np.ndarray

    def gap(self, before: _Placed) -> int:
        """Tokens between an earlier unit of the same prompt and this one."""
        return int(self.at[0] - before.at[-1]) - 1


# Given the ids of a prompt and its units in order: for each, whether it is a tile of the same image as the one before.
_Tiling = Callable[[np.ndarray, Sequence[_Placed]], list[bool]]


def _touching(ids: np.ndarray, units: Sequence[_Placed]) -> list[bool]:
    """Tiles of one image stand side by side."""
    return [False, *(b.gap(a) == 0 for a, b in pairwise(units))]


def _until_global(ids: np.ndarray, units: Sequence[_Placed]) -> list[bool]:
    """Tiles end with the whole image, which has a token of its own in front: that of a prompt's last run always."""
    front = [int(ids[unit.at[0] - 1]) if unit.at[0] else -1 for unit in units]
    return [False, *(front[n] != front[-1] and b.gap(a) <= _SEPARATORS for n, (a, b) in enumerate(pairwise(units)))]


def _join(ids: np.ndarray, units: Sequence[_Placed], tiling: _Tiling) -> Iterator[_Placed]:
    """Tiles of one image as one unit; lone pieces with a timestamp's worth of text between them as one video."""
    if not units:
        return
    tile = tiling(ids, units)
    lone = [not (own or after) for own, after in zip(tile, [*tile[1:], False], strict=True)]
    group = [units[0]]
    for number in range(1, len(units)):
        stamped = _SEPARATORS < units[number].gap(units[number - 1]) <= _STAMP
        if not (tile[number] or (stamped and lone[number] and lone[number - 1])):
            yield _united(group, "video" if lone[number - 1] else "image")
            group = []
        group.append(units[number])
    yield _united(group, "video" if lone[-1] else "image")


def _united(group: Sequence[_Placed], modality: str) -> _Placed:
    """Single frames as one unit, its frames numbered in order; one alone stays what it is."""
    if len(group) == 1:
        return group[0]
    cells = np.concatenate([unit.cells for unit in group])
    cells[:, 0] = np.repeat(np.arange(len(group)), [len(unit.at) for unit in group])
    return _Placed(group[0].row, np.concatenate([unit.at for unit in group]), modality, cells)


# ---- the table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        rule: the units of the prompts of a batch, by placeholder name.
        reads: names in the processor's output that the rule reads (an error says which are missing).
        placeholders: bool ``[B, N]`` masks of the placeholder tokens by name, from (config, inputs, ids).
        tiling: for families whose inputs don't say which pieces belong together.
    """

    rule: Callable[[_Prompt], Units]
    reads: tuple[str, ...] = ()
    placeholders: Callable[[Any, Mapping[str, Any], np.ndarray], dict[str, np.ndarray]] = _by_id
    tiling: _Tiling | None = None


_GRIDS = ("image_grid_thw", "video_grid_thw")
_QWEN = Family(_grid_thw, _GRIDS)
_GLM = Family(_grid_thw, _GRIDS, _glm)
_LLAVA_NEXT = Family(_llava_next, ("image_sizes", "pixel_values_videos"))
_TILED = Family(_idefics3, tiling=_until_global)

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
        _video_llama_3, (*_GRIDS, "image_merge_sizes", "video_merge_sizes", "video_compression_mask")
    ),
    "llava": Family(_llava, ("pixel_values", "image_sizes")),
    "llava_next": _LLAVA_NEXT,
    "llava_next_video": _LLAVA_NEXT,
    "llava_onevision": Family(_llava_onevision, ("image_sizes", "batch_num_images", "pixel_values_videos")),
    "video_llava": Family(_video_llava, ("pixel_values", "pixel_values_images", "pixel_values_videos")),
    "internvl": Family(_internvl, tiling=_touching),
    "idefics3": _TILED,
    "smolvlm": _TILED,
    "mistral3": Family(_pixtral, ("image_sizes",)),
    "perception_lm": Family(_perception_lm, ("pixel_values", "pixel_values_videos")),
    "phi4_multimodal": Family(_phi4_multimodal, ("image_sizes", "image_attention_mask", "audio_embed_sizes")),
    "gemma3": Family(_gemma3),
    "paligemma": Family(_paligemma),
}
"""What is known per ``config.model_type``. Text-only models need no row."""


# ---- the consumer -------------------------------------------------------------------------------------------------


def _place(row: int, at: np.ndarray, unit: Unit, free: np.ndarray) -> _Placed:
    """A unit on its placeholders ``at``; ``free`` bool ``[N]``: tokens of the prompt that are no placeholders."""
    if unit.foreign is None:
        return _Placed(row, at, unit.modality, unit.cells)
    whole = int(at[0]) + np.arange(len(unit.cells))
    if whole[-1] < len(free) and np.array_equal(whole[~unit.foreign], at) and free[whole[unit.foreign]].all():
        return _Placed(row, whole, unit.modality, unit.cells)
    # The prompt has no separators here (an own template): the rows follow one another.
    cells = unit.cells[~unit.foreign].copy()
    cells[:, 1] = np.arange(len(cells))
    return _Placed(row, at, unit.modality, cells)


def _consume(
    family: str, masks: Mapping[str, np.ndarray], units: Units, valid: np.ndarray, missing: Sequence[str]
) -> list[_Placed]:
    """Hand the placeholders to the units in order; ValueError unless that comes out even."""
    taken = np.zeros(valid.shape, bool)
    for mask in masks.values():
        taken |= mask
    placed = []
    for name, mask in masks.items():
        rows, columns = np.nonzero(mask)
        described = _total(units.get(name, ()))
        if described != len(rows):
            hint = f" (not given: {', '.join(missing)})" if missing else ""
            raise ValueError(
                f"{family}: the prompts hold {len(rows)} {name} placeholder tokens but the inputs describe {described}"
                f"{hint}: pass the processor's output unchanged, or {WAY_OUT}"
            )
        start = 0
        for number, unit in enumerate(units.get(name, ())):
            stop = start + unit.placeholders
            if stop == start:
                continue
            row = int(rows[start])
            if rows[stop - 1] != row:
                raise ValueError(
                    f"{family}: {name} {number} of {unit.placeholders} tokens would reach from prompt {row} into "
                    f"prompt {int(rows[stop - 1])}: the order of the {name}s and of the prompts differ, or {WAY_OUT}"
                )
            placed.append(_place(row, columns[start:stop], unit, valid[row] & ~taken[row]))
            start = stop
    return sorted(placed, key=lambda unit: (unit.row, int(unit.at[0])))


def _assemble(placed: Iterable[_Placed], valid: np.ndarray) -> TokenLayout:
    """The layout of units on their places; everything else is text, padding is blank."""
    modality = np.zeros(valid.shape, np.int32)
    segment, frame, cell = (np.full(valid.shape, -1, np.int32) for _ in range(3))
    owner = np.full(valid.shape, -1, np.int64)
    for number, unit in enumerate(placed):
        inside = owner[unit.row, unit.at[0] : unit.at[-1] + 1]
        inside[inside < 0] = number  # timestamps and separators belong to the unit they stand in
        owner[unit.row, unit.at] = number
        modality[unit.row, unit.at] = MODALITIES[unit.modality]
        frame[unit.row, unit.at], cell[unit.row, unit.at] = unit.cells.T
    for row in range(len(valid)):
        keys = owner[row, valid[row]]
        stretch = np.cumsum(np.diff(keys, prepend=keys[:1]) != 0)
        keys = np.where(keys < 0, -1 - stretch, keys)  # every stretch of text is a segment of its own
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        segment[row, valid[row]] = np.argsort(np.argsort(first))[inverse.reshape(-1)]
    return TokenLayout.from_modality_ids(modality, segment=segment, frame=frame, cell=cell, valid=valid)


def _repeats(ids: np.ndarray, valid: np.ndarray) -> int:
    """How often every row stands in a row (beam search repeats prompts one by one)."""
    rows = np.concatenate([ids, valid], axis=1)
    change = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1
    return math.gcd(len(ids), *change.tolist())


# ---- public -------------------------------------------------------------------------------------------------------


def layout_for(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    """The token layout of a batch of prompts, from a model's config and its processor's output.

    Args:
        config: the model's config (``model.config``), read by attribute.
        inputs: what the processor returned: ``input_ids [B, N]``, ``attention_mask [B, N]`` where there is padding
            (left or right), ``mm_token_type_ids [B, N]``, and what the family's row of `FAMILIES` reads:
            ``image_grid_thw [images, 3]``, ``video_grid_thw [videos, 3]``, ``image_sizes [images, 2]``,
            ``pixel_values_videos [videos, frames, ...]``, ... Pixels are only asked for their shape; the reduced
            form that `geometry` returns does as well.

    Returns:
        A layout ``[B, N]``. Text between the frames of a video belongs to the video's segment, as text; the text in
        front of the first frame to the text segment before it. A text-only model or prompt gives text.

    Raises:
        ValueError: an unknown family, or placeholders and described tokens that differ (both numbers are named);
            the message says how to go on.
    """
    inputs = dict(inputs)
    ids, valid = _ids(config, inputs)
    model_type = str(_get(config, "model_type", default=type(config).__name__))
    row = FAMILIES.get(model_type)
    find = row.placeholders if row is not None else _by_id
    masks = {name: mask & valid for name, mask in find(config, inputs, ids).items() if (mask & valid).any()}
    if not masks and (row is not None or not _pixels(inputs)):
        return _assemble((), valid)
    if row is None:
        what = ", ".join(f"{int(mask.sum())} {name}" for name, mask in masks.items()) or "pixels and no known"
        raise ValueError(
            f"no layout rule for model_type {model_type!r}, whose prompts hold {what} placeholder tokens: "
            f"known are {', '.join(sorted(FAMILIES))}; {WAY_OUT}"
        )
    units = row.rule(_Prompt(config, inputs, masks))
    times = _beams(ids, valid, masks, units)
    if times > 1:
        # generate() repeats the prompts (beams, several answers) after it has encoded what they show once. What it did
        # not encode by then, it has repeated along with them.
        ids, valid = ids[::times], valid[::times]
        masks = {name: mask[::times] for name, mask in masks.items()}
        units = {
            name: of if _total(of) == masks[name].sum() else of[::times] for name, of in units.items() if name in masks
        }
    missing = [name for name in row.reads if inputs.get(name) is None]
    placed = _consume(model_type, masks, units, valid, missing)
    if row.tiling is not None:
        prompts = [[unit for unit in placed if unit.row == number] for number in range(len(ids))]
        placed = [joined for number, of in enumerate(prompts) for joined in _join(ids[number], of, row.tiling)]
    layout = _assemble(placed, valid)
    return layout if times == 1 else repeat_layout(layout, times)


def _total(units: Iterable[Unit]) -> int:
    """Placeholder tokens of several units."""
    return sum(unit.placeholders for unit in units)


def _beams(ids: np.ndarray, valid: np.ndarray, masks: Mapping[str, np.ndarray], units: Units) -> int:
    """How often generate() has repeated the prompts: 1, or a number that fits the rows and what was described."""
    rows = _repeats(ids, valid)
    described = {name: _total(units.get(name, ())) for name in masks}
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    if rows == 1 or any(total == 0 or counts[name] % total for name, total in described.items()):
        return 1
    ratios = {counts[name] // total for name, total in described.items()}
    times = max(ratios)
    if times > 1:
        return times if ratios <= {1, times} and rows % times == 0 else 1
    # Repeated along with the rows, but one by one: a a a b b b for the rows (a b) (a b) (a b).
    return rows if all(_in_groups(units[name], rows) for name in masks) else 1


def _in_groups(units: Sequence[Unit], size: int) -> bool:
    """Whether every ``size`` units in a row look the same."""
    return len(units) % size == 0 and all(
        np.array_equal(unit.cells, units[number - number % size].cells) for number, unit in enumerate(units)
    )


def _pixels(inputs: Mapping[str, Any]) -> bool:
    return any(value is not None and ("pixel" in name or "grid_thw" in name) for name, value in inputs.items())


def _ids(config: Any, inputs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and the boolean attention mask, ``[B, N]`` each on the host."""
    given = inputs.get("input_ids")
    if given is None:
        embeds = inputs.get("inputs_embeds")
        if embeds is None or _get(config, "model_type") in FAMILIES:
            raise ValueError(
                f"layout_for needs input_ids to see where the images and videos are, got {sorted(inputs)}: "
                f"pass the processor's output, or {WAY_OUT}"
            )
        given = np.full(tuple(embeds.shape[:2]), -1)
    ids = _host(given)
    ids = ids[None] if ids.ndim == 1 else ids
    mask = inputs.get("attention_mask")
    if mask is None:
        return ids, np.ones(ids.shape, bool)
    if getattr(mask, "ndim", 2) > 2 or isinstance(mask, Mapping):
        raise ValueError(
            f"attention_mask is {_describe(mask)} but input_ids has shape {ids.shape}: a layout needs the processor's "
            f"mask [batch, tokens], with 0 for padding; or {WAY_OUT}"
        )
    valid = _host(mask) != 0
    valid = valid[None] if valid.ndim == 1 else valid
    if valid.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {valid.shape} but input_ids {ids.shape}: give both for the whole prompt; with a "
            f"cache of earlier tokens, {WAY_OUT}"
        )
    return ids, valid


def _describe(mask: Any) -> str:
    return f"a {type(mask).__name__}" if isinstance(mask, Mapping) else f"of shape {tuple(mask.shape)}"


def repeat_layout(layout: TokenLayout, times: int) -> TokenLayout:
    """Every prompt ``times`` times, one after the other (`repeat_interleave`): what beam search does to a batch.

    Returns a layout ``[B * times, N]``; ValueError unless ``times`` is 1 or more.
    """
    if times < 1:
        raise ValueError(f"a layout is repeated 1 or more times, got {times}")
    fields = {
        name: np.repeat(getattr(layout, name), times, axis=0)
        for name in ("modality", "segment", "frame", "cell", "valid")
    }
    return TokenLayout.from_modality_ids(fields.pop("modality"), **fields)


_KEPT = (
    *_GRIDS,
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
            found[name] = _host(value)
        elif name.startswith("pixel_values") or name == "image_pixel_values":
            found[name] = _shapes(value)
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
    ids, valid = _ids(config, inputs)
    model_type = str(_get(config, "model_type"))
    row = FAMILIES.get(model_type)
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
        grids = _host(call["grid_thw"]).reshape(-1, 3)
        if name == "video" and row.placeholders is _glm:
            grids = _whole_videos(config, ids, masks["video"], grids)
        found[f"{name}_grid_thw"] = grids
        if call.get("merge_sizes") is not None:
            found[f"{name}_merge_sizes"] = _host(call["merge_sizes"]).reshape(-1)
    return found


def _whole_videos(config: Any, ids: np.ndarray, video: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """GLM encodes every frame as a video of its own: put those between one start token and its end together."""
    merge = int(_get(config, "vision_config", "spatial_merge_size", default=2))
    starts = np.cumsum(ids == _get(config, "video_start_token_id"), axis=1)
    rows, columns = np.nonzero(video)
    first = np.cumsum([0, *(grids[:-1].prod(axis=1) // merge**2)])
    if first[-1] >= len(rows):
        raise ValueError(
            f"{_get(config, 'model_type')}: the prompts hold {len(rows)} video placeholder tokens but the vision tower "
            f"was given frames of {int(grids.prod(axis=1).sum()) // merge**2}: {WAY_OUT}"
        )
    keys = np.stack([rows[first], starts[rows[first], columns[first]], grids[:, 1], grids[:, 2]], axis=1)
    change = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    return np.array([[len(part), part[0, 1], part[0, 2]] for part in np.split(grids, change)])


def layout_from_positions(position_ids: Any, *, modality: Any = None, valid: Any = None) -> TokenLayout:
    """The layout from M-RoPE positions alone, for a language model of which nothing else can be seen.

    Args:
        position_ids: ``[3, B, N]`` (time, height, width), or ``[4, B, N]`` with the plain positions in front, as
            Qwen-VL and GLM-V pass them to their language model.
        modality: ``[B, N]`` as in ``mm_token_type_ids``. Without it, a token is visual where height or width do
            not go beyond all before, and a run with more than one time is a video (a grid of a single cell then
            passes for text, and images of one size with little text between for the frames of a video).
        valid: boolean ``[B, N]``, the attention mask. Without it every token counts.

    Within a run of visual tokens a frame starts where height and width are both minimal. Runs of one frame of equal
    size with a timestamp's worth of text between them are the frames of one video (Qwen3-VL, GLM-4.1V).

    Raises:
        ValueError: a shape other than these, or a run that is no whole number of frames.
    """
    positions = _host(position_ids)
    if positions.ndim != 3 or positions.shape[0] not in (3, 4):
        raise ValueError(
            f"position_ids has shape {positions.shape}: [3, batch, tokens] or [4, batch, tokens] (M-RoPE) is needed; "
            f"for a model without, {WAY_OUT}"
        )
    time, height, width = positions[-3:]
    mask = np.ones(time.shape, bool) if valid is None else _host(valid).reshape(time.shape) != 0
    kinds = None if modality is None else np.where(mask, _host(modality).reshape(time.shape), 0)
    placed: list[_Placed] = []
    for row in range(len(time)):
        visual = _visual(height[row], width[row], mask[row]) if kinds is None else kinds[row]
        edges = [0, *(np.flatnonzero(np.diff(visual)) + 1).tolist(), len(visual)]
        runs = [np.arange(a, b) for a, b in pairwise(edges) if b > a and visual[a]]
        found = []
        for at in runs:
            kind = int(visual[at[0]])
            if kinds is None:
                kind = MODALITIES["video" if len(np.unique(time[row, at])) > 1 else "image"]
            found.append(_framed(row, at, MODALITY_NAMES[kind], height[row], width[row]))
        placed += _stamped(found, sure=kinds is not None)
    return _assemble(placed, mask)


def _visual(height: np.ndarray, width: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """0 / 1 per token. Text goes beyond every height and width before it, in both; of an image or video only the
    first cell does, and the next one tells."""

    def again(position: np.ndarray) -> np.ndarray:
        reached = np.maximum.accumulate(np.where(valid, position, -1))
        return position <= np.append(-1, reached[:-1])

    inside = (again(height) | again(width)) & valid
    visual: np.ndarray = (inside | (np.append(inside[1:], False) & valid)).astype(np.int32)
    return visual


def _framed(
    row: int, at: np.ndarray, modality: str, height: np.ndarray, width: np.ndarray
) -> tuple[_Placed, tuple[int, int]]:
    """A run of visual tokens as whole frames, and their height and width in cells."""
    h, w = height[at] - height[at].min(), width[at] - width[at].min()
    tall, wide = int(h.max()) + 1, int(w.max()) + 1
    frame = np.cumsum((h == 0) & (w == 0)) - 1
    if frame[0] != 0 or len(at) != (int(frame[-1]) + 1) * tall * wide:
        raise ValueError(
            f"prompt {row}: the positions of tokens {int(at[0])} to {int(at[-1])} are no whole number of frames of "
            f"{tall} x {wide} cells ({len(at)} tokens, {int(frame[-1]) + 1} frames): {WAY_OUT}"
        )
    cells = np.stack([frame, h * wide + w], axis=1).astype(np.int32)
    return _Placed(row, at, modality, cells), (tall, wide)


def _stamped(runs: Sequence[tuple[_Placed, tuple[int, int]]], sure: bool) -> Iterator[_Placed]:
    """Single frames of one size with timestamps between them as one video (``sure``: only what is known as video)."""
    group: list[_Placed] = []
    sizes: tuple[int, int] | None = None
    for unit, size in runs:
        single = int(unit.cells[-1, 0]) == 0 and (unit.modality == "video" or not sure)
        if group and not (single and size == sizes and unit.gap(group[-1]) <= _STAMP):
            yield _united(group, "video")
            group = []
        group.append(unit)
        sizes = size if single else None
    if group:
        yield _united(group, "video")
