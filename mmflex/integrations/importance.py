"""How much a model's answers depend on what each head writes for each token: what errors of a search are weighed by.

A long prompt asks few things. Which rows of which heads matter for the answer is a gradient away: with m the log-odds
of the model's own next token after one of the last queries, a small error d in head h's output for token r changes it
by ``g[h, r] . d``, where g is the gradient of m. Its square is bounded by ``|g|^2 |d|^2``, so ``|g|^2`` summed over the
last queries is what a squared error counts. Log-odds, not log-probabilities: those of a sure answer have no gradient,
although a mask that hides what it rests on turns it over.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmflex.tuning.rows import LAST_QUERIES

from .transformers import _language_model

_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""What model families call the output projection of attention."""
_DRAWS = 2
"""Backward passes: the last queries' gradients are summed with random signs, so that mixed terms cancel on average."""
_FLOOR = 0.05
"""Least importance of a row, as a share of its head's mean: later questions look at other rows than this one's."""


class Unknown(ValueError):
    """Why no importance could be found; the message is shown."""


def importance(
    root: nn.Module, inputs: Mapping[str, Any], *, last: int = LAST_QUERIES, seed: int = 0
) -> dict[int, Tensor]:
    """float32 [Hq, N] by layer: how much a squared error in a head's output for a token counts.

    Runs the model forward once with its own attention and backward twice; decoder layers are computed again for each,
    so that memory holds the activations of one layer and what stands between layers.

    Args:
        root: a causal language model or vision-language model of transformers, in eval mode.
        inputs: of its forward, one prompt. ``logits_to_keep`` is set here.
        last: the queries whose predictions count, padding apart. seed: of the signs.

    Raises:
        Unknown: attention without an output projection that is known, or without a gradient; a model without logits.
    """
    config, _, _, modules = _language_model(root)
    heads, outputs = int(config.num_attention_heads), _Outputs()
    asked, kept = _last(inputs.get("attention_mask"), last)
    given = {**inputs, "use_cache": False}
    known = inspect.signature(root.forward).parameters
    if "logits_to_keep" in known or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        given["logits_to_keep"] = kept
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_frozen(root))
        for module in modules:
            hook = outputs.hook(int(module.layer_idx))  # type: ignore[arg-type]
            handle = _projection(module).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        for layer in _decoder_layers(root, modules):
            stack.enter_context(_recomputed(layer))
        stack.enter_context(torch.enable_grad())
        logits = getattr(root(**given), "logits", None)
        if logits is None:
            raise Unknown(f"{type(root).__name__} gives no logits: its answers are not known without a head")
        odds = _log_odds(logits[0, asked])
        del logits
        if not odds.requires_grad:
            raise Unknown(f"the logits of {type(root).__name__} have no gradient: its attention has no backward")
        generator = torch.Generator().manual_seed(seed)
        found: dict[int, Tensor] = {}
        for draw in range(_DRAWS):
            signs = (torch.randint(0, 2, odds.shape, generator=generator) * 2.0 - 1.0).to(odds)
            more = draw < _DRAWS - 1
            grads = torch.autograd.grad(odds @ signs, list(outputs.seen.values()), retain_graph=more, allow_unused=True)
            for index, grad in zip(outputs.seen, grads, strict=True):
                if grad is None:
                    raise Unknown(f"the answers of {type(root).__name__} have no gradient in layer {index}")
                squared = grad[0].unflatten(-1, (heads, -1)).float().square().sum(-1).T / _DRAWS
                found[index] = found[index] + squared if index in found else squared
    totals = [float(w.sum()) for w in found.values()]
    if not all(map(math.isfinite, totals)) or not any(totals):
        raise Unknown(f"the gradients of {type(root).__name__} are not finite on this sample, or all zero")
    return {layer: w + _FLOOR * w.mean(-1, keepdim=True) for layer, w in found.items()}


def _last(mask: Any, last: int) -> tuple[Any, int]:
    """The last tokens of the one prompt that are no padding, counted from the end, and how many logits hold them.
    ``mask``: bool or int [1, N], where given."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.any()):
        return slice(-last, None), last
    asked = mask[0].nonzero()[-last:, 0].tolist()
    n = mask.shape[1]
    return [i - n for i in asked], n - asked[0]


def _log_odds(logits: Tensor) -> Tensor:
    """[R]: of the likeliest token against all others; logits [R, vocabulary]."""
    logits = logits.float()
    top = logits.argmax(-1, keepdim=True)
    return logits.gather(-1, top)[:, 0] - logits.scatter(-1, top, float("-inf")).logsumexp(-1)


class _Outputs:
    """The heads' outputs [1, N, Hq * Dv] of every layer, as they enter the projection."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def hook(self, layer: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # The graph begins at the first layer's outputs. A layer that is computed again is not seen again.
            out = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            self.seen.setdefault(layer, out)
            return (out, *args[1:])

        return keep


def _decoder_layers(root: nn.Module, attention: list[nn.Module]) -> list[nn.Module]:
    """The modules that hold attention, and what stands in a list with them: layers of linear attention, say."""
    own = set(attention)
    holding = {parent for parent in root.modules() if own.intersection(parent.children())}
    stacks = [m for m in root.modules() if isinstance(m, nn.ModuleList) and holding.intersection(m)]
    return list(dict.fromkeys([*holding, *(layer for stack in stacks for layer in stack)]))


def _projection(module: nn.Module) -> nn.Module:
    for name in _PROJECTIONS:
        if isinstance(found := getattr(module, name, None), nn.Module):
            return found
    raise Unknown(f"{type(module).__name__} has no output projection named {', '.join(_PROJECTIONS)}")


@contextmanager
def _frozen(root: nn.Module) -> Iterator[None]:
    """No gradients of parameters."""
    trained = [p for p in root.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def _recomputed(layer: nn.Module) -> Iterator[None]:
    """A decoder layer whose activations are not kept for backward."""
    forward, before = layer.forward, vars(layer).get("forward")  # one of its own: of accelerate's hooks, say

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layer.forward = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before  # type: ignore[method-assign]
