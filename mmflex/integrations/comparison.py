"""A searched config beside uniform ones, by what the whole model predicts on the sample.

A search judges heads one by one, on the queries and keys of the dense model. How errors meet in later layers it does
not see; one forward under the config does. So the model has the last word: a config that leaves predictions further
from dense than one pattern on all heads within the same budget is not taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmflex.ir.layout import TokenLayout
from mmflex.ir.pattern import Pattern
from mmflex.tuning.budget import Budget, Option, mean
from mmflex.tuning.checkpoint import Done

from .predictions import divergence, hidden_states
from .prompts import token_layout
from .transformers import _language_model
from .trial import default_backend, sparse

RIVALS = 3
"""Uniform patterns that a searched config is compared with, of a family each."""

EAGER_ON_CPU = 1 << 24
"""Scores of a layer up to which a CPU runs specs eagerly: less than a kernel takes to compile."""


@dataclass(frozen=True)
class Rival:
    """One pattern on all heads: what it is in each layer, and in all together."""

    layers: Mapping[int, Option]
    option: Option


@dataclass(frozen=True)
class Contender:
    """What a forward under a spec gave: mean KL from dense in nats, and the density that ran."""

    name: str
    kl: float
    density: float

    def __str__(self) -> str:
        return f"{self.name} {self.kl:.3g} (density {self.density:.3f})"


def rivals_of(layers: Mapping[int, Done], budget: Budget, dense: float, count: int = RIVALS) -> list[Rival]:
    """The uniform candidates of least error within a shared budget, of each family one.

    layers: of a search, those with heads. dense: a head's dense price.
    """
    heads = sum(len(done.heads) for done in layers.values())
    by_pattern: dict[Pattern, dict[int, Option]] = {}
    for layer, done in layers.items():
        for option in done.uniform:
            by_pattern.setdefault(option.pattern, {})[layer] = option
    limit = budget.limit(dense, heads)
    found: dict[type[Pattern], Rival] = {}
    for options in by_pattern.values():
        if len(options) < len(layers):
            continue
        rival = Rival(options, mean([o for layer, o in options.items() for _ in layers[layer].heads]))
        kind, option = type(rival.option.pattern), rival.option
        within = getattr(option, budget.measure) <= limit * (1 + 1e-9)
        if within and (kind not in found or _harm(option) < _harm(found[kind].option)):
            found[kind] = rival
    return sorted(found.values(), key=lambda rival: _harm(rival.option))[:count]


def _harm(option: Option) -> float:
    return option.weight * option.error**2


def compare(
    root: nn.Module,
    inputs: Mapping[str, Any],
    layout: TokenLayout | None,
    specs: Mapping[str, Mapping[int, Sequence[Pattern]]],
    *,
    backend: str,
    last: int | None,
) -> list[Contender]:
    """Runs the sample densely and once under each spec: so many forward passes and one more.

    Args:
        inputs, layout: of one prompt, as a search has them. backend: as in a search.
        last: the queries whose predictions count, padding apart; None: all.

    Raises:
        RuntimeError, TypeError: what a backend or a model cannot do.
    """
    given = {**inputs, "use_cache": False}
    rows = _rows(inputs, last)
    found = []
    with torch.no_grad(), nullcontext() if layout is None else token_layout(layout):
        dense = hidden_states(root, given)
        layouts: dict[str, Any] = {}
        for name, spec in specs.items():
            with sparse(root, dict(spec), _backend(root, backend, len(dense.states)), layouts) as ran:
                states = hidden_states(root, given)
            found.append(Contender(name, divergence(root, dense, states, rows), ran.mean()[0]))
    return found


def _rows(inputs: Mapping[str, Any], last: int | None) -> Tensor:
    """int64: numbers of the tokens whose predictions count."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        every = mask[0].nonzero()[:, 0]
    else:
        tokens = ids if isinstance(ids, Tensor) else inputs["inputs_embeds"]
        every = torch.arange(tokens.shape[1], device=tokens.device)
    return every if last is None else every[-last:]


def _backend(root: nn.Module, backend: str, tokens: int) -> str:
    """The backend to run with: one that never runs a spec dense, and eager where that is soon done."""
    config, device = _language_model(root)[0], next(root.parameters()).device
    heads = int(config.num_attention_heads)
    if device.type == "cpu" and heads * tokens**2 <= EAGER_ON_CPU:
        return "reference"
    if backend != "auto":
        return backend
    return default_backend(device, heads, tokens, many=False)
