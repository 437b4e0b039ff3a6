"""A search's progress as JSON lines: a header, then a line for each finished layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..ir.pattern import Pattern, from_json
from .budget import Budget, Option
from .config import _write

SCHEMA = "mmflex.search"
VERSION = 3
_NUMBERS = ("ms", "density", "error", "recall", "weight")
_SAME = {
    "model": "another model",
    "sample": "another sample",
    "settings": "other settings (candidates, budget, rows, backend or version)",
}


@dataclass(frozen=True)
class Header:
    """What a search is of.

    Attributes:
        model, sample, settings: hashes of what must be the same to go on.
        budget: the default one spelt out. table, levels, dense: as in `search.Search`.
        facts: of the prompt and the device, for the config's provenance.
    """

    model: str
    sample: str
    settings: str
    budget: Budget
    table: tuple[Pattern, ...]
    levels: tuple[float, ...]
    dense: float
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "version": VERSION,
            **{name: getattr(self, name) for name in _SAME},
            "budget": self.budget.to_json(),
            "table": [p.to_json() for p in self.table],
            "levels": list(self.levels),
            "dense": self.dense,
            "facts": dict(self.facts),
        }


@dataclass(frozen=True)
class Done:
    """A finished layer: the options of its heads and every candidate on all of them (as `search.Found`), or why it
    keeps the model's own attention.

    ``digest``: of its q, k and v.
    """

    digest: str
    heads: tuple[tuple[Option, ...], ...] = ()
    uniform: tuple[Option, ...] = ()
    skipped: str = ""

    def to_json(self, layer: int) -> dict[str, Any]:
        table: dict[Pattern, int] = {}

        def rows(options: Sequence[Option]) -> list[list[Any]]:
            return [
                [
                    table.setdefault(o.pattern, len(table)),
                    o.boundary,
                    *(float(f"{getattr(o, n):.6g}") for n in _NUMBERS),
                ]
                for o in options
            ]

        heads, uniform = [rows(options) for options in self.heads], rows(self.uniform)
        out: dict[str, Any] = {"layer": layer, "digest": self.digest}
        if self.skipped:
            return out | {"skipped": self.skipped}
        return out | {"patterns": [p.to_json() for p in table], "heads": heads, "uniform": uniform}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Done:
        table = [from_json(p) for p in data.get("patterns", ())]

        def options(rows: Sequence[Any]) -> tuple[Option, ...]:
            return tuple(Option(table[i], str(boundary), *map(float, numbers)) for i, boundary, *numbers in rows)

        heads = tuple(options(rows) for rows in data.get("heads", ()))
        return cls(str(data["digest"]), heads, options(data.get("uniform", ())), str(data.get("skipped", "")))


@dataclass(eq=False)
class Checkpoint:
    """The file, and what it holds. Without a path it is kept in memory only.

    The file is written anew, beside itself and moved into place, after every layer: it is always whole.
    """

    path: Path | None
    header: Header | None = None
    layers: dict[int, Done] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, **same: str) -> Checkpoint:
        """What the file holds, an empty one if there is none.

        Args:
            same: ``model``, ``sample`` and ``settings`` of the search that wants to go on.

        Raises:
            ValueError: not such a file, half-written, or of another search; the hashes are named.
        """
        if path is None or not path.exists():
            return cls(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a checkpoint of a search: {_OTHER}") from None
        found: list[Any] = []
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except ValueError:
                raise ValueError(
                    f"{path}: line {number} is cut off or not JSON: delete this line, or {_OTHER}"
                ) from None
        head = found[0] if found and isinstance(found[0], dict) else {}
        if head.get("schema") != SCHEMA or head.get("version") != VERSION:
            raise ValueError(f"{path}: not a checkpoint of a search (version {VERSION}): {_OTHER}")
        for name, value in same.items():
            if head.get(name) != value:
                raise ValueError(f"{path}: it is of {_SAME[name]}: {head.get(name)} there, {value} here; {_OTHER}")
        try:
            header = Header(
                str(head["model"]),
                str(head["sample"]),
                str(head["settings"]),
                Budget(**head["budget"]),
                tuple(map(from_json, head["table"])),
                tuple(map(float, head["levels"])),
                float(head["dense"]),
                dict(head["facts"]),
            )
            layers = {int(line["layer"]): Done.from_json(line) for line in found[1:]}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}: not a checkpoint that this version reads ({error}): {_OTHER}") from None
        return cls(path, header, layers)

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is not None and self.header is not None:
            lines = [self.header.to_json(), *(done.to_json(layer) for layer, done in sorted(self.layers.items()))]
            _write("".join(json.dumps(line) + "\n" for line in lines), self.path)


_OTHER = "give another path, or remove the file to start afresh"


def digest(*things: Any) -> str:
    """A short hash of tensors (some thousand entries of each, and the shape), text, numbers, and lists and mappings."""
    found = hashlib.blake2b(digest_size=8)
    for thing in things:
        found.update(_bytes(thing))
    return found.hexdigest()


def _bytes(thing: Any) -> bytes:
    if isinstance(thing, Tensor):
        flat = thing.detach().flatten()
        some = flat[:: max(1, flat.numel() // 4096)]
        return f"{tuple(thing.shape)}{thing.dtype}".encode() + some.double().cpu().numpy().tobytes()
    if isinstance(thing, Mapping):
        return b"{" + b",".join(str(k).encode() + b":" + _bytes(v) for k, v in sorted(thing.items())) + b"}"
    if isinstance(thing, Sequence) and not isinstance(thing, str):
        return b"[" + b",".join(map(_bytes, thing)) + b"]"
    return str(thing).encode()
