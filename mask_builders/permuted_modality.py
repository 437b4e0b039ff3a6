"""Boundaries between modalities (MMInference, section 3.2): a pattern per query modality, or per pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from mmflex.ir import expr as x
from mmflex.ir.layout import MODALITY_NAMES, modality_id
from mmflex.ir.pattern import Pattern, Tokens, among


def _items(parts: Any) -> tuple[tuple[Any, Any], ...]:
    return tuple(parts.items()) if isinstance(parts, Mapping) else tuple(tuple(item) for item in parts)


def _check(pattern: Any) -> Pattern:
    if not isinstance(pattern, Pattern):
        raise TypeError(f"a boundary maps modalities to patterns, got {pattern!r}")
    return pattern


@dataclass(frozen=True)
class QBoundary(Pattern):
    """``QBoundary({"video": Grid(), "text": VerticalSlash()})``: queries of each modality have their own pattern over
    all keys, its index estimated from that modality's last queries. Queries of a modality not named are dense."""

    parts: Any

    def __post_init__(self) -> None:
        parts = {modality_id(m): _check(p) for m, p in _items(self.parts)}
        object.__setattr__(self, "parts", tuple(sorted(parts.items())))

    def denote(self, t: Tokens) -> Boolean:
        parts = dict(self.parts)
        terms = []
        for m in t.layout.modalities:
            inner = parts[m].on(query=m).denote(t) if m in parts else among(x.q, m, t.layout)
            terms.append(inner)
        return sympy.Or(*terms)

    def __str__(self) -> str:
        return "QBoundary(" + ", ".join(f"{MODALITY_NAMES[m]}: {p}" for m, p in self.parts) + ")"


@dataclass(frozen=True)
class Boundary2D(Pattern):
    """``Boundary2D({("video", "video"): Grid(), ("text", "video"): VerticalSlash(), ...})``: each pair of a query and a
    key modality has its own pattern, all under one softmax. Sinks, windows and lines count in keys of that modality: a
    text query stands where the last video token before it stands. Pairs not named are dense."""

    parts: Any

    def __post_init__(self) -> None:
        parts = {}
        for pair, pattern in _items(self.parts):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(
                    f"Boundary2D maps (query modality, key modality) pairs to patterns, got the key {pair!r}"
                )
            parts[modality_id(pair[0]), modality_id(pair[1])] = _check(pattern)
        object.__setattr__(self, "parts", tuple(sorted(parts.items())))

    def denote(self, t: Tokens) -> Boolean:
        parts = dict(self.parts)
        terms = []
        for a in t.layout.modalities:
            for b in t.layout.modalities:
                if (a, b) in parts:
                    terms.append(parts[a, b].on(query=a, key=b).denote(t))
                else:
                    terms.append(among(x.q, a, t.layout) & among(x.k, b, t.layout))
        return sympy.Or(*terms)

    def __str__(self) -> str:
        named = (f"{MODALITY_NAMES[a]}>{MODALITY_NAMES[b]}: {p}" for (a, b), p in self.parts)
        return f"Boundary2D({', '.join(named)})"
