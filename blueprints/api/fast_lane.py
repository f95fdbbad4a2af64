"""The gateway's common case without Flask: a plain request to a model that is running.

Flask's share of a relayed request was 60 % of the processor time (py-spy, one gevent worker). This WSGI middleware
takes what needs none of it; everything else, errors included, goes to the app, the body rewound, so that there is one
place for each rule. It asks only what is running, so that nothing it takes can cause a switch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from http import HTTPStatus
from io import BytesIO
from typing import Any

from werkzeug.exceptions import HTTPException

from blueprints.api.passing import Client, Passed, pass_on
from blueprints.guard import Guard
from blueprints.web import SECURITY_HEADERS
from services.container import Services
from services.gateway.router import ClientGone, GatewayError

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
WsgiApp = Callable[[Environ, StartResponse], Iterable[bytes]]

PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings"})
_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class FastLane:
    """Wraps the app's WSGI callable."""

    def __init__(self, app: WsgiApp, services: Services, guard: Guard) -> None:
        self._app = app
        self._services = services
        self._guard = guard
        self._longest = services.settings.max_body_bytes

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if self._may_take(environ):
            passed = self._pass(environ)
            if passed is not None:
                status = _STATUS_LINES.get(passed.status, f"{passed.status} Unknown")
                try:
                    start_response(status, [*passed.headers, *SECURITY_HEADERS])
                except BaseException:  # else the server closes it
                    passed.body.close()
                    raise
                return passed.body
        return self._app(environ, start_response)

    def _may_take(self, environ: Environ) -> bool:
        """Whether nothing about the request needs a second look: let in, no query, a body of known length."""
        return (
            environ["PATH_INFO"] in PATHS
            and environ["REQUEST_METHOD"] == "POST"
            and not environ["QUERY_STRING"]
            and environ.get("CONTENT_LENGTH", "").isdigit()
            and int(environ["CONTENT_LENGTH"]) <= self._longest
            and self._guard.refusal(environ) is None
        )

    def _pass(self, environ: Environ) -> Passed | None:
        """The engine's answer; None when the app has to deal with the request after all."""
        try:
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        except (OSError, HTTPException):  # the app will read it again, and say so
            return None
        environ["wsgi.input"] = BytesIO(body)
        named, model = _named_model(body)
        admission = self._services.router.admit_now(model) if named else None
        if admission is None:
            return None
        client = Client(environ)
        try:
            return pass_on(
                self._services.relay, admission, client, "POST", environ["PATH_INFO"], _headers(environ), body
            )
        except (GatewayError, ClientGone, HTTPException) as error:
            environ[FAILED] = error  # told by the app, which must not ask the engine again
            return None


FAILED = "switchyard.gateway_error"
"""Where the lane leaves the error of a request that it could not pass on."""


def _named_model(body: bytes) -> tuple[bool, str | None]:
    """Whether the body is what it should be, and the model it names."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False, None
    if not isinstance(document, dict):
        return False, None
    name = document.get("model")
    return (True, name) if name is None or isinstance(name, str) else (False, None)


def _headers(environ: Environ) -> Iterator[tuple[str, str]]:
    if "CONTENT_TYPE" in environ:
        yield "Content-Type", environ["CONTENT_TYPE"]
    for key, value in environ.items():
        if key.startswith("HTTP_"):
            yield _header_name(key), value


@lru_cache(maxsize=256)
def _header_name(key: str) -> str:
    """A header's name by its key in the WSGI environment. Remembered: clients send the same few."""
    return key.removeprefix("HTTP_").replace("_", "-").title()
