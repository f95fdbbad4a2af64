"""A console on a machine whose GPU driver hangs: everything else goes on."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.console import ROOT, Console, wait_until

MINI = "switchyard-mini"


def test_a_driver_that_hangs_delays_nobody(start_console: Callable[..., Console], tmp_path: Path) -> None:
    """The last figures stand, models are switched to and answer, the driver is heard again, and the app can stop."""
    lock = tmp_path / "hang"
    environment = {"PYTHONPATH": str(ROOT / "tests" / "fakes" / "gpu"), "STAND_IN_GPU_HANG": str(lock)}
    console = start_console(environment=environment, standby="false")
    gpu = gpu_of(console)
    with hanging(lock):
        wait_until(lambda: "driver hangs" in console.said(), "the hang to be noticed")
        waits = [seconds(lambda: gpu_of(console) == gpu) for _ in range(20)]
        assert max(waits) < 1.0, "nobody waits for the driver"
        console.switch(MINI)
        assert console.ask("Hello").status_code == 200
    wait_until(lambda: "answers again" in console.said(), "the driver to be heard again")
    with hanging(lock):
        wait_until(lambda: console.said().count("driver hangs") == 2, "it to hang again")
        assert console.stop() == 0


@contextmanager
def hanging(lock: Path) -> Iterator[None]:
    """Keeps whoever calls the stand-in driver waiting in the kernel."""
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def gpu_of(console: Console) -> dict[str, Any]:
    """The GPU in the status."""
    return next(device for device in console.status()["gpu"]["devices"] if device["kind"] == "gpu")


def seconds(check: Callable[[], bool]) -> float:
    """How long a check takes that has to hold."""
    began = time.monotonic()
    assert check()
    return time.monotonic() - began
