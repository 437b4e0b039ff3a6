"""What besides attention outgrows a card at half a million tokens: MLP and norm temporaries, and the logits.

The MLP of a 7B model needs 115 GB for one million tokens at once, its norms 30 GB in float32, and the logits of all
tokens 300 GB. All of them work on each token by itself, so rows can be done a chunk at a time: the same numbers to
rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from . import closed

AUTOMATIC_ROWS = 65_536
"""Without a chunk size, inputs of more rows than this (tokens x prompts) are chunked ..."""

AUTOMATIC_CHUNK = 32_768
"""... into this many rows: 3.5 GB of temporaries for the MLP of a 7B model in bf16, and no measurable cost."""


class RowChunks:
    """Runs a module that treats every token by itself in chunks of rows; in place of the module's ``forward``.

    Args:
        module: maps ``[..., H]`` to ``[..., H']``, each row (all but the last dimension) on its own.
        chunk: rows at a time; None for automatic, which leaves inputs of up to `AUTOMATIC_ROWS` whole.
    """

    def __init__(self, module: nn.Module, chunk: int | None) -> None:
        self.module, self.chunk = module, chunk
        self.closed = is_mlp(module)  # norms have no temporaries left once they are compiled
        self.before = module.__dict__.get("forward")
        self.inner = module.forward
        # A bound method, not a closure: a deep copy of the model then gets chunks of its own weights.
        module.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and closed.tracing:
            return closed.layer_mlp(x) if self.closed else self.inner(x, *args, **kwargs)
        if args or kwargs or (torch.is_grad_enabled() and x.requires_grad):
            return self.inner(x, *args, **kwargs)
        return self.rows(x, self.inner)

    def rows(self, x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``function`` of ``x [..., H]``, some rows at a time where there are many."""
        rows = x[..., 0].numel()
        chunk = self.chunk if self.chunk is not None else (AUTOMATIC_CHUNK if rows > AUTOMATIC_ROWS else rows)
        if rows <= chunk:
            return function(x)
        flat = x.reshape(rows, x.shape[-1])
        out: torch.Tensor | None = None
        for start in range(0, rows, chunk):
            part = function(flat[start : start + chunk])
            out = part.new_empty(rows, part.shape[-1]) if out is None else out
            out[start : start + chunk] = part
        assert out is not None
        return out.view(*x.shape[:-1], out.shape[-1])

    def remove(self) -> None:
        """Give the module its own forward back."""
        self.module.__dict__.pop("forward", None)
        if self.before is not None:
            self.module.forward = self.before  # type: ignore[method-assign]


def chunk_rows(text_model: nn.Module, chunk: int | None) -> list[RowChunks]:
    """Put the dense MLPs and the norms of a language model's layers (and its last norm) on `RowChunks`.

    Mixture-of-experts blocks stay whole: they sort tokens by expert, and few tokens of a chunk go to each.

    Args:
        chunk: rows at a time; None for automatic, 0 for none.

    Raises:
        ValueError: a negative chunk.
    """
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 0):
        raise ValueError(f"mlp_chunk is {chunk!r}: give a number of tokens, None for automatic, or 0 for none")
    if chunk == 0:
        return []
    inside: list[nn.Module] = [getattr(text_model, "norm", nn.Identity())]
    layers = getattr(text_model, "layers", None)
    for layer in layers if isinstance(layers, nn.ModuleList) else ():
        inside.extend(layer.children())
    return [RowChunks(module, chunk) for module in inside if is_mlp(module) or _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def is_mlp(module: nn.Module) -> bool:
    """Whether a module is a dense MLP of a decoder layer."""
    if not type(module).__name__.endswith("MLP") or hasattr(module, "experts"):
        return False
    names = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
    return {"up_proj", "down_proj"} <= names or {"gate_up_proj", "down_proj"} <= names or {"fc1", "fc2"} <= names


def last_token_logits(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The logits after each prompt's last token, without those of the tokens before: ``[B, vocabulary]``.

    Args:
        model: a transformers model with a language model head, patched or not.
        inputs: what its forward takes; ``attention_mask [B, N]`` where prompts are padded, on either side.

    Raises:
        ValueError: a prompt without tokens.
        TypeError: a model whose forward has no ``logits_to_keep``.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise TypeError(
            f"{type(model).__name__}.forward has no logits_to_keep: apply the head to its base model's last token"
        )
    mask = inputs.get("attention_mask")
    keep: int | torch.Tensor = 1
    at: torch.Tensor | None = None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        valid = mask.bool()
        if not valid.any(dim=1).all():
            row = int((~valid.any(dim=1)).int().argmax())
            raise ValueError(f"prompt {row} has no tokens in attention_mask: every prompt needs one or more")
        last = mask.shape[1] - 1 - valid.flip(1).int().argmax(dim=1)
        given = inputs.get("input_ids")
        given = inputs.get("inputs_embeds") if given is None else given
        if given is not None:
            last = last - (mask.shape[1] - given.shape[1])  # with a cache the mask also covers the tokens before
        keep, at = torch.unique(last, return_inverse=True)
    given = dict(inputs)
    if given.get("past_key_values") is None and "use_cache" in inspect.signature(model.forward).parameters:
        given.setdefault("use_cache", False)  # nobody would see it
    with torch.no_grad():
        logits = model(**given, logits_to_keep=keep).logits
    return logits[:, -1] if at is None else logits[torch.arange(len(at), device=logits.device), at.to(logits.device)]
