"""The OpenAI-compatible gateway: every `/v1` path of the engine that serves the requested model.

A POST to a path that generates switches to its model first. Everything else reaches loaded models only: a GET can be
sent by an `<img>` on another site, and a mistyped path is no reason to unload a model. See docs/decisions/0015.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from urllib.parse import quote

from flask import Blueprint, Response, current_app, jsonify, request
from werkzeug.exceptions import MethodNotAllowed, NotFound

from blueprints.api.relaying import Client, relay_request
from blueprints.api.spec import documented
from blueprints.guard import SAFE_METHODS
from blueprints.web import ApiError, guard, json_object, services
from services.engines.port import Kind
from services.gateway.relay import forwarded
from services.gateway.router import AUTO, Admission, ClientGone
from services.restart import FAILED, UNBEGUN

bp = Blueprint("openai", __name__)

GATEWAY_ERRORS = (401, 409, 501, 502, 503, 504)
STARTED_AT = int(time.time())

GENERATING = (
    "messages/count_tokens",
    "responses/input_tokens",
    "responses/compact",
    "reranking",
    "score",
    "moderations",
    "audio/transcriptions",
    "audio/translations",
    "audio/speech",
    "images/generations",
    "images/edits",
    "images/variations",
)
"""Further POST paths that generate, in llama.cpp, vLLM, Ollama or OpenAI's own API. They switch too."""
PATHS_OF_KIND: Mapping[Kind, tuple[str, ...]] = {
    "image": ("images/",),
    "vision": ("score", "describe"),
    "embedding": ("embeddings", "rerank", "score"),
}
"""Beginnings of the POST paths under /v1 that models of other kinds than text serve."""
OURS = frozenset({"models", "events", "recover", "preferences", "audit"})
"""First path segments under /v1 that are Switchyard's own; they are never relayed."""
RELAYED_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE"})


@bp.get("/v1/models")
@documented()
def list_models() -> Response:
    """List every model of the catalogue, in OpenAI's shape."""
    ids = sorted(services().catalog.models)
    return jsonify({"object": "list", "data": [_listed(model_id) for model_id in ids]})


@bp.get("/v1/models/<path:model_id>")
@documented()
def show_model(model_id: str) -> Response:
    """Return one model, in OpenAI's shape."""
    catalog = services().catalog
    if catalog.id_of(model_id) not in catalog.models:
        _check_method()
    return jsonify(_listed(catalog.get(model_id).id))


def _check_method() -> None:
    """Raise MethodNotAllowed if the path is one of ours with another method.

    Model ids may contain slashes, so the route for a model also matches `GET /v1/models/X/start`, a POST endpoint.
    """
    others = set(current_app.create_url_adapter(request).allowed_methods()) - SAFE_METHODS  # type: ignore[union-attr]
    if others:
        raise MethodNotAllowed([*sorted(others), "OPTIONS"])


@bp.post("/chat/completions", endpoint="short_chat_completions")
@bp.post("/v1/chat/completions")
@bp.post("/v1/completions", endpoint="completions")
@bp.post("/v1/embeddings", endpoint="embeddings")
@bp.post("/v1/responses", endpoint="responses")
@bp.post("/v1/messages", endpoint="messages")
@bp.post("/v1/rerank", endpoint="rerank")
@documented(errors=GATEWAY_ERRORS)
def generate() -> Response:
    """Generate with a model; the response is the engine's own, streamed as it arrives.

    The body's `model` names the model; absent or `auto`, it is the active one. A model that is not loaded is switched
    to first.
    """
    return _relay(_admit)


def generate_otherwise() -> Response:
    """As `generate`, for the paths in GENERATING."""
    return _relay(_admit)


for _path in GENERATING:
    bp.add_url_rule(f"/v1/{_path}", endpoint=_path.replace("/", "_"), view_func=generate_otherwise, methods=["POST"])


@bp.before_app_request
def anything_else() -> Response | None:
    """Relay a request under /v1 that matches no route of ours to the engine of a loaded model."""
    if not isinstance(request.routing_exception, NotFound) or not _may_be_an_engines(request.path):
        return None
    return _relay(_admit_loaded)


def _may_be_an_engines(path: str) -> bool:
    """Return whether a path is under /v1 and not ours.

    `.` and `..` segments, which could lead out of /v1, are rejected.
    """
    root, *steps = path.removeprefix("/").split("/")
    return (
        root == "v1"
        and request.method in RELAYED_METHODS
        and bool(steps[0] if steps else "")
        and steps[0] not in OURS
        and not {".", ".."} & set(steps)
    )


def _admit(name: str | None, client: Client) -> Admission:
    """Admit a request, switching to its model first. Counts that against the client's switch limit."""
    _check_kind(name)
    router = services().router
    admission = router.try_admit(name)
    if admission is None:
        guard().count_switch_to(name, request.environ)
        admission = router.admit(name, client.disconnected)
    return admission


def _check_kind(name: str | None) -> None:
    """Refuse a request that the model's kind can't serve, before anything is unloaded for it. Raises ApiError."""
    catalog = services().catalog
    model = catalog.models.get(catalog.id_of(name)) if name is not None else None
    if model is None or model.kind == "text":
        return
    path = request.path.removeprefix("/v1/")
    if not path.startswith(PATHS_OF_KIND[model.kind]):
        raise ApiError(
            "wrong_kind",
            f"{model.id} is a model of the kind {model.kind}: it can't serve {request.path}. "
            "GET /v1/models lists each model's kind.",
            param="model",
        )


def _admit_loaded(name: str | None, _client: Client) -> Admission:
    """Admit a request to a running model. Raises NotFound if none is named and none is active, else ApiError.

    A remote service has an account behind it, whose files and settings are under /v1 too: nobody reaches those here.
    """
    found = services()
    admission = found.router.try_admit(name)
    if admission is not None:
        if admission.instance.entry.remote:
            admission.release()
            raise NotFound(f"{admission.instance.model} is remote: only requests that generate are passed on to it.")
        return admission
    named = name if name not in (None, AUTO) else found.board.current.active_model
    if named is None:
        raise NotFound("There is nothing at this address, and no model is loaded whose engine might know it.")
    raise ApiError(
        "model_not_loaded",
        f"{found.catalog.get(named).id} is not ready, and no model is loaded for this address. "
        "Switch to it first with POST /v1/models/switch.",
        param="model",
    )


def _relay(admit: Callable[[str | None, Client], Admission]) -> Response:
    if isinstance(failed := request.environ.get(FAILED), Exception):
        return _not_passed(failed)
    body = request.get_data(cache=False)
    client = Client.of(request.environ)
    try:
        admission = _place(admit, body, client)
        headers = forwarded(request.headers.items())
        relayed = relay_request(services().relay, admission, client, request.method, _target(), headers, body)
    except ClientGone as gone:
        return _not_passed(gone)
    response = Response(relayed.body, status=relayed.status, direct_passthrough=True)
    response.headers.clear()
    response.headers.extend(relayed.headers)
    return response


def _place(admit: Callable[[str | None, Client], Admission], body: bytes, client: Client) -> Admission:
    """Admit a request to the model that its body names. On a restart, a waiting request is left for the next run."""
    try:
        return admit(_named_model(body), client)
    except Exception:
        if services().restart.requested and not client.disconnected():
            request.environ[UNBEGUN] = body
        raise


def _not_passed(error: Exception) -> Response:
    """Return an empty response for a client that has disconnected; raise any other error."""
    if not isinstance(error, ClientGone):
        raise error
    return Response(status=499)


def _named_model(body: bytes) -> str | None:
    """Return the body's `model`; None if it names none or isn't JSON."""
    if request.method in SAFE_METHODS or not body:
        return request.args.get("model")
    if not request.mimetype.endswith("json") and not body.lstrip().startswith(b"{"):
        return request.args.get("model")
    name = json_object(body).get("model")
    if name is not None and not isinstance(name, str):
        raise ApiError("invalid_value", "model has to be a string.", param="model", status=400)
    return name


def _target() -> str:
    """Return the path as the client wrote it, with its query, and with /v1 where the client left it out."""
    path = quote(request.path if request.path.startswith("/v1/") else f"/v1{request.path}", safe="/:@!$&'()*+,;=~")
    query = request.query_string.decode("latin-1")
    return f"{path}?{query}" if query else path


def _listed(model_id: str) -> dict[str, object]:
    model = services().catalog.get(model_id)
    return {"id": model.id, "object": "model", "created": STARTED_AT, "owned_by": model.engine, "kind": model.kind}
