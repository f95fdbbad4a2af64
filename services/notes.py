"""Notes: what services remember across restarts, as text by key."""

from __future__ import annotations

from typing import Protocol


class Notes(Protocol):
    """Key-value store that outlives the app."""

    def get(self, key: str) -> str | None: ...

    def put(self, key: str, value: str) -> None: ...
