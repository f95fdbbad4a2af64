"""A local server's address, and the program that listens there on this machine."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from services.http import is_loopback
from services.native_threads import run_in_thread


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server answers: its URL, and host:port.

    `local`: on this machine and without TLS, which none of the servers that we start supports.
    """

    url: str
    authority: str
    port: int
    local: bool

    @classmethod
    def parse(cls, base_url: str) -> Address:
        """Parse a URL without a path, such as `http://127.0.0.1:11434`."""
        parts = urlsplit(base_url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return cls(base_url.rstrip("/"), authority, port, parts.scheme == "http" and is_loopback(host))


@dataclass(frozen=True, slots=True)
class Listener:
    """The program that listens on a port, if this user may see it. `started_at` is seconds since the epoch."""

    pid: int | None = None
    name: str | None = None
    started_at: float | None = None

    def __str__(self) -> str:
        return "another program" if self.pid is None else f"the program {self.name} (process {self.pid})"


def listener_on(port: int) -> Listener:
    """Return what listens on a port of this machine. Reads every process's open files: some 10 ms."""
    with suppress(psutil.Error, OSError):
        for connection in run_in_thread(psutil.net_connections, "tcp"):
            here = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if here and connection.pid:
                process = psutil.Process(connection.pid)
                return Listener(process.pid, process.name(), process.create_time())
    return Listener()
