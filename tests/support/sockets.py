"""A server that sends arbitrary bytes: for responses that no well-behaved program gives."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress


class PlainServer:
    """Accepts connections on loopback and calls `answer(link, request)` for each, with the bytes of the request.

    A connection is closed when `answer` returns, or when the server is closed.
    """

    def __init__(self, answer: Callable[[socket.socket, bytes], None], port: int = 0) -> None:
        self._answer = answer
        self._links: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        for link in (self._listener, *list(self._links)):
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                link, _ = self._listener.accept()
                self._links.add(link)
                threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        with link, suppress(OSError):
            self._answer(link, _request(link))
        self._links.discard(link)


def _request(link: socket.socket) -> bytes:
    """Head and body of a request."""
    came = b""
    while b"\r\n\r\n" not in came and (more := link.recv(65_536)):
        came += more
    head, _, body = came.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    while length is not None and len(body) < int(length[1]) and (more := link.recv(65_536)):
        body += more
    return head + b"\r\n\r\n" + body
