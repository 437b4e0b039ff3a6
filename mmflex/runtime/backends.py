"""Backends: which kernels can run a launch here, and why not.

``flash`` and ``triton`` (FlexAttention on CUDA), ``cpu`` (FlexAttention's C++ template), ``dense`` (SDPA),
``reference`` (eager). Quirks of single torch versions are met here and nowhere else.
"""

from __future__ import annotations

import math
import os
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._functorch import config as functorch_config
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ..ir.shown import shown
from . import reference
from .kernels import listing
from .masks import MaskMod, in_strips, maker
from .tracing import quick_tracing


class BlockLists(NamedTuple):
    """Which blocks a launch computes: FlexAttention's index tables, for every prompt, head and query tile.

    A *partial* block is computed under the launch's mask_mod, a *full* one without it; what stands in neither list is
    never computed. Both tables of a launch have one width W, which follows from the spec before any input is seen (up
    to torch 2.11 the Triton template reads the full table with the other's strides). Entries past a count are
    ignored, but hold valid tile numbers all the same, since kernels may load the first of them.

    Attributes:
        partial_count: int32 [B, H, query tiles]. partial_index: int32 [B, H, query tiles, W], key tiles, ascending.
        full_count, full_index: likewise, of the full blocks.
    """

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor


@dataclass(frozen=True)
class Backend:
    """What a backend can do.

    Attributes:
        lse: returns log-sum-exp, so launches can be merged.
        full_width: wants index tables as wide as there are key blocks.
        any_length: takes queries and keys that do not fill whole tiles, where masks are comparisons.
        why_not: device -> the reason why it cannot run there, or None.
    """

    name: str
    lse: bool
    full_width: bool
    why_not: Callable[[torch.device, int, torch.dtype], str | None]
    any_length: bool = False


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
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Hopper (compute capability 9.0)"
    if capability >= (10, 0):  # its kernels there work on two query tiles at once (`q_stage`)
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, for which "
            "flash-attn-4 takes block masks of 256 queries; mmflex lists blocks of 128"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return f"q is {dtype}, it takes bfloat16 and float16"
    if dim > 128 or dim % 8:
        return f"the head dimension is {dim}, it takes multiples of 8 up to 128"
    return _flash_missing()


FLASH_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
"""Environment variables that flash-attn-4 reads when it is imported: whether it keeps compiled kernels on disk,
where."""


def _keep_flash_kernels() -> None:
    """Have flash-attn-4 keep its kernels on disk, as Inductor and Triton do: one takes it about 7 s to compile. Its
    own default is off. What the user has set stays."""
    if any(name in os.environ for name in FLASH_CACHE):
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = root / "mmflex" / "flash-attn-4"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to
        return
    if os.access(place, os.W_OK):
        os.environ.update(zip(FLASH_CACHE, ("1", str(place)), strict=True))


@lru_cache(maxsize=1)
def _flash_missing() -> str | None:
    _keep_flash_kernels()
    try:
        import flash_attn.cute  # noqa: F401
    except Exception as error:
        return f"flash-attn-4 cannot be imported ({type(error).__name__}: {error}); pip install flash-attn-4"
    return None


BACKENDS = {
    b.name: b
    for b in (
        Backend("flash", True, False, _not_flash, any_length=True),
        Backend("triton", True, False, _not_triton),
        Backend("cpu", False, True, _not_on_cpu),
        Backend("dense", True, False, lambda device, dim, dtype: None),
        Backend("reference", True, False, lambda device, dim, dtype: None),
    )
}


def check_name(backend: object) -> None:
    """ValueError for what is no backend's name, nor "auto"."""
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {shown(backend)}: use 'auto', {', '.join(map(repr, BACKENDS))}")


def why_not(
    backend: str, device: torch.device | str, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> str | None:
    """Why a backend cannot run with these tensors; None if it can. ValueError for an unknown name."""
    check_name(backend)
    if backend == "auto":
        raise ValueError(f"backend is 'auto', which is not a backend itself: use {', '.join(map(repr, BACKENDS))}")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {shown(device)}: give one of PyTorch's, such as 'cpu' or 'cuda:0'") from None
    return BACKENDS[backend].why_not(where, head_dim, dtype)


@lru_cache(maxsize=64)
def resolve(backend: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> Backend:
    """The backend to use; "auto" is the fastest that can run. RuntimeError if the one asked for cannot."""
    if backend == "auto":
        reasons = {name: why_not(name, device, head_dim, dtype) for name in ("flash", "triton", "cpu", "reference")}
        chosen = next(name for name, reason in reasons.items() if reason is None)
        if chosen == "triton" and torch.cuda.get_device_capability(device)[0] == 9:
            _notice(f"mmflex runs on Triton; the faster flash backend cannot run: {reasons['flash']}")
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
    lists: BlockLists,
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
    lists = _cut(lists, -(-q.shape[2] // tile), -(-k.shape[2] // tile))
    strips = name == "flash" and q.shape[0] == 1 and mask_mod.one_for_all and _strips(q.shape[2], tile)
    if strips:
        q, k, v, mask_mod, lists = _in_strips(q, k, v, mask_mod, lists, tile)
    arguments = q, k, v, *lists, *mask_mod.captures
    if listing.current() is not None:
        out, sums = AttentionKernel(mask_mod.source, name, tile, scale, lse, strips, arguments).run()
    else:
        kernel = _kernel(mask_mod.source, name, tile, scale, lse, _bucket(name, q, k, v, lists, strips))
        with torch.no_grad():  # grad mode would be one more variant to compile
            out, sums = kernel(*arguments)
    if strips:
        out, sums = _joined(out), None if sums is None else _joined(sums)
    return out[..., :width], sums


@dataclass(frozen=True, eq=False)
class AttentionKernel:
    """A compiled kernel and what it is called with.

    Attributes:
        source: of the mask_mod. backend, tile, scale, lse: as in `attend`. strips: queries are dealt out in strips.
        tensors: q, k, v, the four block lists, what the mask_mod captures.
    """

    source: str
    backend: str
    tile: int
    scale: float
    lse: bool
    strips: bool
    tensors: tuple[Tensor, ...]
    plans: bool = False

    @property
    def name(self) -> str:
        comparison = self.source.partition("return ")[2].strip().partition("\n")[0]
        return f"attention on {self.backend} under {comparison}"

    @property
    def key(self) -> Any:
        """Arguments of `_kernel`."""
        q, k, v, *rest = self.tensors
        bucket = _bucket(self.backend, q, k, v, BlockLists(*rest[:4]), self.strips)
        return self.source, self.backend, self.tile, self.scale, self.lse, bucket

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Output and log-sum-exp; of any content while kernels are listed."""
        listed = listing.current()
        if listed is not None:
            q, _, v, *_ = self.tensors
            listed.add(self)
            out = q.new_empty((*q.shape[:3], v.shape[3]))
            return out, q.new_empty(q.shape[:3], dtype=torch.float32) if self.lse else None
        with torch.no_grad():
            return _kernel(*self.key)(*self.tensors)  # type: ignore[no-any-return]

    def compile(self, device: torch.device) -> None:
        """Compiles it in a call on zeros, which list no block."""
        replace(self, tensors=tuple(_zeros_like(t, device) for t in self.tensors)).run()


def _zeros_like(t: Tensor, device: torch.device) -> Tensor:
    """Zeros that lie in memory as a tensor's elements do, which may lie on each other."""
    last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return torch.zeros(max(0, last + 1), dtype=t.dtype, device=device).as_strided(t.shape, t.stride())


def _cut(lists: BlockLists, rows: int, keys: int) -> BlockLists:
    """BlockLists without the tiles that hold no token, of q and k that are given as they stand. Copied: a kernel is
    compiled once more for lists that have gaps in memory."""
    if rows == lists.partial_count.shape[2] and keys >= lists.partial_index.shape[3]:
        return lists
    return BlockLists(*((t[:, :, :rows] if t.dim() == 3 else t[:, :, :rows, :keys]).contiguous() for t in lists))


STRIP = 16
"""Query tiles of a strip."""

LONG_QUERIES = 1 << 17
"""Queries from which on they are dealt out in strips."""


def _strips(queries: int, tile: int) -> bool:
    """Whether queries are dealt out in strips: of long prompts, whose keys are more than a cache holds, where they fit.
    Others are not padded to fit: the copies would cost what strips save."""
    return queries >= LONG_QUERIES and queries % (STRIP * tile) == 0


def _in_strips(
    q: Tensor, k: Tensor, v: Tensor, mask_mod: MaskMod, lists: BlockLists, tile: int
) -> tuple[Tensor, Tensor, Tensor, MaskMod, BlockLists]:
    """A launch of one prompt as one of many, each with a strip of its queries and the same keys: all are views.

    flash-attn-4 goes through the query tiles of a head, then the heads, then the prompts. Head after head, the keys
    that a group shares are read from memory seven times; strip by strip they are found in the cache.
    """
    size, count = STRIP * tile, q.shape[2] // (STRIP * tile)
    dealt = BlockLists(*(t[0].unflatten(1, (count, STRIP)).transpose(0, 1) for t in lists))
    k, v = (t.expand(count, -1, -1, -1) for t in (k, v))
    strips = q[0].unflatten(1, (count, size)).transpose(0, 1)
    return strips, k, v, in_strips(mask_mod, size), dealt


def _joined(t: Tensor) -> Tensor:
    """[1, H, Q, ...]: strips [strips, H, size, ...] as one prompt again."""
    return t.transpose(0, 1).flatten(1, 2)[None]


def _bucket(backend: str, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, strips: bool) -> Any:
    """What a kernel is compiled for: static shapes. Flash is compiled with dynamic lengths and loses no speed by it."""
    if backend == "flash":
        return (q.dtype, q.device, "strips" if strips else q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    return (q.dtype, q.device, q.shape, k.shape, v.shape, lists.partial_index.shape, q.stride(), k.stride(), v.stride())


def _head_dim(dim: int) -> int:
    """The head dimension that the kernels take: powers of two for FlexAttention, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


@lru_cache(maxsize=1)
def _flash_lse_factor() -> float:
    """What the log-sum-exp of the flash backend has to be multiplied by.

    flash-attn-4 gives a natural logarithm. FlexAttention of torch 2.11 takes it for one of base 2, as Triton's is, and
    multiplies it by ln 2 (pytorch/pytorch#181645). Since 2.13 it does not; builds in between are told by the argument
    that the correction brought, `stats_are_log2`.
    """
    code = flex_attention.__code__
    arguments = {name for c in (code, *code.co_consts) if isinstance(c, types.CodeType) for name in c.co_varnames}
    corrected = torch.torch_version.TorchVersion(torch.__version__) >= "2.13" or "stats_are_log2" in arguments
    return 1.0 if corrected else 1 / math.log(2)


UNCHECKED: dict[str, Any] = (
    {"check_custom_op_aliasing": False} if hasattr(functorch_config, "check_custom_op_aliasing") else {}
)
"""Settings of PyTorch under which layers and attention are compiled. What is kept on disk is found under the same ones
alone: attention is also compiled outside of layers, by other processes."""

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
    make = maker(source)
    lse_factor = _flash_lse_factor() if backend == "flash" else 1.0

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
        return (out[0], out[1].lse if lse_factor == 1.0 else out[1].lse * lse_factor) if lse else (out, None)

    def compiled() -> Callable[..., Any]:
        # Dynamo counts recompiles per code object: each kernel gets its own limit.
        code = run.__code__.replace(co_name=f"mmflex_attend_{compiles}", co_firstlineno=compiles)
        own = types.FunctionType(code, run.__globals__, code.co_name, run.__defaults__, run.__closure__)
        return torch.compile(own, dynamic=None if backend == "flash" else False, fullgraph=True)

    held: list[Callable[..., Any]] = []

    def first(*args: Tensor) -> tuple[Tensor, Tensor | None]:
        """The call that compiles."""
        held[:] = [compiled()]
        with functorch_config.patch(**UNCHECKED):
            if backend != "flash":
                return held[0](*args)
            with _any_length(args, tile, strips=bucket[2] == "strips"), quick_tracing():
                return held[0](*args)

    def attempt(*args: Tensor) -> tuple[Tensor, Tensor | None]:
        """Runs the kernel. What a mask looks up is pipelined through shared memory too and may not fit: then it is
        recompiled without pipelining. One that hits the recompile limit (lengths, strides, inference mode) is compiled
        afresh."""
        global compiles
        try:
            return held[0](*args) if held else first(*args)
        except FailOnRecompileLimitHit:
            pass
        except RuntimeError as error:
            if "No valid triton configs" not in str(error) or options.get("num_stages") == 1:
                raise
            options["num_stages"] = 1
        compiles += 1
        return first(*args)

    return attempt


@contextmanager
def _any_length(args: Sequence[Tensor], tile: int, strips: bool) -> Iterator[None]:
    """In the block torch.compile takes the numbers of queries, keys and listed blocks for symbols. Left to itself it
    compiles for the first length, and for all lengths when it meets a second one: the same kernel twice.

    ``args`` are those of a kernel: q, k, v, the block lists, what the mask captures. The marks are taken off again: the
    tensors may be the caller's, who may have compiled functions as well.
    """
    q, k, v, *rest = args
    lists, captures = rest[:4], rest[4:]
    own, rows = (0, 2) if strips else (2,), (0,) if strips else (2,)
    by_dim: list[tuple[Tensor, tuple[int, ...]]] = [(t, own) for t in (q, k, v)]
    by_dim += [(t, rows if t.dim() == 3 else (*rows, 3)) for t in lists]
    by_dim += [(t, (t.dim() - 1,)) for t in captures if t.shape[-1] >= tile]
    before = [(t, set(vars(t))) for t, _ in by_dim]
    for t, dims in by_dim:
        torch._dynamo.maybe_mark_dynamic(t, [dim for dim in dims if t.shape[dim] > 1])
    try:
        yield
    finally:
        for t, names in before:
            for name in set(vars(t)) - names:
                delattr(t, name)


def block_mask(mask_mod: MaskMod, lists: BlockLists, tile: int, queries: int, keys: int) -> BlockMask:
    """The BlockMask of a launch, as FlexAttention gets it."""
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=tile, mask_mod=mask_mod, seq_lengths=(queries, keys), compute_q_blocks=False
    )
