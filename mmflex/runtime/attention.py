"""The public `attention` and `plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compiler import constants
from ..compiler.constants import Constants
from ..compiler.plan import Program, build
from ..compiler.predict import MARGIN, least_ms, predict
from ..ir.layout import TokenLayout, listed
from ..ir.pattern import Pattern, Tokens, denoted, find
from ..ir.shown import shown
from . import backends, graphs
from .backends import Backend
from .inputs import Spec, check_block_size, check_hash, check_scale, without_autocast
from .inputs import check as _check
from .plan import NO_BACKWARD, ForwardOnly, HeadDensity, Plan, outside_graphs, wants_gradient

TILE = 128
"""Block size: what Hopper's kernels take, and FlexAttention's default."""

__all__ = ["TILE", "HeadDensity", "Plan", "Spec", "_check", "attention", "plan"]


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
) -> Any:
    """Causal attention under a sparse mask: a drop-in for causal ``scaled_dot_product_attention`` in prefill.

    Args:
        q: ``[B, Hq, M, D]``, float32, bfloat16 or float16; the M queries are the last M of the N positions.
        k, v: ``[B, Hkv, N, D]``, same dtype and device; Hq is a multiple of Hkv. D from 16 to 256.
        spec: one pattern for all heads, or a sequence of Hq patterns.
        layout: what the N tokens are (and which are padding); text without padding if None.
        scale: of the scores; ``1 / sqrt(D)`` if None.
        backend: "auto", "flash", "triton", "cpu", "dense" or "reference". Only "auto" may run a spec dense: where the
            cost model predicts that planning and sparse blocks take longer (`plan(...).explain()` says so).
        return_lse: also return the log-sum-exp of the scores, float32 ``[B, Hq, M]``, -inf for padding.

    Inside ``torch.compile`` (``fullgraph=True`` included) it is one opaque op; build patterns and layouts outside the
    compiled function, it recompiles for other ones.

    Returns:
        ``[B, Hq, M, D]`` like q; rows of padding tokens, and rows that may see no key, are 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or spec that do not fit; both values are named.
        RuntimeError: the backend asked for cannot run here; or, in backward, that there is no backward.
    """
    if v is None:
        raise TypeError("v is None: give a tensor [batch, heads, tokens, head_dim]; mmflex.plan takes q and k alone")
    if torch.compiler.is_compiling():
        found = _compiled(q, k, v, spec, layout, scale, backend, return_lse)
        return found if return_lse else found[0]
    plan_ = _planned(q, k, spec, layout, scale, backend, return_lse, v)
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
) -> Plan:
    """What `attention` decides before it looks at v: estimates, selections, orders and block lists.

    Args: as `attention`; ``block_size``: tokens per block (other than 128 for experiments on the reference backend).
    """
    return _planned(q, k, spec, layout, scale, backend, False, None, check_block_size(block_size), once=False)


_requests: dict[tuple[str, ...], tuple[Spec, TokenLayout | None]] = {}


@torch.compiler.assume_constant_result
def _request(layout: str, patterns: tuple[str, ...]) -> str:
    """Keeps a spec and layout, given by their serials, for a compiled graph that holds only this name."""
    _requests[(layout, *patterns)] = tuple(listed(p) for p in patterns), listed(layout) if layout else None
    return "|".join((layout, *patterns))


def _compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    layout: TokenLayout | None,
    scale: float | None,
    backend: str,
    lse: bool,
) -> tuple[Tensor, Tensor]:
    """`attention` inside torch.compile: an opaque op: planning is Python and sympy, with kernels of its own."""
    patterns = [spec] * q.shape[1] if isinstance(spec, Pattern) else spec
    request = _request("" if layout is None else layout.serial, tuple([p.serial for p in patterns]))
    return _op(q, k, v, request, q.shape[3] ** -0.5 if scale is None else scale, backend, lse)


# Plans keep tensors between calls, which must not lie in the memory of a graph captured around this op.
@torch.library.custom_op("mmflex::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _op(
    q: Tensor, k: Tensor, v: Tensor, request: str, scale: float, backend: str, return_lse: bool
) -> tuple[Tensor, Tensor]:
    spec, layout = _requests[tuple(request.split("|"))]
    plan_ = _planned(q, k, spec, layout, scale, backend, return_lse, v)
    out, lse = plan_._attend(q, k, v, return_lse)
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if lse is None else lse


@_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, request: str, scale: float, backend: str, return_lse: bool
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
    return *(refused.expand(shape) for shape in ctx.shapes), None, None, None, None


_op.register_autograd(_refuse_backward, setup_context=_keep_shapes)


# ---- what a call runs ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Call:
    """What was decided for a call, and its plan where that does not depend on the values of the input.

    ``prices`` are those of ``generation``. ``held``: the plan and the stream where it was made, one tuple, so that a
    thread on another stream does not read one of the two.
    """

    runs: Backend
    prices: Constants
    generation: int
    program: Program
    note: str
    scale: float
    held: tuple[Plan, int] | None = None


CALLS = 512
"""Calls kept for each layout."""


def _pinned(
    q: Tensor, k: Tensor, v: Tensor | None, spec: Any, layout: TokenLayout | None, rest: tuple[Any, ...]
) -> tuple[Any, dict[Any, _Call]]:
    """Everything that `_check` looks at and a program follows from, as a key, and the layout's calls by such keys. None
    and no calls for what is out of the ordinary."""
    try:
        if not (isinstance(q, Tensor) and isinstance(k, Tensor) and (v is None or isinstance(v, Tensor))):
            return None, {}
        serials = spec.serial if isinstance(spec, Pattern) else (type(spec), *[p.serial for p in spec])
        of_v = None if v is None else (v.shape, v.dtype, v.device, v.layout)
        if layout is None:
            layout = TokenLayout.text(k.shape[2])
        of_k = k.shape, k.dtype, k.device, k.layout
        key = (serials, q.shape, q.dtype, q.device, q.layout, of_k, of_v, *rest)
        hash(key)
        return key, layout.memo.setdefault("calls", {})
    except (AttributeError, TypeError, IndexError, RuntimeError):  # `_check` says what is wrong
        return None, {}


def _planned(
    q: Tensor,
    k: Tensor,
    spec: Spec,
    layout: TokenLayout | None,
    scale: float | None,
    backend: str,
    need_lse: bool,
    v: Tensor | None,
    tile: int = TILE,
    once: bool = True,
) -> Plan:
    usual = scale is None or type(scale) is float
    key, calls = _pinned(q, k, v, spec, layout, (scale, backend, need_lse, tile)) if usual else (None, {})
    call = calls.get(key)
    if call is None or not _holds(call, q):
        alike = None  # the same of equal patterns, made anew
        if key is not None:
            alike = (spec if isinstance(spec, Pattern) else (type(spec), *spec), *key[1:])
            for pattern in (spec,) if isinstance(spec, Pattern) else spec:
                check_hash(pattern)
        call = calls.get(alike)
        if call is None or not _holds(call, q):
            call = _decided(q, k, v, spec, layout, scale, backend, need_lse, tile)
        for name in (key, alike) if key is not None else ():
            if len(calls) >= CALLS:
                calls.pop(next(iter(tuple(calls))), None)  # another thread may be at it too
            calls[name] = call
    held = call.held
    if once and held is not None and (held[0].dense_alone or held[1] == graphs.stream(q.device)):
        return held[0]
    with torch.no_grad(), without_autocast(q.device):
        plan_ = Plan(call.program, call.runs, call.scale, q, k, call.note, once)
    if once and (plan_.dense_alone or graphs.fixed(plan_.state)):
        call.held = plan_, graphs.stream(q.device)
    return plan_


def _holds(call: _Call, q: Tensor) -> bool:
    """Whether the constants that a call was decided by are still those of the device."""
    if q.is_cuda:
        return call.generation == constants.generation
    return call.prices is constants.constants_for(q.device, call.runs.name, q.dtype, q.shape[3])  # threads may change


def _decided(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    spec: Spec,
    layout: TokenLayout | None,
    scale: float | None,
    backend: str,
    need_lse: bool,
    tile: int,
) -> _Call:
    patterns = _check(q, k, v, spec, layout)
    scale = check_scale(scale, q.shape[3])
    if not isinstance(need_lse, bool):
        raise TypeError(f"return_lse is {shown(need_lse)}: use True or False")
    layout = TokenLayout.text(k.shape[2]) if layout is None else layout
    if not isinstance(backend, str) or backend != "auto":
        backends.why_not(backend, q.device, q.shape[3], q.dtype)  # its name, before it is a key
    runs = backends.resolve(backend, q.device, q.shape[3], q.dtype)
    if tile != TILE and runs.name in ("flash", "triton"):
        raise ValueError(
            f"block_size is {tile}: backend {runs.name!r} takes blocks of {TILE}; others are for backend='reference'"
        )
    if need_lse and not runs.lse:
        raise ValueError(
            f"return_lse: backend {runs.name!r} does not give it; use backend='reference' or a CUDA device"
        )
    generation = constants.generation
    prices = constants.constants_for(q.device, runs.name, q.dtype, q.shape[3])
    auto = max(1, q.shape[0]) if backend == "auto" else 0
    if not q.shape[0]:  # no prompts, and no kernel takes so few
        runs = backends.BACKENDS["dense"]
    program, note = _program(patterns, layout, q.shape[2], k.shape[1], tile, runs, prices, auto)
    return _Call(runs, prices, generation, program, note, scale)


def _program(
    patterns: tuple[Pattern, ...],
    layout: TokenLayout,
    m: int,
    kv_heads: int,
    tile: int,
    runs: Backend,
    prices: Constants,
    auto: int,
) -> tuple[Program, str]:
    """The program of a spec, cached with the layout, and why it is dense if it is. ``auto``: it may be, where dense is
    predicted to be faster for that many prompts."""
    key = ("program", patterns, m, kv_heads, tile, runs.name, prices, auto)
    if key not in layout.memo:
        dense_spec = (find("Dense")(),) * len(patterns)
        note = ""
        if runs.name == "dense" or not m:
            note = "dense: asked for" if m else "no queries"
            patterns = dense_spec
        how: Any = {"lse": runs.lse, "full_width": runs.full_width, "constants": prices}
        dense = build(dense_spec, layout, m, kv_heads, tile, **how) if auto else None
        dense_ms = predict(dense, batch=auto).total_ms if dense else 0.0
        if dense and least_ms(prices) >= dense_ms:  # not worth building, but a spec must make sense
            _check_spec(patterns, layout, tile)
            program, note = dense, f"dense: predicted {dense_ms:.3g} ms, any spec takes {least_ms(prices):.3g} ms"
        else:
            program = build(patterns, layout, m, kv_heads, tile, **how)
        if dense and not note and any(launch.kind != "dense" for launch in program.launches):
            sparse_ms = predict(program, batch=auto).total_ms
            if sparse_ms * (1 + MARGIN) >= dense_ms:
                program, note = dense, f"dense: predicted {dense_ms:.3g} ms, the spec {sparse_ms:.3g} ms with planning"
        layout.memo[key] = (program, note)
    return layout.memo[key]


_sensible: set[tuple[Any, ...]] = set()


def _check_spec(patterns: tuple[Pattern, ...], layout: TokenLayout, tile: int) -> None:
    """ValueError where a pattern makes no sense with a layout (frames, but no video). Layouts with the same modalities
    and strides are asked once."""
    like = (tile, layout.modalities, *(layout.frame_stride(m) for m in (None, *layout.modalities)))
    for pattern in dict.fromkeys(patterns):
        if (pattern, *like) not in _sensible:
            denoted(pattern, Tokens(layout, tile))
            _sensible.add((pattern, *like))
