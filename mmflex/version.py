"""The version of mmflex."""

__version__ = "0.1.0"
