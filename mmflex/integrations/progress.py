"""How far a search is: a bar on a terminal, else plain lines, for logs."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET = 10.0
"""Seconds between two lines, unless it is the first or the last one."""


class LayerProgress:
    """Layers that are done, of so many (None: not known), on the standard error stream.

    A line says what is done, how long it took, and how long the rest will take if its layers take as long.
    """

    def __init__(self, total: int | None, show: bool = True, console: Console | None = None) -> None:
        self.console = Console(stderr=True) if console is None else console
        self.total, self.done, self.timed = total, 0, 0
        self.lines = show and not self.console.is_terminal
        self.started = self.told = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        enabled = show and self.console.is_terminal
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not enabled)
        self.task = self.bar.add_task("searching patterns", total=total)

    def __enter__(self) -> LayerProgress:
        self.bar.start()
        if self.lines:
            layers = "" if self.total is None else f" in {self.total} layer{'s' * (self.total != 1)}"
            self._say(f"searching patterns{layers}")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.bar.stop()

    def begin(self, layer: int) -> None:
        """A layer is next."""
        self.bar.update(self.task, description=f"searching patterns, layer {layer}")

    def end(self, layer: int, searched: bool = True) -> None:
        """A layer is done; ``searched``: it took its time, rather than being known or left out."""
        self.done += 1
        self.timed += searched
        self.bar.advance(self.task)
        now = time.monotonic()
        first_or_last = (self.timed == 1 and searched) or self.done == self.total
        if self.lines and (first_or_last or now - self.told >= QUIET):
            self.told = now
            self._say(self.line(layer, now - self.started))

    def line(self, layer: int, seconds: float) -> str:
        """``layer 3: 4 of 30, 41 s, about 266 s left``."""
        text = f"layer {layer}: {self.done}"
        if self.total is not None:
            text += f" of {self.total}"
        text += f", {seconds:.0f} s"
        if self.total is not None and self.timed and self.done < self.total:
            text += f", about {seconds / self.timed * (self.total - self.done):.0f} s left"
        return text

    def _say(self, text: str) -> None:
        say(text, self.console)


def say(text: str, console: Console | None = None) -> None:
    """A plain line on the standard error stream."""
    (console or Console(stderr=True)).print(text, markup=False, highlight=False, soft_wrap=True)
