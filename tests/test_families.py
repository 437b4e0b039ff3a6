"""Every family that mmflex supports, patched: `Dense` is SDPA, layouts are right, a sparse spec is that mask."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, Family

transformers = pytest.importorskip("transformers")

import mmflex.runtime.attention as runtime  # noqa: E402
from mask_builders import AShape, Dense, Grid, QBoundary  # noqa: E402
from mmflex import TokenLayout  # noqa: E402
from mmflex.integrations.transformers import DenseFallback, patched  # noqa: E402

SPARSE = QBoundary({"text": AShape(128, 1), "image": AShape(128, 1), "video": Grid(local=1, sink=1)})
ACCELERATED = [name for name, family in FAMILIES.items() if family.attention in ("causal", "sliding")]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[TokenLayout]:
    """The layouts with which `mmflex.attention` was called."""
    seen: list[TokenLayout] = []
    real = runtime.attention

    def attention(*args: Any, **options: Any) -> Any:
        seen.append(options["layout"])
        return real(*args, **options)

    monkeypatch.setattr(runtime, "attention", attention)
    return seen


def check(layout: TokenLayout, columns: np.ndarray, mask: torch.Tensor) -> None:
    """A layout against what the prompt was built from."""
    valid = mask.bool().numpy()
    assert (np.broadcast_to(layout.valid, valid.shape) == valid).all()
    for name, column in (("modality", 0), ("frame", 2), ("cell", 3)):
        found = np.broadcast_to(getattr(layout, name), valid.shape)
        assert (found[valid] == columns[column][valid]).all(), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_dense_is_sdpa(name: str, side: str, layouts: list[TokenLayout]) -> None:
    """Logits of a batch padded on either side; greedy tokens (padded left, as generate() wants it)."""
    family = FAMILIES[name]
    model = family.model()
    batch = family.batch(model.config, batch=2, side=side)
    mask = batch.inputs["attention_mask"]
    options = {"max_new_tokens": 4, "do_sample": False}
    want = model(**batch.inputs).logits[mask.bool()]
    tokens = model.generate(**batch.inputs, **options) if side == "left" else None
    with warnings.catch_warnings(record=True) as caught, patched(model, Dense()):
        warnings.simplefilter("always")
        got = model(**batch.inputs).logits[mask.bool()]
        forward, layouts[:] = list(layouts), []
        if tokens is not None:
            assert torch.equal(model.generate(**batch.inputs, **options), tokens)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    notices = [w for w in caught if issubclass(w.category, DenseFallback)]
    if family.attention == "causal":
        assert not notices
        assert len(forward) == model.config.get_text_config().num_hidden_layers
        for layout in forward + layouts:
            check(layout, batch.columns, mask)
    elif family.attention != "sliding":  # image blocks that see both ways: dense, and said so
        assert notices
        assert not forward


@pytest.mark.parametrize("name", ACCELERATED)
def test_a_sparse_spec_runs_and_differs(name: str, layouts: list[TokenLayout]) -> None:
    """A prompt of several tiles under a spec that leaves pairs out, forward and generate()."""
    family: Family = FAMILIES[name]
    model = family.model()
    batch = family.batch(model.config, text=600, frames=6)
    want = model(**batch.inputs).logits[:, -1]
    with patched(model, SPARSE, backend="reference"):
        got = model(**batch.inputs).logits[:, -1]
        out = model.generate(**batch.inputs, max_new_tokens=2, do_sample=False)
    assert got.isfinite().all()
    assert out.shape[1] == batch.inputs["input_ids"].shape[1] + 2
    if family.attention == "causal":
        assert not torch.allclose(got, want, atol=1e-4), "the spec left nothing out"
        check(layouts[-1], batch.columns, batch.inputs["attention_mask"])


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family.kind == "vlm" and name in ACCELERATED]
)
def test_beams(name: str, layouts: list[TokenLayout]) -> None:
    """Beam search repeats the prompts, not what was described."""
    family = FAMILIES[name]
    model = family.model()
    batch = family.batch(model.config, batch=2)
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    try:
        want = model.generate(**batch.inputs, **options)
    except (ValueError, IndexError, RuntimeError) as error:
        pytest.skip(f"{name} has no beam search with images: {error}")
    with patched(model, Dense()):
        assert torch.equal(model.generate(**batch.inputs, **options), want)
    assert layouts
    times = layouts[0].batch_size // 2
    mask = batch.inputs["attention_mask"].repeat_interleave(times, dim=0)
    check(layouts[0], np.repeat(batch.columns, times, axis=1), mask)
