"""The command line, one file per group of commands."""

from . import evaluation, run, search, show, tuning
from .app import app

__all__ = ["app", "evaluation", "run", "search", "show", "tuning"]
