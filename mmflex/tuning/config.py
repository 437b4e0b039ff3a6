"""Configs: which pattern each head of a model has, as a file.

The file is JSON: distinct patterns once in a table, heads as indices into it, so that a 28 x 28 model stays readable::

    {"schema": "mmflex.config", "version": 1, "model": "Qwen/Qwen2.5-VL-7B-Instruct", "layers": 28, "heads": 28,
     "provenance": {"method": "search", "sample": "..."},
     "patterns": [{"pattern": "Grid", "version": 1, "stride": "frame"}, {"pattern": "AShape", "version": 1}],
     "spec": {"0": 1, "1": [0, 0, 1, ...]}}

A layer whose heads are all alike is one number; a layer that ``spec`` leaves out keeps the model's own attention.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmflex.ir import pattern as ir
from mmflex.ir.pattern import Pattern
from mmflex.ir.shown import clipped, shown

SCHEMA = "mmflex.config"
VERSION = 1

MOST = 1024
"""Layers of a model, and heads of a layer."""

MOST_BYTES = 1 << 24
"""Of a file."""

Spec = Pattern | Sequence[Pattern] | Mapping[int, Pattern | Sequence[Pattern]]
"""One pattern for all heads of all layers, one per head for all layers, or either of the two per layer."""


@dataclass(frozen=True)
class Config:
    """The patterns of a model's heads.

    Attributes:
        model: name of the model it was made for; for people, never compared.
        layers: number of layers of the model.
        heads: number of query heads per layer.
        patterns: ``{layer: (pattern of head 0, pattern of head 1, ...)}``. A layer left out keeps its own attention.
        provenance: where it comes from; any JSON object.

    Raises:
        ValueError: a layer out of range or a wrong number of heads, with both numbers.
    """

    model: str
    layers: int
    heads: int
    patterns: Mapping[int, tuple[Pattern, ...]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_counts(self.layers, self.heads)
        if not isinstance(self.model, str) or not isinstance(self.provenance, Mapping):
            raise TypeError(
                f"model is {shown(self.model)} and provenance {shown(self.provenance)}: a text and a dictionary are "
                "needed"
            )
        object.__setattr__(self, "patterns", per_layer(self.patterns, range(self.layers), self.heads))

    @classmethod
    def of(cls, spec: Spec, layers: int, heads: int, *, model: str = "", **provenance: Any) -> Config:
        """A config from a spec: ``Config.of(AShape(), layers=28, heads=28)``."""
        _check_counts(layers, heads)
        return cls(model, layers, heads, per_layer(spec, range(layers), heads), provenance)

    def for_model(self, layers: int, heads: int) -> dict[int, tuple[Pattern, ...]]:
        """The patterns, if the model has the config's layer and head counts; else ValueError with both."""
        for name, own, other in (("layers", self.layers, layers), ("heads", self.heads, heads)):
            if own != other:
                made_for = f" (made for {clipped(self.model)})" if self.model else ""
                raise ValueError(
                    f"this config{made_for} has {own} {name} but the model has {other}: use a config for this model, "
                    "or a spec such as one pattern for all heads"
                )
        return dict(self.patterns)

    def resized(self, tokens: int, *, sample: int | None = None) -> Config:
        """The config for prompts of another length.

        A search meets its budget at the sample's length. Budgets are numbers of tokens and blocks, so that on prompts
        twice as long a head computes about half the share of the pairs. Here they are multiplied by ``tokens`` over the
        sample's, so that the density stays about the same; thresholds, sinks and strides stay as they are. No budget
        passes below what a pattern needs for its nearest keys: much shorter prompts are denser.

        Args:
            tokens: of the prompts that it is for.
            sample: tokens of the prompt that it was made on; None: as the provenance has it.

        Raises:
            ValueError: a length that is none, or a config that does not say what it was made on.
        """
        made = self.provenance.get("tokens") if sample is None else sample
        if not isinstance(made, int):
            raise ValueError(
                'this config does not say how long its sample was (provenance["tokens"]): give resized(tokens, sample=)'
            )
        for name, value in (("tokens", tokens), ("sample", made)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}: a length is a whole number, 1 or more")
        factor = tokens / made
        patterns = {layer: tuple(p.scaled(factor) for p in heads) for layer, heads in self.patterns.items()}
        provenance = {**self.provenance, "tokens": tokens, "resized from": made}
        return Config(self.model, self.layers, self.heads, patterns, provenance)


def _check_counts(layers: Any, heads: Any) -> None:
    for name, value in (("layers", layers), ("heads", heads)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
            raise ValueError(f"{name} is {shown(value)}: a config needs a whole number, from 1 to {MOST}")


def per_layer(spec: Spec, layers: Iterable[int], heads: int) -> dict[int, tuple[Pattern, ...]]:
    """A spec written out: ``{layer: (pattern of head 0, ...)}`` over the given layers.

    Raises:
        TypeError: something that is not a pattern.
        ValueError: a layer that does not exist, or a number of patterns other than ``heads``.
    """
    known = layers if isinstance(layers, range) else list(layers)
    spec = checked_spec(spec)
    if isinstance(spec, Mapping):
        for layer in spec:
            if layer not in known:
                whole = known and list(known) == list(range(known[0], known[-1] + 1))
                there = f"{known[0]} to {known[-1]}" if whole else shown(known)
                raise ValueError(
                    f"layer {shown(layer)} has no attention to set: the model's attention layers are {there}"
                )
        return {layer: _per_head(value, heads, f"layer {layer}") for layer, value in spec.items()}
    everywhere = _per_head(spec, heads, "the spec")
    return dict.fromkeys(known, everywhere)


def checked_spec(spec: Any) -> Spec:
    """A spec of patterns alone, as far as that can be told without a model: its layers in order, its sequences as
    tuples.

    Raises:
        TypeError: something that is not a pattern, or a layer that is no number.
    """
    if not isinstance(spec, Mapping):
        return _patterns(spec, "the spec")
    for layer in spec:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"a spec maps layer numbers to patterns, got the key {shown(layer)}: use integers")
    return {layer: _patterns(value, f"layer {layer}") for layer, value in sorted(spec.items())}


def _patterns(value: Any, where: str) -> Pattern | tuple[Pattern, ...]:
    if isinstance(value, Pattern):
        return value
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{where} is {shown(value)}: a pattern or one pattern per head is needed")
    patterns = tuple(value)
    for head, pattern in enumerate(patterns):
        if not isinstance(pattern, Pattern):
            raise TypeError(f"{where}, head {head} is {shown(pattern)}: a pattern is needed, such as AShape(128, 1024)")
    return patterns


def _per_head(patterns: Pattern | Sequence[Pattern], heads: int, where: str) -> tuple[Pattern, ...]:
    if isinstance(patterns, Pattern):
        return (patterns,) * heads
    if len(patterns) != heads:
        raise ValueError(f"{where} has {len(patterns)} patterns for {heads} query heads: give one, or one per head")
    return tuple(patterns)


def head_slice(patterns: Sequence[Pattern], heads_here: int, rank: int | None) -> tuple[Pattern, ...]:
    """The patterns of the ``heads_here`` consecutive heads that a tensor-parallel rank holds.

    Args:
        patterns: one per query head of the whole model.
        heads_here: query heads of this process.
        rank: which slice, 0 .. len(patterns) / heads_here - 1; None where the model is not sharded.
    """
    total = len(patterns)
    if heads_here == total:
        return tuple(patterns)
    if rank is None or total % heads_here or not 0 <= rank < total // heads_here:
        raise ValueError(
            f"this layer computes {heads_here} query heads but its spec has {total} patterns, and tensor-parallel rank "
            f"{rank} does not explain it: give {heads_here} patterns, or shard the heads evenly with tp_plan"
        )
    return tuple(patterns[rank * heads_here : (rank + 1) * heads_here])


# ---- files ---------------------------------------------------------------------------------------------------------


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write a config as JSON. The file is complete or untouched: it is written beside and moved into place."""
    table: dict[Pattern, int] = {}
    spec: dict[str, int | list[int]] = {}
    for layer, patterns in sorted(config.patterns.items()):
        numbers = [table.setdefault(pattern, len(table)) for pattern in patterns]
        spec[str(layer)] = numbers[0] if len(set(numbers)) == 1 else numbers
    head = {
        "schema": SCHEMA,
        "version": VERSION,
        "model": config.model,
        "layers": config.layers,
        "heads": config.heads,
        "provenance": dict(config.provenance),
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    lines.append('  "patterns": [\n' + ",\n".join(f"    {json.dumps(p.to_json())}" for p in table) + "\n  ]")
    rows = ",\n".join(f"    {json.dumps(layer)}: {json.dumps(numbers)}" for layer, numbers in spec.items())
    lines.append('  "spec": {\n' + rows + "\n  }")
    _write("{\n" + ",\n".join(lines) + "\n}\n", Path(path))


def _write(text: str, path: Path) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a config that `save_config` wrote.

    Raises:
        ValueError: not such a file; says where in the document (``file.json: spec.3[12]: ...``) and what is expected.
        FileNotFoundError, IsADirectoryError: no file; says what to give.
    """
    return _Document(path, _CONFIG_FILE).config()


_CONFIG_FILE = (
    "the path of the config file that `mmflex search` or mmflex.save_config wrote; where there is none, "
    "mmflex.default_spec() is a spec"
)


class _Document:
    """A JSON document being read, whose errors name the place.

    Args:
        path: of the file.
        expected: which file is meant; for the message where there is none.
    """

    def __init__(self, path: str | os.PathLike[str], expected: str) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                text = file.read(MOST_BYTES + 1)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file {self.path}: give {expected}") from None
        except IsADirectoryError:
            raise IsADirectoryError(f"{self.path} is a folder: give {expected}") from None
        if len(text) > MOST_BYTES:
            raise ValueError(f"{self.path}: more than {MOST_BYTES} bytes, which no config takes")
        try:
            self.data = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: not JSON: {clipped(error)}") from None

    def fail(self, place: str, message: object) -> ValueError:
        return ValueError(f"{self.path}: {clipped(place)}: {message}" if place else f"{self.path}: {message}")

    def at(self, place: str, build: Callable[[], Any]) -> Any:
        try:
            return build()
        except (ValueError, TypeError) as error:
            raise self.fail(place, error) from None

    def number(self, value: Any, place: str, below: int | None = None) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (below is not None and value >= below):
            limit = "" if below is None else f" below {below}"
            raise self.fail(place, f"got {shown(value)}, a whole number from 0{limit} is needed")
        return value

    def config(self) -> Config:
        data = self.data
        if isinstance(data, list):
            raise self.fail("", "a list, as MInference writes configs: read it with load_minference_config")
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise self.fail("schema", f'got {shown(found)}, "{SCHEMA}" is needed')
        version = data.get("version")
        if type(version) is not int or version != VERSION:
            raise self.fail("version", f"got {shown(version)}; this mmflex reads version {VERSION}")
        kinds = {"model": str, "layers": int, "heads": int, "provenance": dict, "patterns": list, "spec": dict}
        for name, kind in kinds.items():
            if name not in data:
                raise self.fail(name, "missing")
            if not isinstance(data[name], kind) or isinstance(data[name], bool):
                raise self.fail(name, f"got {shown(data[name])}, {kind.__name__} is needed")
        for name in ("layers", "heads"):
            if not 1 <= data[name] <= MOST:
                least = "1 or more" if data[name] < 1 else f"{MOST} or less"
                raise self.fail(name, f"got {shown(data[name])}, {least} is needed")
        unknown = sorted(set(data) - set(kinds) - {"schema", "version"})
        if unknown:
            raise self.fail(unknown[0], f"unknown field; the fields are schema, version, {', '.join(kinds)}")
        table = [self.at(f"patterns[{i}]", partial(ir.from_json, x)) for i, x in enumerate(data["patterns"])]
        heads = data["heads"]
        patterns: dict[int, tuple[Pattern, ...]] = {}
        layers = set(map(str, range(data["layers"])))
        for layer, entry in data["spec"].items():
            place = f"spec.{layer}"
            if layer not in layers:
                raise self.fail(place, f"not a layer: layers are 0 to {data['layers'] - 1}")
            if isinstance(entry, list):
                if len(entry) != heads:
                    raise self.fail(place, f"{len(entry)} entries for {heads} heads: one number, or one per head")
                numbers = [self.number(n, f"{place}[{i}]", len(table)) for i, n in enumerate(entry)]
            else:
                numbers = [self.number(entry, place, len(table))] * heads
            patterns[int(layer)] = tuple(table[n] for n in numbers)
        return self.at("", lambda: Config(data["model"], data["layers"], heads, patterns, data["provenance"]))

    def minference(self, model: str) -> Config:
        if not isinstance(self.data, list) or not self.data or not all(isinstance(x, dict) for x in self.data):
            raise self.fail("", 'a list over layers of {"<head>": [kind, a, b, score]} is needed')
        heads = len(self.data[0])
        patterns = {}
        for layer, entry in enumerate(self.data):
            if set(entry) != {str(h) for h in range(heads)}:
                found = sorted(entry, key=lambda h: (len(h), h))
                raise self.fail(
                    f"[{layer}]", f"heads are {shown(found)}, but layer 0 has {heads} heads: 0 to {heads - 1}"
                )
            patterns[layer] = tuple(self.minference_head(entry[str(h)], f'[{layer}]["{h}"]') for h in range(heads))
        provenance = {"format": "minference", "file": self.path.name}
        return self.at("", lambda: Config(model, len(self.data), heads, patterns, provenance))

    def minference_head(self, entry: Any, place: str) -> Pattern:
        if not isinstance(entry, list) or len(entry) < 3:
            raise self.fail(place, f"got {shown(entry)}, [kind, a, b, score] is needed")
        kind = entry[0]
        if not isinstance(kind, str) or kind not in _MINFERENCE:
            raise self.fail(f"{place}[0]", f"unknown kind {shown(kind)}: known are {', '.join(_MINFERENCE)}")
        name, arguments = _MINFERENCE[kind]
        # MInference's files hold some budgets as floats
        budgets = [int(x) if isinstance(x, float) and x.is_integer() else x for x in entry[1:3]]
        numbers = [self.number(n, f"{place}[{i + 1}]") for i, n in enumerate(budgets)][: len(arguments)]
        return self.at(place, lambda: ir.find(name)(**dict(zip(arguments, numbers, strict=True))))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a name stands twice, of which other readers take other values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {shown(name)} stands more than once in one object")
    return found


_MINFERENCE = {
    "vertical_and_slash": ("VerticalSlash", ("vertical", "slash")),
    "stream_llm": ("AShape", ("sink", "local")),
    "block_sparse": ("BlockTopK", ("blocks",)),
}
"""MInference's kinds: the pattern's name, and which of its fields a and b are."""


def load_minference_config(path: str | os.PathLike[str], *, model: str = "") -> Config:
    """Read one of MInference's published per-model files as it is.

    The format is a list over layers of ``{"<head>": [kind, a, b, score]}``: ``vertical_and_slash`` becomes
    ``VerticalSlash(vertical=a, slash=b)``, ``stream_llm`` ``AShape(sink=a, local=b)`` and ``block_sparse``
    ``BlockTopK(blocks=a)`` (in mmflex's blocks of 128 tokens; MInference's kernel has 64). Scores are not kept.

    Raises:
        ValueError: another format, with the place in the document.
        FileNotFoundError, IsADirectoryError: no file; says what to give.
    """
    return _Document(path, "the path of the file that MInference published").minference(model)
