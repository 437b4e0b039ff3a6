"""`attn_implementation="mmflex"`, as transformers selects any other attention."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from families import FAMILIES, text_config

transformers = pytest.importorskip("transformers")

import mmflex  # noqa: E402
import mmflex.runtime.attention as runtime  # noqa: E402
from mask_builders import AShape, Dense  # noqa: E402
from mmflex.integrations import registration  # noqa: E402

SPEC = AShape(128, 128)
IDS = torch.randint(5, 90, (1, 400), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    mmflex.configure(SPEC, backend="reference")
    with torch.no_grad():
        yield
    mmflex.configure()


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layouts of all calls of `mmflex.attention`."""
    seen: list[Any] = []
    real = runtime.attention

    def attention(*args: Any, **options: Any) -> Any:
        seen.append(options["layout"])
        return real(*args, **options)

    monkeypatch.setattr(runtime, "attention", attention)
    return seen


def built(implementation: str | None, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**text_config(**more))
    options = {} if implementation is None else {"attn_implementation": implementation}
    return transformers.AutoModelForCausalLM.from_config(config, **options).eval()


def wanted() -> torch.Tensor:
    with mmflex.patched(built(None), SPEC, backend="reference") as model:
        return model(IDS).logits


def test_a_model_that_is_built_with_the_name_is_patched_at_its_first_forward() -> None:
    model = built("mmflex")
    assert model.config._attn_implementation == "mmflex"
    twin = copy.deepcopy(model)
    assert torch.equal(model(IDS).logits, wanted())
    assert torch.equal(model(IDS).logits, twin(IDS).logits)
    assert not torch.equal(mmflex.unpatch(model)(IDS).logits, wanted())
    assert model.config._attn_implementation == "sdpa"
    assert not any("_mmflex" in name for module in model.modules() for name in vars(module))


def test_from_pretrained_and_generate(tmp_path: Path) -> None:
    model = built(None)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="mmflex")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    got = loaded.generate(IDS, **options)
    assert "_mmflex_patch" in vars(loaded)
    with mmflex.patched(model, SPEC, backend="reference"):
        assert torch.equal(got, model.generate(IDS, **options))
    assert "mmflex" not in (tmp_path / "config.json").read_text()


def test_a_model_selects_it_and_something_else_again() -> None:
    model = built("eager")
    dense = model(IDS).logits
    model.set_attn_implementation("mmflex")
    assert model.config._attn_implementation == "mmflex"
    torch.testing.assert_close(model(IDS).logits, wanted(), atol=1e-5, rtol=1e-4)
    model.set_attn_implementation("mmflex")  # once more changes nothing
    model.set_attn_implementation("eager")
    assert torch.equal(model(IDS).logits, dense)
    mmflex.patch(model, Dense())
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    assert "_mmflex_patch" not in vars(model)


def test_a_model_that_changes_its_mind_before_the_first_forward() -> None:
    model = built("mmflex")
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(IDS).logits, built("sdpa")(IDS).logits)
    assert "_mmflex_patch" not in vars(model)


@pytest.mark.parametrize("implementation", ["mmflex", {"text_config": "mmflex"}], ids=["all", "text"])
def test_the_first_prompt_of_a_vision_language_model_is_read(layouts: list[Any], implementation: Any) -> None:
    """Layout of the first forward, which is also the one that patches; the vision tower keeps its own attention."""
    family = FAMILIES["qwen2_5_vl"]
    plain = family.model()
    batch = family.batch(plain.config, batch=1)
    with mmflex.patched(plain, SPEC, backend="reference"):
        want = plain(**batch.inputs).logits
    expected = layouts.copy()
    layouts.clear()
    config = copy.deepcopy(plain.config)
    model = type(plain)._from_config(config, attn_implementation=implementation).eval()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(**batch.inputs).logits, want)
    assert [layout.modality.tolist() for layout in layouts] == [layout.modality.tolist() for layout in expected]
    assert len(set(layouts[0].modality.flatten().tolist())) > 1


def test_a_language_model_inside_another_is_patched_with_it() -> None:
    """Its own hook must not patch it a second time; alone, it is patched by itself."""
    model = built("mmflex")
    hidden = model.model(IDS).last_hidden_state
    assert "_mmflex_patch" in vars(model.model)
    mmflex.unpatch(model.model)
    again = built("mmflex")
    again(IDS)
    assert "_mmflex_patch" not in vars(again.model)
    assert torch.equal(again.model(IDS).last_hidden_state, hidden)


def test_compiled_before_its_first_forward() -> None:
    compiled = torch.compile(built("mmflex"), backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(IDS).logits, wanted(), atol=1e-5, rtol=1e-4)


def test_options() -> None:
    model = built("mmflex")
    mmflex.configure({1: Dense()}, backend="reference")
    model(IDS)
    assert vars(model)["_mmflex_patch"].spec == {1: (Dense(),) * 4}
    mmflex.configure(quality="fast")
    other = built("mmflex")
    other(IDS)
    assert vars(other)["_mmflex_patch"].spec[0] == (mmflex.default_spec("fast"),) * 4
    with pytest.raises(ValueError, match="a spec is given: leave one out"):
        mmflex.configure(SPEC, quality="fast")
    with pytest.raises(TypeError, match="no option 'tiles': it takes spec, quality, backend, mlp_chunk, vision, fuse"):
        mmflex.configure(tiles=3)


@pytest.mark.parametrize("spec", [5, "default", b"x", {"0": Dense()}, {1: Dense(), 0: "dense"}, [Dense(), 5] * 2])
def test_what_is_no_spec_is_refused_before_a_model_is_built(spec: Any) -> None:
    with pytest.raises(TypeError) as at_patch:
        mmflex.patch(built("eager"), spec)
    with pytest.raises(TypeError) as at_once:
        mmflex.configure(spec)
    assert str(at_once.value) == str(at_patch.value)
    model = built("mmflex")
    model(IDS)
    assert vars(model)["_mmflex_patch"].spec[0] == (SPEC,) * 4  # as configured before


def test_one_configuration_is_for_many_models() -> None:
    """Also where its patterns can be read only once."""
    mmflex.configure((Dense() for _ in range(4)), backend="reference")
    for model in (built("mmflex"), built("mmflex")):
        model(IDS)
        assert vars(model)["_mmflex_patch"].spec[0] == (Dense(),) * 4


def test_older_versions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their models have no such methods."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.46.3")
    registration.register(ModuleType("transformers.modeling_utils"))


def test_models_that_cannot_be_patched_say_why() -> None:
    config = transformers.Gemma2Config(**text_config(), head_dim=16, attn_logit_softcapping=50.0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="mmflex").eval()
    with pytest.raises(NotImplementedError, match=r"caps its attention logits at 50\.0"):
        model(IDS)
    model.set_attn_implementation("eager")
    model(IDS)


def test_mmflex_imported_first_does_not_import_transformers() -> None:
    """It registers when transformers' models are imported."""
    code = """
import sys
import mmflex
assert "transformers" not in sys.modules
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=9, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM._from_config(config, attn_implementation="mmflex").eval()
import torch
model(torch.ones(1, 70, dtype=torch.long))
print(type(vars(model)["_mmflex_patch"]).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "Patch", done.stderr
