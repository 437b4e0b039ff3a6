"""Backends: which kernels can run a launch here, and why not.

``flash`` and ``triton`` (FlexAttention on CUDA), ``cpu`` (FlexAttention's C++ template), ``dense`` (SDPA),
``reference`` (eager). Quirks of single torch versions are met here and nowhere else.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from . import reference
from .masks import MaskMod, _maker

Lists = tuple[Tensor, Tensor, Tensor, Tensor]
"""kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices: int32 [B, H, NQ] and [B, H, NQ, W], both W equal (up
to torch 2.11 the Triton template reads the full table with the other's strides)."""


@dataclass(frozen=True)
class Backend:
    """What a backend can do.

    Attributes:
        lse: returns log-sum-exp, so launches can be merged.
        full_width: wants index tables as wide as there are key blocks.
        why_not: device -> the reason why it cannot run there, or None.
    """

    name: str
    lse: bool
    full_width: bool
    why_not: Callable[[torch.device, int, torch.dtype], str | None]


def _not_on_cpu(device: torch.device, dim: int, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device}, it runs on the CPU"
    return None


def _not_triton(device: torch.device, dim: int, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device}, it runs on CUDA devices"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device here"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere (compute capability 8.0)"
    return None


def _not_flash(device: torch.device, dim: int, dtype: torch.dtype) -> str | None:
    reason = _not_triton(device, dim, dtype)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Hopper (compute capability 9.0)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"q is {dtype}, it takes bfloat16 and float16"
    if dim > 128 or dim % 8:
        return f"the head dimension is {dim}, it takes multiples of 8 up to 128"
    return _flash_missing()


@lru_cache(maxsize=1)
def _flash_missing() -> str | None:
    try:
        import flash_attn.cute  # noqa: F401
    except Exception as error:
        return f"flash-attn-4 cannot be imported ({type(error).__name__}: {error}); pip install flash-attn-4"
    return None


BACKENDS = {
    b.name: b
    for b in (
        Backend("flash", True, False, _not_flash),
        Backend("triton", True, False, _not_triton),
        Backend("cpu", False, True, _not_on_cpu),
        Backend("dense", True, False, lambda device, dim, dtype: None),
        Backend("reference", True, False, lambda device, dim, dtype: None),
    )
}


def why_not(
    backend: str, device: torch.device | str, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> str | None:
    """Why a backend cannot run with these tensors; None if it can. ValueError for an unknown name."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: use 'auto', {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[backend].why_not(torch.device(device), head_dim, dtype)


@lru_cache(maxsize=64)
def resolve(backend: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> Backend:
    """The backend to use; "auto" is the fastest that can run. RuntimeError if the one asked for cannot."""
    if backend == "auto":
        reasons = {name: why_not(name, device, head_dim, dtype) for name in ("flash", "triton", "cpu", "reference")}
        chosen = next(name for name, reason in reasons.items() if reason is None)
        if chosen == "triton" and torch.cuda.get_device_capability(device) >= (9, 0):
            _notice(f"mmflex runs on Triton; its faster flash backend is out: {reasons['flash']}")
        return BACKENDS[chosen]
    reason = why_not(backend, device, head_dim, dtype)
    if reason is not None:
        can = [name for name in BACKENDS if why_not(name, device, head_dim, dtype) is None]
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}; backend='auto' picks one, here {can}")
    return BACKENDS[backend]


@lru_cache(maxsize=16)
def _notice(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def attend(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_mod: MaskMod,
    lists: Lists,
    tile: int,
    scale: float,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """One launch: q [B, H, Q, D], k and v [B, Hkv, KV, D] in slot order -> out, lse float32 [B, H, Q] if asked."""
    if backend.name == "reference":
        return reference.attend(q, k, v, mask_mod, lists, tile, scale)
    name = backend.name
    if name == "flash" and not mask_mod.comparison:
        _notice("mmflex runs launches with looked-up masks on Triton: the flash backend takes masks of one comparison")
        name = "triton"
    width = v.shape[-1]
    if any(t.shape[-1] != _head_dim(t.shape[-1]) for t in (q, v)):  # zeros add nothing to a score
        q, k, v = (torch.nn.functional.pad(t, (0, _head_dim(t.shape[-1]) - t.shape[-1])) for t in (q, k, v))
    kernel = _kernel(mask_mod.source, name, tile, scale, lse, _bucket(name, q, k, v, lists))
    out, sums = kernel(q, k, v, *lists, *mask_mod.captures)
    return out[..., :width], sums


def _bucket(backend: str, *tensors: Any) -> Any:
    """What a kernel is compiled for: static shapes. Flash is compiled with dynamic lengths and loses no speed by it."""
    q, k, v, lists = tensors
    shapes = (q.shape, k.shape, v.shape, lists[1].shape, q.stride(), k.stride(), v.stride())
    return (q.dtype, q.device, *(shapes if backend != "flash" else (q.shape[:2], k.shape[1], q.shape[3], v.shape[3])))


def _head_dim(dim: int) -> int:
    """The head dimension that the kernels take: powers of two for FlexAttention, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


compiles = 0
"""Kernels compiled so far in this process: one per mask_mod source, backend and length bucket."""


@lru_cache(maxsize=256)
def _kernel(source: str, backend: str, tile: int, scale: float, lse: bool, bucket: Any) -> Callable[..., Any]:
    """The compiled kernel of a mask_mod for a bucket of shapes."""
    global compiles
    compiles += 1
    options: Any = {"BACKEND": backend.upper()} if backend in ("flash", "triton") else {}
    dtype, device, head_dim = bucket[0], bucket[1], bucket[2][3] if backend != "flash" else 0
    fits = backend == "triton" and dtype != torch.float32 and head_dim == 128 and tile == 128
    if fits and torch.cuda.get_device_capability(device) == (9, 0):  # measured best on H200, see benchmarks/NOTES.md
        options |= {"BLOCK_M": 128, "BLOCK_N": 128, "num_stages": 3, "num_warps": 8}
    make = _maker(source)

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        num: Tensor,
        index: Tensor,
        full_num: Tensor,
        full_index: Tensor,
        *captures: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        mask = BlockMask.from_kv_blocks(
            num,
            index,
            full_num,
            full_index,
            BLOCK_SIZE=tile,
            mask_mod=make(*captures),
            seq_lengths=(q.shape[2], k.shape[2]),
            compute_q_blocks=False,
        )
        gqa = q.shape[1] != k.shape[1]
        extra: dict[str, Any] = {"return_aux": AuxRequest(lse=True)} if lse else {}
        out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa, kernel_options=options, **extra)
        return (out[0], out[1].lse) if lse else (out, None)

    def compiled() -> Callable[..., Any]:
        # Dynamo counts recompiles per code object: each kernel gets its own, so that no limit is ever met.
        code = run.__code__.replace(co_name=f"mmflex_attend_{compiles}", co_firstlineno=compiles)
        own = types.FunctionType(code, run.__globals__, code.co_name, run.__defaults__, run.__closure__)
        return torch.compile(own, dynamic=None if backend == "flash" else False, fullgraph=True)

    if backend != "triton":
        return compiled()
    held = [compiled()]

    def attempt(*args: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a mask looks up is pipelined through shared memory too, and may not fit: then without a pipeline."""
        global compiles
        try:
            return held[0](*args)
        except RuntimeError as error:
            if "No valid triton configs" not in str(error) or options.get("num_stages") == 1:
                raise
            options["num_stages"] = 1
            compiles += 1
            held[0] = compiled()
            return held[0](*args)

    return attempt


def block_mask(mask_mod: MaskMod, lists: Lists, tile: int, queries: int, keys: int) -> BlockMask:
    """The BlockMask of a launch, as FlexAttention gets it."""
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=tile, mask_mod=mask_mod, seq_lengths=(queries, keys), compute_q_blocks=False
    )


_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, lse: bool, backend: str = "dense"
) -> tuple[Tensor, Tensor | None]:
    """Causal attention, the last M of N positions: q [B, H, M, D], k and v [B, Hkv, N, D]. Without padding. By the
    fastest kernel there is: of SDPA, and beside the flash backend flash-attn-4."""
    if not lse:
        return dense_kernel(q, k, v, scale, backend)(q, k, v, scale), None
    m, n = q.shape[2], k.shape[2]
    if q.device.type == "cuda" and m == n and q.dtype in (torch.bfloat16, torch.float16):
        group = q.shape[1] // k.shape[1]
        kr, vr = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, kr, vr, 0.0, True, scale=scale)
        return found[0], found[1]
    seen = torch.arange(n, device=q.device) <= torch.arange(n - m, n, device=q.device)[:, None]
    return reference.softmax_attention(q, k, v, seen.expand(*q.shape[:2], m, n), scale)


Dense = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def dense_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Dense:
    """What `dense_attention` runs for tensors like these."""
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return _fastest(q, k, v, scale, backend == "flash")
    return _plain if q.shape[2] == k.shape[2] else _rows_of_sdpa


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The kernel that PyTorch itself picks, for M = N."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    m, n = q.shape[2], k.shape[2]
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
        bias = None if m == n else causal_lower_right(m, n)
        gqa = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, bias, is_causal=m == n, scale=scale, enable_gqa=gqa)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    found = _flash_attention()(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=scale, causal=True)
    return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)


@lru_cache(maxsize=1)
def _flash_attention() -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func


TRIED = 1 << 15
"""Keys up to which the dense kernels are tried against each other: they differ by a few per cent, now one way and now
the other, and on short prompts by what the host does. Beyond, flash-attn-4 is the fastest, and a trial takes long."""

_faster: dict[Any, Dense] = {}


def _fastest(q: Tensor, k: Tensor, v: Tensor, scale: float, flash: bool) -> Dense:
    """The fastest dense kernel for tensors like these, tried once for each power of two of their length."""
    n, usual = k.shape[2], _flash if flash else _sdpa
    if n > TRIED:
        return usual
    like = [(*t.shape[:2], t.shape[2].bit_length(), t.shape[3], _in_memory(t)) for t in (q, k, v)]
    key = (q.device, q.dtype, q.shape[2] == n, flash, *like)
    if key not in _faster:
        if torch.cuda.is_current_stream_capturing():
            return usual
        kernels = [_sdpa, *([_flash] if flash else []), *([_plain] if q.shape[2] == n else [])]
        _faster[key] = _tried(kernels, q, k, v, scale)
    return _faster[key]


def _in_memory(t: Tensor) -> str:
    """Whether heads or tokens come first in memory."""
    return "heads" if t.is_contiguous() else "tokens" if t.transpose(1, 2).is_contiguous() else "neither"


def _tried(kernels: Sequence[Dense], q: Tensor, k: Tensor, v: Tensor, scale: float) -> Dense:
    """The kernel that takes least, of those that run and find what the first one finds. In turns, so that a clock that
    is still rising favours none."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)  # once in a process it may wait
    try:
        wanted = kernels[0](q, k, v, scale)
        least = {kernel: float("inf") for kernel in kernels if _agrees(kernel, wanted, q, k, v, scale)}
        for _ in range(3):
            for kernel in least:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                for _ in range(1 if k.shape[2] > 1 << 13 else 4):
                    kernel(q, k, v, scale)
                end.record()
                end.synchronize()
                least[kernel] = min(least[kernel], start.elapsed_time(end))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return min(least, key=lambda kernel: least[kernel]) if least else kernels[0]


def _agrees(kernel: Dense, wanted: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    try:
        found = kernel(q, k, v, scale)
    except (RuntimeError, NotImplementedError):  # not for these tensors
        return False
    return torch.allclose(found, wanted, atol=0.02, rtol=0.02, equal_nan=True)


def _rows_of_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, step: int = 1024) -> Tensor:
    """SDPA for M < N, where ``is_causal`` would mean the first M keys: in strips, so that no mask is M x N."""
    m, n, gqa = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    for first in range(0, m, step):
        last = min(first + step, m)
        end = n - m + last
        seen = torch.arange(end, device=q.device) <= torch.arange(n - m + first, end, device=q.device)[:, None]
        out[:, :, first:last] = scaled_dot_product_attention(
            q[:, :, first:last], k[:, :, :end], v[:, :, :end], attn_mask=seen, scale=scale, enable_gqa=gqa
        )
    return out
