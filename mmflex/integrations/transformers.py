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
training, dropout, output_attentions, soft-capping, sinks       NotImplementedError with the reason and the way out
(``s_aux``), position bias, ``cu_seq_lens``, paged cache
=============================================================  =========================================================

Hidden states of padding are not those of the previous attention: nothing reads them. A backward pass raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mmflex.distributed.attention import Scheme
from mmflex.runtime.backends import BACKENDS
from mmflex.tuning.config import Config, Spec, per_layer
from mmflex.tuning.default import Quality, chosen_spec

from .cache_room import check_room
from .context_parallel import CacheKind, ContextParallel
from .decoder import DecoderLayers
from .fallback import DenseFallback
from .long_prefill import RowChunks, chunk_rows
from .masks import (
    NAME,
    dense_function,
    describe,
    forget_previous,
    previous_implementation,
    remember_previous,
    supported,
)
from .notice import MostlyDense
from .prefill import attention_forward, live
from .prompts import Prompt, token_layout
from .vision import VisionPatch

__all__ = ["DenseFallback", "patch", "patched", "token_layout", "unpatch"]


# ---- patching ------------------------------------------------------------------------------------------------------


class Patch:
    """What `patch` did to one model, and what its attention function needs to know."""

    def __init__(
        self,
        root: nn.Module,
        spec: Spec | Config,
        backend: str,
        mlp_chunk: int | None,
        mesh: DeviceMesh | None,
        cache: CacheKind,
        scheme: Scheme,
        vision: bool,
        fuse: bool | None,
    ) -> None:
        self.root, self.backend = root, backend
        self.config, self.owner, self.text_model, modules = _language_model(root)
        self.spec = _spec_for(spec, modules, int(self.config.num_attention_heads), int(self.config.num_hidden_layers))
        _refuse_at_patch(root, self.config, modules)
        self.previous = previous_implementation(self.config) or self.config._attn_implementation or "eager"
        self.modules = modules
        slots = [_Slot(self, module, self.previous) for module in modules]
        self.noticed: set[str] = set()
        self.called = False
        self.mostly_dense = MostlyDense(type(root).__name__, self.spec)
        self.vision: VisionPatch | None = None
        self.layers: DecoderLayers | None = None
        self.observer: Callable[..., None] | None = None  # sees q, k and v of every layer (`capture`)
        self.context_parallel = None if mesh is None else ContextParallel(self, mesh, cache, scheme)
        # from here on the model is changed
        self.chunks: list[RowChunks] = chunk_rows(self.text_model, mlp_chunk)
        # the prompt's hooks come after, because they forget the forward that is over
        self.handles = [
            self.text_model.register_forward_pre_hook(partial(check_room, self), with_kwargs=True),
            self.text_model.register_forward_hook(self.check_called),
        ]
        self.prompt = Prompt(root, self.text_model, self.notice_embeds)
        if self.context_parallel is not None:
            self.context_parallel.install()
        remember_previous(self.config, self.previous)
        self.number = id(self)
        live[self.number] = self
        for module, slot in zip(modules, slots, strict=True):
            vars(module)["_mmflex"] = slot
        register_functions()
        _select(self.owner, self.config, NAME)
        if self.config._attn_implementation != NAME:
            self.remove()
            raise NotImplementedError(
                f"{type(self.owner).__name__} does not take another attention (set_attn_implementation had no effect): "
                f"its code does not go through AttentionInterface; {_ELSE}, or call mmflex.attention in it"
            )
        self.vision = VisionPatch(root, fuse=fuse) if vision else None
        layers = getattr(self.text_model, "layers", None)
        if isinstance(layers, nn.ModuleList):
            self.layers = DecoderLayers(list(layers), modules, self.chunks, fuse)

    def remove(self) -> None:
        if self.vision is not None:
            self.vision.remove()
        if self.layers is not None:
            self.layers.remove()
        self.prompt.remove()
        if self.context_parallel is not None:
            self.context_parallel.remove()
        for handle in self.handles:
            handle.remove()
        for chunks in self.chunks:
            chunks.remove()
        for module in self.modules:
            module.__dict__.pop("_mmflex", None)
        if forget_previous(self.config):
            _select(self.owner, self.config, self.previous)

    @torch.compiler.disable
    def notice(self, reason: str, kind: str = "") -> None:
        """Warn that a layer runs dense, once per reason (or kind of reason)."""
        if (kind or reason) not in self.noticed:
            self.noticed.add(kind or reason)
            message = f"mmflex: {type(self.root).__name__} runs its previous attention ({self.previous}): {reason}"
            warnings.warn(message, DenseFallback, stacklevel=3)

    def notice_embeds(self) -> None:
        if "embeds" not in self.noticed:
            self.noticed.add("embeds")
            warnings.warn(
                f"mmflex: {type(self.root).__name__} is given inputs_embeds, whose tokens are taken as text; if some "
                "are images or video, run it inside `with mmflex.token_layout(layout):`",
                stacklevel=2,
            )

    def check_called(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a prefill: the attention function must have been reached."""
        if not self.called:
            self._check_called()

    @torch.compiler.disable
    def _check_called(self) -> None:
        if not self.called and self.prompt.queries > 1:
            raise RuntimeError(
                f"{type(self.text_model).__name__} ran without calling mmflex: its attention does not go through "
                f"transformers' AttentionInterface; unpatch it, and {_ELSE}, or call mmflex.attention in its code"
            )

    # The patch of a copied or unpickled model is its own.
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, number=id(self))
        live[self.number] = self


class _Slot:
    """What an attention module of a patched model holds."""

    def __init__(self, patch: Patch, module: nn.Module, previous: str) -> None:
        self.patch = patch
        self.dense = dense_function(module, previous)


def patch(
    model: nn.Module,
    spec_or_config: Spec | Config | None = None,
    *,
    quality: Quality | None = None,
    backend: str = "auto",
    mlp_chunk: int | None = None,
    mesh: DeviceMesh | None = None,
    cache: CacheKind = "replicated",
    scheme: Scheme = "keys",
    vision: bool = True,
    fuse: bool | None = None,
) -> nn.Module:
    """Make a transformers model prefill through `mmflex.attention`: ``patch(model)``, or with a spec of its own.

    ``docs/transformers.md`` has a table of the masks that are honoured, those that run dense with a notice, and those
    that are refused. A vision tower of a family in `integrations.vision.TOWERS` gives the same result faster. Decode
    steps, weights and ``config.json`` do not change.

    Args:
        model: a causal language model or a vision-language model, or a module that holds one (also from
            ``torch.compile``). Several models can be patched at once.
        spec_or_config: one pattern for all heads; a list with one per query head; ``{layer: pattern or list}``, where
            layers left out keep the model's own attention; or a `Config`. None: `mmflex.default_spec`, which needs no
            search.
        quality: of the default: "high", "balanced" (None) or "fast".
        backend: as in `mmflex.attention`.
        mlp_chunk: tokens at a time in MLPs and norms, so that very long prompts fit; None chunks by 32768 above 65536
            tokens, 0 never. Exact to rounding.
        mesh: a `DeviceMesh` with a dimension "cp", to run every prompt on all its ranks: each of them patches its own
            copy of the model and is given the whole prompt; logits arrive on every rank. The mesh may also have a
            dimension "tp", for a model that is loaded with tensor parallelism.
        cache: with a mesh, "replicated": every rank keeps all keys and values and decodes by itself; "sharded": each
            keeps those of its tokens, and decode steps merge attention over the ranks.
        scheme: with a mesh, "keys" gathers all keys and values; "heads" exchanges tokens for heads, for as many ranks
            as divide the KV heads (`mmflex.distributed.attention`).
        vision: also the vision tower, where its family is known: attention in one call a layer, frames in chunks so
            that long videos fit. False leaves it alone.
        fuse: compile the layers around attention, of the language model and of the vision tower, one compilation for
            all layers and lengths each; None does so on CUDA for 16384 tokens (patches) or more in one call, True
            always, False never. Exact to rounding. Decode steps are not compiled.

    Returns:
        The model itself.

    Raises:
        ValueError: already patched; an unknown backend or quality; a quality and a spec; a spec or config of another
            number of layers or heads (both are named); a mesh without "cp", or ranks that heads do not divide by. In a
            forward: ranks with unlike prompts.
        TypeError: no transformers language model in ``model``.
        NotImplementedError: soft-capping, sinks or an own attention; a model whose tokens cannot be dealt out to ranks;
            with the way out.
        RuntimeError: in a forward, another rank has ended or fallen behind.
    """
    root: nn.Module = getattr(model, "_orig_mod", model)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: use 'auto', {', '.join(map(repr, BACKENDS))}")
    if any("_mmflex_patch" in module.__dict__ for module in root.modules()):
        raise ValueError(f"{type(root).__name__} is already patched: call mmflex.unpatch(model) first")
    if mesh is None and (cache, scheme) != ("replicated", "keys"):
        raise ValueError(f"cache is {cache!r} and scheme {scheme!r}, but mesh is None: they are for several ranks")
    spec = chosen_spec(spec_or_config, quality)
    root.__dict__["_mmflex_patch"] = Patch(root, spec, backend, mlp_chunk, mesh, cache, scheme, vision, fuse)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`. Returns the model itself; ValueError if it is not patched."""
    root: nn.Module = getattr(model, "_orig_mod", model)
    if "_mmflex_patch" not in root.__dict__:
        raise ValueError(f"{type(root).__name__} is not patched: pass the model that was given to mmflex.patch")
    root.__dict__.pop("_mmflex_patch").remove()
    return model


@contextmanager
def patched(model: nn.Module, spec_or_config: Spec | Config | None = None, **options: Any) -> Iterator[nn.Module]:
    """`patch` for the length of a ``with`` block; arguments and errors as there."""
    patch(model, spec_or_config, **options)
    try:
        yield model
    finally:
        unpatch(model)


def _language_model(root: nn.Module) -> tuple[Any, Any, nn.Module, list[nn.Module]]:
    """(text config, outermost and innermost model that have it, attention modules) of a model.

    The config is found from the attention modules: those of text know their ``layer_idx``, those of vision do not.
    """
    try:
        import transformers
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError(f"mmflex.patch needs transformers 5.17 or newer, and there are none: {_ELSE}") from error
    if not supported():
        raise ImportError(f"mmflex.patch needs transformers 5.17 or newer, got {transformers.__version__}: {_ELSE}")

    models = [m for m in root.modules() if isinstance(m, PreTrainedModel)]
    groups: dict[int, list[nn.Module]] = {}
    for module in root.modules():
        attends = hasattr(module, "num_key_value_groups") or hasattr(module, "is_causal")
        if attends and isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "config"):
            groups.setdefault(id(module.config), []).append(module)
    choices = {key: [m for m in models if id(m.config) == key] for key in groups}
    choices = {key: owners for key, owners in choices.items() if owners}
    if len(choices) > 1 and isinstance(root, PreTrainedModel):
        wanted = id(root.config.get_text_config(decoder=True))
        choices = {wanted: choices[wanted]} if wanted in choices else choices
    if len(choices) != 1:
        name, names = type(root).__name__, sorted({type(owners[0]).__name__ for owners in choices.values()})
        if not names:
            raise TypeError(f"{name} holds no transformers language model: pass one, such as LlamaForCausalLM; {_ELSE}")
        raise TypeError(
            f"{name} holds {len(choices)} transformers language models ({', '.join(names)}): "
            "patch the one that reads the prompt"
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


_ELSE = "for a model of other code that calls scaled_dot_product_attention there is mmflex.intercept(model, spec)"


selecting: ContextVar[bool] = ContextVar("mmflex_selecting", default=False)
"""Whether a patch is selecting an attention: such calls are not those of a user (`registration`)."""


def _select(owner: Any, config: Any, implementation: str) -> None:
    """Select an attention for the language model alone.

    transformers hands it on to every model inside that no ``sub_configs`` names, such as the vision tower that
    LLaVA-NeXT builds within its language model: those get back what they had.
    """
    inside = {id(m.config): m.config for m in owner.modules() if hasattr(type(m), "set_attn_implementation")}
    others = [(c, c._attn_implementation) for c in inside.values() if c is not config]
    token = selecting.set(True)
    try:
        owner.set_attn_implementation({"": implementation})
    finally:
        selecting.reset(token)
    for other, before in others:
        if other._attn_implementation != before:
            other._attn_implementation_internal = before


def register_functions() -> None:
    """Makes "mmflex" a name of transformers' two registries: of attention functions and of mask functions."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, describe)
