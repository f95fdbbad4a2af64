"""Estimates exact bytes from the rounded figures that `ollama pull` prints.

It prints `1.2 GB/4.1 GB` and `28%`: steps of 41 MB, and of whole gigabytes from 10 GB on. Taken literally, a transfer
would stand still for seconds and then jump. Within the bounds of the figures, the printed speed is integrated.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.downloads.fetcher import FileProgress
from services.downloads.ollama.output import DrawnLayer, Rounded


class Unrounding:
    """Follows the layers of one pull. `sizes` maps short digests to exact bytes, if the registry told them."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._last: dict[str, tuple[float, float]] = {}
        """(bytes, time) by short digest."""

    def part(self, row: DrawnLayer, now: float) -> FileProgress:
        """Estimate a layer's progress, within the bounds of its row. `now` is monotonic seconds."""
        total = self._total(row.digest, row.total)
        if row.completed is None:
            return FileProgress(total, total)
        low = min(max(row.completed.low, (row.percent - 0.5) / 100 * total), total)
        high = min(row.completed.high, (row.percent + 0.5) / 100 * total, total)
        before, then = self._last.get(row.digest, (low, now))
        likely = before + (row.bytes_per_second or 0) * (now - then)
        completed = max(low, min(likely, high))
        self._last[row.digest] = (completed, now)
        return FileProgress(max(0, int(completed)), total)

    def _total(self, digest: str, drawn: Rounded) -> int:
        exact = self._sizes.get(digest)
        return exact if exact is not None and drawn.low <= exact < drawn.high else drawn.shown
