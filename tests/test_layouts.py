"""Layouts of transformers' models: every family's prompts against what each token was made to be."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import AUDIO, FAMILIES, IMAGE, VIDEO, Batch

from mmflex import Segment
from mmflex.integrations import layouts
from mmflex.integrations.layouts import (
    PixelShapes,
    call_arguments,
    geometry,
    geometry_of_tower_calls,
    layout_for,
    layout_from_positions,
    repeat_layout,
)
from mmflex.ir.layout import MODALITIES, TokenLayout

transformers = pytest.importorskip("transformers")

VISUAL = sorted(name for name, family in FAMILIES.items() if family.kind == "vlm")
MROPE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_images"]
TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")


@functools.cache
def model_of(name: str) -> Any:
    return FAMILIES[name].model()


def columns(layout: TokenLayout) -> np.ndarray:
    return np.stack([layout.modality, layout.segment, layout.frame, layout.cell])


def only_tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in TOKENS if name in inputs}


# ---- every family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "side"), [(1, "left"), (2, "left"), (2, "right"), (3, "left")])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_is_what_it_was_made_to_be(name: str, batch: int, side: str) -> None:
    model = model_of(name)
    made = FAMILIES[name].batch(model.config, batch, side)
    layout = layout_for(model.config, made.inputs)
    np.testing.assert_array_equal(columns(layout), made.columns)
    mask = made.inputs["attention_mask"].numpy() != 0
    np.testing.assert_array_equal(layout.valid, mask)
    np.testing.assert_array_equal(layout.position[mask], np.concatenate([np.arange(n) for n in mask.sum(1)]))


@pytest.mark.parametrize("name", VISUAL)
def test_the_model_fills_exactly_these_placeholders(name: str) -> None:
    """The real model refuses prompts whose placeholders its features don't fill; the layout has as many."""
    model = model_of(name)
    made = FAMILIES[name].batch(model.config, 2)
    with torch.no_grad():
        assert torch.isfinite(model(**made.inputs).logits).all()
    placeholders = torch.isin(made.inputs["input_ids"], torch.tensor([IMAGE, VIDEO, AUDIO]))
    layout = layout_for(model.config, made.inputs)
    visual = (layout.modality > 0) & layout.valid
    assert not (placeholders.numpy() & ~visual).any()
    separators = visual & ~placeholders.numpy()
    assert separators.any() == (name in ("mistral3", "pixtral")), "only Pixtral's break tokens have an id of their own"
    if not separators.any():
        assert visual.sum() == int(placeholders.sum())


@pytest.mark.parametrize("name", VISUAL)
def test_frames_are_numbered_and_cells_fill_them(name: str) -> None:
    layout = layout_for(model_of(name).config, FAMILIES[name].batch(model_of(name).config, 2, frames=5).inputs)
    for row in range(2):
        for segment in np.unique(layout.segment[row][layout.modality[row] > 0]):
            of = (layout.segment[row] == segment) & (layout.modality[row] > 0)
            frames = layout.frame[row][of]
            assert (np.diff(frames[frames >= 0]) >= 0).all()
            pairs = list(zip(frames[frames >= 0], layout.cell[row][of][frames >= 0], strict=True))
            assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "smolvlm", "llava_onevision"])
def test_frame_stride_counts_tokens_of_the_video(name: str) -> None:
    """Timestamps of varying length don't matter: the stride is counted among the video's own tokens."""
    model = model_of(name)
    layout = layout_for(model.config, FAMILIES[name].batch(model.config, frames=6).inputs)
    per_frame = {"qwen2_5_vl": 6, "qwen3_vl": 4, "glm4v": 4, "internvl": 4, "smolvlm": 4, "llava_onevision": 9}
    assert layout.frame_stride(MODALITIES["video"]) == per_frame[name]


# ---- by hand --------------------------------------------------------------------------------------------------------


def same(layout: TokenLayout, *prompts: list[Any], side: str = "left") -> None:
    expected = TokenLayout.batch([TokenLayout.from_segments(prompt) for prompt in prompts], side=side)
    np.testing.assert_array_equal(columns(layout), columns(expected))
    assert layout.fingerprint == expected.fingerprint


def config_of(model_type: str, **more: Any) -> SimpleNamespace:
    """A config by its attributes alone, as remote code may bring one."""
    vision = SimpleNamespace(**more.pop("vision", {}))
    return SimpleNamespace(model_type=model_type, vision_config=vision, **more)


QWEN = {"image_token_id": 8, "video_token_id": 9, "vision": {"spatial_merge_size": 2}}


def test_qwen2_5_vl_by_hand() -> None:
    """Two rows padded on the left: an image and a video; two images. Merged two by two."""
    first = [1, 2, *[8] * 4, 3, *[9] * 18, 4, 5]
    second = [1, *[8] * 2, 3, *[8] * 6, 4]
    ids = torch.tensor([first, [0] * (len(first) - len(second)) + second])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4], [1, 6, 4]]),
        "video_grid_thw": torch.tensor([[3, 4, 6]]),
    }
    same(
        layout_for(config_of("qwen2_5_vl", **QWEN), inputs),
        [("text", 2), ("image", (1, 2, 2)), ("text", 1), ("video", (3, 2, 3)), ("text", 2)],
        [("text", 1), ("image", (1, 1, 2)), ("text", 1), ("image", (1, 3, 2)), ("text", 1)],
    )


def test_qwen3_vl_by_hand() -> None:
    """Timestamps of 3 and 4 tokens between the frames; that of the first is text in front."""
    ids = [1, 2, 3, *[9] * 4, 4, 5, 6, *[9] * 4, 4, 5, 6, 7, *[9] * 4, 4]
    inputs = {"input_ids": torch.tensor([ids]), "video_grid_thw": torch.tensor([[3, 4, 4]])}
    same(
        layout_for(config_of("qwen3_vl", **QWEN), inputs),
        [("text", 3), ("video", (3, 2, 2), {"timestamps": (0, 3, 4)}), ("text", 1)],
    )


def test_glm_tells_video_from_image_by_type_ids_or_by_the_tokens_around() -> None:
    config = config_of("glm4v", image_token_id=8, video_start_token_id=20, video_end_token_id=21, vision={})
    ids = torch.tensor([[1, 8, 8, 2, 20, 8, 8, 3, 8, 8, 21, 4]])
    inputs = {
        "input_ids": ids,
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
        "video_grid_thw": torch.tensor([[2, 4, 2]]),
    }
    prompt = [("text", 1), ("image", (1, 1, 2)), ("text", 2), ("video", (2, 2, 1), {"timestamps": (0, 1)}), ("text", 2)]
    same(layout_for(config, inputs), prompt)
    types = torch.tensor([[0, 1, 1, 0, 0, 2, 2, 0, 2, 2, 0, 0]])
    same(layout_for(config, {**inputs, "mm_token_type_ids": types}), prompt)


def test_llava_onevision_by_hand() -> None:
    """Videos at half a side rounded up and one newline; 27 x 27 patches become 14 x 14."""
    vision = {"image_size": 384, "patch_size": 14, "model_type": "siglip_vision_model"}
    config = config_of("llava_onevision", video_token_index=9, vision_aspect_ratio="anyres_max_9", vision=vision)
    inputs = {
        "input_ids": torch.tensor([[1, *[9] * (2 * 196 + 1), 2]]),
        "pixel_values_videos": torch.empty(1, 2, 3, 384, 384, device="meta"),
    }
    same(layout_for(config, inputs), [("text", 1), ("video", (2, 14, 14), {"newline": "video"}), ("text", 1)])


def test_video_llava_keeps_the_class_tokens_of_frames() -> None:
    """The model drops the class token of images alone."""
    config = transformers.VideoLlavaConfig()
    ids = torch.tensor([[1, *[config.image_token_index] * 256, 1, *[config.video_token_index] * (8 * 257), 1]])
    inputs = {
        "input_ids": ids,
        "pixel_values_images": torch.empty(1, 3, 224, 224, device="meta"),
        "pixel_values_videos": torch.empty(1, 8, 3, 224, 224, device="meta"),
    }
    layout = layout_for(config, inputs)
    assert layout.summary() == "text 1 | image 256 | text 1 | video 2056 | text 1"
    assert layout.cell[0, 258:261].tolist() == [-1, 0, 1]


def test_pixtral_rows_with_and_without_break_tokens() -> None:
    config = config_of("mistral3", image_token_index=8, spatial_merge_size=2, vision={"patch_size": 14})
    sizes = {"image_sizes": torch.tensor([[56, 84]])}
    broken = {"input_ids": torch.tensor([[1, 8, 8, 8, 6, 8, 8, 8, 7, 2]]), **sizes}
    same(layout_for(config, broken), [("text", 1), ("image", (1, 2, 3), {"newline": "row"}), ("text", 1)])
    plain = {"input_ids": torch.tensor([[1, 8, 8, 8, 8, 8, 8, 2]]), **sizes}
    same(layout_for(config, plain), [("text", 1), ("image", (1, 2, 3)), ("text", 1)])


@pytest.mark.parametrize(
    ("size", "cells"),
    # A 672 x 672 grid of two by two tiles of 24 x 24 patches; a wide image loses rows, a tall one columns.
    [((600, 600), (48, 48)), ((400, 600), (32, 48)), ((600, 333), (48, 26))],
)
def test_llava_next_cuts_the_padding_off(size: tuple[int, int], cells: tuple[int, int]) -> None:
    vision = {"image_size": 336, "patch_size": 14, "model_type": "clip_vision_model"}
    config = config_of("llava_next", image_token_index=8, image_grid_pinpoints=[[336, 672], [672, 672]], vision=vision)
    count = 24 * 24 + cells[0] * (cells[1] + 1)
    inputs = {"input_ids": torch.tensor([[8] * count]), "image_sizes": torch.tensor([list(size)])}
    layout = layout_for(config, inputs)
    assert [(layout.frame == n).sum() for n in (0, 1)] == [576, cells[0] * (cells[1] + 1)]


def test_llava_onevision_images_among_several_have_no_tiles() -> None:
    model = model_of("llava_onevision")
    inputs = {
        "input_ids": torch.tensor([[5, *[IMAGE] * 52, 5]]),
        "pixel_values": torch.randn(2, 10, 3, 20, 20),
        "image_sizes": torch.tensor([[60, 60], [60, 60]]),
        "batch_num_images": torch.tensor([2]),
    }
    with torch.no_grad():
        model(**inputs)  # the model agrees about the number of tokens
    layout = layout_for(model.config, inputs)
    assert layout.summary() == "text 1 | image 52 | text 1"
    assert layout.frame[0, 1:53].tolist() == ([0] * 25 + [-1]) * 2
    assert layout.segment[0].tolist() == [0] + [1] * 26 + [2] * 26 + [3]


def test_internvl_tiles_frames_and_neighbours() -> None:
    """Touching: tiles. A few tokens between: images of their own. A timestamp's worth: frames. Prose: apart."""
    vision = {"image_size": [448, 448], "patch_size": [14, 14]}
    config = config_of("internvl", image_token_id=8, downsample_ratio=1 / 16, vision=vision)  # 2 x 2 a tile
    tile, stamp, prose = [8] * 4, [3] * 8, [4] * 40
    ids = [*tile, *tile, 1, *tile, 1, 1, *tile, *prose, *tile, *stamp, *tile, *stamp, *tile, *stamp, *tile, *tile]
    layout = layout_for(config, {"input_ids": torch.tensor([ids])})
    same(
        layout,
        [
            Segment("image", frames=2, height=2, width=2),
            ("text", 1),
            ("image", (1, 2, 2)),
            ("text", 2),
            ("image", (1, 2, 2)),
            ("text", 40),
            ("video", (3, 2, 2), {"timestamps": (0, 8, 8)}),
            ("text", 8),
            Segment("image", frames=2, height=2, width=2),
        ],
    )


def test_audio_is_audio() -> None:
    config = model_of("phi4_multimodal").config
    inputs = {"input_ids": torch.tensor([[5, *[AUDIO] * 7, 5]]), "audio_embed_sizes": torch.tensor([7])}
    same(layout_for(config, inputs), [("text", 1), ("audio", 7), ("text", 1)])


def test_text_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    inputs = {"input_ids": torch.full((2, 4), 7), "attention_mask": mask}
    for config in (model_of("llama3").config, model_of("qwen2_5_vl").config, SimpleNamespace(model_type="anything")):
        same(layout_for(config, inputs), [("text", 2)], [("text", 4)])
    embeds = {"inputs_embeds": torch.zeros(2, 4, 8), "attention_mask": mask}
    same(layout_for(model_of("qwen2").config, embeds), [("text", 2)], [("text", 4)])


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISUAL)
def test_placeholders_that_are_not_described_are_refused(name: str) -> None:
    """One placeholder too many, in a place of its own: both numbers and the family are named."""
    model = model_of(name)
    inputs = dict(FAMILIES[name].batch(model.config, 1).inputs)
    ids = inputs["input_ids"].clone()
    ids[0, -2] = VIDEO if (ids == VIDEO).any() else IMAGE
    inputs["input_ids"] = ids
    count = int((ids == ids[0, -2]).sum())
    with pytest.raises(
        ValueError, match=rf"{model.config.model_type}: the prompts hold \d+ .*describe \d+.*token_layout"
    ) as error:
        layout_for(model.config, inputs)
    if name != "glm4v":  # there the stray one counts as an image, as it stands behind the video
        assert str(count) in str(error.value)


def test_the_error_names_numbers_and_what_is_missing() -> None:
    config = config_of("qwen2_5_vl", **QWEN)
    ids = torch.tensor([[1, *[8] * 7, 2]])
    with pytest.raises(
        ValueError, match=r"hold 7 image placeholder tokens but the inputs describe 4 .*not given: video_grid"
    ):
        layout_for(config, {"input_ids": ids, "image_grid_thw": torch.tensor([[1, 4, 4]])})
    with pytest.raises(ValueError, match=r"describe 0 .*not given: image_grid_thw"):
        layout_for(config, {"input_ids": ids})
    with pytest.raises(ValueError, match="describe 16"):
        layout_for(config, {"input_ids": ids, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 12]])})


def test_a_unit_does_not_reach_into_the_next_prompt() -> None:
    ids = torch.tensor([[8, 8, 8, 8, 1, 1], [8, 8, 1, 1, 1, 1]])
    grids = torch.tensor([[1, 2, 4], [1, 4, 4]])
    with pytest.raises(ValueError, match="image 1 of 4 tokens would reach from prompt 0 into prompt 1"):
        layout_for(config_of("qwen2_vl", **QWEN), {"input_ids": ids, "image_grid_thw": grids})


def test_unknown_families_are_refused_with_a_way_out() -> None:
    config = SimpleNamespace(model_type="llava_qwen", image_token_index=8)
    with pytest.raises(ValueError, match=r"no layout rule for model_type 'llava_qwen'.*from_segments.*token_layout"):
        layout_for(config, {"input_ids": torch.tensor([[1, 8, 8, 2]])})
    with pytest.raises(ValueError, match="no layout rule"):
        layout_for(
            SimpleNamespace(model_type="odd"), {"input_ids": torch.ones(1, 4), "pixel_values": torch.ones(1, 3, 4, 4)}
        )


def test_masks_that_say_too_little_are_refused() -> None:
    config, ids = model_of("qwen2").config, torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 4, 4\).*\(2, 4\)"):
        layout_for(config, {"input_ids": ids, "attention_mask": torch.ones(2, 1, 4, 4)})
    with pytest.raises(ValueError, match="attention_mask is a dict"):
        layout_for(config, {"input_ids": ids, "attention_mask": {"full_attention": None}})
    with pytest.raises(ValueError, match=r"\(2, 9\) but input_ids \(2, 4\)"):
        layout_for(config, {"input_ids": ids, "attention_mask": torch.ones(2, 9)})
    with pytest.raises(ValueError, match="needs input_ids"):
        layout_for(model_of("llava").config, {"inputs_embeds": torch.ones(1, 4, 8)})


def test_placeholders_in_the_padding_do_not_count() -> None:
    """Some tokenizers pad with the image token."""
    ids = torch.tensor([[8, 8, 8, 1, 8, 8, 2]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "image_grid_thw": torch.tensor([[1, 2, 4]])}
    expected = [("text", 1), ("image", (1, 1, 2)), ("text", 1)]
    layout = layout_for(config_of("qwen2_vl", **QWEN), inputs)
    np.testing.assert_array_equal(columns(layout[3:]), columns(TokenLayout.from_segments(expected)))
    assert layout.valid.sum() == 4


# ---- inside a model -------------------------------------------------------------------------------------------------


class Recorder:
    """What a patched model does to know its layouts: notes where the features are made, tokens at the top."""

    def __init__(self, model: Any) -> None:
        self.config, self.notes, self.layouts = model.config, {}, []
        self.positions: list[torch.Tensor] = []
        self.tower_calls: list[dict[str, Any]] = []
        self.owner, self.saved = model.base_model, {}
        self.depth = 0  # of calls that see less than the one around them: inside forward, and one feature in another
        for name in ("get_image_features", "get_video_features"):
            if hasattr(self.owner, name):
                self._wrap(name)
        self.hooks = [model.register_forward_pre_hook(self._enter, with_kwargs=True)]
        self.hooks.append(model.register_forward_hook(self._leave))
        if hasattr(self.owner, "language_model"):
            self.hooks.append(self.owner.language_model.register_forward_pre_hook(self._language, with_kwargs=True))
        tower = getattr(self.owner, "visual", getattr(self.owner, "vision_model", None))
        if tower is not None:
            self.hooks.append(tower.register_forward_pre_hook(self._tower, with_kwargs=True))

    def _wrap(self, name: str) -> None:
        original = getattr(self.owner, name)
        self.saved[name] = original

        @functools.wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if self.depth == 0:
                self.notes.update(geometry(call_arguments(original, args, kwargs)))
            self.depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self.depth -= 1

        setattr(self.owner, name, noted)

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.depth += 1
        self.tokens = {**geometry(kwargs), **only_tokens(kwargs)}

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self.depth -= 1

    def _language(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        if kwargs["inputs_embeds"].shape[1] > 1 and positions is not None:
            self.positions.append(positions)

    def _tower(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.tower_calls.append({name: kwargs.get(name) for name in ("grid_thw", "merge_sizes")})

    def layout(self) -> TokenLayout:
        return layout_for(self.config, {**self.notes, **self.tokens})

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for name in self.saved:
            delattr(self.owner, name)


def recorded(name: str, made: Batch, generate: bool = False, **options: Any) -> Recorder:
    """One prefill of a family's model with everything noted down."""
    model = model_of(name)
    recorder = Recorder(model)
    try:
        with torch.no_grad():
            if generate:
                model.generate(**made.inputs, max_new_tokens=1, do_sample=False, **options)
            else:
                model(**made.inputs)
    finally:
        recorder.close()
    return recorder


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("name", VISUAL)
def test_the_layout_is_known_when_the_language_model_runs(name: str, generate: bool) -> None:
    made = FAMILIES[name].batch(model_of(name).config, 2)
    recorder = recorded(name, made, generate)
    np.testing.assert_array_equal(columns(recorder.layout()), made.columns)
    assert not any(isinstance(value, torch.Tensor) for value in recorder.notes.values()), "no pixels are kept"


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "mistral3", "perception_lm"])
def test_beams_repeat_the_layout(name: str) -> None:
    made = FAMILIES[name].batch(model_of(name).config, 2)
    recorder = recorded(name, made, generate=True, num_beams=3)
    assert recorder.tokens["input_ids"].shape[0] == 6
    np.testing.assert_array_equal(columns(recorder.layout()), made.columns.repeat(3, axis=1))


def test_repeat_layout() -> None:
    layout = TokenLayout.batch([TokenLayout.from_segments([("image", (2, 2))]), TokenLayout.text(6)], side="left")
    twice = repeat_layout(layout, 2)
    np.testing.assert_array_equal(columns(twice), columns(layout).repeat(2, axis=1))
    np.testing.assert_array_equal(twice.position, layout.position.repeat(2, axis=0))
    with pytest.raises(ValueError, match="got 0"):
        repeat_layout(layout, 0)


@pytest.mark.parametrize(
    "name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_images", "video_llama_3"]
)
def test_the_calls_of_the_vision_tower_are_enough(name: str) -> None:
    model = model_of(name)
    made = FAMILIES[name].batch(model.config, 2)
    calls = recorded(name, made, generate=True).tower_calls
    tokens = only_tokens(made.inputs)
    notes = geometry_of_tower_calls(model.config, tokens, calls)
    notes |= {key: value for key, value in geometry(made.inputs).items() if key == "video_compression_mask"}
    np.testing.assert_array_equal(columns(layout_for(model.config, {**tokens, **notes})), made.columns)


def test_tower_calls_without_grids_are_refused() -> None:
    config = model_of("llava").config
    with pytest.raises(ValueError, match=r"llava: .*get_image_features"):
        geometry_of_tower_calls(config, {"input_ids": torch.tensor([[IMAGE]])}, [{}])
    config = model_of("qwen2_vl").config
    with pytest.raises(ValueError, match="called 1 times but the prompts hold placeholders of 0 kinds"):
        geometry_of_tower_calls(config, {"input_ids": torch.tensor([[1]])}, [{"grid_thw": torch.ones(1, 3)}])


def test_geometry_keeps_shapes_only() -> None:
    pixels = torch.zeros(2, 5, 3, 8, 8)
    kept = geometry(
        {"pixel_values": pixels, "image_grid_thw": torch.ones(1, 3), "input_ids": 1, "pixel_values_videos": None}
    )
    assert set(kept) == {"pixel_values", "image_grid_thw"}
    assert kept["pixel_values"] == PixelShapes(((5, 3, 8, 8),) * 2)
    ragged = geometry({"pixel_values": [pixels[0], pixels[0, :2]]})
    assert ragged["pixel_values"] == PixelShapes(((5, 3, 8, 8), (2, 3, 8, 8)))


# ---- positions alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MROPE)
def test_positions_give_the_same_layout(name: str, side: str) -> None:
    made = FAMILIES[name].batch(model_of(name).config, 2, side)
    valid = made.inputs["attention_mask"]
    for generate in (False, True):
        if generate and side == "right":
            continue
        positions = recorded(name, made, generate).positions[0]
        assert positions.shape[0] == (4 if generate else 3)
        layout = layout_from_positions(positions, modality=made.inputs["mm_token_type_ids"], valid=valid)
        np.testing.assert_array_equal(columns(layout), made.columns)


@pytest.mark.parametrize("name", MROPE)
def test_positions_tell_what_is_visual(name: str) -> None:
    """Without type ids: the same tokens are visual, in the same frames and cells."""
    made = FAMILIES[name].batch(model_of(name).config, 2)
    positions = recorded(name, made).positions[0]
    layout = layout_from_positions(positions, valid=made.inputs["attention_mask"])
    np.testing.assert_array_equal(layout.modality > 0, made.columns[0] > 0)
    np.testing.assert_array_equal(layout.cell, made.columns[3])
    np.testing.assert_array_equal(layout.frame, made.columns[2])


def test_a_last_cell_with_three_equal_positions_is_no_text() -> None:
    """The second frame of 2 x 2 x 2 ends where time, height and width are all 1 beyond the start."""
    video = [(3 + t, 3 + h, 3 + w) for t in (0, 1) for h in (0, 1) for w in (0, 1)]
    positions = torch.tensor([*[(n,) * 3 for n in range(3)], *video, *[(n,) * 3 for n in (5, 6)]])
    same(layout_from_positions(positions.T[:, None]), [("text", 3), ("video", (2, 2, 2)), ("text", 2)])


def test_positions_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 4\).*token_layout"):
        layout_from_positions(torch.zeros(2, 4))
    ragged = torch.tensor([[[0, 0, 0]], [[0, 0, 1]], [[0, 1, 0]]])
    with pytest.raises(ValueError, match="no whole number of frames of 2 x 2 cells"):
        layout_from_positions(ragged, modality=torch.ones(1, 3, dtype=torch.long))


# ---- real processors ------------------------------------------------------------------------------------------------


def tokenizer(**special: str) -> Any:
    """A tokenizer of single characters with these special tokens, by their names."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocab = {"<unk>": 0, **{c: n for n, c in enumerate("abcdefghijklmnopqrstuvwxyz0123456789 .:,\n<>", start=1)}}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )
    made.add_special_tokens({"additional_special_tokens": list(special.values())})
    for name, token in special.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def picture(height: int, width: int) -> Any:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def processor(name: str, **parts: Any) -> Any:
    """A real processor; without torchvision there is no real video processor to give it, so that check is skipped."""
    base = getattr(transformers, name)
    made = type(name, (base,), {"check_argument_for_proper_class": lambda self, name, value: None})
    return made(**parts)


def pillow(name: str, **options: Any) -> Any:
    """A real image processor that needs Pillow alone."""
    try:
        return getattr(transformers, name)(**options)
    except (AttributeError, ImportError) as error:
        pytest.skip(f"{name} of transformers {transformers.__version__}: {error}")


def runs(layout: TokenLayout, row: int = 0) -> list[tuple[int, int, int]]:
    """(modality, frames, tokens) per segment."""
    found = []
    for segment in range(layout.segment[row].max() + 1):
        of = layout.segment[row] == segment
        found.append((int(layout.modality[row][of].max()), int(layout.frame[row][of].max()) + 1, int(of.sum())))
    return found


def test_qwen_processor() -> None:
    words = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    images = pillow("Qwen2VLImageProcessorPil", min_pixels=28 * 28, max_pixels=28 * 28 * 12)
    made = processor("Qwen2_5_VLProcessor", image_processor=images, tokenizer=words, video_processor=None)
    inputs = made(
        images=[picture(60, 90), picture(90, 40), picture(30, 30)],
        text=["ab<|image_pad|>c", "<|image_pad|>abcd<|image_pad|>"],
        padding=True,
        return_tensors="pt",
    )
    config = config_of(
        "qwen2_5_vl", image_token_id=words.image_token_id, video_token_id=words.video_token_id, vision={}
    )
    grids = [(1, *(side // 2 for side in grid)) for grid in inputs["image_grid_thw"][:, 1:].tolist()]
    same(
        layout_for(config, inputs),
        [("text", 2), ("image", grids[0]), ("text", 1)],
        [("image", grids[1]), ("text", 4), ("image", grids[2])],
    )
    wrapped = made.create_mm_token_type_ids(inputs["input_ids"].tolist())
    np.testing.assert_array_equal(layout_for(config, inputs).modality, wrapped)


def metadata(frames: int, fps: float) -> Any:
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(total_num_frames=frames, fps=fps, frames_indices=list(range(frames)), duration=frames / fps)


@pytest.mark.parametrize("name", ["qwen3_vl", "glm4v", "internvl", "video_llama_3"])
def test_timestamps_as_the_processors_write_them(name: str) -> None:
    """The text of a whole video from the real processor, around 10 s, where timestamps get longer."""
    frames = 8
    grid = torch.tensor([[frames, 4, 4]])
    if name == "qwen3_vl":
        words = tokenizer(image_token="<i>", video_token="<v>", vision_start_token="<b>", vision_end_token="<e>")
        parts = {"image_processor": None, "video_processor": SimpleNamespace(merge_size=2, temporal_patch_size=2)}
        made = processor("Qwen3VLProcessor", tokenizer=words, **parts)
        video, config = {"video_grid_thw": grid, "video_metadata": [metadata(16, 1.0)]}, config_of(name, vision={})
        placeholder = {"video_token_id": words.video_token_id}
    elif name == "glm4v":
        words = tokenizer(image_token="<i>", video_token="<v>", start="<|begin_of_video|>", end="<|end_of_video|>")
        parts = {"image_processor": None, "video_processor": SimpleNamespace(merge_size=2)}
        made = processor("Glm4vProcessor", tokenizer=words, **parts)
        video, config = {"video_grid_thw": grid, "video_metadata": [metadata(16, 1.0)]}, config_of(name, vision={})
        placeholder = {"image_token_id": words.image_token_id}
        placeholder |= {"video_start_token_id": words.start_id, "video_end_token_id": words.end_id}
    elif name == "internvl":
        words = tokenizer(start_image_token="<b>", end_image_token="<e>", context_image_token="<i>", video_token="<v>")
        parts = {"image_processor": None, "video_processor": None, "image_seq_length": 4}
        made = processor("InternVLProcessor", tokenizer=words, **parts)
        vision = {"image_size": 8, "patch_size": 2}
        video, config = {"pixel_values_videos": torch.zeros(1, frames, 3, 8, 8)}, config_of(name, vision=vision)
        placeholder = {"image_token_id": words.context_image_token_id}
    else:
        words = tokenizer(image_token="<i>", video_token="<v>")
        made = processor("VideoLlama3Processor", tokenizer=words, image_processor=None, video_processor=None)
        video = {
            "video_grid_thw": grid,
            "video_merge_sizes": torch.tensor([2]),
            "video_metadata": [metadata(frames, 0.7)],
        }
        video["video_compression_mask"] = torch.ones(4 * frames, dtype=torch.bool)
        config, placeholder = config_of(name, vision={}), {"video_token_id": words.video_token_id}
    for key, value in placeholder.items():
        setattr(config, key, value)
    text = made.replace_video_token(video, video_idx=0)
    if name == "glm4v":
        text = f"<|begin_of_video|>{text}<|end_of_video|>"
    inputs = {**words(f"ab{text}cd", return_tensors="pt"), **video}
    layout = layout_for(config, inputs)
    assert [run for run in runs(layout) if run[0]] == [(2, frames, runs(layout)[1][2])]
    assert int((layout.modality == 2).sum()) == 4 * frames
    assert layout.frame_stride(2) == 4
    starts = np.flatnonzero(layout.cell[0] == 0)
    assert len(starts) == frames
    assert len(set(np.diff(starts))) == (1 if name == "internvl" else 2), "how far frames are apart varies"


def test_llava_processors() -> None:
    words = tokenizer(image_token="<image>")
    crop = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    more = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    vision = {"image_size": 24, "patch_size": 4, "model_type": "clip_vision_model"}
    made = transformers.LlavaProcessor(image_processor=pillow("CLIPImageProcessorPil", **crop), tokenizer=words, **more)
    inputs = made(images=[picture(60, 90)] * 2, text=["ab<image><image>c"], return_tensors="pt")
    config = config_of("llava", image_token_index=words.image_token_id, vision=vision)
    same(layout_for(config, inputs), [("text", 2), ("image", (6, 6)), ("image", (6, 6)), ("text", 1)])

    images = pillow("LlavaNextImageProcessorPil", image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]], **crop)
    made = transformers.LlavaNextProcessor(image_processor=images, tokenizer=words, **more)
    sizes = [(60, 90), (90, 61), (30, 30), (20, 77)]
    config = config_of(
        "llava_next",
        image_token_index=words.image_token_id,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        vision=vision,
    )
    for size in sizes:  # the processor's own count of tokens has to agree
        inputs = made(images=[picture(*size)], text=["ab<image>c"], return_tensors="pt")
        assert runs(layout_for(config, inputs))[1][:2] == (1, 2)
    inputs = made(
        images=[picture(*size) for size in sizes],
        text=["a<image>", "<image>b<image><image>"],
        padding=True,
        return_tensors="pt",
    )
    assert [run[0] for run in runs(layout_for(config, inputs), 1)] == [1, 0, 1, 1]


def test_llava_onevision_processor() -> None:
    words = tokenizer(image_token="<image>", video_token="<video>")
    pinpoints = [[20 * a, 20 * b] for a in range(1, 4) for b in range(1, 4)]
    images = pillow("LlavaOnevisionImageProcessorPil", size={"height": 20, "width": 20}, image_grid_pinpoints=pinpoints)
    more = {"num_image_tokens": 25, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_4"}
    made = processor("LlavaOnevisionProcessor", image_processor=images, tokenizer=words, video_processor=None, **more)
    config = config_of(
        "llava_onevision",
        image_token_index=words.image_token_id,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
        vision={"image_size": 20, "patch_size": 4},
    )
    for size in [(60, 90), (90, 61), (20, 20), (20, 77), (200, 200)]:
        inputs = made(images=[picture(*size)], text=["ab<image>c"], return_tensors="pt")
        assert runs(layout_for(config, inputs))[1][:2] == (1, 2)


def test_idefics3_processor() -> None:
    """Tiles by rows and columns, the whole image last; a small image has no tiles."""
    rows = {f"tile{a}{b}": f"<row_{a}_col_{b}>" for a in range(1, 5) for b in range(1, 5)}
    words = tokenizer(fake_image_token="<fake_token_around_image>", image_token="<image>", whole="<global-img>", **rows)
    size = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    images = pillow("Idefics3ImageProcessorPil", **size)
    made = transformers.Idefics3Processor(image_processor=images, tokenizer=words, image_seq_len=4)
    config = config_of(
        "idefics3", image_token_id=words.image_token_id, scale_factor=2, vision={"image_size": 16, "patch_size": 4}
    )
    inputs = made(images=[[picture(60, 90)] * 2], text=["ab<image>c<image>"], return_tensors="pt")
    found = [run for run in runs(layout_for(config, inputs)) if run[0]]
    tiles = inputs["pixel_values"].shape[1] // 2
    assert [run[:2] for run in found] == [(1, tiles), (1, tiles)]


def test_gemma_processors() -> None:
    words = tokenizer(image_token="<soft>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    images = pillow("Gemma3ImageProcessorPil", size={"height": 24, "width": 24})
    made = transformers.Gemma3Processor(image_processor=images, tokenizer=words, image_seq_length=9)
    inputs = made(images=[[picture(60, 90)] * 2], text=["ab<start_of_image>c<start_of_image>"], return_tensors="pt")
    config = config_of("gemma3", image_token_index=words.image_token_id, mm_tokens_per_image=9, vision={})
    assert [run for run in runs(layout_for(config, inputs)) if run[0]] == [(1, 1, 9)] * 2

    words = tokenizer(image_token="<image>")
    images = pillow("SiglipImageProcessorPil", size={"height": 24, "width": 24})
    images.image_seq_length = 36
    made = transformers.PaliGemmaProcessor(image_processor=images, tokenizer=words)
    inputs = made(images=[picture(60, 90)], text=["<image>ab"], return_tensors="pt")
    config = config_of("paligemma", image_token_index=words.image_token_id, vision={"image_size": 24, "patch_size": 4})
    assert runs(layout_for(config, inputs))[0] == (1, 1, 36)


def test_every_row_of_the_table_is_a_model_type_of_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert set(layouts.FAMILIES) <= set(CONFIG_MAPPING_NAMES)
    built = {model_of(name).config.model_type for name in VISUAL}
    assert built <= set(layouts.FAMILIES)
