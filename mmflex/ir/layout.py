"""TokenLayout: which token is what, the only thing mmflex needs to know about a prompt besides q, k and v.

A layout lives on the host (int32 arrays, a few MB at one million tokens). Everything that follows from it alone
(token orders, ranks, frame strides) is computed there once, so no device value is ever read back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .identity import alive, new_serial
from .memo import Memo
from .segments import LONGEST_PROMPT, MODALITIES, MODALITY_NAMES, Segment, check_length, count_of, modality_id
from .shown import shown

__all__ = [
    "LONGEST_PROMPT", "MODALITIES", "MODALITY_NAMES", "Segment", "TokenLayout", "layouts_alive", "modality_id",
]  # fmt: skip
"""What layouts are made of is imported from here, wherever it is defined."""

MEMO = 4096
"""Entries kept with a layout."""

_FIELDS = ("position", "modality", "segment", "frame", "cell")


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """What each of the N tokens of B prompts is. Immutable, its arrays are read-only; equal layouts have equal
    ``fingerprint``.

    Attributes (numpy int32 ``[B, N]``; B = 1 stands for every prompt of a batch):
        position: 0, 1, 2, ... over the valid tokens of a prompt, -1 for padding.
        modality: 0 text, 1 image, 2 video, 3 audio.
        segment: which segment of the prompt the token belongs to (timestamps belong to their video's segment).
        frame: frame within its segment, -1 where there is none.
        cell: place within the frame, -1 where there is none.
    """

    position: np.ndarray
    modality: np.ndarray
    segment: np.ndarray
    frame: np.ndarray
    cell: np.ndarray
    memo: Memo = field(default_factory=lambda: Memo(MEMO), init=False, repr=False, compare=False)
    serial: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        arrays = {name: _array(getattr(self, name), name) for name in _FIELDS}
        shape, position = arrays["modality"].shape, arrays["position"]
        if not shape[0]:
            raise ValueError(f"the layout has shape {shape}: a layout needs at least one prompt")
        check_length(shape[1])
        for name, array in arrays.items():
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape} but modality {shape}: give one value per token")
            array.setflags(write=False)  # what follows from them is computed once
            object.__setattr__(self, name, array)
        _check_modalities(arrays["modality"])
        valid = position >= 0
        wrong = position != np.where(valid, np.cumsum(valid, axis=1, dtype=np.int32) - 1, -1)
        if wrong.any():
            row, token = np.argwhere(wrong)[0].tolist()
            raise ValueError(
                f"position[{row}, {token}] is {position[row, token]}: positions count the valid tokens of a prompt "
                "from 0 on, and are -1 for padding"
            )
        object.__setattr__(self, "serial", new_serial(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the arrays alone, not what was computed from them."""
        return TokenLayout, tuple(getattr(self, name) for name in _FIELDS)

    # ---- building -------------------------------------------------------------------------------------------------

    @classmethod
    def _of(cls, modality: Any, segment: Any, frame: Any, cell: Any, valid: np.ndarray) -> TokenLayout:
        position = np.where(valid, np.cumsum(valid, axis=1, dtype=np.int32) - 1, -1)
        return cls(position, modality, segment, frame, cell)

    @classmethod
    def from_segments(cls, segments: Iterable[Segment | Sequence[Any]]) -> TokenLayout:
        """One prompt, from segments in order: ``[("text", 40), ("video", (64, 16, 16)), ("image", (24, 24))]``.

        An item is ``(modality, size)``, ``(modality, size, {"newline": "frame", "timestamps": 8})`` or a `Segment`.
        The size of text and audio is a number of tokens, that of an image ``(height, width)`` or ``(1, height,
        width)``, that of a video ``(frames, height, width)``.

        Raises:
            ValueError: an item of another form; it is named, beside the form that is expected.
        """
        given, total = [], 0
        for item in segments:
            given.append(Segment.of(item))
            total += given[-1].tokens
            check_length(total)
        parts = [segment.columns(number) for number, segment in enumerate(given)]
        rows = np.concatenate(parts) if parts else np.empty((0, 4), np.int32)
        modality, segment, frame, cell = rows.T[:, None]
        return cls._of(modality, segment, frame, cell, np.ones(modality.shape, bool))

    @classmethod
    def text(cls, n: int) -> TokenLayout:
        """``n`` tokens of text, one segment (cached)."""
        return _text(count_of(n, "the length of a layout"))

    @classmethod
    def from_modality_ids(
        cls, ids: Any, *, frame: Any = None, cell: Any = None, segment: Any = None, valid: Any = None
    ) -> TokenLayout:
        """From ids ``[B, N]`` (or ``[N]``) as in ``mm_token_type_ids``, and optionally frame, cell, segment and a
        boolean attention mask of the same shape. Without ``segment`` every run of one modality is a segment.

        Tensors on a device are copied to the host: call it once per prompt, not once per layer.
        """
        ids = _array(ids, "ids")
        if len(ids) == 0:
            raise ValueError(f"ids has shape {ids.shape}: a layout needs at least one prompt")
        _check_modalities(ids)
        given = {"frame": frame, "cell": cell, "segment": segment, "valid": valid}
        arrays = {}
        for name, value in given.items():
            if value is not None:
                arrays[name] = _array(value, name)
                if arrays[name].shape != ids.shape:
                    raise ValueError(
                        f"{name} has shape {arrays[name].shape} but ids {ids.shape}: give one value per token"
                    )
        none = np.full(ids.shape, -1, np.int32)
        change = np.zeros(ids.shape, bool)
        change[:, 1:] = ids[:, 1:] != ids[:, :-1]
        mask = arrays.get("valid", np.ones(ids.shape)) != 0
        runs = np.cumsum(change, axis=1, dtype=np.int32)
        return cls._of(ids, arrays.get("segment", runs), arrays.get("frame", none), arrays.get("cell", none), mask)

    @classmethod
    def batch(cls, layouts: Sequence[TokenLayout], *, side: str = "right", length: int | None = None) -> TokenLayout:
        """Stack prompts of different lengths, padded on the ``side`` that the tokenizer pads ("left" or "right")."""
        if side not in ("left", "right"):
            raise ValueError(f"side is 'left' or 'right', got {shown(side)}")
        if isinstance(layouts, TokenLayout) or not isinstance(layouts, Sequence):
            raise TypeError(f"layouts is {shown(layouts)}: give a list of layouts, one per prompt")
        for number, layout in enumerate(layouts):
            if not isinstance(layout, TokenLayout):
                raise TypeError(f"layouts[{number}] is {shown(layout)}: give a list of layouts, one per prompt")
        if not layouts:
            raise ValueError("an empty list of layouts: a batch needs at least one prompt")
        longest = max(layout.length for layout in layouts)
        length = longest if length is None else count_of(length, "the length of a layout")
        check_length(length)
        if length < longest:
            raise ValueError(f"length is {length} but the longest prompt has {longest} tokens")

        def pad(layout: TokenLayout, array: np.ndarray, value: int) -> np.ndarray:
            gap = length - layout.length
            return np.pad(array, ((0, 0), (gap, 0) if side == "left" else (0, gap)), constant_values=value)

        stacked = {
            name: np.concatenate([pad(x, getattr(x, name), 0 if name == "modality" else -1) for x in layouts])
            for name in _FIELDS
        }
        valid = stacked.pop("position") >= 0
        return cls._of(stacked["modality"], stacked["segment"], stacked["frame"], stacked["cell"], valid)

    def __getitem__(self, tokens: slice) -> TokenLayout:
        """The layout of a slice of the tokens (``layout[:4096]``: what the first 4096 tokens know of the prompt)."""
        if not isinstance(tokens, slice) or tokens.step not in (None, 1):
            raise TypeError(f"a layout is sliced by tokens, layout[start:stop], got {shown(tokens)}")
        cut = {name: getattr(self, name)[:, tokens] for name in _FIELDS}
        return self._of(cut["modality"], cut["segment"], cut["frame"], cut["cell"], cut["position"] >= 0)

    # ---- reading --------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self.modality.shape[0]

    @property
    def length(self) -> int:
        """N, tokens per prompt, padding included."""
        return self.modality.shape[1]

    @property
    def valid(self) -> np.ndarray:
        """bool [B, N]: False for padding."""
        return self.position >= 0

    @property
    def padded(self) -> bool:
        return self.once("padded", lambda: bool((self.position < 0).any()))

    @property
    def modalities(self) -> tuple[int, ...]:
        """Ids of the modalities that occur, ascending."""
        return self.once("modalities", lambda: tuple(np.unique(self.modality[self.valid]).tolist()))

    def of(self, modality: str | int | None) -> np.ndarray:
        """bool [B, N]: the valid tokens of a modality, by name or id (None: of all)."""
        number = modality_id(modality) if isinstance(modality, str) else modality
        return self.valid if number is None else self.valid & (self.modality == number)

    def most(self, modality: int | None) -> int:
        """Tokens of a modality (None: of any) in the prompt that has most of them; at least 1."""
        return self.once(("most", modality), lambda: max(1, int(self.of(modality).sum(axis=1).max(initial=0))))

    def coordinate(self, modality: str | int | None) -> np.ndarray:
        """int32 [B, N]: how many tokens of ``modality`` (None: of any) stand up to and including this one, less one.

        For a token of that modality this is its rank; for any other it is the rank of the last such token before it
        (-1 before the first). So for a key k of the modality, ``coordinate(q) >= coordinate(k)`` is causality.
        """
        return self.once(
            ("coordinate", modality), lambda: np.cumsum(self.of(modality), axis=1, dtype=np.int32) - np.int32(1)
        )

    @property
    def rank(self) -> np.ndarray:
        """int32 [B, N]: rank of each token within its modality, -1 for padding."""

        def build() -> np.ndarray:
            rank = np.full(self.modality.shape, -1, np.int32)
            for m in self.modalities:
                rank = np.where(self.of(m), self.coordinate(m), rank)
            return rank

        return self.once("rank", build)

    def frame_stride(self, modality: str | int | None) -> int | None:
        """Tokens from one frame to the next (the commonest distance, in ``coordinate(modality)``); None without
        two frames in a row."""

        def build() -> int | None:
            starts = (self.cell == 0) & self.of(modality)
            distances: list[np.ndarray] = []
            for row in range(self.batch_size):
                at = np.flatnonzero(starts[row])
                same = np.diff(self.segment[row, at]) == 0
                distances.append(np.diff(self.coordinate(modality)[row, at])[same])
            values, counts = np.unique(np.concatenate(distances), return_counts=True)
            return int(values[counts.argmax()]) if len(values) else None

        return self.once(("frame_stride", modality), build)

    @property
    def fingerprint(self) -> str:
        """A short hash of the contents."""

        def build() -> str:
            digest = hashlib.blake2b(str(self.modality.shape).encode(), digest_size=8)
            for name in _FIELDS:
                digest.update(getattr(self, name).tobytes())
            return digest.hexdigest()

        return self.once("fingerprint", build)

    def once(self, key: Any, build: Callable[[], Any]) -> Any:
        """What ``build`` returns, kept with the layout: token orders, programs, whatever follows from it alone.
        Arrays become read-only."""

        def built() -> Any:
            value = build()
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
            return value

        return self.memo.once(key, built)

    def forget(self) -> None:
        """Drop all that was kept."""
        self.memo.clear()

    def summary(self) -> str:
        """One line a prompt: runs of modalities with their lengths."""
        lines = []
        for row in range(self.batch_size):
            ids = np.where(self.valid[row], self.modality[row], -1)
            edges = np.flatnonzero(np.diff(ids)) + 1
            runs = [(MODALITY_NAMES.get(int(r[0]), "padding"), len(r)) for r in np.split(ids, edges) if len(r)]
            parts = [f"{name} {n}" for name, n in runs[:6]]
            if len(runs) > 6:
                parts.append(f"... {len(runs) - 6} more runs")
            lines.append(" | ".join(parts) or "empty")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"TokenLayout([{self.batch_size}, {self.length}]: {'; '.join(self.summary().splitlines()[:2])})"


@lru_cache(maxsize=32)
def _text(n: int) -> TokenLayout:
    return TokenLayout.from_segments([("text", n)])


def _check_modalities(ids: np.ndarray) -> None:
    unknown = sorted(set(np.unique(ids).tolist()) - set(MODALITY_NAMES))
    if unknown:
        raise ValueError(f"unknown modality ids {shown(unknown)}: known are {MODALITY_NAMES}")


def _array(value: Any, name: str) -> np.ndarray:
    """A copy of integers or booleans [batch, tokens] (or [tokens]), int32."""
    try:
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} is {shown(value)}, not an array of integers: {shown(str(error))}") from None
    if array.dtype.kind not in "iub":
        raise TypeError(f"{name} holds {array.dtype}: integers or booleans are needed")
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}: [batch, tokens] or [tokens] is needed")
    least, most = (int(end(initial=0)) for end in (array.min, array.max))
    if not -(1 << 31) <= least <= most < 1 << 31:
        raise ValueError(f"{name} holds {least if least < -(1 << 31) else most}: values have to fit into int32")
    return np.array(array, dtype=np.int32, order="C")


def layouts_alive() -> list[TokenLayout]:
    """All layouts that anybody holds."""
    return alive(TokenLayout)
