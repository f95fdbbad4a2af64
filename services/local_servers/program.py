"""The life of a server's process: its arguments, its log, signals, and its end."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from queue import Empty, SimpleQueue

from serving import Server, Service, is_loopback

FAILED_SECONDS = 2.0
"""How long /health tells why a load failed before the process exits."""
SIGNAL_SECONDS = 0.2
"""Longest time until a signal is noticed."""
STOP_SECONDS = 1.0
"""Time given to the running job after SIGTERM."""

log = logging.getLogger("local-servers")


def serve(
    service: Service, host: str, port: int, stop_signals: Collection[signal.Signals] = (signal.SIGTERM, signal.SIGINT)
) -> int:
    """Listen at once, load in the background, and serve until a signal or a failed load; return the exit code.

    Call `leave` with it. `host` must be a loopback address.
    """
    ending: SimpleQueue[int] = SimpleQueue()
    for number in stop_signals:
        signal.signal(number, lambda *_: ending.put(0))
    try:
        server = Server(service, host, port)
    except OSError as error:
        log.error("Can't listen on %s port %d: %s", host, port, error.strerror or error)
        return 1
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    log.info("Listening at http://%s:%d", f"[{host}]" if ":" in host else host, server.server_port)

    def load() -> None:
        if not server.load():
            time.sleep(FAILED_SECONDS)
            ending.put(1)

    threading.Thread(target=load, name="load", daemon=True).start()
    code = None
    while code is None:  # a signal that the kernel gives to another thread doesn't end the wait of this one
        with suppress(Empty):
            code = ending.get(timeout=SIGNAL_SECONDS)
    server.stop(STOP_SECONDS)
    log.info("Ending with code %d", code)
    return code


def leave(code: int) -> None:
    """End the process at once, whatever its threads do: native code that computes can't be interrupted."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def arguments(description: str, port: int, model: str) -> argparse.ArgumentParser:
    """Return the parser of the arguments that both servers take, and set up logging to stderr."""
    # The libraries' warnings only: on INFO, the client of the hub logs signed addresses.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", type=_loopback_host, help="a loopback address (127.0.0.1)")
    parser.add_argument("--port", default=port, type=int, help=f"the port to listen on ({port})")
    parser.add_argument("--model", default=model, help=f"a name on the Hugging Face hub, or a folder ({model})")
    return parser


def _loopback_host(host: str) -> str:
    if not is_loopback(f"[{host}]" if ":" in host else host):
        raise argparse.ArgumentTypeError(
            "must be a loopback address: there are no keys here that would keep others out"
        )
    return host
