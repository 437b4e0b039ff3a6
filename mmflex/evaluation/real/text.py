"""Text to evaluate on: files in the model's own tokens, cut into windows."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Text:
    """A text in tokens.

    Attributes:
        name: in tables.
        ids: int64 [tokens], without what the tokenizer puts in front.
        prefix: what the tokenizer puts in front of a text (a BOS token, or nothing).
    """

    name: str
    ids: Tensor
    prefix: tuple[int, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Of the tokens."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()[:16]

    def windows(self, tokens: int, count: int) -> Tensor:
        """int64 [count, tokens]: windows that do not overlap, evenly spread from the beginning to the end of the text,
        each with the prefix in front. ValueError for a text that is too short."""
        size = tokens - len(self.prefix)
        if size < 1 or count * size > len(self.ids):
            raise ValueError(
                f"{self.name} has {len(self.ids)} tokens, and {count} windows of {tokens} need {count * max(size, 1)}: "
                "give a longer text, or use fewer or shorter windows"
            )
        gap = 0 if count == 1 else (len(self.ids) - size) // (count - 1)
        prefix = torch.tensor(self.prefix, dtype=torch.long)
        return torch.stack([torch.cat([prefix, self.ids[i * gap : i * gap + size]]) for i in range(count)])


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a piece of text, with nothing in front or behind."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenized(name: str, text: str, tokenizer: Any) -> Text:
    """A text in the tokens of a tokenizer."""
    ids = torch.tensor(encode(tokenizer, text), dtype=torch.long)
    prefix = [i for i in tokenizer("")["input_ids"] if i != tokenizer.eos_token_id or i == tokenizer.bos_token_id]
    return Text(name, ids, tuple(prefix))


def read(argument: str, tokenizer: Any) -> Text:
    """A text from ``FILE`` or ``NAME=FILE`` (UTF-8, ``.gz`` too); ValueError for a file that is none."""
    name, found, file = argument.partition("=")
    path = Path(file if found else argument)
    if not path.is_file():
        raise ValueError(f"there is no text file {path}; give FILE, or NAME=FILE")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None
    return tokenized(name if found else path.name.removesuffix(".gz").rpartition(".")[0] or path.name, text, tokenizer)
