"""The OpenAI-compatible gateway: any `/v1` path of the engine that serves the model the request names."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable
from urllib.parse import quote

import gevent
from flask import Blueprint, Response, jsonify, request
from gevent.monkey import get_original

from blueprints.api.spec import documented
from blueprints.web import ApiError, services
from services.gateway.relay import Body, answer_headers
from services.gateway.router import ClientGone

bp = Blueprint("openai", __name__)

GATEWAY_ERRORS = (401, 409, 501, 502, 503, 504)
STARTED_AT = int(time.time())
_poll = get_original("select", "poll")


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
    found = services()
    body = request.get_data(cache=False)
    client = _ClientWatch(request.environ.get("gunicorn.socket"))
    try:
        admission = found.router.admit(_named_model(body), client.left)
    except ClientGone:
        return Response(status=499)
    endpoint = admission.instance.endpoint
    assert endpoint is not None, "a running instance has an endpoint"
    try:
        answer = found.relay.send(endpoint, request.method, _target(), request.headers.items(), body)
    except BaseException:
        admission.release()
        raise
    stop_watching = client.on_leaving(answer.abort)

    def finish() -> None:
        stop_watching()
        admission.release()

    streamed = "text/event-stream" in str(answer.get("content-type"))
    relayed = Body(answer, finish, _stream_error if streamed else _cut_off)
    response = Response(relayed, status=answer.status_code, direct_passthrough=True)
    response.headers.clear()
    response.headers.extend(answer_headers(answer))
    return response


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


def _stream_error(reason: str) -> bytes:
    error = {"error": {"message": f"The answer broke off: {reason}.", "type": "server_error", "code": "engine_failed"}}
    return f"data: {json.dumps(error)}\n\n".encode()


def _cut_off(reason: str) -> bytes:
    raise ConnectionError(f"the engine's answer broke off: {reason}")


def _listed(model_id: str) -> dict[str, object]:
    model = services().catalog.get(model_id)
    return {"id": model.id, "object": "model", "created": STARTED_AT, "owned_by": model.engine}


class _ClientWatch:
    """Notices that a client closed its connection, which a server otherwise learns at the next write only."""

    def __init__(self, client: socket.socket | None) -> None:
        self._client = client

    def left(self) -> bool:
        """Whether the client has closed its side."""
        if self._client is None:
            return False
        poll = _poll()  # gevent's own would switch greenlets, which a callback of the hub must not
        poll.register(self._client.fileno(), select.POLLIN | select.POLLRDHUP)
        return any(event & (select.POLLRDHUP | select.POLLHUP) for _, event in poll.poll(0))

    def on_leaving(self, act: Callable[[], None]) -> Callable[[], None]:
        """Call `act` when the client leaves; returns what stops the watching."""
        if self._client is None:
            return lambda: None
        watcher = gevent.get_hub().loop.io(self._client.fileno(), 1)

        def look() -> None:
            watcher.stop()  # one look: pipelined bytes would keep it firing
            if self.left():
                act()

        watcher.start(look)

        def stop() -> None:
            watcher.stop()
            watcher.close()

        return stop
