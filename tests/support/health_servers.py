"""Servers that answer every request with one JSON document, or never."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.sockets import PlainServer


class JsonServer(PlainServer):
    """Answers every request with `document`; both may be changed. `requests` has the bytes of those that came."""

    def __init__(self, document: object, status: int = 200, port: int = 0) -> None:
        self.document = document
        self.status = status
        self.requests: list[bytes] = []
        super().__init__(self._reply, port)

    def _reply(self, link: socket.socket, request: bytes) -> None:
        self.requests.append(request)
        body = json.dumps(self.document).encode()
        head = f"HTTP/1.1 {self.status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        link.sendall(head.encode() + body)


@contextmanager
def json_server(document: object, status: int = 200, port: int = 0) -> Iterator[JsonServer]:
    """Run such a server, on a free port unless one is given."""
    server = JsonServer(document, status, port)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def hanging_url() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:  # the kernel accepts, and they wait
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
