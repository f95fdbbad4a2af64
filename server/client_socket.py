"""A client's connection, with limits on how slowly it may send its requests and take its answers.

gunicorn waits 75 s for a request's head and for ever for its body: two thousand slow or idle connections, from one
machine, kept everybody else out.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from gevent.socket import wait_read

from services.gateway.connections import PatientSocket

HEAD_SECONDS = 10.0
"""From the first byte of a request to the end of its head."""
BODY_BYTES_PER_SECOND = 1000
BODY_SECONDS = 10.0
"""What a body may take besides, for a client that thinks before it sends."""
SEND_SECONDS = 60.0
"""For which a client may take nothing of its answer."""
IDLE_SECONDS = 75.0
"""Between two requests; browsers and proxies keep a connection for about a minute."""
REFUSED_SECONDS = 1.0
"""For which a client that is refused may go on sending."""
BLOCK = 65_536


def refusal(status: int, document: Mapping[str, object], *headers: str) -> bytes:
    """A whole answer that ends its connection, for requests that never reach the app."""
    body = json.dumps(document).encode() + b"\n"
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
        "Connection: close",
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


FULL = refusal(
    503,
    {"status": "error", "error": "too_many_connections", "message": "Too many connections. Try again later."},
    "Retry-After: 5",
)


class ClientSocket(PatientSocket):
    """A client's connection. One that sends its head too slowly, or nothing for too long, reads as closed; one too slow
    in the middle of a body raises TimeoutError, so that it can be told.

    `unread` are bytes that were read from it already, and are read again first.
    """

    def __init__(self, descriptor: int, unread: bytes = b"", clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(fileno=descriptor)
        self._clock = clock
        self._unread = unread
        self._unread_from = 0
        self._body = False
        self._since: float | None = None
        """When the head or body that is being read began; None while nothing of a head has come."""
        self._came = 0
        self.timeout = SEND_SECONDS
        self.lane: Any = None
        """The hot lane (`server.hot_lane.HotLane`), which sees each request before gunicorn's parser."""
        self.path = ""
        """Of the request that gunicorn reads next, which it may refuse before the app sees it."""
        self.failed: Exception | None = None
        """Why the hot lane could not pass on the request that it leaves to gunicorn."""

    def expect_head(self) -> None:
        """The next request is waited for."""
        self._body, self._since = False, None

    def expect_body(self) -> None:
        """What comes is the body of the request that was read."""
        if not self._body:
            self._body, self._since, self._came = True, self._clock(), 0

    def recv(self, *args: Any) -> bytes:
        if self._unread:
            return self._take_unread(args[0])
        self.timeout = self._patience()
        try:
            if self._since is None:
                self.wait_readable(self.timeout)
            elif self.timeout <= 0:  # one who sends a byte now and then would otherwise always be in time
                raise TimeoutError
            data: bytes = super().recv(*args)
        except TimeoutError:
            if self._body:
                raise TimeoutError(f"less than {BODY_BYTES_PER_SECOND} bytes of it came in a second") from None
            return b""
        finally:
            self.timeout = SEND_SECONDS
        self._came += len(data)
        if self._since is None:
            self._since = self._clock()
        return data

    def sendall(self, data: Any, flags: int = 0) -> None:
        """As gevent's, which asks for the buffer's size and the time first: most answers fit as they are."""
        try:
            sent = self._sock.send(data, flags)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            super().sendall(memoryview(data)[sent:], flags)

    def _take_unread(self, size: int) -> bytes:
        """By an offset: cutting the bytes each time would copy 8 MB a thousand times."""
        begin, end = self._unread_from, self._unread_from + size
        taken = self._unread[begin:end]
        self._unread_from = end
        if end >= len(self._unread):
            self._unread, self._unread_from = b"", 0
        return taken

    def _patience(self) -> float:
        """Seconds for which the next bytes may be waited for."""
        if self._since is None:
            return IDLE_SECONDS
        allowed = BODY_SECONDS + self._came / BODY_BYTES_PER_SECOND if self._body else HEAD_SECONDS
        return self._since + allowed - self._clock()

    def refuse(self) -> None:
        """Close it with an answer, which would be lost if the request lay unread when the connection is closed."""
        with suppress(OSError):
            self._sock.send(FULL, socket.MSG_DONTWAIT)
            self._sock.shutdown(socket.SHUT_WR)
            wait_read(self.fileno(), REFUSED_SECONDS)
            self._sock.recv(BLOCK, socket.MSG_DONTWAIT)
        self.close()

    def hang_up(self) -> None:
        """End it, from any greenlet: whoever reads from it finds it closed."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
