"""The public `attention` and `plan`."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compiler.lower import Lowering
from ..ir.identity import by_serial
from ..ir.layout import TokenLayout
from ..ir.pattern import EstimateFrom, Pattern
from ..ir.queries import Positions, QueryTokens
from ..ir.shown import shown
from . import recorded
from .caches import bounded
from .calls import TILE, Request, planned
from .inputs import Spec, check_block_size
from .plan import NO_BACKWARD, ForwardOnly, HeadDensity, Plan, outside_graphs, wants_gradient

__all__ = ["TILE", "HeadDensity", "Plan", "Spec", "attention", "plan"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    *,
    layout: TokenLayout | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    query_start: int | None = None,
    query_positions: Positions = None,
    estimate_from: tuple[Tensor, Positions] | None = None,
) -> Any:
    """Causal attention under a sparse mask: a drop-in for causal ``scaled_dot_product_attention`` in prefill.

    Args:
        q: ``[B, Hq, M, D]``, float32, bfloat16 or float16; by default the M queries are the last M of the N tokens.
        k, v: ``[B, Hkv, N, D]``, same dtype and device; Hq is a multiple of Hkv. D from 16 to 256.
        spec: one pattern for all heads, or a sequence of Hq patterns.
        layout: what the N tokens are (and which are padding); text without padding if None.
        scale: of the scores; ``1 / sqrt(D)`` if None.
        backend: "auto", "flash", "triton", "cpu", "dense" or "reference". Only "auto" may run a spec dense: where the
            cost model predicts that planning and sparse blocks take longer (`plan(...).explain()` says so).
        return_lse: also return the log-sum-exp of the scores, float32 ``[B, Hq, M]``, -inf for padding.
        query_start: the token number of the first query, where the queries are not the last M tokens.
        query_positions: the token number of every query, ascending, where they are not consecutive.
        estimate_from: queries that patterns select by, instead of the last ones of q: ``(q [B, Hq, L, D], their token
            numbers)``. A chunk of a prompt that is given the prompt's own last queries selects what the whole prompt
            would. Patterns that score every query block (block top-k and its like) go by q all the same.

    Inside ``torch.compile`` (``fullgraph=True`` included) it is one opaque op. Build patterns and layouts outside the
    compiled function: it recompiles for different ones.

    Returns:
        ``[B, Hq, M, D]`` like q; rows of padding tokens, and rows that may see no key, are 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or spec that do not fit; both values are named.
        RuntimeError: the backend asked for cannot run here; or, in backward, that there is no backward.
    """
    if v is None:
        raise TypeError("v is None: give a tensor [batch, heads, tokens, head_dim]; mmflex.plan takes q and k alone")
    if torch.compiler.is_compiling():
        where = _constant(query_start), _constant(query_positions)
        result = _compiled(q, k, v, spec, layout, scale, backend, return_lse, where, estimate_from)
        return result if return_lse else result[0]
    request = Request(scale, backend, return_lse, _positions(query_start, query_positions))
    recording = recorded.current()
    if recording is not None:
        return recording.add(q, k, v, spec, layout, request)
    plan_ = planned(q, k, v, spec, layout, request, _estimate_from(estimate_from, k))
    if wants_gradient(q, k, v):
        out, lse = ForwardOnly.apply(q, k, v, plan_, return_lse)
    elif plan_.dense_alone:
        out, lse = plan_._attend(q, k, v, return_lse)
    else:
        with torch.no_grad():  # kernels are compiled for this mode
            out, lse = plan_._attend(q, k, v, return_lse)
    return (out, lse) if return_lse else out


@outside_graphs
def plan(
    q: Tensor,
    k: Tensor,
    spec: Spec,
    *,
    layout: TokenLayout | None = None,
    scale: float | None = None,
    backend: str = "auto",
    block_size: int = TILE,
    query_start: int | None = None,
    query_positions: Positions = None,
    estimate_from: tuple[Tensor, Positions] | None = None,
    lowering: Lowering | None = None,
    v: Tensor | None = None,
) -> Plan:
    """What `attention` decides before it computes anything: estimates, selections, orders and block lists.

    Args: as `attention`, and

        v: for patterns that select by values as well (`BlockTopK` with ``values``); others do not look at it.
        block_size: tokens per block (other than 128 for experiments on the reference backend).
        lowering: which of the exact ways to compute the spec to take, whatever the cost model prefers: for tests.
    """
    where = _positions(query_start, query_positions)
    request = Request(scale, backend, False, where, check_block_size(block_size), lowering)
    return planned(q, k, v, spec, layout, request, _estimate_from(estimate_from, k), once=False)


def _positions(start: int | None, positions: Positions) -> int | QueryTokens | None:
    """Where queries are, as something hashable. Their number is checked with the tensors."""
    if start is not None and positions is not None:
        raise ValueError(f"query_start is {shown(start)} and query_positions are given too: give one of the two")
    if start is None and positions is None:
        return None
    start, positions = _number(start), _number(positions)
    if start is not None and (not isinstance(start, int) or isinstance(start, bool)):
        raise TypeError(f"query_start is {shown(start)}: give the token number of the first query")
    where = start if positions is None else positions
    if where is None or isinstance(where, QueryTokens) or (isinstance(where, int) and not isinstance(where, bool)):
        return where
    return QueryTokens.listed(where)  # type: ignore[arg-type]


def _number(value: Any) -> Any:
    """A whole number of numpy or torch as an int (torch.compile makes the second of the first); all else as it is."""
    if isinstance(value, np.generic):
        value = np.asarray(value)
    whole = (isinstance(value, np.ndarray) and value.dtype.kind in "iu") or (
        isinstance(value, Tensor) and not (value.is_floating_point() or value.dtype == torch.bool)
    )
    return int(value) if whole and value.ndim == 0 else value


def _estimate_from(given: tuple[Tensor, Positions] | None, k: Tensor) -> EstimateFrom | None:
    if given is None:
        return None
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[0], Tensor):
        raise TypeError(f"estimate_from is {shown(given)}: give (queries [B, Hq, L, D], their token numbers)")
    if given[0].is_nested or given[0].dim() != 4 or not isinstance(k, Tensor) or k.is_nested or k.dim() != 4:
        raise ValueError(
            "estimate_from and k hold tensors [batch, heads, tokens, head_dim]: one of them has another shape"
        )
    query, positions = given
    return EstimateFrom(query, QueryTokens.of(positions, query.shape[2], k.shape[2]))


# ---- inside torch.compile --------------------------------------------------------------------------------------------

_requests = bounded(256)
"""Serials of a layout and of patterns, and positions -> the objects: what a compiled graph, which holds only the names,
asks for. Evicted ones are still found while somebody else holds the objects, as callers of a compiled function do."""


@torch.compiler.assume_constant_result
def _named(
    layout: str, patterns: tuple[str, ...], start: Any = None, positions: Any = None, estimated: Any = None
) -> str:
    """A name for a spec, a layout, where the queries are (``query_start``, ``query_positions``) and where those of the
    estimate are. Positions are arguments of their own: what torch.compile cannot keep in a tuple it takes by itself."""
    name = "|".join((layout, _written(start, positions), _written(None, estimated), *patterns))
    _requests.keep(name, _asked(name))
    return name


def _asked(name: str) -> tuple[Spec, TokenLayout | None, int | QueryTokens | None, int | QueryTokens | None]:
    """What a name stands for."""
    kept = _requests.recall(name)
    if kept is not None:
        return kept
    layout, where, estimated, *patterns = name.split("|")
    spec = tuple(by_serial(p) for p in patterns)
    return spec, by_serial(layout) if layout else None, _read(where), _read(estimated)


def _constant(positions: Any) -> Any:
    """Positions whose numbers a graph is compiled for: those that change between its calls would be symbols."""
    if isinstance(positions, (list, tuple)):
        return tuple([_constant(position) for position in positions])
    is_number = isinstance(positions, int) and not isinstance(positions, bool)
    return operator.index(positions) if is_number else positions


def _written(start: Any, positions: Any) -> str:
    """Positions as text: "" for none given, "5" for a start, "runs 0:8 16:24" for listed ones."""
    where = _positions(start, positions)
    if isinstance(where, QueryTokens):
        return " ".join(("runs", *(f"{first}:{end}" for first, end in where.runs)))
    return "" if where is None else str(where)


def _read(text: str) -> int | QueryTokens | None:
    kind, *runs = text.split(" ")
    if kind == "runs":
        return QueryTokens(tuple(tuple(map(int, run.split(":"))) for run in runs))  # type: ignore[misc]
    return int(text) if text else None


def _compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    layout: TokenLayout | None,
    scale: float | None,
    backend: str,
    lse: bool,
    where: tuple[Any, Any],
    estimate_from: tuple[Tensor, Positions] | None,
) -> tuple[Tensor, Tensor]:
    """`attention` inside torch.compile: an opaque op: planning is Python and sympy, with kernels of its own."""
    patterns = [spec] * q.shape[1] if isinstance(spec, Pattern) else spec
    query, estimated = (None, None) if estimate_from is None else estimate_from
    serial = "" if layout is None else layout.serial
    name = _named(serial, tuple([p.serial for p in patterns]), *where, _constant(estimated))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _op(q, k, v, name, scale, backend, lse, query)


# Plans keep tensors between calls, which must not be allocated from the pool of a graph captured around this op.
@torch.library.custom_op("mmflex::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    name: str,
    scale: float,
    backend: str,
    return_lse: bool,
    estimate_q: Tensor | None,
) -> tuple[Tensor, Tensor]:
    spec, layout, where, estimated = _asked(name)
    given = None if estimate_q is None else _estimate_from((estimate_q, estimated), k)
    plan_ = planned(q, k, v, spec, layout, Request(scale, backend, return_lse, where), given)
    out, lse = plan_._attend(q, k, v, return_lse)
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if lse is None else lse


@_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    name: str,
    scale: float,
    backend: str,
    return_lse: bool,
    estimate_q: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3] if return_lse else 0, dtype=torch.float32)


@torch.library.custom_op("mmflex::no_backward", mutates_args=())
def _no_backward(grad: Tensor) -> Tensor:
    """Refuses when it runs: compiling a graph that only could go backward is no error."""
    raise RuntimeError(NO_BACKWARD)


@_no_backward.register_fake
def _(grad: Tensor) -> Tensor:
    return grad.new_empty(())


def _keep_shapes(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.shapes = [t.shape for t in inputs[:3]]


def _refuse_backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    refused = _no_backward(grad)
    return *(refused.expand(shape) for shape in ctx.shapes), *[None] * 5


_op.register_autograd(_refuse_backward, setup_context=_keep_shapes)
