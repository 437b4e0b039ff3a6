"""Reading a prompt's layout where a model joins text and features.

LLaVA-NeXT, VideoChat-Flash and VILA replace placeholders among the ids by features of the vision tower, one prompt at a
time, by ``torch.cat`` of the pieces. While that function runs, those calls tell how many tokens every placeholder has
become, whatever the config says; what they are is the family's formula, which must give the same number.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmflex.ir.layout import Segment, TokenLayout

from ..prompts import LayoutUnknown


class JoinReader:
    """Watches a model's function that joins text and features. Subclasses know the family.

    Args:
        model: the module that has the function.

    Raises:
        TypeError: it has no such function.
    """

    function: str
    """Name of the function that joins."""

    result: int
    """Which item of what it returns are the embeddings ``[B, N, width]``; None there for a prompt without media."""

    def __init__(self, model: nn.Module) -> None:
        if not callable(getattr(model, self.function, None)):
            raise TypeError(
                f"{type(model).__name__} has no {self.function}: pass the model whose generate() takes images or "
                "video, or build the layout from its formula"
            )
        self.model: Any = model
        self.known: TokenLayout | None = None
        self.unknown = "nothing was joined yet"
        self.undo: list[Callable[[], None]] = []

    # ---- what a family says ----------------------------------------------------------------------------------------

    def placeholders(self, ids: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which ids of a prompt stand for media."""
        raise NotImplementedError

    def media(self, call: dict[str, Any], ids: list[np.ndarray], tokens: list[list[int]]) -> list[list[list[Segment]]]:
        """The segments of every placeholder of every prompt.

        Args:
            call: the arguments of the joining function by name.
            ids: of every prompt, without padding.
            tokens: how many tokens every placeholder of every prompt has become.

        Raises:
            ValueError: the family's formula gives another number of tokens.
        """
        raise NotImplementedError

    @property
    def side(self) -> str:
        """Where shorter prompts of a batch are padded."""
        return str(getattr(self.model.config, "tokenizer_padding_side", "right"))

    def watch(self) -> None:
        """Begin to watch what else the family needs; `undo` takes what ends it."""

    # ---- the block of `intercept` ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Watch the joining function from now on."""
        before, inner = vars(self.model).get(self.function), getattr(self.model, self.function)
        self.known, self.unknown = None, "nothing was joined yet"

        @functools.wraps(inner)
        def join(*args: Any, **kwargs: Any) -> Any:
            with _Concatenations() as pieces:
                result = inner(*args, **kwargs)
            self.read(inner, args, kwargs, result, pieces.lengths)
            return result

        setattr(self.model, self.function, join)
        self.undo = [lambda: _restore(self.model, self.function, before)]
        self.watch()

    def stop(self) -> None:
        """Leave the model as it was."""
        while self.undo:
            self.undo.pop()()

    def layout(self, batch: int, tokens: int) -> TokenLayout:
        """The layout of the prompts that were joined last; LayoutUnknown with the reason where it could not be read."""
        if self.known is None:
            raise LayoutUnknown(self.unknown)
        return self.known

    # ---- reading ---------------------------------------------------------------------------------------------------

    def read(self, function: Any, args: Any, kwargs: Any, result: Any, joins: list[tuple[int, ...]]) -> None:
        """Notes the layout of one call of the joining function."""
        embeddings = result[self.result]
        if embeddings is None:  # a prompt of text, or a decode step
            self.known, self.unknown = None, "the last prompt held no images and no video"
            ids = result[0]
            if isinstance(ids, Tensor) and ids.dim() == 2:
                self.known = TokenLayout.text(ids.shape[1])
            return
        call = inspect.signature(function).bind(*args, **kwargs).arguments
        try:
            self.known = self._joined(call, int(embeddings.shape[1]), joins)
        except ValueError as error:
            self.known, self.unknown = None, str(error)

    def _joined(self, call: dict[str, Any], length: int, joins: list[tuple[int, ...]]) -> TokenLayout:
        ids = _without_padding(call["input_ids"], call.get("attention_mask"))
        holes = [self.placeholders(row) for row in ids]
        tokens = _tokens_of_media(holes, joins, length)
        media = self.media(call, ids, tokens)
        rows = []
        for hole, of_row in zip(holes, media, strict=True):
            rest, segments = iter(of_row), []
            for is_media, count in _runs(hole):
                segments += next(rest) if is_media else [Segment("text", width=count)]
            rows.append(TokenLayout.from_segments(segments)[:length])  # cut off where the model cuts prompts
        return rows[0] if len(rows) == 1 else TokenLayout.batch(rows, side=self.side, length=length)


_CATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class _Concatenations(TorchFunctionMode):
    """Notes the lengths of what is joined along the first dimension into rows of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CATENATIONS:
            tensors = kwargs.get("tensors", args[0] if args else ())
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim == 0 and all(isinstance(x, Tensor) and x.dim() == 2 for x in tensors):
                self.lengths.append(tuple(len(x) for x in tensors if len(x)))
        return func(*args, **kwargs)


def _restore(model: nn.Module, name: str, before: Any) -> None:
    vars(model).pop(name, None)
    if before is not None:
        setattr(model, name, before)


def _without_padding(ids: Tensor, mask: Tensor | None) -> list[np.ndarray]:
    rows = ids.detach().cpu().numpy()
    if mask is None:
        return list(rows)
    return [row[keep] for row, keep in zip(rows, mask.detach().cpu().numpy().astype(bool), strict=True)]


def _runs(holes: np.ndarray) -> list[tuple[bool, int]]:
    """(whether it is media, tokens) of a prompt's pieces: every placeholder is one, as is every run of text."""
    runs: list[tuple[bool, int]] = []
    for is_media in holes.tolist():
        if is_media or not runs or runs[-1][0]:
            runs.append((is_media, 1))
        else:
            runs[-1] = (False, runs[-1][1] + 1)
    return runs


def _tokens_of_media(holes: Sequence[np.ndarray], joins: list[tuple[int, ...]], length: int) -> list[list[int]]:
    """How many tokens each placeholder of each prompt has become: from the joins that fit the prompts' text, in order.

    ``length``: tokens of the longest prompt, which a prompt alone has as well unless it was cut off.
    """
    least = length if len(holes) == 1 else 0
    rest = (lengths for lengths in joins if sum(lengths) >= least)
    counts: list[list[int]] = []
    for row in holes:
        runs = _runs(row)
        if not row.any():
            counts.append([])
            continue
        for lengths in rest:
            if len(lengths) == len(runs) and all(m or n == size for (m, n), size in zip(runs, lengths, strict=True)):
                counts.append([size for (is_media, _), size in zip(runs, lengths, strict=True) if is_media])
                break
        else:
            shown = ", ".join("media" if is_media else f"{count} text" for is_media, count in runs[:6])
            raise ValueError(f"no torch.cat joined a prompt of {shown}: its code joins otherwise; build its layout")
    return counts
