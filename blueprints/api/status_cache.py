"""The status document as bytes, serialised once per version for all tabs and listeners."""

from __future__ import annotations

import json
from typing import NamedTuple

from blueprints.api import shapes
from blueprints.web import sse_event
from services.container import Services
from services.status import Status


class _Serialised(NamedTuple):
    """The document of a status and of the number of requests that wait for each model, and its event."""

    status: Status
    waiting: dict[str, int]
    document: bytes
    event: bytes


_cached: _Serialised | None = None


def status_document(found: Services) -> bytes:
    """Return the body of `GET /v1/models/status`."""
    return _current(found).document


def status_event(found: Services) -> tuple[int, bytes]:
    """Return the current version of the status and its server-sent event."""
    cached = _current(found)
    return cached.status.version, cached.event


def _current(found: Services) -> _Serialised:
    global _cached
    status, waiting = found.status.current(), dict(found.router.waiting)
    if _cached is None or _cached.status is not status or _cached.waiting != waiting:
        text = json.dumps(shapes.status_document(status, waiting), separators=(",", ":"))
        _cached = _Serialised(status, waiting, text.encode(), sse_event("status", text, status.version))
    return _cached
