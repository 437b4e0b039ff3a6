"""The kernels beside their twins, on odd shapes. Run as a script (see test_kernels.py), or ``main("cuda")``."""

from __future__ import annotations

import sys
import unittest.mock
from dataclasses import dataclass
from typing import Any

import sympy
import torch

import mmflex
from mask_builders.estimate import LastQueries, _last, _twin
from mmflex import TokenLayout
from mmflex.integrations.vllm.pages import Buffer, gather_pages, split_pages
from mmflex.ir.pattern import Scope, View
from mmflex.ir.queries import QueryTokens
from mmflex.runtime.device import array_constant
from mmflex.runtime.kernels import blocks as block_kernels
from mmflex.runtime.kernels import fewest as fewest_kernels
from mmflex.runtime.kernels import runs as run_kernels
from mmflex.runtime.kernels import use_triton
from mmflex.runtime.kernels.mass import block_diagonals
from mmflex.runtime.kernels.rows import fill_slots, put_rows, take_rows
from mmflex.runtime.kernels.runs import fused, run_mass
from mmflex.runtime.kernels.select import gathered, heaviest
from mmflex.runtime.kernels.splits import attend_splits, fits


@dataclass(frozen=True)
class Undecided(mmflex.Pattern):
    """Not both, or neither, of two parts of which no bound says whether a block holds anything."""

    joined: Any

    def mask(self, t: mmflex.Tokens) -> Any:
        return ~self.joined(t.q * t.k < 100, (t.q + 3) * t.k <= 400)


def lists(device: str) -> None:
    """Generated classifier kernels against the torch twin, for every kind of atom."""
    from mask_builders import AShape, BlockTopK, Boundary2D, Dilated, Grid, Strided, TriShape, VerticalSlash

    torch.manual_seed(0)
    layout = TokenLayout.from_segments(
        [("text", 90), ("video", (3, 6, 10)), ("text", 40), ("image", (8, 9)), ("text", 50)]
    )
    vs = VerticalSlash(60, 100, 16)
    grid = Grid(90, rows=True, slash=True, local=40, last_q=16)
    boundary = Boundary2D({("video", "video"): grid, ("text", "video"): vs})
    specs = [
        AShape(20, 90),
        TriShape(3, 40, 30),
        vs,
        BlockTopK(3, 8),
        BlockTopK(3, 16),
        grid,
        Strided(90),
        Dilated(5, 99, 3),
        Undecided(sympy.Or),
        Undecided(sympy.And),
    ]
    for batch, lay in ((1, layout), (2, TokenLayout.batch([layout, layout[:200]], side="left"))):
        chosen = [*specs, boundary, vs - AShape(9, 40), [specs[0], vs, grid, specs[7]]]
        for spec in chosen if batch == 1 else [vs, grid, boundary]:
            q, k = (torch.randn(batch, heads, layout.length, 16, device=device) for heads in (4, 2))
            plan = mmflex.plan(q, k, spec, layout=lay, backend="reference", block_size=16)
            with unittest.mock.patch("mmflex.runtime.launches.base.writes_triton", return_value=False):
                twin = mmflex.Plan(plan.program, plan._backend, plan.scale, q, k)
            for number, ready in plan.state.prepared.items():
                other = twin.state.prepared[number]
                for at in (0, 2):
                    assert torch.equal(ready.lists[at], other.lists[at]), (spec, number)
                    used = torch.arange(ready.lists[at + 1].shape[-1], device=device) < ready.lists[at][..., None]
                    assert torch.equal(ready.lists[at + 1] * used, other.lists[at + 1] * used), (spec, number)


def select(device: str) -> None:
    torch.manual_seed(3)
    for shape, budget, forced in [((2, 3, 5000), 700, 30), ((1, 2, 9), 20, 2), ((4, 130), 5, 0), ((1, 1, 300), 300, 9)]:
        for mass in (torch.rand(shape), torch.randint(0, 4, shape).float(), torch.randn(shape), torch.zeros(shape)):
            always = (torch.arange(shape[-1]) < forced).to(device) if forced else None
            keep = heaviest(mass.to(device), budget, always)
            assert keep.shape == shape
            assert bool((keep.sum(-1) == min(budget, shape[-1])).all())
            key = mass.to(device).masked_fill(always, 9.0) if forced else mass.to(device)
            order = key.argsort(dim=-1, descending=True, stable=True)[..., : min(budget, shape[-1])]
            expected = torch.zeros_like(keep).scatter_(-1, order, True)
            # Masses are compared to 23 bits: entries that differ must be that close.
            off = (keep != expected).sum().item()
            assert off == 0 or off <= 2 * mass[..., 0].numel() * 3, off
            fits = torch.ones(1, dtype=torch.int32, device=device)
            index, count = gathered(keep, budget + 7, fits)
            assert fits.item() == 1
            gathered(keep, int(count.max()) - 1, fits)
            assert fits.item() == 0, "more than the capacity, and nothing was said"
            for row, found, n in zip(keep.flatten(0, -2), index.flatten(0, -2), count.flatten(), strict=True):
                true = row.nonzero().flatten().tolist()
                assert int(n) == len(true)
                assert found.tolist() == true + [true[-1]] * (budget + 7 - len(true))


def rows(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for batch, src_heads, heads, n, slots, dim in [(1, 1, 1, 5, 3, 16), (2, 2, 6, 70, 131, 80), (1, 4, 4, 33, 64, 128)]:
        src = torch.randn((batch, src_heads, n, dim), generator=generator).to(device)
        index = torch.randint(-1, n, (batch, heads, slots), generator=generator).to(device)
        wide = torch.full((batch, heads, slots + 5, dim), 7.0, device=device)
        out = take_rows(src, index, wide[:, :, 2 : slots + 2])
        expected = torch.zeros_like(out)
        for b in range(batch):
            for h in range(heads):
                for s in range(slots):
                    if index[b, h, s] >= 0:
                        expected[b, h, s] = src[b, h * src_heads // heads, index[b, h, s]]
        assert torch.equal(out, expected)
        assert bool((wide[:, :, :2] == 7).all())
        assert bool((wide[:, :, slots + 2 :] == 7).all())
        filled(src, index[:, :: heads // src_heads], generator)
        back = torch.full((batch, heads + 1, n, dim), 5.0, device=device)
        unique = torch.stack([torch.randperm(max(n, slots), generator=generator)[:slots] for _ in range(batch * heads)])
        unique = torch.where(unique < n, unique, -1).unflatten(0, (batch, heads)).to(device)
        count = torch.full((batch, heads), slots - 1, device=device)
        put_rows(out, unique, count, torch.arange(1, heads + 1, device=device), back)
        again = torch.full_like(back, 5.0)
        for b in range(batch):
            for h in range(heads):
                for s in range(slots - 1):
                    if unique[b, h, s] >= 0:
                        again[b, h + 1, unique[b, h, s]] = out[b, h, s]
        assert torch.equal(back, again)
        shared = index[:, :1].expand(-1, heads, -1)
        assert torch.equal(take_rows(src, shared)[:, 0], take_rows(src, shared.contiguous())[:, 0])
        src[:, :, ::3, ::2], src[:, :, 1::3, 1::5], src[:, :, 2::4, 2::3] = float("nan"), float("inf"), float("-inf")
        whole = take_rows(src, index)
        assert torch.equal(take_rows(src, index, finite=True), torch.where(whole.isfinite(), whole, 0.0))


def filled(k: torch.Tensor, table: torch.Tensor, generator: torch.Generator) -> None:
    """Slots of keys and values, all at once and the gathered ones later, however the two lie in memory, for some heads,
    with empty slots behind the tokens."""
    batch, src_heads, n, dim = k.shape
    v = torch.randn((batch, src_heads, n, dim - 8), generator=generator).to(k.device)
    ways = [
        (k, v),
        tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)),
        (torch.cat([k, v], -1)[..., :dim], v),
        (k, v.mT.contiguous().mT),
    ]
    main, heads = n + 5, torch.arange(src_heads - 1, -1, -1, device=k.device)
    empty = [torch.zeros_like(t[:, :, :1]).expand(-1, -1, 5, -1) for t in (k, v)]
    wanted = [torch.cat([t[:, heads], e, take_rows(t[:, heads], table)], 2) for t, e in zip((k, v), empty, strict=True)]
    for given in ways:
        out = [torch.full_like(t, 7.0) for t in wanted]
        fill_slots(*given, *out, heads, main, table)
        assert all(map(torch.equal, out, wanted))
        out = [torch.full_like(t, 7.0) for t in wanted]
        fill_slots(*given, *out, heads, main, table, main)
        assert all(bool((t[:, :, :main] == 7).all()) for t in out)
        assert all(torch.equal(t[:, :, main:], w[:, :, main:]) for t, w in zip(out, wanted, strict=True))


def mass(device: str) -> None:
    """Chunks of 128 keys, so that some are seen by every query, and as they are."""
    with unittest.mock.patch("mmflex.runtime.kernels.mass._BLOCKS", 2):
        _mass(device)
    if device != "cpu":
        _mass(device)


def _mass(device: str) -> None:
    torch.manual_seed(2)
    mixed = TokenLayout.from_segments(
        [("text", 90), ("video", (3, 7, 9)), ("text", 70), ("image", (5, 5)), ("text", 31)]
    )
    padded = TokenLayout.batch([mixed, TokenLayout.text(200)], side="left")
    layouts = [(mixed, 1), (padded, 2), (TokenLayout.text(700), 1), (TokenLayout.text(5), 1)]
    for layout, batch in layouts:
        n = layout.length
        for scope in (Scope(), Scope(2, None), Scope(2, 2), Scope(0, 2), Scope(1, 0))[: 5 if layout is mixed else 1]:
            for m, last_q, dim in ((n, 64, 64), (max(1, n // 2), 20, 80))[:: 1 if scope.key is None else -2]:
                q = torch.randn(batch, 4, m, dim, device=device)
                k = torch.randn(batch, 2, n, dim, device=device)
                if scope.query is None:  # neither lies in memory as it is indexed
                    q, k = q.mT.contiguous().mT, k.mT.contiguous().mT
                q[0, 1, -1, 3] = float("nan")
                if m != n:  # scores too great for the sums of a chunk, and infinite ones
                    k[0, 1, n // 3] *= 100.0
                    k[0, 0, n // 4, 2] = float("inf")
                view = View(layout, scope, QueryTokens.last(m, n), 128)
                found = LastQueries(last_q, distances=True)(q, k, view, dim**-0.5)
                plain = LastQueries(last_q)(q, k, view, dim**-0.5) if scope.key is None else found
                last = _last(view, last_q, view.queries)
                on = [None if a is None else array_constant(a, q.device) for a in last.arrays]
                at, limit, _, position, keys = on
                query = take_rows(q, at[:, None].expand(batch, 4, -1))
                keys = None if keys is None else keys.expand(batch, -1)
                twin = _twin(query, k, dim**-0.5, limit.expand(batch, -1), position, last.stand, keys, view.size)
                diagonals = block_diagonals(twin[1], 128)
                pairs = [
                    (found.vertical, twin[0], "vertical"),
                    (found.diagonal, twin[1], "diagonal"),
                    (found.block_diagonals, diagonals, "block diagonals"),
                    (plain.vertical, twin[0], "vertical without distances"),
                    (plain.block_diagonals, diagonals, "block diagonals without distances"),
                ]
                for a, b, what in pairs:
                    error = (a - b).abs().max().item()
                    assert error < 2e-4, (what, layout, scope, m, last_q, error)


def pages(device: str) -> None:
    """Gathering of pages, from caches in both orders of memory, against its twin."""
    generator = torch.Generator().manual_seed(4)
    for blocks, page, heads, dim, tokens in [(9, 16, 2, 64, 100), (5, 32, 1, 80, 160), (40, 16, 3, 128, 1)]:
        for shape, order in (((blocks, 2, page, heads, dim), (0, 1, 3, 2, 4)), ((blocks, heads, page, 2 * dim), None)):
            cache = torch.randn(shape, generator=generator).to(device)
            if order is not None:
                cache = cache.permute(order).contiguous().permute(order)
            table = torch.randperm(blocks, generator=generator).int().to(device)
            keys, values = split_pages(cache, heads, dim)
            given = [Buffer().take(cache, heads, tokens, dim) for _ in range(2)]
            gather_pages(keys, values, table, *given[0])
            with unittest.mock.patch("mmflex.integrations.vllm.pages.use_triton", return_value=False):
                gather_pages(keys, values, table, *given[1])
            assert all(map(torch.equal, *given))
            last = tokens - 1
            assert torch.equal(given[0][0][0, :, last], keys[table[last // page].item(), last % page])


def blocks(device: str) -> None:
    """Sums and peaks of scores by block: odd numbers of keys, rows without keys, numbers that are not finite."""
    generator = torch.Generator().manual_seed(4)
    for batch, kv_heads, group, size, rows, keys, dim in [(1, 1, 1, 16, 3, 70, 16), (2, 2, 3, 32, 2, 193, 80)]:
        heads = kv_heads * group

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        q, means = draw(batch, heads, rows * size, dim), draw(batch, kv_heads, keys, dim) * 3
        means[0, 0, 5] *= 100.0
        q[0, 0, 1] = float("nan")
        q[0, -1, 2, 3] = float("inf")
        limit = torch.randint(-1, keys, (batch, rows * size), generator=generator, dtype=torch.int32).to(device)
        limit[0, :size] = -1
        for bound in (None, draw(batch, kv_heads, keys).abs() * 0.1):
            found = block_kernels.block_sums(q, means, limit, 0.2, size, bound)
            twin = block_kernels._sums_twin(q, means, limit, 0.2, size, bound)
            assert (found[1] is None) == (bound is None)
            for a, b in zip(found, twin, strict=True):
                assert a is None or (a - b).abs().max().item() < 1e-4, (size, bound is None)
            assert bool((found[0][0, :, 0] == 0).all()), "a block of queries that weigh nothing"
        k = draw(batch, heads, keys, dim)
        found, twin = (f(q, k, limit, 0.2, size) for f in (block_kernels.block_maxima, block_kernels._maxima_twin))
        seen = (limit >= 0)[:, None].expand(found[1].shape)
        for a, b in ((found[0], twin[0]), (found[1][seen], twin[1][seen])):
            assert torch.equal(a > float("-inf"), b > float("-inf"))
            assert (a - b).nan_to_num(0.0, 0.0, 0.0).abs().max().item() < 1e-4


def runs(device: str) -> None:
    """Mass of blocks of runs against softmax in float64: rows of unlike reach, scores that are not finite, keys that
    are a part of a longer tensor; summed over a block's queries, and that of the one that gives it most."""
    generator = torch.Generator().manual_seed(5)
    halves = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
    cases = [
        (1, 1, 1, (4, 4), 3, 5, 64), (2, 2, 3, (16, 16), 17, 19, 128), (1, 2, 7, (8, 8), 5, 40, 80),
        (1, 1, 2, (128, 128), 2, 3, 16), (1, 2, 2, (8, 128), 9, 7, 128), (2, 1, 3, (4, 64), 6, 11, 64),
    ]  # fmt: skip
    for batch, kv_heads, group, (few, many), rows, keys, width in cases:
        heads = kv_heads * group
        for dtype in halves:
            q = torch.randn((batch, heads, rows * few, width), generator=generator).to(device, dtype)
            k = torch.randn((batch, kv_heads, keys * many + 9, width), generator=generator).to(device, dtype)
            q[0, 0, 1] = float("nan")
            k[0, -1, many] = float("inf")  # scores of either sign
            k[-1, 0, 2] *= 50.0
            own = heads if many != few else 1  # each head's queries have a reach of their own, or all the same
            reach = torch.randint(-1, keys * many, (batch, own, rows * few), generator=generator, dtype=torch.int32)
            reach[0, :, few : 2 * few] = -1
            reach = reach.to(device)
            assert fused(q, few, many) == (device == "cpu" or dtype != torch.float32)
            scores = q.double() @ k[:, :, : keys * many].double().repeat_interleave(group, 1).mT * 0.3
            column = torch.arange(keys * many, device=device)
            scores = scores.masked_fill(column > reach[..., None], float("-inf"))
            share = scores.softmax(-1).nan_to_num(0.0)
            each = share.unflatten(3, (keys, many)).sum(4).unflatten(2, (rows, few))
            for peak, expected in ((False, each.sum(3)), (True, each.amax(3))):
                # Two tiles of 128 keys a program, so that several share the keys of a row.
                with unittest.mock.patch.object(run_kernels, "_TILES", 2):
                    mass = run_mass(q, k[:, :, : keys * many], reach, (few, many), 0.3, peak)
                assert mass.shape == expected.shape
                assert expected[0, 0].sum() > 0.5
                assert (mass - expected).abs().max().item() < 1e-4, (few, many, width, dtype, peak)


def fewest(device: str) -> None:
    """The kernel keeps what its twin keeps, and that is a prefix of the sorted row that holds enough."""
    generator = torch.Generator().manual_seed(6)
    for shape in ((2, 3, 64), (1, 700), (1, 9001), (2, 1)):
        counts = torch.randint(0, 9, shape, generator=generator).float() / 64  # many equals, sums that are exact
        for mass in (counts, torch.rand(shape, generator=generator), torch.zeros(shape)):
            mass = mass.masked_fill(torch.rand(shape, generator=generator) < 0.1, -1.0)
            first = torch.rand(shape, generator=generator) < 0.05
            total = mass.clamp(min=0.0).sum(-1, keepdim=True, dtype=torch.float64)
            for share, always in ((0.0, None), (0.3, first & (mass >= 0)), (0.9, None), (1.0, first & (mass >= 0))):
                given = [t if t is None else t.to(device) for t in (mass, share * total, always)]
                kept = fewest_kernels.fewest(*given)
                assert torch.equal(kept, fewest_kernels._twin(*given)), (shape, share, always is None)
                kept = kept.cpu()
                forced = torch.zeros_like(kept) if always is None else always
                assert not bool((forced & ~kept).any())
                assert not bool((kept & (mass < 0)).any())
                held = torch.where(kept, mass, 0.0).sum(-1, dtype=torch.float64)
                enough = held >= (share * total)[..., 0] - 1e-6
                assert bool((enough | ((mass > 0) <= kept).all(-1)).all())


def splits(device: str) -> None:
    """A few queries over splits of the keys, merged, against softmax in float64."""
    generator = torch.Generator().manual_seed(7)
    cases = [(1, 1, 7, 1, 4500, 64, 64), (2, 2, 3, 3, 70, 80, 48), (1, 3, 1, 16, 2049, 16, 24)]
    for batch, kv_heads, group, queries, length, dim, width in cases:
        q, k, v = (
            torch.randn(shape, generator=generator).to(device)
            for shape in (
                (batch, kv_heads * group, queries, dim),
                (batch, length + 5, kv_heads, dim),  # tokens first in memory, and room for more
                (batch, kv_heads, length + 5, width),
            )
        )
        k, v = k.transpose(1, 2)[:, :, :length], v[:, :, :length]
        some = (torch.rand((batch, 1, queries, length), generator=generator) < 0.2).to(device)
        some[0, 0, -1] = False
        for seen in (None, some, some[:1, :, :1]):
            assert fits(q, k)
            out, lse = attend_splits(q, k, v, seen, 0.3)
            total = lse.logsumexp(0)
            share = (lse - total.masked_fill(total == float("-inf"), 0.0)).exp()
            merged = (out * share[..., None]).sum(0)
            scores = q.double() @ k.double().repeat_interleave(group, 1).mT * 0.3
            if seen is not None:
                scores = scores.masked_fill(~seen, float("-inf"))
            expected = scores.softmax(-1).nan_to_num(0.0) @ v.double().repeat_interleave(group, 1)
            # errors are those of weights (exp2 of a GPU is 2 ulp off), so they grow with the values that they weigh
            assert (merged - expected).abs().max().item() < 1e-6 * v.abs().max().item()
            known, wanted = total > float("-inf"), scores.logsumexp(-1)
            assert torch.equal(known, wanted > float("-inf"))
            assert torch.where(known, total - wanted, 0.0).abs().max().item() < 2e-5


def main(device: str) -> None:
    assert use_triton(torch.empty(0, device=device)), "the kernels would not run"
    lists(device)
    rows(device)
    select(device)
    mass(device)
    pages(device)
    blocks(device)
    runs(device)
    fewest(device)
    splits(device)
    print("kernels agree")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
