"""Operations: health, readiness, the API description, and the stream of state changes."""

from __future__ import annotations

from collections.abc import Iterator

from flask import Blueprint, Response, current_app, jsonify, render_template, request

from blueprints.api.spec import Schema, documented, openapi
from blueprints.api.status_cache import status_event
from blueprints.web import SSE_HEARTBEAT, services, sse
from services.container import Services
from version import VERSION

bp = Blueprint("operations", __name__)

EVENT_WAIT_SECONDS = 10.0


@bp.get("/healthz")
@documented()
def healthz() -> Response:
    """Report that the process answers."""
    return jsonify({"status": "ok", "version": VERSION})


@bp.get("/readyz")
@documented(errors=(503,))
def readyz() -> Response:
    """Report whether requests can be served: the switcher runs, memory was measured, engines were polled once."""
    found = services()
    if bool(found.devices.readings) and found.switcher.alive and found.switcher.first_pass_done:
        return jsonify({"status": "ready"})
    answer = jsonify({"status": "starting"})
    answer.status_code = 503
    answer.headers["Retry-After"] = "1"
    return answer


@bp.get("/metrics")
@documented(media_type="text/plain")
def metrics() -> Response:
    """Return figures for Prometheus, in its text format."""
    found = services().metrics()
    return Response(found.text(), content_type=found.content_type)


@bp.get("/openapi.json")
@documented()
def openapi_document() -> Response:
    """Return this description."""
    return jsonify(_document())


@bp.get("/docs")
def docs() -> str:
    """Render the API description as a page."""
    return render_template("pages/docs.html", document=_document(), base_url=request.host_url)


@bp.get("/v1/events")
@documented(media_type="text/event-stream")
def events() -> Response:
    """Stream every change of state as a server-sent event with the whole status, until the client disconnects."""
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
