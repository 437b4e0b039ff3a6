"""What sparse attention costs in answers: small trained models, prompts with needles in them, and scores."""

from .evaluate import evaluate
from .pictures import plot_curves, plot_heat, plot_report
from .report import Report

__all__ = ["Report", "evaluate", "plot_curves", "plot_heat", "plot_report"]
