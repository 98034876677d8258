"""Benchmark of speed and memory: `python -m moma.bench`."""
