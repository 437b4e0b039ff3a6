"""The default spec: what every query sees, qualities, where it is taken; the notice of prompts that run dense."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import text_config

import mmflex
from mask_builders import AShape, Dense
from mmflex.cli.options import spec_of
from mmflex.integrations.notice import MostlyDense
from mmflex.tuning.default import default_named

transformers = pytest.importorskip("transformers")

TOKENS = 1500


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text_config(initializer_range=0.4))).eval()
    made.generation_config.eos_token_id = None
    return made


def ids(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(5, 90, (1, tokens), generator=torch.Generator().manual_seed(1))


def test_each_query_sees_first_near_and_last_keys_and_more_with_quality() -> None:
    torch.manual_seed(0)
    of_blocks = torch.randn(1, 2, 12, 16).repeat_interleave(128, 2)[:, :, :TOKENS]
    q, k = torch.randn(1, 4, TOKENS, 16), torch.randn(1, 2, TOKENS, 16) + 4 * of_blocks
    q += 4 * torch.randn(1, 4, 12, 16).repeat_interleave(128, 2)[:, :, :TOKENS]
    specs = [mmflex.default_spec("fast"), mmflex.default_spec(), mmflex.default_spec("high")]
    masks = [mmflex.plan(q, k, spec, backend="reference").dense_mask()[0].numpy() for spec in specs]
    row, key = np.arange(TOKENS)[:, None], np.arange(TOKENS)
    promised = (key <= row) & ((key < 128) | (row - key < 100) | (row >= TOKENS // 128 * 128))
    assert masks[0].sum() < masks[1].sum() < masks[2].sum() < 0.8 * 4 * (key <= row).sum()
    for mask in masks:
        assert (mask >= promised).all()
        assert (mask <= (key <= row)).all()
    assert (masks[1] <= masks[2]).all()


def test_no_spec_is_the_default(model: Any) -> None:
    def states(*spec: Any, **options: Any) -> torch.Tensor:
        with mmflex.patched(model, *spec, backend="reference", **options):
            return model.model(input_ids=ids()).last_hidden_state

    fast = states(quality="fast")
    assert torch.equal(fast, states(mmflex.default_spec("fast")))
    assert torch.equal(states(), states(mmflex.default_spec("balanced")))
    assert not torch.allclose(fast, states(), atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # patch would do better here
        model.set_attn_implementation("sdpa")
        with mmflex.intercept(model, quality="fast", backend="reference") as seen:
            found = model.model(input_ids=ids()).last_hidden_state
    assert sum(seen.taken.values()) == model.config.num_hidden_layers
    torch.testing.assert_close(found, fast, atol=2e-5, rtol=1e-4)


def test_text_form() -> None:
    assert default_named("default") == mmflex.default_spec() == mmflex.default_spec("balanced")
    assert default_named("default:fast") == mmflex.default_spec("fast")
    assert default_named("default.json") is None
    assert spec_of("default:high") == ("default:high", mmflex.default_spec("high"))


def test_errors(model: Any) -> None:
    with pytest.raises(ValueError, match="quality is 'best': use 'high', 'balanced', 'fast'"):
        mmflex.patch(model, quality="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quality is '': use 'high'"):
        default_named("default:")
    for take in (mmflex.patch, mmflex.intercept):
        with pytest.raises(ValueError, match="quality is 'high', which is of the default spec, but a spec is given"):
            take(model, AShape(), quality="high")
    mmflex.patch(model)  # nothing was changed before
    mmflex.unpatch(model)


# ---- the notice ------------------------------------------------------------------------------------------------------


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "predicts to be faster" in str(w.message)]


@pytest.mark.parametrize("spec", [None, {0: AShape(0, 64)}])
def test_a_short_prompt_is_told_once(model: Any, spec: Any) -> None:
    with warnings.catch_warnings(record=True) as caught, mmflex.patched(model, spec):
        warnings.simplefilter("always")
        for tokens in (200, 200, 210):
            model.model(input_ids=ids(tokens))
    (message,) = said(caught)
    assert 'LlamaForCausalLM runs most layers of this prompt of 200 tokens dense, which backend="auto"' in message
    assert re.search(r"layer \d: predicted [\d.e-]+ ms, (any spec takes|the spec) [\d.e-]+ ms", message)


@pytest.mark.parametrize(("spec", "backend"), [(Dense(), "auto"), (AShape(0, 64), "reference")])
def test_what_was_asked_for_is_not_told(model: Any, spec: Any, backend: str) -> None:
    with warnings.catch_warnings(record=True) as caught, mmflex.patched(model, spec, backend=backend):
        warnings.simplefilter("always")
        model.model(input_ids=ids(200))
    assert not said(caught)


@pytest.mark.parametrize(("dense", "told"), [(1, False), (2, False), (3, True)])
def test_it_takes_more_than_half_of_the_layers(dense: int, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {(AShape(0, 64),): "predicted 1 ms, the spec 2 ms with planning"}
    monkeypatch.setattr("mmflex.integrations.notice.why_dense", lambda layout, spec: reasons.get(spec, ""))
    notice, layout = MostlyDense("Model", range(4)), mmflex.TokenLayout.text(500)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for layer in range(4):
                notice.ran(layer, (AShape(0, 64 if layer < dense else 128),), layout)
    assert len(said(caught)) == told
    if told:
        assert "layer 2: predicted 1 ms, the spec 2 ms with planning" in said(caught)[0]
