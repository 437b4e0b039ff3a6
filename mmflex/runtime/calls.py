"""From a call's arguments to its plan: what was decided for an equal call before, or is decided now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compiler import constants
from ..compiler.constants import Constants
from ..compiler.lower import Lowering, lower
from ..compiler.prices import MARGIN, least_ms, predict
from ..compiler.program import Program
from ..ir.layout import TokenLayout
from ..ir.memo import Memo
from ..ir.pattern import Dense, EstimateFrom, Pattern, Tokens, denoted
from ..ir.queries import QueryTokens
from ..ir.shown import shown
from . import backends, replay
from .backends import Backend
from .caches import bounded
from .inputs import Spec, check, check_estimate, check_hash, check_scale, without_autocast
from .kernels.listing import ListedKernel, compile_with_launchers, listing, makes_launchers
from .plan import Plan

TILE = 128
"""Block size: what Hopper's kernels take, and FlexAttention's default."""

CALLS = 512
"""Calls kept for each layout."""
PROGRAMS = 128
"""Programs kept for each layout."""
SENSIBLE = 512
"""Patterns kept for each layout that are known to make sense with it."""


class Request(NamedTuple):
    """What a caller asks for beside tensors. Hashable: equal ones are decided alike.

    Attributes:
        scale: of the scores; None: ``1 / sqrt(D)``.
        backend: a name, or "auto". lse: whether the log-sum-exp is asked for.
        queries: where the queries are, as given (`QueryTokens.of`).
        tile: block size in tokens. lowering: which exact way to compute the spec; None: what the cost model prefers.
    """

    scale: float | None = None
    backend: str = "auto"
    lse: bool = False
    queries: int | QueryTokens | None = None
    tile: int = TILE
    lowering: Lowering | None = None


@dataclass(eq=False)
class _Call:
    """What was decided for a call, and its plan where that does not depend on the values of the input.

    ``kept``: the plan and the stream where it was made, as one tuple, so that another thread never reads one without
    the other. ``met``: it has been planned before.
    """

    runs: Backend
    program: Program
    note: str
    scale: float
    kept: tuple[Plan, int] | None = None
    met: bool = False


_observer: ContextVar[Callable[[Plan], None] | None] = ContextVar("mmflex observer of plans", default=None)


@contextmanager
def observed(observer: Callable[[Plan], None]) -> Iterator[None]:
    """Hands every plan that is made in a ``with`` block to a function, which may keep it."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def planned(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    spec: Spec,
    layout: TokenLayout | None,
    request: Request,
    estimate_from: EstimateFrom | None = None,
    once: bool = True,
) -> Plan:
    """The plan of a call. ``once``: it attends before anything else is planned with its program."""
    observer = _observer.get()
    if observer is not None:  # it may keep the plan, whose tensors the next layer's replay must not overwrite
        token = _observer.set(None)
        try:
            plan = planned(q, k, v, spec, layout, request, estimate_from, once=False)
        finally:
            _observer.reset(token)
        observer(plan)
        return plan
    call = _call(q, k, v, spec, layout, request)
    if estimate_from is not None:
        check_estimate(estimate_from, q)
    kept = call.kept
    if once and kept is not None and (kept[0].dense_alone or kept[1] == replay.stream(q.device)):
        return kept[0]
    if not call.met:
        call.met = True
        if q.is_cuda and makes_launchers() and len(_first_specs) < _first_specs.size:
            _compile_first(call, q, k, v)
    with torch.no_grad(), without_autocast(q.device):
        plan = Plan(call.program, call.runs, call.scale, q, k, call.note, once, estimate_from, v)
    if once and (plan.dense_alone or replay.follows_from_layout(plan.state)):
        call.kept = plan, replay.stream(q.device)
    return plan


def decided(q: Tensor, k: Tensor, spec: Spec, layout: TokenLayout | None, request: Request) -> tuple[Program, str]:
    """The program of a call, and why it is dense if the cost model decided so; nothing is estimated or computed.

    Only shapes, dtypes and the device of q and k are looked at: k may be a view that holds nothing yet. Errors are
    those of `attention`.
    """
    call = _call(q, k, None, spec, layout, request)
    return call.program, call.note


def listed(
    q: Tensor, k: Tensor, v: Tensor, device: torch.device, spec: Spec, layout: TokenLayout | None, request: Request
) -> list[ListedKernel]:
    """The kernels that a call of `attention` runs on a device, beside PyTorch's own: those that plan, then those that
    attend, in their order. Nothing is computed.

    Args:
        q, k, v: as in `attention`, on "meta". device: where they would be.

    Raises:
        What `attention` raises. NotImplementedError: a pattern of other authors selects; its code may launch kernels on
            whatever tensors it is given.
    """
    alike = [torch.empty(1, dtype=t.dtype, device=device).expand(t.shape) for t in (q, k, v)]
    call = _call(alike[0], alike[1], alike[2], spec, layout, request)
    return _listed(call, q, k, v, device, request.lse)


def _listed(call: _Call, q: Tensor, k: Tensor, v: Tensor, device: torch.device, lse: bool) -> list[ListedKernel]:
    if call.runs.name == "reference" or not any(launch.lists_blocks for launch in call.program.launches):
        return []
    for selecting in (part for leaf in call.program.leaves.values() for part in (leaf.pattern, leaf.estimator)):
        if selecting is not None and type(selecting).__module__.partition(".")[0] not in ("mmflex", "mask_builders"):
            raise NotImplementedError(
                f"{type(selecting).__name__} selects by code that may not run on tensors without memory"
            )
    with torch.no_grad(), listing(device) as kernels:
        plan = Plan(call.program, call.runs, call.scale, q, k, call.note, v=v)
        plan.list_kernels(q, k, v, lse)
    return list(kernels.by_key.values())


_first_specs = bounded(16)
"""Specs whose kernels have been compiled before their first plan. Later ones share most kernels with them."""


def _compile_first(call: _Call, q: Tensor, k: Tensor, v: Tensor | None) -> None:
    """Before the first plans of a process: compiles their kernels, so that launchers are made side by side."""
    program = call.program
    key = tuple((group.pattern, group.heads) for group in program.groups), program.kv_heads, q.dtype, q.device
    if _first_specs.recall(key) or replay.stream(q.device) < 0 or torch._C._len_torch_dispatch_stack():
        return  # a mode of the caller's would see the operators of a plan that is not made
    _first_specs.keep(key, True)
    meta = [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (q, k, k if v is None else v)
    ]
    with suppress(Exception):  # then they are compiled one by one, when they are launched
        compile_with_launchers(_listed(call, meta[0], meta[1], meta[2], q.device, False), q.device)


def _call(q: Tensor, k: Tensor, v: Tensor | None, spec: Spec, layout: TokenLayout | None, request: Request) -> _Call:
    """What was decided for an equal call, or is decided now."""
    try:  # everything that `check` looks at, and what a program follows from
        patterns = (spec,) if isinstance(spec, Pattern) else spec
        rest = (
            type(q), q.shape, q.dtype, q.device, q.layout, type(k), k.shape, k.dtype, k.device, k.layout,
            None if v is None else (type(v), v.shape, v.dtype, v.device, v.layout), request,
            type(request.scale), type(request.lse),  # 1 == 1.0 == True
            constants.generation, 0 if q.is_cuda else torch.get_num_threads(),  # a CPU's constants are for its threads
        )  # fmt: skip
        key = (type(spec), rest, *map(_serial, patterns))
        memo = (_text(k.shape[2]) if layout is None else layout).memo
        calls: Memo = memo.recall("calls") or memo.once("calls", lambda: Memo(CALLS))
        call: _Call | None = calls.recall(key)
    except (AttributeError, TypeError, IndexError, RuntimeError):  # `check` says what is wrong
        return _decided(q, k, v, spec, layout, request)
    if call is None:
        for pattern in patterns:
            check_hash(pattern)
        equal = (type(spec), rest, *patterns)  # the same of equal patterns, made anew
        call = calls.recall(equal) or _decided(q, k, v, spec, layout, request)
        for name in (key, equal):
            calls.keep(name, call)
    return call


_serial = attrgetter("serial")


@lru_cache(maxsize=32)
def _text(n: int) -> TokenLayout:
    """The layout of a call without one."""
    return TokenLayout.text(n)


def _decided(q: Tensor, k: Tensor, v: Tensor | None, spec: Spec, layout: TokenLayout | None, request: Request) -> _Call:
    patterns = check(q, k, v, spec, layout)
    scale = check_scale(request.scale, q.shape[3])
    layout = TokenLayout.text(k.shape[2]) if layout is None else layout
    queries = QueryTokens.of(request.queries, q.shape[2], k.shape[2])
    _check_request(request)
    runs = backends.resolve(request.backend, q.device, q.shape[3], q.dtype)
    if request.tile != TILE and runs.name in ("flash", "triton"):
        raise ValueError(
            f"block_size is {request.tile}: backend {runs.name!r} takes blocks of {TILE}; others are for "
            "backend='reference'"
        )
    if request.lse and not runs.lse:
        raise ValueError(
            f"return_lse: backend {runs.name!r} does not give it; use backend='reference' or a CUDA device"
        )
    prices = constants.constants_for(q.device, runs.name, q.dtype, q.shape[3])
    if not q.shape[0]:  # no prompts, and no kernel takes so few
        runs = backends.BACKENDS["dense"]
    program, note = _program(patterns, layout, queries, q.shape[0], k.shape[1], runs, prices, request)
    return _Call(runs, program, note, scale)


def _check_request(request: Request) -> None:
    """TypeError, ValueError for what no caller can ask for."""
    if not isinstance(request.lse, bool):
        raise TypeError(f"return_lse is {shown(request.lse)}: use True or False")
    if not isinstance(request.lowering, Lowering | None):
        raise TypeError(f"lowering is {shown(request.lowering)}: give a Lowering, or None for the cheapest")
    backends.check_name(request.backend)


def _program(
    patterns: tuple[Pattern, ...],
    layout: TokenLayout,
    queries: QueryTokens,
    batch: int,
    kv_heads: int,
    runs: Backend,
    prices: Constants,
    request: Request,
) -> tuple[Program, str]:
    """The program of a spec, kept with the layout, and why it is dense if it is."""
    # "auto" may run a spec dense, where that is predicted to be faster for so many prompts.
    lowering = request.lowering or Lowering()
    may_be_dense = max(1, batch) if request.backend == "auto" and lowering == Lowering() else 0
    key = (patterns, queries, kv_heads, request.tile, runs.name, prices, may_be_dense, lowering)
    programs: Memo = layout.once("programs", lambda: Memo(PROGRAMS))

    def lowered(spec: tuple[Pattern, ...]) -> Program:
        can = {"lse": runs.lse, "full_width": runs.full_width}
        how: Any = {"constants": prices, "lowering": lowering, **can}
        return lower(spec, layout, queries, kv_heads, request.tile, **how)

    def build() -> tuple[Program, str]:
        dense_spec = (Dense(),) * len(patterns)
        if runs.name == "dense" or not queries.count:
            return lowered(dense_spec), "dense: asked for" if queries.count else "no queries"
        if not may_be_dense:
            return lowered(patterns), ""
        dense = lowered(dense_spec)
        dense_ms = predict(dense, batch=may_be_dense).total_ms
        if least_ms(prices) >= dense_ms:  # not worth building, but a spec must make sense
            _check_sense(patterns, layout, request.tile)
            return dense, f"dense: predicted {dense_ms:.3g} ms, any spec takes {least_ms(prices):.3g} ms"
        program = lowered(patterns)
        if not program.is_dense:
            sparse_ms = predict(program, batch=may_be_dense).total_ms
            if sparse_ms * (1 + MARGIN) >= dense_ms:
                return dense, f"dense: predicted {dense_ms:.3g} ms, the spec {sparse_ms:.3g} ms with planning"
        return program, ""

    return programs.once(key, build)


def settled_backend(q: Tensor, k: Tensor, spec: Spec, layout: TokenLayout, queries: QueryTokens) -> str:
    """What "auto" means for all ``queries`` of a prompt, by name: "dense" where that is predicted to be faster. For
    calls that each have some of the queries, and would settle it each in its own way."""
    patterns = (spec,) * q.shape[1] if isinstance(spec, Pattern) else tuple(spec)
    runs = backends.resolve("auto", q.device, q.shape[3], q.dtype)
    prices = constants.constants_for(q.device, runs.name, q.dtype, q.shape[3])
    program, _ = _program(patterns, layout, queries, q.shape[0], k.shape[1], runs, prices, Request())
    return "dense" if program.is_dense else runs.name


def programs_of(layout: TokenLayout) -> list[tuple[Program, str]]:
    """The programs that are kept with a layout, and why each is dense, if it is."""
    return list(layout.once("programs", lambda: Memo(PROGRAMS)).values())


def why_dense(layout: TokenLayout, patterns: tuple[Pattern, ...]) -> str:
    """Why the cost model had the last call with a layout and these patterns run dense; "" where it did not."""
    programs: Memo = layout.once("programs", lambda: Memo(PROGRAMS))
    notes = [note for (kept, *_), (_, note) in list(programs.items()) if kept == patterns]
    return notes[-1].removeprefix("dense: ") if notes else ""


def _check_sense(patterns: tuple[Pattern, ...], layout: TokenLayout, tile: int) -> None:
    """ValueError where a pattern makes no sense with a layout (frames, but no video)."""
    sensible: Memo = layout.once("sensible", lambda: Memo(SENSIBLE))
    for pattern in dict.fromkeys(patterns):
        if sensible.recall((pattern, tile)) is None:
            denoted(pattern, Tokens(layout, tile))
            sensible.keep((pattern, tile), True)
