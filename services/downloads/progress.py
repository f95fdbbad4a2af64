"""How far a transfer is, how fast it goes and how long it will take. Pure: no I/O and no clock.

The percentage never falls, however often a new layer makes the whole larger, and 100 is not said before the end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from services.downloads.fetcher import Part, Phase, Seen

WINDOW_SECONDS = 5.0
"""The speed is that of the bytes that arrived in the last so many seconds."""
ENOUGH_SECONDS = 0.5
"""How long bytes have to be watched before there is a speed."""
SAMPLE_SECONDS = 0.1
"""Observations that lie closer together share a sample, which bounds the memory."""
ALMOST = 99


@dataclass(frozen=True, slots=True)
class Figures:
    """How a transfer stands. None is what nobody can say honestly."""

    percent: int
    phase: Phase
    completed_bytes: int
    total_bytes: int | None
    bytes_per_second: int | None
    """0 when it stands still; None unless bytes are being moved and have been watched for half a second."""
    eta_seconds: float | None


class TransferProgress:
    """Follows one run of a transfer. Give it what was seen and the seconds of a monotonic clock, in order."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}
        self._expected = 0
        self._speed = _Speed()
        self._figures = Figures(0, "resolving", 0, None, None, None)

    def advance(self, seen: Seen, now: float) -> Figures:
        """Take an observation in."""
        arrived = 0
        for name, figures in seen.parts.items():
            part = _sound(figures)
            before = self._parts.get(name, part)  # what was there when it was first seen came some other time
            arrived += max(0, part.completed - before.completed)
            self._parts[name] = part
        if seen.expected_bytes is not None:
            self._expected = max(0, seen.expected_bytes)
        if self._parts:
            self._speed.add(arrived, now)
        completed = sum(part.completed for part in self._parts.values())
        total = max(self._expected, sum(part.total for part in self._parts.values())) or None
        percent = min(ALMOST, completed * 100 // total) if total else 0
        speed = self._speed.figure() if seen.phase == "downloading" else None
        self._figures = Figures(
            percent=max(self._figures.percent, percent),
            phase=seen.phase,
            completed_bytes=completed,
            total_bytes=total,
            bytes_per_second=None if speed is None else round(speed),
            eta_seconds=(total - completed) / speed if total and speed else None,
        )
        return self._figures

    def finish(self) -> Figures:
        """The transfer has ended well: 100 percent, and everything there was is here."""
        total = self._figures.total_bytes
        self._figures = replace(
            self._figures, percent=100, completed_bytes=total or 0, bytes_per_second=None, eta_seconds=None
        )
        return self._figures


class _Speed:
    """Bytes over the last seconds."""

    def __init__(self) -> None:
        self._arrived = 0
        self._samples: deque[tuple[float, int]] = deque()
        """(when, bytes arrived by then); the first is the last one that is older than the window, if there is one."""

    def add(self, arrived: int, now: float) -> None:
        self._arrived += arrived
        samples = self._samples
        if len(samples) > 1 and now - samples[-2][0] < SAMPLE_SECONDS:
            samples.pop()
        samples.append((now, self._arrived))
        while len(samples) > 1 and samples[1][0] <= now - WINDOW_SECONDS:
            samples.popleft()

    def figure(self) -> float | None:
        """Bytes per second; None while there is too little to go by."""
        if not self._samples:
            return None
        (since, before), (now, arrived) = self._samples[0], self._samples[-1]
        return (arrived - before) / (now - since) if now - since >= ENOUGH_SECONDS else None


def _sound(part: Part) -> Part:
    """What can be reckoned with: nothing below zero, no more here than there is."""
    completed = max(0, part.completed)
    return Part(completed, max(completed, part.total))
