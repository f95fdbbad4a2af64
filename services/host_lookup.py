"""Resolves host names with abandonable waits: the resolver can't be interrupted, and may take half a minute."""

from __future__ import annotations

import socket
import threading
from typing import Any


class Lookup:
    """One lookup. `over` is set at its end; then there is an `error`, or `addresses` as (family, socket address)."""

    def __init__(self, host: str, port: int) -> None:
        self.over = threading.Event()
        self.addresses: list[tuple[int, Any]] = []
        self.error: OSError | None = None
        self._host = host
        self._port = port
        threading.Thread(target=self._ask, name="host-lookup", daemon=True).start()

    def _ask(self) -> None:
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            self.addresses = [(family, address) for family, _, _, _, address in found]
        except OSError as error:
            self.error = error
        except UnicodeError:
            self.error = OSError("it is not a host name")
        finally:
            with _lock:
                del _under_way[self._host, self._port]
            self.over.set()


_under_way: dict[tuple[str, int], Lookup] = {}
_lock = threading.Lock()


def look_up(host: str, port: int) -> Lookup:
    """Begin a lookup, or join the one under way for the same host.

    At most one each: otherwise every request that gave up while a resolver hangs would leave a thread behind, and
    gevent has ten for all lookups together.
    """
    with _lock:
        if (host, port) not in _under_way:
            _under_way[host, port] = Lookup(host, port)
        return _under_way[host, port]
