"""Boundaries between modalities (MMInference, section 3.2): a pattern per query modality, or per pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from mmflex.ir import expr as x
from mmflex.ir.layout import MODALITY_NAMES, modality_id
from mmflex.ir.pattern import Pattern, Tokens, among, check_nesting
from mmflex.ir.shown import shown


def _items(parts: Any) -> tuple[tuple[Any, Any], ...]:
    """(key, pattern) of a mapping, or of a sequence of such pairs as JSON has it."""
    items = tuple(parts.items()) if isinstance(parts, Mapping) else parts
    if not isinstance(items, (tuple, list)) or any(not isinstance(i, (tuple, list)) or len(i) != 2 for i in items):
        raise TypeError(f"a boundary maps modalities to patterns, got {shown(parts)}")
    for _, pattern in items:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"a boundary maps modalities to patterns, got {shown(pattern)}")
    return tuple(items)  # type: ignore[arg-type]


def _sorted(pairs: list[tuple[Any, Pattern]]) -> tuple[tuple[Any, Pattern], ...]:
    """By key; ValueError where a key is named twice, by name and by id."""
    parts = dict(pairs)
    if len(parts) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"a boundary names {shown(twice)} more than once: give each modality (pair) one pattern")
    return tuple(sorted(parts.items(), key=lambda item: item[0]))


@dataclass(frozen=True)
class QBoundary(Pattern):
    """``QBoundary({"video": Grid(), "text": VerticalSlash()})``: queries of each modality have their own pattern over
    all keys, its index estimated from that modality's last queries. Queries of a modality not named are dense."""

    parts: Any

    def __post_init__(self) -> None:
        parts = _sorted([(modality_id(m), pattern) for m, pattern in _items(self.parts)])
        object.__setattr__(self, "parts", parts)
        check_nesting(self, (pattern for _, pattern in parts))

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
        named = []
        for pair, pattern in _items(self.parts):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(
                    f"Boundary2D maps (query modality, key modality) pairs to patterns, got the key {shown(pair)}"
                )
            named.append(((modality_id(pair[0]), modality_id(pair[1])), pattern))
        parts = _sorted(named)
        object.__setattr__(self, "parts", parts)
        check_nesting(self, (pattern for _, pattern in parts))

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
