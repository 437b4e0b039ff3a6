"""What patterns keep of one layer's attention, measured on sampled query rows, without any sparse kernel.

The dense weights of the sampled rows are computed once. Every candidate is then a token mask over them: the kept
weights, renormalised, times v. So nothing is compiled, and one mask tells about all heads of the layer at once.

Errors: with dense outputs o and sparse outputs s, the squared relative error of a head is the mean over strata (see
`rows.Rows`) of ``sum |s - o|^2 / sum |o|^2``. Where it is known how much the model's answers depend on each output
(`Layer.importance`), rows are weighed by it in both sums instead of by strata. Recall is the mean share of attention
mass kept. All come as sums over query modalities, because a boundary pattern is chosen modality by modality.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ..compiler.orders import TokenOrder, given_order
from ..compiler.terms import selected_names
from ..ir.atoms import Member, Touches
from ..ir.layout import TokenLayout
from ..ir.pattern import Dense, Pattern, Scope, Tokens, View, denoted
from ..ir.queries import QueryTokens
from ..runtime.calls import TILE
from ..runtime.classify import Values
from ..runtime.inputs import check
from .rows import LAST_QUERIES, Group

LONGEST = 1 << 15
"""Tokens of the longest sample. Half-precision sums of so many weights do not overflow."""
_HELD = {"cuda": 1 << 28, "cpu": 1 << 23}
"""Weights held at a time, in elements."""


@dataclass(eq=False)
class Layer:
    """q, k and v of one layer and one prompt, as attention sees them (after rotary embedding).

    Attributes:
        index: number of the layer.
        q: [1, Hq, N, D]. k: [1, Hkv, N, D]. v: [1, Hkv, N, Dv]. float32, bfloat16 or float16, one device.
        layout: what the N tokens are.
        scale: of the scores; None: ``1 / sqrt(D)``.
        tile: block size in tokens.
        importance: float32 [Hq, N], how much a squared error in a head's output for a token counts. None: all alike.
    """

    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    scale: float | None = None
    tile: int = TILE
    importance: Tensor | None = field(default=None, repr=False)
    found: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _estimates: dict[Any, Any] = field(default_factory=dict, repr=False)
    _selected: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        try:
            check(self.q, self.k, self.v, Dense(), self.layout)
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {self.index}: {error}") from None
        batch, _, queries, dim = self.q.shape
        if batch != 1 or self.layout.batch_size != 1:
            raise ValueError(f"layer {self.index} holds {batch} prompts: a search takes one prompt, q [1, heads, N, D]")
        if queries != self.k.shape[2]:
            raise ValueError(
                f"layer {self.index} has {queries} queries but {self.k.shape[2]} keys: a search takes a whole prompt"
            )
        check_length(int(self.layout.valid.sum()))
        self.scale = dim**-0.5 if self.scale is None else self.scale

    @property
    def heads(self) -> int:
        return int(self.q.shape[1])

    @property
    def kv_heads(self) -> int:
        return int(self.k.shape[1])

    def select(self, leaves: dict[str, tuple[Pattern, Scope]]) -> None:
        """Runs estimates and selections of patterns by name into ``found``, each once."""
        for name, (pattern, scope) in leaves.items():
            if name in self._selected:
                continue
            n = self.layout.length
            queries, group = QueryTokens.last(n, n), self.heads // self.kv_heads
            view = View(self.layout, scope, queries, self.tile, group, values=self.v)
            estimator, result = pattern.estimator(), None
            if estimator is not None:
                if (estimator, scope) not in self._estimates:
                    assert self.scale is not None
                    self._estimates[estimator, scope] = estimator(self.q, self.k, view, self.scale)
                result = self._estimates[estimator, scope]
            for short, table in pattern.select(result, view).items():
                self.found[f"{short}@{name}"] = table
            self._selected.add(name)


def check_length(tokens: int) -> None:
    """ValueError for a sample that is too short to estimate from or too long to search on."""
    if tokens < LAST_QUERIES:
        raise ValueError(
            f"the sample has {tokens} tokens: patterns are estimated from the last {LAST_QUERIES} queries, so give a "
            "longer one (it should be as long as the prompts are that the config is for)"
        )
    if tokens > LONGEST:
        raise ValueError(f"the sample has {tokens} tokens: a search takes at most {LONGEST}, so give a shorter one")


@dataclass(frozen=True, eq=False)
class Denoted:
    """A pattern in a scope: its expression, and the patterns that select for it."""

    expr: Boolean
    leaves: dict[str, tuple[Pattern, Scope]]


def denote(pattern: Pattern, layout: TokenLayout, tile: int) -> Denoted:
    """The expression of a pattern. ValueError where it makes no sense with this layout (frames, but no video)."""
    t = Tokens(layout, tile)
    return Denoted(denoted(pattern, t), t.leaves)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a mask keeps of dense weights, before it is renormalised: ``sums`` [h, R, Dv] (weights times v) and
    ``mass`` float32 [h, R]."""

    sums: Tensor
    mass: Tensor


class Probe:
    """Dense attention of some heads on the rows of one group.

    Args:
        layer: q, k, v. group: the rows.
        kv: the KV heads, as a slice; the query heads are those that they serve.
        keys: modalities whose keys can be masked on their own (for `keep` with a ``key``).
    """

    def __init__(self, layer: Layer, group: Group, kv: slice, keys: Sequence[int] = ()) -> None:
        self.layer, self.group = layer, group
        share = layer.heads // layer.kv_heads
        self.heads = slice(kv.start * share, kv.stop * share)
        self._share = share
        layout, device = layer.layout, layer.q.device
        half = torch.float16 if device.type == "cuda" else torch.float32
        rows = torch.tensor(group.rows, device=device)
        q = layer.q[0, self.heads].index_select(1, rows).float() * (layer.scale or 1.0)
        k, v = layer.k[0, kv].float(), layer.v[0, kv].float()
        # Half precision takes the sum of 32k weights if no |v| is above 1. Errors are relative: a scale is no matter.
        self._unit = v.abs().amax().clamp(min=1e-30)
        v = (v / self._unit).to(half)
        position = torch.tensor(layout.position[0], device=device)
        seen = (position <= position[rows][:, None]) & (position >= 0)
        scores = (q.unflatten(0, (-1, share)).flatten(1, 2) @ k.mT).unflatten(1, (share, -1)).flatten(0, 1)
        scores = scores.nan_to_num_(0.0).masked_fill_(~seen, float("-inf"))
        weights = (scores - scores.amax(-1, keepdim=True)).exp_().to(half)
        del scores
        every = np.arange(layout.length, dtype=np.int32)
        self._sides: dict[int | None, tuple[Tensor, Tensor, TokenOrder]] = {None: (weights, v, self._order(every))}
        for m in keys:
            own = np.flatnonzero(layout.of(m)[0]).astype(np.int32)
            at = torch.tensor(own, device=device).long()
            self._sides[m] = (weights.index_select(2, at), v.index_select(1, at), self._order(own))
        self._rows = given_order(group.rows, layout.length)
        self.whole = {key: self._times(side[0], side[1]) for key, side in self._sides.items()}
        self.dense = self.whole[None].sums.float() / self.whole[None].mass[..., None]
        self._strata = torch.tensor(group.share, device=device)  # [strata, R]
        self._tokens = torch.tensor(group.tokens, device=device)  # [R]
        self._weights = self._strata[:, None].expand(-1, len(q), -1)  # [strata, h, R]
        if layer.importance is not None:
            important = layer.importance[self.heads].index_select(1, rows).double()
            self._weights = (self._tokens * important)[None]

    def _order(self, keys: np.ndarray) -> TokenOrder:
        """Keys by slot, kept with the layout (with it stay the values of attributes on the device)."""
        layout = self.layer.layout
        return layout.once(("probe keys", keys.tobytes()), lambda: given_order(keys, layout.length))

    def _times(self, weights: Tensor, v: Tensor) -> Kept:
        sums = weights.unflatten(0, (-1, self._share)).flatten(1, 2) @ v
        sums = sums.unflatten(1, (self._share, -1)).flatten(0, 1)
        return Kept(sums, weights.sum(-1, dtype=torch.float32))

    def keep(self, denoted: Denoted, key: int | None = None) -> Kept:
        """What an expression keeps of the weights (``key``: of those on keys of this modality)."""
        weights, v, keys = self._sides[key]
        layer = self.layer
        layer.select(denoted.leaves)
        found = {name: layer.found[name][:, self.heads] for name in selected_names(denoted.expr)}
        values = _Sampled(layer.layout, self._rows, keys, found, layer.q.device, tile=layer.tile)
        mask = values.of(denoted.expr)[0]
        return self._times(weights * mask, v)

    def error(self, kept: Kept, head: int | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """float64 [strata, ...] twice, for the heads that ``kept`` is of: weighed sums over the rows of the squared
        difference from dense (one stratum where rows have an importance), and sums of the share of mass kept."""
        out = kept.sums.float() / kept.mass[..., None].clamp(min=1e-30)
        difference = (out - self.dense[head]).double().square().sum(-1)
        recall = (kept.mass / self.whole[None].mass[head]).double()
        return (self._weights[:, head] * difference).sum(-1), torch.einsum("sr,...r->s...", self._strata, recall)

    def rest(self, key: int) -> Kept:
        """The dense weights on keys of all other modalities."""
        others = [kept for m, kept in self.whole.items() if m not in (None, key)]
        return total(others) if others else Kept(self.dense * 0.0, self.whole[None].mass * 0.0)

    @property
    def norm(self) -> Tensor:
        """float64 [strata, h]: sums over the rows of the squared dense output."""
        return (self._weights * self.dense.double().square().sum(-1)).sum(-1)

    @property
    def weight(self) -> Tensor:
        """float64 [h]: the squared dense output over all rows, each once (or by its importance), in units of v squared:
        how much the squared relative errors of heads count beside each other."""
        rows = self._tokens if self.layer.importance is None else self._weights[0]
        return (rows * self.dense.double().square().sum(-1)).sum(-1) * self._unit.double() ** 2


@dataclass(eq=False)
class _Sampled(Values):
    """Values of expressions on sampled rows. Set tests of whole tiles are looked up once a key tile."""

    tile: int = TILE

    def set_test(self, atom: Any) -> Tensor:
        if isinstance(atom, Member):
            return super().set_test(atom)
        key = atom.args[2] if isinstance(atom, Touches) else atom.args[1]
        if not self._by_tile(key):
            return super().set_test(atom)
        memo = self.keys.__dict__.setdefault("_coarse", {})
        if self.tile not in memo:
            memo[self.tile] = given_order(self.keys.index[0, :: self.tile], self.keys.tokens)
        coarse = Values(self.layout, self.rows, memo[self.tile], self.selections, self.device)
        return coarse.set_test(atom).repeat_interleave(self.tile, -1)[..., : self.keys.slots]

    def _by_tile(self, key: sympy.Expr) -> bool:
        """Whether an expression of the keys is constant on every tile of slots."""
        memo = self.keys.__dict__.setdefault("_by_tile", {})
        if (key, self.tile) not in memo:
            value = self.of(key).flatten()
            first = value[:: self.tile].repeat_interleave(self.tile)[: len(value)]
            memo[key, self.tile] = bool((value == first).all())
        return memo[key, self.tile]


def total(parts: Sequence[Kept]) -> Kept:
    """Parts of the same weights together."""
    sums = torch.stack([part.sums.float() for part in parts]).sum(0)
    return Kept(sums, torch.stack([part.mass for part in parts]).sum(0))


def chunks(layer: Layer, groups: Iterable[Group]) -> Iterator[slice]:
    """KV heads in portions that a probe can hold the weights of."""
    rows = max(len(group.rows) for group in groups)
    each = rows * layer.layout.length * (layer.heads // layer.kv_heads)
    step = max(1, _HELD.get(layer.q.device.type, 1 << 23) // max(1, each))
    for first in range(0, layer.kv_heads, step):
        yield slice(first, min(first + step, layer.kv_heads))
