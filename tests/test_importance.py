"""Importance against finite differences, on models whose outputs are moved head by head and token by token."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_search import ids, llama
from torch import nn

import mmflex
from mask_builders import AShape
from mmflex.integrations import importance as module
from mmflex.integrations.importance import Unknown, importance


def odds(model: Any, inputs: dict[str, Any], layer: Any = None, move: torch.Tensor | None = None) -> float:
    """Log-odds of the model's own next token after the prompt, with ``move`` added to a layer's heads' outputs."""
    hooks = []
    if layer is not None:
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0] + move,)))
    with torch.no_grad():
        p = model(**inputs, use_cache=False).logits[0, -1].softmax(-1)
    for hook in hooks:
        hook.remove()
    top = p.amax()
    return float(top.log() - (1 - top).log())


@pytest.fixture
def one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DRAWS", 1)
    monkeypatch.setattr(module, "_FLOOR", 0.0)


def test_importance_is_the_squared_gradient_of_the_log_odds(one_draw: None) -> None:
    model = llama(2).double()
    inputs = {"input_ids": ids(33)}
    found = importance(model, inputs, last=1)
    heads = model.config.num_attention_heads
    assert {layer: tuple(w.shape) for layer, w in found.items()} == dict.fromkeys(range(2), (heads, 33))
    step, dim = 1e-2, model.model.layers[0].self_attn.o_proj.in_features // heads
    for number, head, row in ((0, 1, 5), (0, 0, 32), (1, 2, 32)):
        squared = 0.0
        for d in range(dim):
            move = torch.zeros(1, 33, heads * dim, dtype=torch.float64)
            move[0, row, head * dim + d] = step
            layer = model.model.layers[number]
            squared += ((odds(model, inputs, layer, move) - odds(model, inputs, layer, -move)) / (2 * step)) ** 2
        assert float(found[number][head, row]) == pytest.approx(squared, rel=2e-3)
    assert bool((found[1][:, :32] == 0).all()), "in the last layer only the last row reaches the last prediction"


def test_several_queries_add_up_on_average(monkeypatch: pytest.MonkeyPatch, one_draw: None) -> None:
    model, inputs = llama(1).double(), {"input_ids": ids(24)}
    each = [importance(model, {"input_ids": ids(24)[:, : 24 - i]}, last=1)[0] for i in range(4)]
    want = sum(torch.nn.functional.pad(w, (0, 24 - w.shape[1])) for w in each)
    monkeypatch.setattr(module, "_DRAWS", 64)
    found = importance(model, inputs, last=4)[0]
    assert torch.allclose(found.sum(-1), want.sum(-1), rtol=0.3)  # type: ignore[union-attr]


def test_a_sure_answer_has_importance(one_draw: None) -> None:
    """Where the model is certain, log-probabilities have no gradient; log-odds have."""
    model, inputs = llama(1), {"input_ids": ids(64)}
    before = importance(model, inputs, last=1)[0]
    model.lm_head.weight.data *= 200  # as sure as it gets
    with torch.no_grad():
        assert float(model(**inputs).logits[0, -1].softmax(-1).amax()) > 0.999
    after = importance(model, inputs, last=1)[0]
    assert bool((after.sum(-1) > before.sum(-1)).all())


def test_the_model_is_left_as_it_was() -> None:
    model = llama()
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    trained = [p.requires_grad for p in model.parameters()]
    own = model.model.layers[1]
    own.forward = functools.partial(own.forward)  # as accelerate's hooks leave it
    forwards = [vars(m).get("forward") for m in model.modules()]
    importance(model, {"input_ids": ids(80)})
    assert [p.requires_grad for p in model.parameters()] == trained
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_vision_language_model() -> None:
    family = FAMILIES["qwen2_5_vl"]
    model = family.model()
    batch = family.batch(model.config, text=200, frames=4)
    tokens = batch.inputs["input_ids"].shape[1]
    for w in importance(model, batch.inputs).values():
        assert w.shape == (model.config.text_config.num_attention_heads, tokens)
        assert bool((w > 0).all())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_asks_nothing(side: str, one_draw: None) -> None:
    model, tokens, pad = llama(2), ids(100), torch.zeros(1, 28, dtype=torch.long)
    want = importance(model, {"input_ids": tokens})
    left = side == "left"
    given = torch.cat([pad, tokens] if left else [tokens, pad], 1)
    mask = torch.ones_like(given)
    own = slice(28, None) if left else slice(100)
    mask[:, :28] *= not left
    mask[:, 100:] *= left
    position = (mask.cumsum(1) - 1).clamp(min=0)
    found = importance(model, {"input_ids": given, "attention_mask": mask, "position_ids": position})
    for layer, w in want.items():
        assert torch.allclose(found[layer][:, own], w, rtol=1e-2, atol=1e-4 * float(w.max()))
        assert float(found[layer].sum()) == pytest.approx(float(w.sum()), rel=1e-3), "padding has none"


def test_layers_without_attention_are_recomputed_too() -> None:
    """Layers of linear attention, say, stand among the others."""
    model = llama(3)
    attention = [layer.self_attn for layer in model.model.layers[:2]]
    assert set(module._decoder_layers(model, attention)) == set(model.model.layers)


def test_inference_mode_outside_does_not_matter() -> None:
    model = llama(1)
    want = importance(model, {"input_ids": ids(80)})[0]
    with torch.inference_mode():
        assert torch.equal(importance(model, {"input_ids": ids(80)})[0], want)


def test_what_cannot_be_captured_is_refused_before_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "importance", None)  # not reached
    model = llama(1)
    options: dict[str, Any] = {"candidates": [AShape(128, 128)], "budget": "density=0.9", "progress": False}
    with pytest.raises(ValueError, match="training mode"):
        mmflex.search(model.train(), ids(1024), **options)
    with mmflex.patched(model.eval(), {}), pytest.raises(ValueError, match="already patched"):
        mmflex.search(model, ids(1024), **options)


def test_kernels_without_a_backward_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("this kernel has no backward")

    monkeypatch.setattr(torch.autograd, "grad", fails)
    with pytest.raises(ValueError, match=r"this kernel has no backward; search with objective='outputs'"):
        mmflex.search(llama(1), ids(1024), candidates=[AShape(128, 128)], budget="density=0.9", progress=False)


def test_what_has_no_importance_is_said() -> None:
    model = llama(1)
    model.model.layers[0].self_attn.o_proj = nn.Identity()
    del model.model.layers[0].self_attn.o_proj
    with pytest.raises(Unknown, match="LlamaAttention has no output projection named o_proj, out_proj"):
        importance(model, {"input_ids": ids(80)})
    with pytest.raises(ValueError, match="objective='outputs'"):
        mmflex.search(model, ids(1024), candidates=[AShape(128, 128)], budget="density=0.9", progress=False)
    with pytest.raises(Unknown, match="LlamaModel gives no logits"):
        importance(llama(1).model, {"input_ids": ids(80)})
    with pytest.raises(ValueError, match="objective is 'logits': use 'answers' or 'outputs'"):
        mmflex.search(model, ids(1024), objective="logits")  # type: ignore[arg-type]
