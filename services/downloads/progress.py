"""Computes percent, speed and time left of a transfer. Pure: no I/O and no clock.

The percentage never falls, although new layers increase the total, and reaches 100 only at the end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from services.downloads.fetcher import FileProgress, Phase, TransferUpdate

WINDOW_SECONDS = 5.0
"""The speed is averaged over this time."""
MIN_SPEED_SECONDS = 0.5
"""Time of observation before a speed is given."""
SAMPLE_SECONDS = 0.1
"""Closer observations share a sample, which bounds memory."""
MAX_PERCENT = 99


@dataclass(frozen=True, slots=True)
class Figures:
    """State of a transfer; unknown figures are None."""

    percent: int
    phase: Phase
    completed_bytes: int
    total_bytes: int | None
    bytes_per_second: int | None
    """0 when stalled; None unless bytes are being moved and were observed for half a second."""
    eta_seconds: float | None


class TransferProgress:
    """Progress of one transfer, fed with updates and monotonic seconds, in order."""

    def __init__(self) -> None:
        self._parts: dict[str, FileProgress] = {}
        self._expected = 0
        self._speed = _Speed()
        self._figures = Figures(0, "resolving", 0, None, None, None)

    def advance(self, update: TransferUpdate, now: float) -> Figures:
        """Take in an update; return the new figures."""
        arrived = 0
        for name, figures in update.parts.items():
            part = _clamped(figures)
            before = self._parts.get(name, part)  # bytes of the first update arrived in an earlier run
            arrived += max(0, part.completed - before.completed)
            self._parts[name] = part
        if update.expected_bytes is not None:
            self._expected = max(0, update.expected_bytes)
        if self._parts:
            self._speed.add(arrived, now)
        completed = sum(part.completed for part in self._parts.values())
        total = max(self._expected, sum(part.total for part in self._parts.values())) or None
        percent = min(MAX_PERCENT, completed * 100 // total) if total else 0
        speed = self._speed.figure() if update.phase == "downloading" else None
        self._figures = Figures(
            percent=max(self._figures.percent, percent),
            phase=update.phase,
            completed_bytes=completed,
            total_bytes=total,
            bytes_per_second=None if speed is None else round(speed),
            eta_seconds=(total - completed) / speed if total and speed else None,
        )
        return self._figures

    def finish(self) -> Figures:
        """Note that the transfer is complete; return the final figures."""
        total = self._figures.total_bytes
        self._figures = replace(
            self._figures, percent=100, completed_bytes=total or 0, bytes_per_second=None, eta_seconds=None
        )
        return self._figures


class _Speed:
    """Average speed over the last seconds."""

    def __init__(self) -> None:
        self._arrived = 0
        self._samples: deque[tuple[float, int]] = deque()
        """(time, bytes by then); the first is the latest sample older than the window, if there is one."""

    def add(self, arrived: int, now: float) -> None:
        self._arrived += arrived
        samples = self._samples
        if len(samples) > 1 and now - samples[-2][0] < SAMPLE_SECONDS:
            samples.pop()
        samples.append((now, self._arrived))
        while len(samples) > 1 and samples[1][0] <= now - WINDOW_SECONDS:
            samples.popleft()

    def figure(self) -> float | None:
        """Return bytes per second; None with too few samples."""
        if not self._samples:
            return None
        (since, before), (now, arrived) = self._samples[0], self._samples[-1]
        return (arrived - before) / (now - since) if now - since >= MIN_SPEED_SECONDS else None


def _clamped(part: FileProgress) -> FileProgress:
    """Return the progress with impossible values corrected: nothing negative, no more done than in total."""
    completed = max(0, part.completed)
    return FileProgress(completed, max(completed, part.total))
