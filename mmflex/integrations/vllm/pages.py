"""Keys and values of one request out of the paged cache.

A request's tokens lie in pages ("blocks") of the cache, in the order of its block table. Attention over a long context
reads each of them often, so they are copied once into one piece of memory that every layer uses in turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmflex.runtime.kernels import use_triton

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def split_pages(cache: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Views of keys and values ``[blocks, tokens of a block, KV heads, D]`` of FlashAttention's cache.

    ``[blocks, 2, tokens, KV heads, D]`` (vLLM 0.24) or ``[blocks, KV heads, tokens, 2 D]`` (vLLM 0.32), whatever the
    order in memory. ValueError for any other shape.
    """
    shape = tuple(cache.shape)
    if len(shape) == 5 and shape[1] == 2 and shape[3:] == (kv_heads, head_dim):
        return cache[:, 0], cache[:, 1]
    if len(shape) == 4 and shape[1] == kv_heads and shape[3] == 2 * head_dim:
        pages = cache.transpose(1, 2)
        return pages[..., :head_dim], pages[..., head_dim:]
    raise ValueError(
        f"the KV cache has shape {shape} for {kv_heads} KV heads of dimension {head_dim}: mmflex knows "
        "[blocks, 2, tokens, heads, D] and [blocks, heads, tokens, 2 D]"
    )


class Buffer:
    """Memory for the keys and values of one request, ``[2, KV heads, tokens, D]``: taken once, and again only if a
    request is longer. All layers use it in turn, on one stream."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def take(self, like: Tensor, kv_heads: int, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1, KV heads, tokens, D]`` of any content, each contiguous."""
        size = kv_heads * tokens * head_dim
        memory = self.memory
        if memory is None or memory.dtype != like.dtype or memory.device != like.device or memory.numel() < 2 * size:
            self.memory = None  # let go before more is taken
            memory = self.memory = torch.empty(2 * size, dtype=like.dtype, device=like.device)
        shape = (1, kv_heads, tokens, head_dim)
        return memory[:size].view(shape), memory[size : 2 * size].view(shape)


if triton is not None:

    @triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["table"])
    def _gather(
        keys, values, table, out_k, out_v, k_page, k_token, k_head, v_page, v_token, v_head, out_head, tokens, page,
        dim, BLOCK: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        """A block of tokens of one KV head: of the keys, or (in the second half of the grid) of the values."""
        token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        head = tl.program_id(1).to(tl.int64)
        inside = token < tokens
        number = tl.load(table + token // page, mask=inside, other=0).to(tl.int64)
        slot = (token % page).to(tl.int64)
        d = tl.arange(0, DIM)
        keep = inside[:, None] & (d < dim)[None]
        target = head * out_head + token.to(tl.int64)[:, None] * dim + d[None]
        if tl.program_id(2) == 0:
            source = keys + number[:, None] * k_page + slot[:, None] * k_token + head * k_head + d[None]
            tl.store(out_k + target, tl.load(source, mask=keep, other=0.0), mask=keep)
        else:
            source = values + number[:, None] * v_page + slot[:, None] * v_token + head * v_head + d[None]
            tl.store(out_v + target, tl.load(source, mask=keep, other=0.0), mask=keep)


def gather_pages(keys: Tensor, values: Tensor, table: Tensor, out_k: Tensor, out_v: Tensor) -> None:
    """``out[0, h, t] = pages[table[t // page], t % page, h]`` for keys and for values, in one kernel.

    keys, values [blocks, page, KV heads, D], the last dimension contiguous; table int [pages]; out [1, KV heads,
    tokens, D], contiguous.
    """
    heads, tokens, dim = out_k.shape[1:]
    page = keys.shape[1]
    if use_triton(keys) and keys.stride(-1) == values.stride(-1) == 1:
        assert triton is not None
        _gather[(triton.cdiv(tokens, 64), heads, 2)](
            keys, values, table, out_k, out_v, *keys.stride()[:3], *values.stride()[:3], out_k.stride(1), tokens, page,
            dim, BLOCK=64, DIM=triton.next_power_of_2(dim),
        )  # fmt: skip
        return
    index = table[: -(-tokens // page)].long()
    for pages, out in ((keys, out_k), (values, out_v)):
        out[0].copy_(pages.index_select(0, index).flatten(0, 1)[:tokens].transpose(0, 1))


def warm_gathering(like: Tensor, kv_heads: int, head_dim: int) -> None:
    """Compiles what `gather_pages` needs, for a cache of the dtype and device of ``like``."""
    page = 16
    cache = like.new_zeros((1, 2, page, kv_heads, head_dim))
    table = torch.zeros(1, dtype=torch.int32, device=like.device)
    out = like.new_empty((2, 1, kv_heads, page, head_dim))
    gather_pages(*split_pages(cache, kv_heads, head_dim), table, out[0], out[1])


class StridedPages:
    """Reads a cache whose pages are views of tokens (`split_pages`)."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer

    def read(self, impl: Any, layer: Any, cache: Tensor, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The first ``tokens`` keys and values ``[1, KV heads, tokens, D]`` of the request with a block table."""
        keys, values = split_pages(cache, impl.num_kv_heads, impl.head_size)
        k, v = self.buffer.take(cache, impl.num_kv_heads, tokens, impl.head_size)
        gather_pages(keys, values, table, k, v)
        return k, v


class ProbedPages:
    """Reads a cache whose pages are packed for some processor, in an order that is found out by writing to one.

    vLLM's CPU kernels keep keys and values transposed, or tiled for AMX, by instruction set, dtype and version. A block
    whose elements are numbered is written through vLLM's own ``do_kv_cache_update`` into memory of the same shape;
    where each number is found is where that element of every block is.
    """

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.orders: dict[Any, Tensor] = {}

    def read(self, impl: Any, layer: Any, cache: Tensor, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """As `StridedPages.read`."""
        heads, dim = impl.num_kv_heads, impl.head_size
        page = cache[0].numel() // (2 * heads * dim)
        order = self._order(impl, layer, cache, heads, page, dim)
        pages = cache.index_select(0, table[: -(-tokens // page)].long()).flatten(2)
        k, v = self.buffer.take(cache, heads, tokens, dim)
        for number, out in enumerate((k, v)):
            part = pages.index_select(2, order[number].flatten()).unflatten(2, (page, dim))
            out[0].copy_(part.transpose(0, 1).flatten(1, 2)[:, :tokens])
        return k, v

    def _order(self, impl: Any, layer: Any, cache: Tensor, heads: int, page: int, dim: int) -> Tensor:
        """int64 [2, page, D]: where in its head's part of a block each element of keys and values is."""
        key = (cache.dtype, tuple(cache.shape[1:]))
        if key not in self.orders:
            if cache.dim() != 4 or cache.shape[1] != heads:
                raise ValueError(
                    f"the KV cache has shape {tuple(cache.shape)} for {heads} KV heads: mmflex knows "
                    "[blocks, heads, ...]"
                )
            numbers = torch.arange(2 * page * dim).view(2, page, 1, dim).expand(2, page, heads, dim)
            slots = torch.arange(page)
            seen = torch.zeros((heads, 2 * page * dim), dtype=torch.int64)
            # digits of base 256 are exact in every dtype that vLLM computes in
            for place in range(4):
                digit = ((numbers >> (8 * place)) & 255).to(cache.dtype)
                scratch = cache.new_zeros((1, *cache.shape[1:]))
                impl.do_kv_cache_update(layer, digit[0].contiguous(), digit[1].contiguous(), scratch, slots)
                seen += scratch.flatten(2)[0].to(torch.int64) << (8 * place)
            order = seen[0].argsort()
            if not torch.equal(seen, order.argsort().expand(heads, -1)):
                raise ValueError(
                    f"the KV cache of {type(impl).__name__}, shape {tuple(cache.shape)}, does not hold every "
                    "element once: mmflex cannot read it"
                )
            self.orders[key] = order.view(2, page, dim)
        return self.orders[key]
