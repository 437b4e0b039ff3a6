"""`with mmflex.intercept(model, spec):` prefill through mmflex for code that calls `scaled_dot_product_attention`.

For models that `mmflex.patch` cannot follow: code of 2024 that pins transformers 4.4x, and anything else on PyTorch's
attention. transformers need not be installed. Within the block, per call of 64 queries or more in a decoder layer that
the spec names, one of these happens:

=============================================================  =========================================================
the call                                                       what runs
=============================================================  =========================================================
``is_causal=True``, as many queries as keys                    mmflex with the layer's spec
a bool or additive mask that is causal from the bottom right,  mmflex with the layer's spec; padding is read from the
plus padding; a chunk on a cache                               mask's last row, once per prompt
heads repeated before the call, or ``enable_gqa``              mmflex on every KV head once
a mask of other values (a bias), a window, packed prompts, no  the call as it was, counted by reason, and a
mask and not causal (cross attention), ``is_causal`` on a      `DenseFallback` warning, once per reason
cache, dropout, training, a layout of another length
flash or eager attention (no such call at all)                 the same
=============================================================  =========================================================

Vision towers, decode steps and layers that the spec does not name are not touched at all. Rows of padding are not those
of the model's own attention: nothing reads them. A backward pass raises.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mmflex.ir.layout import TokenLayout
from mmflex.tuning.config import Config, Spec
from mmflex.tuning.default import Quality, chosen_spec

from .interception import Interception, LayoutReader

__all__ = ["Interception", "LayoutReader", "intercept"]


def intercept(
    model: nn.Module,
    spec_or_config: Spec | Config | None = None,
    *,
    quality: Quality | None = None,
    layout: TokenLayout | LayoutReader | None = None,
    layers: Sequence[nn.Module] | None = None,
    chunks: bool = False,
    backend: str = "auto",
) -> Interception:
    """Run a model's prefill through mmflex for the length of a ``with`` block::

        with mmflex.intercept(model, Grid("frame"), layout=layout) as seen:
            model.generate(...)
        print(seen)  # how many calls ran through mmflex, and why others did not

    ``docs/howto/intercept.md`` has a table of the calls that are taken over. For transformers 5.17 and newer there is
    `mmflex.patch`.

    Args:
        model: the language model, or a module that holds it: its decoder layers are found by their ``self_attn`` and
            the like. Several models can be intercepted at once, one model only once.
        spec_or_config: one pattern for all heads; a list with one per query head; ``{layer: pattern or list}``, where
            layers left out are not touched; or a `Config`. None: `mmflex.default_spec`, which needs no search.
        quality: of the default: "high", "balanced" (None) or "fast".
        layout: which of the prompt's tokens is what, or a reader that finds out while the model runs
            (`mmflex.integrations.video_models`). None: text.
        layers: the decoder layers or their attention modules in order, where they are not found.
        chunks: the prompt comes in pieces on a cache; each takes its part of the layout.
        backend: as in `mmflex.attention`.

    Returns:
        A context manager that is the record of what happened: ``taken``, ``left``, ``reasons``, ``str()``.

    Raises:
        ValueError: intercepted or patched already; an unknown backend or quality; a quality and a spec; a spec of
            another number of layers or heads (both are named); during the block, a layout whose padding is not the
            mask's.
        TypeError: no decoder layers, or several stacks of them.
    """
    return Interception(model, chosen_spec(spec_or_config, quality), layout, layers, chunks, backend)
