"""What an evaluation found: scores with intervals, densities, errors; its table and its JSON."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .tables import as_html, as_text

SCHEMA = "mmflex.evaluation"
VERSION = 1
Z = 1.959964
"""Of a 95% interval."""
INTERVAL = "Wilson 95% interval over the questions of all seeds"


@dataclass(frozen=True)
class Score:
    """``right`` of ``asked`` questions."""

    right: int
    asked: int

    @classmethod
    def of(cls, answers: Iterable[bool]) -> Score:
        found = list(answers)
        return cls(sum(found), len(found))

    @property
    def accuracy(self) -> float:
        """From 0 to 1; NaN where nothing was asked."""
        return self.right / self.asked if self.asked else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval: it stays within 0 to 1 and is not empty when all answers are right."""
        if not self.asked:
            return 0.0, 1.0
        p, n = self.accuracy, self.asked
        centre = p + Z * Z / (2 * n)
        reach = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        scale = 1 + Z * Z / n
        return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"right": self.right, "asked": self.asked}
        if self.asked:
            found |= {"accuracy": round(self.accuracy, 5), "interval": [round(x, 5) for x in self.interval]}
        return found

    def __str__(self) -> str:
        if not self.asked:
            return "-"
        low, high = self.interval
        return f"{100 * self.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True)
class Row:
    """One method at one length, on one task.

    Attributes:
        method: its name; ``label`` in tables. settings: what it was brought to, per seed.
        target: share of dense attention FLOPs it was brought to; None for a spec that ran as it was given.
        over: even its smallest setting computes more than the target, of some seed.
        planned: pairs in computed blocks over causal pairs, from plans on the dense model's queries and keys; mean over
            layers, heads and each seed's first prompt. pairs: allowed pairs over causal pairs, likewise.
        ran: as ``planned``, from plans on the queries and keys of the model that runs this method; of the prompts of
            each seed's first forward.
        error: relative output error against dense, given the dense model's queries, keys and values; as ``planned``.
        score: of all seeds. kinds, depths, seeds: its parts.
        lost, gained: questions that dense answers and this does not, and the reverse.
        estimates: products of the method's estimates over those of dense attention, which no target counts; NaN where
            that is not known.
    """

    method: str
    label: str
    settings: tuple[str, ...]
    task: str
    tokens: int
    target: float | None
    over: bool
    backend: str
    planned: float
    ran: float
    pairs: float
    error: float
    score: Score
    kinds: Mapping[str, Score]
    depths: tuple[Score, ...]
    seeds: Mapping[str, Score]
    lost: int
    gained: int
    estimates: float = math.nan

    @property
    def setting(self) -> str:
        """The settings in short."""
        different = list(dict.fromkeys(self.settings))
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        return (different[0] if different else "-") + more

    def to_json(self) -> dict[str, Any]:
        found = dict(vars(self))
        if math.isnan(self.estimates):
            del found["estimates"]  # JSON has no such number
        for name in {"planned", "ran", "pairs", "error", "estimates"} & set(found):
            found[name] = round(found[name], 6)
        found["settings"] = list(self.settings)
        found["score"] = self.score.to_json()
        found["depths"] = [score.to_json() for score in self.depths]
        for name in ("kinds", "seeds"):
            found[name] = {key: score.to_json() for key, score in found[name].items()}
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        def score(entry: Mapping[str, Any]) -> Score:
            return Score(entry["right"], entry["asked"])

        found = dict(data)
        found["score"] = score(data["score"])
        found["settings"] = tuple(data["settings"])
        found["depths"] = tuple(score(entry) for entry in data["depths"])
        for name in ("kinds", "seeds"):
            found[name] = {key: score(entry) for key, entry in data[name].items()}
        return cls(**found)


@dataclass(frozen=True)
class Skipped:
    """A method that did not run on a task, and why."""

    method: str
    task: str
    reason: str


@dataclass(frozen=True, repr=False)
class Report:
    """What `evaluate` found. ``print(report)``, and a notebook, show its tables.

    Attributes:
        runs: of each run (several where reports were added) what was asked for, seeds included, the ``versions`` that
            it ran on, and the ``seconds`` that it took.
    """

    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...] = ()
    runs: tuple[Mapping[str, Any], ...] = ()

    def __add__(self, other: Report) -> Report:
        """The rows of both."""
        skipped = tuple(dict.fromkeys(self.skipped + other.skipped))
        return Report(self.rows + other.rows, skipped, self.runs + other.runs)

    def at(self, task: str, tokens: int | None = None) -> tuple[Row, ...]:
        """The rows of a task (and a length)."""
        return tuple(r for r in self.rows if r.task == task and tokens in (None, r.tokens))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(r.task for r in self.rows))

    def tables(self) -> list[Table]:
        """One for each task."""
        return [self.table(task) for task in self.tasks]

    def __repr__(self) -> str:
        parts = (("rows", self.rows), ("skipped", self.skipped))
        return f"Report({', '.join(f'{name}: {len(values)}' for name, values in parts if values)})"

    def __str__(self) -> str:
        return as_text(self.tables()) or repr(self)

    def _repr_html_(self) -> str:
        return as_html(self.tables()) or repr(self)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON data; `from_json` reads it back."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "interval": INTERVAL,
            "runs": [dict(run) for run in self.runs],
            "skipped": [asdict(s) for s in self.skipped],
            "rows": [r.to_json() for r in self.rows],
        }

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """ValueError for another kind of data, with what was found."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("version") != VERSION:
            found = [data.get(k) for k in ("schema", "version")] if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"not an evaluation: got {found}, {SCHEMA!r} of version {VERSION} is needed")
        try:
            rows = tuple(Row.from_json(r) for r in data["rows"])
            skipped = tuple(Skipped(**s) for s in data["skipped"])
            return cls(rows, skipped, tuple(data["runs"]))
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
        rows = ",\n".join(f"    {json.dumps(row)}" for row in data.pop("rows"))
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in data.items()]
        text = "{\n" + ",\n".join(lines) + ',\n  "rows": [\n' + rows + "\n  ]\n}\n"
        replaced(path, lambda part: part.write_text(text, encoding="utf-8"))

    def table(self, task: str) -> Table:
        """The rows of a task for people; every number beside its unit in the head."""
        rows = self.at(task)
        kinds = list(dict.fromkeys(kind for r in rows for kind in r.kinds))
        table = Table(title=f"{task}: accuracy in % with its 95% interval, FLOPs in % of dense attention")
        names = ["tokens", "method", "setting", "accuracy", *kinds, "lost / gained", "target", "blocks", "ran", "pairs"]
        for name in [*names, "estimates", "output error"]:
            table.add_column(name, justify="left" if name in ("method", "setting") else "right", overflow="fold")
        before = None
        for r in rows:
            if before not in (None, r.tokens):
                table.add_section()
            before = r.tokens
            parts = [_percent(r.kinds[k].accuracy) if k in r.kinds else "-" for k in kinds]
            target = "-" if r.target is None else _percent(r.target)
            shares = [_percent(x) for x in (r.planned, r.ran, r.pairs)]
            shares[0] += " (over)" if r.over else ""
            changed = f"{r.lost} / {r.gained}"
            cells = [f"{r.tokens}", r.label, r.setting, str(r.score), *parts, changed, target, *shares]
            table.add_row(*cells, _percent(r.estimates), f"{r.error:.3f}")
        return table


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def replaced(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Lets ``write`` write a file beside ``path`` (with its suffix) and moves it into place when it is complete."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def writable(paths: Sequence[Path | None]) -> None:
    """ValueError for a file that could not be written: better before minutes of work than after."""
    for path in paths:
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{path} can't be written: there is no folder {path.resolve().parent}")
        if path is not None and path.is_dir():
            raise ValueError(f"{path} is a folder: give the name of a file")
