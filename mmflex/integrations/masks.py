"""What transformers asks of a mask function, kept as a description instead of an N x N tensor.

transformers builds attention masks before the first layer, through a function registered per attention implementation.
At 100k tokens the boolean tensor is 10 GB, so mmflex's function keeps the arguments; the attention function reads from
them which tokens are padding and whether the mask is causal, a causal window, or something that only the model's
previous attention can do. For the latter, `MaskDescription.dense` builds what that attention would have been given.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

NAME = "mmflex"
"""The name under which the attention and the mask function are registered with transformers."""

DECODE_QUERIES = 64
"""On a cache, fewer new tokens than this are decoding (assisted decoding checks a few at a time): there is nothing to
save, and patterns are estimated from this many queries."""


def supported() -> bool:
    """Whether the transformers that is installed is new enough for `patch`."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2] if part.isdecimal())
    return version >= (5, 17)


@dataclass(eq=False)
class MaskDescription:
    """A 4-D attention mask that has not been built: what `transformers.masking_utils` asked for.

    Models pass it around like the tensor ``[B, 1, M, N]`` that it stands for (``shape``, ``ndim``, ``to``).

    Attributes:
        batch, queries, keys: B, M and N of the request (N of a static cache is its capacity).
        q_offset, kv_offset: absolute position of the first query and of the first key. ``q_offset`` is a tensor with
            a static cache.
        padding: bool [B, tokens so far], True for tokens; None where nothing is padded.
        window: of a causal sliding window, how many keys a query sees with its own; None for none.
        deviation: why the mask is neither causal nor a causal window; None when it is one of them.
        arguments: everything that was passed, for `dense`.
    """

    batch: int
    queries: int
    keys: int
    q_offset: int | torch.Tensor
    kv_offset: int
    padding: torch.Tensor | None
    window: int | None
    deviation: str | None
    arguments: dict[str, Any] = field(repr=False)
    built: dict[str, Any] = field(default_factory=dict, repr=False)

    ndim = 4

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch, 1, self.queries, self.keys))

    def dim(self) -> int:
        return 4

    def to(self, *args: Any, **kwargs: Any) -> MaskDescription:
        return self

    def contiguous(self) -> MaskDescription:
        return self

    def dense(self, implementation: str) -> Any:
        """The mask that the function of ``implementation`` ("sdpa", "eager", ...) gives: a tensor or None."""
        if implementation not in self.built:
            self.built[implementation] = _mask_functions()[implementation](**self.arguments)
        return self.built[implementation]


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | MaskDescription | None = None,
    **options: Any,
) -> Any:
    """The registered mask function: a `MaskDescription`, or for a decode step the previous implementation's mask."""
    if isinstance(attention_mask, MaskDescription):
        return attention_mask  # generate() with a static cache builds masks ahead, as it may with 4-D tensors
    from transformers.masking_utils import causal_mask_function

    mask_function = causal_mask_function if mask_function is None else mask_function
    if isinstance(q_offset, torch.Tensor):
        # The tensor of a static cache is advanced in place before attention runs.
        q_offset = q_offset.clone() if torch.compiler.is_compiling() else int(q_offset)
    arguments = dict(
        options,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
    )
    config = options.get("config")
    if q_length == 1:
        previous = previous_implementation(config)
        if previous is not None:
            return _mask_functions()[previous](**arguments)
    window, deviation = _classify(mask_function is causal_mask_function, config, options)
    return MaskDescription(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, window, deviation, arguments
    )


def causal_description(
    query: torch.Tensor,
    key: torch.Tensor,
    padding: torch.Tensor | None,
    past: int,
    first: int,
    window: int | None,
    config: Any,
) -> MaskDescription:
    """The description of a causal or windowed mask from its parts, where the original is out of reach."""
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    options = {} if window is None else {"local_size": window}
    return describe(
        query.shape[0],
        query.shape[2],
        key.shape[2],
        past,
        first,
        function,
        padding,
        dtype=query.dtype,
        device=query.device,
        config=config,
        **options,
    )


def _classify(causal: bool, config: Any, options: dict[str, Any]) -> tuple[int | None, str | None]:
    """(window, deviation) of a request."""
    size = options.get("local_size")
    if causal and size is None:
        return None, None
    # transformers clears this flag whenever it adds anything to the plain causal or windowed mask
    plain = options.get("allow_is_causal_skip", True) and not options.get("use_vmap", False)
    if size is not None and size == getattr(config, "attention_chunk_size", None):
        return None, f"a chunked mask (attention_chunk_size {size})"
    if plain and size is not None:
        return size, None
    return None, "a mask that is not causal (image blocks that see both ways, a prefix, packed sequences, an own mask)"


def _mask_functions() -> Any:
    from transformers.masking_utils import AttentionMaskInterface

    return AttentionMaskInterface._global_mapping


# ---- what a config's attention was before mmflex -------------------------------------------------------------------


@dataclass
class _Previous:
    config: weakref.ref[Any]
    implementation: str
    users: int = 0


_previous: dict[int, _Previous] = {}


def previous_implementation(config: Any) -> str | None:
    """The attention implementation that a patched config had before; None for a config that mmflex did not patch.

    Kept outside the config because a config writes its attributes into ``config.json``, and per config because a mask
    function is told nothing else.
    """
    entry = _previous.get(id(config))
    return entry.implementation if entry is not None and entry.config() is config else None


def remember_previous(config: Any, implementation: str) -> None:
    """Note one more patched model of a config (models may share one), which had this implementation before."""
    entry = _previous.get(id(config))
    if entry is None or entry.config() is not config:
        entry = _previous[id(config)] = _Previous(weakref.ref(config), implementation)
    entry.users += 1


def forget_previous(config: Any) -> bool:
    """Note one patched model less; True when it was the last of its config."""
    entry = _previous.get(id(config))
    if entry is None or entry.config() is not config:
        return True
    entry.users -= 1
    if entry.users:
        return False
    del _previous[id(config)]
    return True


def dense_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The attention function that ``implementation`` names for this attention module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    # "eager" is a function of the modeling file, which names it so or nearly so
    for scope in (vars(sys.modules[cls.__module__]) for cls in type(module).__mro__):
        for name in ("eager_attention_forward", "simple_eager_attention_forward"):
            if name in scope:
                return scope[name]
    raise ValueError(
        f"no {implementation!r} attention function for {type(module).__name__}: load the model with "
        'attn_implementation="sdpa" and patch it again'
    )
