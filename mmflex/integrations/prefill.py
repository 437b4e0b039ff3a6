"""The attention function of patched models: what runs through mmflex, what stays with the previous attention, what is
refused. The rules are the table in `integrations.transformers`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from mmflex.distributed.estimates import check_whole_layers
from mmflex.ir.layout import TokenLayout
from mmflex.ir.pattern import Pattern
from mmflex.tuning.config import head_slice

from .closed import INSIDE, layer_attention
from .latent import widened
from .masks import DECODE_QUERIES, MaskDescription, causal_description, dense_function, previous_implementation
from .notice import MostlyDense
from .prompts import LayoutUnknown
from .shape import kv_heads_of
from .window import SlidingWindow


class PatchedModel(Protocol):
    """What the attention function asks of a patch (`transformers.Patch`): its documentation is there."""

    root: nn.Module
    owner: Any
    text_model: nn.Module
    config: Any
    modules: list[nn.Module]
    spec: dict[int, tuple[Any, ...]]
    backend: str
    previous: str
    number: int
    called: bool
    noticed: set[str]
    prompt: Any
    observer: Callable[..., None] | None
    context_parallel: Any

    mostly_dense: MostlyDense

    def notice(self, reason: str, kind: str = "") -> None: ...


SMALL_WINDOWED = 4096
"""Up to this many keys a sliding-window layer stays with the previous attention: its mask tensor is small."""

live: weakref.WeakValueDictionary[int, PatchedModel] = weakref.WeakValueDictionary()
"""The patches in place, by number: what a compiled graph can hold on to."""


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The function registered with transformers: query [B, Hq, M, D], key [B, Hkv, N, D], value [B, Hkv, N, Dv] ->
    ([B, M, Hq, Dv], None). What it does when is the table in `integrations.transformers`."""
    if INSIDE in kwargs:
        return layer_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    slot: Any = getattr(module, "_mmflex", None)
    if slot is None:
        # Not ours: a model that shares its config object with a patched one.
        previous = previous_implementation(getattr(module, "config", None))
        if previous is None:
            raise RuntimeError(
                f"{type(module).__name__} asks for mmflex but belongs to no patched model: call mmflex.patch(model, "
                "spec), or select an attention with set_attn_implementation on the model that is called"
            )
        return _dense(module, dense_function(module, previous), previous, query, key, value, attention_mask, scaling,
                      dropout, kwargs)  # fmt: skip
    patch = slot.patch
    patch.called = True
    layer = module.layer_idx
    if patch.observer is not None:
        patch.observer(module, query, key, value, attention_mask, scaling, kwargs)
    if patch.context_parallel is not None:
        if query.shape[2] > 1:
            _refuse(module, dropout, kwargs)
        over_ranks, key, value = patch.context_parallel.attention(
            module, slot.dense, query, key, value, attention_mask, scaling, kwargs
        )
        if over_ranks is not None:
            return over_ranks, None
    key, value = (own_kv_heads(patch, query.shape[1], t) for t in (key, value))
    out = None
    if query.shape[2] > 1 and layer in patch.spec:
        _refuse(module, dropout, kwargs)
        reason = _why_dense(module, query, key, attention_mask, kwargs)
        if reason is not None:
            patch.notice(reason)
        else:
            out = _accelerate(patch, int(layer), query, key, value, attention_mask, scaling)  # type: ignore[arg-type]
    if out is None:
        return _dense(module, slot.dense, patch.previous, query, key, value, attention_mask, scaling, dropout, kwargs)
    return out.transpose(1, 2).contiguous(), None


def _dense(
    module: nn.Module,
    function: Any,
    implementation: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The previous attention, with the mask that it would have been given."""
    if isinstance(attention_mask, MaskDescription):
        attention_mask = attention_mask.dense(implementation)
        if attention_mask is not None:
            attention_mask = attention_mask.to(query.device)
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


_SCORES = {"softcap": "soft-capping", "s_aux": "attention sinks (s_aux)", "position_bias": "a position bias"}
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """NotImplementedError for what would be silently wrong."""

    def no(what: str, way_out: str) -> NotImplementedError:
        return NotImplementedError(f"mmflex can't honour {what} in {type(module).__name__}: {way_out}")

    if module.training:
        raise no("training mode", "call model.eval(), or mmflex.unpatch(model) to train")
    if dropout > 0:
        raise no(f"dropout {dropout}", "call model.eval(), or mmflex.unpatch(model)")
    if kwargs.get("output_attentions"):
        raise no("output_attentions", 'mmflex.unpatch(model), and load it with attn_implementation="eager" for them')
    for name, what in _SCORES.items():
        if kwargs.get(name) is not None:
            raise no(what, "leave the layer out of the spec, {layer: patterns}, or run the model unpatched")
    for name in _PACKED:
        if kwargs.get(name) is not None:
            raise no(f"packed sequences ({name})", "run the sequences as a padded batch, or mmflex.unpatch(model)")
    if kwargs.get("cache") is not None:
        raise no("a paged cache", "use generate() without continuous batching, or mmflex.unpatch(model)")


def _why_dense(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, kwargs: dict[str, Any]
) -> str | None:
    """Why only the previous attention can do this mask; None when mmflex can."""
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return "attention that is not causal"
    if isinstance(mask, MaskDescription):
        return mask.deviation
    if mask is not None:
        return f"a ready-made {mask.ndim}-D mask; pass attention_mask [batch, tokens] for mmflex"
    if query.shape[2] != key.shape[2]:
        return f"{query.shape[2]} queries on {key.shape[2]} keys without a mask that places them"
    return None


def _accelerate(
    patch: PatchedModel,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskDescription | None,
    scaling: float | None,
) -> torch.Tensor | None:
    """[B, Hq, M, Dv] by mmflex; None where the previous attention shall run."""
    padding, first, window = None, 0, None
    past: int | torch.Tensor = 0
    if mask is not None:
        padding, past, first, window = mask.padding, mask.q_offset, mask.kv_offset, mask.window
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.compiler.is_compiling():
        at, number = (past, 0) if isinstance(past, torch.Tensor) else (None, past)
        return prefill_op(query, key, value, padding, at, number, first, window or 0, scaling, patch.number, layer)
    return _run(patch, layer, query, key, value, padding, int(past), first, window, scaling)


def _run(
    patch: PatchedModel,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    past: int,
    first: int,
    window: int | None,
    scaling: float,
) -> torch.Tensor | None:
    from mmflex.runtime.attention import attention
    from mmflex.runtime.backends import resolve

    batch, heads, queries, width = query.shape
    end = past + queries
    if past and queries < DECODE_QUERIES:
        return None
    key, value = key[:, :, : end - first], value[:, :, : end - first]  # a static cache has room behind
    if window is not None and window >= end:
        window = None  # it does not reach back to where it would cut
    if window is not None and (end - first <= SMALL_WINDOWED or patch.backend == "dense"):
        return None
    spec: Any
    backend = patch.backend
    try:
        if window is not None:
            layout, spec = patch.prompt.plain(padding, first, end), SlidingWindow(window)
            # "auto" may trade a spec for dense attention, but this is the model's own mask
            backend = resolve(backend, query.device, width, query.dtype).name
        else:
            layout = patch.prompt.layout(batch, padding, first, past, end)
            spec = own_patterns(patch, layer, heads, layout)
    except LayoutUnknown as error:
        patch.notice(f"{error}", kind="layout")
        return None
    wide = max(width, value.shape[-1])  # latent attention has narrower values
    query, key, padded = (widened(x, wide) for x in (query, key, value))
    out = attention(query, key, padded, spec, layout=layout, scale=scaling, backend=backend)
    if backend == "auto":
        patch.mostly_dense.ran(layer, tuple(spec), layout)
    return out[..., : value.shape[-1]]


# Inside torch.compile(model) a layer is one opaque operation: it looks at the prompt (host data) and has compiled its
# kernels itself. So nothing breaks the graph within attention.
@torch.library.custom_op(
    "mmflex::prefill",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? padding, Tensor? past_tensor, SymInt past, SymInt first, "
    "SymInt window, float scaling, SymInt patch, SymInt layer) -> Tensor",
)
def prefill_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    past_tensor: torch.Tensor | None,
    past: int,
    first: int,
    window: int,
    scaling: float,
    patch: int,
    layer: int,
) -> torch.Tensor:
    """One layer's attention, [B, Hq, M, Dv], for compiled models; arguments as `_run`, the patch by its number."""
    owner = live.get(patch)
    if owner is None:
        raise RuntimeError("a compiled model outlived its mmflex.patch: torch.compile it again after unpatching")
    owner.called = True
    past = past if past_tensor is None else int(past_tensor)
    out = _run(owner, layer, query, key, value, padding, past, first, window or None, scaling)
    if out is None:
        module = next(m for m in owner.modules if m.layer_idx == layer)
        function = vars(module)["_mmflex"].dense
        mask = causal_description(query, key, padding, past, first, window or None, owner.config)
        dense, _ = _dense(module, function, owner.previous, query, key, value, mask, scaling, 0.0, {})
        out = dense.transpose(1, 2)
    return out.contiguous()


@prefill_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def tensor_parallel_rank(patch: PatchedModel, heads: int) -> int | None:
    """Which of the tensor-parallel ranks this process is, where a layer computes only so many of its heads."""
    if heads == int(patch.config.num_attention_heads):
        return None
    if patch.context_parallel is not None and patch.context_parallel.tensor_ranks > 1:
        return patch.context_parallel.tensor_rank
    mesh = getattr(patch.owner, "_device_mesh", None) or getattr(patch.root, "_device_mesh", None)
    if mesh is None:
        return None
    return int(mesh.get_local_rank("tp") if mesh.ndim > 1 else mesh.get_local_rank())


def own_patterns(
    patch: PatchedModel, layer: int, heads: int, layout: TokenLayout, ranks: int = 1
) -> tuple[Pattern, ...]:
    """A layer's patterns for this process's ``heads`` query heads, which it is to share with so many further ``ranks``.

    Raises:
        ValueError: a pattern that estimates from more heads of the layer together than that leaves.
    """
    patterns, every = patch.spec[layer], int(patch.config.num_attention_heads)
    check_whole_layers(tuple(dict.fromkeys(patterns)), layout, every, kv_heads_of(patch.config), every // heads * ranks)
    return head_slice(patterns, heads, tensor_parallel_rank(patch, heads))


def own_kv_heads(patch: PatchedModel, heads: int, t: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, H, N, D] of this process's ``heads`` query heads: one of all KV heads, where tensor
    parallelism has left them all here because it has more ranks than there are KV heads; else ``t``."""
    every = int(patch.config.num_attention_heads)
    rank = tensor_parallel_rank(patch, heads)
    if rank is None or t.shape[1] == 1 or t.shape[1] * (every // heads) == kv_heads_of(patch.config):
        return t
    own = rank * heads * t.shape[1] // every
    return t[:, own : own + 1]
