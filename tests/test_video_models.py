"""Layouts of LLaVA-Video, LongVILA and VideoChat-Flash prompts: by formula, and read while a model of that kind runs.

The oracle lists tokens one by one; that text, newlines and features are where it says is checked against the embeddings
that the model joined.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from plain_models import (
    WIDTH,
    Encoder,
    LlavaVideo,
    PoolingEncoder,
    VideoChatFlash,
    Vila,
    config_of,
)
from torch import Tensor

from mask_builders import Dense, Grid
from mmflex import DenseFallback, TokenLayout, intercept
from mmflex.integrations.video_models import (
    Image,
    Video,
    llava_video_layout,
    longvila_layout,
    read_llava_video,
    read_longvila,
    read_videochat_flash,
    videochat_flash_layout,
)

TEXT, IMAGE, VIDEO = 0, 1, 2
Token = tuple[int, int, int]
"""Modality, frame and cell."""


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def text(count: int) -> list[Token]:
    return [(TEXT, -1, -1)] * count


def cells(modality: int, frames: int, count: int) -> list[Token]:
    return [(modality, frame, cell) for frame in range(frames) for cell in range(count)]


def same(layout: TokenLayout, tokens: list[Token], row: int = 0) -> None:
    valid = layout.valid[row]
    fields = np.stack([layout.modality[row], layout.frame[row], layout.cell[row]], axis=1)[valid]
    assert fields.tolist() == [list(token) for token in tokens]


def ids(*pieces: int | str, batch: int = 1, seed: int = 0) -> Tensor:
    """Ids of a prompt: so many of text, or a placeholder by its name."""
    generator = torch.Generator().manual_seed(seed)
    numbers = {"media": -200, "image": 97, "video": 98}
    parts = [
        torch.tensor([numbers[p]]) if isinstance(p, str) else torch.randint(1, 90, (p,), generator=generator)
        for p in pieces
    ]
    return torch.cat(parts)[None].repeat(batch, 1)


def frames(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def layout_read(seen: Any) -> TokenLayout:
    """What a reader knew last."""
    return seen.layout.known


def check_embeddings(embeds: Tensor, layout: TokenLayout, words: Tensor, newlines: list[int], newline: Tensor) -> None:
    """Text tokens are rows of the vocabulary, separators the newline, and nothing else is."""
    is_word = (embeds[:, None] == words).all(-1).any(-1).numpy()
    assert np.array_equal(is_word, layout.modality[0] == TEXT)
    is_newline = (embeds == newline).all(-1).numpy()
    assert np.flatnonzero(is_newline).tolist() == newlines


# ---- LLaVA-Video -----------------------------------------------------------------------------------------------------

NEWLINES = [
    ("grid", "spatial_unpad"),
    ("frame", "spatial_unpad"),
    ("one_token", "spatial_unpad"),
    ("one_token", "spatial"),
    ("no_token", "spatial_unpad"),
    ("grid", "flat"),
]


def llava(newline: str, merge: str, pooling: str, side: int, **more: Any) -> LlavaVideo:
    torch.manual_seed(0)
    config = config_of(mm_newline_position=newline, mm_patch_merge_type=merge, mm_spatial_pool_mode=pooling, **more)
    return LlavaVideo(config, side).eval()


def llava_tokens(count: int, pooled: int, newline: str, merge: str) -> tuple[list[Token], list[int]]:
    """The tokens of a video and which are newlines."""
    if merge == "flat" or newline == "no_token" or (newline == "one_token" and "unpad" not in merge):
        return cells(VIDEO, count, pooled * pooled), []
    if newline == "grid":
        row = pooled + 1
        return cells(VIDEO, count, pooled * row), [n for n in range(count * pooled * row) if n % row == pooled]
    if newline == "frame":
        size = pooled * pooled + 1
        return cells(VIDEO, count, size), [n for n in range(count * size) if n % size == size - 1]
    total = count * pooled * pooled
    return [*cells(VIDEO, count, pooled * pooled), (VIDEO, -1, -1)], [total]


@pytest.mark.parametrize(("newline", "merge"), NEWLINES)
@pytest.mark.parametrize(("pooling", "side", "pooled"), [("bilinear", 5, 3), ("average", 5, 2), ("max", 4, 2)])
@pytest.mark.parametrize("count", [7, 1])
def test_llava_videos(newline: str, merge: str, pooling: str, side: int, pooled: int, count: int) -> None:
    model = llava(newline, merge, pooling, side)
    prompt, video = ids(13, "media", 70), frames(count, side)
    wanted = model.answer(prompt, [video], ["video"])
    with intercept(model, Dense(), layout=read_llava_video(model)) as seen:
        found = model.answer(prompt, [video], ["video"])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert seen.taken == {0: 1, 1: 1}
    tokens, newlines = llava_tokens(count, pooled, newline, merge)
    layout = layout_read(seen)
    same(layout, [*text(13), *tokens, *text(70)])
    embeds = model.prepare_inputs_labels_for_multimodal(prompt, None, None, None, None, [video], ["video"])[4][0]
    check_embeddings(embeds, layout, model.embed_tokens.weight, [13 + n for n in newlines], model.image_newline)
    options = {"patches": side, "pooling": pooling, "newline": newline, "merge": merge}
    formula = llava_video_layout([13, Video(count), 70], **options, length=len(embeds))
    assert formula.fingerprint == layout.fingerprint


def test_llava_prompts_of_the_published_size() -> None:
    """SigLIP at 384 pixels: 27 patches, 14 x 14 tokens and 14 newlines a frame."""
    layout = llava_video_layout([14, Video(64), 35], length=14 + 64 * 210 + 35)
    assert layout.frame_stride("video") == 210
    assert llava_video_layout([Video(64)], pooling="average").length == 64 * 182
    assert llava_video_layout([Video(64)], newline="one_token").length == 64 * 196 + 1
    with pytest.raises(
        ValueError, match=re.escape("have 13489 tokens but the prompt 13490 (text 14, Video(frames=64)")
    ):
        llava_video_layout([14, Video(64), 35], length=13490)
    with pytest.raises(ValueError, match="mm_newline_position is one of grid, frame"):
        llava_video_layout([Video(2)], newline="rows")
    with pytest.raises(ValueError, match="mm_spatial_pool_mode is one of bilinear"):
        llava_video_layout([Video(2)], pooling="mean")
    with pytest.raises(ValueError, match="1 frame or more, got 0"):
        llava_video_layout([Video(0)])
    with pytest.raises(TypeError, match="'image' in a prompt: give numbers of text tokens"):
        llava_video_layout([4, "image"])  # type: ignore[list-item]


def test_llava_several_videos_and_images() -> None:
    side = 5
    model = llava("grid", "spatial_unpad", "bilinear", side)
    prompt = ids(5, "media", 3, "media", "media", 40, "media")
    media = [frames(3, side, 1), frames(1, side, 2), frames(5, side, 3), frames(10, side, 4)]
    kinds = ["video", "image", "video", "image"]  # the last one whole and in 3 x 3 tiles
    wanted = model.answer(prompt, media, kinds)
    with intercept(model, Dense(), layout=read_llava_video(model)) as seen:
        torch.testing.assert_close(model.answer(prompt, media, kinds), wanted, atol=1e-6, rtol=1e-5)
    layout = layout_read(seen)
    tiled = [*cells(IMAGE, 1, 25), *cells(IMAGE, 1, 15 * 16)]
    one = [*cells(IMAGE, 1, 25), (IMAGE, 0, 0)]
    tokens = [*text(5), *cells(VIDEO, 3, 12), *text(3), *one, *cells(VIDEO, 5, 12), *text(40), *tiled]
    same(layout, tokens)
    assert len(set(layout.segment[0].tolist())) == 9
    formula = llava_video_layout(
        [5, Video(3), 3, Image(), Video(5), 40, Image(tiles=(15, 15))], patches=side, length=len(tokens)
    )
    assert formula.length == layout.length
    assert np.array_equal(formula.modality, layout.modality)
    assert formula.frame_stride("video") == layout.frame_stride("video") == 12


@pytest.mark.parametrize("side", ["left", "right"])
def test_llava_batches_with_and_without_media(side: str) -> None:
    model = llava("frame", "spatial_unpad", "max", 4, tokenizer_padding_side=side)
    prompts = torch.full((3, 90), 7)
    mask = torch.ones(3, 90, dtype=torch.long)
    prompts[0, 10], prompts[2, 33] = -200, -200
    mask[1, :20] = 0
    media, kinds = [frames(9, 4, 1), frames(1, 4, 2), frames(2, 4, 3)], ["video", "image", "video"]
    joined = model.prepare_inputs_labels_for_multimodal(prompts, None, mask, None, None, media, kinds)
    real = joined[2].bool()
    wanted = model.answer(prompts, media, kinds, mask)[real]
    with intercept(model, Dense(), layout=read_llava_video(model), backend="reference") as seen:
        found = model.answer(prompts, media, kinds, mask)[real]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    layout = layout_read(seen)
    same(layout, [*text(10), *cells(VIDEO, 9, 5), *text(79)], 0)
    same(layout, text(70), 1)
    same(layout, [*text(33), *cells(VIDEO, 2, 5), *text(56)], 2)
    assert np.array_equal(layout.valid, real.numpy())


def test_llava_prompts_that_are_cut_off() -> None:
    model = llava("grid", "spatial_unpad", "bilinear", 5, tokenizer_model_max_length=100)
    with intercept(model, Dense(), layout=read_llava_video(model)) as seen:
        model.answer(ids(13, "media", 70), [frames(7, 5)], ["video"])
    assert seen.taken == {0: 1, 1: 1}
    same(layout_read(seen), [*text(13), *cells(VIDEO, 7, 12), *text(3)])


def test_a_newline_is_not_taken_for_the_prompt() -> None:
    """One token of text behind the video: as long as the newline that is joined to the video's tokens before."""
    model = llava("one_token", "spatial_unpad", "bilinear", 5)
    with intercept(model, Dense(), layout=read_llava_video(model)) as seen:
        model.answer(ids("media", 1), [frames(9, 5)], ["video"])
    same(layout_read(seen), [*cells(VIDEO, 9, 9), (VIDEO, -1, -1), *text(1)])


def test_llava_prompts_of_text() -> None:
    model = llava("grid", "spatial_unpad", "bilinear", 5)
    with intercept(model, Dense(), layout=read_llava_video(model)) as seen:
        model.answer(ids(13, "media", 70), [frames(7, 5)], ["video"])
        model.answer(ids(120), None)
    assert seen.taken == {0: 2, 1: 2}
    assert layout_read(seen).modalities == (TEXT,)


def test_llava_prompts_that_the_formula_does_not_give() -> None:
    """Slow-fast and whatever else a checkpoint's code does: dense, and said with both numbers."""
    model = llava("grid", "spatial_unpad", "bilinear", 5)
    own = model.video
    model.video = lambda x: torch.cat([own(x), model.image_newline[None]])  # type: ignore[method-assign]
    prompt, video = ids(13, "media", 70), frames(7, 5)
    wanted = model.answer(prompt, [video], ["video"])
    with (
        pytest.warns(
            DenseFallback, match="a video of 7 frames has become 85 tokens but by the model's config it has 84"
        ),
        intercept(model, Dense(), layout=read_llava_video(model)) as seen,
    ):
        assert torch.equal(model.answer(prompt, [video], ["video"]), wanted)
    assert seen.reasons == {"a prompt whose layout could not be read": 2}


def test_readers_leave_no_trace() -> None:
    for model, reader in (
        (llava("grid", "spatial_unpad", "bilinear", 5), read_llava_video),
        (flash("nothing"), read_videochat_flash),
        (vila(), read_longvila),
    ):
        before = [dict(vars(module)) for module in model.modules()]
        hooks = [len(module._forward_hooks) for module in model.modules()]
        with intercept(model, Dense(), layout=reader(model)):
            pass
        with pytest.raises(RuntimeError, match="stop"), intercept(model, Dense(), layout=reader(model)):
            raise RuntimeError("stop")
        assert [dict(vars(module)) for module in model.modules()] == before
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with pytest.raises(TypeError, match="Linear has no prepare_inputs_labels_for_multimodal"):
        read_llava_video(torch.nn.Linear(2, 2))


def test_before_anything_is_joined() -> None:
    model = llava("grid", "spatial_unpad", "bilinear", 5)
    with (
        intercept(model, Dense(), layout=read_llava_video(model)) as seen,
        pytest.warns(DenseFallback, match="nothing was"),
    ):
        model(torch.randn(1, 100, WIDTH))
    assert not seen.taken


# ---- VideoChat-Flash -------------------------------------------------------------------------------------------------


def flash(newline: str, tokens: int = 64, merge: str = "spatial_nopad", **more: Any) -> VideoChatFlash:
    torch.manual_seed(0)
    config = config_of(mm_newline_position=newline, mm_local_num_frames=4, mm_patch_merge_type=merge, **more)
    return VideoChatFlash(config, 6, tokens).eval()


@pytest.mark.parametrize("merge", ["spatial_nopad", "flat"])
@pytest.mark.parametrize("newline", ["nothing", "frame", "one_token"])
def test_flash_clips(newline: str, merge: str) -> None:
    """Four frames are one clip of 64 tokens, which is what has a frame's place in the layout."""
    model = flash(newline, merge=merge)
    newline = newline if merge == "spatial_nopad" else "nothing"
    prompt, video = ids(9, "media", 50, "media", 20), [frames(20, 6), frames(4, 6, 1)]
    wanted = model.answer(prompt, video, ["video", "video"])
    with intercept(model, Dense(), layout=read_videochat_flash(model)) as seen:
        found = model.answer(prompt, video, ["video", "video"])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    size = 65 if newline == "frame" else 64
    end: list[Token] = [(VIDEO, -1, -1)] if newline == "one_token" else []
    tokens = [*text(9), *cells(VIDEO, 5, size), *end, *text(50), *cells(VIDEO, 1, size), *end, *text(20)]
    same(layout_read(seen), tokens)
    formula = videochat_flash_layout([9, Video(20), 50, Video(4), 20], newline=newline, length=len(tokens))
    assert formula.fingerprint == layout_read(seen).fingerprint
    assert formula.frame_stride("video") == size


def test_flash_images_and_other_compressions() -> None:
    model = flash("nothing", tokens=48)
    prompt, media = ids(9, "media", "media", 40), [frames(8, 6), frames(5, 6, 1)]
    with intercept(model, Dense(), layout=read_videochat_flash(model)) as seen:
        model.answer(prompt, media, ["video", "image"])
    tokens = [*text(9), *cells(VIDEO, 2, 48), *cells(IMAGE, 1, 5 * 48), *text(40)]
    same(layout_read(seen), tokens)
    options = {"tokens_per_clip": 48, "tokens_per_image": 48}
    formula = videochat_flash_layout([9, Video(8), Image(tiles=(1, 5)), 40], **options, length=len(tokens))
    assert np.array_equal(formula.modality, layout_read(seen).modality)
    with pytest.raises(ValueError, match="18 frames are no whole clips of 4"):
        videochat_flash_layout([Video(18)])
    with pytest.raises(ValueError, match="mm_newline_position is one of nothing, frame, one_token"):
        videochat_flash_layout([Video(4)], newline="grid")
    with pytest.raises(ValueError, match="320 tokens but the prompt 400"):
        videochat_flash_layout([Video(20)], length=400)


def test_flash_layers_behind_a_drop_run_dense() -> None:
    model = flash("nothing", layers=4)
    prompt, video = ids(9, "media", 50), frames(16, 6)
    kept = torch.cat([torch.arange(9), 9 + torch.arange(0, 256, 2), 265 + torch.arange(50)])
    model.dropping = {2: kept}
    wanted = model.answer(prompt, [video], ["video"])
    block = intercept(model, Dense(), layout=read_videochat_flash(model))
    with pytest.warns(DenseFallback, match="dropped between layers .315 in earlier layers, 187 here"), block as seen:
        found = model.answer(prompt, [video], ["video"])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert seen.taken == {0: 1, 1: 1}
    assert seen.reasons == {"tokens that were dropped between layers": 2}


# ---- LongVILA --------------------------------------------------------------------------------------------------------


def vila(side: int = 9) -> Vila:
    torch.manual_seed(0)
    return Vila(config_of(), side).eval()


@pytest.mark.parametrize(("side", "half"), [(9, 5), (8, 4)])
def test_vila_frames_as_images(side: int, half: int) -> None:
    """LongVILA: a placeholder per frame, side by side; an image apart from them stays one."""
    model = vila(side)
    prompt = ids(12, *["image"] * 7, 30, "image", 25)
    media = {"image": [frames(1, side, n) for n in range(8)]}
    wanted = model.answer(prompt, media)
    with intercept(model, Dense(), layout=read_longvila(model)) as seen:
        found = model.answer(prompt, media)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    size = half * half + 1
    tokens = [*text(12), *cells(VIDEO, 7, size), *text(30), *cells(IMAGE, 1, size), *text(25)]
    same(layout_read(seen), tokens)
    formula = longvila_layout([12, Video(7), 30, Image(), 25], side=half, length=len(tokens))
    assert formula.fingerprint == layout_read(seen).fingerprint
    embeds = model._embed(prompt, media, {}, None, None)[0][0]
    newline = model.llm.embed_tokens(torch.tensor(10))
    places = [12 + size * n + half * half for n in range(7)] + [12 + 7 * size + 30 + half * half]
    newlines = (embeds == newline).all(-1).nonzero().flatten().tolist()
    assert [n for n in newlines if layout_read(seen).modality[0, n] != TEXT] == places


def test_vila_prompts_of_the_published_size() -> None:
    assert longvila_layout([Video(1024)]).length == 1024 * 197 == 201_728
    assert longvila_layout([Video(8)], side=16).length == 8 * 257
    assert longvila_layout([Video(8)], side=11, end=0).length == 8 * 121
    with pytest.raises(ValueError, match="24 tokens but the prompt 197"):
        longvila_layout([24], length=197)
    with pytest.raises(ValueError, match=r"9 frames of 14 x 14 tokens cannot be pooled by .2, 1, 1.: they must divide"):
        longvila_layout([Video(9)], pools=[(2, 1, 1)])
    with pytest.raises(ValueError, match="end is 2"):
        longvila_layout([Video(9)], end=2)
    with pytest.raises(ValueError, match=r"an Image\(\) for each"):
        longvila_layout([Image(tiles=(2, 2))])


@pytest.mark.parametrize("start", [None, "at: "])
@pytest.mark.parametrize("end", [None, "\n"])
def test_vila_video_encoders(start: str | None, end: str | None) -> None:
    model = vila()
    model.encoders["video"] = Encoder(model, start, end)
    prompt, media = ids(6, "video", "video", 30), {"video": [frames(5, 9), frames(3, 9, 1)]}
    wanted = model.answer(prompt, media)
    with intercept(model, Dense(), layout=read_longvila(model)) as seen:
        torch.testing.assert_close(model.answer(prompt, media), wanted, atol=1e-6, rtol=1e-5)
    tokens = text(6)
    for count in (5, 3):
        for frame in range(count):
            tokens += text(4 if start else 0)
            tokens += [(VIDEO, frame, cell) for cell in range(26 if end else 25)]
    same(layout_read(seen), tokens + text(30))
    options = {"side": 5, "start": 4 if start else 0, "end": 1 if end else 0}
    formula = longvila_layout([6, Video(5), Video(3), 30], **options, length=len(tokens) + 30)
    assert formula.fingerprint == layout_read(seen).fingerprint


def test_vila_pooling_at_several_sizes() -> None:
    model = vila(8)
    model.encoders["video"] = PoolingEncoder(model, [[2, 2, 2], [1, 4, 4]], "--")
    prompt, media = ids(6, "video", 30), {"video": [frames(6, 8)]}
    wanted = model.answer(prompt, media)
    with intercept(model, Dense(), layout=read_longvila(model)) as seen:
        torch.testing.assert_close(model.answer(prompt, media), wanted, atol=1e-6, rtol=1e-5)
    tokens = [*text(6), *cells(VIDEO, 3, 5), *text(2), *cells(VIDEO, 6, 2), *text(2), *text(30)]
    same(layout_read(seen), tokens)
    formula = longvila_layout([6, Video(6), 30], side=4, pools=[(2, 2, 2), (1, 4, 4)], separator=2, length=len(tokens))
    assert formula.fingerprint == layout_read(seen).fingerprint


@pytest.mark.parametrize("side", ["left", "right"])
def test_vila_batches(side: str) -> None:
    model = vila()
    model.tokenizer.padding_side = side  # type: ignore[misc]
    prompts = torch.stack([ids(10, "image", "image", "image", 87)[0], ids(100, seed=1)[0]])
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, 80:] = False
    media = {"image": [frames(1, 9, n) for n in range(3)]}
    _, _, real = model._embed(prompts, media, {}, None, mask)
    wanted = model.answer(prompts, media, mask)[real]
    with intercept(model, Dense(), layout=read_longvila(model), backend="reference") as seen:
        found = model.answer(prompts, media, mask)[real]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    same(layout_read(seen), [*text(10), *cells(VIDEO, 3, 26), *text(87)], 0)
    same(layout_read(seen), text(80), 1)


def test_sparse_heads_look_where_the_frames_are() -> None:
    """Columns of a grid: one cell of every frame, at the stride that newlines give."""
    model = llava("grid", "spatial_unpad", "bilinear", 9)
    prompt, video = ids(13, "media", 70), frames(20, 9)
    grid = Grid("frame", local=64, sink=0)
    from mmflex.runtime.calls import observed

    plans: list[Any] = []
    with observed(plans.append), intercept(model, grid, layout=read_llava_video(model), backend="reference") as seen:
        model.answer(prompt, [video], ["video"])
    assert seen.taken == {0: 1, 1: 1}
    row = plans[0].dense_mask()[0, 0, -1].numpy()
    cell = layout_read(seen).cell[0]
    chosen = {int(c) for c in cell[row & (np.arange(len(row)) < 400)] if c >= 0}
    assert len(chosen) == 1
