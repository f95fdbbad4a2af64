"""Starting the app anew in its place, with its models loaded and its address open all the while."""

from __future__ import annotations

import time

ANSWER_SECONDS = 0.5
"""How long the answer to the request for it has to get out."""


class Restart:
    """The wish to start anew. Who runs the app looks whether it is `due`; `possible` once somebody does."""

    def __init__(self) -> None:
        self.possible = False
        self._due_at: float | None = None

    @property
    def due(self) -> bool:
        return self._due_at is not None and time.monotonic() >= self._due_at

    def request(self) -> None:
        """Restart in a moment. Asking twice is asking once."""
        if self._due_at is None:
            self._due_at = time.monotonic() + ANSWER_SECONDS
