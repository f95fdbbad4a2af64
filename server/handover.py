"""Passes connections with unanswered requests from a worker that ends to the worker that replaces it.

gunicorn's master owns the channel, so it exists even while there is no worker. A connection is passed as its file
descriptor, and the bytes read from it in an unnamed file in memory (memfd). The client notices only the wait.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

NOT_REPEATED = frozenset({"HTTP_EXPECT", "HTTP_TRANSFER_ENCODING", "HTTP_CONTENT_LENGTH", "HTTP_CONTENT_TYPE"})
"""Headers not passed on: the body has been read, so its length is known and the client need not be told to send it."""


class Handover:
    """A channel to the next worker. The kernel limits its size: `give` returns False once it is full."""

    def __init__(self) -> None:
        self._giving, self._taking = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._giving, self._taking):
            end.setblocking(False)  # Python 3.11's send_fds and recv_fds forget their flags

    def close(self) -> None:
        """Close the channel, and with it the connections given and not taken."""
        self._giving.close()
        self._taking.close()

    def fileno(self) -> int:
        """Return the file descriptor that is readable when there is a connection to `take`."""
        return self._taking.fileno()

    def give(self, client: socket.socket, request: bytes) -> bool:
        """Pass a connection and its request to the next worker; return whether that was possible. Never blocks."""
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
        """Return a connection's file descriptor, which the caller closes, and its request; None if there is none."""
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
    """Rebuild the bytes of a request, as a client would send them, from its WSGI environment and body."""
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
