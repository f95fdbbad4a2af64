"""Short endpoints for scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flask import Blueprint, Response, jsonify, request
from pydantic import BaseModel, ConfigDict, Field

from blueprints.api.spec import documented
from blueprints.web import ApiError, client_name, json_object, parse_body, services, switch_error
from services.env_file import EnvFileError
from services.restart import RestartRefused
from services.status import ModelStatus, Status
from services.switching.events import SwitchView
from services.switching.jobs import Job, SwitchOptions

bp = Blueprint("scripts", __name__)

DEFAULT_ESTIMATE_SECONDS = 60
"""The estimate returned when the load time is unknown."""


class SwitchQuery(BaseModel):
    """The model to switch to."""

    model_id: str = Field("", description="id of a model of the catalogue")


@bp.post("/api/switch-model")
@documented(query=SwitchQuery, errors=(409, 502, 503))
def switch_model() -> Response:
    """Begin to switch to a model, and respond at once.

    With the setting `env_file`, the model's id is written to that file; if the switch fails, the previous one is
    restored.
    """
    model_id = request.args.get("model_id") or _from_form_or_json()
    if not model_id:
        raise ApiError(
            "invalid_value", "model_id is missing: say ?model_id=… with the id of a model.", param="model_id"
        )
    found = services()
    model_id = found.catalog.get(model_id).id
    try:
        job = found.compose.choose(
            model_id,
            lambda: found.switcher.switch(model_id, requested_by=client_name()),
        )
    except EnvFileError as error:
        raise ApiError("env_file_unusable", f"Nothing was switched: {error}") from None
    if job.error is not None:
        raise switch_error(job.error)
    model = found.status.current().model(model_id)
    seconds = model.estimated_load_seconds if model else None
    return jsonify(
        {
            "status": "switching",
            "message": f"Switching to {model_id}",
            "model_id": model_id,
            "info": f"{model.engine if model else 'The engine'} is loading the new model. "
            "Check /api/model-loading-status for progress.",
            "estimated_time_seconds": DEFAULT_ESTIMATE_SECONDS if seconds is None else round(seconds, 1),
        }
    )


@bp.post("/api/restart-api")
@documented(errors=(409, 503))
def restart_api() -> Response:
    """Restart the app with its settings read again. Models stay loaded, and new requests wait meanwhile."""
    try:
        services().restart.request()
    except RestartRefused as refused:
        raise ApiError(refused.code, refused.message) from None
    return jsonify({"status": "restarting", "message": "Switchyard restarts. Models that are loaded stay loaded."})


class OllamaSwitchBody(BaseModel):
    """The Ollama model to use from now on."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=500, description="name of an installed Ollama model")


@bp.post("/ollama/models/switch")
@documented(body=OllamaSwitchBody, errors=(409, 502, 503, 504))
def switch_ollama_model() -> Response:
    """Unload the Ollama model in use and load another one; respond once it has generated a token.

    If it can't be loaded, the old one is loaded again and stays in use. The note says what was done.
    """
    found = services()
    model = found.catalog.get(parse_body(OllamaSwitchBody).model)
    if model.engine != "ollama":
        raise ApiError("not_ollama", f"{model.id} is not an Ollama model. Use POST /v1/models/switch for it.")
    before = found.status.current()
    old, target = _ollama_model_in_use(before), before.model(model.id)
    was_loaded = target is not None and target.state == "running"
    instead_of = old if old != model.id else None
    options = SwitchOptions(instead_of=instead_of)
    job = found.switcher.switch(model.id, requested_by=client_name(), options=options)
    if not job.wait_done(found.settings.longest_switch_seconds):
        raise ApiError("engine_timeout", f"{model.id} was not ready in time.")
    if job.error is not None:
        raise switch_error(job.error)
    return jsonify(
        {
            "status": "success",
            "old_model": old,
            "new_model": model.id,
            "load_seconds": round(job.load_seconds or 0.0, 2),
            "note": f"{_what_was_done(job, old, was_loaded)} No server restart needed.",
        }
    )


def _what_was_done(job: Job, old: str | None, was_loaded: bool) -> str:
    """Return a sentence about what was unloaded and loaded."""
    gone = list(job.unloaded)
    loaded = not was_loaded and job.outcome == "success"
    if loaded and old in gone:
        gone.remove(old)
        also = f" {_listed(gone)} unloaded too, to make room." if gone else ""
        return f"Model physically unloaded and reloaded in Ollama.{also}"
    unloaded = f"{_listed(gone)} physically unloaded" if gone else "nothing was unloaded"
    if not loaded:
        return f"{job.target} was loaded already; {unloaded}."
    return f"{job.target} was loaded in Ollama; {unloaded}."


def _listed(models: Sequence[str]) -> str:
    return f"{' and '.join(models)} {'was' if len(models) == 1 else 'were'}"


def _ollama_model_in_use(status: Status) -> str | None:
    """Return the active model if it is Ollama's, else the loaded Ollama model used last, if any."""
    loaded = [m for m in status.models if m.engine == "ollama" and m.state == "running"]
    loaded.sort(key=lambda m: (m.active, m.last_used or 0.0))
    return loaded[-1].id if loaded else None


@bp.get("/api/model-loading-status")
@documented()
def model_loading_status() -> Response:
    """Report whether the active model answers, or the progress of the switch under way."""
    return jsonify(_loading_status(services().status.current()))


def _from_form_or_json() -> str:
    body = request.get_data()
    document: Mapping[str, object] = json_object(body) if request.is_json and body else request.form
    value = document.get("model_id")
    return value if isinstance(value, str) else ""


def _loading_status(status: Status) -> dict[str, object]:
    """Report the switch under way, else the active model.

    A failed switch is an error only without an active model: a failed request of one client does not concern the
    others.
    """
    switch, last = status.switch, status.last_switch
    active = status.model(status.active_model) if status.active_model else None
    if switch is not None:
        words = f"Switching to {switch.to_model}"
        return _document(_stage_word(switch, status), active, words, switch.percent, switch.stage)
    failure = _failure(status)
    if active is not None:
        ready = active.state == "running"
        words = f"{active.engine} is ready" if ready else f"{active.id} is {active.state}"
        words = f"{words}; {last.to_model} failed: {failure}" if failure and last else words
        return _document("ready" if ready else "idle", active, words, 100 if ready else 0, None)
    if failure is not None and last is not None:
        return _document("error", None, failure, last.percent, last.stage)
    return _document("idle", None, "No model is loaded. Switch to one first.", 0, None)


def _stage_word(switch: SwitchView, status: Status) -> str:
    """Return `starting` until the target itself loads: before that, models are unloaded or a container starts."""
    if switch.stage in ("downloading", "warming_up"):
        return "loading"
    target = status.model(switch.to_model)
    begun = target is not None and target.load is not None and not (target.load.detail or "").startswith("starting")
    return "loading" if switch.stage == "loading" and begun else "starting"


def _failure(status: Status) -> str | None:
    """Return why the last switch, or its model since, failed, else None. Switches caused by requests don't count."""
    last = status.last_switch
    if last is None or last.error == "cancelled":
        return None
    if last.error is not None:
        return None if last.requested_by == "request" else last.message or "The switch failed."
    target = status.model(last.to_model)
    return target.error if target is not None and target.state == "failed" else None


def _document(
    state: str, active: ModelStatus | None, message: str, progress: int, stage: str | None
) -> dict[str, object]:
    return {
        "status": state,
        "model_loaded": active is not None and state == "ready",
        "current_model": active.id if active else None,
        "message": message,
        "progress": progress,
        "stage": stage,
    }
