"""Measures what the README promises: `python -m bench` prints one table, every figure taken side by side in one run."""
