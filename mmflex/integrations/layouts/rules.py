"""Rules: the units of a batch of prompts, one function per way of building prompts.

Each reads what its family's processor returns and says, in order, what the tokens of every image and video are. Which
family follows which rule is in `families`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .inputs import WAY_OUT, pair, setting
from .units import Batch, Unit, Units, grid, loose, placeholders_in


def _patches(config: Any) -> tuple[int, int]:
    """Patches per column and row of the vision tower's own image size."""
    height, width = pair(setting(config, "vision_config", "image_size"))
    patch_h, patch_w = pair(setting(config, "vision_config", "patch_size"))
    return height // patch_h, width // patch_w


def grid_thw(batch: Batch) -> Units:
    """Grids in patches, merged ``spatial_merge_size`` x ``spatial_merge_size``: Qwen-VL, GLM-V."""
    merge = int(setting(batch.config, "vision_config", "spatial_merge_size", default=2))
    units: Units = {}
    for name in ("image", "video"):
        grids = batch.table(f"{name}_grid_thw")
        rows = [] if grids is None else grids.reshape(-1, 3).tolist()
        units[name] = [Unit(name, grid(name, t, h // merge, w // merge)) for t, h, w in rows]
    return units


def video_llama_3(batch: Batch) -> Units:
    """Grids with a merge size each; of a video only the tokens that ``video_compression_mask`` keeps."""
    units: Units = {}
    for name, usual in (("image", 1), ("video", 2)):
        grids = batch.table(f"{name}_grid_thw")
        rows = [] if grids is None else grids.reshape(-1, 3).tolist()
        merges = batch.table(f"{name}_merge_sizes")
        sizes = [usual] * len(rows) if merges is None else merges.reshape(-1).tolist()
        units[name] = [Unit(name, grid(name, t, h // m, w // m)) for (t, h, w), m in zip(rows, sizes, strict=True)]
    kept = batch.table("video_compression_mask")
    if kept is not None and units["video"]:
        kept, total = kept.reshape(-1) != 0, placeholders_in(units["video"])
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
    full = setting(config, "vision_feature_select_strategy", default="default") == "full"
    return int(full and "clip" in str(setting(config, "vision_config", "model_type", default="")))


def llava(batch: Batch) -> Units:
    """One grid of patches per image, or with a Pixtral tower one of its own size with a break token per row."""
    config = batch.config
    if setting(config, "vision_config", "model_type") == "pixtral":
        return pixtral(batch)
    patch_h, patch_w = pair(setting(config, "vision_config", "patch_size"))
    height, width = _patches(config)
    extra = _class_tokens(config)
    shapes = batch.shapes("pixel_values")
    sizes = [(s[-2] // patch_h, s[-1] // patch_w) for s in shapes] if shapes is not None else None
    if sizes is None:
        sizes = [(height, width)] * batch.tiles("image", height * width + extra)
    return {"image": [Unit("image", np.concatenate([loose(extra, 0), grid("image", 1, h, w)])) for h, w in sizes]}


def pixtral(batch: Batch) -> Units:
    """``image_sizes`` in pixels; a break token of another id after every row, an end token after the last."""
    patch = pair(setting(batch.config, "vision_config", "patch_size"))[0]
    patch *= int(setting(batch.config, "spatial_merge_size", default=1))
    sizes = batch.table("image_sizes")
    units = []
    for height, width in [] if sizes is None else sizes.reshape(-1, 2).tolist():
        h, w = height // patch, width // patch
        cells = grid("image", 1, h, w, "row")
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


def _anyres(batch: Batch, base_extra: int, most: int | None) -> list[Unit]:
    """LLaVA-NeXT images: the whole image small (frame 0), then its tiles as one map, a newline per row (frame 1).

    ``most``: LLaVA-OneVision's bound on tiles, above which the map is scaled down. An image among several in one
    prompt has no tiles there, only one newline.
    """
    config = batch.config
    side = _patches(config)[0]
    pixels = pair(setting(config, "vision_config", "image_size"))[0]
    sizes = batch.table("image_sizes")
    rows = [] if sizes is None else sizes.reshape(-1, 2).tolist()
    numbers = batch.table("batch_num_images")
    alone = [n == 1 for n in numbers.reshape(-1).tolist() for _ in range(n)] if numbers is not None else []
    alone += [True] * (len(rows) - len(alone))
    base = np.concatenate([loose(base_extra, 0), grid("image", 1, side, side)])
    units = []
    for (height, width), tiled in zip(rows, alone, strict=False):
        if not tiled:
            units.append(Unit("image", np.concatenate([base, loose(1)])))
            continue
        tall, wide = _best_resolution((height, width), setting(config, "image_grid_pinpoints"))
        h, w = _unpadded((height, width), tall // pixels * side, wide // pixels * side)
        if most is not None:
            ratio = math.sqrt(h * w / (most * side**2))
            if ratio > 1.1:
                h, w = int(h // ratio), int(w // ratio)
        units.append(Unit("image", np.concatenate([base, grid("image", 1, h, w, "row", first=1)])))
    return units


def llava_next(batch: Batch) -> Units:
    """Images as `_anyres`; videos pooled by ``spatial_pool_stride``, frames without newlines."""
    stride = int(setting(batch.config, "spatial_pool_stride", default=2))
    patch_h, patch_w = pair(setting(batch.config, "vision_config", "patch_size"))
    videos = [
        Unit("video", grid("video", s[0], s[-2] // patch_h // stride, s[-1] // patch_w // stride))
        for s in batch.shapes("pixel_values_videos") or ()
    ]
    return {"image": _anyres(batch, _class_tokens(batch.config), None), "video": videos}


def llava_onevision(batch: Batch) -> Units:
    """Images as `_anyres`; videos pooled to half a side, rounded up, and one newline per video."""
    half = -(-_patches(batch.config)[0] // 2)
    bound = re.search(r"\d+", str(setting(batch.config, "vision_aspect_ratio", default="")))
    videos = [
        Unit("video", grid("video", s[0], half, half, "video")) for s in batch.shapes("pixel_values_videos") or ()
    ]
    return {"image": _anyres(batch, 0, int(bound[0]) if bound else 9), "video": videos}


def video_llava(batch: Batch) -> Units:
    """A grid of patches per image and per frame, a class token in front: of frames always, of images by the config."""
    height, width = _patches(batch.config)
    full = setting(batch.config, "vision_feature_select_strategy", default="default") == "full"

    def frames(n: int, name: str, extra: int) -> Unit:
        parts = [part for f in range(n) for part in (loose(extra, f), grid(name, 1, height, width, first=f))]
        return Unit(name, np.concatenate(parts))

    images = batch.shapes("pixel_values") or batch.shapes("pixel_values_images") or ()
    videos = batch.shapes("pixel_values_videos") or ()
    return {
        "image": [frames(1, "image", int(full)) for _ in images],
        "video": [frames(s[0], "video", 1) for s in videos],
    }


def _tiles(batch: Batch, height: int, width: int) -> Units:
    """As many equal grids as the placeholders fill; what belongs together is seen from the text between them."""
    return {"image": [Unit("image", grid("image", 1, height, width))] * batch.tiles("image", height * width)}


def internvl(batch: Batch) -> Units:
    """Tiles of ``image_seq_length`` tokens: side by side in an image, ``Frame1:`` text between them in a video."""
    ratio = float(setting(batch.config, "downsample_ratio", default=0.5))
    height, width = _patches(batch.config)
    return _tiles(batch, int(height * ratio), int(width * ratio))


def idefics3(batch: Batch) -> Units:
    """A run per tile or frame, each with its own text in front."""
    factor = int(setting(batch.config, "scale_factor", default=2))
    height, width = _patches(batch.config)
    return _tiles(batch, height // factor, width // factor)


def gemma3(batch: Batch) -> Units:
    """``mm_tokens_per_image`` per image or crop, each an image of its own."""
    side = math.isqrt(int(setting(batch.config, "mm_tokens_per_image", default=256)))
    return _tiles(batch, side, side)


def paligemma(batch: Batch) -> Units:
    """A grid of patches per image, no text between."""
    return _tiles(batch, *_patches(batch.config))


def perception_lm(batch: Batch) -> Units:
    """Pooled patches per tile of an image (thumbnail first) or frame of a video."""
    config = batch.config
    pool = int(setting(config, "projector_pooling_ratio", default=1))
    units: Units = {}
    for name, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        units[name] = []
        for shape in batch.shapes(key) or ():
            patch = _timm_patch(setting(config, "vision_config"), shape[-2])
            units[name].append(Unit(name, grid(name, shape[0], shape[-2] // patch // pool, shape[-1] // patch // pool)))
    return units


def _timm_patch(vision: Any, pixels: int) -> int:
    """Patch size of a timm tower, which its config tells in one of several ways."""
    args = setting(vision, "model_args", default={})
    given = setting(vision, "patch_size") or setting(args, "patch_size")
    if given:
        return pair(given)[0]
    if reference := setting(args, "ref_feat_shape"):
        return pair(setting(args, "img_size", default=pixels))[0] // pair(reference)[0]
    if named := re.search(r"patch(\d+)", str(setting(vision, "architecture", default=""))):
        return int(named[1])
    raise ValueError(
        f"perception_lm: the patch size is neither in vision_config.model_args ({sorted(args)}) nor in the name of the "
        f"architecture ({setting(vision, 'architecture')!r}): {WAY_OUT}"
    )


def phi4_multimodal(batch: Batch) -> Units:
    """The crops as one map with a newline per row (frame 0), a separator, the whole image small (frame 1)."""
    config = batch.config
    base = -(-_patches(config)[0] // 2)
    crop = int(setting(config, "vision_config", "crop_size", default=448))
    sizes, masks = batch.table("image_sizes"), batch.table("image_attention_mask")
    images = []
    for number, (height, width) in enumerate([] if sizes is None else sizes.reshape(-1, 2).tolist()):
        tall, wide = height // crop, width // crop
        h, w = tall * base, wide * base
        if masks is not None:
            # Padding is at the bottom and at the right, so the first column and the first row tell what is used.
            used = masks.reshape(-1, *masks.shape[-3:])[number, 1 : tall * wide + 1, ::2, ::2]
            used = used.reshape(tall, wide, base, base)
            h, w = int(used[:, 0, :, 0].sum()), int(used[0, :, 0, :].sum())
        parts = [grid("image", 1, h, w, "row"), loose(1), grid("image", 1, base, base, "row", first=1)]
        images.append(Unit("image", np.concatenate(parts)))
    lengths = batch.table("audio_embed_sizes")
    audio = [Unit("audio", loose(n)) for n in ([] if lengths is None else lengths.reshape(-1).tolist())]
    return {"image": images, "audio": audio}
