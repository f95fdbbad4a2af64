"""Answers of Docker's API that come piece by piece, and can be closed from another thread.

docker-py's own streams don't serve: they read an attached container below the buffer that may hold its first bytes,
they can't tell a daemon that went away from a stream that was closed, and close what another thread may be reading.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, Generic, TypeVar

import requests
import urllib3

READ_BYTES = 65_536
HEADER_BYTES = 8
"""Of a frame of an attached container's output: stream, three zeros, length of the payload (Docker API 1.41)."""

T = TypeVar("T")


class LiveStream(Generic[T]):
    """The items of an answer whose header has come; `items` reads its body, waiting at most `silence` seconds.

    `lost` makes what `next` raises when the connection breaks; without it that is the end. An `endless` body is lost as
    well when it ends in good order. A silence raises TimeoutError, or urllib3's.
    """

    def __init__(
        self,
        response: requests.Response,
        items: Callable[[requests.Response], Iterator[T]],
        *,
        silence: float | None = None,
        lost: Callable[[], Exception] | None = None,
        endless: bool = False,
    ) -> None:
        self._response = response
        self._socket = raw_socket(response)
        self._socket.settimeout(silence)
        self._items = items(response)
        self._lost = lost
        self._endless = endless
        self._lock = threading.Lock()
        self._reading = False
        self._over = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            if self._over:
                raise StopIteration
            self._reading = True
        try:
            return next(self._items)
        except (StopIteration, OSError, urllib3.exceptions.HTTPError) as end:
            trouble = self._trouble(end)
            self._over = True
            raise trouble from None
        finally:
            with self._lock:
                self._reading = False
                over = self._over
            if over:
                self._response.close()

    def close(self) -> None:
        with self._lock:
            self._over = True
            reading = self._reading
        with suppress(OSError):  # the other end may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)
        if not reading:
            self._response.close()

    def _trouble(self, end: Exception) -> Exception:
        if self._over:
            return StopIteration()
        if isinstance(end, (TimeoutError, urllib3.exceptions.TimeoutError)):
            return end
        in_order = isinstance(end, StopIteration) and not self._endless
        return StopIteration() if in_order or self._lost is None else self._lost()


def raw_socket(response: requests.Response) -> socket.socket:
    """The socket below an answer whose body is still to be read; neither requests nor urllib3 hands it out."""
    connection: socket.socket = _buffer(response).raw._sock
    return connection


def json_lines(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The objects of a chunked body, one a line, each as soon as it is here."""
    rest = b""
    for piece in response.raw.stream(READ_BYTES):
        *lines, rest = (rest + piece).split(b"\n")
        yield from (json.loads(line) for line in lines if line.strip())


def attached_output(response: requests.Response) -> Iterator[bytes]:
    """What an attached container without a terminal writes, from the connection that was taken over for it."""
    connection = raw_socket(response)
    silence = connection.gettimeout()
    connection.settimeout(0)
    early = _buffer(response).read1(READ_BYTES)  # what came along with the header
    connection.settimeout(silence)
    yield from payloads(chain([early], iter(lambda: connection.recv(READ_BYTES), b"")))


def payloads(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The payloads of frames that are cut anywhere, every part as soon as it is here."""
    header, left = b"", 0
    for piece in pieces:
        while piece:
            if left:
                payload, piece = piece[:left], piece[left:]
                left -= len(payload)
                yield payload
            else:
                wanted = HEADER_BYTES - len(header)
                header, piece = header + piece[:wanted], piece[wanted:]
                if len(header) == HEADER_BYTES:
                    header, left = b"", int.from_bytes(header[4:], "big")


def _buffer(response: requests.Response) -> Any:
    """The buffered reader of an answer, below urllib3's response and http.client's."""
    body: Any = response.raw
    return body._fp.fp
