"""Patching transformers models: which masks are honoured, run dense with a notice, or refused; and leaving no trace."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import FAMILIES, text_config
from torch import nn

transformers = pytest.importorskip("transformers")

import mmflex.runtime.attention as runtime  # noqa: E402
from mask_builders import AShape, Dense, Grid, VerticalSlash  # noqa: E402
from mmflex import TokenLayout, intercept, plan  # noqa: E402
from mmflex.integrations import cache_room, prefill  # noqa: E402
from mmflex.integrations.layouts import layout_for  # noqa: E402
from mmflex.integrations.long_prefill import last_token_logits  # noqa: E402
from mmflex.integrations.transformers import DenseFallback, patch, patched, token_layout, unpatch  # noqa: E402
from mmflex.integrations.vision import TOWERS, VISION_NAME  # noqa: E402
from mmflex.tuning.config import Config  # noqa: E402

SPARSE = AShape(128, 128)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


class Calls(list):
    """(spec, layout, queries, keys) of every call of `mmflex.attention`."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(queries, keys) for _, _, queries, keys in self]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen, real = Calls(), runtime.attention

    def attention(q: Any, k: Any, v: Any, spec: Any, **options: Any) -> Any:
        seen.append((spec, options["layout"], q.shape[2], k.shape[2]))
        return real(q, k, v, spec, **options)

    monkeypatch.setattr(runtime, "attention", attention)
    return seen


def llama(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text_config(**more))).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt(batch: int, tokens: int, side: str | None = None) -> dict[str, torch.Tensor]:
    """Random ids; with a side, the first prompt is padded there."""
    ids = torch.randint(5, 90, (batch, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if side is not None:
        mask[0, slice(0, 37) if side == "left" else slice(tokens - 37, tokens)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def notices(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, DenseFallback)]


# ---- the central path ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_dense_gives_the_logits_of_sdpa(calls: Calls, side: str | None) -> None:
    model, inputs = llama(), prompt(3, 150, side)
    valid = inputs["attention_mask"].bool()
    want = model(**inputs).logits[valid]
    with patched(model, Dense()):
        got = model(**inputs).logits[valid]
    torch.testing.assert_close(got, want, **CLOSE)
    assert calls.sizes == [(150, 150)] * 2


def test_a_sparse_spec_is_the_mask_that_it_denotes() -> None:
    """Against the unpatched model under the 4-D mask of the same patterns, head by head."""
    model, inputs = llama(), prompt(2, 700, "left")
    spec = [AShape(0, 1), AShape(128, 100), Dense(), AShape(256, 0)]
    valid = inputs["attention_mask"].bool()
    layout = TokenLayout.from_modality_ids(torch.zeros_like(inputs["input_ids"]), valid=valid)
    q = torch.randn(2, 4, 700, 16)
    mask = plan(q, q, spec, layout=layout, backend="reference").dense_mask()
    assert not mask[1, 0].all(dim=0).any()
    assert mask[1, 2].sum() == 700 * 701 // 2
    ignore = torch.eye(700, dtype=torch.bool) & ~valid[:, None, :, None]  # padding rows must see something
    want = model(inputs["input_ids"], attention_mask=mask | ignore, position_ids=torch.arange(700)[None]).logits
    with patched(model, spec, backend="reference"):
        got = model(**inputs, position_ids=torch.arange(700)[None]).logits
    torch.testing.assert_close(got[valid], want[valid], **CLOSE)


def test_specs_per_layer_and_configs(calls: Calls) -> None:
    model, inputs = llama(), prompt(1, 300)
    per_head = [Dense(), SPARSE, Dense(), SPARSE]
    with patched(model, {1: per_head}):
        model(**inputs)
    assert [spec for spec, *_ in calls] == [tuple(per_head)]
    calls.clear()
    with patched(model, Config.of({0: SPARSE, 1: per_head}, layers=2, heads=4)):
        model(**inputs)
    assert [spec for spec, *_ in calls] == [(SPARSE,) * 4, tuple(per_head)]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ([Dense()] * 3, ValueError, "3 patterns for 4 query heads"),
        ({2: Dense()}, ValueError, "layer 2 has no attention to set: the model's attention layers are 0 to 1"),
        ({"0": Dense()}, TypeError, "the key '0': use integers"),
        ("dense", TypeError, "a pattern or one pattern per head is needed"),
        (
            Config.of(Dense(), layers=28, heads=4, model="big"),
            ValueError,
            "made for big.* has 28 layers but the model has 2",
        ),
        (Config.of(Dense(), layers=2, heads=8), ValueError, "has 8 heads but the model has 4"),
    ],
)
def test_specs_that_do_not_fit_leave_the_model_alone(spec: Any, error: type[Exception], message: str) -> None:
    model = llama()
    before = trace(model)
    with pytest.raises(error, match=message):
        patch(model, spec)
    assert trace(model) == before


def test_unknown_backends_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown backend 'fast': use 'auto', 'flash'"):
        patch(llama(), Dense(), backend="fast")


def test_generate(calls: Calls) -> None:
    model, inputs = llama(), prompt(2, 200, "left")
    ways: list[tuple[dict[str, Any], list[tuple[int, int]]]] = [
        ({}, [(200, 200)]),
        ({"cache_implementation": "static"}, [(200, 200)]),
        ({"num_beams": 3}, [(200, 200)]),
        ({"prefill_chunk_size": 80}, [(80, 80), (80, 160)]),  # the last 40 tokens count as decoding
        ({"prefill_chunk_size": 80, "cache_implementation": "static"}, [(80, 80), (80, 160)]),
    ]
    for options, sizes in ways:
        options = {**options, "max_new_tokens": 6, "do_sample": False}
        want = model.generate(**inputs, **options)
        calls.clear()
        with patched(model, Dense()):
            got = model.generate(**inputs, **options)
        assert torch.equal(got, want), options
        assert calls.sizes == [size for size in sizes for _ in range(2)], options


def test_a_cache_that_does_not_fit_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one byte of what the new tokens' keys and values take is missing; without a cache nothing is."""
    model = llama()
    config = model.config
    wanted = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 300 * 4  # float32
    ids = torch.randint(5, 90, (1, 300))
    monkeypatch.setattr(cache_room, "LONG", 256)
    with patched(model, AShape(16, 64), backend="reference"):
        for free, fits in ((wanted, True), (wanted - 1, False)):
            monkeypatch.setattr(cache_room, "free_bytes", lambda device, free=free: free)
            model(ids, use_cache=False)
            model(ids[:, :200], use_cache=True)
            for run in (lambda: model.generate(ids, max_new_tokens=2), lambda: model(ids)):
                refused = pytest.raises(torch.OutOfMemoryError, match="of 1 x 300 tokens takes")
                with nullcontext() if fits else refused:
                    run()
        held = model(ids[:, :200], use_cache=True).past_key_values
        with pytest.raises(torch.OutOfMemoryError, match="run it without a cache"):
            model(ids, past_key_values=held)
        assert last_token_logits(model, {"input_ids": ids}).shape == (1, config.vocab_size)  # leaves no cache
        model(ids, past_key_values=transformers.StaticCache(config, 400))  # took its memory before
        model.config.sliding_window = 64  # layers may keep less: not known for certain
        model(ids)


def test_assisted_decoding(calls: Calls) -> None:
    model, inputs = llama(), prompt(1, 100)
    inputs = {name: torch.cat([x, x], dim=1) for name, x in inputs.items()}
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": llama(1)}):
        options = {**options, "max_new_tokens": 8, "do_sample": False}
        want = model.generate(**inputs, **options)
        calls.clear()
        with patched(model, Dense()):
            assert torch.equal(model.generate(**inputs, **options), want)
        assert len(calls) == 2  # the prefill; checking a few tokens is decoding


def test_a_second_turn_on_the_same_cache(calls: Calls) -> None:
    model, inputs = llama(), prompt(2, 300, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def turns() -> torch.Tensor:
        first = model(ids[:, :170], attention_mask=mask[:, :170], use_cache=True)
        return model(ids[:, 170:], attention_mask=mask, past_key_values=first.past_key_values).logits

    want = turns()
    with patched(model, Dense()):
        got = turns()
    torch.testing.assert_close(got, want, **CLOSE)
    assert calls.sizes == [(170, 170)] * 2 + [(130, 300)] * 2
    assert calls[-1][1].valid.sum() == 600 - 37


# ---- leaving no trace ----------------------------------------------------------------------------------------------


def trace(model: nn.Module) -> dict[str, Any]:
    """All that patching could have touched."""
    return {
        name: (
            sorted(vars(module)),
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama3", "phi4_multimodal", "llava"])
def test_unpatch_restores_everything(name: str, tmp_path: Any) -> None:
    model = FAMILIES[name].model()
    batch = FAMILIES[name].batch(model.config)
    model(**batch.inputs)  # transformers sets some attributes on the first call
    before = trace(model)
    model.save_pretrained(tmp_path / "before")
    patch(model, Dense(), mlp_chunk=8)
    text = model.config.get_text_config()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and config is not text:
            expected = VISION_NAME if config.model_type in TOWERS else "sdpa"
            assert config._attn_implementation == expected, type(module).__name__
    model(**batch.inputs)
    model.generate(**batch.inputs, max_new_tokens=2)
    model.save_pretrained(tmp_path / "during")
    unpatch(model)
    assert trace(model) == before
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        for other in ("during", "after"):
            assert (tmp_path / other / file.name).read_bytes() == file.read_bytes(), (other, file.name)


def test_the_context_manager_unpatches_on_errors() -> None:
    model = llama()
    before = trace(model)
    with pytest.raises(ZeroDivisionError), patched(model, Dense()):  # noqa: PT012
        assert model.config._attn_implementation == "mmflex"
        raise ZeroDivisionError
    assert trace(model) == before
    with pytest.raises(ValueError, match="is not patched"):
        unpatch(model)
    with patched(model, Dense()), pytest.raises(ValueError, match="already patched"):
        patch(model, Dense())


def test_two_models_do_not_disturb_each_other(calls: Calls) -> None:
    first, second, inputs = llama(0), llama(1), prompt(1, 300)
    want = [model(**inputs).logits for model in (first, second)]
    patch(first, Dense())
    patch(second, {0: SPARSE})
    first(**inputs), second(**inputs)
    assert [spec for spec, *_ in calls] == [(Dense(),) * 4] * 2 + [(SPARSE,) * 4]
    unpatch(first)
    calls.clear()
    torch.testing.assert_close(first(**inputs).logits, want[0], **CLOSE)
    second(**inputs)
    assert len(calls) == 1
    unpatch(second)
    assert torch.equal(second(**inputs).logits, want[1])


def test_a_model_that_shares_its_config_with_a_patched_one(calls: Calls) -> None:
    first, inputs = llama(0), prompt(2, 100, "left")
    torch.manual_seed(1)
    second = transformers.LlamaForCausalLM(first.config).eval()
    assert first.config is second.config
    want = second.generate(**inputs, max_new_tokens=4, do_sample=False)
    patch(first, Dense())
    assert torch.equal(second.generate(**inputs, max_new_tokens=4, do_sample=False), want)
    assert not calls
    patch(second, Dense())
    unpatch(first)
    assert torch.equal(second.generate(**inputs, max_new_tokens=4, do_sample=False), want)
    assert len(calls) == 2
    unpatch(second)
    assert first.config._attn_implementation == "sdpa"


def test_a_deep_copy_of_a_patched_model_stands_alone(calls: Calls) -> None:
    model, inputs = llama(), prompt(1, 80)
    want = model(**inputs).logits
    patch(model, Dense(), mlp_chunk=16)
    other = copy.deepcopy(model)
    unpatch(model)
    nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(other(**inputs).logits, want, **CLOSE)
    assert len(calls) == 2
    unpatch(other)
    assert torch.equal(other(**inputs).logits, want)


def test_the_previous_attention_may_be_eager(calls: Calls) -> None:
    model, inputs = llama(attn_implementation="eager"), prompt(2, 90, "left")
    want = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with patched(model, {1: Dense()}):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), want)
    assert len(calls) == 1
    assert model.config._attn_implementation == "eager"


# ---- masks and arguments -------------------------------------------------------------------------------------------


def small(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**text_config(head_dim=16, **more))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("side", ["left", "right"])
def test_sliding_windows_are_exact(calls: Calls, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    monkeypatch.setattr(prefill, "SMALL_WINDOWED", 0)
    layers = ["sliding_attention", "full_attention"]
    models = [small("Mistral", sliding_window=50), small("Mistral", sliding_window=1000)]
    torch.manual_seed(0)
    gemma = transformers.Gemma3TextConfig(**text_config(head_dim=16, sliding_window=50, layer_types=layers))
    models.append(transformers.Gemma3ForCausalLM(gemma).eval())
    names = [["SlidingWindow"] * 2, ["tuple"] * 2, ["SlidingWindow", "tuple"]]
    inputs = prompt(2, 300, side)
    valid = inputs["attention_mask"].bool()
    for model, kinds in zip(models, names, strict=True):
        want = model(**inputs).logits[valid]
        calls.clear()
        with patched(model, Dense(), backend="reference"):
            torch.testing.assert_close(model(**inputs).logits[valid], want, **CLOSE)
        assert [type(spec).__name__ for spec, *_ in calls] == kinds


def test_sliding_windows_with_caches_and_chunks(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "SMALL_WINDOWED", 0)
    model, inputs = small("Mistral", sliding_window=50), prompt(2, 300, "left")
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 100}):
        want = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
        with patched(model, Dense(), backend="reference"):
            assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False, **options), want)
    assert (100, 149) in calls.sizes  # a chunk with what the sliding cache holds


def test_masks_with_holes_and_windows(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "SMALL_WINDOWED", 0)
    model, inputs = small("Mistral", sliding_window=50), prompt(1, 200)
    inputs["attention_mask"][0, 60:80] = 0
    want = model(**inputs).logits
    with patched(model, Dense()), pytest.warns(DenseFallback, match="holes"):
        assert torch.equal(model(**inputs).logits, want)
    assert not calls


def test_what_only_the_previous_attention_can_do_says_so_once(calls: Calls) -> None:
    model, ids = llama(), prompt(1, 100)["input_ids"]
    square = torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()
    packed = torch.cat([torch.arange(40), torch.arange(60)])[None]
    ways: list[tuple[str, Callable[[], torch.Tensor]]] = [
        ("ready-made 4-D mask", lambda: model(ids, attention_mask=square).logits),
        ("packed sequences", lambda: model(ids, position_ids=packed, use_cache=False).logits),
    ]
    for message, run in ways:
        want = run()
        with warnings.catch_warnings(record=True) as caught, patched(model, SPARSE):
            warnings.simplefilter("always")
            assert torch.equal(run(), want)
            assert torch.equal(run(), want)
        assert len(notices(caught)) == 1
        assert message in notices(caught)[0]
    assert not calls


@pytest.mark.parametrize(("name", "message"), [("gemma3", "see both ways"), ("paligemma", "not causal")])
def test_image_blocks_that_see_both_ways(calls: Calls, name: str, message: str) -> None:
    model = FAMILIES[name].model()
    batch = FAMILIES[name].batch(model.config, 2)
    want = model(**batch.inputs).logits
    with patched(model, SPARSE), pytest.warns(DenseFallback, match=message):
        assert torch.equal(model(**batch.inputs).logits, want)
    assert not calls


def test_chunked_attention_layers(calls: Calls) -> None:
    layers = ["chunked_attention", "full_attention"]
    more = {"attention_chunk_size": 32, "layer_types": layers, "no_rope_layers": [1, 0], "num_local_experts": 2}
    config = transformers.Llama4TextConfig(**text_config(head_dim=16, intermediate_size_mlp=96, **more))
    torch.manual_seed(0)
    model, inputs = transformers.Llama4ForCausalLM(config).eval(), prompt(1, 100)
    want = model(**inputs).logits
    with patched(model, Dense()), pytest.warns(DenseFallback, match="attention_chunk_size 32"):
        torch.testing.assert_close(model(**inputs).logits, want, **CLOSE)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("Gemma2", {}, "caps its attention logits at 50"),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "sink"),
    ],
)
def test_scores_that_would_change_are_refused(kind: str, more: dict[str, Any], message: str) -> None:
    model = small(kind, **more)
    before = trace(model)
    with pytest.raises(NotImplementedError, match=message):
        patch(model, Dense())
    assert trace(model) == before


def test_arguments_that_are_refused() -> None:
    model, inputs = llama(attention_dropout=0.1), prompt(1, 50)
    with patched(model, Dense()):
        for options, message in (
            ({"output_attentions": True}, "output_attentions.*unpatch"),
            ({"softcap": 30.0}, "soft-capping"),
            ({"cu_seq_lens_q": torch.tensor([0, 50])}, "packed sequences"),
            ({"position_bias": torch.zeros(1)}, "position bias"),
        ):
            with pytest.raises(NotImplementedError, match=message):
                model(**inputs, **options)
        model.train()
        with pytest.raises(NotImplementedError, match=r"training mode.*model\.eval"):
            model(**inputs)
        model.eval()
        with torch.enable_grad(), pytest.raises(RuntimeError, match="backward"):
            model(**inputs).logits.sum().backward()


def test_latent_attention_has_narrower_values(calls: Calls) -> None:
    latent = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 24}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    config = transformers.DeepseekV3Config(**text_config(num_key_value_heads=4, **latent, **experts))
    torch.manual_seed(0)
    model, inputs = transformers.DeepseekV3ForCausalLM(config).eval(), prompt(2, 60, "left")
    valid = inputs["attention_mask"].bool()
    want = model(**inputs).logits[valid]
    with patched(model, Dense()):
        torch.testing.assert_close(model(**inputs).logits[valid], want, **CLOSE)
    assert len(calls) == 2


def test_models_that_are_not_language_models() -> None:
    with pytest.raises(TypeError, match="Linear holds no transformers language model: pass one, such as Llama"):
        patch(nn.Linear(2, 2), Dense())
    with pytest.raises(TypeError, match=r"mmflex\.intercept\(model, spec\)"):
        patch(nn.Linear(2, 2), Dense())
    both = nn.ModuleList([llama(), small("Mistral")])
    with pytest.raises(TypeError, match=r"2 transformers language models .*patch the one that reads the prompt"):
        patch(both, Dense())


def test_older_transformers_have_intercept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.46.3")
    with pytest.raises(ImportError, match=r"5\.17 or newer, got 4\.46\.3: .*mmflex\.intercept"):
        patch(model, Dense())
    assert model.config._attn_implementation == "sdpa"


def test_intercept_names_patch(calls: Calls) -> None:
    """And works all the same: transformers' own attention calls SDPA."""
    model, inputs = llama(), prompt(1, 150)
    wanted = model(**inputs).logits
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM .*mmflex\.patch"), intercept(model, Dense()) as seen:
        torch.testing.assert_close(model(**inputs).logits, wanted, **CLOSE)
    assert seen.taken == {0: 1, 1: 1}
    with patched(model, Dense()), pytest.raises(ValueError, match=r"LlamaForCausalLM is patched: call mmflex\.unpatch"):
        intercept(model, Dense()).__enter__()


def test_a_model_that_does_not_call_the_attention() -> None:
    model = llama()
    with patched(model, Dense()):
        model.config._attn_implementation = "sdpa"
        with pytest.raises(RuntimeError, match="ran without calling mmflex"):
            model(**prompt(1, 20))
        model.config._attn_implementation = "mmflex"
    model.config._attn_implementation = "mmflex"
    with pytest.raises(RuntimeError, match="belongs to no patched model"):
        model(**prompt(1, 20))


# ---- layouts -------------------------------------------------------------------------------------------------------


class Composite(nn.Module):
    """A projector and a language model, run by its own code on embeddings, as LLaVA-Video and NVILA."""

    def __init__(self, per_frame: int) -> None:
        super().__init__()
        self.llm = small("Qwen2")
        self.projector = nn.Linear(8, 64)
        self.per_frame = per_frame

    def forward(self, frames: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        visual = self.projector(frames).flatten(0, 1)[None]
        embeds = torch.cat([visual, self.llm.model.embed_tokens(ids)], dim=1)
        return self.llm.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)


class TowerInside(transformers.Qwen2ForCausalLM):
    """A language model that builds its vision tower within itself and joins embeddings in its own code."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        tower = transformers.SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=24,
            patch_size=4, attn_implementation="eager",
        )  # fmt: skip
        self.model.vision_tower = transformers.SiglipVisionModel(tower)
        self.model.projector = nn.Linear(32, config.hidden_size)

    def join(self, frames: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        visual = self.model.projector(self.model.vision_tower(frames).last_hidden_state).flatten(0, 1)
        return torch.cat([visual[None], self.model.embed_tokens(ids)], dim=1)


def test_a_vision_tower_inside_the_language_model_keeps_its_attention(calls: Calls) -> None:
    torch.manual_seed(0)
    model = TowerInside(transformers.Qwen2Config(**text_config())).eval()
    frames, ids = torch.randn(5, 3, 24, 24), torch.randint(5, 90, (1, 41))
    layout = TokenLayout.from_segments([("video", (5, 6, 6)), ("text", 41)])
    tower = model.model.vision_tower
    before = model(inputs_embeds=model.join(frames, ids)).logits
    with patched(model, Dense()), token_layout(layout):
        assert (tower.config._attn_implementation, model.config._attn_implementation) == ("eager", "mmflex")
        inside = model(inputs_embeds=model.join(frames, ids)).logits
    assert calls.sizes == [(221, 221)] * 2
    torch.testing.assert_close(inside, before, **CLOSE)
    assert (tower.config._attn_implementation, model.config._attn_implementation) == ("eager", "sdpa")


def test_a_layout_for_models_fed_by_their_own_code(calls: Calls) -> None:
    model = Composite(16)
    frames, ids = torch.randn(20, 16, 8), prompt(1, 30)["input_ids"]
    layout = TokenLayout.from_segments([("video", (20, 1, 16)), ("text", 30)])
    want = model(frames, ids)
    with patched(model, Dense()), token_layout(layout):
        assert torch.equal(model(frames, ids), want)
    assert calls[0][1].fingerprint == layout.fingerprint
    with patched(model, Grid(slash=True)), token_layout(layout):
        model(frames, ids)
    with patched(model, Dense()), pytest.warns(UserWarning, match="taken as text.*token_layout"):
        model(frames, ids)
    assert calls[-1][1].modalities == (0,)


def test_tokens_dropped_between_layers_run_dense_with_a_notice(calls: Calls) -> None:
    """VideoChat-Flash: a given layout describes the layers in front of that only."""
    model = Composite(16)

    def drop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args[0].shape[1] == 1:
            return None
        kwargs["position_embeddings"] = tuple(x[:, ::2] for x in kwargs["position_embeddings"])
        return (args[0][:, ::2],), kwargs

    model.llm.model.layers[1].register_forward_pre_hook(drop, with_kwargs=True)
    embeds = torch.randn(1, 350, 64)
    want = model.llm(inputs_embeds=embeds).logits
    layout = TokenLayout.from_segments([("video", (20, 1, 16)), ("text", 30)])
    with patched(model, Dense()), token_layout(layout), pytest.warns(DenseFallback, match="350 tokens but .* 175"):
        torch.testing.assert_close(model.llm(inputs_embeds=embeds).logits, want, **CLOSE)
    assert calls.sizes == [(350, 350)]


def test_layouts_given_by_the_caller(calls: Calls) -> None:
    model, inputs = llama(), prompt(2, 200, "left")
    prompts = [TokenLayout.from_segments([("video", (15, 1, 10)), ("text", n)]) for n in (13, 50)]
    layout = TokenLayout.batch(prompts, side="left")
    assert layout.length == 200
    with patched(model, Dense()), token_layout(layout):
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=100, do_sample=False)
    sizes = [(x.batch_size, x.length) for _, x, *_ in calls[::2]]
    assert sizes[0] in ((2, 200), (4, 200))
    assert sizes[1:] == [(2, 100), (2, 200)]
    with patched(model, Dense()):
        for bad, message in (
            (layout[:150], "150 tokens but the model is at token 200"),
            (TokenLayout.text(200), "200 tokens in prompt 0 .* but attention_mask 163"),
            (TokenLayout.batch([layout] * 2)[:200], "4 prompts but the model runs 2"),
        ):
            with token_layout(bad), pytest.raises(ValueError, match=message):
                model(**inputs)
    with pytest.raises(TypeError, match=r"token_layout takes a mmflex\.TokenLayout, got list"), token_layout([]):  # type: ignore[arg-type]
        pass


def test_tokens_of_unknown_kind_run_dense_with_a_notice(calls: Calls) -> None:
    family = FAMILIES["llava"]
    model = family.model()
    batch = family.batch(model.config, text=200)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    before = model(**batch.inputs, use_cache=True).past_key_values
    want = model(ids[:, -100:], past_key_values=copy.deepcopy(before)).logits
    with patched(model, Dense()), pytest.warns(DenseFallback, match="has not seen"):
        assert torch.equal(model(ids[:, -100:], past_key_values=before).logits, want)
    assert not calls
    layout = layout_for(model.config, batch.inputs)
    with patched(model, Dense()), token_layout(layout):
        model.generate(input_ids=ids, attention_mask=mask, pixel_values=batch.inputs["pixel_values"], max_new_tokens=2)
    assert calls[0][1].fingerprint == layout.fingerprint


def test_a_second_turn_knows_the_layout_of_the_first(calls: Calls) -> None:
    family = FAMILIES["qwen2_5_vl"]
    model = family.model()
    batch = family.batch(model.config)
    more = prompt(1, 80)["input_ids"]
    with patched(model, Dense()):
        cache = model(**batch.inputs, use_cache=True).past_key_values
        first = calls[-1][1]
        model(more[:, :1], past_key_values=cache)
        model(more, past_key_values=cache)
    last = calls[-1][1]
    assert last.length == first.length + 81
    for name in ("modality", "frame", "cell"):
        assert (getattr(last, name)[:, : first.length] == getattr(first, name)).all()
    assert (last.modality[:, first.length :] == 0).all()


def test_equal_prompts_share_a_layout_and_so_their_plans(calls: Calls) -> None:
    family = FAMILIES["qwen2_5_vl"]
    model = family.model()
    batch = family.batch(model.config)
    with patched(model, Dense()):
        model(**batch.inputs), model(**batch.inputs)
    assert len({id(layout) for _, layout, *_ in calls}) == 1


# ---- torch.compile, tensor parallelism, long prompts ---------------------------------------------------------------


@pytest.mark.parametrize("first", ["patch", "compile"])
def test_torch_compile(calls: Calls, first: str) -> None:
    torch._dynamo.reset()
    model, inputs = llama(), prompt(2, 60, "left")
    valid = inputs["attention_mask"].bool()
    want = model(**inputs).logits[valid]
    counters = torch._dynamo.utils.counters
    if first == "patch":
        patch(model, Dense())
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits[valid], want, **CLOSE)
        patch(compiled, Dense())
    counters.clear()
    for _ in range(2):
        torch.testing.assert_close(compiled(**inputs).logits[valid], want, **CLOSE)
    assert len(calls) == 4
    breaks = " ".join(counters["graph_break"])
    assert "attention_forward" not in breaks
    assert "prefill" not in breaks
    assert "describe" not in breaks
    unpatch(compiled)
    torch.testing.assert_close(compiled(**inputs).logits[valid], want, **CLOSE)
    assert len(calls) == 4


def test_compiled_decoding_is_one_graph() -> None:
    torch._dynamo.reset()
    model, ids = llama(), prompt(1, 100)["input_ids"]

    def tokens(step: Any) -> list[int]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=128)
        found = [model(ids, past_key_values=cache).logits[:, -1].argmax(-1)]
        for _ in range(4):
            found.append(step(found[-1][:, None], past_key_values=cache).logits[:, -1].argmax(-1))
        return [int(token) for token in found]

    want = tokens(model)
    with patched(model, Dense()):
        torch._dynamo.utils.counters.clear()
        assert tokens(torch.compile(model, backend="eager", fullgraph=True)) == want
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_layer_that_must_run_dense(calls: Calls) -> None:
    torch._dynamo.reset()
    model, inputs = llama(), prompt(2, 130, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = model(ids[:, :100], attention_mask=mask[:, :100], use_cache=True).past_key_values
    want = model(ids[:, 100:], attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
    with patched(model, Dense()):
        compiled = torch.compile(model, backend="eager")
        got = compiled(ids[:, 100:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(got, want, **CLOSE)
    assert not calls


def test_tensor_parallel_ranks_take_their_heads(calls: Calls) -> None:
    class Mesh:
        ndim = 1

        def get_local_rank(self) -> int:
            return 1

    model = llama()
    spec = [Dense(), Dense(), SPARSE, AShape(0, 256)]
    q, k = torch.randn(1, 2, 90, 16), torch.randn(1, 1, 90, 16)
    with patched(model, spec), token_layout(TokenLayout.text(90)):
        layer = model.model.layers[0].self_attn
        with pytest.raises(ValueError, match="2 query heads but its spec has 4 patterns"):
            prefill.attention_forward(layer, q, k, k, None)
        model._device_mesh = Mesh()
        prefill.attention_forward(layer, q, k, k, None)
        del model._device_mesh
    assert calls[-1][0] == tuple(spec[2:])


def test_row_chunks_change_nothing() -> None:
    model, inputs = llama(), prompt(2, 150, "left")
    want = model(**inputs).logits
    patch(model, {}, mlp_chunk=64)
    assert "forward" in vars(model.model.layers[0].mlp)
    assert "forward" in vars(model.model.norm)
    torch.testing.assert_close(model(**inputs).logits, want, **CLOSE)
    unpatch(model)
    for wrong in (-1, 2.5, True):
        with pytest.raises(ValueError, match="mlp_chunk"):
            patch(model, {}, mlp_chunk=wrong)  # type: ignore[arg-type]
    with patched(model, {}, mlp_chunk=0):
        assert "forward" not in vars(model.model.layers[0].mlp)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_last_token_logits(side: str | None) -> None:
    model, inputs = llama(), prompt(3, 60, side)
    logits = model(**inputs).logits
    last = [59 - 37 * (side == "right"), 59, 59]
    got = last_token_logits(model, inputs)
    torch.testing.assert_close(got, logits[torch.arange(3), last], **CLOSE)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        last_token_logits(model, {**inputs, "attention_mask": inputs["attention_mask"] * torch.tensor([[1], [0], [1]])})
    with pytest.raises(TypeError, match="no logits_to_keep"):
        last_token_logits(model.model, inputs)


def test_patterns_that_estimate(calls: Calls) -> None:
    """The compiled kernel, on a prompt long enough that a budget cuts."""
    model, inputs = llama(), prompt(1, 2500)
    with patched(model, VerticalSlash(128, 128), backend="cpu"):
        out = model.generate(**inputs, max_new_tokens=3)
    assert out.shape == (1, 2503)
    assert len(calls) == 2
