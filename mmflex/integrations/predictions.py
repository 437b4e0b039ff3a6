"""What a causal language model predicts on one prompt: its last hidden states, and logits a few rows at a time.

Logits of a whole prompt never lie in memory at once: a vocabulary is a hundred times as wide as hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEAD_ROWS = 512
"""Rows whose logits are held at a time."""


@dataclass(frozen=True, eq=False)
class Hidden:
    """What a model's head reads: ``states`` [N, width], and the output of the inner model that held them."""

    states: Tensor
    output: Any


def hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> Hidden:
    """The last hidden states of one prompt: runs the whole model once.

    inputs: of its forward, one prompt of N tokens; at best with ``logits_to_keep`` 1, where the model has it.

    Raises:
        TypeError: a model whose inner model cannot be told from its head.
    """
    inner: Any = getattr(model, "base_model", None)
    if inner is None or inner is model:
        raise TypeError(f"{type(model).__name__} has no language model head: give a model ...ForCausalLM")
    outputs: list[Any] = []
    handle = inner.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        model(**inputs)
    finally:
        handle.remove()
    states = getattr(outputs[-1], "last_hidden_state", None) if outputs else None
    if not isinstance(states, Tensor) or states.dim() != 3 or len(states) != 1:
        raise TypeError(f"{type(model).__name__} does not hand hidden states [1, N, width] to its head")
    return Hidden(states[0], outputs[-1])


def logits(model: nn.Module, output: Any, states: Tensor) -> Tensor:
    """float32 [rows, vocabulary]: the model's own head on some rows of hidden states.

    The whole forward of the model runs, with an inner model that returns those rows: what it does to logits after the
    head (capping, scaling) is done here too. ``output``: of the inner model.
    """
    replaced = type(output)(**{**output, "last_hidden_state": states[None]})
    inner: Any = model.base_model
    inner.forward = lambda *args, **kwargs: replaced
    try:
        dummy = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        found: Tensor = model(input_ids=dummy, use_cache=False, return_dict=True).logits[0].float()
        return found
    finally:
        del inner.forward


def log_probabilities(logits: Tensor) -> Tensor:
    """float64 like logits [rows, vocabulary], in nats."""
    return logits.double().log_softmax(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of `log_probabilities` [rows, vocabulary], in nats: float64 [rows]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def portions(count: int) -> Iterator[slice]:
    """So many rows, `HEAD_ROWS` at a time."""
    for first in range(0, count, HEAD_ROWS):
        yield slice(first, min(first + HEAD_ROWS, count))


@torch.no_grad()
def divergence(model: nn.Module, dense: Hidden, other: Hidden, rows: Tensor) -> float:
    """Mean KL of dense predictions to others, in nats, over some rows (int64, token numbers)."""
    total = 0.0
    for part in portions(len(rows)):
        p, q = (log_probabilities(logits(model, h.output, h.states[rows[part]])) for h in (dense, other))
        total += float(kl_divergence(p, q).sum())
    return total / max(1, len(rows))
