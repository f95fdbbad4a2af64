"""The status as bytes, made once for each picture: a hundred tabs and listeners ask for the same one."""

from __future__ import annotations

import json
from typing import NamedTuple

from blueprints.api import shapes
from blueprints.web import sse_event
from services.container import Services
from services.status import Status


class _Made(NamedTuple):
    status: Status
    waiting: dict[str, int]
    document: bytes
    event: bytes


_kept: _Made | None = None


def status_document(found: Services) -> bytes:
    """`GET /v1/models/status`, as JSON."""
    return _now(found).document


def status_event(found: Services) -> tuple[int, bytes]:
    """The version that the status has now, and the server-sent event that tells it."""
    made = _now(found)
    return made.status.version, made.event


def _now(found: Services) -> _Made:
    global _kept
    status, waiting = found.status.current(), dict(found.router.waiting)
    if _kept is None or _kept.status is not status or _kept.waiting != waiting:
        text = json.dumps(shapes.status_document(status, waiting), separators=(",", ":"))
        _kept = _Made(status, waiting, text.encode(), sse_event("status", text, status.version))
    return _kept
