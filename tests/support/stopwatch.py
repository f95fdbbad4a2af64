"""How long something took, told so that a busy machine can't break a test."""

from __future__ import annotations

import psutil


class Stopwatch:
    """Measures time that was waited away: the seconds since its making in which the machine's cores had nothing to do.

    A test that says "within a second" means that nobody sleeps, polls or waits for a time-out meanwhile. By the wall
    clock it fails beside somebody's build, which takes the cores away; a core that is busy, with us or with others,
    doesn't count here. On a machine with nothing else to do this is nearly the time by the clock, never more.
    """

    def __init__(self) -> None:
        self._cores = psutil.cpu_count() or 1
        self._begun = psutil.cpu_times().idle

    @property
    def waited(self) -> float:
        """Seconds so far, the mean over the cores."""
        return (psutil.cpu_times().idle - self._begun) / self._cores
