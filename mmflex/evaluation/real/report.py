"""What an evaluation on real weights gives: rows of texts and of needles, their tables and their JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from ..report import Score, Skipped, replaced
from ..tables import as_html, as_text
from .score import Interval, Scores

SCHEMA = "mmflex.evaluation.real"
VERSION = 1
INTERVALS = (
    "texts: 95% percentile bootstrap over blocks of 128 consecutive rows of all windows, paired with the dense model; "
    "needles: Wilson 95% over prompts"
)


@dataclass(frozen=True)
class Method:
    """What ran.

    Attributes:
        method: its name; ``label`` in tables. setting: what it was brought to.
        target: density that it was brought to, on the text's first window; None for a spec as it was given.
        over: even its smallest setting computes more than the target.
        planned: density there. error: relative output error there, given the dense model's queries, keys and values.
        ran: density (pairs in computed blocks over causal pairs), mean over layers, heads and windows or prompts, as it
            ran. estimates: products of estimates over those of dense attention, likewise, which no target counts.
        backend: of mmflex.
    """

    method: str
    label: str
    setting: str
    target: float | None
    over: bool
    planned: float
    error: float
    ran: float
    estimates: float
    backend: str


@dataclass(frozen=True)
class TextRow:
    """A method on a text: ``scores`` over ``windows`` windows of ``tokens`` tokens, and the perplexity of each."""

    text: str
    tokens: int
    windows: int
    method: Method
    scores: Scores
    by_window: tuple[float, ...]


@dataclass(frozen=True)
class NeedleRow:
    """A method on a needle task.

    Attributes:
        score: right answers. dense: the dense model's, of the same prompts.
        kept: right answers among the prompts that the dense model answers. gained: right ones that it does not.
        depths: ``score`` by depth of the needle, in equal parts.
    """

    task: str
    text: str
    tokens: int
    method: Method
    score: Score
    dense: Score
    kept: Score
    gained: int
    depths: tuple[Score, ...]


@dataclass(frozen=True, repr=False)
class Report:
    """What `mmflex.evaluation.real.evaluate` gives. ``print(report)``, and a notebook, show its tables.

    Attributes:
        texts, needles: rows. skipped: methods that did not run, and why.
        runs: of each run what was asked for, ``versions``, the hashes of texts and sources, and ``seconds``.
    """

    texts: tuple[TextRow, ...] = ()
    needles: tuple[NeedleRow, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    runs: tuple[Mapping[str, Any], ...] = ()

    def __add__(self, other: Report) -> Report:
        """The rows of both."""
        skipped = tuple(dict.fromkeys(self.skipped + other.skipped))
        return Report(self.texts + other.texts, self.needles + other.needles, skipped, self.runs + other.runs)

    # ---- shown -----------------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        """The tables that have rows."""
        return [self.text_table()] * bool(self.texts) + [self.needle_table()] * bool(self.needles)

    def __repr__(self) -> str:
        parts = (("texts", self.texts), ("needles", self.needles), ("skipped", self.skipped))
        return f"Report({', '.join(f'{name}: {len(values)}' for name, values in parts if values)})"

    def __str__(self) -> str:
        return as_text(self.tables()) or repr(self)

    def _repr_html_(self) -> str:
        return as_html(self.tables()) or repr(self)

    # ---- files -----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON data; `from_json` reads it back."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "intervals": INTERVALS,
            "runs": [dict(run) for run in self.runs],
            "skipped": [asdict(s) for s in self.skipped],
            "texts": [_plain(row) for row in self.texts],
            "needles": [_plain(row) for row in self.needles],
        }

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """ValueError for another kind of data, with what it is."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("version") != VERSION:
            given = [data.get(k) for k in ("schema", "version")] if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"not an evaluation on real weights: got {given}, {SCHEMA!r} of version {VERSION} is needed"
            )
        try:
            texts = tuple(_text_row(row) for row in data["texts"])
            needles = tuple(_needle_row(row) for row in data["needles"])
            return cls(texts, needles, tuple(Skipped(**s) for s in data["skipped"]), tuple(data["runs"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"an evaluation of version {VERSION} with a missing or unknown field: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """What `save` wrote; ValueError for another file."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON, a row a line. The file is complete or untouched."""
        data = self.to_json()
        blocks = []
        for name in ("texts", "needles"):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in data.pop(name))
            blocks.append(f'  "{name}": [\n{rows}\n  ]' if rows else f'  "{name}": []')
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in data.items()]
        text = "{\n" + ",\n".join([*lines, *blocks]) + "\n}\n"
        replaced(path, lambda part: part.write_text(text, encoding="utf-8"))

    # ---- tables ----------------------------------------------------------------------------------------------------

    def text_table(self) -> Table:
        """Perplexity, KL and agreement of every method on every text."""
        table = Table(
            title="text: perplexity, KL to dense in 1e-3 nats, first choice as dense in %, attention in % of dense"
        )
        names = ("text", "tokens", "method", "setting", "perplexity", "over dense, %", "KL, all rows", "KL, last rows",
                 "rows 0-15", "others", "same, all", "same, last", "target", "ran", "estimates")  # fmt: skip
        for name in names:
            left = name in ("text", "method", "setting")
            table.add_column(name, justify="left" if left else "right", overflow="fold")
        previous = None
        for row in self.texts:
            if previous not in (None, (row.text, row.tokens)):
                table.add_section()
            if previous != (row.text, row.tokens):
                table.add_row(row.text, str(row.tokens), "dense", "-", f"{row.scores.dense:.2f}")
            previous = row.text, row.tokens
            s, m = row.scores, row.method
            table.add_row(
                row.text, str(row.tokens), m.label, m.setting, f"{s.perplexity:.2f}", _interval(s.excess, 100.0),
                _interval(s.kl, 1e3), _interval(s.kl_last, 1e3), _scaled(s.kl_first, 1e3), _scaled(s.kl_rest, 1e3),
                _scaled(s.top1, 100.0), _scaled(s.top1_last, 100.0), *_shares(m),
            )  # fmt: skip
        return table

    def needle_table(self) -> Table:
        """Right answers of every method on every task."""
        table = Table(title="needles: right answers in %, attention in % of dense")
        names = ("task", "tokens", "method", "setting", "right", "dense", "of dense's right", "lost / gained",
                 "by depth", "target", "ran", "estimates")  # fmt: skip
        for name in names:
            left = name in ("task", "method", "setting")
            table.add_column(name, justify="left" if left else "right", overflow="fold")
        for row in self.needles:
            m = row.method
            depths = " ".join("-" if not d.asked else f"{100 * d.accuracy:.0f}" for d in row.depths)
            lost = row.kept.asked - row.kept.right
            table.add_row(
                row.task, str(row.tokens), m.label, m.setting, str(row.score), str(row.dense), str(row.kept),
                f"{lost} / {row.gained}", depths, *_shares(m),
            )  # fmt: skip
        return table


def _shares(m: Method) -> tuple[str, str, str]:
    target = "-" if m.target is None else _scaled(m.target, 100.0) + (" (over)" if m.over else "")
    return target, _scaled(m.ran, 100.0), _scaled(m.estimates, 100.0)


def _scaled(value: float, by: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{by * value:.3g}" if by * value < 99.95 else f"{by * value:.0f}"


def _interval(x: Interval, by: float) -> str:
    bounds = "" if math.isnan(x.low) else f" [{_scaled(x.low, by)}, {_scaled(x.high, by)}]"
    return _scaled(x.value, by) + bounds


# ---- rows as JSON ----------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A row as JSON data: six significant digits, NaN as null."""
    if isinstance(value, Score):
        return value.to_json()
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _score(data: Mapping[str, Any]) -> Score:
    return Score(data["right"], data["asked"])


def _method(data: Mapping[str, Any]) -> Method:
    numbers = {name: _number(data[name]) for name in ("planned", "error", "ran", "estimates")}
    return Method(**{**data, **numbers})


def _scores(data: Mapping[str, Any]) -> Scores:
    found = dict(data)
    for f in fields(Scores):
        if str(f.type) == "Interval":
            found[f.name] = Interval(*(_number(data[f.name][name]) for name in ("value", "low", "high")))
        elif str(f.type) == "float":
            found[f.name] = _number(data[f.name])
    found["offsets"] = tuple(map(_number, data["offsets"]))
    return Scores(**found)


def _text_row(data: Mapping[str, Any]) -> TextRow:
    parts = {"method": _method(data["method"]), "scores": _scores(data["scores"])}
    return TextRow(**{**data, **parts, "by_window": tuple(data["by_window"])})


def _needle_row(data: Mapping[str, Any]) -> NeedleRow:
    scores = {name: _score(data[name]) for name in ("score", "dense", "kept")}
    depths = tuple(map(_score, data["depths"]))
    return NeedleRow(**{**data, **scores, "method": _method(data["method"]), "depths": depths})
