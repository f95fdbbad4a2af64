"""`ollama runner`: the process that holds one loaded model. It imports only built-in modules, to start at once."""

from __future__ import annotations

import _socket
import os
import sys
import time

STEPS = 20


def run(arguments: list[str]) -> None:
    """Allocate the memory in steps, report progress on stdout (`0.05` … `1.00`, then `ready`), and stay.

    The environment configures it: FAKE_OLLAMA_HOLD_MB (MB of 1,000,000 bytes) and FAKE_OLLAMA_LOAD_SECONDS (`never`
    stops after half of the memory).
    """
    port = int(arguments[arguments.index("--port") + 1])
    hold = float(os.environ.get("FAKE_OLLAMA_HOLD_MB", "0"))
    seconds = os.environ.get("FAKE_OLLAMA_LOAD_SECONDS", "0")
    listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", port))
    listener.listen(8)
    ballast = []
    for step in range(1, STEPS + 1):
        # Not zeros, so that the pages are really allocated.
        ballast.append(b"\x01" * int(hold * 1e6 / STEPS))
        report(f"{step / STEPS:.2f}")
        if seconds == "never" and step == STEPS // 2:
            stay()
        time.sleep(0 if seconds == "never" else float(seconds) / STEPS)
    report("ready")
    stay()


def report(word: str) -> None:
    try:
        sys.stdout.write(word + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The server was killed; like the real runner, this one keeps its memory. The rest of the buffer must not
        # raise again when the process exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def stay() -> None:
    while True:
        time.sleep(3600)
