"""TokenLayout: which token is what, the only thing mmflex needs to know about a prompt besides q, k and v.

A layout lives on the host (int32 arrays, a few MB at one million tokens). Everything that follows from it alone
(token orders, ranks, frame strides) is computed there once, so no device value is ever read back.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .shown import shown

MODALITIES = {"text": 0, "image": 1, "video": 2, "audio": 3}
"""Modality names and their ids, as transformers uses them in ``mm_token_type_ids``."""

MODALITY_NAMES = {number: name for name, number in MODALITIES.items()}

LONGEST_PROMPT = 1 << 28
"""Tokens of a prompt, at most: positions, and small multiples of them, are int32 in the kernels."""

_FIELDS = ("position", "modality", "segment", "frame", "cell")


_serial = itertools.count()
_alive: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def enlist(thing: Any) -> str:
    """A name for an object of ours, by which `listed` finds it while it lives."""
    name = f"mmflex-{next(_serial)}"
    _alive[name] = thing
    return name


def listed(name: str) -> Any:
    """The object that `enlist` named."""
    return _alive[name]


def modality_id(modality: str | int) -> int:
    """The id of a modality given by name or id; ValueError names the known ones."""
    if isinstance(modality, str) and modality in MODALITIES:
        return MODALITIES[modality]
    if isinstance(modality, int) and not isinstance(modality, bool) and modality in MODALITY_NAMES:
        return modality
    raise ValueError(
        f"unknown modality {shown(modality)}: use one of {sorted(MODALITIES)} or an id of {sorted(MODALITY_NAMES)}"
    )


@dataclass(frozen=True)
class Segment:
    """One piece of a prompt, in prompt order.

    Args:
        modality: "text", "image", "video" or "audio".
        frames, height, width: tokens (after any spatial merge). Text and audio use ``width`` alone.
        newline: where a model adds one separator token: None, "row", "frame" or "video" (once at the end). A
            separator belongs to the segment; those of rows and frames have a cell of their own in every frame.
        timestamps: text tokens in front of every frame, one number or one per frame (Qwen3-VL, GLM-4.1V). They are
            text, so the frames become separate runs of one segment.

    Raises:
        ValueError: sizes that are no numbers of tokens, or newlines and timestamps where there are no frames.
    """

    modality: str
    frames: int = 1
    height: int = 1
    width: int = 1
    newline: str | None = None
    timestamps: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        kind = modality_id(self.modality)
        for name in ("frames", "height", "width"):
            object.__setattr__(self, name, _count(getattr(self, name), f"a segment's {name}"))
        if self.newline not in (None, "row", "frame", "video"):
            raise ValueError(f"newline is None, 'row', 'frame' or 'video', got {shown(self.newline)}")
        each = isinstance(self.timestamps, Sequence)
        if each and len(self.timestamps) != self.frames:  # type: ignore[arg-type]
            raise ValueError(
                f"timestamps names {len(self.timestamps)} lengths for {self.frames} frames: "  # type: ignore[arg-type]
                "give one number or one per frame"
            )
        stamps = tuple(_count(n, "a timestamp") for n in (self.timestamps if each else (self.timestamps,)))  # type: ignore[union-attr]
        object.__setattr__(self, "timestamps", stamps if each else stamps[0])
        if kind in (MODALITIES["text"], MODALITIES["audio"]) and (self.newline is not None or any(stamps)):
            raise ValueError(
                f"newline={self.newline!r} and timestamps={shown(self.timestamps)} belong to the frames of images and "
                f"videos, and {MODALITY_NAMES[kind]} has none: leave them out"
            )

    @property
    def tokens(self) -> int:
        """How many tokens it is, separators and timestamps included."""
        stamps = self.timestamps * self.frames if isinstance(self.timestamps, int) else sum(self.timestamps)
        separators = {"row": self.height * self.frames, "frame": self.frames, "video": 1}.get(self.newline or "", 0)
        return self.frames * self.height * self.width + separators + stamps

    @classmethod
    def of(cls, item: Segment | Sequence[Any]) -> Segment:
        """A Segment from ``(modality, size)`` or ``(modality, size, options)``; size is n, (h, w) or (t, h, w)."""
        if isinstance(item, Segment):
            return item
        if isinstance(item, str) or not isinstance(item, Sequence) or len(item) not in (2, 3):
            raise ValueError(
                f"a segment is (modality, size) or (modality, size, options), got {shown(item)}: give a list of those; "
                'the size of a video is a tuple too, ("video", (8, 16, 16))'
            )
        modality, size, *rest = item
        options = rest[0] if rest else {}
        if not isinstance(options, Mapping) or set(options) - {"newline", "timestamps"}:
            raise ValueError(
                f'the third item of a segment is {shown(options)}: use {{"newline": "row", "frame" or "video"}} and '
                '{"timestamps": number}'
            )
        try:
            each = size if isinstance(size, Sequence) else (size,)
            sizes: tuple[Any, ...] = tuple(map(operator.index, each))
        except TypeError:
            raise ValueError(f"a segment's size is in whole tokens, got {shown(size)}") from None
        if len(sizes) > 3 or not sizes:
            raise ValueError(f"a segment's size is n, (height, width) or (frames, height, width), got {shown(size)}")
        names = ("frames", "height", "width")[3 - len(sizes) :]
        return cls(modality, **dict(zip(names, sizes, strict=True)), **options)

    def columns(self, number: int) -> np.ndarray:
        """Rows of (modality, segment, frame, cell), int32 [tokens, 4]."""
        kind = modality_id(self.modality)
        if kind in (MODALITIES["text"], MODALITIES["audio"]):
            return np.tile(np.array([kind, number, -1, -1], np.int32), (self.frames * self.height * self.width, 1))
        cells = self.height * (self.width + (self.newline == "row")) + (self.newline == "frame")
        if not cells and not self.timestamps:  # any number of frames of nothing
            return np.array([[kind, number, -1, -1]] * self.tokens, np.int32).reshape(-1, 4)
        stamps = (self.timestamps,) * self.frames if isinstance(self.timestamps, int) else self.timestamps
        parts = []
        for frame, stamp in enumerate(stamps):
            parts.append(np.tile(np.array([MODALITIES["text"], number, -1, -1], np.int32), (stamp, 1)))
            block = np.empty((cells, 4), np.int32)
            block[:, 0], block[:, 1], block[:, 2], block[:, 3] = kind, number, frame, np.arange(cells)
            parts.append(block)
        if self.newline == "video":
            parts.append(np.array([[kind, number, -1, -1]], np.int32))
        return np.concatenate(parts) if parts else np.empty((0, 4), np.int32)


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
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    serial: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        arrays = {name: _array(getattr(self, name), name) for name in _FIELDS}
        shape, position = arrays["modality"].shape, arrays["position"]
        if not shape[0]:
            raise ValueError(f"the layout has shape {shape}: a layout needs at least one prompt")
        _check_length(shape[1])
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
        object.__setattr__(self, "serial", enlist(self))

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
        """
        given, total = [], 0
        for item in segments:
            given.append(Segment.of(item))
            total += given[-1].tokens
            _check_length(total)
        parts = [segment.columns(number) for number, segment in enumerate(given)]
        rows = np.concatenate(parts) if parts else np.empty((0, 4), np.int32)
        modality, segment, frame, cell = rows.T[:, None]
        return cls._of(modality, segment, frame, cell, np.ones(modality.shape, bool))

    @classmethod
    def text(cls, n: int) -> TokenLayout:
        """``n`` tokens of text, one segment (cached)."""
        return _text(_count(n, "the length of a layout"))

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
        length = longest if length is None else _count(length, "the length of a layout")
        _check_length(length)
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
        return self._once("padded", lambda: bool((self.position < 0).any()))

    @property
    def modalities(self) -> tuple[int, ...]:
        """Ids of the modalities that occur, ascending."""
        return self._once("modalities", lambda: tuple(np.unique(self.modality[self.valid]).tolist()))

    def of(self, modality: str | int | None) -> np.ndarray:
        """bool [B, N]: the valid tokens of a modality, by name or id (None: of all)."""
        number = modality_id(modality) if isinstance(modality, str) else modality
        return self.valid if number is None else self.valid & (self.modality == number)

    def most(self, modality: int | None) -> int:
        """Tokens of a modality (None: of any) in the prompt that has most of them; at least 1."""
        return self._once(("most", modality), lambda: max(1, int(self.of(modality).sum(axis=1).max(initial=0))))

    def coordinate(self, modality: str | int | None) -> np.ndarray:
        """int32 [B, N]: how many tokens of ``modality`` (None: of any) stand up to and including this one, less one.

        For a token of that modality this is its rank; for any other it is the rank of the last such token before it
        (-1 before the first). So for a key k of the modality, ``coordinate(q) >= coordinate(k)`` is causality.
        """
        return self._once(
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

        return self._once("rank", build)

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

        return self._once(("frame_stride", modality), build)

    @property
    def fingerprint(self) -> str:
        """A short hash of the contents."""

        def build() -> str:
            digest = hashlib.blake2b(str(self.modality.shape).encode(), digest_size=8)
            for name in _FIELDS:
                digest.update(getattr(self, name).tobytes())
            return digest.hexdigest()

        return self._once("fingerprint", build)

    def _once(self, key: Any, build: Any) -> Any:
        if key not in self.memo:
            value = build()
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
            self.memo[key] = value
        return self.memo[key]

    def summary(self) -> str:
        """One line a prompt: runs of modalities with their lengths."""
        lines = []
        for row in range(self.batch_size):
            ids = np.where(self.valid[row], self.modality[row], -1)
            edges = np.flatnonzero(np.diff(ids)) + 1
            runs = [(MODALITY_NAMES.get(int(r[0]), "padding"), len(r)) for r in np.split(ids, edges) if len(r)]
            shown = [f"{name} {n}" for name, n in runs[:6]]
            if len(runs) > 6:
                shown.append(f"... {len(runs) - 6} more runs")
            lines.append(" | ".join(shown) or "empty")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from ..plot import layout_html

        return layout_html(self)

    def __repr__(self) -> str:
        return f"TokenLayout([{self.batch_size}, {self.length}]: {'; '.join(self.summary().splitlines()[:2])})"


@lru_cache(maxsize=32)
def _text(n: int) -> TokenLayout:
    return TokenLayout.from_segments([("text", n)])


def _count(value: Any, what: str) -> int:
    """A number of tokens."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{what} is in whole tokens, got {shown(value)}") from None
    if number < 0:
        raise ValueError(f"{what} is a number of tokens, got {shown(value)}: use 0 or more")
    return number


def _check_length(tokens: int) -> None:
    if tokens > LONGEST_PROMPT:
        raise ValueError(
            f"a prompt of {shown(tokens)} tokens: {LONGEST_PROMPT} are the most that positions are good for"
        )


def _check_modalities(ids: np.ndarray) -> None:
    unknown = sorted(set(np.unique(ids).tolist()) - set(MODALITY_NAMES))
    if unknown:
        raise ValueError(f"unknown modality ids {shown(unknown)}: known are {MODALITY_NAMES}")


def _array(value: Any, name: str) -> np.ndarray:
    """A copy of integers or booleans [batch, tokens] (or [tokens]), int32."""
    try:
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} is {shown(value)}, no array of integers: {shown(str(error))}") from None
    if array.dtype.kind not in "iub":
        raise TypeError(f"{name} holds {array.dtype}: integers or booleans are needed")
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}: [batch, tokens] or [tokens] is needed")
    least, most = (int(end(initial=0)) for end in (array.min, array.max))
    if not -(1 << 31) <= least <= most < 1 << 31:
        raise ValueError(f"{name} holds {least if least < -(1 << 31) else most}: values have to fit into int32")
    return np.array(array, dtype=np.int32, order="C")
