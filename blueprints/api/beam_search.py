"""Beam search: start a run, follow it, list and read runs, cancel and delete them."""

from __future__ import annotations

import json
from collections.abc import Iterator

from flask import Blueprint, Response, jsonify, request, stream_with_context, url_for
from pydantic import BaseModel, ConfigDict, Field

from blueprints.api.shapes import Json, iso_time
from blueprints.api.spec import documented
from blueprints.web import SSE_HEARTBEAT, parse_body, services, sse, sse_event, validate
from services.store.records import StudioCandidate
from services.studio.live_run import Activity, RunEvent, RunView, Wait
from services.studio.request import (
    LARGEST_SEED,
    MOST_CANDIDATES,
    MOST_ITERATIONS,
    MOST_KEPT,
    RunRequest,
    most_calls,
)
from services.studio.studio import Asked, Listed

bp = Blueprint("beam_search", __name__, url_prefix="/api/beam-search")


class ContinueBody(BaseModel):
    """The candidate of an earlier run that a run goes on from."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(min_length=1, max_length=64, description="id of the run")
    candidate: int = Field(ge=1, le=10_000, description="number of the candidate")


class BeamSearchBody(BaseModel):
    """What to search for, and how far."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="what the pictures are to show, at most 2,000 characters")
    beam_width: int = Field(2, ge=1, le=MOST_KEPT, description="pictures that each iteration keeps and refines")
    iterations: int = Field(2, ge=1, le=MOST_ITERATIONS, description="rounds of writing, drawing and scoring")
    candidates: int = Field(4, ge=1, le=MOST_CANDIDATES, description="new pictures in each iteration")
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="repeats a run; drawn by chance if left out")
    continue_from: ContinueBody | None = Field(None, description="a kept candidate to refine instead of the prompt")


class ListQuery(BaseModel):
    """Which runs to list."""

    limit: int = Field(20, ge=1, le=100, description="how many, the latest first")
    before: str | None = Field(None, max_length=64, description="id of a run: only those begun before it")


@bp.post("")
@documented(body=BeamSearchBody, errors=(409, 502, 503), status=202)
def start() -> Response:
    """Start a run with the providers chosen now; respond at once with its id, addresses and number of calls.

    The run belongs to the server: it goes on when nobody follows it. One at a time (409 `run_in_progress`).
    """
    body = parse_body(BeamSearchBody)
    origin = None if body.continue_from is None else (body.continue_from.run, body.continue_from.candidate)
    asked = Asked(body.prompt, body.beam_width, body.iterations, body.candidates, body.seed, origin)
    answer = jsonify(run_document(services().studio.start(asked)))
    answer.status_code = 202
    return answer


@bp.get("")
@documented(query=ListQuery)
def listed() -> Response:
    """List runs, the latest first, each with its best candidate alone."""
    query = validate(ListQuery, request.args.to_dict())
    studio = services().studio
    place = None
    if query.before is not None:
        begun = studio.get(query.before).run
        place = begun.created_at, begun.id
    return jsonify({"runs": [_listed_document(each) for each in studio.listed(query.limit, place)]})


@bp.get("/<run_id>")
@documented()
def read(run_id: str) -> Response:
    """Return a run: what it does now, what it made, and the ranking so far or at its end."""
    return jsonify(run_document(services().studio.get(run_id)))


@bp.get("/<run_id>/events")
@documented(media_type="text/event-stream")
def events(run_id: str) -> Response:
    """Follow a run from its beginning as server-sent events, also one that is over; `Last-Event-ID` resumes.

    First `providers`, then `phase`, `candidate` (each time one changes), `wait` and `note`, last `result`.
    """
    followed = services().studio.follow(run_id, request.headers.get("Last-Event-ID", ""))
    return sse(stream_with_context(_events(followed)))


@bp.delete("/<run_id>")
@documented(errors=(409,))
def cancel(run_id: str) -> Response:
    """Cancel a run: its calls upstream end, what was made is kept. Delete one that is over, with its pictures."""
    studio = services().studio
    if studio.get(run_id).run.final:
        studio.delete(run_id)
        return jsonify({"status": "deleted", "id": run_id})
    return jsonify(run_document(studio.cancel(run_id)))


def _events(followed: Iterator[tuple[str, RunEvent] | None]) -> Iterator[bytes]:
    for one in followed:
        if one is None:
            yield SSE_HEARTBEAT
        else:
            event_id, event = one
            yield sse_event(event.name, json.dumps(event_document(event)), event_id)


def _listed_document(listed: Listed) -> Json:
    best = None if listed.best is None else candidate_document(listed.best)
    return {**run_document(RunView(listed.run, ()), whole=False), "best": best}


def event_document(event: RunEvent) -> Json:
    """One event. `providers` and `result` hold the whole run, the latter with the ranking."""
    value = event.value
    if isinstance(value, RunView):
        return run_document(value, whole=event.name == "result")
    if isinstance(value, StudioCandidate):
        return candidate_document(value)
    if isinstance(value, Activity):
        return activity_document(value)
    if isinstance(value, Wait):
        return wait_document(value)
    return {"message": value}


def run_document(view: RunView, *, whole: bool = True) -> Json:
    """One run; `whole` includes its candidates."""
    run = view.run
    most = most_calls(RunRequest(run.prompt, run.beam_width, run.iterations, run.candidates, run.seed))
    document: Json = {
        "id": run.id,
        "status": "cancelling" if view.cancelling else run.state,
        "prompt": run.prompt,
        "beam_width": run.beam_width,
        "iterations": run.iterations,
        "candidates": run.candidates,
        "seed": run.seed,
        "continued_from": (None if run.origin_run is None else {"run": run.origin_run, "candidate": run.origin_number}),
        "providers": run.providers,
        "calls": {
            "most": {"texts": most.texts, "images": most.images, "scores": most.scores, "total": most.total},
            "made": {**dict.fromkeys(("texts", "images", "scores"), 0), **run.calls, "total": sum(run.calls.values())},
        },
        "switching_seconds": {
            **{capability: round(seconds, 3) for capability, seconds in run.switching_seconds.items()},
            "total": round(sum(run.switching_seconds.values()), 3),
        },
        "notes": list(run.notes),
        "error": run.error,
        "message": run.message,
        "created_at": iso_time(run.created_at),
        "finished_at": iso_time(run.finished_at),
        "activity": None if view.activity is None else activity_document(view.activity),
        "wait": None if view.wait is None else wait_document(view.wait),
        "urls": {
            "self": url_for("beam_search.read", run_id=run.id),
            "events": url_for("beam_search.events", run_id=run.id),
            "page": url_for("studio.run", run_id=run.id),
        },
    }
    if whole:
        ranking = view.ranking
        numbers = {candidate.number for candidate in ranking}
        document["ranking"] = [candidate_document(candidate) for candidate in ranking]
        document["others"] = [candidate_document(c) for c in view.candidates if c.number not in numbers]
    return document


def candidate_document(candidate: StudioCandidate) -> Json:
    """One candidate. `image` is null before it is drawn, and once it was removed to save space (`image_removed`)."""
    there = candidate.picture is not None and services().studio.pictures.has(candidate.picture)
    scored = candidate.state == "scored"
    return {
        "number": candidate.number,
        "iteration": candidate.iteration,
        "parent": candidate.parent,
        "what": candidate.what,
        "how": candidate.how,
        "written_by": "rules" if candidate.by_rules else "model",
        "seed": candidate.seed,
        "status": candidate.state,
        "image": url_for("studio.picture", picture_id=candidate.picture) if there else None,
        "image_removed": candidate.picture is not None and not there,
        "score": (
            {
                "alignment": candidate.alignment,
                "aesthetic": candidate.aesthetic,
                "total": candidate.total,
                "comment": candidate.comment,
            }
            if scored
            else None
        ),
        "reason": candidate.reason,
        "rank": candidate.rank,
    }


def activity_document(activity: Activity) -> Json:
    """What a run does now. `making_ready`: a model is being loaded for it."""
    return {
        "phase": activity.phase,
        "iteration": activity.iteration,
        "provider": activity.provider,
        "model": activity.model,
        "making_ready": activity.making_ready,
        "done": activity.done,
        "total": activity.total,
        "switching_seconds": activity.switching_seconds,
    }


def wait_document(wait: Wait) -> Json:
    """A wait that a provider asked for."""
    return {
        "provider": wait.provider,
        "seconds": round(wait.seconds, 1),
        "until": iso_time(wait.until),
        "message": wait.message,
    }
