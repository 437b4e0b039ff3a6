"""Programs and block lists of several hundred (spec, layout, backend) combinations, as data to compare with.

    python -m tests.programs            # what differs from tests/programs.json
    python -m tests.programs --write    # after a change that is meant to differ

A change of the compiler that is not meant to change what is computed leaves all of them equal: launches, their token
orders, heads, widths and sizes, and the block lists themselves (as a hash).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import mmflex
from mask_builders import (
    AShape,
    BlockPeaks,
    BlockTopK,
    Boundary2D,
    Dense,
    Dilated,
    FlashPrefill,
    FlexPrefill,
    Grid,
    Prism,
    ProxyAttn,
    QBoundary,
    Strided,
    StridedFixed,
    TriShape,
    VerticalSlash,
    XAttention,
)
from mmflex.compiler.constants import GENERIC, Constants, shipped
from mmflex.compiler.lower import lower
from mmflex.ir.queries import QueryTokens
from mmflex.runtime.attention import Plan
from mmflex.runtime.backends import BACKENDS

PATH = Path(__file__).with_suffix(".json")
HEADS, KV_HEADS, DIM = 4, 2, 16

VS, A = VerticalSlash(60, 90, 16), AShape(20, 70)
GRID = Grid(30, local=64, sink=32, last_q=16)
VIDEO = Grid("frame", local=40, sink=16, last_q=16)
SPECS: dict[str, Any] = {
    "dense": Dense(),
    "a-shape": A,
    "tri-shape": TriShape(20, 40, 30),
    "vertical-slash": VS,
    "columns": VerticalSlash(100, 0, 16),
    "diagonals": VerticalSlash(0, 100, 16),
    "block top-k": BlockTopK(4, 16),
    "block top-k, other blocks": BlockTopK(3, 40),
    "flex prefill": FlexPrefill(0.9, 0.2, 64, 96, 5, 32, 16, 16),
    "x attention": XAttention(8, 0.8, 5, 16),
    "block peaks": BlockPeaks(0.01, 8, 5, 16),
    "x attention, own block": XAttention(8, 0.8, 5, 16, near=1),
    "block top-k, own block": BlockTopK(4, 16, near=1),
    "falling top-k": BlockTopK(12, 16, near=20, decay=0.4),
    "prism": Prism(0.8, 5, 16, near=20),
    "flash prefill": FlashPrefill(0.2, 5, 0.5, 20, 16, 20, 16),
    "proxy attn": ProxyAttn(0.8, 6, 32, block_size=16, near=20),
    "grid": GRID,
    "grid rows": Grid(37, rows=True, local=40, sink=16, last_q=16),
    "grid slash": Grid(37, columns=False, slash=True, local=40, sink=16, last_q=16),
    "grid searched": Grid("search", rows=True, slash=True, local=40, sink=16, last_q=16, shortest=8, longest=90),
    "grid fixed phase": Grid(64, rows=True, slash=True, phase=5, local=1, sink=1),
    "fixed": StridedFixed(48, 5),
    "strided": Strided(48),
    "dilated": Dilated(20, 200, 3),
    "q-boundary": QBoundary({"text": VS, "video": GRID}),
    "2d-boundary": Boundary2D({("text", "text"): A, ("video", "video"): VS, ("text", "video"): VerticalSlash(9, 20)}),
    "restricted": VS.on(query="video", key="video") | A,
    "keys of text": Dense().on(key="text"),
    "union": A | VS,
    "intersection": BlockTopK(6, 16) & Dilated(9, 300, 2),
    "difference": VS - A,
    "nothing": Dense() - Dense(),
    "mixed": [VS, GRID, Dense(), A],
    "mixed lines": [Grid(30, rows=True, local=64, sink=32, last_q=16), VS, VS, BlockTopK(4, 16)],
}
ON_VIDEO: dict[str, Any] = {
    "frames": VIDEO,
    "frames, all lines": Grid("frame", rows=True, slash=True, local=40, sink=16, last_q=16),
    "q-boundary, frames": QBoundary({"text": VS, "video": VIDEO}),
    "strided by frame": Strided("frame"),
    "fixed by frame": StridedFixed("frame"),
    "mixed, frames": [VIDEO, VS, VIDEO, A],
}


def layouts() -> dict[str, tuple[mmflex.TokenLayout, int, int]]:
    """Name -> (layout, queries, tile)."""
    stamped = ("video", (9, 5, 6), {"timestamps": 3})
    plain = [("text", 70), ("video", (8, 6, 7)), ("text", 90), ("image", (9, 13)), ("text", 41)]
    mixed = mmflex.TokenLayout.from_segments(plain)
    other = mmflex.TokenLayout.from_segments([("text", 33), stamped, ("text", 90), stamped, ("text", 8)])
    unlike = mmflex.TokenLayout.batch([mixed[:640], other[20:660]])
    return {
        "text": (mmflex.TokenLayout.text(700), 700, 16),
        "video": (mixed, mixed.length, 16),
        "chunk": (mixed, 210, 16),
        "padded": (mmflex.TokenLayout.batch([mixed, other[:500]], side="left"), mixed.length, 16),
        "unlike": (unlike, 640, 16),
        "tiles of 128": (mmflex.TokenLayout.from_segments([*plain, ("video", (12, 10, 11)), ("text", 60)]), 900, 128),
    }


def backends() -> dict[str, tuple[dict[str, bool], Constants]]:
    """Name -> (what the backend can do, prices)."""
    records = {c.backend: c for c in shipped() if c.backend in ("flash", "cpu") and c.dtype == "bfloat16"}
    return {
        "reference": ({"lse": True, "full_width": False}, GENERIC),
        "flash": ({"lse": True, "full_width": False}, records["flash"]),
        "cpu": ({"lse": False, "full_width": True}, records["cpu"]),
    }


def cases() -> Iterator[tuple[str, Any, mmflex.TokenLayout, int, int, dict[str, bool], Constants]]:
    for layout_name, (layout, queries, tile) in layouts().items():
        for backend_name, (can, constants) in backends().items():
            for name, spec in (SPECS if layout_name == "text" else SPECS | ON_VIDEO).items():
                yield f"{layout_name} / {backend_name} / {name}", spec, layout, queries, tile, can, constants


def planned(
    spec: Any, layout: mmflex.TokenLayout, queries: int, tile: int, can: dict[str, bool], constants: Constants
) -> mmflex.Plan:
    """A plan on the reference backend of the program that a backend would get."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(layout.batch_size, HEADS, queries, DIM, generator=generator)
    k = torch.randn(layout.batch_size, KV_HEADS, layout.length, DIM, generator=generator)
    k[:, :, ::37] *= 2  # some keys that queries like
    patterns = (spec,) * HEADS if isinstance(spec, mmflex.Pattern) else tuple(spec)
    tokens = QueryTokens.last(queries, layout.length)
    program = lower(patterns, layout, tokens, KV_HEADS, tile, constants=constants, **can)
    return Plan(program, BACKENDS["reference"], DIM**-0.5, q, k)


def described(plan: mmflex.Plan) -> list[dict[str, Any]]:
    """The launches of a plan, as data."""
    out = []
    for number, launch in enumerate(plan.program.launches):
        facts: dict[str, Any] = {
            "launch": launch.label,
            "heads": list(launch.heads.heads),
            "width": launch.width,
            "section": getattr(launch, "section", 0),
            "capacity": getattr(launch, "capacity", 0),
            "slots": [launch.row_slots, launch.key_slots],
            "cost": float(f"{launch.cost:.4g}"),
        }
        if launch.lists_blocks:
            prepared = plan.state.prepared[number]
            facts["partial blocks"] = prepared.mask_mod.comparison or "looked up"
            facts["lists"] = _hash(prepared.lists)
        out.append(facts)
    return out


def _hash(lists: tuple[torch.Tensor, ...]) -> str:
    """Of counts and of the entries that they count."""
    digest = hashlib.blake2b(digest_size=8)
    for count, index in (lists[:2], lists[2:]):
        real = torch.arange(index.shape[-1]) < count[..., None]
        digest.update(count.contiguous().numpy().tobytes())
        digest.update(torch.where(real, index, -1).contiguous().numpy().tobytes())
    return digest.hexdigest()


def dump() -> dict[str, list[dict[str, Any]]]:
    """Case -> launches. The expressions themselves are not compared: only what follows from them."""
    torch.set_num_threads(1)
    return {name: described(planned(*rest)) for name, *rest in cases()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    found = dump()
    if write:
        lines = (f"{json.dumps(name)}: {json.dumps(launches)}" for name, launches in found.items())
        PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{len(found)} programs written to {PATH}")
        return
    before = json.loads(PATH.read_text())
    different = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    for name in different:
        print(name, "before", before.get(name), "now", found.get(name), sep="\n  ")
    print(f"{len(found)} programs, {len(different)} differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
