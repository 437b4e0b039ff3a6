"""The check's cases: every pair of settings of their dimensions occurs, and every setting on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ..ir.layout import TokenLayout
from ..runtime.backends import BACKENDS, why_not
from .covering import Settings, covering, required
from .works import WORKS

SHAPES = {"8/2 x 64": (8, 2, 64), "7/1 x 128": (7, 1, 128), "4/4 x 40": (4, 4, 40)}
"""Query heads, KV heads, head dimension. The last is no power of two."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MEMORY = ("heads first", "tokens first", "joint")
"""How q, k and v lie in memory: [B, H, N, D], [B, N, H, D], or side by side as one projection leaves them."""

SCALES = ("usual", "negative", "zero")
"""Of the scores: ``1 / sqrt(D)``, the same negative, 0."""

QUERIES = 300
"""In prompts that have fewer queries than keys."""


# ---- prompts ---------------------------------------------------------------------------------------------------------

# About 300 tokens of each modality: three tiles each, so that their launches share kernels.
_FIRST = (("text", 80), ("video", (7, 5, 8), {"newline": "frame", "timestamps": 4}), ("text", 100), ("image", (17, 17)),
          ("text", 92))  # fmt: skip
_SECOND = (("video", (7, 5, 8), {"newline": "frame", "timestamps": 4}), ("image", (16, 17)), ("text", 289))


@dataclass(frozen=True)
class PromptKind:
    """How many prompts there are, what their tokens are and which of them are queries.

    Attributes:
        lengths: valid tokens of each prompt; None: one layout for a whole batch of two.
        side: of the padding. unlike: the second prompt has its modalities in other places.
        queries: ``(first, end)`` token numbers of runs of queries; None for all.
    """

    lengths: tuple[int, ...] | None = (0,)
    side: str = "right"
    unlike: bool = False
    queries: tuple[tuple[int, int], ...] | None = None


TOKENS = TokenLayout.from_segments(_FIRST).length

PROMPTS = {
    "plain": PromptKind(),
    "last queries": PromptKind(queries=((TOKENS - QUERIES, TOKENS),)),
    "chunk": PromptKind(queries=((333, 333 + QUERIES),)),
    "two chunks": PromptKind(queries=((100, 100 + QUERIES // 3), (500, 500 + 2 * QUERIES // 3))),
    "padded left": PromptKind((0, 600), "left"),
    "padded right": PromptKind((550, 0), "right"),
    # Of the second prompt, the first run of queries is padding alone.
    "padded chunks": PromptKind((0, 640), "left", queries=((50, 50 + QUERIES // 2), (TOKENS - QUERIES // 2, TOKENS))),
    "unlike": PromptKind((0, 0), unlike=True),
    "unlike chunk": PromptKind((0, 0), unlike=True, queries=((333, 333 + QUERIES),)),
    "one layout for two": PromptKind(None),
}
"""By name; a length of 0 is all of it."""


@lru_cache(maxsize=16)
def layout_of(prompt: str) -> TokenLayout:
    kind = PROMPTS[prompt]
    first, second = TokenLayout.from_segments(_FIRST), TokenLayout.from_segments(_SECOND)
    if kind.lengths is None or len(kind.lengths) == 1:
        return first
    several = (first, second if kind.unlike else first)
    cut = [layout[: length or None] for layout, length in zip(several, kind.lengths, strict=True)]
    return TokenLayout.batch(cut, side=kind.side, length=TOKENS)


def query_tokens(prompt: str) -> np.ndarray:
    """int [M], the token number of every query."""
    runs = PROMPTS[prompt].queries
    return np.arange(TOKENS) if runs is None else np.concatenate([np.arange(*run) for run in runs])


# ---- cases -----------------------------------------------------------------------------------------------------------


DIMENSIONS = {
    "work": tuple(WORKS),
    "prompt": tuple(PROMPTS),
    "dtype": tuple(DTYPES),
    "lse": ("no lse", "lse"),
    "memory": MEMORY,
    "shape": tuple(SHAPES),
    "scale": SCALES,
}
"""What varies beside the backend; the usual setting first."""

USUAL = {"backend": "reference", **{name: settings[0] for name, settings in DIMENSIONS.items()}}


@dataclass(frozen=True)
class Case:
    """One setting of every dimension, by name."""

    backend: str
    work: str
    prompt: str
    dtype: str
    lse: str
    memory: str
    shape: str
    scale: str

    @property
    def name(self) -> str:
        return ", ".join(asdict(self).values())

    @property
    def need_lse(self) -> bool:
        return self.lse == "lse"

    @property
    def scale_value(self) -> float:
        usual = SHAPES[self.shape][2] ** -0.5
        return {"usual": usual, "negative": -usual, "zero": 0.0}[self.scale]

    @property
    def batch(self) -> int:
        lengths = PROMPTS[self.prompt].lengths
        return 2 if lengths is None else len(lengths)

    @property
    def kernels(self) -> str:
        """What its compiled kernels follow from, as far as can be told beforehand: cases that share it share them."""
        shared = (self.backend, self.work, self.dtype, self.lse, self.shape, str(self.scale == "zero"))
        if self.backend == "flash":  # compiled for any length
            return "/".join((*shared, str(self.batch)))
        return "/".join((*shared, self.prompt, self.memory))


def possible(settings: Settings, device: str) -> bool:
    """Whether a case with these settings, and any others, can run on a device; without a backend, on the reference."""
    case = Case(**{**USUAL, **settings})
    backend, dim = BACKENDS[case.backend], SHAPES[case.shape][2]
    dtype = DTYPES[case.dtype] if "dtype" in settings else torch.bfloat16
    if why_not(case.backend, device, dim, dtype) is not None:
        return False
    if not backend.lse and (case.need_lse or case.work == "residues"):
        return False
    return case.backend != "dense" or case.work in ("dense", USUAL["work"] if "work" not in settings else "dense")


def cases(device: str, backends: Sequence[str], thorough: bool = False) -> list[Case]:
    """Cases in which every possible pair of settings occurs; of the reference's, only where it is among the backends.

    Kernels take long to compile, so what needs no backend in particular is left to those that do not compile. Beside
    the reference, only flash runs works with every kind of prompt, since it compiles for any length: those whose masks
    are comparisons (what is looked up runs on Triton). ``thorough``: so do all backends and works.
    """
    order = {name: number for number, name in enumerate(["reference", "dense", "cpu", "triton", "flash"])}
    every = sorted({"reference", *backends}, key=lambda name: order.get(name, len(order)))
    dimensions = {"backend": every, **DIMENSIONS}

    def can(settings: Settings) -> bool:
        return possible(settings, device)

    wanted = required(dimensions, combinations(dimensions, 2), can)
    compares = {name for name, work in WORKS.items() if not work.needs & {"looked up", "residue-major"}}
    for combination in required(dimensions, [("backend", "work", "prompt")], can):
        (_, backend), (_, work), _ = combination
        if thorough or backend == "reference" or (backend == "flash" and work in compares):
            wanted.append(combination)
    wanted.sort(key=lambda c: (c[0][0] != "backend", len(c)))
    found = [Case(**settings) for settings in covering(dimensions, wanted, can)]
    return [case for case in found if case.backend in backends]


# ---- inputs ----------------------------------------------------------------------------------------------------------


def tensors(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a case, with some keys that many queries look for; drawn on the CPU, the same everywhere."""
    heads, kv_heads, dim = SHAPES[case.shape]
    generator = torch.Generator().manual_seed(seed)
    m = len(query_tokens(case.prompt))

    def draw(count: int, tokens: int) -> Tensor:
        return torch.randn(case.batch, tokens, count, dim, generator=generator)

    q, k, v = draw(heads, m), draw(kv_heads, TOKENS), draw(kv_heads, TOKENS)
    k[:, torch.randperm(TOKENS, generator=generator)[:40]] *= 2.0
    q, k, v = (t.to(device, DTYPES[case.dtype]) for t in (q, k, v))
    if case.memory == "joint":
        if m == TOKENS:
            q, k, v = torch.cat([q, k, v], 2).split([heads, kv_heads, kv_heads], 2)
        else:
            k, v = torch.cat([k, v], 2).split([kv_heads, kv_heads], 2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (q.contiguous(), k.contiguous(), v.contiguous()) if case.memory == "heads first" else (q, k, v)
