"""The OpenAI-compatible gateway: any `/v1` path of the engine that serves the model the request names."""

from __future__ import annotations

import json
import time
from urllib.parse import quote

from flask import Blueprint, Response, jsonify, request

from blueprints.api.fast_lane import FAILED
from blueprints.api.passing import Client, pass_on
from blueprints.api.spec import documented
from blueprints.web import ApiError, services
from services.gateway.router import Admission, ClientGone, GatewayError
from services.restart import UNBEGUN

bp = Blueprint("openai", __name__)

GATEWAY_ERRORS = (401, 409, 501, 502, 503, 504)
STARTED_AT = int(time.time())


@bp.get("/v1/models")
@documented()
def list_models() -> Response:
    """Every model of the catalogue, in OpenAI's shape."""
    ids = sorted(services().catalog.models)
    return jsonify({"object": "list", "data": [_listed(model_id) for model_id in ids]})


@bp.get("/v1/models/<path:model_id>")
@documented()
def show_model(model_id: str) -> Response:
    """One model, in OpenAI's shape."""
    return jsonify(_listed(services().catalog.get(model_id).id))


@bp.post("/chat/completions", endpoint="short_chat_completions")
@bp.post("/v1/chat/completions")
@bp.post("/v1/completions", endpoint="completions")
@bp.post("/v1/embeddings", endpoint="embeddings")
@bp.post("/v1/responses", endpoint="responses")
@bp.post("/v1/messages", endpoint="messages")
@bp.post("/v1/rerank", endpoint="rerank")
@documented(errors=GATEWAY_ERRORS)
def generate() -> Response:
    """Ask a model; the answer is the engine's own, streamed as it comes.

    The body's `model` decides which one answers: absent or `auto`, the active one. One that is not loaded is switched
    to first.
    """
    return _relay()


@bp.route("/v1/<path:_rest>", methods=["GET", "POST", "DELETE"])
def anything_else(_rest: str) -> Response:
    """Whatever else the model's engine serves."""
    return _relay()


def _relay() -> Response:
    if isinstance(failed := request.environ.get(FAILED), Exception):
        return _not_passed(failed)
    found = services()
    body = request.get_data(cache=False)
    client = Client(request.environ)
    try:
        admission = _admit(body, client)
        passed = pass_on(found.relay, admission, client, request.method, _target(), request.headers.items(), body)
    except ClientGone as gone:
        return _not_passed(gone)
    response = Response(passed.body, status=passed.status, direct_passthrough=True)
    response.headers.clear()
    response.headers.extend(passed.headers)
    return response


def _admit(body: bytes, client: Client) -> Admission:
    """A place at the model that the body names; what waited for one when the app restarts is for the next run."""
    found = services()
    try:
        return found.router.admit(_named_model(body), client.left)
    except Exception:
        if found.restart.requested and not client.left():
            request.environ[UNBEGUN] = body
        raise


def _not_passed(error: Exception) -> Response:
    """Nobody is there to read an answer when the client has left; any other error is told as usual."""
    if not isinstance(error, ClientGone):
        raise error
    if services().restart.requested:  # it was the app that hung up
        raise GatewayError("stopping", "Switchyard restarts, and broke the answer off. Ask again.", retry_after=2)
    return Response(status=499)


def _named_model(body: bytes) -> str | None:
    """The body's `model`; None when it names none or isn't JSON that the gateway should understand."""
    if request.method == "GET" or not body:
        return request.args.get("model")
    if not request.mimetype.endswith("json") and not body.lstrip().startswith(b"{"):
        return request.args.get("model")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError("invalid_json", "The body has to be a JSON object.") from None
    if not isinstance(document, dict):
        raise ApiError("invalid_json", "The body has to be a JSON object.")
    name = document.get("model")
    if name is not None and not isinstance(name, str):
        raise ApiError("invalid_value", "model has to be a string.", param="model", status=400)
    return name


def _target() -> str:
    """The path as the client wrote it, with its query; the engine knows no `/chat/completions` without /v1."""
    path = quote(request.path if request.path.startswith("/v1/") else f"/v1{request.path}", safe="/:@!$&'()*+,;=~")
    query = request.query_string.decode("latin-1")
    return f"{path}?{query}" if query else path


def _listed(model_id: str) -> dict[str, object]:
    model = services().catalog.get(model_id)
    return {"id": model.id, "object": "model", "created": STARTED_AT, "owned_by": model.engine}
