"""gunicorn's gevent worker, with one addition: told to stop, it hangs up on idle connections.

Browsers and API clients keep connections open for minutes, and gunicorn 27 waits for each until `graceful_timeout`.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

from gunicorn.workers.ggevent import GeventWorker


class Worker(GeventWorker):  # type: ignore[misc]
    """Knows its open connections."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clients: set[socket.socket] = set()

    def handle(self, listener: Any, client: socket.socket, addr: Any) -> None:
        self._clients.add(client)
        try:
            super().handle(listener, client, addr)
        finally:
            self._clients.discard(client)

    def hang_up(self) -> None:
        """End every connection once the answer under way on it is written."""
        for client in list(self._clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RD)
