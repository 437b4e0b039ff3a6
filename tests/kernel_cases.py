"""The kernels beside their twins, on odd shapes. Run as a script (see test_kernels.py), or ``main("cuda")``."""

from __future__ import annotations

import sys

import torch

from mask_builders.estimate import LastQueries, _last, _on, _twin
from mmflex import TokenLayout
from mmflex.ir.pattern import Scope, View
from mmflex.runtime.kernels import use_triton
from mmflex.runtime.kernels.lists import compact_into
from mmflex.runtime.kernels.rows import take_rows


def lists(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for batch, heads, rows, tiles, width, out_heads in [(1, 2, 3, 5, 5, 2), (2, 3, 7, 130, 64, 5), (1, 1, 2, 2050, 900, 1)]:
        classes = torch.randint(0, 3, (batch, heads, rows, tiles), generator=generator, dtype=torch.int8).to(device)
        place = torch.randperm(out_heads, generator=generator)[:heads].int().to(device)
        shift = torch.randint(0, 9, (heads,), generator=generator).int().to(device)
        table = torch.zeros((2, batch, out_heads, rows, width), dtype=torch.int32, device=device)
        counts = torch.zeros((2, batch, out_heads, rows), dtype=torch.int32, device=device)
        compact_into(classes, table, counts, place, shift, main_tiles=tiles // 2)
        for kind in (1, 2):
            for b in range(batch):
                for h in range(heads):
                    for r in range(rows):
                        found = [t for t in range(tiles) if classes[b, h, r, t] == kind]
                        moved = [t + int(shift[h]) * (t >= tiles // 2) for t in found]
                        at = int(place[h])
                        assert int(counts[kind - 1, b, at, r]) == len(found)
                        kept = moved[:width]
                        assert table[kind - 1, b, at, r, : len(kept)].tolist() == kept


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
        assert bool((wide[:, :, :2] == 7).all()) and bool((wide[:, :, slots + 2 :] == 7).all())
        shared = index[:, :1].expand(-1, heads, -1)
        assert torch.equal(take_rows(src, shared)[:, 0], take_rows(src, shared.contiguous())[:, 0])


def mass(device: str) -> None:
    torch.manual_seed(2)
    mixed = TokenLayout.from_segments([("text", 90), ("video", (3, 7, 9)), ("text", 70), ("image", (5, 5)), ("text", 31)])
    padded = TokenLayout.batch([mixed, TokenLayout.text(200)], side="left")
    layouts = [(mixed, 1), (padded, 2), (TokenLayout.text(1300), 1), (TokenLayout.text(5), 1)]
    for layout, batch in layouts:
        n = layout.length
        for scope in (Scope(), Scope(2, None), Scope(2, 2), Scope(0, 2), Scope(1, 0)):
            for m, last_q, dim in ((n, 64, 64), (max(1, n // 2), 20, 80)):
                q = torch.randn(batch, 4, m, dim, device=device)
                k = torch.randn(batch, 2, n, dim, device=device)
                q[0, 1, -1, 3] = float("nan")
                view = View(layout, scope, m, 128)
                found = LastQueries(last_q)(q, k, view, dim**-0.5)
                last = _last(view, last_q)
                on = [None if a is None else _on(a, q.device) for a in last.arrays]
                at, limit, _, position, keys = on
                query = take_rows(q, at[:, None].expand(batch, 4, -1))
                keys = None if keys is None else keys.expand(batch, -1)
                twin = _twin(query, k, dim**-0.5, limit.expand(batch, -1), position, last.stand, keys, view.size)
                for a, b, what in zip((found.vertical, found.diagonal), twin, ("vertical", "diagonal"), strict=True):
                    error = (a - b).abs().max().item()
                    assert error < 2e-4, (what, layout, scope, m, last_q, error)


def main(device: str) -> None:
    assert use_triton(torch.empty(0, device=device)), "the kernels would not run"
    lists(device)
    rows(device)
    mass(device)
    print("kernels agree")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
