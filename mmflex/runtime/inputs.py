"""What `attention` and `plan` take, and what they say of anything else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..ir.layout import TokenLayout
from ..ir.pattern import EstimateFrom, Pattern
from ..ir.shown import shown

Spec = Pattern | Sequence[Pattern]

LARGEST_BLOCK = 1024
"""Tokens per block, at most."""


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in the dtype of the tensors: autocast would round those of float32, and give parts of a result in
    another dtype."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def check(q: Tensor, k: Tensor, v: Tensor | None, spec: Spec, layout: TokenLayout | None) -> tuple[Pattern, ...]:
    """The pattern of each head; TypeError or ValueError where shapes, dtypes, devices, layout or spec do not fit."""
    given = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, t in given.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is {type(t).__name__}: give a tensor [batch, heads, tokens, head_dim]")
        if t.is_nested or t.layout != torch.strided:
            kind = "nested" if t.is_nested else f"of layout {t.layout}"
            raise TypeError(f"{name} is {kind}: give a dense tensor, prompts of a batch padded to one length")
        if t.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(t.shape)}: give [batch, heads, tokens, head_dim]")
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} is {t.dtype}: use float32, bfloat16 or float16")
        for what, here, other in (("dtype", t.dtype, q.dtype), ("device", t.device, q.device)):
            if here != other:
                raise TypeError(f"{name} has {what} {here} but q {other}: move one with .to()")
        if t.is_meta:
            raise ValueError(f"{name} is on the meta device, where tensors hold no values: move it to a CPU or a GPU")
        if isinstance(t, FakeTensor):
            raise TypeError(f"{name} is a FakeTensor, which holds no values to plan by: call outside of FakeTensorMode")
        if t.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch size {t.shape[0]} but q {q.shape[0]}: they must agree")
    heads, kv_heads, n = q.shape[1], k.shape[1], k.shape[2]
    if kv_heads == 0 or heads % kv_heads or not heads:
        raise ValueError(f"q has {heads} heads, k {kv_heads}: the query heads must be a multiple of the KV heads")
    if q.shape[2] > n:
        raise ValueError(f"q has {q.shape[2]} tokens but k {n}: the queries are among the tokens of k, so M <= N")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head dimension {q.shape[3]} but k {k.shape[3]}: they must agree")
    if not 16 <= q.shape[3] <= 256:
        raise ValueError(f"the head dimension is {q.shape[3]}: from 16 to 256 are supported; pad with zeros below 16")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)} but k {tuple(k.shape)}: heads and tokens must agree")
    if v is not None and not 1 <= v.shape[3] <= 256:
        raise ValueError(f"v has head dimension {v.shape[3]}: from 1 to 256 are supported")
    if layout is not None:
        if not isinstance(layout, TokenLayout):
            raise TypeError(f"layout is {type(layout).__name__}: build one with mmflex.TokenLayout.from_segments(...)")
        if layout.length != n:
            raise ValueError(f"the layout has {layout.length} tokens but k {n}: slice it, layout[:{n}], or pad it")
        if layout.batch_size not in (1, q.shape[0]):
            raise ValueError(
                f"the layout has {layout.batch_size} prompts but q {q.shape[0]}: give one each, or one for all"
            )
    if not isinstance(spec, (Pattern, Sequence)) or isinstance(spec, str):
        raise TypeError(f"spec is {shown(spec)}: give a pattern (see mask_builders), or a sequence, one per query head")
    patterns = (spec,) * heads if isinstance(spec, Pattern) else tuple(spec)
    for p in patterns:
        if not isinstance(p, Pattern):
            raise TypeError(f"spec holds {shown(p)}: give a pattern (see mask_builders), or one per query head")
        check_hash(p)
    if len(patterns) != heads:
        raise ValueError(
            f"spec has {len(patterns)} patterns for {heads} query heads: give one per head, or a single one"
        )
    return patterns


def check_hash(pattern: Pattern) -> None:
    """TypeError where what was decided for a pattern cannot be looked up."""
    try:
        hash(pattern)
    except TypeError as error:
        raise TypeError(
            f"the pattern {type(pattern).__name__} cannot be hashed ({error}): give its fields values that can be, "
            "such as tuples for lists"
        ) from None


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale of the scores; TypeError, ValueError for what is no finite float32 number."""
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f"scale is {shown(scale)}: give a number, or None for 1 / sqrt(head dimension)")
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale is {shown(scale)}: give a finite float32 number, or None for 1 / sqrt(head dimension)")
    return float(scale)


def check_block_size(tile: Any) -> int:
    """The block size; TypeError, ValueError for what is none."""
    if not isinstance(tile, int) or isinstance(tile, bool):
        raise TypeError(f"block_size is {shown(tile)}: give a whole number of tokens")
    if not 1 <= tile <= LARGEST_BLOCK:
        raise ValueError(f"block_size is {shown(tile)}: use 1 to {LARGEST_BLOCK} tokens, 128 except for experiments")
    return tile


def check_estimate(given: EstimateFrom, q: Tensor) -> None:
    """ValueError, TypeError for queries to estimate with that do not go with q."""
    for what, own, other in (
        ("dtype", given.q.dtype, q.dtype),
        ("device", given.q.device, q.device),
        ("batch size", given.q.shape[0], q.shape[0]),
        ("heads", given.q.shape[1], q.shape[1]),
        ("head dimension", given.q.shape[3], q.shape[3]),
    ):
        if own != other:
            raise ValueError(f"estimate_from has {what} {own} but q {other}: they must agree")


def check_planned(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, shape: tuple[Any, Any], device: torch.device
) -> None:
    """TypeError, ValueError for tensors that a plan was not made for: ``shape`` of q and k, ``device``."""
    if v is None:
        raise TypeError("v is None: give a tensor [batch, heads, tokens, head_dim]")
    check(q, k, v, pattern, None)
    if q.device != device:
        raise TypeError(f"planned on {device}, q is on {q.device}: plan again, or move it with .to()")
    if (tuple(q.shape), tuple(k.shape)) != shape:
        raise ValueError(f"planned for q and k of shapes {shape}, got {tuple(q.shape)}, {tuple(k.shape)}: plan again")


def check_numbers(given: Any, name: str, what: str, count: int) -> np.ndarray:
    """int64 [R]: numbers of queries or heads, of which there are ``count``; TypeError, ValueError for anything else."""
    numbers = np.asarray(given)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise TypeError(f"{name} is {shown(given)}: give a list of numbers of {what}, such as range({min(count, 128)})")
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < count:
        raise ValueError(f"{name} is {shown(given)}: the plan has the {what} 0 to {count - 1}")
    return numbers.astype(np.int64)
