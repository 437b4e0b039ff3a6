"""What sparse attention costs a model that was not trained here: perplexity, KL to dense, agreement and needles."""

from .evaluate import evaluate
from .model import LanguageModel, load
from .report import Report
from .text import Text, read, tokenized

__all__ = ["LanguageModel", "Report", "Text", "evaluate", "load", "read", "tokenized"]
