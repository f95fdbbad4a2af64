"""What a worker leaves to the one that takes its place: connections, each with the request that nobody has begun.

The channel is gunicorn's master's, so it is there while there is no worker. A connection is passed on as it is (its
file descriptor), with what was read from it in an unnamed file in memory; the client notices nothing but the wait.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

NOT_REPEATED = frozenset({"HTTP_EXPECT", "HTTP_TRANSFER_ENCODING", "HTTP_CONTENT_LENGTH", "HTTP_CONTENT_TYPE"})
"""The body is here, so there is nothing to wait for, and its length is known."""


class Handover:
    """A channel to the next worker. Bounded by the kernel: what doesn't fit is not taken."""

    def __init__(self) -> None:
        self._giving, self._taking = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._giving, self._taking):
            end.setblocking(False)  # Python 3.11's send_fds and recv_fds forget their flags

    def close(self) -> None:
        """Give up what was given and not taken: its clients see a closed connection."""
        self._giving.close()
        self._taking.close()

    def fileno(self) -> int:
        """Readable when there is something to `take`."""
        return self._taking.fileno()

    def give(self, client: socket.socket, request: bytes) -> bool:
        """Leave a connection and the request on it to the next worker. Whether that was possible; never blocks."""
        memory = os.memfd_create("request")
        try:
            with os.fdopen(os.dup(memory), "wb") as file:
                file.write(request)
            socket.send_fds(self._giving, [b"."], [client.fileno(), memory])
        except OSError:
            return False
        finally:
            os.close(memory)
        return True

    def take(self) -> tuple[int, bytes] | None:
        """A connection's file descriptor, the caller's to close, and its request; None when nothing is there."""
        with suppress(BlockingIOError):
            _, descriptors, _, _ = socket.recv_fds(self._taking, 1, 2)
            if len(descriptors) == 2:
                client, memory = descriptors
                with os.fdopen(memory, "rb") as file:
                    file.seek(0)
                    return client, file.read()
            for descriptor in descriptors:  # the limit on open files was reached
                os.close(descriptor)
        return None


def request_bytes(environ: Mapping[str, Any], body: bytes) -> bytes:
    """A request as it would come from its client, from what a WSGI server made of it."""
    lines = [f"{environ['REQUEST_METHOD']} {environ['RAW_URI']} {environ['SERVER_PROTOCOL']}", *_headers(environ)]
    if body or "CONTENT_LENGTH" in environ or "HTTP_TRANSFER_ENCODING" in environ:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def _headers(environ: Mapping[str, Any]) -> Iterable[str]:
    if environ.get("CONTENT_TYPE"):
        yield f"Content-Type: {environ['CONTENT_TYPE']}"
    for key, value in environ.items():
        if key.startswith("HTTP_") and key not in NOT_REPEATED:
            yield f"{key[5:].replace('_', '-').title()}: {value}"
