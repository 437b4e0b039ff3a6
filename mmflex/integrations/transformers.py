"""`patch(model, spec)`: a transformers model whose prefill runs through `mmflex.attention`, with no other change.

By transformers' own extension points: one attention function and one mask function, registered as "mmflex" and selected
for the language model alone, and forward hooks that read which token is what. Per forward of more than one token and
per layer, one of these happens:

=============================================================  =========================================================
the layer's mask and arguments                                 what runs
=============================================================  =========================================================
causal; padding on any side; any cache, with earlier tokens    mmflex with the layer's spec
a causal sliding window shorter than the prompt                mmflex with exactly that window, instead of the spec (the
                                                               previous attention up to 4096 keys)
a decode step (one token), or fewer than 64 on a cache         the model's previous attention
a layer that the spec does not name                            the model's previous attention
image blocks that see both ways, prefixes, chunked attention,  the model's previous attention, and a `DenseFallback`
packed sequences, 4-D masks, tokens of unknown kind            warning, once per reason
training, gradients, dropout, output_attentions, soft-capping, NotImplementedError with the reason and the way out
sinks (``s_aux``), position bias, ``cu_seq_lens``, paged cache
=============================================================  =========================================================

Hidden states of padding are not those of the previous attention: nothing reads them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mmflex.tuning.config import Config, Spec, head_slice, per_layer

from .long_prefill import RowChunks, chunk_rows
from .masks import (
    NAME,
    MaskDescription,
    causal_description,
    dense_function,
    describe,
    forget_previous,
    previous_implementation,
    remember_previous,
)
from .prompts import LayoutUnknown, Prompt, token_layout
from .window import SlidingWindow

__all__ = ["DenseFallback", "patch", "patched", "token_layout", "unpatch"]

DECODE_QUERIES = 64
"""On a cache, fewer new tokens than this are decoding (assisted decoding checks a few at a time): there is nothing to
save, and patterns are estimated from this many queries."""


SMALL_WINDOWED = 4096
"""Up to this many keys a sliding-window layer stays with the previous attention: its mask tensor is small."""


class DenseFallback(UserWarning):
    """A layer ran the model's previous attention although its spec asked for less; the message says why."""


# ---- patching -----------------------------------------------------------------------------------------------------------


class Patch:
    """What `patch` did to one model, and what its attention function needs to know."""

    _live: weakref.WeakValueDictionary[int, Patch] = weakref.WeakValueDictionary()

    def __init__(self, root: nn.Module, spec: Spec | Config, backend: str, mlp_chunk: int | None) -> None:
        self.root, self.backend = root, backend
        self.config, self.owner, self.text_model, modules = _language_model(root)
        self.spec = _spec_for(spec, modules, int(self.config.num_attention_heads), int(self.config.num_hidden_layers))
        _refuse_at_patch(root, self.config, modules)
        self.noticed: set[str] = set()
        self.called = False
        self.chunks: list[RowChunks] = chunk_rows(self.text_model, mlp_chunk)
        self.prompt = Prompt(root, self.text_model, self.notice_embeds)
        self.handle = self.text_model.register_forward_hook(self.check_called)
        self.previous = remember_previous(self.config, self.config._attn_implementation or "eager")
        self.modules = modules
        self.number = id(self)
        Patch._live[self.number] = self
        for module in modules:
            module._mmflex = _Slot(self, module, self.previous)  # type: ignore[assignment]
        _register()
        self.owner.set_attn_implementation({"": NAME})
        if self.config._attn_implementation != NAME:
            self.remove()
            raise NotImplementedError(
                f"{type(self.owner).__name__} does not take another attention (set_attn_implementation had no effect): its "
                "code does not go through transformers' AttentionInterface, so call mmflex.attention in it"
            )

    def remove(self) -> None:
        self.prompt.remove()
        self.handle.remove()
        for chunks in self.chunks:
            chunks.remove()
        for module in self.modules:
            module.__dict__.pop("_mmflex", None)
        if forget_previous(self.config):
            self.owner.set_attn_implementation({"": self.previous})

    @torch.compiler.disable
    def notice(self, reason: str) -> None:
        """Warn that a layer runs dense, once per reason."""
        if reason not in self.noticed:
            self.noticed.add(reason)
            message = f"mmflex: {type(self.root).__name__} runs its previous attention ({self.previous}): {reason}"
            warnings.warn(message, DenseFallback, stacklevel=2)

    def notice_embeds(self) -> None:
        if "embeds" not in self.noticed:
            self.noticed.add("embeds")
            warnings.warn(
                f"mmflex: {type(self.root).__name__} is given inputs_embeds, whose tokens are taken as text; if some are "
                "images or video, run it inside `with mmflex.token_layout(layout):`",
                stacklevel=2,
            )

    @torch.compiler.disable
    def check_called(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a prefill: the attention function must have been reached."""
        tokens = self.prompt.text.get("inputs_embeds")
        tokens = self.prompt.text.get("input_ids") if tokens is None else tokens
        if not self.called and tokens is not None and tokens.shape[1] > 1:
            raise RuntimeError(
                f"{type(self.text_model).__name__} ran without calling mmflex: its attention does not go through "
                "transformers' AttentionInterface; unpatch it and call mmflex.attention in its code"
            )

    # The patch of a copied or unpickled model is its own.
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, number=id(self))
        Patch._live[self.number] = self


class _Slot:
    """What an attention module of a patched model holds."""

    def __init__(self, patch: Patch, module: nn.Module, previous: str) -> None:
        self.patch = patch
        self.dense = dense_function(module, previous)


def patch(
    model: nn.Module, spec_or_config: Spec | Config, *, backend: str = "auto", mlp_chunk: int | None = None
) -> nn.Module:
    """Make a transformers model prefill through `mmflex.attention`.

    Only the language model changes; a vision tower, decode steps, weights and ``config.json`` stay as they are. The table
    at the top of this module says which masks are honoured, which run dense with a notice, and which are refused.

    Args:
        model: a causal language model or a vision-language model, or a module that holds one (also from
            ``torch.compile``). Several models can be patched at once.
        spec_or_config: one pattern for all heads; a list with one per query head; ``{layer: pattern or list}``, where
            layers left out keep the model's own attention; or a `Config`.
        backend: as in `mmflex.attention`.
        mlp_chunk: tokens at a time in MLPs and norms, so that very long prompts fit; None chunks by 32768 above 65536
            tokens, 0 never. Exact to rounding.

    Returns:
        The model itself.

    Raises:
        ValueError: already patched; a spec or config of another number of layers or heads (both are named).
        TypeError: no transformers language model in ``model``.
        NotImplementedError: soft-capping, sinks or an own attention, with the way out.
    """
    root = getattr(model, "_orig_mod", model)
    if any("_mmflex_patch" in module.__dict__ for module in root.modules()):
        raise ValueError(f"{type(root).__name__} is already patched: call mmflex.unpatch(model) first")
    root.__dict__["_mmflex_patch"] = Patch(root, spec_or_config, backend, mlp_chunk)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`. Returns the model itself; ValueError if it is not patched."""
    root = getattr(model, "_orig_mod", model)
    if "_mmflex_patch" not in root.__dict__:
        raise ValueError(f"{type(root).__name__} is not patched: pass the model that was given to mmflex.patch")
    root.__dict__.pop("_mmflex_patch").remove()
    return model


@contextmanager
def patched(
    model: nn.Module, spec_or_config: Spec | Config, *, backend: str = "auto", mlp_chunk: int | None = None
) -> Iterator[nn.Module]:
    """`patch` for the length of a ``with`` block; arguments and errors as there."""
    patch(model, spec_or_config, backend=backend, mlp_chunk=mlp_chunk)
    try:
        yield model
    finally:
        unpatch(model)


def _language_model(root: nn.Module) -> tuple[Any, Any, nn.Module, list[nn.Module]]:
    """(text config, outermost and innermost model that have it, attention modules) of a model.

    The config is found from the attention modules: those of text know their ``layer_idx``, those of vision do not.
    """
    from transformers import PreTrainedModel

    models = [m for m in root.modules() if isinstance(m, PreTrainedModel)]
    groups: dict[int, list[nn.Module]] = {}
    for module in root.modules():
        attends = hasattr(module, "num_key_value_groups") or hasattr(module, "is_causal")
        if attends and isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "config"):
            groups.setdefault(id(module.config), []).append(module)
    choices = {key: [m for m in models if id(m.config) == key] for key in groups}
    choices = {key: owners for key, owners in choices.items() if owners}
    if len(choices) > 1 and models:
        wanted = id(models[0].config.get_text_config(decoder=True))
        choices = {wanted: choices[wanted]} if wanted in choices else choices
    if len(choices) != 1:
        names = sorted({type(owners[0]).__name__ for owners in choices.values()})
        raise TypeError(
            f"{type(root).__name__} holds {len(choices)} transformers language models"
            + (f" ({', '.join(names)}): patch the one that reads the prompt" if names else ": pass one, such as LlamaForCausalLM")
        )
    ((key, owners),) = choices.items()
    return owners[0].config, owners[0], owners[-1], groups[key]


def _spec_for(spec: Any, modules: list[nn.Module], heads: int, layers: int) -> dict[int, tuple[Any, ...]]:
    if isinstance(spec, Config):
        return spec.for_model(layers, heads)
    return per_layer(spec, sorted({int(module.layer_idx) for module in modules}), heads)  # type: ignore[arg-type]


def _refuse_at_patch(root: nn.Module, config: Any, modules: list[nn.Module]) -> None:
    name = type(root).__name__
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        raise NotImplementedError(f"{name} caps its attention logits at {cap} {_NO_SCORES}")
    if any(isinstance(getattr(module, "sinks", None), torch.Tensor) for module in modules):
        raise NotImplementedError(f"{name} adds a learned sink to every softmax {_NO_SCORES}")
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{name} is an encoder-decoder: mmflex accelerates causal prefill, so patch a decoder-only model"
        )


_NO_SCORES = "(mmflex changes which pairs are attended to, not their scores): run this model unpatched"


def _register() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, describe)


# ---- the attention function ---------------------------------------------------------------------------------------------


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
    ([B, M, Hq, Dv], None). What it does when is the table at the top of this module."""
    slot: Any = getattr(module, "_mmflex", None)
    if slot is None:
        # Not ours: a model that shares its config object with a patched one.
        previous = previous_implementation(getattr(module, "config", None))
        if previous is None:
            raise RuntimeError(
                f"{type(module).__name__} asks for mmflex but belongs to no patched model: call mmflex.patch(model, spec), "
                "or select another attention with model.set_attn_implementation"
            )
        return _dense(module, dense_function(module, previous), previous, query, key, value, attention_mask, scaling,
                      dropout, kwargs)  # fmt: skip
    patch = slot.patch
    patch.called = True
    layer = module.layer_idx
    out = None
    if query.shape[2] > 1 and layer in patch.spec:
        _refuse(module, query, key, dropout, kwargs)
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


def _refuse(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, dropout: float, kwargs: dict[str, Any]
) -> None:
    """NotImplementedError for what would be silently wrong."""

    def no(what: str, way_out: str) -> NotImplementedError:
        return NotImplementedError(f"mmflex can't honour {what} in {type(module).__name__}: {way_out}")

    if module.training:
        raise no("training mode", "call model.eval(), or mmflex.unpatch(model) to train")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        raise no("gradients", "run under torch.no_grad() or torch.inference_mode(), or mmflex.unpatch(model) to train")
    if dropout > 0:
        raise no(f"dropout {dropout}", "call model.eval(), or mmflex.unpatch(model)")
    if kwargs.get("output_attentions"):
        raise no("output_attentions", 'mmflex.unpatch(model) and load it with attn_implementation="eager" for the weights')
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
    patch: Patch,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskDescription | None,
    scaling: float | None,
) -> torch.Tensor | None:
    """[B, Hq, M, Dv] by mmflex; None where the previous attention shall run."""
    padding, past, first, window = None, 0, 0, None
    if mask is not None:
        padding, past, first, window = mask.padding, mask.q_offset, mask.kv_offset, mask.window
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.compiler.is_compiling():
        at = past if isinstance(past, torch.Tensor) else None
        return prefill_op(
            query, key, value, padding, at, 0 if at is not None else past, first, window or 0, scaling, patch.number, layer
        )
    return _run(patch, layer, query, key, value, padding, int(past), first, window, scaling)


def _run(
    patch: Patch,
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
            spec = head_slice(patch.spec[layer], heads, _tensor_parallel_rank(patch, heads, len(patch.spec[layer])))
    except LayoutUnknown as error:
        patch.notice(f"{error}")
        return None
    # Latent attention has narrower values than keys; zeros change neither scores nor sums.
    wide = max(width, value.shape[-1])
    query, key, padded = (_widened(x, wide) for x in (query, key, value))
    out = attention(query, key, padded, spec, layout=layout, scale=scaling, backend=backend)
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
    owner = Patch._live.get(patch)
    if owner is None:
        raise RuntimeError("a compiled model outlived its mmflex.patch: torch.compile it again after unpatching")
    owner.called = True
    past = past if past_tensor is None else int(past_tensor)
    out = _run(owner, layer, query, key, value, padding, past, first, window or None, scaling)
    if out is None:
        module = next(m for m in owner.modules if m.layer_idx == layer)
        mask = causal_description(query, key, padding, past, first, window or None, owner.config)
        dense, _ = _dense(
            module, module._mmflex.dense, owner.previous, query, key, value, mask, scaling, 0.0, {}  # type: ignore[union-attr]
        )
        out = dense.transpose(1, 2)
    return out.contiguous()


@prefill_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def _tensor_parallel_rank(patch: Patch, heads: int, patterns: int) -> int | None:
    if heads == patterns:
        return None
    mesh = getattr(patch.owner, "_device_mesh", None) or getattr(patch.root, "_device_mesh", None)
    if mesh is None:
        return None
    return int(mesh.get_local_rank("tp") if mesh.ndim > 1 else mesh.get_local_rank())
