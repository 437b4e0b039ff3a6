"""Attention over a prompt whose tokens are dealt out to several processes.

``scheme="keys"``: every rank keeps its queries, and K and V of all tokens are gathered. ``scheme="heads"`` (Ulysses):
tokens are exchanged for heads, so that every rank has all tokens of some heads, and the result is exchanged back.
"""

from __future__ import annotations

import zlib
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..ir.layout import TokenLayout
from ..ir.pattern import EstimateFrom, Pattern, SharedQueries
from ..ir.queries import QueryTokens
from ..runtime.attention import ForwardOnly, _asked, _named
from ..runtime.backends import resolve
from ..runtime.caches import bounded
from ..runtime.calls import TILE, Request, planned, settled_backend
from ..runtime.inputs import Spec, check
from .dealing import Dealing
from .estimates import check_whole_layers, estimate_tokens, estimates_from_values, patterns_of
from .ranks import Pending, Ranks

Scheme = Literal["keys", "heads"]

SETTLED_TOGETHER = 1 << 16
"""Tokens up to which "auto" may choose dense attention, for all ranks alike; longer prompts are past any break-even."""

_agreed = bounded(4096)
"""Groups and prompts on which all ranks have been found to agree."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    *,
    mesh: DeviceMesh,
    layout: TokenLayout | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    scheme: Scheme = "keys",
) -> Any:
    """`mmflex.attention` over a prompt of which every rank of ``mesh`` holds a share. Called by all of them.

    Rank r of P holds chunks r and 2 P - 1 - r of 2 P, one behind the other, as `Dealing.head_tail` deals them (and
    torch's context parallel with its load balancing); `shard` cuts a share out of a tensor of all tokens. Patterns
    select what they would in one process: the prompt's last queries are shared, and selection sees all keys.

    Args:
        q: ``[B, Hq, M, D]``, the rank's queries. k, v: ``[B, Hkv, M, D]``, its keys and values; dtypes as
            `mmflex.attention`.
        spec: one pattern for all heads, or a sequence of Hq patterns.
        mesh: with a dimension "cp", over which tokens are dealt out; other dimensions are left alone.
        layout: what all N tokens are; text of P times M tokens if None, which needs equal shares.
        scale, backend, return_lse: as `mmflex.attention`; "auto" settles on the same backend on every rank.
        scheme: "keys" gathers K and V of all tokens; "heads" exchanges tokens for heads, P of which must divide.

    Returns:
        ``[B, Hq, M, D]``, the rank's rows; and float32 ``[B, Hq, M]`` with ``return_lse``.

    Raises:
        ValueError, TypeError: what does not fit, with both values; too few tokens for so many ranks; ranks with unlike
            prompts.
        RuntimeError: another rank has ended or fallen behind.
    """
    if scheme not in ("keys", "heads"):
        raise ValueError(f'scheme is {scheme!r}: use "keys" or "heads"')
    if torch.compiler.is_compiling():
        patterns = [spec] * q.shape[1] if isinstance(spec, Pattern) else spec
        name = _named("" if layout is None else layout.serial, tuple([p.serial for p in patterns]))
        scale = q.shape[3] ** -0.5 if scale is None else scale
        out, lse = _op(q, k, v, name, _group_name(mesh), scale, backend, return_lse, scheme)
    else:
        out, lse = _run(q, k, v, spec, layout, Ranks.of(mesh), scale, backend, return_lse, scheme)
    return (out, lse) if return_lse else out


def shard(whole: Tensor, *, mesh: DeviceMesh, dim: int = 2) -> Tensor:
    """The share of a tensor of all tokens, along ``dim``, that this rank holds. ValueError for too few tokens."""
    ranks = Ranks.of(mesh)
    return Dealing.head_tail(whole.shape[dim], ranks.size).take(whole, ranks.rank, dim)


def unshard(share: Tensor, tokens: int, *, mesh: DeviceMesh, dim: int = 2) -> Tensor:
    """The tensor of all ``tokens`` along ``dim``, on every rank, from everybody's share. ValueError where the share is
    not that of so many tokens."""
    ranks = Ranks.of(mesh)
    dealing = Dealing.head_tail(tokens, ranks.size)
    _check_share("the tensor", share.shape[dim], dealing, ranks)
    return ranks.gather_tokens(share, dealing, dim).finish()


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    layout: TokenLayout | None,
    ranks: Ranks,
    scale: float | None,
    backend: str,
    lse: bool,
    scheme: str,
) -> tuple[Tensor, Tensor | None]:
    check(q, k, v, spec, None)
    layout = TokenLayout.text(ranks.size * q.shape[2]) if layout is None else layout
    dealing = Dealing.head_tail(layout.length, ranks.size)
    for name, t in (("q", q), ("k", k)):
        _check_share(name, t.shape[2], dealing, ranks)
    _check_agreement(ranks, q, k, spec, layout, f"{scheme}, {backend}, {lse}, {scale}")
    if scheme == "heads":
        return attend_by_heads(q, k, v, spec, layout, ranks, dealing, scale=scale, backend=backend, lse=lse)
    estimate = Estimate(q, spec, layout, ranks, dealing)
    keys, values = ranks.gather_tokens(k, dealing), ranks.gather_tokens(v, dealing)
    queries = dealing.queries(ranks.rank)
    return attend(
        q, keys.finish(), values, spec, layout, queries, estimate.finish(), scale=scale, backend=backend, lse=lse
    )


class Estimate:
    """The queries that the patterns of a layer select by, under way to every rank.

    Args:
        q: [B, Hq, M, D], this rank's. dealing: of all tokens with a query, the first of which is token ``first``.
    """

    def __init__(
        self, q: Tensor, spec: Spec, layout: TokenLayout, ranks: Ranks, dealing: Dealing, first: int = 0
    ) -> None:
        self.ranks = ranks
        self.all_queries = QueryTokens(((first, first + dealing.total),))
        self.tokens = estimate_tokens(patterns_of(spec), layout, dealing, first)
        self.pending: Pending | None = None
        if self.tokens:
            self.pending = ranks.pick_tokens(q, dealing, tuple(token - first for token in self.tokens))

    def finish(self) -> EstimateFrom | None:
        """None where patterns estimate nothing."""
        if self.pending is None:
            return None
        shared = SharedQueries(self.all_queries, lambda t: self.ranks.sum(t).finish())
        return EstimateFrom(self.pending.finish(), QueryTokens.listed(self.tokens), shared)


def attend(
    q: Tensor,
    k: Tensor,
    v: Pending,
    spec: Spec,
    layout: TokenLayout,
    queries: QueryTokens,
    estimate_from: EstimateFrom | None,
    *,
    scale: float | None,
    backend: str,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of some queries of a prompt to all its keys; values may arrive while it is planned, unless patterns
    select by them.

    Args:
        q: [B, Hq, M, D]. k: [B, Hkv, N, D]. v: likewise, awaited when planning is done.
        queries: which tokens q are.

    Returns:
        [B, Hq, M, D], and float32 [B, Hq, M] if asked for.
    """
    if backend == "auto":
        backend = _settled(q, k, spec, layout)
    if not queries.count:
        v.finish()
        return q.clone(), q.new_empty(q.shape[:3], dtype=torch.float32) if lse else None
    request = Request(scale, backend, lse, queries)
    values = v.finish() if estimates_from_values(patterns_of(spec), layout) else None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        plan = planned(q, k, values, spec, layout, request, estimate_from)
        return ForwardOnly.apply(q, k, v.finish() if values is None else values, plan, lse)
    with torch.no_grad():  # kernels are compiled for this mode
        plan = planned(q, k, values, spec, layout, request, estimate_from)
        return plan._attend(q, k, v.finish() if values is None else values, lse)


def attend_by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    layout: TokenLayout,
    ranks: Ranks,
    dealing: Dealing,
    *,
    scale: float | None,
    backend: str,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `attention` with ``scheme="heads"``: q [B, Hq, M, D], k and v [B, Hkv, M, D], this rank's shares.

    Raises:
        ValueError: KV heads that the ranks do not divide, or a pattern that needs more of them than a rank has; both
            numbers are named.
    """
    check_heads(k.shape[1], ranks.size)
    check_whole_layers(patterns_of(spec), layout, q.shape[1], k.shape[1], ranks.size)
    backend = _settled(q, k, spec, layout) if backend == "auto" else backend
    pending = [tokens_for_heads(t, ranks, dealing) for t in (q, k, v)]
    own = spec if isinstance(spec, Pattern) else tuple(spec)[own_heads(q.shape[1], ranks)]
    queries = QueryTokens.last(dealing.total, layout.length)
    out, sums = attend(
        pending[0].finish(), pending[1].finish(), pending[2], own, layout, queries, None,
        scale=scale, backend=backend, lse=lse,
    )  # fmt: skip
    return heads_for_tokens(out, ranks, dealing), None if sums is None else heads_for_tokens(sums, ranks, dealing)


def check_heads(kv_heads: int, ranks: int) -> None:
    """ValueError unless the ranks can have equally many KV heads each."""
    if kv_heads % ranks:
        raise ValueError(
            f'scheme="heads" gives every rank some of the heads, but {kv_heads} KV heads do not divide by {ranks} '
            f'ranks: use scheme="keys", or a number of ranks that divides {kv_heads}'
        )


def own_heads(heads: int, ranks: Ranks) -> slice:
    """Of so many heads, those that this rank attends with under ``scheme="heads"``."""
    each = heads // ranks.size
    return slice(ranks.rank * each, (ranks.rank + 1) * each)


def tokens_for_heads(share: Tensor, ranks: Ranks, dealing: Dealing) -> Pending:
    """[B, H, M, D] of a rank's tokens -> [B, H / P, N, D], all tokens of its heads."""
    parts = dealing.padded(share, 2).unflatten(1, (ranks.size, -1)).movedim(1, 0)
    return ranks.all_to_all(parts).then(lambda t: dealing.restore(t, 2))


def heads_for_tokens(whole: Tensor, ranks: Ranks, dealing: Dealing) -> Tensor:
    """[B, H / P, N, ...] of a rank's heads -> [B, H, M, ...], its tokens of all heads."""
    shares = [dealing.padded(dealing.take(whole, rank, 2), 2) for rank in range(ranks.size)]
    back = ranks.all_to_all(torch.stack(shares)).finish().movedim(0, 1).flatten(1, 2)
    return back.narrow(2, 0, dealing.counts[ranks.rank])


# ---- checks ----------------------------------------------------------------------------------------------------------


def _settled(q: Tensor, k: Tensor, spec: Spec, layout: TokenLayout) -> str:
    """The backend that "auto" is for a prompt, the same on every rank."""
    if layout.length > SETTLED_TOGETHER:
        return resolve("auto", q.device, q.shape[3], q.dtype).name
    return settled_backend(q, k, spec, layout, QueryTokens.last(layout.length, layout.length))


def _check_share(name: str, tokens: int, dealing: Dealing, ranks: Ranks) -> None:
    wanted = dealing.counts[ranks.rank]
    if tokens != wanted:
        raise ValueError(
            f"{name} has {tokens} tokens, but rank {ranks.rank} of {ranks.size} holds {wanted} of {dealing.total} "
            f"({dealing.queries(ranks.rank)}): cut its share out with mmflex.distributed.shard; without layout=, all "
            f"shares are equal, multiples of {2 * TILE} tokens"
        )


def _check_agreement(ranks: Ranks, q: Tensor, k: Tensor, spec: Spec, layout: TokenLayout, options: str) -> None:
    """ValueError where another rank has another prompt. Once for every prompt: it waits for all ranks."""
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    patterns = str(spec) if isinstance(spec, Pattern) else "; ".join(map(str, spec))
    facts = {
        "tokens": layout.length,
        "prompts": q.shape[0],
        "query heads": q.shape[1],
        "KV heads": k.shape[1],
        "a layout with fingerprint": int(layout.fingerprint, 16) >> 1,
        "a spec with checksum": zlib.crc32(patterns.encode()),
        "options with checksum": zlib.crc32(options.encode()),
    }
    key = (ranks.name, *facts.values())
    if _agreed.recall(key) is None:
        ranks.agree(facts, q.device)
        _agreed.keep(key, True)


# ---- inside torch.compile --------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _group_name(mesh: DeviceMesh) -> str:
    return Ranks.of(mesh).name


@torch.library.custom_op("mmflex::distributed_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    name: str,
    group: str,
    scale: float,
    backend: str,
    return_lse: bool,
    scheme: str,
) -> tuple[Tensor, Tensor]:
    spec, layout, _, _ = _asked(name)
    out, lse = _run(q, k, v, spec, layout, Ranks.named(group), scale, backend, return_lse, scheme)
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if lse is None else lse


@_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    name: str,
    group: str,
    scale: float,
    backend: str,
    return_lse: bool,
    scheme: str,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3] if return_lse else 0, dtype=torch.float32)
