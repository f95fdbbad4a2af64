"""Progress of a load in Ollama, observed from its log and from the memory of the model's process.

The API reports nothing between a load request and its response.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from services.engines.ollama.log import LoadLog
from services.engines.port import Evidence, Report
from services.sizes import format_part

MOST_AT_ONCE = 1_000_000


class LoadObserver:
    """Reports new evidence at each `update`. Reads the log from its current end on.

    `log_path` is None for a server that isn't ours, `resident` returns bytes or None, `size_bytes` is the weights'
    size.
    """

    def __init__(
        self, log_path: Path | None, resident: Callable[[], int | None], size_bytes: int | None, report: Report
    ) -> None:
        self._log_path = log_path
        self._read_to = _end_of(log_path)
        self._log = LoadLog()
        self._resident = resident
        self._size_bytes = size_bytes
        self._report = report
        self._seen: Evidence | None = None

    def update(self) -> None:
        evidence = self._from_log() or self._from_memory()
        if evidence is not None and evidence != self._seen:
            self._seen = evidence
            self._report(evidence)

    def _from_log(self) -> Evidence | None:
        if self._log_path is None:
            return None
        try:
            with self._log_path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._read_to:  # truncated: what remains was read before
                    self._read_to = file.tell()
                file.seek(self._read_to)
                added = file.read(MOST_AT_ONCE)
        except OSError:
            return None
        self._read_to += len(added)
        found = self._log.feed(added.decode("utf-8", "replace"))
        return found[-1] if found else None

    def _from_memory(self) -> Evidence | None:
        """Compare resident memory to the weights' size: weights are resident once read, or mapped and touched."""
        held, total = self._resident(), self._size_bytes
        if held is None or not total:
            return None
        if held >= total:
            return Evidence("initializing_gpu")
        return Evidence("loading_weights", held / total, f"{format_part(held, total)} in memory")


def _end_of(path: Path | None) -> int:
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0
