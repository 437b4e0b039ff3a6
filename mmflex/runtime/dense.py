"""Dense attention: the fastest kernel at hand for tensors like these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from . import reference
from .caches import bounded

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
    fastest kernel available: one of SDPA's or, with the flash backend, flash-attn-4."""
    if not q.shape[2]:  # flash-attn-4 divides by the number of queries
        return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32) if lse else None
    if not lse:
        return dense_kernel(q, k, v, scale, backend)(q, k, v, scale), None
    half, like = q.dtype in (torch.bfloat16, torch.float16), q.shape[2:] == k.shape[2:] == v.shape[2:]
    if q.device.type == "cuda" and half and like and not q.shape[3] % 8:
        group = q.shape[1] // k.shape[1]
        kr, vr = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, kr, vr, 0.0, True, scale=scale)
        return found[0], found[1]
    return reference.causal_attention(q, k, v, scale)


Dense = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def dense_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Dense:
    """What `dense_attention` runs for tensors like these."""
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return _fastest(q, k, v, scale, backend == "flash")
    return _plain if q.shape[2] == k.shape[2] else _rows_of_sdpa


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The kernel that PyTorch itself picks, for M = N."""
    k, v = _taken(q, k, v)
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _taken(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values that a kernel takes which holds no scores: on a GPU float32 has none for grouped heads, so that
    those are repeated."""
    group = q.shape[1] // k.shape[1]
    if group == 1 or q.device.type != "cuda" or q.dtype != torch.float32:
        return k, v
    return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """For M = N: what `scaled_dot_product_attention` calls for cuDNN, without its backend selection, which takes
    the host as long as the device takes for a short prompt (so does much of a call through `torch.ops`)."""
    return torch._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True, False, scale=scale)[0]


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
    """The function that FlexAttention calls as well; the public one goes through autograd first."""
    from flash_attn.cute import interface

    return getattr(interface, "_flash_attn_fwd", interface.flash_attn_func)


TRIED = 1 << 15
"""Keys up to which the dense kernels are autotuned: they differ by a few per cent, now one way and now the other, and
on short prompts by what the host does. Beyond, flash-attn-4 is the fastest, and a trial takes long."""

_faster = bounded(256)


def _fastest(q: Tensor, k: Tensor, v: Tensor, scale: float, flash: bool) -> Dense:
    """The fastest dense kernel for tensors like these, tried once for each power of two of their length."""
    n, usual = k.shape[2], _flash if flash else _sdpa
    if n > TRIED:
        return usual
    like = [(*t.shape[:2], t.shape[2].bit_length(), t.shape[3], _in_memory(t), t.data_ptr() % 16) for t in (q, k, v)]
    key = (q.device, q.dtype, q.shape[2] == n, flash, *like)
    choice: Dense | None = _faster.recall(key)
    if choice is None:
        if torch.cuda.is_current_stream_capturing():
            return usual
        kernels = [_sdpa, *([_flash] if flash else []), *([_cudnn, _plain] if q.shape[2] == n else [])]
        choice = _faster.keep(key, _tried(kernels, q, k, v, scale))
    return choice


def _in_memory(t: Tensor) -> str:
    """Whether heads or tokens come first in memory; kernels differ in what else they take."""
    if t.stride(-1) != 1:
        return "scattered"
    return "heads" if t.is_contiguous() else "tokens" if t.transpose(1, 2).is_contiguous() else "neither"


def _tried(kernels: Sequence[Dense], q: Tensor, k: Tensor, v: Tensor, scale: float) -> Dense:
    """The fastest of the kernels that run and agree with the first: by the median of interleaved rounds, so that a
    clock that is still rising favours none, of many calls each, since under load clocks differ by kernel."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)  # autotuning has to synchronise
    try:
        stream = torch.cuda.current_stream(q.device)
        wanted = kernels[0](q, k, v, scale)
        taken: dict[Dense, list[float]] = {kernel: [] for kernel in kernels if _agrees(kernel, wanted, q, k, v, scale)}
        calls = min(16, max(1, TRIED // k.shape[2]))
        for _ in range(5):
            for kernel, times in taken.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record(stream)
                for _ in range(calls):
                    kernel(q, k, v, scale)
                end.record(stream)
                end.synchronize()
                times.append(start.elapsed_time(end))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return min(taken, key=lambda kernel: sorted(taken[kernel])[2]) if taken else kernels[0]


def _agrees(kernel: Dense, wanted: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    try:
        found = kernel(q, k, v, scale)
    except Exception:  # not for these tensors; kernels have errors of their own
        return False
    apart = (found - wanted).float().nan_to_num(0.0, 0.0, 0.0)  # where both have none, or infinities, they agree
    same = torch.equal(found.isfinite(), wanted.isfinite())
    return same and bool(apart.norm() <= 0.02 * wanted.float().nan_to_num(0.0, 0.0, 0.0).norm())


def _rows_of_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, step: int = 1024) -> Tensor:
    """SDPA for M < N, where ``is_causal`` would mean the first M keys: in strips, so that no mask is M x N."""
    k, v = _taken(q, k, v)
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
