"""Local services, downloads and installed models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

from flask import Blueprint, Response, jsonify, request
from pydantic import BaseModel, ConfigDict, Field

from blueprints.api import shapes
from blueprints.api.spec import documented
from blueprints.web import SSE_HEARTBEAT, ApiError, client_name, parse_body, services, sse, sse_event, switch_error
from services.downloads.download import Download
from services.providers.installation import Installation
from services.providers.local_services import ServiceName
from services.switching.jobs import SwitchError

bp = Blueprint("providers", __name__, url_prefix="/api/providers")


class DownloadBody(BaseModel):
    """What to download."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=300, description="name at its source, such as llama3.2")
    source: Literal["ollama", "huggingface"] = Field("ollama", description="where it comes from")


class ServiceBody(BaseModel):
    """The local service."""

    model_config = ConfigDict(extra="forbid")

    service: ServiceName


class StartServiceBody(ServiceBody):
    """The local service to start."""

    confirm: bool | None = Field(None, description="unload other models for it, where the settings require a yes")
    wait: bool = Field(True, description="respond once it answers, not once its load has begun")


@bp.get("/models/status")
@documented()
def models_status() -> Response:
    """List what is installed, per source, and all downloads."""
    found = services()
    models = found.status.current().models
    outdated = found.library.outdated
    ollama = found.ollama_service.status()
    return jsonify(
        {
            "ollama": {
                "available": ollama.state == "running",
                "models": [shapes.installed_document(m, outdated) for m in models if m.engine == "ollama"],
                "error": ollama.error,
            },
            "huggingface": {
                "available": True,
                "models": [shapes.installed_document(m, outdated) for m in models if m.engine == "llamacpp"],
                "error": None,
            },
            "downloads": [shapes.download_document(d) for d in found.downloads.all()],
        }
    )


@bp.get("/models/recommendations")
@documented()
def recommendations() -> Response:
    """List the models that the settings recommend, and whether they are installed."""
    listed = services().library.recommendations()
    return jsonify({"recommendations": [shapes.recommendation_document(r) for r in listed]})


@bp.post("/models/updates")
@documented(errors=(502,))
def check_updates() -> Response:
    """Ask the registries which installed models have a newer version. Downloading such a model again updates it."""
    return jsonify({"update_available": sorted(services().library.check_updates())})


@bp.post("/models/download")
@documented(body=DownloadBody, media_type="text/event-stream", errors=(409,))
def download() -> Response:
    """Download a model and follow it: an event at each change of progress, until it is complete or has failed.

    The job belongs to the server: disconnecting does not stop it. With `Accept: application/json` the response is the
    job.
    """
    body = parse_body(DownloadBody)
    found = services()
    job = found.downloads.request(body.model, body.source, client_name())
    if request.accept_mimetypes.best == "application/json":
        answer = jsonify(shapes.download_document(job))
        answer.status_code = 202
        return answer
    return sse(_progress(found.downloads.follow(job.id)))


@bp.get("/models/downloads")
@documented()
def downloads() -> Response:
    """List every download: those under way in order, then the finished ones."""
    return jsonify({"downloads": [shapes.download_document(d) for d in services().downloads.all()]})


@bp.post("/models/downloads/<download_id>/pause")
@documented(errors=(409,))
def pause(download_id: str) -> Response:
    """Stop the transfer and keep the partial files."""
    return jsonify(shapes.download_document(services().downloads.pause(download_id)))


@bp.post("/models/downloads/<download_id>/resume")
@documented(errors=(409,))
def resume(download_id: str) -> Response:
    """Continue a paused download, or retry a failed one, from where it stopped."""
    return jsonify(shapes.download_document(services().downloads.resume(download_id)))


@bp.delete("/models/downloads/<download_id>")
@documented(errors=(409,))
def cancel(download_id: str) -> Response:
    """Cancel a download, or remove a finished one from the list."""
    found = services().downloads
    if found.get(download_id).final:
        found.remove(download_id)
        return jsonify({"status": "removed", "id": download_id})
    return jsonify(shapes.download_document(found.cancel(download_id)))


@bp.delete("/models/<path:model_id>")
@documented(errors=(409, 502))
def delete(model_id: str) -> Response:
    """Unload a model and delete its files, except those that other models use."""
    removed = services().library.remove(model_id, client_name())
    return jsonify(
        {
            "status": "deleted",
            "model": removed.model,
            "freed_bytes": removed.deletion.frees_bytes,
            "freed_gb": shapes.gb(removed.deletion.frees_bytes),
            "shared_with": list(removed.deletion.shared_with),
            "message": f"{removed.model} was deleted.",
        }
    )


@bp.get("/services/status")
@documented()
def services_status() -> Response:
    """List the local services: whether they run, since when, what they lack, and the end of their log."""
    return jsonify({"services": {s.name: shapes.service_document(s) for s in services().local_services.all()}})


@bp.post("/services/start")
@documented(body=StartServiceBody, errors=(409, 502, 503, 504))
def start_service() -> Response:
    """Start a local service; respond once it answers.

    Starting flux or vision is a switch to its model, which does not become the active one: it may unload other models,
    and restores them if it fails. With `wait` false the response comes once the load has begun.
    """
    body = parse_body(StartServiceBody)
    found = services()
    try:
        service, unloaded = found.local_services.start(
            body.service,
            requested_by=client_name(),
            confirm=body.confirm,
            wait=body.wait,
            wait_seconds=found.settings.longest_switch_seconds,
        )
    except SwitchError as error:
        raise switch_error(error) from None
    words = f"{service.name} service started successfully"
    if service.state == "starting":
        words = f"{service.name} service is starting"
    elif not service.status.ours:
        words = f"{service.name} runs already, started by another program"
    if unloaded:
        words += f"; unloaded to make room: {', '.join(unloaded)}"
    document = {**shapes.service_document(service), "unloaded_models": list(unloaded)}
    return jsonify({"status": "started", **document, "message": words})


@bp.post("/services/stop")
@documented(body=ServiceBody, errors=(409, 502))
def stop_service() -> Response:
    """Stop a local service that was started from here; its requests in flight finish first."""
    body = parse_body(ServiceBody)
    found = services()
    longest = found.settings.longest_switch_seconds
    try:
        service = found.local_services.stop(body.service, requested_by=client_name(), wait_seconds=longest)
    except SwitchError as error:
        raise switch_error(error) from None
    words = f"{service.name} service stopped"
    return jsonify({"status": "stopped", **shapes.service_document(service), "message": words})


@bp.post("/services/install")
@documented(body=ServiceBody, errors=(409, 502))
def install_packages() -> Response:
    """Install the Python packages that flux and vision need; `GET /api/providers/services/status` follows it.

    The job belongs to the server: disconnecting does not stop it.
    """
    job = services().local_services.install(parse_body(ServiceBody).service)
    answer = jsonify({"status": "installing" if job.state == "running" else job.state, **_installation(job)})
    answer.status_code = 202 if job.state == "running" else 200
    return answer


@bp.post("/services/install/cancel")
@documented(body=ServiceBody, errors=(409,))
def cancel_installation() -> Response:
    """Cancel the installation under way; nothing of it remains."""
    job = services().local_services.cancel_installation(parse_body(ServiceBody).service)
    if job is None:
        raise ApiError("no_installation", "No installation is under way.")
    return jsonify({"status": job.state, **_installation(job)})


def _installation(job: Installation) -> shapes.Json:
    return {"message": job.message, "installation": shapes.installation_document(job)}


def _progress(views: Iterator[Download | None]) -> Iterator[bytes]:
    """Yield a download's progress as unnamed events, which a browser's EventSource delivers as messages."""
    for view in views:
        if view is None:
            yield SSE_HEARTBEAT
        else:
            yield sse_event(None, json.dumps(shapes.progress_document(view)), view.version)
