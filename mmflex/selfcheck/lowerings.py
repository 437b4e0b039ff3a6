"""Every way to compute a spec, forced, on every backend: output, log-sum-exp and block lists."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .cases import Case, cases
from .jobs import Job, Options
from .proof import prove

_COMPILED = {"cpu": 12.0, "triton": 12.0, "flash": 15.0}
"""Seconds for a case that compiles its kernels."""


def jobs(options: Options) -> list[Job]:
    return [
        Job("lowerings", case.name, asdict(case), case.kernels, _COMPILED.get(case.backend, 1.0))
        for case in cases(options.device, options.backends, options.thorough)
    ]


def run(settings: dict[str, Any], device: str) -> dict[str, Any]:
    return prove(Case(**settings), device)
