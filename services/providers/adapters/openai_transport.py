"""The HTTP client that OpenAI's official client is given: one request each, by `services.http`.

Imported on demand, with the official client. Proxies and redirects are not followed, as everywhere in the app.
"""

from __future__ import annotations

import httpx2

from services.cancellation import CancelToken
from services.http import HttpRequest

NOT_SENT = frozenset({"host", "connection", "content-length", "accept-encoding"})
"""Headers of the connection, and the wish for a compressed answer, which nothing here would unpack."""
KEPT = ("content-type", "retry-after")


def http_client(token: CancelToken, seconds: float, most_bytes: int) -> httpx2.Client:
    """Return a client whose requests end after `seconds`, or as soon as `token` is cancelled."""
    return httpx2.Client(transport=_Transport(token, seconds, most_bytes), trust_env=False, follow_redirects=False)


class _Transport(httpx2.BaseTransport):
    def __init__(self, token: CancelToken, seconds: float, most_bytes: int) -> None:
        self._token = token
        self._seconds = seconds
        self._most_bytes = most_bytes

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request and return its whole response. Raises FetchError and Cancelled."""
        sent = HttpRequest(
            request.method,
            str(request.url),
            timeout=self._seconds,
            body=request.read(),
            headers={name.title(): value for name, value in request.headers.items() if name.lower() not in NOT_SENT},
            most_bytes=self._most_bytes,
        )
        with self._token.cancelling(sent.cancel):
            reply = sent.reply()
        headers = {name: value for name, value in reply.headers.items() if name in KEPT}
        return httpx2.Response(reply.status, headers=headers, content=reply.content)
