"""Models and switching: status, switch, plan, start, stop, restart, events."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Literal, TypeVar

from flask import Blueprint, Response, jsonify, request
from pydantic import BaseModel, ConfigDict, Field, field_validator

from blueprints.api import shapes
from blueprints.api.spec import documented
from blueprints.api.status_cache import status_document
from blueprints.web import (
    SSE_HEARTBEAT,
    ApiError,
    client_name,
    parse_body,
    services,
    sse,
    sse_event,
    switch_error,
    validate,
    wants_event_stream,
)
from services.config import Strategy
from services.pins import Pin
from services.switching.jobs import Job, Replace, SwitchOptions

bp = Blueprint("switching", __name__, url_prefix="/v1/models")
_EVENT_NUMBER = re.compile(r"[0-9]{1,18}")

SWITCH_ERRORS = (409, 502, 503, 504)
B = TypeVar("B", bound=BaseModel)


class SwitchBody(BaseModel):
    """What to switch to, and how."""

    model_config = ConfigDict(extra="forbid")

    target_model: str = Field(min_length=1, max_length=500, description="id of a model of the catalogue")
    strategy: Strategy | None = Field(None, description="which models to unload first")
    confirm: bool | None = Field(None, description="go ahead even when models are unloaded and settings ask first")
    replace: Replace = Field("cancel", description="what to do with a switch that is under way")
    wait: bool = Field(False, description="answer when the model is ready, not when its load has begun")


class PlanBody(BaseModel):
    """The switch to plan."""

    model_config = ConfigDict(extra="forbid")

    target_model: str = Field(min_length=1, max_length=500)
    strategy: Strategy | None = None


class PinBody(BaseModel):
    """How long to keep a model loaded, and why."""

    model_config = ConfigDict(extra="forbid")

    until: datetime | None = Field(None, description="time with its zone at which the pin ends; default: never")
    reason: str = Field("", max_length=200)

    @field_validator("until")
    @classmethod
    def _with_zone(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("the time needs its zone, such as 2026-12-31T18:00:00Z")
        if value is not None and value.timestamp() <= time.time():
            raise ValueError("the time has to be in the future")
        return value


class PinAnswer(BaseModel):
    """A pin: by whom, until when and why."""

    status: Literal["pinned", "unpinned"]
    model: str
    owner: str
    until: datetime | None
    reason: str


class ActionAnswer(BaseModel):
    """The result of a start, stop or restart."""

    status: Literal["success", "already_loaded"]
    model: str


@bp.get("/status")
@documented()
def status() -> Response:
    """Return every model's state, each device's memory, and the switch under way."""
    return Response(status_document(services()), mimetype="application/json")


@bp.post("/switch")
@documented(body=SwitchBody, query=SwitchBody, errors=SWITCH_ERRORS)
def switch() -> Response:
    """Switch to a model.

    With `Accept: text/event-stream` the response streams the stages; disconnecting does not cancel the switch.
    Otherwise it comes when the target's load has begun, or with `wait` when the target is ready.
    """
    body = _from_query_or_body(SwitchBody)
    job = services().switcher.switch(
        body.target_model,
        requested_by=client_name(),
        replace=body.replace,
        options=SwitchOptions(strategy=body.strategy, confirm=body.confirm),
    )
    if wants_event_stream():
        return sse(_events(job))
    return _answer(job, wait=body.wait)


@bp.get("/switch")
@documented()
def current_switch() -> Response:
    """Return the switch under way, and what waits for a model."""
    found = services()
    snapshot = found.board.current
    return jsonify(shapes.switch_document(snapshot.switch, snapshot.queued, found.router.waiting))


@bp.delete("/switch")
@documented(errors=(409,))
def cancel() -> Response:
    """Cancel the switch under way; what it unloaded is loaded again."""
    job = services().switcher.cancel("It was cancelled.")
    if job is None:
        raise ApiError("no_switch", "No switch is under way.")
    job.wait_done(services().settings.longest_switch_seconds)
    message = job.error.message if job.error else f"{job.target} was ready before it could be cancelled."
    return jsonify({"status": job.outcome, "switch_id": job.id, "model": job.target, "message": message})


@bp.get("/switch/events")
@documented(media_type="text/event-stream")
def switch_events() -> Response:
    """Follow the switch under way as server-sent events from its start; a single event `idle` if there is none."""
    job = services().switcher.job()
    if job is None:
        return sse([sse_event("idle", json.dumps({"active": False}))])
    return sse(_events(job, after=_last_event_id()))


@bp.post("/switch/plan")
@documented(body=PlanBody, query=PlanBody, errors=(502,))
def plan() -> Response:
    """Return what a switch would unload, and how long it would take. Changes nothing."""
    body = _from_query_or_body(PlanBody)
    return jsonify(shapes.plan_document(services().switcher.plan(body.target_model, body.strategy)))


@bp.post("/<path:model_id>/start")
@documented(errors=SWITCH_ERRORS)
def start(model_id: str) -> Response:
    """Load a model without unloading another one for it."""
    options = SwitchOptions(auto_unload=False, activate=False)
    job = services().switcher.switch(model_id, requested_by=client_name(), replace="queue", options=options)
    return _answer(job, wait=False)


@bp.post("/<path:model_id>/stop")
@documented(answer=ActionAnswer, errors=SWITCH_ERRORS)
def stop(model_id: str) -> Response:
    """Unload a model after its requests in flight."""
    return _action(services().switcher.stop(model_id, requested_by=client_name()))


@bp.post("/<path:model_id>/restart")
@documented(answer=ActionAnswer, errors=SWITCH_ERRORS)
def restart(model_id: str) -> Response:
    """Unload a model and load it again."""
    return _action(services().switcher.restart(model_id, requested_by=client_name()))


@bp.post("/<path:model_id>/pin")
@documented(body=PinBody, answer=PinAnswer, errors=(503,))
def pin(model_id: str) -> Response:
    """Keep a model loaded once it is: nothing unloads it until the pin ends or is removed. Replaces an earlier pin."""
    found = services()
    body = parse_body(PinBody, optional=True)
    until = body.until.timestamp() if body.until is not None else None
    made = Pin(found.catalog.get(model_id).id, client_name(), body.reason.strip(), until)
    found.pins.pin(made)
    return _pin_answer("pinned", made)


@bp.delete("/<path:model_id>/pin")
@documented(answer=PinAnswer, errors=(503,))
def unpin(model_id: str) -> Response:
    """Remove a model's pin."""
    found = services()
    removed = found.pins.unpin(found.catalog.models[model_id].id if model_id in found.catalog.models else model_id)
    if removed is None:
        raise ApiError("not_found", f"{model_id} is not pinned.")
    return _pin_answer("unpinned", removed)


def _pin_answer(status: str, made: Pin) -> Response:
    return jsonify({"status": status, "model": made.model, **shapes.pin_document(made)})


def _from_query_or_body(shape: type[B]) -> B:
    """Read the target from the query or the JSON body."""
    return validate(shape, request.args.to_dict()) if "target_model" in request.args else parse_body(shape)


def _answer(job: Job, *, wait: bool) -> Response:
    longest = services().settings.longest_switch_seconds
    ended = job.wait_done(longest) if wait else job.wait_started(longest)
    if job.error is not None:
        raise switch_error(job.error)
    if not ended:
        raise ApiError("engine_timeout", f"{job.target} was not ready within {longest:.0f} s.")
    return jsonify(shapes.job_document(job))


def _action(job: Job) -> Response:
    longest = services().settings.longest_switch_seconds
    ended = job.wait_done(longest)
    if job.error is not None:
        raise switch_error(job.error)
    if not ended:
        raise ApiError("engine_timeout", f"{job.target} still waits for its turn after {longest:.0f} s.")
    return jsonify({"status": "success", "model": job.target})


def _events(job: Job, after: int = 0) -> Iterator[bytes]:
    for event in job.follow(after):
        yield SSE_HEARTBEAT if event is None else sse_event(event.name, json.dumps(event.data), event.number)
    if job.outcome == "already_loaded":
        done = {"status": "already_loaded", "model": job.target, "total_time_seconds": 0, "unloaded_models": []}
        yield sse_event("complete", json.dumps(done))


def _last_event_id() -> int:
    value = request.headers.get("Last-Event-ID", "")
    return int(value) if _EVENT_NUMBER.fullmatch(value) else 0
