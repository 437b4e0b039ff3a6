"""What ``mmflex calibrate`` runs: plans that differ in one thing each, and how they are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ..compiler.launches import Work
from ..compiler.prices import expected_work
from ..compiler.program import Program
from ..ir.expr import Tile
from ..ir.layout import TokenLayout
from ..ir.pattern import Pattern, Tokens, find
from ..runtime.attention import attention, plan
from .cost import counted


@dataclass(frozen=True)
class _Band(Pattern):
    """The last tiles: full blocks and one partial one."""

    tiles: int

    def mask(self, t: Tokens) -> Boolean:
        return t.local(self.tiles * t.tile)


@dataclass(frozen=True)
class _Pierced(Pattern):
    """A gathered column in every key tile of a band that begins behind the diagonal: all of its blocks are partial."""

    tiles: int

    def mask(self, t: Tokens) -> Boolean:
        back = Tile(t.q, t.tile) - Tile(t.k, t.tile)
        return ((back >= 1) & (back <= self.tiles)) | sympy.Eq(sympy.Mod(t.k - 5, t.tile), 0)


@dataclass(frozen=True)
class _Thinned(Pattern):
    """Two of three pairs: all blocks are partial, and looked up."""

    tiles: int

    def mask(self, t: Tokens) -> Boolean:
        return t.local(self.tiles * t.tile) & sympy.Ne(sympy.Mod(t.q + t.k, 3), 0)


@dataclass(frozen=True)
class _Window(Pattern):
    """A window of tokens: full blocks beside looked-up ones at both ends."""

    tiles: int

    def mask(self, t: Tokens) -> Boolean:
        return t.q - t.k < self.tiles * t.tile - 77


@dataclass(frozen=True)
class _Lines(Pattern):
    """A few gathered rows that see everything: few long query tiles in a launch of their own."""

    tiles: int

    def mask(self, t: Tokens) -> Boolean:
        return t.local(self.tiles * t.tile) | sympy.Eq(sympy.Mod(t.row - 3, 4 * t.tile), 0)


@dataclass(frozen=True, eq=False)
class Case:
    """A spec at a length. ``held_out``: only to test predictions on."""

    name: str
    spec: Pattern
    tokens: int
    held_out: bool = False


@dataclass(frozen=True, eq=False)
class Sample:
    """A case measured, in milliseconds.

    Attributes:
        program: as it ran. works: launch number -> its work, counted; expected: as it was expected.
        attend: `Plan.attend`. planning: what a call takes beyond that. total: `mmflex.attention`.
        attend_host, host: how long the host is busy with either; 0 where the host is the device.
    """

    case: Case
    program: Program
    works: dict[int, Work]
    expected: dict[int, Work]
    attend: float
    planning: float
    total: float
    attend_host: float
    host: float


def fit_cases(short: int, long: int) -> list[Case]:
    """What the constants are fitted to: the long ones first, which need few runs to say most."""
    made = {name: find(name) for name in ("VerticalSlash", "Grid", "BlockTopK", "AShape")}
    lines = made["VerticalSlash"](max(64, long // 64), max(128, long // 64))
    wide = max(4, min(32, long // 512))
    cases = [
        Case("full", _Band(wide), long),
        Case("narrow", _Band(2), long),
        Case("pierced", _Pierced(8), long),
        Case("thinned", _Thinned(8), long),
        Case("window", _Window(wide), long),
        Case("rows", _Lines(8), long),
        Case("vertical-slash", lines, long),
        Case("vertical-slash", lines, short),
        Case("block top-k", made["BlockTopK"](wide), long),
        Case("grid", made["Grid"](200, rows=True, local=512), long),
        Case("full", _Band(wide), short),
        Case("block top-k", made["BlockTopK"](wide), short),
        Case("rows", _Lines(8), short),
        Case("table", made["BlockTopK"](wide, 64), long),
    ]
    return cases


def held_out_cases(lengths: Sequence[int]) -> list[Case]:
    """The patterns of the attention benchmark, their budgets brought to the length where it is short."""
    out = []
    for n in lengths:
        share = min(1.0, n / 16384)

        def tokens(most: int, share: float = share) -> int:
            return max(128, round(most * share))

        topk = find("BlockTopK")(max(4, round(64 * share)))
        specs = {
            "A-shape": find("AShape")(tokens(1024), tokens(4096)),
            "vertical-slash": find("VerticalSlash")(tokens(1000), tokens(2048)),
            "grid": find("Grid")(256, columns=True, rows=True, local=tokens(1024)),
            "block top-k": topk,
        }
        out += [Case(name, spec, n, True) for name, spec in specs.items()]
    return out


def inputs(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, heads, tokens, dim], k and v [1, kv_heads, tokens, dim]: noise, the same every time."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((heads, tokens), (kv_heads, tokens), (kv_heads, tokens))
    q, k, v = (torch.randn(1, *s, dim, generator=generator, device=device, dtype=dtype) for s in shapes)
    return q, k, v


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Median time of a call: on a GPU of groups that run back to back between events, else of single calls. The first
    runs are not counted."""
    for _ in range(3 if device.type == "cuda" else 1):  # compiles, then captures a graph, then replays it
        call()
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    once = max(1e-6, time.perf_counter() - begin)
    if device.type != "cuda":
        times = [once * 1e3] if once > seconds else []
        while len(times) < 3 or (sum(times) / 1e3 < seconds and len(times) < 25):
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
            if once > seconds and len(times) >= 2:
                break
        return statistics.median(times)
    groups = 5
    each = max(1, min(20, int(seconds / groups / once)))
    times = []
    for _ in range(groups):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(each):
            call()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / each)
    return statistics.median(times)


def host_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long the host is busy with a call, while an idle GPU takes what it is given; 0 without a GPU."""
    if device.type != "cuda":
        return 0.0
    times = []
    for _ in range(7):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    torch.cuda.synchronize(device)
    return statistics.median(times)


def measure(case: Case, q: Tensor, k: Tensor, v: Tensor, backend: str, seconds: float) -> Sample:
    """Runs a case: a call as a whole and its parts."""
    device = q.device
    layout = TokenLayout.text(case.tokens)

    def whole() -> Any:
        return attention(q, k, v, case.spec, layout=layout, backend=backend)

    made = plan(q, k, case.spec, layout=layout, backend=backend)
    attend = milliseconds(lambda: made.attend(q, k, v), device, seconds)
    attend_host = host_milliseconds(lambda: made.attend(q, k, v), device)
    if device.type == "cuda":  # planning is replayed as a graph inside a call, not by `plan`
        total, host = milliseconds(whole, device, seconds), host_milliseconds(whole, device)
        planning = max(0.0, total - attend)
    else:
        planning = milliseconds(lambda: plan(q, k, case.spec, layout=layout, backend=backend), device, seconds)
        total, host = milliseconds(whole, device, seconds) if case.held_out else planning + attend, 0.0
    works, expected = counted(made), expected_work(made.program, q.shape[0])
    return Sample(case, made.program, works, expected, attend, planning, total, attend_host, host)
