"""About how long a dense forward pass takes on this machine, before any weight is loaded: for dry runs.

Matrix products: two operations for every weight and token, at the rate of one product that is timed here. Attention:
the cost model's milliseconds for a dense layer, which are those of this device where ``mmflex calibrate`` has measured
it. Sparse forwards are taken for dense ones; what comes on top of both is said beside the figures.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .models import kind_of

if TYPE_CHECKING:
    import torch

BASIS = (
    "2 operations for every weight and token at the rate of one matrix product timed here, and attention by the cost "
    "model"
)


@dataclass(frozen=True)
class Weights:
    """How many weights a model has: ``every``, those that multiply each token (``body``) and those of its ``head``."""

    every: int
    body: int
    head: int


def weights_of(config: Any) -> Weights:
    """Weights of a config's model, counted without memory for them."""
    import torch

    with torch.device("meta"):
        built = kind_of(config).from_config(config)
    every = sum(parameter.numel() for parameter in built.parameters())
    embedding, head = built.get_input_embeddings(), built.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    head_size = 0 if head is None else head.weight.numel()
    return Weights(every, every - embedding.weight.numel() - (0 if tied else head_size), head_size)


@dataclass(frozen=True)
class Forwards:
    """Seconds of dense forward passes of one model on one device.

    Attributes:
        config: of the model, or of its language model. device, dtype: where it runs, and in what.
    """

    config: Any
    device: str
    dtype: torch.dtype

    @cached_property
    def weights(self) -> Weights:
        return weights_of(self.config)

    @cached_property
    def rate(self) -> float:
        return product_rate(self.device, self.dtype)

    def products_s(self, tokens: int) -> float:
        """Of the matrix products of one prompt, the head's apart."""
        return 2 * self.weights.body * tokens / self.rate

    def head_s(self, tokens: int) -> float:
        """Of the logits of so many tokens."""
        return 2 * self.weights.head * tokens / self.rate

    def attention_s(self, tokens: int) -> float:
        """Of all layers' dense attention over one prompt."""
        import torch

        from ..compiler.prices import predict
        from ..integrations.shape import head_dim_of, kv_heads_of
        from ..ir.layout import TokenLayout
        from ..ir.pattern import Dense
        from ..runtime.calls import Request, decided

        text = self.config.get_text_config(decoder=True)
        heads, width = int(text.num_attention_heads), head_dim_of(text) or 128
        row = torch.empty((1, 1, 1, width), dtype=self.dtype, device=self.device)
        q, k = (row.expand(1, number, tokens, width) for number in (heads, kv_heads_of(text)))
        program, _ = decided(q, k, (Dense(),) * heads, TokenLayout.text(tokens), Request(width**-0.5))
        return int(text.num_hidden_layers) * predict(program).total_ms / 1e3

    def seconds(self, tokens: int) -> float:
        """Of one forward up to the logits of the last token."""
        return self.products_s(tokens) + self.attention_s(tokens) + self.head_s(1)


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product on a device: the quickest of three, after a first."""
    import torch

    size = 4096 if device.startswith("cuda") else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ a).sum().item()
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / min(taken[1:])
