"""What a model's attention layers see on one prompt, and what patterns make of it: density and output error.

Queries, keys and values are those of the dense forward, after rotation. A layer that a spec leaves out keeps the
model's own attention: its density is 1 and its error 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.masks import NAME
from ..integrations.prefill import attention_forward
from ..integrations.transformers import patched
from ..integrations.trial import estimated
from ..ir.layout import TokenLayout
from ..ir.pattern import Dense, Pattern
from ..runtime.attention import plan
from ..runtime.plan import Plan
from ..runtime.reference import softmax_attention
from ..tuning.config import Config, Spec, per_layer

ROWS = 256
"""Queries at which allowed pairs are counted, where a prompt has more."""

WHOLE_OUTPUT_QUERIES = 16384
"""Queries up to which a setting's output error is that of the whole output. On longer prompts it is measured at `ROWS`
drawn
queries: to run every setting that is tried would take a kernel compiled for each."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of an attention layer: q [B, Hq, M, D], k, v [B, Hkv, N, D], out [B, Hq, M, Dv], and the patterns of the
    layer's heads (None: the model's own attention)."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    layout: TokenLayout
    patterns: tuple[Pattern, ...] | None


@contextmanager
def watched(see: Callable[[Seen], None]) -> Iterator[None]:
    """Shows every attention call of patched models to ``see``, for the length of a ``with`` block inside `patched`."""
    from transformers.modeling_utils import AttentionInterface

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        found = attention_forward(module, query, key, value, mask, **options)
        slot = vars(module).get("_mmflex")
        if slot is not None and query.shape[2] > 1:
            batch, _, queries, width = query.shape
            layout = slot.patch.prompt.layout(batch, None, 0, 0, queries)
            scale = width**-0.5 if options.get("scaling") is None else options["scaling"]
            patterns = slot.patch.spec.get(module.layer_idx)
            out = found[0].transpose(1, 2)
            see(Seen(int(module.layer_idx), query, key, value, out, scale, layout, patterns))  # type: ignore[arg-type]
        return found

    AttentionInterface.register(NAME, attention)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, attention_forward)


@dataclass(frozen=True)
class Measured:
    """Of a spec on a trace, means over layers and heads.

    Attributes:
        density: pairs in computed blocks over causal pairs.
        pairs: allowed pairs over causal pairs (from `ROWS` queries on longer prompts).
        error: norm of (sparse output - dense output) over norm of the dense output.
        estimates: products of estimates, over those of dense attention (`estimated`).
    """

    density: float
    pairs: float
    error: float
    estimates: float = 0.0


@dataclass(eq=False)
class Trace:
    """The attention layers of a model on one prompt. ``layers``: `Seen`, by layer; ``heads``: query heads."""

    layers: dict[int, Seen]
    backend: str
    densities: dict[Any, float] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Attention layers of the model."""
        return len(self.layers)

    @property
    def layout(self) -> TokenLayout:
        return next(iter(self.layers.values())).layout

    @property
    def heads(self) -> int:
        return int(next(iter(self.layers.values())).q.shape[1])

    @property
    def tokens(self) -> int:
        return self.layout.length

    @property
    def frame(self) -> int | None:
        """Tokens from frame to frame; None for text alone."""
        return self.layout.frame_stride(None)

    def per_layer(self, spec: Spec | Config) -> dict[int, tuple[Pattern, ...]]:
        """A spec written out for these layers; ValueError where it is made for another model."""
        if isinstance(spec, Config):
            return spec.for_model(self.depth, self.heads)
        return per_layer(spec, sorted(self.layers), self.heads)

    def plan(self, layer: int, patterns: tuple[Pattern, ...]) -> Plan:
        """The plan of a layer on the backend of this trace."""
        seen = self.layers[layer]
        return plan(seen.q, seen.k, patterns, layout=seen.layout, scale=seen.scale, backend=self.backend, v=seen.v)

    def density(self, spec: Spec | Config) -> float:
        """Pairs in computed blocks over causal pairs, from the plans of all layers (kept, by pattern and layer)."""
        return sum(self._density(i, self.per_layer(spec).get(i)) for i in self.layers) / len(self.layers)

    def _density(self, layer: int, patterns: tuple[Pattern, ...] | None) -> float:
        if patterns is None:
            return 1.0
        for key in ((layer, patterns), patterns):
            if key in self.densities:
                return self.densities[key]
        made = self.plan(layer, patterns)
        # without a selection it is the same in every layer
        key = (layer, patterns) if made.program.leaves else patterns
        self.densities[key] = made.density.total
        return self.densities[key]

    def measure(self, spec: Spec | Config) -> Measured:
        """Density, allowed pairs and output error of a spec."""
        density, pairs, error, estimates = [], [], [], 0.0
        for layer, patterns in self.per_layer(spec).items():
            made = self.plan(layer, patterns)
            density.append(made.density.total)
            pairs.append(allowed(made))
            error.append(float(self.errors(layer, made).mean()))
            estimates += estimated(made) / len(self.layers)
        left = len(self.layers) - len(density)
        mean = [sum(x) / len(self.layers) for x in (density + [1.0] * left, pairs + [1.0] * left, error)]
        return Measured(mean[0], mean[1], mean[2], estimates)

    def errors(self, layer: int, made: Plan) -> Tensor:
        """float32 [Hq]: relative error of a plan's output, per head; of more than `WHOLE_OUTPUT_QUERIES` queries at
        some of them, drawn."""
        seen = self.layers[layer]
        if seen.q.shape[2] > WHOLE_OUTPUT_QUERIES:
            return errors_at(seen, made, drawn(seen.q.shape[2], ROWS))
        out = made.attend(seen.q, seen.k, seen.v)
        return torch.stack([relative(out[:, h], seen.out[:, h]) for h in range(out.shape[1])])


def drawn(queries: int, count: int) -> Tensor:
    """int64: up to so many drawn queries, ascending; the same ones each time."""
    return torch.randperm(queries, generator=torch.Generator().manual_seed(queries))[:count].sort().values


def errors_at(seen: Seen, made: Plan, rows: Tensor) -> Tensor:
    """float32 [Hq]: relative error of a plan's output at some queries, per head, without running it."""
    mask = made.dense_mask(rows.tolist())
    rows = rows.to(seen.q.device)
    out, _ = softmax_attention(seen.q[:, :, rows], seen.k, seen.v, mask, seen.scale)
    return torch.stack([relative(out[:, h], seen.out[:, h, rows]) for h in range(out.shape[1])])


def relative(found: Tensor, want: Tensor) -> Tensor:
    """Norm of the difference over the norm of ``want``, float32 []."""
    want = want.float()
    return (found.float() - want).norm() / want.norm().clamp(min=1e-30)


def allowed(made: Plan) -> float:
    """Allowed pairs of a plan over causal pairs, mean over heads; from `ROWS` drawn queries on longer prompts."""
    queries = made.program.queries
    rows = drawn(queries.count, ROWS).tolist()
    mask = made.dense_mask(rows)
    causal = float((queries.numbers[rows] + 1.0).sum()) * mask.shape[0]
    return float(mask.sum(dtype=torch.float64)) / (causal * mask.shape[1])


def capture(model: Any, inputs: Mapping[str, Tensor], backend: str) -> Trace:
    """Runs one prompt (without padding) through the dense model and keeps what its attention layers see.

    Args:
        inputs: what the model's forward takes, one prompt.
        backend: with which patterns are then planned and run.
    """
    layers: dict[int, Seen] = {}

    def keep(seen: Seen) -> None:
        layers[seen.layer] = seen

    last = torch.full((1, 1), inputs["input_ids"].shape[1] - 1, device=inputs["input_ids"].device)
    with patched(model, Dense(), backend="dense", fuse=False), watched(keep):
        logits_at(model, inputs, last)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layer that reads {last.item() + 1} tokens at once")
    return Trace(dict(sorted(layers.items())), backend)


@torch.no_grad()
def logits_at(model: Any, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """The logits after some tokens of every prompt: ``[B, Q, vocabulary]`` for ``rows`` int64 ``[B, Q]``.

    The head sees these tokens alone, so the logits of a long prompt are never built.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise TypeError(f"{type(model).__name__} has no language model head: give a model ...ForCausalLM or alike")

    def choose(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        (hidden,) = arguments
        index = rows.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, index),)

    handle = head.register_forward_pre_hook(choose)
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
