"""Environment faults inside a console's process, and a count of its greenlets.

Python imports this module at start when its folder is on PYTHONPATH; `tests/support/faults.py` puts it there.
STANDING_FAULTS names a folder. While it holds a file `slow-models` (first line: seconds, second line: a folder), each
file operation in that folder blocks in the kernel for these seconds, as on a slow network disk, but no longer than the
file exists. A client that connects to the socket `PID` in it gets the number of greenlets of that process.
"""

from __future__ import annotations

import builtins
import gc
import io
import os
from _thread import start_new_thread  # imported before gevent patches these modules
from collections.abc import Callable
from socket import AF_UNIX, SOCK_STREAM
from socket import socket as Socket
from time import monotonic, sleep
from typing import Any

FOLDER = os.environ.get("STANDING_FAULTS")
_open = io.open


def _wait(path: object) -> None:
    began = monotonic()
    while isinstance(path, str | os.PathLike):
        try:
            with _open(f"{FOLDER}/slow-models", encoding="utf-8") as file:
                seconds, folder = file.read().splitlines()
        except (OSError, ValueError):
            return
        left = began + float(seconds) - monotonic()
        if not str(path).startswith(folder) or left <= 0:
            return
        sleep(min(left, 0.05))


def _slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
        _wait(path)
        return function(path, *arguments, **options)

    return call


def _serve_count() -> None:
    from greenlet import greenlet

    listener = Socket(AF_UNIX, SOCK_STREAM)
    listener.bind(f"{FOLDER}/{os.getpid()}")
    listener.listen()
    while True:
        client, _ = listener.accept()
        alive = sum(isinstance(found, greenlet) and not found.dead for found in gc.get_objects())
        client.sendall(str(alive).encode())
        client.close()


if FOLDER is not None:
    for name in ("stat", "lstat", "scandir", "listdir", "open", "unlink", "statvfs"):
        setattr(os, name, _slow(getattr(os, name)))
    io.open = builtins.open = _slow(_open)
    os.register_at_fork(after_in_child=lambda: start_new_thread(_serve_count, ()))  # gunicorn's worker is a fork
