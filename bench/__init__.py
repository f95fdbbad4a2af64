"""Benchmarks behind the figures in the README: `python -m bench` prints one table, all measured in one run."""
