"""The forms that start and stop the local services, and install what they need."""

from __future__ import annotations

from flask import Blueprint, Response

from blueprints.models import switch_or_ask
from blueprints.pages import done
from blueprints.web import ApiError, client_name, services, switch_error
from services.engines.supervisor import ServiceError
from services.providers.local_services import SERVICE_NAMES, ServiceName
from services.switching.jobs import SwitchError

bp = Blueprint("local_services", __name__, url_prefix="/services/<service>")

BEGUN_SECONDS = 2.0
"""How long a form waits for a service that stops: longer than most take, and the page shows the rest."""


@bp.url_value_preprocessor
def check_name(_endpoint: str | None, values: dict[str, object] | None) -> None:
    if values is not None and values.get("service") not in SERVICE_NAMES:
        raise ApiError("not_found", f"There is no such service. There are: {', '.join(SERVICE_NAMES)}.")


@bp.post("/start")
def start(service: ServiceName) -> Response:
    """Start it. Ollama's start responds once it answers; Flux and vision are switched to, like any model.

    A failed start is shown by the page itself.
    """
    found = services()
    model = found.local_services.get(service).model
    if model is not None:
        found.local_services.check_startable(service)
        return switch_or_ask(model, activate="no")
    try:
        found.local_services.start(service, requested_by=client_name(), wait_seconds=0)
    except ServiceError:
        if found.local_services.get(service).state != "failed":
            raise
    return done()


@bp.post("/stop")
def stop(service: ServiceName) -> Response:
    try:
        services().local_services.stop(service, requested_by=client_name(), wait_seconds=BEGUN_SECONDS)
    except SwitchError as error:
        raise switch_error(error) from None
    return done()


@bp.post("/dismiss")
def dismiss(service: ServiceName) -> Response:
    """Dismiss the message about its last failure."""
    services().local_services.dismiss(service)
    return done()


@bp.post("/install")
def install(service: ServiceName) -> Response:
    """Install the Python packages that it lacks; the page shows the progress."""
    services().local_services.install(service)
    return done()


@bp.post("/install/cancel")
def cancel_installation(service: ServiceName) -> Response:
    services().local_services.cancel_installation(service)
    return done()
