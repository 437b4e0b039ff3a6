"""The public `attention` and `plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..compiler.constants import Constants, constants_for
from ..compiler.orders import Order
from ..compiler.plan import Launch, Program, build
from ..compiler.predict import MARGIN, least_ms, predict
from ..ir.layout import TokenLayout, listed
from ..ir.pattern import Pattern, Tokens, find
from . import backends, graphs, steps
from .backends import Backend

TILE = 128
"""Block size: what Hopper's kernels take, and FlexAttention's default."""

Spec = Pattern | Sequence[Pattern]


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
    if torch.compiler.is_compiling():
        found = _compiled(q, k, v, spec, layout, scale, backend, return_lse)
        return found if return_lse else found[0]
    plan_ = _planned(q, k, spec, layout, scale, backend, return_lse, v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _ForwardOnly.apply(q, k, v, plan_, return_lse)
        return (out, lse) if return_lse else out
    with torch.no_grad():
        out, lse = plan_._attend(q, k, v, return_lse)
    return (out, lse) if return_lse else out


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
    return _planned(q, k, spec, layout, scale, backend, False, None, block_size, once=False)


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


@torch.library.custom_op("mmflex::attention", mutates_args=())
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


class _ForwardOnly(torch.autograd.Function):
    """Prefill has no backward: asking for one is an error instead of a silent gap in the graph."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan_: Plan, return_lse: bool) -> Any:
        out, lse = plan_._attend(q, k, v, return_lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("mmflex.attention has no backward: it is for prefill; train with the model's own attention")


# ---- input -----------------------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor | None, spec: Spec, layout: TokenLayout | None) -> tuple[Pattern, ...]:
    given = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, t in given.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is {type(t).__name__}: give a tensor [batch, heads, tokens, head_dim]")
        if t.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(t.shape)}: give [batch, heads, tokens, head_dim]")
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} is {t.dtype}: use float32, bfloat16 or float16")
        for what, here, other in (("dtype", t.dtype, q.dtype), ("device", t.device, q.device)):
            if here != other:
                raise TypeError(f"{name} has {what} {here} but q {other}: move one with .to()")
        if t.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch size {t.shape[0]} but q {q.shape[0]}: they must agree")
    heads, kv_heads, n = q.shape[1], k.shape[1], k.shape[2]
    if kv_heads == 0 or heads % kv_heads or not heads:
        raise ValueError(f"q has {heads} heads, k {kv_heads}: the query heads must be a multiple of the KV heads")
    if q.shape[2] > n:
        raise ValueError(f"q has {q.shape[2]} tokens but k {n}: the queries are the last of the keys, so M <= N")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head dimension {q.shape[3]} but k {k.shape[3]}: they must agree")
    if not 16 <= q.shape[3] <= 256:
        raise ValueError(f"the head dimension is {q.shape[3]}: from 16 to 256 are supported; pad with zeros below 16")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)} but k {tuple(k.shape)}: heads and tokens must agree")
    if layout is not None:
        if not isinstance(layout, TokenLayout):
            raise TypeError(f"layout is {type(layout).__name__}: build one with mmflex.TokenLayout.from_segments(...)")
        if layout.length != n:
            raise ValueError(f"the layout has {layout.length} tokens but k {n}: slice it, layout[:{n}], or pad it")
        if layout.batch_size not in (1, q.shape[0]):
            raise ValueError(
                f"the layout has {layout.batch_size} prompts but q {q.shape[0]}: give one each, or one for all"
            )
    if not isinstance(spec, (Pattern, Sequence)) or isinstance(spec, str):
        raise TypeError(f"spec is {spec!r}: give a pattern (see mask_builders), or a sequence of one per query head")
    patterns = (spec,) * heads if isinstance(spec, Pattern) else tuple(spec)
    for p in patterns:
        if not isinstance(p, Pattern):
            raise TypeError(f"spec holds {p!r}: give a pattern (see mask_builders), or one per query head")
    if len(patterns) != heads:
        raise ValueError(
            f"spec has {len(patterns)} patterns for {heads} query heads: give one per head, or a single one"
        )
    return patterns


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
    patterns = _check(q, k, v, spec, layout)
    layout = TokenLayout.text(k.shape[2]) if layout is None else layout
    runs = backends.resolve(backend, q.device, q.shape[3], q.dtype)
    if need_lse and not runs.lse:
        raise ValueError(
            f"return_lse: backend {runs.name!r} does not give it; use backend='reference' or a CUDA device"
        )
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    prices = constants_for(q.device, runs.name, q.dtype, q.shape[3])
    auto = max(1, q.shape[0]) if backend == "auto" else 0
    program, note = _program(patterns, layout, q.shape[2], k.shape[1], tile, runs, prices, auto)
    with torch.no_grad():
        return Plan(program, runs, scale, q, k, note, once)


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
    rest = (m, kv_heads, tile, runs.name, prices, auto)
    quick = ("program of", *(p.serial for p in patterns), *rest)  # equal patterns may be other objects, but seldom are
    if quick in layout.memo:
        return layout.memo[quick]
    key = ("program", patterns, *rest)
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
    layout.memo[quick] = layout.memo[key]
    return layout.memo[key]


_sensible: set[tuple[Any, ...]] = set()


def _check_spec(patterns: tuple[Pattern, ...], layout: TokenLayout, tile: int) -> None:
    """ValueError where a pattern makes no sense with a layout (frames, but no video). Layouts with the same modalities
    and strides are asked once."""
    like = (tile, layout.modalities, *(layout.frame_stride(m) for m in (None, *layout.modalities)))
    for pattern in dict.fromkeys(patterns):
        if (pattern, *like) not in _sensible:
            pattern.denote(Tokens(layout, tile))
            _sensible.add((pattern, *like))


# ---- plan ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class HeadDensity:
    """Computed over causal pairs: 1.0 is dense.

    Attributes:
        heads: float [B, Hq]. total: their mean.
    """

    heads: np.ndarray

    @property
    def total(self) -> float:
        return float(self.heads.mean()) if self.heads.size else 0.0

    def __float__(self) -> float:
        return self.total


class Plan:
    """A planned attention: reusable for other v, or for other q and k of the same shape (with this selection).

    Attributes:
        program: launches, orders and the graph of steps.
        layout, backend, scale: as given or chosen.
        note: why it runs dense, if the cost model decided so; else "".
    """

    def __init__(
        self, program: Program, backend: Backend, scale: float, q: Tensor, k: Tensor, note: str = "", once: bool = False
    ) -> None:
        """``once``: it attends before anything else is planned with its program, whose graph may then be replayed."""
        self.program, self._backend, self.scale, self.note = program, backend, scale, note
        self.layout, self.backend = program.layout, backend.name
        self.shape = (tuple(q.shape), tuple(k.shape))
        self.state = steps.State(program, q.device, q.shape[0])
        for op, key in program.steps("plan"):
            if op == "estimate":
                steps.estimate(self.state, key, q, k, scale)
        if not (once and graphs.replayed(self.state)):
            steps.after_estimates(self.state)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of these tensors under this plan's mask: shapes as planned."""
        _check(q, k, v, self.program.groups[0].pattern, None)
        if (tuple(q.shape), tuple(k.shape)) != self.shape:
            raise ValueError(
                f"planned for q and k of shapes {self.shape}, got {tuple(q.shape)}, {tuple(k.shape)}: plan again"
            )
        with torch.no_grad():
            return self._attend(q, k, v, False)[0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        program, state = self.program, self.state
        # Dense heads are never merged, so they need it only if it is asked for.
        need = need_lse or any(launch.kind == "classes" for launch in program.launches)
        out: Tensor | None = None
        lse: Tensor | None = None
        for _, number in program.steps("attend"):
            launch = program.launches[number]
            if launch.kind == "dense":
                found, sums = self._dense(q, k, v, launch, need_lse)
            else:
                found, sums = backends.attend(
                    self._backend,
                    steps.queries(state, number, q),
                    steps.keys(state, number, k),
                    steps.keys(state, number, v),
                    state.ready[number].mask_mod,
                    state.ready[number].lists,
                    program.tile,
                    self.scale,
                    need,
                )
            whole = launch.heads.all(program.heads)
            if whole and (launch.kind == "dense" or launch.rows.identity) and launch.kind in ("main", "dense"):
                out, lse = found, sums
                continue
            if out is None:
                out = q.new_zeros((*q.shape[:3], v.shape[3]))
                lse = torch.full(q.shape[:3], float("-inf"), device=q.device) if need else None
            steps.place(state, number, out, lse, found, sums)
        if out is None:  # nothing allows anything
            out = q.new_zeros((*q.shape[:3], v.shape[3]))
            lse = torch.full(q.shape[:3], float("-inf"), device=q.device)
        return out, lse if need_lse else None

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, launch: Launch, need: bool) -> tuple[Tensor, Tensor | None]:
        """SDPA for the dense heads, prompt by prompt where there is padding."""
        state, layout = self.state, self.layout
        q = steps.take_heads(q, launch.heads.heads, state)
        k, v = (steps.take_heads(t, launch.heads.kv_heads, state) for t in (k, v))
        if not layout.padded:
            return backends.dense_attention(q, k, v, self.scale, need, self.backend)
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        lse = torch.full(q.shape[:3], float("-inf"), device=q.device) if need else None
        for b in range(q.shape[0]):
            row = b % layout.batch_size
            valid = layout.valid[row]
            for_q = valid[layout.length - q.shape[2] :]
            at_q, at_k = (torch.as_tensor(np.flatnonzero(x)).to(q.device) for x in (for_q, valid))
            own = [t[b : b + 1].index_select(2, at) for t, at in ((q, at_q), (k, at_k), (v, at_k))]
            found, sums = backends.dense_attention(own[0], own[1], own[2], self.scale, need, self.backend)
            out[b].index_copy_(1, at_q, found[0])
            if lse is not None and sums is not None:
                lse[b].index_copy_(1, at_q, sums[0].float())
        return out, lse

    # ---- what it is ----------------------------------------------------------------------------------------------

    def dense_mask(self, rows: Sequence[int] | None = None) -> Tensor:
        """bool [B, Hq, M, N]: the token-level mask, from the expressions alone; of some ``rows`` (query numbers) only,
        if given. For small N, or few rows: it is as large as it says."""
        program, state = self.program, self.state
        layout, m, n = program.layout, program.queries, program.layout.length
        chosen = np.arange(m) if rows is None else np.asarray(rows, dtype=np.int64)
        out = torch.zeros((state.batch, program.heads, len(chosen), n), dtype=torch.bool, device=state.device)
        if not len(chosen) or not n:
            return out
        batch = (layout.batch_size, 1)
        order = Order("tokens", np.tile(chosen.astype(np.int32), batch), m, 1, n - m)
        keys = Order("tokens", np.tile(np.arange(n, dtype=np.int32), batch), n, 1)
        position = torch.as_tensor(layout.position).to(state.device)
        row = position[:, torch.as_tensor(chosen + n - m).to(state.device)]
        causal = (row[:, None, :, None] >= position[:, None, None]) & (position >= 0)[:, None, None]
        for group in program.groups:
            mask = state.values([group.expr], group.heads, order, keys).of(group.expr)
            out[:, list(group.heads)] = mask & causal
        return out

    @property
    def density(self) -> HeadDensity:
        """Pairs in listed blocks over causal pairs, per head and in all (reads the block counts back)."""
        program, tile = self.program, self.program.tile
        pairs = np.zeros((self.state.batch, program.heads))
        layout, m = program.layout, program.queries
        valid = layout.position[:, layout.length - m :]
        causal = np.broadcast_to(np.where(valid >= 0, valid + 1.0, 0.0).sum(1)[:, None], (self.state.batch, 1))
        for number, launch in enumerate(program.launches):
            for i, h in enumerate(launch.heads.heads):
                if h < 0:
                    continue
                if launch.kind == "dense":
                    pairs[:, h] += causal[:, 0]
                else:
                    lists = self.state.ready[number].lists
                    pairs[:, h] += (lists[0] + lists[2])[:, i].sum(-1).cpu().numpy() * float(tile * tile)
        return HeadDensity(pairs / np.maximum(causal, 1.0))

    @property
    def block_masks(self) -> list[tuple[str, BlockMask]]:
        """(order, BlockMask) of every launch that runs FlexAttention; heads as in ``program.launches[i].heads``."""
        out = []
        for number, launch in enumerate(self.program.launches):
            if launch.kind != "dense":
                ready = self.state.ready[number]
                size = (launch.row_slots, launch.key_slots)
                out.append((launch.label, backends.block_mask(ready.mask_mod, ready.lists, self.program.tile, *size)))
        return out

    def explain(self) -> str:
        """What was decided and why: expressions, orders with the cost of the alternatives, launches, blocks."""
        from .explain import explain

        return explain(self)

    def _repr_html_(self) -> str:
        from ..plot import plan_html

        return plan_html(self)

    def __repr__(self) -> str:
        kinds = ", ".join(launch.label for launch in self.program.launches)
        return f"Plan({self.shape[0]} x {self.shape[1]}, backend={self.backend!r}, launches: {kinds})"
