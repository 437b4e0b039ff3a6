"""How the progress of a command is shown."""

from __future__ import annotations

from rich.console import Console


class Progress:
    """What is running: a status line on a terminal, otherwise one line each."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status = console.status("") if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.status is not None:
            self.status.start()
        return self

    def __call__(self, text: str) -> None:
        if self.status is not None:
            self.status.update(text)
        else:
            self.console.print(text, style="dim", highlight=False)

    def __exit__(self, *args: object) -> None:
        if self.status is not None:
            self.status.stop()
