"""Heads whose best pattern is known by construction, to see whether a search finds it.

A head is a boundary type and a structure for each part of its attention: for all pairs, for the queries of a modality,
or for a pair of modalities. Scores are ``STRONG`` on the pairs of the structure and on a few sink keys, noise
elsewhere: keys carry random codes, and queries the codes of the keys that they want. Every part has dimensions of its
own. Values are noise around a mean that varies along the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mask_builders import AShape, BlockTopK, Boundary2D, Grid, QBoundary, VerticalSlash
from mmflex import Pattern, TokenLayout
from mmflex.tuning.candidates import Besides

STRONG = 16.0
"""Score of a planted pair; the others are noise with a standard deviation of about 2."""
NOISE = 0.25
"""Standard deviation of the entries of keys."""
SINKS = 4
AXES = 8
"""Dimensions of a part for directions of their own: of sinks and columns."""
TEXT, VIDEO = 0, 2


@dataclass(frozen=True)
class Scale:
    """Sizes of an experiment; structures grow with the tile.

    Attributes:
        tile: block size in tokens. frames: of each of the two videos. side: cells of a frame's side.
        dim: head dimension. last_q: queries that patterns are estimated from.
    """

    tile: int = 16
    frames: int = 23
    side: int = 5
    dim: int = 256
    last_q: int = 32

    @property
    def layout(self) -> TokenLayout:
        """Two videos with timestamps of unequal length in front of their frames, and text around them: half of each."""
        stamps = tuple(2 + 3 * (i % 3) for i in range(self.frames))
        text = (2 * self.frames * self.side**2 - 2 * sum(stamps)) // 3
        video = ("video", (self.frames, self.side, self.side), {"timestamps": stamps})
        return TokenLayout.from_segments([("text", text), video, ("text", text), video, ("text", text)])

    @property
    def stride(self) -> int:
        """Of grids that do not follow the frames."""
        return 3 * self.tile // 2 + 1

    def table(self) -> tuple[Pattern, ...]:
        """The paper's families, with sinks, block sizes and neighbourhoods for this scale."""
        sink, last_q = 2 * self.tile, self.last_q
        vertical_slash = [
            VerticalSlash(v, s, last_q, near=1) for v, s in ((64, 128), (128, 128), (128, 64), (256, 32), (64, 512))
        ]
        lines = [(0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1)]  # rows, columns, slash
        grids = [
            Grid(
                s,
                bool(c),
                bool(r),
                bool(d),
                8 * self.tile,
                sink,
                last_q=last_q,
                shortest=self.tile,
                longest=8 * self.tile,
            )
            for s in ("frame", "search")
            for r, c, d in lines
        ]
        few = VerticalSlash(2 * self.tile + 30, 0, last_q)
        blocks = BlockTopK(8, 2 * self.tile, near=1)
        return (AShape(sink, 8 * self.tile), *vertical_slash, blocks, *grids, *(Besides(grid, few) for grid in grids))


@dataclass(frozen=True, eq=False)
class Part:
    """The pairs that a structure is planted on.

    Attributes:
        queries, keys: token numbers, ascending.
        stand: for each query, how many of the keys are not after it, less one.
    """

    queries: np.ndarray
    keys: np.ndarray
    stand: np.ndarray


@dataclass
class Head:
    """One head: what is planted, and the pattern that it calls for.

    Attributes:
        boundary: "none", "query" or "2d".
        structures: part (None, a modality, or a pair of them) -> name of a structure, see `_Planter`.
        wanted: part -> the pattern with budgets of just the structure's size (set by `plant`).
    """

    boundary: str
    structures: Mapping[Any, str]
    seed: int
    wanted: dict[Any, Pattern] = field(default_factory=dict)

    @property
    def pattern(self) -> Pattern:
        if self.boundary == "none":
            return self.wanted[None]
        return QBoundary(self.wanted) if self.boundary == "query" else Boundary2D(self.wanted)


class _Planter:
    """Adds one structure to q and k [N, D] of a head, in some of the dimensions."""

    def __init__(self, scale: Scale, part: Part, dims: slice, q: Tensor, k: Tensor, rng: np.random.Generator) -> None:
        self.scale, self.part, self.q, self.k, self.rng = scale, part, q, k, rng
        self.dims, self.size, self.used = dims, dims.stop - dims.start, 0
        self.strength = (STRONG * scale.dim**0.5) ** 0.5

    def axes(self, n: int) -> Tensor:
        """n directions [n, size] of their own, such that a query and a key with the same one score `STRONG`."""
        self.used += n
        return torch.eye(self.size)[self.used - n : self.used] * self.strength

    def codes(self, n: int) -> Tensor:
        """n random directions [n, size], likewise, that are nearly orthogonal to each other, and to all axes."""
        found = torch.as_tensor(self.rng.standard_normal((n, self.size)), dtype=torch.float32)
        found[:, :AXES] = 0.0
        return torch.nn.functional.normalize(found, dim=-1) * self.strength

    def want(self, rows: np.ndarray, queries: Tensor) -> None:
        """Adds to the queries of some rows (places among the part's queries)."""
        self.q[self.part.queries[rows], self.dims] += queries

    def offer(self, places: np.ndarray, keys: Tensor, sinks: bool = False) -> None:
        """Adds to some keys (places among the part's keys): to the sinks, or to the others, lest a key that is both
        draws all attention."""
        here = (places < SINKS) == sinks
        self.k[self.part.keys[places[here]], self.dims] += keys[here] if len(keys) == len(places) else keys

    @property
    def rows(self) -> np.ndarray:
        return np.arange(len(self.part.queries))

    def sinks(self) -> None:
        code = self.axes(1)
        self.want(self.rows, code)
        self.offer(np.arange(SINKS), code, sinks=True)

    def near(self, width: float, rows: np.ndarray, distances: np.ndarray | tuple[int, ...] = (0,)) -> None:
        """Each query wants the keys around some distances before where it stands: by random Fourier features of bell
        curves of a width in tokens."""
        waves = (self.size - AXES) // 2
        frequency = self.rng.standard_normal(waves) / width

        def feature(place: np.ndarray) -> Tensor:
            angle = np.outer(place, frequency)
            wave = np.concatenate([np.cos(angle), np.sin(angle)], 1) * self.strength / waves**0.5
            return torch.nn.functional.pad(
                torch.as_tensor(wave, dtype=torch.float32), (AXES, self.size - AXES - 2 * waves)
            )

        places = np.arange(len(self.part.keys))
        self.offer(places, feature(places))
        for distance in distances:
            there = rows[self.part.stand[rows] >= distance]
            self.want(there, feature(self.part.stand[there] - distance))

    # ---- structures: each returns the pattern that it calls for ------------------------------------------------------

    def a_shape(self) -> Pattern:
        width = len(self.part.keys) // 12
        self.near(width, self.rows)
        return AShape(self.scale.tile, 3 * width // 2)

    def vertical_slash(self) -> Pattern:
        """Columns anywhere, and three diagonals, which no grid's comb meets all of; columns only where it is
        but a part: there are too few dimensions for more."""
        tile, n = self.scale.tile, len(self.part.keys)
        columns, diagonals = 24, 3 if self.size > 200 else 0
        code = self.axes(1) * 0.92
        self.want(self.rows, code)
        self.offer(self.rng.choice(np.arange(40, n - 5 * tile), columns, replace=False), code)
        if not diagonals:
            return VerticalSlash(30 + columns, 1, self.scale.last_q, near=1)
        step = n // (3 * diagonals)
        distances = n // 5 + step * np.arange(diagonals) + self.rng.integers(step // 2, size=diagonals)
        self.near(1.5, self.rows, distances)
        near = -(-99 // tile) + 1
        # Keys that a last query wants on a diagonal take places among the columns.
        columns += diagonals * self.scale.last_q
        # Two more: the sinks' mass stands on the last diagonals.
        return VerticalSlash(30 + columns, (near + 2 * diagonals + 2) * tile, self.scale.last_q)

    def _combs(self, stride: int) -> np.ndarray:
        """A grid's columns of three kinds, of which each stretch of queries wants two: the last do not show all."""
        places = np.arange(int(self.rng.integers(stride)), len(self.part.keys), stride)
        kind = self.rng.permutation(len(places)) % 3
        stretch = (len(self.part.queries) - 1 - self.rows) // (4 * self.scale.tile) % 3
        for turn, code in enumerate(self.axes(3)):
            self.want(np.flatnonzero(stretch != turn), code)
            self.offer(places[kind == turn], code)
        return places

    def _grid(self, stride: int | str, **lines: bool) -> Pattern:
        tile = self.scale.tile
        reach = {"shortest": tile, "longest": 8 * tile} if stride == "search" else {}
        return Grid(stride, **lines, local=tile, sink=tile, last_q=self.scale.last_q, **reach)  # type: ignore[arg-type]

    def columns(self) -> Pattern:
        self._combs(self.scale.stride)
        return self._grid("search", columns=True)

    def frame_columns(self) -> Pattern:
        self._combs(self.scale.side**2)
        return self._grid("frame", columns=True)

    def rows_and_columns(self) -> Pattern:
        """As `columns`, and the queries at the same places attend evenly to everything."""
        stride = self.scale.stride
        places = self._combs(stride)
        self.q[self.part.queries[places]] = 0.0  # for parts of all pairs, where queries and keys are the same tokens
        return self._grid("search", columns=True, rows=True)

    def _residues(self, stride: int) -> None:
        codes, n = self.codes(stride), len(self.part.keys)
        self.offer(np.arange(n), codes[np.arange(n) % stride])
        rows = np.flatnonzero(self.part.stand >= 0)
        self.want(rows, codes[self.part.stand[rows] % stride])

    def slash(self) -> Pattern:
        self._residues(self.scale.stride)
        return self._grid("search", columns=False, slash=True)

    def frame_slash(self) -> Pattern:
        self._residues(self.scale.side**2)
        return self._grid("frame", columns=False, slash=True)

    def slash_and_few(self) -> Pattern:
        """A grid's diagonals, and a few columns anywhere that all queries want."""
        n, few = len(self.part.keys), 16
        code = self.axes(1) * 1.1
        self.want(self.rows, code)
        self.offer(self.rng.choice(np.arange(40, n - 5 * self.scale.tile), few, replace=False), code)
        return self.slash() | VerticalSlash(30 + few, 0, self.scale.last_q)

    def blocks(self) -> Pattern:
        """Every block of queries wants three blocks of keys of its own."""
        size, n = 2 * self.scale.tile, len(self.part.keys)
        codes = self.codes(-(-n // size))
        self.offer(np.arange(n), codes[np.arange(n) // size])
        for first in range(0, len(self.part.queries), size):
            rows = self.rows[first : first + size]
            earlier = int(self.part.stand[rows[0]]) // size
            if earlier > 0:
                self.want(rows, codes[self.rng.integers(0, earlier, 3)].unique(dim=0).sum(0))
        return BlockTopK(5, size, near=1)


FAMILIES = {
    "a_shape": "AShape",
    "vertical_slash": "VerticalSlash",
    "columns": "Grid",
    "frame_columns": "Grid",
    "rows_and_columns": "Grid",
    "slash": "Grid",
    "frame_slash": "Grid",
    "slash_and_few": "Grid | VerticalSlash",
    "blocks": "BlockTopK",
}
"""Structure -> the family that it calls for."""


def kinds() -> list[tuple[str, Mapping[Any, str]]]:
    """(boundary, structures) of the heads of an experiment: every family, modality and boundary type."""
    whole = ("a_shape", "vertical_slash", "columns", "rows_and_columns", "slash", "slash_and_few", "blocks")
    found: list[tuple[str, Mapping[Any, str]]] = [("none", {None: name}) for name in whole]
    for text, video in (
        ("vertical_slash", "columns"),
        ("columns", "vertical_slash"),
        ("a_shape", "slash"),
        ("slash", "vertical_slash"),
        ("blocks", "columns"),
        ("vertical_slash", "blocks"),
        ("blocks", "slash"),
    ):
        found.append(("query", {TEXT: text, VIDEO: video}))
    # (text, text), (text, video), (video, text), (video, video)
    for parts in (
        ("a_shape", "frame_columns", "a_shape", "frame_slash"),
        ("vertical_slash", "frame_columns", "a_shape", "frame_columns"),
        ("a_shape", "vertical_slash", "vertical_slash", "frame_slash"),
        ("blocks", "frame_columns", "a_shape", "frame_slash"),
        ("a_shape", "a_shape", "blocks", "frame_columns"),
        ("vertical_slash", "blocks", "a_shape", "frame_slash"),
    ):
        pairs = [(a, b) for a in (TEXT, VIDEO) for b in (TEXT, VIDEO)]
        found.append(("2d", dict(zip(pairs, parts, strict=True))))
    return found


Kind = tuple[str, Mapping[Any, str]]
"""Boundary type, and part -> structure."""


def plant(
    scale: Scale, heads: int, seed: int = 0, every: Sequence[Kind] | None = None
) -> tuple[list[Head], Tensor, Tensor, Tensor]:
    """Heads of the kinds (``every``; all if None) in turn, and q, k, v [1, heads, N, D] in float32."""
    layout, every = scale.layout, kinds() if every is None else every
    n = layout.length
    chosen = [Head(*every[h % len(every)], seed=seed * 100_003 + h) for h in range(heads)]
    q, k = torch.zeros((2, 1, heads, n, scale.dim))
    v = torch.zeros((1, heads, n, 64))
    for h, head in enumerate(chosen):
        rng = np.random.default_rng(head.seed)
        for t, noise in ((q, 0.05), (k, NOISE)):
            t[0, h] = noise * torch.as_tensor(rng.standard_normal((n, scale.dim)), dtype=torch.float32)
        drift = torch.as_tensor(rng.standard_normal((-(-n // 64), 64)), dtype=torch.float32)
        v[0, h] = drift.repeat_interleave(64, 0)[:n] + torch.as_tensor(
            rng.standard_normal((n, 64)), dtype=torch.float32
        )
        # "rows" blank whole queries, so parts that do come last
        width = scale.dim // len(head.structures)
        for i, (part, name) in enumerate(head.structures.items()):
            query, key = (part, None) if head.boundary == "query" else (part or (None, None))
            queries, keys = (np.flatnonzero(layout.of(m)[0]) for m in (query, key))
            where = Part(queries, keys, layout.coordinate(key)[0, queries])
            planter = _Planter(scale, where, slice(i * width, (i + 1) * width), q[0, h], k[0, h], rng)
            planter.sinks()
            head.wanted[part] = getattr(planter, name)()
    return chosen, q, k, v


def family(pattern: Pattern) -> str:
    """Names of a pattern's classes: "Grid", "Grid | VerticalSlash"."""
    if hasattr(pattern, "left"):
        return f"{family(pattern.left)} | {family(pattern.right)}"
    return type(pattern).__name__


def parts_of(pattern: Pattern) -> tuple[str, dict[Any, Pattern]]:
    """(boundary, part -> pattern) of a pattern that a search found."""
    if isinstance(pattern, (QBoundary, Boundary2D)):
        return "query" if isinstance(pattern, QBoundary) else "2d", dict(pattern.parts)
    return "none", {None: pattern}


def recognised(head: Head, pattern: Pattern) -> bool:
    """Whether a pattern has the head's boundary type, and each part its family and the lines that were planted."""
    boundary, parts = parts_of(pattern)
    if boundary != head.boundary or set(parts) != set(head.wanted):
        return False
    for part, found in parts.items():
        if family(found) != FAMILIES[head.structures[part]]:
            return False
        grids = [p.left if hasattr(p, "left") else p for p in (found, head.wanted[part])]
        if isinstance(grids[1], Grid):
            for line in ("columns", "rows", "slash"):
                if getattr(grids[1], line) and not getattr(grids[0], line):
                    return False
    return True
