"""Forward passes of a model under a spec, with the density of what ran.

A layer is planned once, by the queries and keys that it has in this forward, and attends under that plan: `mmflex.plan`
and `Plan.attend` are what `mmflex.attention` consists of, and between them the density can be read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mmflex.compiler.prices import estimates
from mmflex.runtime.attention import plan
from mmflex.runtime.calls import TILE
from mmflex.runtime.kernels.lists import listed_eagerly
from mmflex.runtime.plan import Plan
from mmflex.tuning.config import Config, Spec

from .masks import NAME
from .prefill import _refuse, _why_dense, attention_forward
from .transformers import DenseFallback, patched

EAGER_SCORES = {"cpu": 1 << 27, "cuda": 1 << 31}
"""Up to this many scores of one prompt and layer, backend "auto" runs the plans eagerly ("reference"): it needs no
kernel compiled, and every setting at every length is one or more kernels of 5 to 15 seconds."""


MASKED = "masked"
"""In place of a backend: plans as the eager backend makes them, and attention is SDPA under a plan's token mask. No
kernel is compiled, and it takes a fraction of the eager backend's time: for models so small, and prompts so short, that
compiling kernels is what would take the time. Densities are those of the plan, whoever attends."""

PAIRS_AT_ONCE = {"cpu": 1 << 25, "cuda": 1 << 26}
"""Pairs of query and key that a token mask holds at a time. Its evaluation takes some 40 bytes for each, and several
processes share a GPU."""


def planning_backend(backend: str) -> str:
    """The backend that plans are made for."""
    return "reference" if backend == MASKED else backend


def attend_masked(made: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, Hq, N, Dv] like q: what ``made.attend(q, k, v)`` computes, for a plan of all N tokens of a prompt, by SDPA
    under the token mask (`Plan.dense_mask`), a strip of queries at a time."""
    batch, heads, tokens, _ = q.shape
    if k.shape[2] != tokens:
        raise ValueError(f"{tokens} queries and {k.shape[2]} keys: a token mask is used for whole prompts")
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    step = max(1, PAIRS_AT_ONCE[q.device.type] // (batch * heads * tokens * TILE)) * TILE
    out = q.new_empty((batch, heads, tokens, v.shape[3]))
    for first in range(0, tokens, step):
        last = min(first + step, tokens)
        mask = made.dense_mask(range(first, last), keys=last)
        rows = slice(first, last)
        given = q[:, :, rows], k[:, :, :last], v[:, :, :last]
        strip = scaled_dot_product_attention(*given, attn_mask=mask, scale=made.scale)
        out[:, :, rows] = strip.where(mask.any(-1, keepdim=True), 0.0)  # a row without a key is 0, not NaN
    return out


@dataclass
class Ran:
    """Of every layer that ran under a spec: ``density`` (pairs in computed blocks over causal pairs) and ``estimates``
    (products of estimates over those of dense attention), means over heads."""

    density: list[float] = field(default_factory=list)
    estimates: list[float] = field(default_factory=list)

    def mean(self) -> tuple[float, float]:
        """Density and estimates over layers. RuntimeError where no layer ran."""
        if not self.density:
            raise RuntimeError("no layer of the model ran under the spec: are prompts longer than one token?")
        return sum(self.density) / len(self.density), sum(self.estimates) / len(self.estimates)


def estimated(made: Plan) -> float:
    """Products that a plan's estimates take, over those of dense attention (two for each causal pair: one with a key,
    one with a value), mean over heads. NaN where an estimator does not say."""
    program = made.program
    products = sum(heads * (math.nan if each is None else each) for heads, each, _ in estimates(program))
    causal = float((program.queries.numbers + 1.0).sum())
    return products / (2 * causal * program.heads)


@contextmanager
def sparse(model: Any, spec: Spec | Config, backend: str, layouts: dict[str, Any]) -> Iterator[Ran]:
    """A model whose prefill runs under a spec, for the length of a ``with`` block; on a cache it decodes as before.

    Args:
        backend: as in `mmflex.attention`, or `MASKED`.
        layouts: shared by the blocks of one prompt length, so that programs compiled for it are found again.

    Raises:
        RuntimeError: a layer would run dense although its spec asks for less.
    """
    from transformers.modeling_utils import AttentionInterface

    ran, planned = Ran(), planning_backend(backend)

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        slot = vars(module).get("_mmflex")
        patterns = None if slot is None else slot.patch.spec.get(module.layer_idx)
        if slot is None or query.shape[2] < 2 or query.shape[2] < key.shape[2]:
            return attention_forward(module, query, key, value, mask, **options)
        window = getattr(mask, "window", None)
        windowed = window is not None and window < query.shape[2]
        if patterns is None or windowed or _why_dense(module, query, key, mask, options) is not None:
            ran.density.append(1.0)
            ran.estimates.append(0.0)
            return attention_forward(module, query, key, value, mask, **options)
        patch = slot.patch
        patch.called = True
        _refuse(module, float(options.get("dropout") or 0.0), options)
        layout = patch.prompt.layout(query.shape[0], getattr(mask, "padding", None), 0, 0, query.shape[2])
        scale = options.get("scaling")
        made = plan(query, key, patterns, layout=layout, scale=scale, backend=planned, v=value)
        ran.density.append(made.density.total)
        ran.estimates.append(estimated(made))
        out = attend_masked(made, query, key, value) if backend == MASKED else made.attend(query, key, value)
        return out.transpose(1, 2).contiguous(), None

    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseFallback)
        # layers are not compiled: they would break at this function
        with (
            patched(model, spec, backend=planned, fuse=False),
            listed_eagerly() if planned == "reference" else nullcontext(),
        ):
            vars(model)["_mmflex_patch"].prompt.recent = layouts
            AttentionInterface.register(NAME, attention)
            try:
                yield ran
            except DenseFallback as error:
                raise RuntimeError(f"this would not be a run of the spec: {error}") from error
            finally:
                AttentionInterface.register(NAME, attention_forward)


def default_backend(device: torch.device, heads: int, tokens: int, many: bool) -> str:
    """A backend that never runs a spec dense. On a GPU texts run eagerly where they fit: every setting is a kernel of
    its own, which takes longer to compile than a few windows take. ``many``: prompts enough to be worth a kernel."""
    if device.type != "cuda":
        return "cpu"
    return "reference" if not many and heads * tokens**2 <= EAGER_SCORES["cuda"] else "triton"
