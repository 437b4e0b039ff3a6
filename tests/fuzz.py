"""Random calls of the public API, valid and not: ``python -m tests.fuzz --cases 10000 --seed 0``.

Every accepted call is compared with the float64 oracle (`oracle.py`) under the token mask that the spec denotes, or
with what it says of itself (round trips). Every refused one has to be refused by mmflex itself, with a declared
exception and a message of bounded length. What fails is printed with the line that repeats it; the exit status is 1.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("MMFLEX_CACHE", str(Path(tempfile.gettempdir()) / "mmflex-tests-have-no-cache"))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import oracle
import sympy
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
from mmflex import Pattern, Plan, Segment, TokenLayout, plot
from mmflex.ir.pattern import from_json
from mmflex.ir.queries import QueryTokens
from mmflex.ir.shown import shown
from mmflex.plot.snapshot import snapshot
from mmflex.tuning.config import Config, load_config, load_minference_config, save_config

DECLARED = (ValueError, TypeError, NotImplementedError)
RUNTIME = ("cannot run here", "no backward", "at_most", "at_least")
"""What is in the messages of the RuntimeErrors that are documented."""

LONGEST_MESSAGE = 2000
MODALITIES = ("text", "image", "video", "audio")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
OURS = tuple(str(Path(__file__).parents[1] / folder) for folder in ("mmflex", "mask_builders"))


class Wrong(AssertionError):
    """An accepted call with a wrong result."""


@dataclass
class Case:
    """A case being drawn: its random numbers, and what has been drawn, for the report."""

    rng: random.Random
    said: list[str] = field(default_factory=list)
    checked: bool = True

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def say(self, name: str, value: Any) -> Any:
        text = shown(value) if not isinstance(value, str) else value
        self.said.append(f"{name}={text[:300]}")
        return value


# ---- odd values ------------------------------------------------------------------------------------------------------

LARGE = (10**4, 2**15, 2**31 - 1, 2**31, 2**32 + 2, 2**40, 2**62, 2**63, 2**64, 2**70, 10**300)


def odd(c: Case) -> Any:
    """Something that is seldom a right value."""
    return c.pick(
        None, True, False, -1, -(2**31), 0, 1.5, float("nan"), float("inf"), -0.0, 1e400, "", "x", "text", "frame",
        "search", "x" * 10**5, b"x", [], [[]], (), (1, 2), {}, {"a": 1}, object(), object, len, 1j, np.int64(7),
        np.float32(0.5), np.zeros(3), torch.tensor(3), torch.zeros(2, 2), Dense(), Dense, TokenLayout.text(5),
        sympy.Symbol("q"), sympy.Integer(3), range(3), slice(0, 2), Ellipsis, *LARGE, 10**5000,
    )  # fmt: skip


def budget(c: Case, n: int) -> Any:
    """A number of tokens: mostly one that a pattern takes."""
    if c.chance(0.006):
        return odd(c)
    if c.chance(0.12):
        return c.pick(*LARGE[:-1])
    return c.pick(0, 1, 2, 3, 7, 16, 30, 31, n // 2, n - 1, n, n + 1, 2 * n, 5000)


def positive(c: Case, n: int) -> Any:
    value = budget(c, n)
    return max(1, value) if isinstance(value, int) and value == 0 and c.chance(0.95) else value


# ---- layouts ---------------------------------------------------------------------------------------------------------


def segment(c: Case) -> Any:
    kind = c.pick(*MODALITIES) if c.chance(0.99) else odd(c)
    if isinstance(kind, str) and kind in ("text", "audio"):
        item = (kind, c.rng.randrange(50)) if c.chance(0.98) else (kind, odd(c))
        return item
    numbers = (3 if kind == "video" else 2) if c.chance(0.95) else c.pick(0, 1, 2, 3, 4)
    size: Any = tuple(c.rng.randrange(1, 5) for _ in range(numbers))
    if c.chance(0.02):
        size = odd(c)
    options: Any = {}
    if c.chance(0.4):
        options["newline"] = c.pick("row", "frame", "video", None) if c.chance(0.99) else odd(c)
    if c.chance(0.4):
        options["timestamps"] = c.pick(0, 1, 3, (1,) * 3) if c.chance(0.9) else odd(c)
    return (kind, size, options) if options or c.chance(0.1) else (kind, size)


def prompt(c: Case, most: int) -> TokenLayout:
    """One prompt of 1 to ``most`` tokens."""
    way = c.rng.random()
    if way < 0.5:
        layout = TokenLayout.from_segments([segment(c) for _ in range(c.rng.randrange(1, 6))])
    elif way < 0.75:  # anything in any place
        n = c.rng.randrange(1, most + 1)
        rng = np.random.default_rng(c.rng.randrange(2**32))
        runs = np.repeat(rng.integers(0, 4, n), rng.integers(1, 20, n))[:n]
        extra = {name: rng.integers(-1, 6, n) for name in ("frame", "cell", "segment") if c.chance(0.4)}
        if c.chance(0.3):
            extra["valid"] = rng.random(n) < 0.8
        layout = TokenLayout.from_modality_ids(torch.tensor(runs) if c.chance(0.3) else runs, **extra)
    else:
        layout = TokenLayout.text(c.rng.randrange(1, most + 1))
    if layout.length > most:
        layout = layout[c.rng.randrange(layout.length - most) :][:most]
    return layout if layout.length else TokenLayout.text(1)


def layout_of(c: Case, batch: int, most: int) -> TokenLayout:
    if batch == 1 and c.chance(0.7):
        return prompt(c, most)
    prompts = [prompt(c, most) for _ in range(batch)]
    if c.chance(0.2):
        return prompts[0] if prompts[0].batch_size == 1 else prompt(c, most)
    if c.chance(0.3):  # of equal length, so that nothing is padding
        n = min(p.length for p in prompts)
        return TokenLayout.batch([p[:n] for p in prompts])
    length = max(p.length for p in prompts) + c.pick(0, 0, 1, 13)
    return TokenLayout.batch(prompts, side=c.pick("left", "right"), length=length)


# ---- patterns --------------------------------------------------------------------------------------------------------


def leaf(c: Case, n: int) -> Pattern:
    """A pattern, at times one that is refused."""
    kind = c.rng.randrange(16)
    flag = c.pick(True, False) if c.chance(0.99) else odd(c)
    if kind == 0:
        return Dense()
    if kind == 1:
        return AShape(budget(c, n), budget(c, n))
    if kind == 2:
        return TriShape(budget(c, n), budget(c, n), budget(c, n))
    if kind in (3, 4):
        return VerticalSlash(budget(c, n), budget(c, n), positive(c, 16), c.pick(100, budget(c, n)))
    if kind == 5:
        decay, weight = (c.pick(*few) if c.chance(0.99) else odd(c) for few in ((1.0, 1.0, 0.7), (0.0, 0.0, 0.2)))
        size = c.pick(16, 16, 32, 8, 5, 128, positive(c, n))
        return BlockTopK(positive(c, 5), size, c.pick(100, budget(c, n)), decay, weight)
    if kind == 6:
        share = c.pick(0.3, 0.9, 1.0) if c.chance(0.99) else odd(c)
        tau = c.pick(0.0, 0.1, 0.3, 1.0) if c.chance(0.99) else odd(c)
        counts = [positive(c, n), positive(c, n), positive(c, 5), budget(c, n)]
        return FlexPrefill(share, tau, *counts, c.pick(16, 32, 8, positive(c, n)), positive(c, 16))
    if kind == 7:
        stride, size = c.pick((4, 16), (8, 16), (1, 5), (16, 32), (3, 9), (positive(c, n), positive(c, n)))
        if c.chance(0.4):
            return BlockPeaks(c.pick(0.001, 0.02, 0.3), stride, positive(c, 5), size, c.pick(100, budget(c, n)))
        return XAttention(stride, c.pick(0.3, 0.9, 1.0), positive(c, 5), size)
    if kind in (8, 9):
        stride = c.pick("frame", "search", "search", *[c.rng.randrange(1, 40)] * 4, n, 2**31 - 1, 2**40, 2**61)
        phase = c.pick("search", "search", 0, 3, 77, 2**40)
        if c.chance(0.03):
            stride, phase = (odd(c), phase) if c.chance(0.5) else (stride, odd(c))
        shortest = c.rng.randrange(1, 20)
        longest = c.pick(shortest, shortest + 30, 2048, 2**40)
        flags = [c.pick(True, False), c.pick(True, False), flag]
        return Grid(stride, *flags, budget(c, n), budget(c, n), phase, positive(c, 16), shortest, longest)
    stride = c.pick("frame", c.rng.randrange(1, 40), c.rng.randrange(1, 40), n, 2**40) if c.chance(0.99) else odd(c)
    if kind == 10:
        return StridedFixed(stride, budget(c, n))
    if kind == 11:
        return Strided(stride)
    if kind == 12:
        return Dilated(budget(c, n), budget(c, n), positive(c, 9))
    near, size = budget(c, n), c.pick(16, 32, 8, 128, positive(c, n))
    if kind == 13:
        rotary, pairs = c.pick(None, None, 8, positive(c, 16)), c.pick("halves", "interleaved")
        return Prism(c.pick(0.5, 0.95), positive(c, 5), size, rotary, pairs if c.chance(0.99) else odd(c), near)
    if kind == 14:
        rescue = c.pick(0.0, 0.0, 0.3) if c.chance(0.99) else odd(c)
        return FlashPrefill(c.pick(0.02, 0.3), positive(c, 5), rescue, near, budget(c, n), budget(c, n), size)
    counts = [positive(c, 5), budget(c, n), positive(c, 9), positive(c, 3), positive(c, 16)]
    return ProxyAttn(c.pick(0.5, 0.95), *counts, size, near)


def modality(c: Case) -> Any:
    return c.pick(*MODALITIES, None, None, 0, 1, 2, 3) if c.chance(0.99) else odd(c)


def pattern(c: Case, n: int, depth: int = 2) -> Pattern:
    if not depth or c.chance(0.5):
        return leaf(c, n)
    way = c.rng.randrange(7)
    inner = pattern(c, n, depth - 1)
    if way == 0:
        return inner | pattern(c, n, depth - 1)
    if way == 1:
        return inner & pattern(c, n, depth - 1)
    if way == 2:
        return inner - pattern(c, n, depth - 1)
    if way in (3, 4):
        return inner.on(modality(c), modality(c))
    few = c.rng.sample(MODALITIES, c.rng.randrange(1, 4))
    if way == 5:
        return QBoundary({m: pattern(c, n, depth - 1) for m in few})
    return Boundary2D({(m, c.pick(*MODALITIES)): pattern(c, n, depth - 1) for m in few})


def spec_of(c: Case, n: int, heads: int) -> Any:
    if c.chance(0.6):
        return pattern(c, n)
    few = [pattern(c, n, 1) for _ in range(c.rng.randrange(1, 3))]
    spec: Any = [c.pick(*few) for _ in range(heads)]
    if c.chance(0.3):
        spec = tuple(spec)
    if c.chance(0.04):
        spec = c.pick(spec[:-1], [*spec, Dense()], [odd(c)] * heads, iter(spec), {0: Dense()}, "AShape", odd(c))
    return spec


# ---- calls -----------------------------------------------------------------------------------------------------------


def scattered(c: Case, t: torch.Tensor) -> torch.Tensor:
    """The same values in another memory order."""
    way = c.rng.randrange(7)
    if way == 1:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if way == 2:
        return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if way == 3:
        wide = torch.full((*t.shape[:2], 2 * t.shape[2] + 1, t.shape[3] + 3), float("nan"), dtype=t.dtype)
        part = wide[:, :, 1::2, 2:-1]
        part.copy_(t)
        return part
    if way == 4:
        return torch.cat([t, t], 3)[..., : t.shape[3]]
    return t


def tensors(c: Case, layout: TokenLayout, batch: int) -> tuple[list[torch.Tensor], bool]:
    """q, k and v for a layout, and whether all of them is finite."""
    kv_heads = c.rng.randrange(1, 3)
    heads, dim, n = kv_heads * c.rng.randrange(1, 4), c.pick(16, 16, 17, 24, 32, 40), layout.length
    m = c.pick(n, n, n, c.rng.randrange(n + 1), 1)
    generator = torch.Generator().manual_seed(c.rng.randrange(2**31))
    dtype = c.pick(torch.float32, torch.float32, torch.bfloat16, torch.float16)
    shapes = [(batch, heads, m, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, c.pick(dim, dim, dim, 8, 48))]
    strength = c.pick(1.0, 1.0, 1.0, 0.0, 1e-6, 5.0)
    out = [(torch.randn(shape, generator=generator) * strength).to(dtype) for shape in shapes]
    finite = True
    if c.chance(0.15):
        bad = c.pick(float("nan"), float("inf"), float("-inf"))
        t = c.pick(*out)
        if t.numel():
            finite = False
            for _ in range(c.pick(1, 1, 4)):
                t[tuple(c.rng.randrange(size) for size in t.shape)] = bad
    c.say("shapes", f"{[tuple(s) for s in shapes]} {dtype} x {strength}, finite {finite}")
    return [scattered(c, t) for t in out], finite


def spoiled(c: Case, call: dict[str, Any]) -> None:
    """Makes a call wrong in one way (or leaves it right)."""
    what = c.pick(
        "q", "k", "v", "spec", "layout", "scale", "backend", "block_size", "return_lse", "query_start",
        "query_positions", "estimate_from",
    )  # fmt: skip
    if what in ("q", "k", "v"):
        t = call[what]
        call[what] = c.pick(
            odd(c), t[0], t[:, :, :-1], t[..., :-1], t[:, :-1], t.double(), t.int(), t.bool(), t.to("meta"), t.numpy,
            t.to_sparse(), torch.nested.nested_tensor([t[0]]), t[:0], t[:, :, :0], t[None], t.clone().requires_grad_(),
            torch.nn.Parameter(t), t.transpose(1, 2), t.expand(2, -1, -1, -1) if len(t) == 1 else t,
            t.to(torch.complex64),
        )  # fmt: skip
    elif what == "estimate_from":
        q = call["q"]
        call[what] = c.pick(odd(c), (q, odd(c)), (odd(c), None), (q[0], None), (q[:, :1], None), (q, None), (q,))
    elif what == "query_positions":
        call[what] = c.pick(odd(c), [odd(c)], np.arange(call["q"].shape[2])[::-1], QueryTokens(((0, 3), (2, 5))))
    elif what == "layout":
        call[what] = c.pick(odd(c), layout_of(c, 1, 40), TokenLayout.text(len(call["v"][0, 0]) + 1), None)
    else:
        call[what] = odd(c)
    c.say("spoiled", f"{what}={shown(call[what])}")


def call_case(c: Case) -> None:
    """`plan` and `Plan.attend`, `attention`, and the views of a plan."""
    batch = c.pick(1, 1, 1, 2, 3)
    layout = layout_of(c, batch, c.pick(20, 60, 90, 140))
    c.say("layout", f"{layout!r}")
    qkv, finite = tensors(c, layout, batch)
    call: dict[str, Any] = dict(zip("qkv", qkv, strict=True))
    n = layout.length
    call["spec"] = spec_of(c, n, qkv[0].shape[1])
    c.say("spec", str(call["spec"]) if isinstance(call["spec"], Pattern) else call["spec"])
    plain = layout.batch_size == 1 and not layout.padded and layout.modalities == (0,)
    call["layout"] = None if plain and c.chance(0.5) else layout
    call["scale"] = c.pick(None, None, None, 0.3, -0.3, 0.0, -0.0, 1, 1e-30, 7.5)
    call["backend"] = c.pick("reference", "reference", "reference", "reference", "dense", "auto")
    call["return_lse"] = c.chance(0.3)
    call["block_size"] = c.pick(16, 16, 16, 32, 8, 128, 5, 1, 200) if c.chance(0.8) else 128
    m = qkv[0].shape[2]
    if m < n and c.chance(0.5):
        if c.chance(0.5):
            call["query_start"] = c.rng.randrange(n - m + 1)
        else:
            call["query_positions"] = c.pick(list, np.array, torch.tensor)(sorted(c.rng.sample(range(n), m)))
        c.say("queries", call.get("query_start", call.get("query_positions")))
    if c.chance(0.2):
        spoiled(c, call)
    c.say("call", ", ".join(f"{name} {shown(call[name])}" for name in ("scale", "backend", "return_lse", "block_size")))
    size = call.pop("block_size")
    if c.chance(0.35):
        attention_case(c, call, finite)
        return
    v, _ = call["v"], call.pop("return_lse")
    plan = mmflex.plan(**call, block_size=size)
    mask = token_mask(plan, call["spec"], tokens_of(call))
    same(plan.dense_mask().numpy(), mask, "dense_mask")
    out = plan.attend(call["q"], call["k"], v)
    compare(c, plan, (call["q"], call["k"], v), mask, out, None, finite)
    looked_at(c, plan)
    if c.chance(0.2):  # other tensors under the same mask
        other = [torch.flip(t, (2,)) for t in (call["q"], call["k"], v)]
        compare(c, plan, other, mask, plan.attend(*other), None, finite)


def attention_case(c: Case, call: dict[str, Any], finite: bool) -> None:
    found = mmflex.attention(**call)
    out, lse = found if call["return_lse"] else (found, None)
    v, _ = call["v"], call.pop("return_lse")
    plan = mmflex.plan(**call)
    mask = token_mask(plan, call["spec"], tokens_of(call))
    compare(c, plan, (call["q"], call["k"], v), mask, out, lse, finite)


def tokens_of(call: dict[str, Any]) -> list[int] | None:
    """Which tokens the queries of an accepted call are."""
    m, start, listed = call["q"].shape[2], call.get("query_start"), call.get("query_positions")
    where = listed if start is None else start
    if where is None:
        return None
    if isinstance(where, QueryTokens):
        return [token for run in where.runs for token in range(*run)]
    if np.ndim(where) == 0:
        return list(range(int(where), int(where) + m))
    return [int(token) for token in where]


def token_mask(plan: Plan, spec: Any, tokens: list[int] | None = None) -> np.ndarray:
    """bool [B, Hq, M, N] by the oracle; dense where the plan says that it runs dense."""
    heads = plan.shape[0][1]
    patterns = (spec,) * heads if isinstance(spec, Pattern) else tuple(spec)
    if plan.note or not plan.shape[0][0]:
        patterns = (Dense(),) * heads
    return oracle.token_mask(plan, patterns, tokens)


def same(found: Any, wanted: Any, what: str) -> None:
    if found.shape != wanted.shape or not np.array_equal(found, wanted):
        raise Wrong(f"{what} differs")


def compare(c: Case, plan: Plan, qkv: Any, mask: np.ndarray, out: Any, lse: Any, finite: bool) -> None:
    """Output and log-sum-exp against softmax attention in float64. What is not finite reaches only rows that see it."""
    q, k, v = (t.detach() for t in qkv)
    if (out.dtype, out.shape) != (q.dtype, (*q.shape[:3], v.shape[3])):
        raise Wrong(f"output {out.dtype} {tuple(out.shape)} of q {q.dtype} {tuple(q.shape)}, v {tuple(v.shape)}")
    group = q.shape[1] // k.shape[1]
    clean = np.ones(q.shape[:3], bool)
    if not finite:
        bad = [(~t.isfinite()).any(-1).numpy() for t in (q, k, v)]
        keys = np.repeat(bad[1] | bad[2], group, 1)
        clean = ~(bad[0] | (mask & keys[:, :, None]).any(-1))
        q, k, v = (t.nan_to_num(0.0, 0.0, 0.0) for t in (q, k, v))
    scores = q.double() @ k.double().repeat_interleave(group, 1).mT * plan.scale
    greatest = scores.abs().max().item() if scores.numel() else 0.0
    if greatest > 1e30:
        c.checked = False
        return
    wanted, sums = oracle.softmax(q, k, v, mask, plan.scale)
    found = out.detach().double().numpy()
    if not np.isfinite(found[clean]).all():
        raise Wrong("what is not finite reaches rows that do not see it")
    bound = TOLERANCE[q.dtype] + 1.2e-7 * greatest
    difference = np.linalg.norm((found - wanted)[clean])
    least = torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps * found[clean].size ** 0.5
    if not difference <= bound * np.linalg.norm(wanted[clean]) + least:
        raise Wrong(f"output off by {difference / (np.linalg.norm(wanted[clean]) or 1.0):.3g}, {bound:.3g} allowed")
    if lse is None:
        return
    if (lse.dtype, lse.shape) != (torch.float32, q.shape[:3]):
        raise Wrong(f"log-sum-exp {lse.dtype} {tuple(lse.shape)}")
    found = lse.detach().double().numpy()
    seen = mask.any(-1)
    if not (found[~seen & clean] == -np.inf).all():
        raise Wrong("log-sum-exp of a row without keys is not -inf")
    inside = seen & clean
    if not (abs(found - sums)[inside] <= 1e-4 * np.maximum(1.0, abs(sums[inside]))).all():
        raise Wrong(f"log-sum-exp off by {abs(found - sums)[inside].max():.3g}")


def looked_at(c: Case, plan: Plan) -> None:
    """Everything that people look at a plan by."""
    if c.chance(0.7):
        return
    plan.explain(), repr(plan), plan.density.total, plan.block_masks
    if c.chance(0.3) and plan.shape[0][0]:
        rows = [c.rng.randrange(plan.shape[0][2]) for _ in range(3)] if plan.shape[0][2] else []
        same(plan.dense_mask(rows).numpy(), plan.dense_mask().numpy()[:, :, rows], "dense_mask of some rows")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.npz"
            plot.save_plan(plan, path)
            loaded, live = plot.load_plan(path), snapshot(plan)
            for head in range(live.heads):
                if loaded.counts(head) != live.counts(head):
                    raise Wrong(f"saved plan: head {head} has other blocks")
            plot.mask_text(loaded, 0)


def chunk_case(c: Case) -> None:
    """A fixed pattern over a prompt in chunks, each with the keys so far, is the pattern over the whole prompt."""
    layout = prompt(c, 120)
    batch = layout.batch_size
    qkv, finite = tensors(c, layout, batch)
    k, v, n = *qkv[1:], layout.length
    q = torch.randn((batch, qkv[0].shape[1], n, k.shape[3]), generator=torch.Generator().manual_seed(1)).to(k.dtype)
    spec = c.say("spec", c.pick(Strided(5), Dilated(9, 30, 3), StridedFixed(7, 2), AShape(16, 32), Dense()))
    cuts = sorted({0, n, *(c.rng.randrange(n + 1) for _ in range(3))})
    c.say("chunks", f"{cuts} of {layout!r}")
    for first, last in itertools.pairwise(cuts):
        part = layout[:last]
        call = {"layout": part, "backend": "reference", "block_size": 16}
        rows = q[:, :, first:last]
        plan = mmflex.plan(rows, k[:, :, :last], spec, **call)
        mask = token_mask(plan, spec)
        out = plan.attend(rows, k[:, :, :last], v[:, :, :last])
        compare(c, plan, (rows, k[:, :, :last], v[:, :, :last]), mask, out, None, finite)


# ---- expressions and selections of one's own -------------------------------------------------------------------------


@dataclass(frozen=True)
class Written(Pattern):
    """A mask from a text, over ``t`` and sympy."""

    text: str

    def mask(self, t: mmflex.Tokens) -> Any:
        return eval(self.text, {"t": t, "sympy": sympy})


def number(c: Case, depth: int) -> str:
    if not depth or c.chance(0.3):
        small = str(
            c.pick(0, 1, 2, 3, 7, 16, 100, 2**20, 2**29, 2**31, 2**40) if c.chance(0.3) else c.rng.randrange(40)
        )
        return c.pick("t.q", "t.k", "t.q", "t.k", "t.q_cell", "t.k_cell", "t.k_frame", "t.q_segment", small)
    a = number(c, depth - 1)
    few = c.pick(1, 2, 3, 5, 16, 97) if c.chance(0.95) else c.pick(0, -3, 2**33, 2.5)
    return c.pick(
        f"({a} + {number(c, depth - 1)})", f"({a} - {number(c, depth - 1)})", f"({few} * {a})", f"({a} % {few})",
        f"({a} // {few})", f"({number(c, 0)} * {a})",
    )  # fmt: skip


def condition(c: Case, depth: int) -> str:
    if not depth or c.chance(0.3):
        a, b = number(c, 2), number(c, 2)
        return c.pick(
            f"sympy.Eq({a}, {b})",
            f"sympy.Ne({a}, {b})",
            f"({a} < {b})",
            f"({a} <= {b})",
            f"({a} > {b})",
            f"({a} >= {b})",
        )
    a, b = condition(c, depth - 1), condition(c, depth - 1)
    if c.chance(0.03):
        return c.pick(
            f"sympy.Xor({a}, {b})",
            f"sympy.Implies({a}, {b})",
            f"sympy.ITE({a}, {b}, {a})",
            "sympy.Symbol('z') > t.k",
            "7",
        )
    return c.pick(f"({a} & {b})", f"({a} | {b})", f"(~{a})")


class _Plain:
    """Stands for sympy over plain arrays of Python integers."""

    @staticmethod
    def Eq(a: Any, b: Any) -> Any:
        return np.equal(a, b).astype(bool)

    @staticmethod
    def Ne(a: Any, b: Any) -> Any:
        return np.not_equal(a, b).astype(bool)

    @staticmethod
    def Xor(a: Any, b: Any) -> Any:
        return np.not_equal(a, b).astype(bool)

    @staticmethod
    def Implies(a: Any, b: Any) -> Any:
        return np.logical_or(np.logical_not(a), b).astype(bool)

    @staticmethod
    def ITE(a: Any, b: Any, c: Any) -> Any:
        return np.where(a, b, c).astype(bool)


def expression_case(c: Case) -> None:
    text = c.say("mask", condition(c, c.pick(1, 2, 3)))
    layout = c.pick(TokenLayout.text(41), prompt(c, 60))
    if layout.batch_size > 1:
        layout = TokenLayout.text(41)
    c.say("layout", f"{layout!r}")
    n = layout.length
    q = k = torch.randn((1, 1, n, 16), generator=torch.Generator().manual_seed(n))
    plan = mmflex.plan(q, k, Written(text), layout=layout, backend="reference", block_size=16)

    def over(name: str, rows: bool) -> np.ndarray:
        values = getattr(layout, name)[0].astype(object)
        return values[:, None] if rows else values[None]

    class Attributes:
        q, k = over("position", True), over("position", False)
        q_cell, k_cell = over("cell", True), over("cell", False)
        k_frame, q_segment = over("frame", False), over("segment", True)

    class Array(np.ndarray):
        """Compares to plain truth values, so that & | ~ are those of masks."""

        def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
            plain = [i.view(np.ndarray) if isinstance(i, Array) else i for i in inputs]
            found = np.asarray(getattr(ufunc, method)(*plain, **kwargs))
            truth = ufunc.__name__ in ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")
            return found.astype(bool).view(Array) if truth else found.view(Array)

    for name in [name for name in vars(Attributes) if not name.startswith("__")]:
        setattr(Attributes, name, getattr(Attributes, name).view(Array))
    try:
        meant = eval(text, {"t": Attributes, "sympy": _Plain})
    except ZeroDivisionError:  # in a part that the rest of the mask makes irrelevant
        c.checked = False
        return
    if isinstance(meant, (bool, int)):  # of numbers alone, and ~ of Python's truth values is a number
        meant = meant not in (False, -2) if meant in (False, True, -1, -2) else bool(meant)
    causal = np.tri(n, dtype=bool) & layout.valid[0] & layout.valid[0][:, None]
    wanted = np.broadcast_to(np.asarray(meant, dtype=bool), (n, n)) & causal
    same(plan.dense_mask()[0, 0].numpy(), wanted, "dense_mask")
    compare(c, plan, (q, k, k), wanted[None, None], plan.attend(q, k, k), None, True)


@dataclass(frozen=True)
class Selecting(Pattern):
    """Selects what it was given."""

    seed: int
    at_most: int

    def select(self, estimate: None, view: mmflex.View) -> Any:
        c = Case(random.Random(self.seed))
        shapes = {
            "columns": (view.size,),
            "diagonals": (view.tiles,),
            "blocks": (-(-view.rows // 8), -(-view.size // 8)),
        }
        generator = torch.Generator().manual_seed(self.seed)
        batch, heads = c.pick((1, 2), (1, 1), (2, 2)), None
        out: dict[str, Any] = {}
        for name, shape in shapes.items():
            size = (*batch, *shape) if c.chance(0.95) else (*batch, *(n + c.pick(-1, 1) for n in shape))
            out[name] = torch.rand(size, generator=generator) < c.pick(0.0, 0.1, 0.5)
            if c.chance(0.02):
                out[name] = c.pick(out[name].int(), out[name][0], out[name].numpy(), None, out[name].to("meta"), heads)
        out["stride"] = torch.randint(1, 9, batch, generator=generator)
        if c.chance(0.05):
            out["stride"] = c.pick(out["stride"].float(), -out["stride"], out["stride"] * 2**40, torch.tensor(3), 3)
        return out if c.chance(0.98) else c.pick(None, [], out["columns"])

    def mask(self, t: mmflex.Tokens) -> Any:
        lines = t.columns("columns", self.at_most) | t.diagonals("diagonals", self.at_most)
        comb = sympy.Eq(sympy.Mod(t.k, t.number("stride", at_least=1), evaluate=False), 0)
        return lines | t.blocks("blocks", self.at_most, 8) | (comb & (t.q - t.k < 30))


def selection_case(c: Case) -> None:
    layout = prompt(c, 80)
    spec = Selecting(c.rng.randrange(10**6), c.pick(10**6, 10**6, 1, 9))
    spec_ = spec.on(c.pick(None, "text", "video"), c.pick(None, "text", "video")) if c.chance(0.4) else spec
    c.say("spec", f"{spec_} on {layout!r}")
    n, batch = layout.length, c.pick(1, 2)
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn((batch, h, n, 16), generator=generator) for h in (2, 1, 1))
    plan = mmflex.plan(q, k, spec_, layout=layout, backend="reference", block_size=c.pick(16, 8))
    mask = plan.dense_mask().numpy()
    compare(c, plan, (q, k, v), mask, plan.attend(q, k, v), None, True)


# ---- layouts, patterns and files -------------------------------------------------------------------------------------


def layout_case(c: Case) -> None:
    """Constructors with odd values; what is accepted says what it was given."""
    way = c.rng.randrange(6)
    if way == 0:
        items = [segment(c) if c.chance(0.9) else odd(c) for _ in range(c.rng.randrange(4))]
        layout = TokenLayout.from_segments(c.say("segments", items) if c.chance(0.95) else c.say("segments", odd(c)))
    elif way == 1:
        names = ("modality", "frames", "height", "width", "newline", "timestamps")
        fields = {name: odd(c) for name in names if c.chance(0.3)}
        made = Segment(**({"modality": c.pick(*MODALITIES)} | c.say("segment", fields)))
        layout = TokenLayout.from_segments([made])
        if layout.length != made.tokens:
            raise Wrong(f"{layout.length} tokens of {made}, which says {made.tokens}")
    elif way == 2:
        fields = {name: odd(c) for name in ("frame", "cell", "segment", "valid") if c.chance(0.3)}
        ids = c.pick([0, 2, 2], [[0, 1], [2, 2]], odd(c), np.array([0, 2**32 + 2]), torch.tensor([0, 1]), [-1], [])
        layout = TokenLayout.from_modality_ids(c.say("ids", ids), **c.say("fields", fields))
    elif way == 3:
        few = [prompt(c, 20) if c.chance(0.95) else odd(c) for _ in range(c.rng.randrange(4))]
        length = c.pick(None, None, 30, odd(c))
        side = c.pick("left", "right", odd(c)) if c.chance(0.2) else "left"
        layout = TokenLayout.batch(c.say("layouts", few) if c.chance(0.95) else odd(c), side=side, length=length)
    elif way == 4:
        layout = TokenLayout.text(c.say("n", odd(c)))
    else:
        layout = prompt(c, 20)
        arrays = [getattr(layout, name) for name in ("position", "modality", "segment", "frame", "cell")]
        arrays[c.rng.randrange(5)] = c.say("array", odd(c)) if c.chance(0.5) else arrays[0][:, ::-1].copy()
        layout = TokenLayout(*arrays)
    again = TokenLayout.from_modality_ids(
        layout.modality, frame=layout.frame, cell=layout.cell, segment=layout.segment, valid=layout.valid
    )
    if again.fingerprint != layout.fingerprint:
        raise Wrong("a layout from the arrays of another differs")
    repr(layout), layout.rank, layout.frame_stride(c.pick(None, 0, 2)), layout[1:]


def json_case(c: Case) -> None:
    """JSON of patterns: round trips, and anything in any place of it."""
    made = pattern(c, 50, 3)
    data = json.loads(json.dumps(made.to_json()))
    again = from_json(data)
    if again != made or str(again) != str(made) or hash(again) != hash(made):
        raise Wrong(f"{made} comes back as {again}")
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                collect(value[key])

    collect(data)
    for _ in range(c.pick(0, 1, 1, 2)):
        holder, key = c.pick(*places)
        holder[key] = odd(c) if c.chance(0.8) else made.to_json()
    c.say("data", data)
    from_json(data).to_json()


def config_case(c: Case) -> None:
    layers, heads = c.rng.randrange(1, 4), c.rng.randrange(1, 4)
    few = [pattern(c, 50, 1) for _ in range(2)]
    spec = {layer: [c.pick(*few) for _ in range(heads)] for layer in range(layers) if c.chance(0.8)}
    config = Config.of(spec, layers if c.chance(0.99) else odd(c), heads, model="m", by="fuzz")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config(config, path)
        if load_config(path) != config:
            raise Wrong("a config comes back as another")
        if c.chance(0.3):
            return
        data = json.loads(path.read_text())
        name = c.pick(*data)
        if c.chance(0.5):
            data[name] = as_json(odd(c))
            path.write_text(json.dumps(c.say("data", data)))
        else:
            changed(c, path)
        load_config(path) if c.chance(0.9) else load_minference_config(path)


def as_json(value: Any) -> Any:
    """What JSON can write of a value."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return "x"


def changed(c: Case, path: Path) -> None:
    """Some bytes of a file changed, taken out or repeated."""
    whole = bytearray(path.read_bytes())
    for _ in range(c.pick(1, 2, 5)):
        place = c.rng.randrange(len(whole))
        way = c.rng.randrange(4)
        if way == 0:
            del whole[place : place + c.pick(1, 3, 100)]
        elif way == 1:
            whole[place:place] = whole[place : place + c.pick(1, 30)]
        else:
            whole[place] = c.rng.randrange(256)
        whole = whole or bytearray(b"x")
    path.write_bytes(whole)


_saved: list[dict[str, np.ndarray]] = []


def saved_arrays() -> list[dict[str, np.ndarray]]:
    """Arrays of some saved plans."""
    if not _saved:
        layout = TokenLayout.from_segments([("text", 40), ("video", (5, 5, 5)), ("text", 60)])
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn((1, h, layout.length, 16), generator=generator) for h in (4, 2))
        mixed = [AShape(30, 40), VerticalSlash(40, 60), Grid("frame", rows=True, slash=True, local=30), Dense()]
        for spec in (mixed, VerticalSlash(9, 20).on("video"), Dense()):
            plan = mmflex.plan(q, k, spec, layout=layout, backend="reference", block_size=16)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "plan.npz"
                plot.save_plan(plan, path)
                with np.load(path) as file:
                    _saved.append({name: file[name] for name in file.files})
    return _saved


def saved_case(c: Case) -> None:
    """A saved plan that is not what was saved: refused, or it can be drawn."""
    arrays = dict(c.pick(*saved_arrays()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.npz"
        way = c.rng.randrange(3)
        if way == 0:
            np.savez_compressed(path, **arrays)
            changed(c, path)
        elif way == 1:
            name = c.pick(*arrays)
            array = arrays[name]
            arrays[name] = c.pick(
                array.T, array[..., None], array[1:] if array.ndim else array, np.zeros(0), np.array(7), np.array("x"),
                array.astype(str), array * 2 if array.dtype.kind in "iuf" else array, np.concatenate([array, array])
                if array.ndim else array,
            )  # fmt: skip
            c.say("array", name)
            np.savez(path, **arrays)
        else:
            meta = json.loads(str(arrays["meta"]))
            holder = c.pick(meta, *meta["launches"])
            name = c.pick(*holder)
            holder[name] = as_json(odd(c))
            c.say("meta", f"{name}={shown(holder[name])}")
            arrays["meta"] = np.array(json.dumps(meta))
            np.savez(path, **arrays)
        loaded = plot.load_plan(path)
        plot.mask_text(loaded, 0), loaded._repr_html_(), [loaded.counts(head) for head in range(loaded.heads)]


KINDS: dict[str, tuple[int, Callable[[Case], None]]] = {
    "call": (55, call_case),
    "chunk": (4, chunk_case),
    "expression": (12, expression_case),
    "selection": (7, selection_case),
    "layout": (8, layout_case),
    "json": (6, json_case),
    "config": (4, config_case),
    "saved": (4, saved_case),
}
"""Kind -> (its share in per cent, what draws and checks a case)."""


# ---- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a case ended: accepted, beyond float32 (accepted, its numbers not compared), refused, wrong, undeclared."""

    kind: str
    result: str
    message: str = ""
    said: str = ""


def run_case(seed: int, number: int, raises: bool = False) -> Outcome:
    """One case; the same for the same seed and number. ``raises``: what is wrong or undeclared is raised."""
    rng = random.Random(f"{seed}:{number}")
    names, weights = zip(*((name, weight) for name, (weight, _) in KINDS.items()), strict=True)
    kind = rng.choices(names, weights)[0]
    c = Case(rng)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind][1](c)
    except Exception as error:
        result = judged(error)
        if raises and result != "refused":
            raise
        return Outcome(kind, result, described(error), " ".join(c.said))
    return Outcome(kind, "accepted" if c.checked else "beyond float32")


def judged(error: Exception) -> str:
    """Whether an exception is one that mmflex declares, raised in its own code."""
    if isinstance(error, Wrong):
        return "wrong"
    text = str(error)
    declared = isinstance(error, DECLARED) or (type(error) is RuntimeError and any(part in text for part in RUNTIME))
    return "refused" if declared and len(text) <= LONGEST_MESSAGE and own(error) else "undeclared"


def own(error: Exception) -> bool:
    """Whether it was raised by mmflex (or by a dataclass of it), not by something deeper that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    if any("__assert_async" in str(f.line) or "_assert_async" in str(f.line) for f in frames[-2:]):
        return True
    last = frames[-1].filename
    return last.startswith(OURS) or last == "<string>" or any(f.name == "mask" for f in frames)


def described(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="this one alone, with the exception that it ends in")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case is not None:
        print(run_case(options.seed, options.case, raises=True))
        return 0
    counts: Counter[tuple[str, str]] = Counter()
    failures, begun, slowest = 0, time.monotonic(), (0.0, 0)
    for number in range(options.first, options.first + options.cases):
        started = time.monotonic()
        outcome = run_case(options.seed, number)
        slowest = max(slowest, (time.monotonic() - started, number))
        counts[outcome.kind, outcome.result] += 1
        if outcome.result in ("wrong", "undeclared"):
            failures += 1
            print(f"{outcome.result}: {outcome.message}\n  {outcome.said[:1500]}")
            print(f"  python -m tests.fuzz --seed {options.seed} --case {number}", flush=True)
    out = io.StringIO()
    results = ("accepted", "beyond float32", "refused", "wrong", "undeclared")
    print(f"{'':12}" + "".join(f"{name:>16}" for name in results), file=out)
    for kind in (*KINDS, "all"):
        row = [sum(n for (k, r), n in counts.items() if r == name and kind in (k, "all")) for name in results]
        print(f"{kind:12}" + "".join(f"{n:16}" for n in row), file=out)
    seconds = time.monotonic() - begun
    print(out.getvalue() + f"seed {options.seed}, {options.cases} cases from {options.first}, {seconds:.0f} s")
    print(f"the slowest is case {slowest[1]}, {slowest[0]:.1f} s")
    if options.json:
        table = {kind: {r: counts[kind, r] for r in results} for kind in KINDS}
        data = {
            "seed": options.seed,
            "first": options.first,
            "cases": options.cases,
            "seconds": seconds,
            "counts": table,
        }
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
