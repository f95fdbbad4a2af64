"""Shared HTTP helpers: services, request bodies, error shapes, SSE, security headers."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any, TypeVar, cast

from flask import Flask, Response, current_app, jsonify, render_template, request
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException

from blueprints.api.shapes import plan_document
from blueprints.guard import Guard, Refused
from services.catalog import UnknownModel
from services.chats import ChatBusy, ChatError, ConversationNotFound, MessageNotFound
from services.container import Services
from services.downloads.download import DownloadNotFound
from services.downloads.fetcher import DownloadError
from services.engines.port import EngineError
from services.engines.supervisor import ServiceError
from services.gateway.router import GatewayError
from services.native_threads import compute_in_thread
from services.providers.ports import ProviderError
from services.providers.selection import ProviderUnavailable, UnknownProvider
from services.sizes import format_size
from services.store.errors import StoreError, StoreLocked
from services.studio.request import InvalidRequest
from services.studio.studio import RunNotFound, StudioError
from services.switching.jobs import SwitchError
from services.switching.plan import Plan
from services.switching.reporter import memory_figures

CSP = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
)
SECURITY_HEADERS = (
    ("Content-Security-Policy", CSP),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "same-origin"),
)

STATUS_OF_CODE: Mapping[str, int] = {
    "invalid_json": 400,
    "invalid_value": 422,
    "wrong_kind": 422,
    "forbidden_host": 403,
    "cross_origin": 403,
    "not_found": 404,
    "model_not_found": 404,
    "too_large": 413,
    "rate_limited": 429,
    "internal_error": 500,
    "load_failed": 502,
    "engine_error": 502,
    "key_refused": 502,
    "engine_unreachable": 502,
    "queue_full": 503,
    "starting": 503,
    "state_unwritable": 503,
    "stopping": 503,
    "restart_unavailable": 503,
    "database_locked": 503,
    "database_unavailable": 503,
    "queue_timeout": 504,
    "invalid_name": 422,
    "registry_not_allowed": 422,
    "unknown_provider": 422,
    "provider_unavailable": 503,
    "ollama_not_found": 503,
    "service_unavailable": 503,
    "not_installable": 422,
    "provider_refused": 502,
    "bad_answer": 502,
    "service_failed": 502,
    "stop_failed": 502,
    "service_timeout": 504,
    "engine_timeout": 504,
}
"""HTTP status of each error code of the contract; codes not listed mean "not possible now": 409."""

OPENAI_SHAPED = ("/v1/", "/chat/completions")
"""Path prefixes whose errors have OpenAI's shape."""

ERROR_HEADER = "Switchyard-Error"
"""Set on every error response of ours. A page treats an error without it as a proxy's, and shows none of its body."""

WORTH_COMPRESSING = 1024
LARGE = 100_000
"""Bytes from which on compressing takes milliseconds, and is done in a thread."""
RETRY_SECONDS: Mapping[str, int] = {
    "stopping": 2,
    "state_unwritable": 5,
    "database_locked": 5,
    "database_unavailable": 5,
}
"""Value of Retry-After: time for a restart, the end of a lock, or space on the disk."""

B = TypeVar("B", bound=BaseModel)


class ApiError(Exception):
    """A request failed or was refused. `code` determines the status.

    `figures` are added to the JSON. If given, even empty, the error has the flat shape wherever the request came in.
    `beside` is added to it in either shape.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        figures: Mapping[str, object] | None = None,
        beside: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.status = status or STATUS_OF_CODE.get(code, 409)
        again = {"Retry-After": str(RETRY_SECONDS[code])} if code in RETRY_SECONDS else {}
        self.headers = {**again, **(headers or {})}
        self.figures = figures
        self.beside = dict(beside or {})


ErrorHandler = Callable[[ApiError], Response | None]
_error_handlers: dict[str, ErrorHandler] = {}


def services() -> Services:
    """Return the running app's services."""
    return cast("Services", current_app.extensions["switchyard"])


def guard() -> Guard:
    """Return the running app's guard."""
    return cast("Guard", current_app.extensions["switchyard.guard"])


def parse_body(shape: type[B], *, optional: bool = False) -> B:
    """Parse the JSON body as `shape`. Raises ApiError 400 if it isn't JSON, 422 if a value is invalid."""
    raw = request.get_data(cache=True)
    if optional and not raw.strip():
        return validate(shape, {})
    return validate(shape, json_object(raw))


def json_object(raw: bytes) -> dict[str, Any]:
    """Parse a body that has to be a JSON object. Raises ApiError 400, also for one that is nested too deeply."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ApiError("invalid_json", "The body has to be a JSON object.")
    return document


def validate(shape: type[B], values: Mapping[str, Any]) -> B:
    """Validate values as `shape`. Raises ApiError 422 naming the first invalid one."""
    try:
        return shape.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise ApiError(
            "invalid_value", f"{param}: {first['msg']}." if param else str(first["msg"]), param=param
        ) from None


def sse(events: Iterable[bytes]) -> Response:
    """Return a response that streams server-sent events."""
    response = Response(cast("Iterator[bytes]", events), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"
    return response


def sse_event(name: str | None, data: str, number: int | str | None = None) -> bytes:
    """Format a server-sent event; line breaks in `data` become several data lines."""
    lines = [] if number is None else [f"id: {number}"]
    lines += [] if name is None else [f"event: {name}"]
    lines += [f"data: {line}" for line in data.split("\n")]
    return ("\n".join(lines) + "\n\n").encode()


SSE_HEARTBEAT = b": still here\n\n"


def wants_event_stream() -> bool:
    return "text/event-stream" in request.headers.get("Accept", "")


def client_name() -> str:
    """Return the kind of client for a switch's record: "page" or "api"."""
    return "page" if request.headers.get("HX-Request") or request.mimetype.endswith("form-urlencoded") else "api"


def init_app(app: Flask) -> None:
    """Register the guard, security headers and error handlers."""
    app.before_request(lambda: guard().check(request.environ, request.endpoint))
    app.before_request(_read_body)
    app.after_request(_secure)
    app.register_error_handler(ApiError, _answer_error)
    app.register_error_handler(Refused, lambda e: _answer_error(_with_retry(e)))
    app.register_error_handler(
        UnknownModel, lambda e: _answer_error(ApiError("model_not_found", str(e), param="model"))
    )
    app.register_error_handler(SwitchError, lambda e: _answer_error(switch_error(e)))
    app.register_error_handler(EngineError, lambda e: _answer_error(ApiError("engine_error", str(e))))
    app.register_error_handler(GatewayError, lambda e: _answer_error(_with_retry(e)))
    for refusal in (ServiceError, DownloadError):
        app.register_error_handler(refusal, lambda e: _answer_error(ApiError(e.code, e.message)))
    app.register_error_handler(UnknownProvider, lambda e: _answer_error(ApiError("unknown_provider", str(e))))
    app.register_error_handler(ProviderUnavailable, lambda e: _answer_error(provider_error(e)))
    app.register_error_handler(StudioError, lambda e: _answer_error(ApiError(e.code, e.message)))
    app.register_error_handler(
        InvalidRequest, lambda e: _answer_error(ApiError("invalid_value", e.message, param=e.field))
    )
    app.register_error_handler(ProviderError, lambda e: _answer_error(_provider_error(e)))
    app.register_error_handler(RunNotFound, lambda e: _answer_error(ApiError("not_found", str(e))))
    app.register_error_handler(DownloadNotFound, lambda e: _answer_error(ApiError("not_found", str(e))))
    app.register_error_handler(ConversationNotFound, lambda e: _answer_error(ApiError("not_found", str(e))))
    app.register_error_handler(MessageNotFound, lambda e: _answer_error(ApiError("not_found", str(e))))
    app.register_error_handler(ChatBusy, lambda e: _answer_error(ApiError("chat_busy", str(e))))
    app.register_error_handler(ChatError, lambda e: _answer_error(ApiError("invalid_value", str(e))))
    app.register_error_handler(StoreError, lambda e: _answer_error(_store_error(e)))
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(Exception, _answer_unexpected)


def _read_body() -> None:
    """Read the body before any view runs, so that a truncated or malformed request never has an effect."""
    request.get_data()


def switch_error(error: SwitchError) -> ApiError:
    """Convert a job's error, with its memory figures and, for a confirmation, the plan."""
    figures = memory_figures(error)
    plan = error.details.get("plan")
    if error.code == "confirmation_required" and isinstance(plan, Plan):
        figures["plan"] = plan_document(plan)
    return ApiError(error.code, error.message, figures=figures)


def provider_error(error: ProviderUnavailable) -> ApiError:
    """Convert the refusal of a choice, with what to do about each provider that can't serve."""
    first = error.problems[0]
    figures = {
        "guidance": " ".join(problem.guidance for problem in error.problems),
        "service": first.service,
        "problems": [asdict(problem) for problem in error.problems],
    }
    return ApiError("provider_unavailable", str(error), figures=figures)


def _store_error(error: StoreError) -> ApiError:
    code = "database_locked" if isinstance(error, StoreLocked) else "database_unavailable"
    return ApiError(code, str(error))


def _provider_error(error: ProviderError) -> ApiError:
    again = {} if error.retry_after is None else {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    return ApiError(error.code, error.message, headers=again)


def _with_retry(error: GatewayError | Refused) -> ApiError:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    plan = error.plan if isinstance(error, GatewayError) else None
    beside = {} if plan is None else {"plan": plan_document(plan)}
    return ApiError(error.code, error.message, headers=headers, beside=beside)


def _secure(response: Response) -> Response:
    headers = response.headers
    for name, value in SECURITY_HEADERS:
        headers.setdefault(name, value)
    if response.mimetype == "text/html":
        headers.setdefault("Cache-Control", "no-store")
        headers.add("Vary", "HX-Request, Accept-Encoding")
        _compress(response)
    return response


def _compress(response: Response) -> None:
    if response.is_streamed:
        return
    compressed = compress(response.get_data(), request.headers.get("Accept-Encoding", ""))
    if compressed is not None:
        response.set_data(compressed)
        response.headers["Content-Encoding"] = "gzip"


def compress(page: bytes, accepted: str) -> bytes | None:
    """Compress a page: with forty models in the menu one shrinks to a sixth. `accepted` is the Accept-Encoding header.

    Returns None if the client doesn't accept that, or it isn't worth it.
    """
    if "gzip" not in accepted or len(page) < WORTH_COMPRESSING:
        return None
    return compute_in_thread(partial(_gzip, page)) if len(page) > LARGE else _gzip_again(page)


def _gzip(page: bytes) -> bytes:
    return gzip.compress(page, 5, mtime=0)


_gzip_again = lru_cache(maxsize=4)(_gzip)
"""Remembers the latest: what has changed is the same for many tabs."""


def handles_errors_of(*endpoints: str) -> Callable[[ErrorHandler], ErrorHandler]:
    """Decorator: the function renders the errors of these endpoints for people, unless it returns None.

    The status of its response is set by the caller.
    """

    def register(handler: ErrorHandler) -> ErrorHandler:
        _error_handlers.update(dict.fromkeys(endpoints, handler))
        return handler

    return register


def _answer_error(error: ApiError) -> Response:
    response = _error_page(error) if _for_people() else jsonify(error_document(error, request.path))
    response.status_code = error.status
    response.headers.update(error.headers)
    response.headers[ERROR_HEADER] = error.code
    return response


def error_document(error: ApiError, path: str) -> dict[str, object]:
    """Return the error of a request to `path` in the contract's shape: OpenAI's under /v1, the flat one elsewhere.

    Refusals of the switcher are flat under /v1 too, figures included.
    """
    if error.figures is not None or not path.startswith(OPENAI_SHAPED):
        return {
            "status": "error",
            "error": error.code,
            "message": error.message,
            **(error.figures or {}),
            **error.beside,
        }
    kind = "rate_limit_error" if error.status == 429 else "server_error"
    if error.status < 500 and error.status != 429:
        kind = "invalid_request_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}, **error.beside}


def _for_people() -> bool:
    if request.path.startswith((*OPENAI_SHAPED, "/api/", "/ollama/")):
        return False
    accepted = request.accept_mimetypes
    return request.headers.get("HX-Request") == "true" or accepted["text/html"] > accepted["application/json"]


def _error_page(error: ApiError) -> Response:
    handle = _error_handlers.get(request.endpoint or "")
    if handle is not None:
        try:
            response = handle(error)
        except Exception as failure:
            current_app.logger.exception("an error handler failed", exc_info=failure)
        else:
            if response is not None:
                return response
    fragment = request.headers.get("HX-Request") == "true"
    template = "fragments/error.html" if fragment else "pages/error.html"
    return Response(render_template(template, title=_title(error), message=error.message, status=error.status))


def _title(error: ApiError) -> str:
    return {404: "Not found", 403: "Refused", 413: "Too large", 429: "Too many requests"}.get(
        error.status, "That did not work" if error.status < 500 else "Switchyard hit a problem"
    )


def _answer_http(error: HTTPException) -> Response:
    codes = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "too_large", 429: "rate_limited"}
    code = error.code or 500
    converted = ApiError(codes.get(code, "bad_request"), _http_message(error), status=code)
    if error.response is None:
        converted.headers = {k: v for k, v in error.get_headers() if k in ("Allow", "Retry-After")}
    return _answer_error(converted)


def _http_message(error: HTTPException) -> str:
    if error.description != type(error).description:
        return f"{error.description}"
    limit = format_size(services().settings.max_body_bytes)
    return {
        404: "There is nothing at this address.",
        405: "This address does not take that method.",
        400: "The request can't be understood: its body is malformed, or ends before it should.",
        413: f"The body is larger than the {limit} that are allowed (setting max_body_mb).",
    }.get(error.code or 500, f"{error.description}")


def _answer_unexpected(error: Exception) -> Response:
    current_app.logger.exception("unforeseen error", exc_info=error)
    return _answer_error(ApiError("internal_error", "Switchyard hit a problem of its own; its log has the details."))
