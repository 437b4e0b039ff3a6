"""Decoder layers under one compilation: the model's own numbers, one graph for layers and lengths, caches filled."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import nn

transformers = pytest.importorskip("transformers")

import mmflex  # noqa: E402
from mask_builders import AShape, Dense  # noqa: E402
from mmflex.integrations import fused  # noqa: E402
from mmflex.integrations.decoder import why_not  # noqa: E402

SPEC = AShape(16, 24)
CLOSED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava_onevision", "llama3", "qwen3", "glm4", "phi3", "gemma3")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that layers are traced into; they run operator by operator, which compiles in no time."""
    traced: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    def compile_(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return real(function, backend=backend, **options)

    real = torch.compile
    monkeypatch.setattr(fused.torch, "compile", compile_)
    monkeypatch.setattr(fused, "_compiled", fused.bounded(16))
    return traced


def decoder_graphs(traced: list[torch.fx.GraphModule]) -> list[torch.fx.GraphModule]:
    return [g for g in traced if any("layer_attention" in str(node.target) for node in g.graph.nodes)]


@pytest.mark.parametrize("name", CLOSED)
def test_families(name: str, graphs: list[torch.fx.GraphModule]) -> None:
    """Logits of a padded batch and greedy tokens, as without it; layers of one kind are traced once."""
    family = FAMILIES[name]
    model = family.model()
    batch = family.batch(model.config, batch=2, side="left")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mmflex.patched(model, SPEC, backend="reference", vision=False, fuse=False):
            expected = model(**batch.inputs).logits
            tokens = model.generate(**batch.inputs, max_new_tokens=3, do_sample=False)
    assert not graphs
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "mmflex: .* (compiled|runs as it is)")
        with mmflex.patched(model, SPEC, backend="reference", vision=False, fuse=True):
            torch.testing.assert_close(model(**batch.inputs).logits, expected)
            assert len(decoder_graphs(graphs)) == 1, "also of layers with a window beside layers without"
            assert torch.equal(model.generate(**batch.inputs, max_new_tokens=3, do_sample=False), tokens)
    assert len(decoder_graphs(graphs)) <= 2, "generate() may give every prompt positions of its own"


def llama(layers: int = 3, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=128, num_hidden_layers=layers, **{**sizes, **more})
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("chunk", [None, 0, 50])
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_lengths_chunks_and_caches(chunk: int | None, cache: str, graphs: list[torch.fx.GraphModule]) -> None:
    """A prompt in two parts on a cache, and other lengths: the same graph; keys and values are the model's own."""
    model, ids = llama(), torch.randint(128, (1, 333))

    def caches() -> Any:
        if cache == "static":
            return transformers.StaticCache(config=model.config, max_cache_len=400)
        return transformers.DynamicCache(config=model.config) if cache == "dynamic" else None

    def runs() -> tuple[list[torch.Tensor], Any]:
        past = caches()
        parts = [model(ids[:, :200], past_key_values=past, use_cache=past is not None).logits]
        if past is not None:
            parts.append(model(ids[:, 200:], past_key_values=past).logits)
        return [*parts, model(ids[:, :101]).logits, model(ids).logits], past

    with mmflex.patched(model, SPEC, backend="reference", mlp_chunk=chunk, fuse=False):
        expected, before = runs()
    with mmflex.patched(model, SPEC, backend="reference", mlp_chunk=chunk, fuse=True):
        got, after = runs()
    torch.testing.assert_close(got, expected)
    if after is not None:
        for a, b in zip(after.layers, before.layers, strict=True):
            torch.testing.assert_close((a.keys, a.values), (b.keys, b.values))
    assert len(decoder_graphs(graphs)) == 1
    assert len(graphs) == (1 if chunk == 0 else 2), "the MLP has a graph of its own where it may run in chunks"


def test_layers_with_specs_of_their_own_share_a_graph(graphs: list[torch.fx.GraphModule]) -> None:
    """What differs between layers, and layers that keep the model's attention, is not in the graph."""
    model, ids = llama(), torch.randint(128, (1, 150))
    spec = {0: AShape(4, 16), 2: [Dense(), AShape(8, 8), SPEC, SPEC]}
    with mmflex.patched(model, spec, backend="reference", fuse=False):
        expected = model(ids).logits
    with mmflex.patched(model, spec, backend="reference", fuse=True):
        torch.testing.assert_close(model(ids).logits, expected)
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(ids).logits, expected)
        nn.init.zeros_(copied.model.layers[1].mlp.down_proj.weight)
        assert not torch.allclose(copied(ids).logits, expected), "the copy runs its own weights"
        torch.testing.assert_close(model(ids).logits, expected)
    assert len(decoder_graphs(graphs)) == 1
    assert "forward" not in vars(model.model.layers[0])


def test_compiled_by_inductor() -> None:
    mmflex.clear_caches()  # compiled layers of an equal model among them
    model, ids = llama(2), torch.randint(128, (1, 150))
    with mmflex.patched(model, SPEC, backend="reference", fuse=False):
        expected = model(ids).logits
    torch._dynamo.utils.clear_compilation_metrics()
    with mmflex.patched(model, SPEC, backend="reference", fuse=True):
        for n in (150, 97):
            torch.testing.assert_close(model(ids[:, :n]).logits, expected[:, :n])
        assert not model.__dict__["_mmflex_patch"].layers.broken
    # A layer and its MLP. A number that is no constant in a graph has it traced twice; the check for aliasing in the
    # first run of a graph has what is compiled in that run compiled for it alone.
    compiled = [(m.co_name, m.restart_reasons) for m in torch._dynamo.utils.get_compilation_metrics()]
    assert [name for name, _ in compiled] == ["mmflex_LlamaDecoderLayer", "mmflex_LlamaMLP"]
    assert not any(reasons for _, reasons in compiled)


def test_layers_whose_numbers_differ_are_compiled_twice_at_most(graphs: list[torch.fx.GraphModule]) -> None:
    class Layer(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.linear, self.factor = nn.Linear(16, 16), factor

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + self.linear(hidden) * self.factor

    layers = nn.ModuleList([Layer(0.1 * i + 0.05) for i in range(12)])
    stack, hidden = fused.FusedLayers(list(layers), True), torch.randn(1, 9, 16)
    with torch.no_grad():
        for layer in layers:
            torch.testing.assert_close(layer(hidden), type(layer).forward(layer, hidden))
    assert not stack.broken
    assert 1 <= len(graphs) <= 2


def test_errors_of_attention_are_not_hidden(graphs: list[torch.fx.GraphModule]) -> None:
    """Once keys are in the cache a layer is not run again."""
    model, ids = llama(2), torch.randint(128, (1, 150))
    cache = transformers.DynamicCache(config=model.config)
    with mmflex.patched(model, SPEC, backend="reference", fuse=True):
        model.train()
        with pytest.raises(NotImplementedError, match="training mode"):
            model(ids, past_key_values=cache)
        assert cache.get_seq_length() <= 150
        model.eval()
        assert not model.__dict__["_mmflex_patch"].layers.broken


# ---- what is not compiled, and says so -------------------------------------------------------------------------------


class Attention(nn.Module):
    """As transformers writes them."""

    def forward(self, hidden, past_key_values=None, **kwargs):  # type: ignore[no-untyped-def]
        if past_key_values is not None:
            key, value = past_key_values.update(hidden, hidden, self.layer_idx)
        attention_interface = self.interface
        return attention_interface(self, hidden, key, value, scaling=self.scaling, dropout=0.0, **kwargs)


class Layer(nn.Module):
    def forward(self, hidden, past_key_values=None, **kwargs):  # type: ignore[no-untyped-def]
        return self.self_attn(hidden, past_key_values=past_key_values, **kwargs)


class SharedCache(Attention):
    def forward(self, hidden, past_key_values=None, **kwargs):  # type: ignore[no-untyped-def]
        key, value = past_key_values.shared[self.layer_idx]
        attention_interface = self.interface
        return attention_interface(self, hidden, key, value, **kwargs)


class Capped(Attention):
    def forward(self, hidden, past_key_values=None, **kwargs):  # type: ignore[no-untyped-def]
        if past_key_values is not None:
            key, value = past_key_values.update(hidden, hidden, self.layer_idx)
        attention_interface = self.interface
        return attention_interface(self, hidden, key, value, softcap=50.0, **kwargs)


class ByNumber(Attention):
    def forward(self, hidden, past_key_values=None, **kwargs):  # type: ignore[no-untyped-def]
        if past_key_values is not None:
            key, value = past_key_values.update(hidden * self.layer_idx, hidden, self.layer_idx)
        attention_interface = self.interface
        return attention_interface(self, hidden, key, value, **kwargs)


class StateOfItsOwn(Layer):
    def forward(self, hidden, past_key_values=None, **kwargs):  # type: ignore[no-untyped-def]
        hidden = past_key_values.states + hidden
        return self.self_attn(hidden, past_key_values=past_key_values, **kwargs)


@pytest.mark.parametrize(
    ("layer", "attention", "reason"),
    [
        (Layer, Attention, None),
        (Layer, SharedCache, "more with its cache"),
        (Layer, Capped, "softcap"),
        (Layer, ByNumber, "layer's number"),
        (StateOfItsOwn, Attention, "cache outside of attention"),
    ],
)
def test_sources_decide(layer: type, attention: type, reason: str | None) -> None:
    said = why_not(layer(), attention())
    assert said is None if reason is None else reason in str(said)


def test_experts_run_as_they_are() -> None:
    """Which expert a token goes to is known when it is there: no graph of fixed shapes."""
    family = FAMILIES["qwen3_vl_moe"]
    model = family.model()
    batch = family.batch(model.config, batch=1)
    with mmflex.patched(model, SPEC, backend="reference", vision=False, fuse=False):
        expected = model(**batch.inputs).logits
    with pytest.warns(UserWarning, match="has no plain MLP"):
        mmflex.patch(model, SPEC, backend="reference", vision=False, fuse=True)
    torch.testing.assert_close(model(**batch.inputs).logits, expected)
    mmflex.unpatch(model)
