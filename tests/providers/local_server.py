"""Starts a fake of a local server for the tests of its adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import requests

from tests.support.console import ROOT, free_port, wait_until

FOLDER = ROOT / "tests" / "fakes" / "local_servers"


@dataclass
class LocalServer:
    """A running fake: its address, and what it is doing."""

    url: str
    process: subprocess.Popen[bytes]

    def health(self) -> dict:
        return requests.get(f"{self.url}/health", timeout=10).json()

    @property
    def at_work(self) -> int:
        queue = self.health()["queue"]
        return queue["running"] + queue["waiting"]

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "the fake has ended"
        try:
            return self.health()["status"] == "ready"
        except requests.ConnectionError:
            return False


@contextmanager
def local_server(script: str, *faults: str) -> Iterator[LocalServer]:
    """Start `flux_service.py` or `vision_service.py` with faults (see `faults.py`), and wait until it is ready."""
    port = free_port()
    variable = f"FAKE_{script.partition('_')[0].upper()}_FAULT"
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / script), "--port", str(port)],
        env=os.environ | {variable: ",".join(faults)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = LocalServer(f"http://127.0.0.1:{port}", process)
    try:
        wait_until(server.is_ready, "the fake to be ready")
        yield server
    finally:
        process.kill()
        process.wait(10)
