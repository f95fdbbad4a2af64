"""The forms of the Models page that start and stop the local Ollama."""

from __future__ import annotations

from flask import Blueprint, Response

from blueprints.pages import done
from blueprints.web import services
from services.engines.supervisor import ServiceError

bp = Blueprint("local_services", __name__, url_prefix="/services/ollama")


@bp.post("/start")
def start() -> Response:
    """Start it; respond once it answers. A failed start is shown by the page itself."""
    service = services().ollama_service
    try:
        service.start()
    except ServiceError:
        if service.status().state != "failed":
            raise
    return done()


@bp.post("/stop")
def stop() -> Response:
    services().ollama_service.stop()
    return done()


@bp.post("/dismiss")
def dismiss() -> Response:
    """Dismiss the message about its last failure."""
    services().ollama_service.dismiss()
    return done()
