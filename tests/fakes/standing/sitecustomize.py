"""Faults within a console's own process, and a look into it.

Python imports this first when its folder is on PYTHONPATH; `tests/support/faults.py` puts it there. STANDING_FAULTS
names a folder. While a file `slow-models` lies in it, whatever asks the file system about the folder that its second
line names waits for the seconds in its first, in the kernel, as on a network disk that is slow; at most until the file
is gone. Whoever connects to the socket `PID` in it is told how many greenlets that process has.
"""

from __future__ import annotations

import builtins
import gc
import io
import os
from _thread import start_new_thread  # these as they are before gevent puts its own in their place
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
    def ask(path: Any = ".", *arguments: Any, **options: Any) -> Any:
        _wait(path)
        return function(path, *arguments, **options)

    return ask


def _tell_of_greenlets() -> None:
    from greenlet import greenlet

    listener = Socket(AF_UNIX, SOCK_STREAM)
    listener.bind(f"{FOLDER}/{os.getpid()}")
    listener.listen()
    while True:
        asker, _ = listener.accept()
        alive = sum(isinstance(found, greenlet) and not found.dead for found in gc.get_objects())
        asker.sendall(str(alive).encode())
        asker.close()


if FOLDER is not None:
    for name in ("stat", "lstat", "scandir", "listdir", "open", "unlink", "statvfs"):
        setattr(os, name, _slow(getattr(os, name)))
    io.open = builtins.open = _slow(_open)
    os.register_at_fork(after_in_child=lambda: start_new_thread(_tell_of_greenlets, ()))  # gunicorn's worker is a fork
