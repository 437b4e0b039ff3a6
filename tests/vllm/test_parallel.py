"""Heads shared by two processes, and a model that vLLM compiles."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm.v1")  # the folder of these tests is no package of that name

import serving
from serving import accelerated, answers, engine, ids

from mask_builders import AShape, VerticalSlash
from mmflex.integrations.vllm import options

SPEC = {
    0: [VerticalSlash(40, 128), AShape(16, 128), AShape(64, 256), VerticalSlash(64, 256)],
    1: VerticalSlash(40, 128),
}


def test_every_rank_runs_its_heads_patterns_and_compiled_models_the_same() -> None:
    config = options(SPEC, threshold=200, backend="reference")
    given: dict[str, Any] = {"max_num_batched_tokens": 1024}
    prompts = [ids(1500), ids(30, 1)]
    found = []
    for more in (
        {},
        {"enforce_eager": False},
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    ):
        with engine(serving.text_model(), config, **given, **more) as llm:
            found.append(answers(llm, prompts))
            if "tensor_parallel_size" not in more:  # else the layers are in other processes
                assert accelerated().counters.layers == 4  # two chunks in two layers
    for one in found[1:]:
        for (tokens, lines), (other, others) in zip(one, found[0], strict=True):
            assert tokens == other
            assert lines == pytest.approx(others, abs=1e-3)
