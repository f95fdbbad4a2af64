"""Local services, downloads and installed models (seed 004)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

from flask import Blueprint, Response, jsonify, request
from pydantic import BaseModel, ConfigDict, Field

from blueprints.api import shapes
from blueprints.api.spec import documented
from blueprints.web import SSE_HEARTBEAT, ApiError, client_name, parse_body, services, sse, sse_event
from services.downloads.download import Download

bp = Blueprint("providers", __name__, url_prefix="/api/providers")


class DownloadBody(BaseModel):
    """What to download."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=300, description="name at its source, such as llama3.2")
    source: Literal["ollama", "huggingface"] = Field("ollama", description="where it comes from")


class ServiceBody(BaseModel):
    """Which local service is meant."""

    model_config = ConfigDict(extra="forbid")

    service: Literal["ollama", "flux", "vision"]


@bp.get("/models/status")
@documented()
def models_status() -> Response:
    """What is installed, per source, and what is being downloaded."""
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
    """The models that the settings recommend, and whether they are here."""
    listed = services().library.recommendations()
    return jsonify({"recommendations": [shapes.recommendation_document(r) for r in listed]})


@bp.post("/models/updates")
@documented(errors=(502,))
def check_updates() -> Response:
    """Ask the registries now which installed models have a newer version; download such a model again to get it."""
    return jsonify({"update_available": sorted(services().library.check_updates())})


@bp.post("/models/download")
@documented(body=DownloadBody, media_type="text/event-stream", errors=(409,))
def download() -> Response:
    """Download a model and follow it: one event each time that something moved, until it is here or went wrong.

    The job is the server's: leaving the stream stops nothing. With `Accept: application/json` the answer is the job.
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
    """Every download: those under way in their order, then the finished ones."""
    return jsonify({"downloads": [shapes.download_document(d) for d in services().downloads.all()]})


@bp.post("/models/downloads/<download_id>/pause")
@documented(errors=(409,))
def pause(download_id: str) -> Response:
    """Stop the transfer and keep what has arrived."""
    return jsonify(shapes.download_document(services().downloads.pause(download_id)))


@bp.post("/models/downloads/<download_id>/resume")
@documented(errors=(409,))
def resume(download_id: str) -> Response:
    """Go on with a paused download, or try a failed one again, from where it was."""
    return jsonify(shapes.download_document(services().downloads.resume(download_id)))


@bp.delete("/models/downloads/<download_id>")
@documented(errors=(409,))
def cancel(download_id: str) -> Response:
    """Call a download off, or take one that has ended off the list."""
    found = services().downloads
    if found.get(download_id).final:
        found.remove(download_id)
        return jsonify({"status": "removed", "id": download_id})
    return jsonify(shapes.download_document(found.cancel(download_id)))


@bp.delete("/models/<path:model_id>")
@documented(errors=(409, 502))
def delete(model_id: str) -> Response:
    """Delete a model, unloading it first, and its files unless other models use them."""
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
    """The local services: whether they run, since when, and the end of their log."""
    return jsonify({"services": {"ollama": shapes.service_document(services().ollama_service.status())}})


@bp.post("/services/start")
@documented(body=ServiceBody, errors=(409, 502, 503, 504))
def start_service() -> Response:
    """Start a local service; answers once it does."""
    _only_ollama(parse_body(ServiceBody))
    status = services().ollama_service.start()
    words = "ollama service started successfully" if status.ours else "ollama runs already, started by another program"
    return jsonify({"status": "started", **shapes.service_document(status), "message": words})


@bp.post("/services/stop")
@documented(body=ServiceBody, errors=(409, 502))
def stop_service() -> Response:
    """Stop a local service that was started from here."""
    _only_ollama(parse_body(ServiceBody))
    status = services().ollama_service.stop()
    return jsonify({"status": "stopped", **shapes.service_document(status), "message": "ollama service stopped"})


def _only_ollama(body: ServiceBody) -> None:
    if body.service != "ollama":
        raise ApiError("service_unavailable", f"This version has no {body.service} service. There is: ollama.")


def _progress(views: Iterator[Download | None]) -> Iterator[bytes]:
    """Seed 004's stream: unnamed events, so that a browser's EventSource hears them without further ado."""
    for view in views:
        if view is None:
            yield SSE_HEARTBEAT
        else:
            yield sse_event(None, json.dumps(shapes.progress_document(view)), view.version)
