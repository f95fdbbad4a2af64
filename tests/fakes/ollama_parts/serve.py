"""`ollama serve`: start from the environment, answer requests, end by a signal."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time

from .api import VERSION, Server
from .library import Library
from .logs import log
from .settings import Settings, listen_address, models_folder


def serve() -> int:
    """Run until a signal ends it, or return the exit code of a failed start."""
    settings = Settings(os.environ.get("FAKE_OLLAMA"))
    if (words := settings.fault("crash_on_start")) is not None:
        print(words, file=sys.stderr)
        return 2
    host, port = listen_address()
    library = Library(models_folder(), settings)
    try:
        if settings.fault("port_in_use"):
            raise OSError(errno.EADDRINUSE, "")
        server = Server((host, port), library, settings)
    except OSError as error:
        reason = "address already in use" if error.errno == errno.EADDRINUSE else str(error.strerror).lower()
        print(f"Error: listen tcp {host}:{port}: bind: {reason}", file=sys.stderr)
        return 1
    shown = {name: value for name, value in sorted(os.environ.items()) if name.startswith("OLLAMA_")}
    shown["OLLAMA_HOST"] = f"http://{host}:{port}"
    log("INFO", "routes.go:1802", "server config", env=f"map[{' '.join(f'{k}:{v}' for k, v in sorted(shown.items()))}]")
    library.install_configured()
    log("INFO", "images.go:517", f"total blobs: {len(list(library.blobs.iterdir()))}")
    log("INFO", "images.go:524", f"total unused blobs removed: {library.prune()}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end(server, settings))
    log("INFO", "routes.go:1864", f"Listening on {host}:{port} (version {VERSION})")  # before the first answer
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        time.sleep(0.1)  # not signal.pause, which would miss a signal that arrives just before it


def _end(server: Server, settings: Settings) -> None:
    if not settings.fault("ignore_sigterm"):
        server.scheduler.end()
        os._exit(0)
