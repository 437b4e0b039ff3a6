"""What is computed in the check's cases: specs, each with the lowering that is forced on it and the launches that must
come of it, and where the pattern selects nothing, its meaning in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice

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

from ..compiler.lower import Lowering
from ..ir.pattern import Pattern
from .oracle import TILE, Meaning, Prompt, either, last, local, local_of, sink

STRIDE, PHASE = 37, 5

Head = tuple[Pattern, Meaning | None]
"""A head's pattern, and what it means; None where it selects by its input (then the plan's expression says it)."""


@dataclass(frozen=True)
class Work:
    """One spec with one way to compute it.

    Attributes:
        heads: the patterns of the first heads, repeated for the others.
        lowering: the way that is forced.
        needs: features (`features` in `mmflex.selfcheck.proof`) that the plan must have. never: that it must not have.
    """

    heads: tuple[Head, ...]
    lowering: Lowering = Lowering()  # noqa: RUF009
    needs: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()

    def spec(self, heads: int) -> list[Pattern]:
        return [pattern for pattern, _ in islice(cycle(self.heads), heads)]

    def meanings(self, heads: int) -> list[Meaning | None]:
        return [meaning for _, meaning in islice(cycle(self.heads), heads)]


# ---- heads -----------------------------------------------------------------------------------------------------------

NOTHING: Head = (AShape(0, 0), lambda p: p.k < 0)
EVERYTHING: Head = (Dense(), lambda p: p.k >= 0)
NEAR: Head = (AShape(100, 200), either(sink(100), local(200)))
FAR: Head = (AShape(0, 300), local(300))
LAST: Head = (TriShape(64, 128, 1), either(sink(64), local(128), last(1)))


def columns(p: Prompt):  # type: ignore[no-untyped-def]
    return p.k % STRIDE == PHASE


def rows(p: Prompt):  # type: ignore[no-untyped-def]
    return p.q % STRIDE == PHASE


def diagonals(p: Prompt):  # type: ignore[no-untyped-def]
    return (p.q - p.k) % STRIDE == 0


def grid(local_: int = 64, sink_: int = 32, **lines: bool) -> Grid:
    """A grid in which nothing is searched."""
    return Grid(STRIDE, phase=PHASE, local=local_, sink=sink_, **lines)


COLUMNS: Head = (grid(), either(sink(32), local(64), columns))
ROWS: Head = (grid(columns=False, rows=True), either(sink(32), local(64), rows))
DIAGONALS: Head = (grid(slash=True), either(sink(32), local(64), columns, diagonals))
ALL_LINES: Head = (grid(rows=True, slash=True), either(sink(32), local(64), columns, rows, diagonals))
LOOKED_UP: Head = (
    Strided(STRIDE) | StridedFixed(50, 3) | Dilated(20, 300, 3),
    lambda p: (
        (p.q - p.k < STRIDE)
        | diagonals(p)
        | (p.q // 50 == p.k // 50)
        | (p.k % 50 < 3)
        | (p.k < 20)
        | ((p.q - p.k < 300) & ((p.q - p.k) % 3 == 0))
    ),
)
# Budgets beyond any prompt, and beyond 32 and 64 bits.
HUGE: tuple[Head, ...] = (
    (AShape(2**40, 0), EVERYTHING[1]),
    (TriShape(64, 128, 2**31), EVERYTHING[1]),
    (
        Grid(2**45, phase=PHASE, local=64, sink=32, rows=True),
        lambda p: sink(32)(p) | local(64)(p) | (p.k == PHASE) | (p.q == PHASE),
    ),
    (VerticalSlash(2**70, 0), EVERYTHING[1]),
    (Dilated(0, 2**33, 3), lambda p: (p.q - p.k) % 3 == 0),
)
LINES: Head = (VerticalSlash(100, 200), None)
FEW_LINES: Head = (VerticalSlash(40, 128, last_q=16), None)


def _by_query(p: Prompt):  # type: ignore[no-untyped-def]
    text, video, image = (p.among(m)[:, None] for m in ("text", "video", "image"))
    return (text & either(sink(64), columns)(p)) | (video & either(sink(100), local_of("video", 150))(p)) | image


BY_QUERY: Head = (QBoundary({"text": grid(0, 64), "video": AShape(100, 150)}), _by_query)


def _by_pair(p: Prompt):  # type: ignore[no-untyped-def]
    video, text = p.rank("video") // TILE, p.rank("text") // TILE
    named = (p.pair("video", "video"), p.pair("text", "text"), p.pair("text", "video"))
    within_video = (video[None] < 1) | (video[:, None] - video[None] <= 2)
    within_text = text[:, None] - text[None] <= 1
    others = ~(named[0] | named[1] | named[2])
    return (named[0] & within_video) | (named[1] & within_text) | (named[2] & (video[None] < 1)) | others


BY_PAIR: Head = (
    Boundary2D(
        {("video", "video"): AShape(100, 150), ("text", "text"): AShape(0, 100), ("text", "video"): AShape(128, 0)}
    ),
    _by_pair,
)
LINES_BY_PAIR: Head = (
    Boundary2D({("video", "video"): VerticalSlash(30, 128), ("text", "video"): VerticalSlash(20, 64)}),
    None,
)
LINES_BY_QUERY: Head = (QBoundary({"text": VerticalSlash(30, 128), "video": Grid("frame", local=64, sink=0)}), None)

GATHERED = Lowering(gather_rows=True, residue_launches=True)
MODALITY_MAJOR = Lowering("modality-major", "modality-major", gather_rows=True, residue_launches=True)


def _of(*heads: Head, how: Lowering | None = None, needs: str = "", never: str = "") -> Work:
    split = (frozenset(filter(None, names.split(", "))) for names in (needs, never))
    return Work(heads, how or Lowering(), *split)


# ---- works -----------------------------------------------------------------------------------------------------------

WORKS: dict[str, Work] = {
    "dense": _of(EVERYTHING, needs="dense"),
    "nothing": _of(NOTHING),
    "blocks": _of(NEAR, FAR, NOTHING, LAST, needs="blocks, several patterns", never="gathered keys, looked up"),
    "huge budgets": _of(*HUGE, needs="blocks"),
    "gathered keys": _of(COLUMNS, NEAR, COLUMNS, FAR, needs="gathered keys, several patterns"),
    "vertical-slash": _of(LINES, FEW_LINES, NEAR, (BlockTopK(2), None), needs="gathered keys, several patterns"),
    "looked up": _of(LOOKED_UP, needs="looked up"),
    "block tables": _of((BlockTopK(4, 96), None), needs="looked up"),
    "gathered rows": _of(ROWS, LAST, NEAR, how=GATHERED, needs="gathered rows, several patterns"),
    "residues": _of(DIAGONALS, NEAR, NEAR, how=GATHERED, needs="residue-major", never="looked up"),
    "residues looked up": _of(
        DIAGONALS, how=Lowering(residue_launches=False), needs="looked up, gathered keys", never="residue-major"
    ),
    "queries by modality": _of(BY_QUERY, NEAR, how=Lowering("modality-major", "natural"), needs="queries by modality"),
    "keys by modality": _of(BY_PAIR, how=Lowering("natural", "modality-major"), needs="keys by modality"),
    "both by modality": _of(BY_PAIR, FAR, how=MODALITY_MAJOR, needs="queries by modality, keys by modality"),
    "modalities looked up": _of(
        BY_PAIR, BY_QUERY, how=Lowering("natural", "natural"), needs="looked up", never="queries by modality"
    ),
    "lines by modality": _of(LINES_BY_PAIR, LINES_BY_QUERY, how=MODALITY_MAJOR, needs="queries by modality"),
    "shares of mass": _of(
        (FlexPrefill(0.9, 0.2, 100, 256, 4, 0), None),
        (XAttention(8, 0.8, 4), None),
        (Grid("search", rows=True, slash=True, local=64, sink=32, shortest=8, longest=100), None),
        (XAttention(16, 0.7, 3), None),
        (BlockPeaks(0.02, 8, 4), None),
        how=GATHERED,
        needs="gathered rows, residue-major",
    ),
    "blocks by their means": _of(
        (Prism(0.8, 4), None),
        (FlashPrefill(0.2, 4, 0.4), None),
        (ProxyAttn(0.8, 4, 128), None),
        (BlockTopK(4, decay=0.6, values=0.2), None),
        needs="blocks, several patterns",
    ),
    "mixed": _of(
        ALL_LINES, EVERYTHING, LINES, BY_QUERY, NEAR, how=MODALITY_MAJOR,
        needs="blocks, dense, gathered rows, residue-major, queries by modality, gathered keys",
    ),
}  # fmt: skip
"""By name."""
