"""Signal handling that differs from gunicorn's: see docs/decisions/0016-signals.md.

The master imports this module before it installs its signal handlers, and so before it starts a worker.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

GONE_SECONDS = 0.2
"""How long a closed terminal may still seem present after SIGHUP: the kernel detaches it after the signal."""
LOOK_SECONDS = 0.02

_poll = select.poll  # the original: gevent replaces it with one that a signal handler can't call


def _is_there() -> bool:
    """Return whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


class Terminal:
    """The terminal that this process was started on, if any."""

    def __init__(self) -> None:
        self._had_one = _is_there()
        self._hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup

    def says(self, sleep: Callable[[float], object] = time.sleep) -> str:
        """Return what a SIGHUP means: `stop` if the terminal is gone, `nothing` under nohup, else `restart`."""
        if self._hangup_ignored:
            return "nothing"
        return "stop" if self._had_one and self._is_gone(sleep) else "restart"

    def _is_gone(self, sleep: Callable[[float], object]) -> bool:
        deadline = time.monotonic() + GONE_SECONDS
        while _is_there():
            if time.monotonic() > deadline:
                return False
            sleep(LOOK_SECONDS)
        return True


terminal = Terminal()


def arrange(server: Any) -> None:
    """Replace the SIGHUP handler of gunicorn's master (an Arbiter), and refuse signals that would add a worker."""

    def hang_up() -> None:
        match terminal.says():
            case "stop":
                drop_dead_streams()
                server.handle_term()
            case "restart":
                server.kill_workers(signal.SIGHUP)  # the worker decides when it restarts

    def refuse(name: str) -> Callable[[], None]:
        return lambda: server.log.warning(
            "%s is refused: Switchyard has one worker, and one master. SIGHUP restarts it with its models loaded.", name
        )

    server.handle_hup = hang_up
    for name in ("TTIN", "TTOU", "USR2"):
        setattr(server, f"handle_{name.lower()}", refuse(f"SIG{name}"))


def drop_dead_streams() -> None:
    """Redirect standard streams without a reader to /dev/null, so that a log line can't break an orderly stop."""
    poll = _poll()
    for stream in (0, 1, 2):
        poll.register(stream, 0)
    dead = [stream for stream, event in poll.poll(0) if event & (select.POLLHUP | select.POLLERR)]
    if not dead:
        return
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in dead:
            os.dup2(nowhere, stream)
        os.close(nowhere)
