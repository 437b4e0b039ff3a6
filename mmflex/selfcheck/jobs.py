"""What a group of checks hands out: jobs, each a few seconds of work in some process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Options:
    """What is to be checked.

    Attributes:
        device: "cpu" or "cuda". backends: names of those that can run there.
        long: prompts of a million tokens too. thorough: every work with every kind of prompt on every backend.
    """

    device: str
    backends: tuple[str, ...]
    long: bool = False
    thorough: bool = False


@dataclass(frozen=True)
class Job:
    """One check.

    Attributes:
        group: which group runs it. name: what it is, for people.
        settings: what the group's ``run`` takes; it travels to another process as JSON.
        kernels: jobs with equal ones run in one process, since they share compiled kernels. "": it is alone.
        weight: seconds that it may take; long ones begin first.
    """

    group: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    kernels: str = ""
    weight: float = 1.0


class Group(Protocol):
    """A module of this package that is listed in `mmflex.selfcheck.groups`."""

    def jobs(self, options: Options) -> Sequence[Job]:
        """Its checks."""
        ...

    def run(self, settings: dict[str, Any], device: str) -> dict[str, Any]:
        """Does one, in any process: facts about it, such as ``error``. What is wrong is raised, best as
        `VerificationError`; a device without enough memory raises `NotRun`."""
        ...


class NotRun(Exception):
    """A check cannot be made on this device; says why."""
