"""Attention within segments of a packed sequence: every token sees all tokens of its own segment, and no others.

This is what vision towers ask for (frames, images, windows of a frame, back to back in one sequence): block-diagonal
over ``cu_seqlens``, not causal, exact. One call a layer, in place of one call for every segment.

=======  ===================================================================================================
backend  how
=======  ===================================================================================================
sdpa     segments of one length are one batch of `scaled_dot_product_attention`: neighbours as they lie, or all of
         that length, gathered, whichever is cheaper. Any device and dtype
cudnn    the same by cuDNN's kernel, where all segments have one length
flash    `torch.nn.attention.varlen.varlen_attn`: one call for any lengths; half precision on CUDA
flash4   flash-attn-4's variable-length function, where it is installed; half precision on CUDA
=======  ===================================================================================================

The host has to know the lengths to choose and to batch. `Segments` reads them from the device once; a layer that is
given the tensor that `Segments.boundaries` returned finds them again without reading the device.
"""

from __future__ import annotations

import importlib.util
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from .caches import bounded

__all__ = ["BACKENDS", "Segments", "varlen_attention"]

HALF = (torch.bfloat16, torch.float16)

GRID_LIMIT = 65_535
"""Segments that one launch can hold: CUDA's limit for the second dimension of a grid, where kernels put the batch."""


# ---- which tokens belong together ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Segments of one length, back to back: ``count`` of ``length`` tokens from token ``first`` on."""

    first: int
    length: int
    count: int

    @property
    def rows(self) -> slice:
        """Its tokens."""
        return slice(self.first, self.first + self.count * self.length)


class Segments:
    """A packed sequence cut into segments, known to the host.

    Args:
        boundaries: ``cu_seqlens``: where segments start, and the number of tokens at the end. Empty segments are
            dropped.

    Attributes:
        starts: int64 [segments + 1], as given, without empty segments.
        tokens: the length of the whole sequence.
        longest: the length of the longest segment; 0 without tokens.
        length: the common length of all segments, or None.
        runs: neighbours of one length together.

    Raises:
        ValueError: boundaries that are not a rising sequence from 0.
    """

    def __init__(self, boundaries: Sequence[int] | np.ndarray) -> None:
        starts = np.asarray(boundaries, dtype=np.int64).reshape(-1)
        lengths = np.diff(starts)
        if len(starts) < 1 or starts[0] != 0 or (lengths < 0).any():
            raise ValueError(
                f"cu_seqlens {_shortened(starts)} must start with 0 and never fall: pass the cumulative sum of the "
                "segments' lengths, with a 0 in front"
            )
        self.starts = np.concatenate([starts[:1], starts[1:][lengths > 0]])
        lengths = np.diff(self.starts)
        self.tokens = int(self.starts[-1])
        self.longest = int(lengths.max(initial=0))
        self.length = self.longest if len(lengths) and (lengths == self.longest).all() else None
        changes = np.flatnonzero(np.diff(lengths)) + 1
        edges = np.concatenate([[0], changes, [len(lengths)]]) if len(lengths) else np.zeros(1, np.int64)
        self.runs = [
            Run(int(self.starts[a]), int(lengths[a]), int(b - a)) for a, b in itertools.pairwise(edges.tolist())
        ]
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> Segments:
        """The segments of a tensor ``[segments + 1]``: without a look at the device for what `boundaries` returned,
        else by one read of the tensor."""
        known = _by_memory.get((cu_seqlens.device, cu_seqlens.data_ptr()))
        if known is not None and cu_seqlens.numel() == len(known.starts):
            return known
        starts = _read(cu_seqlens)
        segments: Segments = _read_before.once(starts.tobytes(), lambda: cls(starts))
        return segments

    def boundaries(self, device: torch.device) -> Tensor:
        """int32 ``[segments + 1]`` on a device, the same tensor each time. Not to be written to."""
        tensor = self._device_constant("starts", lambda: self.starts.astype(np.int32), device)
        _by_memory[(tensor.device, tensor.data_ptr())] = self
        return tensor

    def lengths(self) -> list[int]:
        """The lengths that occur, rising."""
        return sorted({run.length for run in self.runs})

    def tokens_of(self, length: int, device: torch.device) -> Tensor:
        """int64, the tokens of all segments of a length, in order."""

        def build() -> np.ndarray:
            first = self.starts[:-1][np.diff(self.starts) == length]
            return (first[:, None] + np.arange(length)).reshape(-1)

        return self._device_constant(f"tokens {length}", build, device)

    def _device_constant(self, name: str, build: Callable[[], np.ndarray], device: torch.device) -> Tensor:
        tensor = self._on_device.get((name, device))
        if tensor is None:
            tensor = self._on_device[name, device] = upload(torch.from_numpy(build()), device)
        return tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Host values on a device, for later use in and out of inference mode. The host does not wait for the copy: another
    stream than the current one has to."""
    with torch.inference_mode(False):
        if device.type == "cuda":
            values = values.pin_memory()  # a copy from pageable memory would make the host wait
        return values.to(device, non_blocking=True)


_by_memory: weakref.WeakValueDictionary[tuple[torch.device, int], Segments] = weakref.WeakValueDictionary()
"""Segments by where their own boundaries lie. They hold these tensors, so no other tensor can lie there."""


_read_before = bounded(16)
"""Segments by the content of boundaries that others made."""


def _read(cu_seqlens: Tensor) -> np.ndarray:
    """The tensor on the host; on CUDA this waits for the device."""
    return cu_seqlens.detach().cpu().numpy().astype(np.int64)


def _shortened(starts: np.ndarray) -> str:
    values = starts.tolist()
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ...]"


# ---- attention -------------------------------------------------------------------------------------------------------


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention within segments.

    Args:
        q: ``[T, H, D]``; any strides with the last dimension dense.
        k, v: ``[T, Hkv, D]``, H a multiple of Hkv.
        segments: of the T tokens.
        scale: of the scores; None for ``D ** -0.5``.
        backend: "auto", or a name of `BACKENDS`.

    Returns:
        ``[T, H, D]``, contiguous, of q's dtype.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        NotImplementedError: a backend that cannot do these tensors; the message says why.
    """
    if q.ndim != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: varlen_attention takes [tokens, heads, head "
            "dimension] with equal tokens and head dimensions"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if segments.tokens != q.shape[0]:
        raise ValueError(
            f"the segments hold {segments.tokens} tokens but q has {q.shape[0]}: pass the Segments of this sequence"
        )
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if not q.shape[0]:
        return q.new_empty(q.shape)
    if backend == "auto":
        backend = _fastest(q, k, v, segments, scale)
    elif backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: use 'auto', {', '.join(map(repr, BACKENDS))}")
    else:
        why_not = BACKENDS[backend].why_not(q, segments)
        if why_not is not None:
            raise NotImplementedError(f"backend {backend!r} can't run this: {why_not}")
    return BACKENDS[backend].run(q, k, v, segments, scale).contiguous()


@torch.library.custom_op("mmflex::varlen_attention", mutates_args=())
def varlen_attention_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """`varlen_attention` inside compiled graphs, which cannot hold host data: arguments as there, segments by their
    boundaries."""
    return varlen_attention(q, k, v, Segments.of(cu_seqlens), scale)


@varlen_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


# ---- backends --------------------------------------------------------------------------------------------------------


CALL_S = {"cpu": 40e-6, "cuda": 20e-6}
GATHER_S = {"cpu": 1e-9, "cuda": 2e-12}
"""What one call more takes, and what gathering takes for each byte of q: k and v are gathered with it and the output is
scattered. Rough figures of two CPU cores and an H200: they are a factor of ten apart in most towers."""


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    if segments.length is not None:
        return _batched(q, k, v, segments.length, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lengths, device = segments.lengths(), "cuda" if q.device.type == "cuda" else "cpu"
    saved = CALL_S[device] * (len(segments.runs) - len(lengths))
    if saved <= GATHER_S[device] * q.numel() * q.element_size():
        for run in segments.runs:
            out[run.rows] = _batched(q[run.rows], k[run.rows], v[run.rows], run.length, scale)
        return out
    for length in lengths:
        tokens = segments.tokens_of(length, q.device)
        out.index_copy_(0, tokens, _batched(q[tokens], k[tokens], v[tokens], length, scale))
    return out


def _batched(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> Tensor:
    """Segments of one length, back to back: [segments * length, H, D]."""
    gqa = q.shape[1] != k.shape[1]
    parts = []
    for first in range(0, len(q), GRID_LIMIT * length):
        rows = slice(first, first + GRID_LIMIT * length)
        qs, ks, vs = (t[rows].unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(qs, ks, vs, scale=scale, enable_gqa=gqa)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    assert segments.length is not None
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _batched(q, k, v, segments.length, scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest, width = segments.boundaries(q.device), segments.longest, q.shape[2]
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if width % 8:  # zeros change neither scores nor sums
        q, k, v = (pad(t, (0, -width % 8)) for t in (q, k, v))
    out: Any = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale)
    return out[..., :width]


def _flash4(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    from flash_attn.cute import interface

    starts, longest, width = segments.boundaries(q.device), segments.longest, q.shape[2]
    if width % 8:
        q, k, v = (pad(t, (0, -width % 8)) for t in (q, k, v))
    found = interface.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, causal=False,
    )  # fmt: skip
    return (found[0] if isinstance(found, tuple) else found)[..., :width]


def _flash_why_not(q: Tensor, segments: Segments) -> str | None:
    if q.device.type != "cuda" or q.dtype not in HALF:
        return f"flash kernels take bfloat16 or float16 on CUDA, not {q.dtype} on {q.device}"
    if q.shape[2] > 256:
        return f"flash kernels take head dimensions up to 256, not {q.shape[2]}"
    if len(segments) > GRID_LIMIT:
        return f"one launch takes up to {GRID_LIMIT} segments, not {len(segments)}"
    return None


def _flash4_why_not(q: Tensor, segments: Segments) -> str | None:
    if not _has_flash4():
        return "flash-attn-4 is not installed: pip install flash-attn-4"
    return _flash_why_not(q, segments)


def _cudnn_why_not(q: Tensor, segments: Segments) -> str | None:
    if q.device.type != "cuda" or q.dtype not in HALF:
        return f"cuDNN takes bfloat16 or float16 on CUDA, not {q.dtype} on {q.device}"
    if q.shape[2] % 8 or q.shape[2] > 128:
        return f"cuDNN takes head dimensions that are multiples of 8 up to 128, not {q.shape[2]}"
    return None if segments.length is not None else "segments of several lengths"


@lru_cache(maxsize=1)
def _has_flash4() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True)
class Backend:
    """A way to compute `varlen_attention`, and why it cannot run given tensors (None if it can)."""

    run: Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]
    why_not: Callable[[Tensor, Segments], str | None]


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(_sdpa, lambda q, segments: None),
    "cudnn": Backend(_cudnn, _cudnn_why_not),
    "flash": Backend(_flash, _flash_why_not),
    "flash4": Backend(_flash4, _flash4_why_not),
}


# ---- the fastest of them ---------------------------------------------------------------------------------------------

AUTOMATIC = ("flash", "cudnn")
"""What "auto" chooses from on CUDA. flash-attn-4 compiles for many seconds before its first call, and is asked for by
name."""

_choices = bounded(64)


def _fastest(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> str:
    """The backend that took least on tensors like these: measured once for each power of two of the longest segment."""
    able = [name for name in AUTOMATIC if BACKENDS[name].why_not(q, segments) is None]
    if len(able) < 2:
        return able[0] if able else "sdpa"
    key = (q.device, q.dtype, q.shape[1:], k.shape[1], segments.longest.bit_length(), len(q).bit_length())
    choice: str | None = _choices.recall(key)
    if choice is None:
        if torch.cuda.is_current_stream_capturing():
            return able[0]
        choice = _choices.keep(key, _measured(able, q, k, v, segments, scale))
    return choice


def _measured(names: list[str], q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> str:
    """The name of the fastest backend, of those that run and agree with the first: medians of five, in turns."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)  # once for tensors like these it may wait
    try:
        stream = torch.cuda.current_stream(q.device)
        expected = BACKENDS[names[0]].run(q, k, v, segments, scale)
        taken: dict[str, list[float]] = {names[0]: []}
        for name in names[1:]:
            if _agrees(lambda name=name: BACKENDS[name].run(q, k, v, segments, scale), expected):  # type: ignore[misc]
                taken[name] = []
        for _ in range(5):
            for name, times in taken.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(stream)
                BACKENDS[name].run(q, k, v, segments, scale)
                end.record(stream)
                end.synchronize()
                times.append(start.elapsed_time(end))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return min(taken, key=lambda name: sorted(taken[name])[2])


def _agrees(attend: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        found = attend()
    except RuntimeError:  # cuDNN has no plan for some shapes
        return False
    apart = (found - expected).float().nan_to_num(0.0, 0.0, 0.0)
    same = torch.equal(found.isfinite(), expected.isfinite())
    return same and bool(apart.norm() <= 0.02 * expected.float().nan_to_num(0.0, 0.0, 0.0).norm())
