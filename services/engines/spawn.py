"""Starts a program in a process group of its own, by `posix_spawn`.

`subprocess` under gevent forks in Python: copying the page tables of an 80 MB app took 8 of the 13 ms until an engine
ran. posix_spawn shares the memory until the program starts.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

OPEN_FILES = ("/proc/self/fd", "/dev/fd")
DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)
"""Python ignores these; programs expect the default action, as `subprocess` restores it."""


def spawn(argv: Sequence[str], environment: Mapping[str, str], stdin: int, stdout: int, stderr: int) -> int:
    """Start a program and return its pid. It leads a session, where the system can do that, else a process group.

    Its standard streams are the given descriptors; it inherits no others. Raises OSError.
    """
    actions: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate((stdin, stdout, stderr))
    ]
    actions += [(os.POSIX_SPAWN_CLOSE, descriptor) for descriptor in _inheritable()]
    try:
        return _spawn(argv, environment, actions, setsid=True)
    except NotImplementedError:  # macOS, and C libraries before glibc 2.26
        return _spawn(argv, environment, actions, setpgroup=0)


def exit_code(pid: int) -> int:
    """Wait for the end of a child; return its exit code in subprocess's convention."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _spawn(argv: Sequence[str], environment: Mapping[str, str], actions: Sequence[Any], **group: Any) -> int:
    return os.posix_spawnp(argv[0], list(argv), environment, file_actions=actions, setsigdef=DEFAULT_SIGNALS, **group)


def _inheritable() -> list[int]:
    """Return the descriptors beside the standard streams that a child would inherit: gunicorn's listening socket.

    A child that held it would keep the port taken after the app has ended.
    """
    found = []
    for folder in OPEN_FILES:
        with suppress(OSError):
            for name in os.listdir(folder):
                with suppress(OSError):  # the descriptor of the listing itself is closed by now
                    if int(name) > 2 and os.get_inheritable(int(name)):
                        found.append(int(name))
            return found
    return found
