"""What can be seen of a load in Ollama from outside: the server's log, and the memory that the model's process takes.

The API says nothing between the request and its answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from services.engines.ollama.log import LoadLog
from services.engines.port import Evidence, Report

MOST_AT_ONCE = 1_000_000


class LoadObserver:
    """Reports what is new at each `look`. Reads the log from where it ends now.

    `log_path` is None when the server isn't ours, `resident` gives bytes or None, `size_bytes` is the weights' size.
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

    def look(self) -> None:
        evidence = self._from_log() or self._from_memory()
        if evidence is not None and evidence != self._seen:
            self._seen = evidence
            self._report(evidence)

    def _from_log(self) -> Evidence | None:
        if self._log_path is None:
            return None
        try:
            with self._log_path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._read_to:  # it was cut: what is left has been seen
                    self._read_to = file.tell()
                file.seek(self._read_to)
                added = file.read(MOST_AT_ONCE)
        except OSError:
            return None
        self._read_to += len(added)
        found = self._log.feed(added.decode("utf-8", "replace"))
        return found[-1] if found else None

    def _from_memory(self) -> Evidence | None:
        """How much of the weights' size is resident: they are once they were read, or mapped and touched."""
        held, total = self._resident(), self._size_bytes
        if held is None or not total:
            return None
        if held >= total:
            return Evidence("initializing_gpu")
        return Evidence("loading_weights", held / total, f"{held / 1e6:.0f} of {total / 1e6:.0f} MB in memory")


def _end_of(path: Path | None) -> int:
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0
