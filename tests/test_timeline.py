"""The timeline up to the first token, on a clock that advances by one second whenever it is read."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES

import mmflex
from mask_builders import Dense
from mmflex.integrations import timeline as module
from mmflex.integrations.timeline import PREFILL, PROCESSOR, READING, STAGES, TOKEN, TOWER, Timeline

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def ours(model: Any) -> list[Any]:
    hooks = (h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return [hook for hook in hooks if isinstance(hook, module._Mark)]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(("name", "encoded"), [("qwen2_5_vl", 2), ("llava", 1), ("glm4v", 1)])
def test_stages_of_a_prompt(name: str, encoded: int, patched: bool) -> None:
    family = FAMILIES[name]
    model = family.model()
    if patched:
        mmflex.patch(model, Dense())
    inputs = family.batch(model.config).inputs
    timeline = Timeline(model)
    with timeline.stage(READING):
        pass
    with timeline.stage(PROCESSOR):
        pass
    for _ in range(2):  # seconds are those of the last prompt
        with timeline.first_token():
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert tuple(timeline.seconds) == STAGES
    rest = 1 + 2 * (encoded + 1) - encoded - 1  # two readings a forward and one at the end, less the forwards
    expected = {READING: 1, PROCESSOR: 1, TOWER: encoded, PREFILL: 1, TOKEN: rest}
    assert timeline.seconds == expected
    assert timeline.total == sum(expected.values())
    assert not ours(model)


def test_stages_that_did_not_happen() -> None:
    model = FAMILIES["qwen2_5_vl"].model()
    ids = torch.randint(5, 90, (1, 20))
    timeline = Timeline(model)
    with torch.no_grad(), timeline.first_token():
        model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids))
    assert list(timeline.seconds) == [PREFILL, TOKEN]


def test_hooks_are_gone_after_an_error() -> None:
    model: Any = FAMILIES["llama3"].model()
    timeline = Timeline(model)
    with timeline.first_token():
        assert ours(model)
    with pytest.raises(ZeroDivisionError), timeline.first_token():
        raise ZeroDivisionError
    assert not ours(model)
