"""The documentation: Markdown pages, `conf.py` for Sphinx, and `tools`, which make what follows from the code."""
