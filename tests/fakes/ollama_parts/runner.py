"""`ollama runner`: the process that holds one loaded model. Kept to built-in modules, for it must start at once."""

from __future__ import annotations

import _socket
import os
import sys
import time

STEPS = 20


def run(arguments: list[str]) -> None:
    """Take the memory step by step, tell the progress on stdout (`0.05` … `1.00`, then `ready`), and stay.

    How much and how long comes in the environment: FAKE_OLLAMA_HOLD_MB (MB of 1,000,000 bytes) and
    FAKE_OLLAMA_LOAD_SECONDS (`never` takes half of the memory and goes no further).
    """
    port = int(arguments[arguments.index("--port") + 1])
    hold = float(os.environ.get("FAKE_OLLAMA_HOLD_MB", "0"))
    seconds = os.environ.get("FAKE_OLLAMA_LOAD_SECONDS", "0")
    listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", port))
    listener.listen(8)
    ballast = []
    for step in range(1, STEPS + 1):
        # A repeated byte other than zero is written, so the pages are really there.
        ballast.append(b"\x01" * int(hold * 1e6 / STEPS))
        say(f"{step / STEPS:.2f}")
        if seconds == "never" and step == STEPS // 2:
            stay()
        time.sleep(0 if seconds == "never" else float(seconds) / STEPS)
    say("ready")
    stay()


def say(word: str) -> None:
    try:
        sys.stdout.write(word + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The server was killed: the real runner, too, goes on holding its memory. What is left in the
        # buffer must not fail once more at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def stay() -> None:
    while True:
        time.sleep(3600)
