"""Tiny random models of every family that mmflex supports, with prompts for them: no weights, no downloads.

    family = FAMILIES["qwen2_5_vl"]
    model = family.model()                        # two layers, hidden size 64, a tiny vision tower, fixed seed
    batch = family.batch(model.config, batch=2)   # what the family's processor would return, padded on the left
    model(**batch.inputs)

The prompts are put together by hand, token by token, as the families' processors do it (expanded placeholders,
separators, timestamps), next to what every token is. So ``batch.columns`` is an independent statement of the layout,
and the real model checks the number of placeholders: it refuses to run if its features don't fill them.

Left out or replaced, and why:

- Perception-LM's vision tower is a timm model and timm is not installed with the test dependencies: a CLIP tower with
  the same interface stands in. Its projector, pooling and language model are the real ones.
- Real image and video processors need torchvision, so only the Pillow-based ones are exercised, in test_layouts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

VOCAB = 128
PAD = 0
# Ids of 100 and more are special tokens, ordinary text is drawn from [5, 90).
IMAGE, VIDEO, AUDIO, START, END, BREAK, STOP, FAKE, GLOBAL, TILE = range(100, 110)
VIDEO_START, VIDEO_END = 110, 111

TEXT, PICTURE, FILM, SOUND = 0, 1, 2, 3
Cells = list[tuple[int, int]]


def grid(frames: int, height: int, width: int, first: int = 0) -> Cells:
    """(frame, cell) of every token of a grid, in reading order."""
    return [(first + f, y * width + x) for f in range(frames) for y in range(height) for x in range(width)]


def rows(height: int, width: int, frame: int) -> Cells:
    """(frame, cell) of a grid with one more token at the end of every row."""
    return [(frame, n) for n in range(height * (width + 1))]


class Prompt:
    """One prompt under construction: ids, what each token is, and the tensors that go with it."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.ids: list[int] = []
        self.columns: list[tuple[int, int, int, int]] = []  # modality, segment, frame, cell
        self.media: dict[str, list[torch.Tensor]] = {}
        self.segment = -1
        self.in_text = False

    def text(self, n: int, *specials: int) -> Prompt:
        """``n`` tokens of text and then special tokens, which are text as well."""
        drawn = self.rng.integers(5, 90, n).tolist()
        if not self.in_text and (n or specials):
            self.segment, self.in_text = self.segment + 1, True
        self._add([*drawn, *specials], [(TEXT, self.segment, -1, -1)] * (n + len(specials)))
        return self

    def unit(self, modality: int, ids: Iterable[int], cells: Cells) -> Prompt:
        """A new segment of visual (or audio) tokens."""
        self.segment, self.in_text = self.segment + 1, False
        self._add(list(ids), [(modality, self.segment, *cell) for cell in cells])
        return self

    def more(self, modality: int, ids: Iterable[int], cells: Cells, between: Iterable[int] = ()) -> Prompt:
        """More tokens of the same segment, with text ``between`` (a timestamp)."""
        between = list(between)
        self._add(between, [(TEXT, self.segment, -1, -1)] * len(between))
        self._add(list(ids), [(modality, self.segment, *cell) for cell in cells])
        return self

    def with_media(self, **tensors: Any) -> Prompt:
        for name, tensor in tensors.items():
            self.media.setdefault(name, []).append(torch.as_tensor(tensor))
        return self

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape).astype(np.float32))

    def _add(self, ids: list[int], columns: list[tuple[int, int, int, int]]) -> None:
        assert len(ids) == len(columns), (len(ids), len(columns))
        self.ids += ids
        self.columns += columns


@dataclass(frozen=True)
class Batch:
    """Inputs as a processor returns them, and int ``columns [4, B, N]``: modality, segment, frame, cell."""

    inputs: dict[str, torch.Tensor]
    columns: np.ndarray


@dataclass(frozen=True)
class Family:
    """One family: how to build its model, and how its prompts look.

    ``prompt(config, number, text, frames)`` returns prompt ``number`` (0, 1, ...) of a batch, with ``text`` tokens of
    text at its end and about ``frames`` frames in its video, where the family has videos.
    """

    name: str
    build: Callable[[], Any]
    prompt: Callable[[Any, int, int, int], Prompt]
    type_ids: str | None = None  # the name under which the model takes the modality of each token
    kind: str = "vlm"
    note: str = ""
    attention: str = "causal"  # of the text model: "causal", "bidirectional" (image blocks), "prefix", "sliding"
    stacked: tuple[str, ...] = field(default=())  # tensors [B, most, ...] padded with zeros, not concatenated

    def model(self, seed: int = 0) -> Any:
        """The model on the CPU in float32, in eval mode. ``generate()`` never meets an end token."""
        torch.manual_seed(seed)
        model = self.build().eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
        return model

    def batch(self, config: Any, batch: int = 1, side: str = "left", text: int = 12, frames: int = 3) -> Batch:
        """Prompts of different lengths, padded on ``side``. An attention mask is always there."""
        prompts = [self.prompt(config, number, text, frames) for number in range(batch)]
        length = max(len(p.ids) for p in prompts)
        ids, mask = np.full((batch, length), PAD), np.zeros((batch, length), np.int64)
        columns = np.full((4, batch, length), -1)
        columns[0] = TEXT
        for number, prompt in enumerate(prompts):
            n = len(prompt.ids)
            at = slice(length - n, length) if side == "left" else slice(0, n)
            ids[number, at], mask[number, at] = prompt.ids, 1
            columns[:, number, at] = np.array(prompt.columns).T
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if self.type_ids:
            inputs[self.type_ids] = torch.from_numpy(columns[0].astype(np.int64))
        for name in dict.fromkeys(name for p in prompts for name in p.media):
            parts = [torch.cat(p.media[name]) if name in p.media else None for p in prompts]
            inputs[name] = _stack(parts) if name in self.stacked else torch.cat([p for p in parts if p is not None])
        return Batch(inputs, columns)


def _stack(parts: list[torch.Tensor | None]) -> torch.Tensor:
    """[B, most, ...], missing ones zero."""
    given = [part for part in parts if part is not None]
    most = max(len(part) for part in given)
    out = given[0].new_zeros(len(parts), most, *given[0].shape[1:])
    for row, part in enumerate(parts):
        if part is not None:
            out[row, : len(part)] = part
    return out


# ---- text configs -------------------------------------------------------------------------------------------------


def text_config(**more: Any) -> dict[str, Any]:
    """What all language models here share."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}


# ---- Qwen-VL, GLM-V, VideoLLaMA 3: grids ---------------------------------------------------------------------------


def _qwen(name: str, model: str, vision: dict[str, Any], text: dict[str, Any]) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        config = getattr(transformers, f"{model}Config")(
            text_config=text_config(rope_parameters=dict(MROPE), **text),
            vision_config={"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, **vision},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )
        return getattr(transformers, f"{model}ForConditionalGeneration")(config)

    return build


def _patch_rows(p: Prompt, t: int, h: int, w: int, temporal: int = 2) -> torch.Tensor:
    return p.noise(t * h * w, 3 * temporal * 4 * 4)


def _qwen_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """A video and an image; the second prompt has two images and a shorter video."""
    p = Prompt(number).text(5, START)
    t, h, w = (frames, 2, 3) if number % 2 == 0 else (2, 3, 2)
    p.unit(FILM, [VIDEO] * (t * h * w), grid(t, h, w)).text(4 + number, END)
    p.with_media(video_grid_thw=[[t, 2 * h, 2 * w]], pixel_values_videos=_patch_rows(p, t, 2 * h, 2 * w))
    for h, w in ((2, 2), (1, 4))[: 1 + number % 2]:
        p.text(1, START).unit(PICTURE, [IMAGE] * (h * w), grid(1, h, w)).text(0, END)
        p.with_media(image_grid_thw=[[1, 2 * h, 2 * w]], pixel_values=_patch_rows(p, 1, 2 * h, 2 * w))
    return p.text(text)


def _stamps(p: Prompt, frame: int) -> list[int]:
    """Timestamp text in front of a frame; its length grows, as that of "<9.8 seconds>" and "<10.2 seconds>"."""
    return p.rng.integers(5, 90, 3 + (frame >= 2)).tolist()


def _qwen3_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """Timestamp, start, frame, end for every frame of a video; an image in front in the second prompt."""
    p = Prompt(number).text(6)
    if number % 2:
        p.text(0, START).unit(PICTURE, [IMAGE] * 6, grid(1, 3, 2)).text(3, END)
        p.with_media(image_grid_thw=[[1, 6, 4]], pixel_values=_patch_rows(p, 1, 6, 4))
    t, h, w = frames + number, 2, 2
    p.text(3, START).unit(FILM, [VIDEO] * (h * w), grid(1, h, w))
    for frame in range(1, t):
        p.more(FILM, [VIDEO] * (h * w), grid(1, h, w, frame), between=[END, *_stamps(p, frame), START])
    p.with_media(video_grid_thw=[[t, 2 * h, 2 * w]], pixel_values_videos=_patch_rows(p, t, 2 * h, 2 * w))
    return p.text(text, END).text(2)


def _glm_build() -> Any:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
    config = Glm4vConfig(
        text_config=text_config(rope_parameters={**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}),
        vision_config={**vision, "image_size": 32, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )
    return Glm4vForConditionalGeneration(config)


def _glm_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """Frames are placeholders of the *image* id between video tokens, the timestamp after each."""
    p = Prompt(number).text(4)
    t, h, w = frames, 2, 2 + number % 2
    p.text(0, VIDEO_START, START).unit(FILM, [IMAGE] * (h * w), grid(1, h, w))
    for frame in range(1, t):
        p.more(FILM, [IMAGE] * (h * w), grid(1, h, w, frame), between=[END, *_stamps(p, frame)[1:], START])
    p.with_media(video_grid_thw=[[t, 2 * h, 2 * w]], pixel_values_videos=_patch_rows(p, t, 2 * h, 2 * w))
    return p.text(0, END).text(1, VIDEO_END).text(text)


def _glm_images(config: Any, number: int, text: int, frames: int) -> Prompt:
    """Images only (the model can't take both kinds in one batch: both use the image id)."""
    p = Prompt(number).text(4)
    for h, w in ((2, 3), (3, 2))[: 1 + number % 2]:
        p.text(0, START).unit(PICTURE, [IMAGE] * (h * w), grid(1, h, w)).text(1, END)
        p.with_media(image_grid_thw=[[1, 2 * h, 2 * w]], pixel_values=_patch_rows(p, 1, 2 * h, 2 * w))
    return p.text(text)


def _video_llama_build() -> Any:
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = VideoLlama3Config(
        text_config=text_config(model_type="qwen2"),
        vision_config={**vision, "patch_size": 4},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return VideoLlama3ForConditionalGeneration(config)


def _video_llama_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """Frames that lose cells to the compression mask (the first keeps all), ``Time 1.0s:`` in front; an image."""
    p = Prompt(number).text(5)
    t, h, w = frames, 2, 3
    kept = p.rng.random((t, h * w)) < 0.6
    kept[0], kept[:, 0] = True, True
    for frame in range(t):
        cells = [(frame, int(cell)) for cell in np.flatnonzero(kept[frame])]
        if frame == 0:
            p.text(3).unit(FILM, [VIDEO] * len(cells), cells)
        else:
            p.more(FILM, [VIDEO] * len(cells), cells, between=_stamps(p, frame))
    p.with_media(
        video_grid_thw=[[t, 2 * h, 2 * w]],
        video_merge_sizes=[2],
        video_compression_mask=kept.reshape(-1),
        pixel_values_videos=_patch_rows(p, t, 2 * h, 2 * w, 1),
    )
    if number % 2:
        p.text(3).unit(PICTURE, [IMAGE] * 12, grid(1, 3, 4))
        p.with_media(image_grid_thw=[[1, 3, 4]], image_merge_sizes=[1], pixel_values=_patch_rows(p, 1, 3, 4, 1))
    return p.text(text)


# ---- LLaVA ---------------------------------------------------------------------------------------------------------

SIDE = 6  # patches per side of the CLIP tower above: 24 pixels, 4 a patch


def _llava_build() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=text_config(model_type="llama"),
        vision_config={"model_type": "clip_vision_model", **CLIP},
        image_token_index=IMAGE,
        image_seq_length=SIDE * SIDE,
    )
    return LlavaForConditionalGeneration(config)


def _llava_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """One image, in the second prompt two that touch."""
    p = Prompt(number).text(5)
    for _ in range(1 + number % 2):
        p.unit(PICTURE, [IMAGE] * SIDE**2, grid(1, SIDE, SIDE)).with_media(pixel_values=p.noise(1, 3, 24, 24))
    return p.text(text + number)


PINPOINTS = [[24, 48], [48, 24], [48, 48]]


def _llava_next_video_build() -> Any:
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        text_config=text_config(model_type="llama"),
        vision_config={"model_type": "clip_vision_model", **CLIP},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        spatial_pool_stride=2,
    )
    return LlavaNextVideoForConditionalGeneration(config)


def _anyres(p: Prompt, size: tuple[int, int], map_h: int, map_w: int, tiles: int, most: int) -> Prompt:
    """An image in tiles: the whole of it small, then a ``map_h`` x ``map_w`` map with a newline per row."""
    cells = grid(1, SIDE, SIDE) + rows(map_h, map_w, 1)
    pixels = torch.zeros(1, most, 3, 24, 24)
    pixels[:, : 1 + tiles] = p.noise(1, 1 + tiles, 3, 24, 24)
    return p.unit(PICTURE, [IMAGE] * len(cells), cells).with_media(pixel_values=pixels, image_sizes=[list(size)])


def _llava_next_video_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """A video of 3 x 3 pooled cells a frame; in the second prompt an image, whose padding is cut off, as well."""
    p = Prompt(number).text(5).unit(FILM, [VIDEO] * (frames * 9), grid(frames, 3, 3))
    p.with_media(pixel_values_videos=p.noise(1, frames, 3, 24, 24)).text(3)
    if number % 2:
        # 40 x 60 pixels fit 48 x 48 best and fill 32 rows of it: 12 x 12 patches less 2 above and 2 below.
        _anyres(p, (40, 60), 8, 12, tiles=4, most=5)
    return p.text(text)


def _llava_onevision_build() -> Any:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    siglip = {**CLIP, "image_size": 20, "vision_use_head": False}
    config = LlavaOnevisionConfig(
        text_config=text_config(model_type="qwen2"),
        vision_config={"model_type": "siglip_vision_model", **siglip},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[20, 20 * n] for n in range(1, 4)] + [[20 * n, 20] for n in range(1, 4)] + [[60, 60]],
        vision_aspect_ratio="anyres_max_4",
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _llava_onevision_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """A video of 3 x 3 cells a frame (5 x 5 halved, rounded up) and one newline; the second prompt has an image.

    60 x 60 pixels are 15 x 15 patches, more than four tiles' worth (100): scaled by 1 / 1.5 to 10 x 10.
    """
    p = Prompt(number).text(5).unit(FILM, [VIDEO] * (frames * 9 + 1), [*grid(frames, 3, 3), (-1, -1)])
    p.with_media(pixel_values_videos=p.noise(1, frames, 3, 20, 20)).text(3)
    if number % 2:
        cells = grid(1, 5, 5) + rows(10, 10, 1)
        p.unit(PICTURE, [IMAGE] * len(cells), cells)
        p.with_media(pixel_values=p.noise(1, 10, 3, 20, 20), image_sizes=[[60, 60]])
    return p.text(text)


# ---- tiles and frames without grids --------------------------------------------------------------------------------


def _internvl_build() -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = {**CLIP, "image_size": [16, 16], "patch_size": [4, 4], "num_hidden_layers": 1}
    config = InternVLConfig(
        text_config=text_config(model_type="qwen2"),
        vision_config=vision,
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return InternVLForConditionalGeneration(config)


def _internvl_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """A video with ``Frame1:`` text between its frames; the second prompt has an image of three tiles."""
    p = Prompt(number).text(5)
    if number % 2:
        p.text(0, START).unit(PICTURE, [IMAGE] * 12, grid(3, 2, 2)).text(2, END).with_media(
            pixel_values=p.noise(3, 3, 16, 16)
        )
    p.text(4, START).unit(FILM, [IMAGE] * 4, grid(1, 2, 2))
    for frame in range(1, frames):
        p.more(FILM, [IMAGE] * 4, grid(1, 2, 2, frame), between=[END, *_stamps(p, frame), START])
    return p.with_media(pixel_values=p.noise(frames, 3, 16, 16)).text(0, END).text(text)


def _idefics(model: str) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        config = getattr(transformers, f"{model}Config")(
            text_config=text_config(model_type="llama"),
            vision_config={**CLIP, "image_size": 16, "patch_size": 4},
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        )
        return getattr(transformers, f"{model}ForConditionalGeneration")(config)

    return build


def _tiled(p: Prompt, tall: int, wide: int) -> Prompt:
    """An image cut into tiles, each with a token of its own in front, and the whole of it at the end."""
    for number in range(tall * wide):
        front = [FAKE, TILE + 5 + number]
        if number == 0:
            p.text(0, *front).unit(PICTURE, [IMAGE] * 4, grid(1, 2, 2))
        else:
            newline = p.rng.integers(5, 90, int(number % wide == 0)).tolist()
            p.more(PICTURE, [IMAGE] * 4, grid(1, 2, 2, number), between=[*newline, *front])
    p.more(PICTURE, [IMAGE] * 4, grid(1, 2, 2, tall * wide), between=[7, FAKE, GLOBAL]).text(0, FAKE)
    return p.with_media(pixel_values=p.noise(tall * wide + 1, 3, 16, 16))


def _idefics3_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """An image of 2 x 2 tiles; the second prompt has a whole image right in front of it."""
    p = Prompt(number).text(5)
    if number % 2:
        p.text(0, FAKE, GLOBAL).unit(PICTURE, [IMAGE] * 4, grid(1, 2, 2)).text(0, FAKE)
        p.with_media(pixel_values=p.noise(1, 3, 16, 16))
    return _tiled(p, 2, 2).text(text)


def _smolvlm_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """A video, ``Frame from 00:01:`` in front of every frame; the second prompt has an image in tiles, too."""
    p = Prompt(number).text(4)
    if number % 2:
        _tiled(p, 1, 2).text(50)
    p.text(6, FAKE, GLOBAL).unit(FILM, [IMAGE] * 4, grid(1, 2, 2))
    for frame in range(1, frames):
        between = [FAKE, *p.rng.integers(5, 90, 6).tolist(), FAKE, GLOBAL]
        p.more(FILM, [IMAGE] * 4, grid(1, 2, 2, frame), between=between)
    return p.with_media(pixel_values=p.noise(frames, 3, 16, 16)).text(0, FAKE).text(text)


def _perception_build() -> Any:
    from transformers import CLIPVisionConfig, PerceptionLMConfig, PerceptionLMForConditionalGeneration

    tower = CLIPVisionConfig(**CLIP, model_args={"embed_dim": 32, "img_size": [24, 24], "ref_feat_shape": [6, 6]})
    config = PerceptionLMConfig(
        text_config=text_config(model_type="llama"),
        vision_config=tower,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
    )
    return PerceptionLMForConditionalGeneration(config)


def _perception_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """A video; the second prompt has an image in tiles (thumbnail and two) as well."""
    p = Prompt(number).text(5).unit(FILM, [VIDEO] * (frames * 9), grid(frames, 3, 3)).text(3)
    p.with_media(pixel_values_videos=p.noise(1, frames, 3, 24, 24))
    if number % 2:
        p.unit(PICTURE, [IMAGE] * 27, grid(3, 3, 3)).with_media(pixel_values=p.noise(1, 3, 3, 24, 24))
    return p.text(text)


# ---- images of their own size --------------------------------------------------------------------------------------


def _mistral3_build() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config=text_config(model_type="mistral", sliding_window=None, head_dim=16),
        vision_config={"model_type": "pixtral", **CLIP, "image_size": 48, "head_dim": 16},
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return Mistral3ForConditionalGeneration(config)


def _broken_rows(p: Prompt, h: int, w: int) -> Prompt:
    """Rows of an image, a break token after each, an end token after the last."""
    ids = ([IMAGE] * w + [BREAK]) * h
    return p.unit(PICTURE, [*ids[:-1], STOP], rows(h, w, 0))


def _mistral3_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """Images of different sizes, padded to 48 x 48 pixels; two of them touch in the second prompt."""
    p = Prompt(number).text(4)
    for h, w in ((2, 3), (4, 2))[: 1 + number % 2]:
        _broken_rows(p, h, w)
        p.with_media(pixel_values=p.noise(1, 3, 48, 48), image_sizes=[[h * 8, w * 8]])
    return p.text(text)


def _pixtral_build() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=text_config(model_type="mistral", sliding_window=None, head_dim=16),
        vision_config={"model_type": "pixtral", **CLIP, "image_size": 48, "head_dim": 16},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def _pixtral_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    p = Prompt(number).text(4)
    for h, w in ((3, 4), (5, 2))[: 1 + number % 2]:
        _broken_rows(p, h, w).text(2)
        p.with_media(pixel_values=p.noise(1, 3, 48, 48), image_sizes=[[h * 4, w * 4]])
    return p.text(text)


def _phi4_build() -> Any:
    from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

    config = Phi4MultimodalConfig(
        **text_config(original_max_position_embeddings=16384),
        vision_config={**CLIP, "image_size": 16, "patch_size": 4, "crop_size": 16, "image_token_id": IMAGE},
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
            "audio_token_id": AUDIO,
            "feature_layer": -1,
        },
    )
    return Phi4MultimodalForCausalLM(config)


def _phi4_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """An image of 1 x 2 crops, the last column of patches padding; the second prompt has one of 2 x 1, all used."""
    p = Prompt(number).text(5)
    tall, wide, used_h, used_w = ((1, 2, 2, 3), (2, 1, 4, 2))[number % 2]
    used = torch.zeros(tall * 4, wide * 4)
    used[: used_h * 2, : used_w * 2] = 1
    masks = torch.cat([torch.ones(1, 4, 4), used.view(tall, 4, wide, 4).transpose(1, 2).reshape(-1, 4, 4)])
    cells = [*rows(used_h, used_w, 0), (-1, -1), *rows(2, 2, 1)]
    p.unit(PICTURE, [IMAGE] * len(cells), cells)
    p.with_media(
        image_pixel_values=p.noise(1, 3, 3, 16, 16),
        image_sizes=[[tall * 16, wide * 16]],
        image_attention_mask=masks[None],
    )
    return p.text(text)


# ---- image blocks that see both ways -------------------------------------------------------------------------------


def _gemma3_build() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config=text_config(head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
        vision_config={"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False},
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=9,
    )
    return Gemma3ForConditionalGeneration(config)


def _gemma3_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    p = Prompt(number).text(5)
    for _ in range(1 + number % 2):
        p.text(1, START).unit(PICTURE, [IMAGE] * 9, grid(1, 3, 3)).text(1, END)
        p.with_media(pixel_values=p.noise(1, 3, 24, 24))
    return p.text(text)


def _paligemma_build() -> Any:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        text_config=text_config(model_type="gemma", head_dim=16),
        vision_config={"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False},
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    return PaliGemmaForConditionalGeneration(config)


def _paligemma_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    """Images in front; only the second prompt has two."""
    p = Prompt(number)
    for _ in range(1 + number % 2):
        p.unit(PICTURE, [IMAGE] * 36, grid(1, SIDE, SIDE)).with_media(pixel_values=p.noise(1, 3, 24, 24))
    return p.text(text + 4)


# ---- language models -----------------------------------------------------------------------------------------------


def _llm(model: str, **more: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        config = getattr(transformers, f"{model}Config")(**text_config(**more))
        return getattr(transformers, f"{model}ForCausalLM")(config)

    return build


def _text_prompt(config: Any, number: int, text: int, frames: int) -> Prompt:
    return Prompt(number).text(text + 20 - 5 * number)


_QWEN2_VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
_QWEN25_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "num_heads": 2,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
_QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "num_heads": 2,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
_MOE = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

_TYPE = "mm_token_type_ids"
_BOTH_WAYS = "image blocks see both ways"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("qwen2_vl", _qwen("qwen2_vl", "Qwen2VL", _QWEN2_VISION, {}), _qwen_prompt, _TYPE),
        Family("qwen2_5_vl", _qwen("qwen2_5_vl", "Qwen2_5_VL", _QWEN25_VISION, {}), _qwen_prompt, _TYPE),
        Family("qwen3_vl", _qwen("qwen3_vl", "Qwen3VL", _QWEN3_VISION, {"head_dim": 16}), _qwen3_prompt, _TYPE),
        Family("qwen3_vl_moe", _qwen("qwen3_vl_moe", "Qwen3VLMoe", _QWEN3_VISION, _MOE), _qwen3_prompt, _TYPE),
        Family("llava", _llava_build, _llava_prompt),
        Family("llava_next_video", _llava_next_video_build, _llava_next_video_prompt),
        Family("llava_onevision", _llava_onevision_build, _llava_onevision_prompt),
        Family("internvl", _internvl_build, _internvl_prompt),
        Family("smolvlm", _idefics("SmolVLM"), _smolvlm_prompt, stacked=("pixel_values",)),
        Family("idefics3", _idefics("Idefics3"), _idefics3_prompt, stacked=("pixel_values",)),
        Family("video_llama_3", _video_llama_build, _video_llama_prompt),
        Family("glm4v", _glm_build, _glm_prompt, _TYPE, note="videos"),
        Family("glm4v_images", _glm_build, _glm_images, _TYPE, note="images"),
        Family("mistral3", _mistral3_build, _mistral3_prompt),
        Family("pixtral", _pixtral_build, _pixtral_prompt, note="as LLaVA with a Pixtral tower"),
        Family("perception_lm", _perception_build, _perception_prompt, note="a CLIP tower in place of timm's"),
        Family("phi4_multimodal", _phi4_build, _phi4_prompt),
        Family("gemma3", _gemma3_build, _gemma3_prompt, "token_type_ids", note=_BOTH_WAYS, attention="bidirectional"),
        Family("paligemma", _paligemma_build, _paligemma_prompt, note=_BOTH_WAYS, attention="prefix"),
        Family("llama3", _llm("Llama"), _text_prompt, kind="llm"),
        Family("qwen2", _llm("Qwen2"), _text_prompt, kind="llm"),
        Family(
            "qwen2_5",
            _llm("Qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
            _text_prompt,
            kind="llm",
        ),
        Family("qwen3", _llm("Qwen3", head_dim=16), _text_prompt, kind="llm"),
        Family("glm4", _llm("Glm4", head_dim=16), _text_prompt, kind="llm"),
        Family("phi3", _llm("Phi3", sliding_window=None), _text_prompt, kind="llm"),
        Family("yi", _llm("Llama", num_key_value_heads=1), _text_prompt, kind="llm", note="Yi ships as a Llama class"),
        Family("mistral", _llm("Mistral", sliding_window=None, head_dim=16), _text_prompt, kind="llm"),
        Family(
            "mistral_sliding",
            _llm("Mistral", sliding_window=16, head_dim=16),
            _text_prompt,
            kind="llm",
            note="all layers sliding, as Mistral 7B v0.1",
            attention="sliding",
        ),
    )
}
