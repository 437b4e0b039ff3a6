"""One prompt, dense beside sparse: time to the first token by stage, both answers, and what was computed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmflex.integrations.layouts import layout_for
from mmflex.integrations.timeline import MODEL_STAGES, Timeline
from mmflex.integrations.transformers import patched
from mmflex.runtime.calls import observed
from mmflex.runtime.plan import Plan


@dataclass
class Side:
    """What one kind of attention did.

    Attributes:
        answer: the text that it generated.
        tokens: its token ids.
        first_s: seconds of the first call, which compiles and is not in ``runs``.
        runs: seconds by stage of every timed prefill.
    """

    answer: str
    tokens: list[int]
    first_s: float
    runs: list[dict[str, float]]

    @property
    def seconds(self) -> dict[str, float]:
        """Medians by stage."""
        names = [name for name in MODEL_STAGES if any(name in run for run in self.runs)]
        return {name: statistics.median(run.get(name, 0.0) for run in self.runs) for name in names}

    @property
    def first_token_s(self) -> float:
        """Seconds from the model's inputs to its first token, the median of the runs."""
        return statistics.median(sum(run.get(name, 0.0) for name in MODEL_STAGES) for run in self.runs)


@dataclass
class Beside:
    """Both sides of one prompt.

    Attributes:
        prompt_tokens: length of the prompt. layout: what its tokens are, in words.
        densities: share of the causal pairs in computed blocks, for every layer that had a plan; empty where everything
            ran dense.
        plan: of the middle layer among them, for pictures.
    """

    prompt_tokens: int
    layout: str
    dense: Side
    sparse: Side
    densities: list[float]
    plan: Plan | None = field(default=None, repr=False)

    @property
    def same(self) -> int:
        """Tokens at the beginning in which both answers agree."""
        pairs = list(zip(self.dense.tokens, self.sparse.tokens, strict=False))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    def to_json(self) -> dict[str, Any]:
        """Everything but the plan."""
        sides = {
            name: {"answer": s.answer, "tokens": s.tokens, "first_s": s.first_s, "runs": s.runs}
            for name, s in (("dense", self.dense), ("sparse", self.sparse))
        }
        facts = {"prompt_tokens": self.prompt_tokens, "layout": self.layout, "densities": self.densities}
        return {**facts, **sides, "same_tokens": self.same}


def beside(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    spec: Any,
    decode: Callable[[list[int]], str],
    *,
    new_tokens: int = 64,
    runs: int = 2,
    backend: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> Beside:
    """Generates an answer and times the prefill, with the model's own attention and under a spec.

    Args:
        model: a transformers model, not patched.
        inputs: of one prompt, on its device.
        spec: as in `mmflex.patch`.
        decode: text of token ids.
        new_tokens: length of the answers, greedily decoded.
        runs: timed prefills of each side; the first call of each is timed apart.
        backend: as in `mmflex.attention`.
        say: is told what runs next.

    Raises:
        ValueError: a batch of several prompts, or numbers below 1.
    """
    ids = inputs["input_ids"]
    if ids.shape[0] != 1 or min(new_tokens, runs) < 1:
        raise ValueError(f"one prompt is run, with 1 token and 1 run or more: got {ids.shape[0]}, {new_tokens}, {runs}")
    timeline = Timeline(model)
    densities: list[float] = []
    plans: list[Plan] = []
    layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)  # type: ignore[union-attr, operator]

    def note(plan: Plan) -> None:
        densities.append(float(plan.density.total))
        if len(densities) <= max(1, layers // 2):
            plans[:] = [plan]  # the others are freed: block lists of long prompts are large

    def side(name: str) -> Side:
        say(f"answering, {name}")
        start = time.perf_counter()
        with observed(note):
            out = _generate(model, inputs, new_tokens)
        first = time.perf_counter() - start
        timed = []
        for number in range(runs):
            say(f"timing the prefill, {name}, {number + 1} of {runs}")
            with timeline.first_token():
                _generate(model, inputs, 1)
            timed.append({stage: timeline.seconds[stage] for stage in MODEL_STAGES if stage in timeline.seconds})
        tokens = out[0, ids.shape[1] :].tolist()
        return Side(decode(tokens), tokens, first, timed)

    with torch.inference_mode():
        dense = side("dense")
        with patched(model, spec, backend=backend):
            sparse = side("sparse")
    layout = layout_for(model.config, inputs)
    return Beside(ids.shape[1], layout.summary(), dense, sparse, densities[:layers], plans[0] if plans else None)


def _generate(model: Any, inputs: Mapping[str, Tensor], tokens: int) -> Tensor:
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
