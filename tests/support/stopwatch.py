"""Measure waiting time in a way that a busy machine can't disturb."""

from __future__ import annotations

import psutil


class Stopwatch:
    """Measures idle time: the seconds since its creation in which the machine's cores had nothing to do, averaged.

    A test that asserts "within a second" proves that nothing sleeps, polls or waits for a timeout meanwhile. By the
    wall clock it would fail when other processes take the cores; a busy core, whoever uses it, doesn't count here. On
    an otherwise idle machine the result is nearly the wall-clock time, never more.
    """

    def __init__(self) -> None:
        self._cores = psutil.cpu_count() or 1
        self._begun = psutil.cpu_times().idle

    @property
    def waited(self) -> float:
        """Idle seconds so far, the mean over the cores."""
        return (psutil.cpu_times().idle - self._begun) / self._cores
