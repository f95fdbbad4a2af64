"""A client's connection, with limits on how slowly it may send requests and read responses.

gunicorn waits 75 s for a request's head and for ever for its body: two thousand slow or idle connections, from one
machine, locked out all other clients.
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
"""Limit from the first byte of a request to the end of its head."""
BODY_BYTES_PER_SECOND = 1000
BODY_SECONDS = 10.0
"""Allowance on top of that speed, for a client that pauses before it sends."""
SEND_SECONDS = 60.0
"""Limit for a client that reads nothing of its response."""
IDLE_SECONDS = 75.0
"""Limit between two requests; browsers and proxies keep a connection for about a minute."""
REFUSED_SECONDS = 1.0
"""How long a refused client's request is waited for."""
BLOCK = 65_536


def refusal(status: int, document: Mapping[str, object], *headers: str) -> bytes:
    """Return a whole response that ends its connection, for requests that never reach the app."""
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
    """A client's connection.

    Reading returns end of file if a head comes too slowly or nothing comes for too long; if a body comes too slowly it
    raises TimeoutError, so that the client gets a response. `unread` are bytes already received, which are read first.
    """

    def __init__(self, descriptor: int, unread: bytes = b"", clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(fileno=descriptor)
        self._clock = clock
        self._unread = unread
        self._unread_from = 0
        self._body = False
        self._since: float | None = None
        """When the head or body being read began; None before the first byte of a head."""
        self._came = 0
        self.timeout = SEND_SECONDS
        self.lane: Any = None
        """The hot lane (`server.hot_lane.HotLane`), which gets each request before gunicorn's parser."""
        self.path = ""
        """Path of the request that gunicorn parses next: it may refuse that before the app gets it."""
        self.failed: Exception | None = None
        """Why the hot lane could not relay the request that it leaves to gunicorn."""

    def expect_head(self) -> None:
        """Apply the limits for a head from here on: the next request is awaited."""
        self._body, self._since = False, None

    def expect_body(self) -> None:
        """Apply the limits for a body from here on: the head has been read."""
        if not self._body:
            self._body, self._since, self._came = True, self._clock(), 0

    def recv(self, *args: Any) -> bytes:
        if self._unread:
            return self._take_unread(args[0])
        self.timeout = self._patience()
        try:
            if self._since is None:
                self.wait_readable(self.timeout)
            elif self.timeout <= 0:  # or a client that sends a byte now and then would never time out
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
        """Send all data, most of it at once: gevent first queries the buffer's size and the time."""
        try:
            sent = self._sock.send(data, flags)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            super().sendall(memoryview(data)[sent:], flags)

    def _take_unread(self, size: int) -> bytes:
        """Return the next unread bytes. By an offset: slicing each time would copy 8 MB a thousand times."""
        begin, end = self._unread_from, self._unread_from + size
        taken = self._unread[begin:end]
        self._unread_from = end
        if end >= len(self._unread):
            self._unread, self._unread_from = b"", 0
        return taken

    def _patience(self) -> float:
        """Return the seconds to wait for the next bytes at most."""
        if self._since is None:
            return IDLE_SECONDS
        allowed = BODY_SECONDS + self._came / BODY_BYTES_PER_SECOND if self._body else HEAD_SECONDS
        return self._since + allowed - self._clock()

    def refuse(self) -> None:
        """Close it with a response. The request is read first: closing with unread bytes would reset the connection."""
        with suppress(OSError):
            self._sock.send(FULL, socket.MSG_DONTWAIT)
            self._sock.shutdown(socket.SHUT_WR)
            wait_read(self.fileno(), REFUSED_SECONDS)
            self._sock.recv(BLOCK, socket.MSG_DONTWAIT)
        self.close()

    def disconnect(self) -> None:
        """Disconnect the client, from any greenlet: a read under way returns end of file."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
