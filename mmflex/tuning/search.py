"""The search for each head's pattern, one layer at a time (MMInference, offline; one calibration prompt).

Three steps, as in the paper: the best pattern for the queries of each modality; the best one for each pair of a query
and a key modality; then the boundary type, none, Q-Boundary or 2D-Boundary, by the error of the whole head (a
K-Boundary is the same as none). What the paper leaves open is done so:

- Errors of rows and heads count by how much the model's answer depends on them, where that is known
  (`probe.Layer.importance`): most heads write next to nothing that the answer needs, for most tokens.
- Candidates are scaled to equal predicted cost (`candidates.Curve`), at one *level* for a budget per head, at several
  for a shared one, from the least that candidates can cost: every candidate that no cheaper one is as good as is an
  option of its head, and a knapsack chooses (`budget`).
- The parts of a boundary pattern divide the head's cost among them by the same knapsack; their squared errors add up
  over query modalities, and over the key modalities nearly so. The chosen combination's error is then computed exactly.
  Parts may also be dense: a few text queries over all keys cost little.
- Of options whose errors differ by no more than ``tie`` (relative) and ``SLACK``, the first in the table is taken, and
  of boundary types the simpler one: the difference would not carry over to another prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..ir.pattern import Dense, Pattern, find
from ..runtime import backends
from . import candidates as table_
from .budget import Budget, Option, knapsack, mean, unreachable
from .pricing import Price, Prices
from .probe import Denoted, Kept, Layer, Probe, chunks, denote, total
from .rows import Group, Rows

SLACK = 0.005
"""Errors this close are equal."""
TARGET = ("AShape", (1024, 4096))
"""The paper's cost for every head: that of an A-shape with a sink of 1k and a window of 4k tokens."""
_LEVELS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.5)
"""Levels of a shared budget, as shares of it: most heads need much less than the mean, so that some can have more."""
_LEAST = 1.1
"""The lowest level of a shared budget, where the cheapest candidate is above that of `_LEVELS`: that candidate's price,
times this."""
_ERROR_LEVELS = (0.05, 0.1, 0.2, 0.4)
"""Levels where the budget is an error, as shares of dense cost."""
_PARTS = (0.25, 0.5, 1.0)
"""Costs that candidates are scaled to where there is but one level, as shares of it: the parts of a boundary pattern
divide it among them."""

_PASSES = 3


@dataclass(frozen=True)
class Settings:
    """What a search does.

    Attributes:
        candidates: patterns, from simple to complex; those with ``levels`` are tried at each (`candidates.at_levels`).
        budget: None: the paper's, the cost of `TARGET` for every head.
        rows: where errors are measured.
        backend: whose costs count; "auto" for the one that would run.
        levels: mean prices of a head at which candidates are compared, as shares of the budget (of dense, where the
            budget is an error); None: the usual ones.
        tie: relative difference of errors that counts as none.
    """

    candidates: tuple[Pattern, ...]
    budget: Budget | None = None
    rows: Rows = field(default_factory=Rows)
    backend: str = "auto"
    levels: tuple[float, ...] | None = None
    tie: float = 0.05


@dataclass(eq=False)
class Search:
    """The search over the layers of a model. `prepare` on the first layer, then `run` on each.

    Attributes:
        total: query heads of all layers.
        budget, table, levels, dense: set by `prepare`: the budget (the default one spelt out), the candidates at their
            costs, the levels in milliseconds (or densities), and a dense head's price.
    """

    settings: Settings
    total: int
    budget: Budget = field(init=False)
    table: tuple[Pattern, ...] = ()
    levels: tuple[float, ...] = ()
    dense: float = 0.0
    _prices: Prices = field(init=False)
    _denoted: dict[Pattern, Denoted | None] = field(default_factory=dict)

    def prepare(self, layer: Layer, table: Sequence[Pattern] = (), levels: Sequence[float] = ()) -> None:
        """Prices the candidates on a layer and scales them to the levels; with ``table`` and ``levels`` (of an earlier
        run) they are taken as they are.

        Raises:
            Unreachable: a budget below the cheapest candidates; names the least.
        """
        settings = self.settings
        backend = backends.resolve(settings.backend, layer.q.device, layer.q.shape[3], layer.q.dtype).name
        self._prices = Prices(layer, backend)
        given = settings.budget
        if given is None:
            name, budgets = TARGET
            target = float(self._prices.of(find(name)(*budgets)).ms.mean())
            given = Budget.cost(min(1.0, target / float(self._prices.dense.ms.mean())), shared=False)
        self.budget = given
        self.dense = float(self._price(self._prices.dense).mean())
        if table:
            self.table, self.levels = tuple(table), tuple(levels)
            return
        offered = table_.at_levels(table_.for_layout(settings.candidates, layer.layout))
        if given.kind == "error":
            self.levels = tuple(share * self.dense for share in settings.levels or _ERROR_LEVELS)
        else:
            limit = given.limit(self.dense, self.total)
            shares = settings.levels or (_LEVELS if given.shared else (1.0,))
            levels = [share * limit for share in shares if share * limit < self.dense] or [limit]
            least = table_.cheapest(offered, self._mean)
            if settings.levels is None and given.shared and min(levels) < least * _LEAST < self.dense:
                levels = [least * _LEAST, *(level for level in levels if level > least * _LEAST)]
            self.levels = tuple(sorted(levels))
        self.table = table_.at_costs(offered, _targets(self.levels), self._mean)
        if given.kind != "error":
            limit = given.limit(self.dense, self.total)
            if min((self._mean(p) for p in self.table), default=self.dense) > limit * (1 + 1e-9):
                least = min(self.dense, table_.cheapest(offered, self._mean))
                raise unreachable(given, least, self.dense, self.total)

    def _price(self, price: Price) -> np.ndarray:
        found: np.ndarray = getattr(price, self.budget.measure)
        return found

    def _mean(self, pattern: Pattern) -> float:
        return float(self._price(self._prices.of(pattern)).mean())

    def _denote(self, pattern: Pattern, layer: Layer) -> Denoted | None:
        """The expression; None where the pattern makes no sense in its scope."""
        if pattern not in self._denoted:
            try:
                self._denoted[pattern] = denote(pattern, layer.layout, layer.tile)
            except ValueError:
                self._denoted[pattern] = None
        return self._denoted[pattern]

    @torch.no_grad()
    def run(self, layer: Layer) -> Found:
        """The options of every head, and each candidate on all of them."""
        self._prices.move_to(layer)
        groups = self.settings.rows.groups(layer.layout, layer.importance)
        modalities = tuple(group.modality for group in groups)
        heads: list[tuple[Option, ...]] = []
        every: list[list[Option]] = []
        for kv in chunks(layer, groups):
            some = _Heads(self, layer, groups, modalities, kv)
            heads += [some.options(h) for h in range(some.count)]
            every += [some.candidates(h) for h in range(some.count)]
        by_pattern: dict[Pattern, list[Option]] = {}
        for option in (option for options in every for option in options):
            by_pattern.setdefault(option.pattern, []).append(option)
        return Found(tuple(heads), tuple(mean(o) for o in by_pattern.values() if len(o) == len(heads)))


@dataclass(frozen=True)
class Found:
    """Of a layer: ``heads``, the options of every head, from cheap to dear, dense last; ``uniform``,
    each candidate that makes sense, as it is on all heads: means, the error that of squares weighted by outputs."""

    heads: tuple[tuple[Option, ...], ...]
    uniform: tuple[Option, ...]


@dataclass(frozen=True, eq=False)
class _Table:
    """Candidates for a part of the attention of some heads. float64 [T, h]: their prices (infinite where a candidate
    makes no sense) and what they add to the squared error of the head and to its recall."""

    patterns: tuple[Pattern, ...]
    prices: tuple[Price | None, ...]
    price: np.ndarray
    error: np.ndarray
    recall: np.ndarray


class _Heads:
    """Some heads of a layer: every candidate measured on every part of their attention."""

    def __init__(
        self, search: Search, layer: Layer, groups: tuple[Group, ...], modalities: tuple[int, ...], kv: slice
    ) -> None:
        self.search, self.layer, self.modalities = search, layer, modalities
        several = len(modalities) > 1
        self.probes = [Probe(layer, group, kv, modalities if several else ()) for group in groups]
        self.first, self.count = self.probes[0].heads.start, self.probes[0].heads.stop - self.probes[0].heads.start
        self.norm = np.maximum(np.sum([_host(p.norm) for p in self.probes], axis=0), 1e-300)  # [strata, h]
        self.rows = np.sum([group.share.sum(1) for group in groups], axis=0)[:, None]
        self.size = np.sum([_host(p.weight) for p in self.probes], axis=0)
        self.weight = np.ones(self.count) if layer.importance is None else self.size
        self.kept: dict[tuple[int, int], list[Kept | None]] = {}
        table = search.table
        self.whole = self._measured(table, table, self.probes)
        self.by_query: list[_Table] = []
        self.by_pair: dict[tuple[int, int], _Table] = {}
        if several:
            parts = (*(p for p in table if not table_.is_boundary(p)), Dense())
            for i, a in enumerate(modalities):
                own = tuple(p.on(query=a) for p in parts)
                self.by_query.append(self._measured(parts, own, self.probes[i : i + 1]))
                for b in modalities:
                    own = tuple(p.on(query=a, key=b) for p in parts)
                    self.by_pair[a, b] = self._paired(parts, own, i, b)

    def _measured(self, patterns: tuple[Pattern, ...], scoped: tuple[Pattern, ...], probes: Sequence[Probe]) -> _Table:
        found: list[list[tuple[Tensor, Tensor]] | None] = []
        for pattern in scoped:
            denoted = self.search._denote(pattern, self.layer)
            found.append(None if denoted is None else [p.error(p.keep(denoted)) for p in probes])
        return self._table(patterns, scoped, found)

    def _paired(self, patterns: tuple[Pattern, ...], scoped: tuple[Pattern, ...], i: int, key: int) -> _Table:
        """A pair by itself: the queries of probe ``i`` see all keys of other modalities."""
        probe = self.probes[i]
        rest = probe.rest(key)
        kept: list[Kept | None] = []
        found: list[list[tuple[Tensor, Tensor]] | None] = []
        for pattern in scoped:
            denoted = self.search._denote(pattern, self.layer)
            kept.append(None if denoted is None else probe.keep(denoted, key))
            part = kept[-1]
            found.append(None if part is None else [probe.error(total([rest, part]))])
        self.kept[self.modalities[i], key] = kept
        return self._table(patterns, scoped, found)

    def _table(
        self,
        patterns: tuple[Pattern, ...],
        scoped: tuple[Pattern, ...],
        found: Sequence[Sequence[tuple[Tensor, Tensor]] | None],
    ) -> _Table:
        shape = (len(patterns), self.count)
        price, error, recall = np.full(shape, np.inf), np.full(shape, np.inf), np.zeros(shape)
        there = [i for i, parts in enumerate(found) if parts is not None]
        heads = slice(self.first, self.first + self.count)
        prices = [self.search._prices.of(scoped[i]) if i in set(there) else None for i in range(len(patterns))]
        if there:
            sums = [[sum(part[which] for part in found[i] or ()) for i in there] for which in (0, 1)]
            lost, held = (_host(torch.stack(which)) for which in sums)  # type: ignore[arg-type]
            error[there], recall[there] = (lost / self.norm).mean(1), (held / self.rows).mean(1)
        for i in there:
            of = prices[i]
            assert of is not None
            price[i] = self.search._price(of)[heads]
        return _Table(patterns, tuple(prices), price, error, recall)

    # ---- choosing --------------------------------------------------------------------------------------------------

    def options(self, h: int) -> tuple[Option, ...]:
        """The options of a head: the best at every level, and every candidate that no cheaper one is as good as; dense
        last."""
        table = self.whole
        offered = [self._at(h, level) for level in self.search.levels]
        if self.search.budget.shared:
            front = _front(table.price[:, h], table.error[:, h])
            offered += [self._single(h, float(table.price[i, h])) for i in front]
        found: list[Option] = []
        for option in offered:
            if option is not None and option.pattern not in {o.pattern for o in found}:
                found.append(option)
        found.sort(key=lambda option: float(getattr(option, self.search.budget.measure)))
        dense = self.search._prices.dense
        head = self.first + h
        price = float(dense.ms[head]), float(dense.density[head])
        found.append(Option(Dense(), "dense", *price, 0.0, 1.0, float(self.weight[h])))
        return tuple(found)

    def candidates(self, h: int) -> list[Option]:
        """Every candidate that makes sense, on all tokens, weighed by the head's squared output: relative errors
        are of use where heads have a choice, but of one pattern for all the absolute ones tell more."""
        table, found = self.whole, []
        for i, price in enumerate(table.prices):
            if price is not None and np.isfinite(table.error[i, h]):
                error, recall = float(table.error[i, h]) ** 0.5, float(table.recall[i, h])
                option = self._option(table.patterns[i], "none", h, [price], error, recall)
                found.append(replace(option, weight=float(self.size[h])))
        return found

    def _at(self, h: int, level: float) -> Option | None:
        """The best option of a head at a level: the third step."""
        found = [self._single(h, level)]
        if self.by_query:
            found += [self._query_boundary(h, level), self._boundary_2d(h, level)]
        options = [option for option in found if option is not None]
        if not options:
            return None
        limit = self._tie(min(option.error for option in options))
        return next(option for option in options if option.error <= limit)

    def _tie(self, error: float) -> float:
        return error * (1 + self.search.settings.tie) + SLACK

    def _option(
        self, pattern: Pattern, boundary: str, h: int, prices: Sequence[Price], error: float, recall: float
    ) -> Option:
        head = self.first + h
        ms, density = (sum(float(getattr(p, name)[head]) for p in prices) for name in ("ms", "density"))
        return Option(pattern, boundary, ms, density, error, recall, float(self.weight[h]))

    def _single(self, h: int, level: float) -> Option | None:
        table = self.whole
        fits = table.price[:, h] <= level * (1 + 1e-9)
        if not fits.any():
            return None
        errors = np.sqrt(table.error[:, h])
        i = int(np.flatnonzero(fits & (errors <= self._tie(errors[fits].min())))[0])
        price = table.prices[i]
        assert price is not None
        return self._option(table.patterns[i], "none", h, [price], float(errors[i]), float(table.recall[i, h]))

    def _parts(self, tables: Sequence[_Table], h: int, level: float) -> list[int] | None:
        """An option for each part, together within the level; the simplest that tie with the best."""
        price, error = ([getattr(t, name)[:, h] for t in tables] for name in ("price", "error"))
        front = [_front(p, e) for p, e in zip(price, error, strict=True)]
        if sum(float(p[f].min()) for p, f in zip(price, front, strict=True)) > level:
            return None
        columns = list(zip(price, error, front, strict=True))
        chosen = knapsack([p[f] for p, _, f in columns], [e[f] for _, e, f in columns], level)
        picked = [int(f[i]) for (_, _, f), i in zip(columns, chosen, strict=True)]
        total = sum(float(e[i]) for e, i in zip(error, picked, strict=True))
        cost = sum(float(p[i]) for p, i in zip(price, picked, strict=True))
        limit = self._tie(total**0.5) ** 2
        for _ in range(_PASSES):  # what one part gives up, another may need for its simpler pattern
            before = list(picked)
            for part, i in enumerate(before):
                rest, room = total - float(error[part][i]), level - (cost - float(price[part][i]))
                good = (price[part] <= room * (1 + 1e-9)) & (rest + error[part] <= limit)
                now = int(np.flatnonzero(good | (np.arange(len(good)) == i))[0])
                total, cost = rest + float(error[part][now]), cost + float(price[part][now] - price[part][i])
                picked[part] = now
            if picked == before:
                break
        return picked

    def _query_boundary(self, h: int, level: float) -> Option | None:
        picked = self._parts(self.by_query, h, level)
        if picked is None:
            return None
        rows = list(zip(self.modalities, self.by_query, picked, strict=True))
        pattern = find("QBoundary")({a: t.patterns[i] for a, t, i in rows})
        error, recall = (sum(float(getattr(t, name)[i, h]) for _, t, i in rows) for name in ("error", "recall"))
        prices = [price for _, t, i in rows if (price := t.prices[i]) is not None]
        return self._option(pattern, "query", h, prices, error**0.5, recall)

    def _boundary_2d(self, h: int, level: float) -> Option | None:
        pairs = list(self.by_pair)
        picked = self._parts([self.by_pair[pair] for pair in pairs], h, level)
        if picked is None:
            return None
        choice = dict(zip(pairs, picked, strict=True))
        pattern = find("Boundary2D")({pair: self.by_pair[pair].patterns[i] for pair, i in choice.items()})
        prices = [price for pair, i in choice.items() if (price := self.by_pair[pair].prices[i]) is not None]
        error, recall = self._exact(h, choice)
        return self._option(pattern, "2d", h, prices, error, recall)

    def _exact(self, h: int, choice: dict[tuple[int, int], int]) -> tuple[float, float]:
        """(error, recall) of a combination of pairs, under one softmax."""
        lost, held = np.zeros((2, len(self.norm)))
        for a, probe in zip(self.modalities, self.probes, strict=True):
            parts = [part for (q, key), i in choice.items() if q == a and (part := self.kept[q, key][i]) is not None]
            found = probe.error(total([Kept(part.sums[h], part.mass[h]) for part in parts]), h)
            lost, held = lost + _host(found[0]), held + _host(found[1])
        error = float((lost / self.norm[:, h]).mean())
        return error**0.5, float((held / self.rows[:, 0]).mean())


def _host(t: Tensor) -> np.ndarray:
    return t.cpu().numpy()


def _targets(levels: Sequence[float]) -> list[float]:
    """The costs that candidates are scaled to."""
    return list(levels) if len(levels) > 1 else [share * levels[0] for share in _PARTS]


def _front(price: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Options that no cheaper one is as good as."""
    order = np.lexsort((error, price))
    best = np.minimum.accumulate(error[order])
    better = np.append(True, error[order][1:] < best[:-1])
    found: np.ndarray = order[better & np.isfinite(price[order])]
    return found
