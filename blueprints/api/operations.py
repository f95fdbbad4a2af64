"""Is it alive, can it serve, what does it offer: health, readiness, the API's description, every change of state."""

from __future__ import annotations

from collections.abc import Iterator

from flask import Blueprint, Response, current_app, jsonify, render_template, request

from blueprints.api.picture import status_event
from blueprints.api.spec import Schema, documented, openapi
from blueprints.web import SSE_HEARTBEAT, services, sse
from services.container import Services
from version import VERSION

bp = Blueprint("operations", __name__)

EVENT_WAIT_SECONDS = 10.0


@bp.get("/healthz")
@documented()
def healthz() -> Response:
    """Whether the process answers."""
    return jsonify({"status": "ok", "version": VERSION})


@bp.get("/readyz")
@documented(errors=(503,))
def readyz() -> Response:
    """Whether it can serve: the switcher runs, memory was measured, and what the engines have loaded is known."""
    found = services()
    if bool(found.devices.readings) and found.switcher.alive and found.switcher.first_pass_done:
        return jsonify({"status": "ready"})
    answer = jsonify({"status": "starting"})
    answer.status_code = 503
    answer.headers["Retry-After"] = "1"
    return answer


@bp.get("/openapi.json")
@documented()
def openapi_document() -> Response:
    """This description."""
    return jsonify(_document())


@bp.get("/docs")
def docs() -> str:
    """The same for people."""
    return render_template("pages/docs.html", document=_document(), base_url=request.host_url)


@bp.get("/v1/events")
@documented(media_type="text/event-stream")
def events() -> Response:
    """Every change of state as a server-sent event that holds the whole status, until the client leaves."""
    return sse(_changes(services()))


def _changes(found: Services) -> Iterator[bytes]:
    version = -1
    while not found.board.closed:
        snapshot = found.board.wait_newer(version, EVENT_WAIT_SECONDS)
        if snapshot.version == version:
            yield SSE_HEARTBEAT
            continue
        version, event = status_event(found)
        yield event


def _document() -> Schema:
    return openapi(current_app._get_current_object(), VERSION)  # type: ignore[attr-defined]
