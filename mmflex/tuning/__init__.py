"""Choosing patterns: configs, which say what each head of a model may see."""
