"""The command line, one file per group of commands."""

from . import check, evaluation, run, search, show, tuning, warmup
from .app import app

__all__ = ["app", "check", "evaluation", "run", "search", "show", "tuning", "warmup"]
