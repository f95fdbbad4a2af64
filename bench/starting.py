"""Time from starting the program to the first 200 of `/readyz`.

The state folder exists, as at every start but the first. `/readyz` is polled every 2 ms over a new connection each
time, so the figure is at most 2 ms too large.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

from bench import wire
from bench.figures import Row, spread
from bench.rig import ROOT, Rig, end
from tests.support.console import Console

STARTS = 5
LOOK_SECONDS = 0.002
LONGEST_SECONDS = 30.0
TARGET_SECONDS = 0.8


def measure(rig: Rig) -> Iterator[Row]:
    console = rig.console()
    if not rig.short:
        _start(console)  # creates the state folder, and the compiled modules of a fresh clone
    seconds = [_start(console) for _ in range(rig.times(STARTS))]
    yield Row(
        "start to serving",
        f"{spread(seconds, '.2f')} s, {len(seconds)} starts",
        f"< {TARGET_SECONDS} s",
        median(seconds) < TARGET_SECONDS,
        {"seconds": median(seconds)},
    )


def _start(console: Console) -> float:
    """Start, measure, stop."""
    argv = [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SWITCHYARD_")}
    environment |= console.environment
    with console.log.open("ab") as log:
        began = time.perf_counter()
        console.process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while not _ready(console.port):
            if console.process.poll() is not None or time.perf_counter() - began > LONGEST_SECONDS:
                raise RuntimeError(f"the console did not start: {console.output()[-800:]}")
            time.sleep(LOOK_SECONDS)
        return time.perf_counter() - began
    finally:
        end(console)


def _ready(port: int) -> bool:
    try:
        with wire.Wire(port) as connection:
            return connection.ask(wire.get("/readyz")).status == 200
    except (OSError, wire.WireError):
        return False
