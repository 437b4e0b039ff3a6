"""A patched model over several ranks: its tokens are dealt out from the embeddings on.

The language model is given this rank's share of the tokens, with their positions, so that embeddings, projections, MLPs
and norms are local. Attention gathers K and V (or exchanges tokens for heads) layer by layer. After the last norm the
hidden states that the caller wants (by default those of all tokens; in generate() the last one) go to every rank.

========================================  ==========================================================================
a forward of                              what runs
========================================  ==========================================================================
tokens for two chunks of 128 a rank,      dealt out head-tail: chunks r and 2 P - 1 - r of 2 P for rank r
with or without earlier ones on a cache
fewer tokens, a decode step               the whole model on every rank; where the cache is sharded, attention to each
                                          rank's share, merged by log-sum-exp
========================================  ==========================================================================
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mmflex.distributed.attention import (
    Estimate,
    Scheme,
    attend,
    attend_by_heads,
    check_heads,
    heads_for_tokens,
    own_heads,
    tokens_for_heads,
)
from mmflex.distributed.dealing import Dealing
from mmflex.distributed.decode import attend_shares
from mmflex.distributed.ranks import Pending, Ranks
from mmflex.ir.layout import TokenLayout
from mmflex.ir.pattern import Dense
from mmflex.ir.queries import QueryTokens
from mmflex.runtime.calls import TILE

from .latent import widened
from .layouts import call_arguments
from .masks import DECODE_QUERIES, MaskDescription
from .prefill import PatchedModel, own_kv_heads, own_patterns
from .prompts import LayoutUnknown
from .shape import kv_heads_of
from .tensor_parallel import check_tensor_ranks
from .window import SlidingWindow

CacheKind = Literal["replicated", "sharded"]

LET_GO = 1 << 28
"""Bytes of embeddings from which on those of all tokens are freed once this rank has its share, and the share once the
first layer has read it: 11 GB of the 43 that a rank of two needs for a million tokens of a 7B model."""

_WHOLE = {"input_ids", "inputs_embeds", "position_ids", "past_key_values", "use_cache"}
"""Arguments of a language model that are replaced."""
_AS_THEY_ARE = {"attention_mask", "mm_token_type_ids", "token_type_ids"}
"""Arguments with a value per token that only masks are made from."""


@dataclass(eq=False)
class DealtForward:
    """One forward of the language model over tokens that are dealt out.

    Attributes:
        dealing: of its tokens. past: tokens on the cache before them.
        cache: where keys and values go; None for nowhere.
        wanted: the tokens whose hidden states go to every rank; None for all.
    """

    dealing: Dealing
    past: int
    cache: Any
    wanted: tuple[int, ...] | None
    embeddings: Tensor | None = None

    @property
    def end(self) -> int:
        return self.past + self.dealing.total


class ContextParallel:
    """The hooks by which a patched model's tokens are dealt out, and its attention over them.

    Args:
        patch: the model's. mesh: with a dimension "cp".
        cache: "replicated", every rank keeps all keys; "sharded", each keeps its own.
        scheme: of prefill attention, see `mmflex.distributed.attention`.

    Raises:
        ValueError: a mesh without "cp", heads that do not divide, unknown words; both values are named.
        NotImplementedError: a model whose tokens cannot be dealt out, with the reason.
    """

    def __init__(self, patch: PatchedModel, mesh: DeviceMesh, cache: CacheKind, scheme: Scheme) -> None:
        for name, value, known in (("cache", cache, CacheKind), ("scheme", scheme, Scheme)):
            if value not in known.__args__:  # type: ignore[attr-defined]
                raise ValueError(f"{name} is {value!r}: use one of {known.__args__}")  # type: ignore[attr-defined]
        self.patch, self.ranks = patch, Ranks.of(mesh)
        self.cache_kind, self.scheme = cache, scheme
        self.tensor_ranks = mesh["tp"].size() if "tp" in (mesh.mesh_dim_names or ()) else 1
        self.tensor_rank = mesh.get_local_rank("tp") if self.tensor_ranks > 1 else 0
        self._refuse()
        self.forward: DealtForward | None = None
        self.sharded_cache: Any = None  # of a forward that every rank runs whole
        self.wanted: int | Tensor | None = None
        self.embeddings_are_ours = False
        self.handles: list[Any] = []

    def install(self) -> None:
        """Puts the hooks in place: after those of the patch's prompt, which have to see all tokens."""
        text = self.patch.text_model
        self.handles = [
            text.register_forward_pre_hook(self.enter_text, with_kwargs=True),
            text.register_forward_hook(self.leave_text, prepend=True, always_call=True),
        ]
        for module in self.patch.root.modules():
            if _has_head(module) and any(part is text for part in module.modules()):
                self.handles.append(module.register_forward_pre_hook(self.enter_head, with_kwargs=True))
        layers = getattr(text, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            self.handles.append(layers[0].register_forward_hook(self.leave_first_layer, with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _refuse(self) -> None:
        patch, config = self.patch, self.patch.config
        name = type(patch.text_model).__name__
        heads, kv_heads = int(config.num_attention_heads), kv_heads_of(config)
        check_tensor_ranks(heads, kv_heads, self.tensor_ranks)
        if self.scheme == "heads":
            check_heads(max(1, kv_heads // self.tensor_ranks), self.ranks.size)
        mixing = {int(m.layer_idx) for m in patch.modules}  # type: ignore[arg-type]
        layers = int(config.num_hidden_layers)
        if len(mixing) < layers:
            raise NotImplementedError(
                f"{name} mixes tokens by something else than attention in {layers - len(mixing)} of {layers} layers, "
                "which would need the tokens of other ranks: run it on one GPU, or with tensor parallelism"
            )
        if any(getattr(module, "is_kv_shared_layer", False) for module in patch.modules):
            raise NotImplementedError(
                f"{name} has layers that read the keys of others, which mmflex does not deal out: run it on one GPU"
            )
        dynamic = sorted(_rope_types(config) & {"dynamic", "longrope"})
        if dynamic:
            raise NotImplementedError(
                f"{name} has rotary positions of type {dynamic[0]!r}, which depend on the length of the prompt that a "
                "rank sees only in part: run it on one GPU, or set another rope_type in its config"
            )
        if "position_ids" not in inspect.signature(patch.text_model.forward).parameters:
            raise NotImplementedError(
                f"{name} takes no position_ids, so that a rank cannot tell it where its tokens are: run it on one GPU"
            )

    # ---- the model's inputs and outputs ----------------------------------------------------------------------------

    def deals(self, tokens: int) -> bool:
        """Whether so many tokens are dealt out: every chunk has a tile or more."""
        return self.ranks.size > 1 and -(-tokens // TILE) >= 2 * self.ranks.size

    def enter_head(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before a model with a language model head: which tokens' logits are wanted."""
        self.wanted, self.embeddings_are_ours = None, False
        inputs = _arguments(module, args, kwargs)
        if inputs is None:
            return None
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        self.embeddings_are_ours = ids is not None and embeds is None
        tokens = ids if ids is not None else embeds
        keep = inputs.get("logits_to_keep")
        if tokens is None or not self.deals(tokens.shape[1]):
            return None
        if isinstance(keep, Tensor):
            if keep.ndim != 1 or keep.dtype == torch.bool:
                return None  # every token's hidden state arrives, and the model picks
            self.wanted = keep
            kwargs = {**kwargs, "logits_to_keep": 0}  # of what arrives, all
            return args, kwargs
        self.wanted = keep or None
        return None

    def enter_text(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the language model: this rank's share in place of its inputs."""
        self.forward = self.sharded_cache = None
        wanted, self.wanted = self.wanted, None
        inputs = _arguments(module, args, kwargs)
        if inputs is None:
            return None
        name = "inputs_embeds" if inputs.get("inputs_embeds") is not None else "input_ids"
        tokens, cache = inputs.get(name), inputs.get("past_key_values")
        if tokens is None:
            return None
        if not self.deals(tokens.shape[1]):
            self._run_whole(tokens.shape[1], cache)
            return None
        past = int(cache.get_seq_length()) if cache is not None else 0
        forward = self._dealt(module, tokens, past, cache, inputs, wanted)
        self.forward = forward
        rank, dealing = self.ranks.rank, forward.dealing
        share, others = dealing.take(tokens, rank, 1), self._others(inputs, tokens, dealing, past)
        if name == "inputs_embeds":  # last: the tensor of all tokens may become the share
            share = self._let_go(tokens, share, forward)
        return (), {**others, name: share}

    def leave_text(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the language model: the hidden states that are wanted, on every rank, and the cache."""
        forward, self.forward = self.forward, None
        self.sharded_cache = None
        if forward is None or not hasattr(output, "last_hidden_state"):
            return None
        if getattr(output, "hidden_states", None) is not None:
            raise NotImplementedError("output_hidden_states is not there for tokens on several ranks: leave it out")
        hidden = output.last_hidden_state
        if forward.wanted is None:
            output.last_hidden_state = self.ranks.gather_tokens(hidden, forward.dealing, 1).finish()
        else:
            output.last_hidden_state = self.ranks.pick_tokens(hidden, forward.dealing, forward.wanted, 1).finish()
        output.past_key_values = forward.cache
        return output

    def leave_first_layer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The embeddings have been read: nothing needs them, but the frames of the model's code still hold them."""
        forward = self.forward
        read = args[0] if args else kwargs.get("hidden_states")
        hidden = output[0] if isinstance(output, tuple) else output
        if forward is None or not isinstance(read, Tensor) or read.nbytes < LET_GO or read.requires_grad:
            return
        if isinstance(hidden, Tensor) and hidden.untyped_storage().data_ptr() != read.untyped_storage().data_ptr():
            read.data = read.new_empty(0)

    def _let_go(self, whole: Tensor, share: Tensor, forward: DealtForward) -> Tensor:
        """The share of the embeddings; in place of those of all tokens where these are large and were made by the
        model's own code, which reads them no more but holds them until the last layer is done."""
        if not self.embeddings_are_ours or whole.nbytes < LET_GO or whole.requires_grad:
            return share
        whole.data = share
        return whole

    def _run_whole(self, tokens: int, cache: Any) -> None:
        """A forward that every rank runs whole."""
        from .sharded_cache import ShardedLayer

        if any(isinstance(layer, ShardedLayer) for layer in getattr(cache, "layers", ())):
            self.sharded_cache = cache
        elif tokens > 1 and (cache is None or not int(cache.get_seq_length())) and "short" not in self.patch.noticed:
            self.patch.noticed.add("short")
            warnings.warn(
                f"mmflex: {tokens} tokens are fewer than two chunks of {TILE} for each of {self.ranks.size} ranks: "
                "every rank runs the whole prompt",
                stacklevel=4,
            )

    def _dealt(
        self, module: nn.Module, tokens: Tensor, past: int, cache: Any, inputs: dict[str, Any], wanted: Any
    ) -> DealtForward:
        count = tokens.shape[1]
        dealing = Dealing.head_tail(count, self.ranks.size)
        self._check_agreement(tokens, past, inputs)
        use_cache = inputs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(module.config, "use_cache", False)
        if cache is None and use_cache:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.patch.config)
        if cache is not None and getattr(self.patch.config, "kv_lora_rank", None):
            raise NotImplementedError(
                f"{type(module).__name__} caches latent vectors, not keys and values, which mmflex does not gather "
                "over ranks: call it with use_cache=False, or run it on one GPU"
            )
        if isinstance(wanted, Tensor):
            wanted = tuple(token % count for token in wanted.tolist())
        elif wanted is not None:
            wanted = tuple(range(max(0, count - wanted), count))
        return DealtForward(dealing, past, cache, wanted)

    def _check_agreement(self, tokens: Tensor, past: int, inputs: dict[str, Any]) -> None:
        """ValueError where ranks run unlike prompts."""
        prompt = self.patch.prompt
        ids, mask = prompt.seen.get("input_ids"), inputs.get("attention_mask")
        if ids is None:
            ids = inputs.get("input_ids")
        facts = {"prompts": tokens.shape[0], "tokens": tokens.shape[1], "tokens on the cache": past}
        if isinstance(ids, Tensor):
            weight = torch.arange(ids.numel(), device=ids.device) % 8191 + 1
            facts["input ids with checksum"] = int((ids.flatten().long() * weight).sum())
        if isinstance(mask, Tensor) and mask.ndim == 2:
            facts["tokens that are not padding"] = int(mask.sum())
        self.ranks.agree(facts, tokens.device)

    def _others(self, inputs: dict[str, Any], tokens: Tensor, dealing: Dealing, past: int) -> dict[str, Any]:
        """Everything but the tokens."""
        rank, (batch, count) = self.ranks.rank, tokens.shape[:2]
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if mask is None:
            if inputs.get("past_key_values") is None and positions is not None and _packed(positions):
                raise NotImplementedError(
                    "packed sequences are not dealt out to ranks: run them as a padded batch, or on one GPU"
                )
            # Else gaps in a rank's positions would be taken for the ends of packed sequences.
            mask = torch.ones((batch, past + count), dtype=torch.bool, device=tokens.device)
        elif isinstance(mask, Tensor) and mask.ndim != 2:
            raise NotImplementedError(
                f"a ready-made {mask.ndim}-D mask is not cut to ranks: pass attention_mask [batch, tokens]"
            )
        if positions is None:
            positions = torch.arange(past, past + count, device=tokens.device)[None]
        others = {name: value for name, value in inputs.items() if name not in _WHOLE}
        others |= self._visual_features(inputs, dealing)
        unknown = sorted(
            name
            for name, value in others.items()
            if isinstance(value, Tensor)
            and name not in _AS_THEY_ARE | {"visual_pos_masks"}
            and count in value.shape[:2]
        )
        if unknown:
            raise NotImplementedError(
                f"{type(self.patch.text_model).__name__} is given {', '.join(unknown)} with a value per token, which "
                "mmflex does not know how to deal out: run it on one GPU"
            )
        return {
            **others,
            "position_ids": dealing.take(positions, rank, positions.ndim - 1),
            "attention_mask": mask,
            "past_key_values": None,  # attention stores keys and values itself, in order
            "use_cache": False,
        }

    def _visual_features(self, inputs: dict[str, Any], dealing: Dealing) -> dict[str, Any]:
        """Of features that are added to visual tokens in several layers (DeepStack), those of this rank's tokens."""
        visual, features = inputs.get("visual_pos_masks"), inputs.get("deepstack_visual_embeds")
        if visual is None or features is None:
            return {}
        number = (visual.flatten().cumsum(0) - 1).view(visual.shape)
        own = dealing.take(visual, self.ranks.rank, 1)
        index = dealing.take(number, self.ranks.rank, 1)[own]
        return {"visual_pos_masks": own, "deepstack_visual_embeds": [f[index.to(f.device)] for f in features]}

    # ---- attention ---------------------------------------------------------------------------------------------------

    def attention(
        self,
        module: nn.Module,
        dense: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """(attention over the ranks [B, M, Hq, Dv], or None where the model's usual way is right; and the keys and
        values for that way). Arguments as `prefill`."""
        if self.forward is not None:
            return self.prefill(module, dense, query, key, value, mask, scaling, kwargs), key, value
        if self.sharded_cache is None or self._sharded_layer(module) is None:
            return None, key, value
        if query.shape[2] < DECODE_QUERIES:
            return self.decode(module, query, key, value, mask, scaling), key, value
        dealing = self._sharded_layer(module).dealing
        pending = [self.ranks.gather_tokens(t, dealing) for t in (key, value)]
        return None, pending[0].finish(), pending[1].finish()

    def _sharded_layer(self, module: nn.Module) -> Any:
        from .sharded_cache import sharded_layer

        return sharded_layer(self.sharded_cache, int(module.layer_idx))  # type: ignore[arg-type]

    def decode(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None
    ) -> Tensor:
        """A few queries [B, Hq, M, D], which every rank has, on a sharded layer -> [B, M, Hq, Dv]."""
        layer = self._sharded_layer(module)
        columns = layer.columns(query.device)
        queries, total = query.shape[2], layer.dealing.total
        seen: Tensor | None = None
        if isinstance(mask, MaskDescription):
            if mask.deviation is not None:
                raise NotImplementedError(
                    f"a sharded cache cannot honour {mask.deviation}: patch with cache='replicated'"
                )
            row = torch.arange(total - queries, total, device=query.device)[:, None]
            seen = (columns <= row)[None, None]
            if mask.window is not None:
                seen = seen & (row - columns < mask.window)
            if mask.padding is not None:
                seen = seen & mask.padding.to(query.device)[:, None, None, columns]
        elif mask is not None:
            seen = mask[..., columns] if mask.dtype == torch.bool else mask[..., columns] == 0
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        key, value = (own_kv_heads(self.patch, query.shape[1], t) for t in (key, value))
        return attend_shares(query, key, value, seen, scaling, self.ranks).transpose(1, 2).contiguous()

    def prefill(
        self,
        module: nn.Module,
        dense: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """A layer's attention over dealt-out tokens: query [B, Hq, M, D], key and value [B, Hkv, M, D] of this rank ->
        [B, M, Hq, Dv].

        Args:
            dense: the layer's previous attention function, for masks that only it can do.
        """
        forward = self.forward
        assert forward is not None
        if mask is not None and not isinstance(mask, MaskDescription):
            raise NotImplementedError("a ready-made mask is not cut to ranks: pass attention_mask [batch, tokens]")
        store = LayerStore(self, forward, int(module.layer_idx))  # type: ignore[arg-type]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if mask is not None and mask.deviation is not None:
            self.patch.notice(f"{mask.deviation}; over {self.ranks.size} ranks, every one of them runs all of it")
            return self._previous(module, dense, query, key, value, mask, scaling, kwargs, store)
        spec, layout, backend = self._spec(module, query, mask, store)
        out = self._attend(query, key, value, spec, layout, backend, scaling, store)
        return out.transpose(1, 2).contiguous()

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: Any,
        layout: TokenLayout,
        backend: str,
        scaling: float,
        store: LayerStore,
    ) -> Tensor:
        ranks, forward, width = self.ranks, store.forward, value.shape[-1]
        by_heads = self.scheme == "heads"
        if by_heads and not store.needs_all_keys:
            store.put_share(key, value)
            own_keys, own_values = (own_kv_heads(self.patch, query.shape[1], t) for t in (key, value))
            q, k, v = (widened(t, max(query.shape[-1], width)) for t in (query, own_keys, own_values))
            out, _ = attend_by_heads(q, k, v, spec, layout, ranks, forward.dealing, scale=scaling, backend=backend)
            return out[..., :width]
        first = forward.past - store.first
        query = widened(query, max(query.shape[-1], width))
        if by_heads:
            exchanged, estimate = tokens_for_heads(query, ranks, forward.dealing), None
        else:
            estimate = Estimate(query, spec, layout, ranks, forward.dealing, first)
        heads = query.shape[1]
        keys, values = store.gather(key, value)
        keys, values = own_kv_heads(self.patch, heads, keys), values.then(lambda t: own_kv_heads(self.patch, heads, t))
        if by_heads:
            own = own_heads(keys.shape[1], ranks)
            spec = spec if not isinstance(spec, tuple) else spec[own_heads(query.shape[1], ranks)]
            query, keys, values = exchanged.finish(), keys[:, own], values.then(lambda t: t[:, own])
            queries = QueryTokens.last(forward.dealing.total, layout.length)
        else:
            queries = forward.dealing.queries(ranks.rank, first)
        keys, values = widened(keys, query.shape[-1]), values.then(lambda t: widened(t, query.shape[-1]))
        given = None if estimate is None else estimate.finish()
        out, _ = attend(query, keys, values, spec, layout, queries, given, scale=scaling, backend=backend)
        if by_heads:
            out = heads_for_tokens(out, ranks, forward.dealing)
        return out[..., :width]

    def _spec(
        self, module: nn.Module, query: Tensor, mask: MaskDescription | None, store: LayerStore
    ) -> tuple[Any, TokenLayout, str]:
        """(spec, layout, backend) of a layer."""
        from mmflex.runtime.backends import resolve

        patch, forward, layer = self.patch, store.forward, int(module.layer_idx)  # type: ignore[arg-type]
        padding = None if mask is None else mask.padding
        batch, heads = query.shape[:2]
        end = forward.end
        try:
            if mask is not None and mask.window is not None and mask.window < end:
                # "auto" may trade a spec for dense attention, but this is the model's own mask
                backend = patch.backend
                if backend in ("auto", "dense"):
                    backend = resolve("auto", query.device, query.shape[-1], query.dtype).name
                return SlidingWindow(mask.window), patch.prompt.plain(padding, store.first, end), backend
            if layer in patch.spec:
                layout = patch.prompt.layout(batch, padding, store.first, forward.past, end)
                by_heads = self.ranks.size if self.scheme == "heads" else 1
                return own_patterns(patch, layer, heads, layout, by_heads), layout, patch.backend
        except LayoutUnknown as error:
            patch.notice(f"{error}", kind="layout")
        return Dense(), patch.prompt.as_text(padding, store.first, end), patch.backend

    def _previous(
        self,
        module: nn.Module,
        dense: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: MaskDescription,
        scaling: float,
        kwargs: dict[str, Any],
        store: LayerStore,
    ) -> Tensor:
        """The model's previous attention over all tokens, on every rank: of its result this rank's rows."""
        forward = store.forward
        query = self.ranks.gather_tokens(query, forward.dealing).finish()
        keys, values = store.gather(key, value)
        sizes = {
            "q_length": query.shape[2],
            "kv_length": keys.shape[2],
            "q_offset": forward.past,
            "kv_offset": store.first,
        }
        whole = replace(mask, arguments={**mask.arguments, **sizes}, built={}).dense(self.patch.previous)
        whole = whole if whole is None else whole.to(query.device)
        keys, every_value = (own_kv_heads(self.patch, query.shape[1], t) for t in (keys, values.finish()))
        out, _ = dense(module, query, keys, every_value, whole, scaling=scaling, dropout=0.0, **kwargs)
        return forward.dealing.take(out, self.ranks.rank, 1).contiguous()


class LayerStore:
    """Where the keys and values of a layer go, and where those before them are.

    Attributes:
        first: the token that the layer's first key is (with a sliding window, old keys are dropped).
    """

    def __init__(self, owner: ContextParallel, forward: DealtForward, layer: int) -> None:
        self.owner, self.forward, self.layer = owner, forward, layer
        self.sharded: Any = None
        self.first = 0
        cache = forward.cache
        if cache is None:
            return
        if owner.cache_kind == "sharded":
            from .sharded_cache import shard_layer

            self.sharded = shard_layer(cache, layer, owner.ranks)
        if self.sharded is None and layer < len(cache.layers):
            self.first = int(cache.get_mask_sizes(forward.dealing.total, layer)[1])

    @property
    def needs_all_keys(self) -> bool:
        """Whether all heads of all keys have to come to this rank: for its cache, or because earlier ones are there."""
        return self.forward.past > 0 or (self.forward.cache is not None and self.sharded is None)

    def put_share(self, key: Tensor, value: Tensor) -> None:
        """Keeps this rank's share, where the cache is sharded."""
        if self.sharded is not None:
            self.sharded.append_shares(key, value, self.forward.dealing)

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Pending]:
        """All keys of the layer from `first` on, and their values under way, from this rank's share of the new ones;
        kept in the cache."""
        ranks, forward = self.owner.ranks, self.forward
        dealing = forward.dealing
        if self.sharded is not None:
            self.put_share(key, value)
            key, value, dealing = self.sharded.keys, self.sharded.values, self.sharded.dealing
        keys, values = ranks.gather_tokens(key, dealing), ranks.gather_tokens(value, dealing)
        if forward.cache is None or self.sharded is not None:
            return keys.finish(), values
        if not forward.past:
            new = keys.finish()
            return new, values.then(lambda t: self._kept(new, t)[1])
        every = self._kept(keys.finish(), values.finish())
        return every[0], Pending(lambda: every[1])

    def _kept(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache returns for new keys and values: with those before them, without room behind."""
        every = self.forward.cache.update(keys, values, self.layer)
        end = self.forward.end - self.first
        return every[0][:, :, :end], every[1][:, :, :end]


def _arguments(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """The arguments of a forward by name; None where the call itself will raise."""
    try:
        return call_arguments(module.forward, args, kwargs)
    except TypeError:
        return None


def _has_head(module: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(module.forward).parameters


def _packed(positions: Tensor) -> bool:
    """Whether text positions [B, N] (or the first of [4, B, N]) jump, as those of packed sequences do."""
    text = positions if positions.ndim == 2 else positions[0] if positions.shape[0] == 4 else None
    return text is not None and bool((text.diff(dim=1) != 1).any())


def _rope_types(config: Any) -> set[str]:
    """The types of rotary positions that a config names."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {str(one.get("rope_type", one.get("type", "default"))) for one in nested}
