"""The command line, one file per group of commands."""

from . import answer, check, evaluation, run, search, show, tuning, warmup
from .app import app

__all__ = ["answer", "app", "check", "evaluation", "run", "search", "show", "tuning", "warmup"]
