"""Patched vision towers: the numbers of the unpatched ones, in one attention call a layer."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, PAD, VIDEO, Family, text_config

import mmflex
from mask_builders import AShape, Dense
from mmflex.integrations import fused
from mmflex.integrations.vision import TOWERS, VISION_NAME, VisionPatch, sequence, vision_towers
from mmflex.integrations.vision import attention as vision_attention
from mmflex.integrations.vision.sequence import frame_chunks
from mmflex.runtime import varlen

transformers = pytest.importorskip("transformers")

WITH_TOWER = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "video_llama_3", "glm4v", "glm4v_images")
"""Names in `FAMILIES` whose tower walks over ``cu_seqlens``."""


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    mmflex.clear_caches()  # layers that another test compiled
    with torch.no_grad():
        yield


# ---- towers on their own ---------------------------------------------------------------------------------------------

_SIZES: dict[str, Any] = {"depth": 3, "hidden_size": 40, "intermediate_size": 52, "num_heads": 2, "patch_size": 4}
_WINDOWS = {**_SIZES, "out_hidden_size": 24, "window_size": 16, "fullatt_block_indexes": [1]}
_DEEP = {**_SIZES, "out_hidden_size": 24, "num_position_embeddings": 36}
_STACKED = {**_DEEP, "deepstack_visual_indexes": [0, 2]}
_GLM = {**_SIZES, "out_hidden_size": 24, "image_size": 24, "temporal_patch_size": 2}
_CLIP = {"hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2_vl_vision": (
        "qwen2_vl",
        "Qwen2VisionTransformerPretrainedModel",
        {"depth": 3, "embed_dim": 40, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    ),
    "qwen2_5_vl_vision": ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", _WINDOWS),
    "qwen2_5_omni_vision_encoder": ("qwen2_5_omni", "Qwen2_5OmniVisionEncoder", _WINDOWS),
    "qwen3_vl_vision": ("qwen3_vl", "Qwen3VLVisionModel", _STACKED),
    "qwen3_vl_moe_vision": ("qwen3_vl_moe", "Qwen3VLMoeVisionModel", _STACKED),
    "qwen3_omni_moe_vision_encoder": ("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", _STACKED),
    "qwen3_5_vision": ("qwen3_5", "Qwen3_5VisionModel", _DEEP),
    "qwen3_5_moe_vision": ("qwen3_5_moe", "Qwen3_5MoeVisionModel", _DEEP),
    "glm4v_vision": ("glm4v", "Glm4vVisionModel", _GLM),
    "glm4v_moe_vision": ("glm4v_moe", "Glm4vMoeVisionModel", _GLM),
    "video_llama_3_vision": ("video_llama_3", "VideoLlama3VisionModel", _CLIP),
}
"""Model type: (module of transformers, class, sizes)."""

Inputs = dict[str, torch.Tensor]


def tower(model_type: str, implementation: str = "sdpa") -> Any:
    """A tower with random weights, biases included; float32, in eval mode."""
    module, name, sizes = CONFIGS[model_type]
    cls = getattr(__import__(f"transformers.models.{module}.modeling_{module}", fromlist=[name]), name)
    config = cls.config_class(**sizes)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    found = cls(config).eval()
    for parameter in found.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return found


def pictures(model_type: str, *grid: tuple[int, int, int], seed: int = 0) -> Inputs:
    """Random patches of some pictures and films, as the tower's forward takes them. GLM has every frame on its own."""
    rows = [(1, h, w) for t, h, w in grid for _ in range(t)] if model_type.startswith("glm") else list(grid)
    tokens = sum(t * h * w for t, h, w in rows)
    llama = model_type.startswith("video_llama")
    channels = 3 * 4 * 4 * (1 if llama else 2)
    patches = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))
    found = {"pixel_values" if llama else "hidden_states": patches, "grid_thw": torch.tensor(rows)}
    if llama:
        found["merge_sizes"] = torch.tensor([1 + (t > 1) for t, *_ in rows])
    return found


MIXED = ((3, 4, 6), (1, 8, 2), (2, 10, 6), (1, 2, 2))
"""Two films and two images, of odd sizes: windows are cut at their edges."""


def tensors(output: Any) -> dict[str, torch.Tensor]:
    """All tensors of a model output by name."""
    found = {}
    for name, value in output.items():
        parts = value if isinstance(value, list | tuple) else [value]
        found.update({f"{name}.{i}": part for i, part in enumerate(parts) if part is not None})
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("chunk", [65536, 100, 1])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_numbers_of_the_unpatched_tower(model_type: str, chunk: int) -> None:
    """Against float64: no farther than float32 rounding takes the unpatched tower."""
    module, inputs = tower(model_type), pictures(model_type, *MIXED)
    exact = copy.deepcopy(module).double()
    double = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    expected, before = tensors(exact(**double)), tensors(module(**inputs))
    patch = VisionPatch(module, chunk=chunk)
    found = tensors(module(**inputs))
    assert list(found) == list(before)
    for name, value in found.items():
        assert value.shape == before[name].shape
        assert relative(value, expected[name]) <= max(2e-6, 2 * relative(before[name], expected[name])), name
    patch.remove()
    for name, value in tensors(module(**inputs)).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("model_type", ["qwen2_5_vl_vision", "qwen3_vl_vision"])
def test_half_precision_is_as_far_from_float64_as_before(model_type: str) -> None:
    """Rounding to bfloat16 takes both paths equally far from the exact numbers, in unlike directions: that is all that
    lies between them."""
    module, inputs = tower(model_type), pictures(model_type, *MIXED)
    module.to(torch.bfloat16)
    exact = copy.deepcopy(module).double()
    half = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in inputs.items()}
    double = {name: t.double() if t.is_floating_point() else t for name, t in half.items()}
    expected = exact(**double).pooler_output
    before = module(**half).pooler_output
    VisionPatch(module)
    found = module(**half).pooler_output
    assert relative(found, expected) <= 1.1 * relative(before, expected)
    assert relative(found, before) <= 1.5 * relative(before, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_is_undone(implementation: str) -> None:
    module = tower("qwen2_5_vl_vision", implementation)
    state = {name: id(p) for name, p in module.named_parameters()}
    patch = VisionPatch(module, fuse=True)
    assert module.config._attn_implementation == VISION_NAME
    assert "forward" in vars(module)
    patch.remove()
    assert module.config._attn_implementation == implementation
    assert not [name for name, part in module.named_modules() if "forward" in vars(part)]
    assert state == {name: id(p) for name, p in module.named_parameters()}


# ---- one call a layer, one read of the grid --------------------------------------------------------------------------


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of segments of every attention call of a patched tower."""
    calls: list[int] = []
    real = varlen.varlen_attention

    def counted(q: Any, k: Any, v: Any, segments: Any, scale: Any) -> Any:
        calls.append(len(segments))
        return real(q, k, v, segments, scale)

    monkeypatch.setattr(vision_attention, "varlen_attention", counted)
    return calls


def test_one_call_a_layer(attention_calls: list[int]) -> None:
    module = tower("qwen2_5_vl_vision")
    VisionPatch(module)
    module(**pictures("qwen2_5_vl_vision", (3, 8, 8), (1, 6, 4)))
    windows = 3 * 4 + 2 * 1
    assert attention_calls == [windows, 4, windows]


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_device_is_read_once(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way by which the tower's forward could read a tensor back is counted."""
    reads: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: Any, **options: Any) -> Any:
            if self.data_ptr() in on_device:
                reads.append(name)
            return real(self, *args, **options)

        return read

    module, inputs = tower(model_type), pictures(model_type, *MIXED)
    VisionPatch(module)
    module(**inputs)  # the grid is known from here on
    (made,) = sequence._remembered.values()
    host_copies = {"merge_sizes"} if TOWERS[model_type].grid_on_device else {"merge_sizes", "grid_thw"}
    made_tensors = [t for name, t in made.arguments.items() if isinstance(t, torch.Tensor) and name not in host_copies]
    on_device = {t.data_ptr() for t in (*inputs.values(), *made_tensors)}
    for name in ("tolist", "item", "cpu", "numpy", "__int__", "__bool__", "__index__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    module(**inputs)
    assert reads == ["tolist"] * (1 + TOWERS[model_type].merge_sizes)


def test_positions_that_the_caller_made() -> None:
    """transformers' towers take positions and boundaries as arguments: they are honoured, and read once."""
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

    module, inputs = tower("qwen2_vl_vision"), pictures("qwen2_vl_vision", *MIXED)
    own = {
        "cu_seqlens": get_vision_cu_seqlens(inputs["grid_thw"], merge_temporal=True),
        "position_ids": get_vision_position_ids(inputs["grid_thw"], 2).flip(0),
    }
    before = module(**inputs, **own).pooler_output
    assert relative(module(**inputs).pooler_output, before) > 0.01
    VisionPatch(module, chunk=50)
    assert relative(module(**inputs, **own).pooler_output, before) <= 2e-6


def test_hidden_states_of_all_chunks() -> None:
    module, inputs = tower("qwen2_vl_vision"), pictures("qwen2_vl_vision", *MIXED)
    before = module(**inputs, output_hidden_states=True).hidden_states
    VisionPatch(module, chunk=30)
    found = module(**inputs, output_hidden_states=True).hidden_states
    assert len(found) == len(before) > 1
    for a, b in zip(found, before, strict=True):
        assert relative(a, b) <= 2e-6
    as_tuple = module(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert as_tuple[0].shape == before[-1].shape


@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize("chunk", [65536, 20])
def test_patches_that_do_not_fit_the_grid(chunk: int, change: int) -> None:
    module, inputs = tower("qwen2_vl_vision"), pictures("qwen2_vl_vision", *MIXED)
    inputs["grid_thw"][0, 0] += change
    with pytest.raises((RuntimeError, ValueError)) as expected:
        module(**inputs)
    VisionPatch(module, chunk=chunk)
    with pytest.raises(type(expected.value)):
        module(**inputs)


@pytest.mark.parametrize("limit", [1, 7, 24, 30, 55, 10_000])
def test_chunks_are_whole_frames_in_order(limit: int) -> None:
    grid = [(3, 4, 6), (1, 8, 2), (5, 2, 2), (1, 10, 10), (2, 2, 2)]
    chunks = frame_chunks(grid, limit)
    frames = [(p, h, w) for p, (t, h, w) in enumerate(grid) for _ in range(t)]
    assert frames == [
        (p, h, w) for c in chunks for p, (t, h, w) in zip(c.pictures, c.grid, strict=True) for _ in range(t)
    ]
    sizes = [sum(t * h * w for t, h, w in c.grid) for c in chunks]
    assert [c.last - c.first for c in chunks] == sizes
    assert [c.first for c in chunks] == [0, *itertools.accumulate(sizes)][:-1]
    for chunk, size in zip(chunks, sizes, strict=True):
        assert size <= limit or len(chunk.grid) == 1 == chunk.grid[0][0]
    for a, b in itertools.pairwise(chunks):  # none could have taken the next frame as well
        assert a.last - a.first + b.grid[0][1] * b.grid[0][2] > limit
    assert frame_chunks([], limit) == []


# ---- layers compiled together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", CONFIGS)
def test_one_compilation_for_all_layers_and_sizes(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    torch._dynamo.reset()
    module = tower(model_type)
    mixed, other = pictures(model_type, *MIXED), pictures(model_type, (2, 6, 6), seed=1)

    def run(tower: Any, inputs: Inputs) -> torch.Tensor:
        return list(tensors(tower(**inputs)).values())[-1]  # what the language model is given

    before = run(module, mixed), run(module, other)
    patch = VisionPatch(module, fuse=True, chunk=100)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mmflex")
        found = run(module, mixed), run(module, other)
    assert len(graphs) == 1
    assert any("varlen_attention" in str(node.target) for node in graphs[0].graph.nodes)
    for a, b in zip(found, before, strict=True):
        assert relative(a, b) <= 2e-6
    patch.remove()
    patch = VisionPatch(module, fuse=True, chunk=100)
    assert relative(run(module, mixed), before[0]) <= 2e-6
    assert len(graphs) == 1  # what is patched again is not compiled again
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.zero_()
    assert not run(twin, mixed).any()  # a copy runs its own weights
    assert relative(run(module, mixed), before[0]) <= 2e-6
    patch.remove()


def test_layers_compiled_for_this_machine() -> None:
    torch._dynamo.reset()
    module, inputs = tower("qwen3_vl_vision"), pictures("qwen3_vl_vision", *MIXED)
    before = tensors(module(**inputs))
    VisionPatch(module, fuse=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mmflex")
        found = tensors(module(**inputs))
    for name, value in found.items():
        assert relative(value, before[name]) <= 2e-6


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, example: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=broken, **options))
    module, inputs = tower("qwen2_vl_vision"), pictures("qwen2_vl_vision", *MIXED)
    before = module(**inputs).pooler_output
    VisionPatch(module, fuse=True)
    with pytest.warns(UserWarning, match="Qwen2VLVisionBlock can't be compiled and runs as it is") as caught:
        found = module(**inputs).pooler_output
    assert len(caught) == 1
    assert relative(found, before) <= 2e-6
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mmflex")
        module(**inputs)


def test_layers_that_another_library_wraps_stay_so() -> None:
    module, inputs = tower("qwen2_vl_vision"), pictures("qwen2_vl_vision", *MIXED)
    before = module(**inputs).pooler_output
    block = module.blocks[1]
    own = block.forward
    block.forward = lambda *args, **options: own(*args, **options)
    with pytest.warns(UserWarning, match="3 layers are not compiled: Qwen2VLVisionBlock has a forward of another"):
        patch = VisionPatch(module, fuse=True)
    assert relative(module(**inputs).pooler_output, before) <= 2e-6
    patch.remove()
    assert "forward" in vars(block)


def test_errors_of_a_layer_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="eager", **options))
    module, inputs = tower("qwen2_vl_vision"), pictures("qwen2_vl_vision", *MIXED)
    VisionPatch(module, fuse=True)
    inputs["grid_thw"][0, 0] += 1  # one frame more than there are patches for
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mmflex")
        with pytest.raises((ValueError, RuntimeError)):
            module(**inputs)


@pytest.mark.parametrize("fuse", [None, False])
def test_nothing_is_compiled_unasked(monkeypatch: pytest.MonkeyPatch, fuse: bool | None) -> None:
    monkeypatch.setattr(torch, "compile", lambda *args, **options: pytest.fail("compiled"))
    monkeypatch.setattr(fused, "FUSED_ROWS", 1)
    module, inputs = tower("qwen2_vl_vision"), pictures("qwen2_vl_vision", *MIXED)
    VisionPatch(module, fuse=fuse)
    module(**inputs)


# ---- whole models ----------------------------------------------------------------------------------------------------


def family_model(family: Family) -> Any:
    model = family.model()
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("name", WITH_TOWER)
def test_patched_models(name: str, attention_calls: list[int]) -> None:
    """Images and videos in a batch of unlike prompts, by forward and by generate()."""
    family = FAMILIES[name]
    model = family_model(family)
    inputs = family.batch(model.config, batch=2).inputs
    valid = inputs["attention_mask"].bool()
    before = model(**inputs).logits[valid]
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert len(vision_towers(model)) == 1
    with mmflex.patched(model, Dense()):
        torch.testing.assert_close(model(**inputs).logits[valid], before, rtol=1e-4, atol=1e-5)
        calls = len(attention_calls)
        assert 0 < calls <= 2 * 2  # two layers or one, for images and for videos
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), answer)
        assert len(attention_calls) == 2 * calls
    assert torch.equal(model(**inputs).logits[valid], before)


@pytest.mark.parametrize("kind", ["images", "videos"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_images_alone_and_videos_alone(name: str, kind: str) -> None:
    family = FAMILIES[name]
    model = family_model(family)
    inputs = dict(family.batch(model.config).inputs)
    other = ("pixel_values_videos", "video_grid_thw") if kind == "images" else ("pixel_values", "image_grid_thw")
    for key in other:
        del inputs[key]
    absent = VIDEO if kind == "images" else IMAGE
    gone = inputs["input_ids"] == absent
    inputs["input_ids"] = inputs["input_ids"].masked_fill(gone, 7)
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"].masked_fill(gone, 0)
    before = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with mmflex.patched(model, Dense()):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), before)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if name not in WITH_TOWER])
def test_other_models_keep_their_tower(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    text = model.config.get_text_config()
    before = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert vision_towers(model) == []
    with mmflex.patched(model, AShape()):
        after = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
        assert {key: value for key, value in after.items() if value != before[key]}.keys() <= {
            id(m.config) for m in model.modules() if getattr(m, "config", None) in (text, model.config)
        }


def test_left_alone(attention_calls: list[int]) -> None:
    family = FAMILIES["qwen2_5_vl"]
    model = family_model(family)
    inputs = family.batch(model.config).inputs
    visual = model.model.visual
    with mmflex.patched(model, Dense(), vision=False):
        assert visual.config._attn_implementation == "sdpa"
        assert not [name for name, part in visual.named_modules() if "forward" in vars(part)]
        model(**inputs)
    assert not attention_calls


def test_several_models_of_one_config() -> None:
    family = FAMILIES["qwen2_5_vl"]
    first = family_model(family)
    second = type(first)(first.config).eval()
    inputs = family.batch(first.config).inputs
    before = first(**inputs).logits, second(**inputs).logits
    mmflex.patch(first, Dense())
    # not patched, but asks for the same attention: exact as well
    torch.testing.assert_close(second(**inputs).logits, before[1], rtol=1e-4, atol=1e-5)
    mmflex.patch(second, Dense())
    torch.testing.assert_close(first(**inputs).logits, before[0], rtol=1e-4, atol=1e-5)
    mmflex.unpatch(first)
    assert first.config.vision_config._attn_implementation == VISION_NAME
    torch.testing.assert_close(second(**inputs).logits, before[1], rtol=1e-4, atol=1e-5)
    mmflex.unpatch(second)
    assert first.config.vision_config._attn_implementation == "sdpa"
    assert torch.equal(first(**inputs).logits, before[0])


def test_copies_of_patched_models() -> None:
    family = FAMILIES["qwen3_vl"]
    model = mmflex.patch(family_model(family), Dense())
    inputs = family.batch(model.config).inputs
    expected = model(**inputs).logits
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    torch.testing.assert_close(twin(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    mmflex.unpatch(twin)
    assert twin.config.vision_config._attn_implementation == "sdpa"
    torch.testing.assert_close(twin(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_compiled_models() -> None:
    torch._dynamo.reset()
    family = FAMILIES["qwen2_5_vl"]
    model = family_model(family)
    inputs = family.batch(model.config).inputs
    before = model(**inputs).logits
    with mmflex.patched(model, Dense()):
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, before, rtol=1e-4, atol=1e-5)


def test_saved_configs_do_not_know(tmp_path: Any) -> None:
    model = family_model(FAMILIES["qwen2_5_vl"])
    model.config.save_pretrained(tmp_path / "before")
    with mmflex.patched(model, Dense()):
        model.config.save_pretrained(tmp_path / "patched")
    assert (tmp_path / "before/config.json").read_text() == (tmp_path / "patched/config.json").read_text()


def test_training_is_refused() -> None:
    module, inputs = tower("qwen2_vl_vision"), pictures("qwen2_vl_vision", (1, 4, 4))
    VisionPatch(module)
    module.train()
    with pytest.raises(NotImplementedError, match=r"can't train VisionAttention .* vision=False"):
        module(**inputs)


def test_a_language_model_alone() -> None:
    config = transformers.LlamaConfig(**text_config())
    model = transformers.LlamaForCausalLM(config).eval()
    with mmflex.patched(model, Dense(), fuse=True):
        model(torch.full((1, 4), PAD + 1))
