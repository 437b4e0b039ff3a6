"""Benchmarks: ``python -m benchmarks.cpu`` and others. Each prints a table and writes JSON to benchmarks/results."""
