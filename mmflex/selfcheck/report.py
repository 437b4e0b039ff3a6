"""What a check has found: rows, and the machine and sources that it ran on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mask_builders

from ..compiler.constants import device_name
from ..version import __version__
from .worker import NOT_RUN, OK

PACKAGES = ("torch", "triton", "flash-attn-4", "transformers", "numpy", "sympy")


@dataclass(frozen=True)
class Report:
    """Attributes:
    rows: one dictionary for each check: ``group``, ``name``, its settings, ``verdict`` ("ok", "not run: ..." or what is
        wrong), ``seconds``, ``cpu_seconds``, ``kernels`` (compiled), and what was measured (``error``, ...).
    facts: versions, ``device``, ``source`` (`source_hash`), ``seconds``.
    """

    rows: list[dict[str, Any]]
    facts: dict[str, Any]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["verdict"] != OK and not row["verdict"].startswith(NOT_RUN)]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. Checks that this device has too little memory for are not run, and not wrong."""
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        right, wrong = sum(row["verdict"] == OK for row in self.rows), len(self.failed)
        return {**self.facts, "passed": right, "failed": wrong, "rows": self.rows}

    def save(self, path: Path | str) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", "utf-8")

    def __str__(self) -> str:
        lines = [f"{'checks':22} {'backend':10} {'ran':>5} {'wrong':>6} {'largest error':>14} {'of its bound':>13} "
                 f"{'log-sum-exp':>12} {'kernels':>8}"]  # fmt: skip
        for kind in summary(self.rows):
            error = "-" if kind.error is None else f"{kind.error:.1e}"
            share = "-" if kind.share is None else f"{kind.share:.0%}"
            lse = "-" if kind.lse_error is None else f"{kind.lse_error:.1e}"
            lines.append(f"{kind.what:22} {kind.backend:10} {kind.ran:5} {kind.wrong:6} {error:>14} {share:>13} "
                         f"{lse:>12} {kind.kernels:8}")  # fmt: skip
        for row in self.rows:
            if row["verdict"] != OK:
                lines += ["", f"{row['group']}: {row['name']}", f"    {row['verdict']}"]
        right = sum(row["verdict"] == OK for row in self.rows)
        versions = ", ".join(f"{name} {self.facts[name]}" for name in PACKAGES[:4] if self.facts.get(name))
        lines += ["", f"{self.facts['device']}; {versions}; source {self.facts['source'][:12]}",
                  f"{right} right, {len(self.failed)} wrong, {len(self.rows) - right - len(self.failed)} not run, "
                  f"in {self.facts['seconds']:.0f} s"]  # fmt: skip
        return "\n".join(lines)


@dataclass(frozen=True)
class Kind:
    """Checks of one kind on one backend.

    Attributes:
        what: the work, or the group. ran, wrong: how many. kernels: compiled for them.
        error: the output error that is the largest share of what rounding may do, and that ``share``.
        lse_error: the largest of the log-sum-exps. None where nothing was measured.
    """

    what: str
    backend: str
    ran: int
    wrong: int
    error: float | None
    share: float | None
    lse_error: float | None
    kernels: int


def summary(rows: Iterable[dict[str, Any]]) -> list[Kind]:
    """Rows of a report by kind of check and backend, in their order."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        what = row["work"] if row["group"] == "lowerings" else row["group"]
        kinds.setdefault((what, row.get("backend", "-")), []).append(row)
    return [_kind(what, backend, own) for (what, backend), own in kinds.items()]


def _kind(what: str, backend: str, rows: list[dict[str, Any]]) -> Kind:
    ran = [row for row in rows if not row["verdict"].startswith(NOT_RUN)]
    measured = [(row["error"] / row["bound"], row["error"]) for row in ran if row.get("bound")]
    share, error = max(measured, default=(None, None))
    sums = [row["lse_error"] for row in ran if row.get("lse_error") is not None]
    kernels = sum(row["kernels"] or 0 for row in rows)
    wrong = sum(row["verdict"] != OK for row in ran)
    return Kind(what, backend, len(ran), wrong, error, share, max(sums, default=None), kernels)


def facts(device: str) -> dict[str, Any]:
    """Where a check runs, and what."""
    versions: dict[str, Any] = {"mmflex": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"device": device_name(device), "cores": cores(), "source": source_hash(), **versions}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def source_hash() -> str:
    """SHA-256 of the sources that run: for every ``*.py`` under mmflex/ and mask_builders/, sorted by its path from the
    folder that holds them (``mmflex/ir/expr.py``): the path, a NUL byte, the file, a NUL byte."""
    files: dict[str, Path] = {}
    for folder in (Path(__file__).resolve().parents[1], Path(str(mask_builders.__file__)).resolve().parent):
        files |= {path.relative_to(folder.parent).as_posix(): path for path in folder.rglob("*.py")}
    digest = hashlib.sha256()
    for part in _parts(files):
        digest.update(part + b"\0")
    return digest.hexdigest()


def _parts(files: dict[str, Path]) -> Iterable[bytes]:
    for name in sorted(files):
        yield name.encode()
        yield files[name].read_bytes()
