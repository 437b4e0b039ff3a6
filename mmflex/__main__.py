"""``python -m mmflex``: the command line."""

from .cli import app

app()
