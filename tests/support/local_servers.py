"""Starts the image and vision servers, the fakes or the real ones, and talks to them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests

from tests.support.console import free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "services" / "local_servers"
FAKE = ROOT / "tests" / "fakes" / "local_servers"
READY_SECONDS = 120.0


class LocalServer:
    """A server process on a free port, which ends with the `with` block. `environment` is added to a clean one."""

    def __init__(
        self,
        script: Path,
        log: Path,
        *arguments: str,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("FAKE_", "HF_", "VISION_"))}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [python, str(script), "--port", str(self.port), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**clean, **(environment or {})},
            )

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_listening(self) -> LocalServer:
        wait_until(self._listens, "the server to listen", READY_SECONDS)
        return self

    def wait_ready(self) -> LocalServer:
        self.wait_listening()
        wait_until(lambda: self.health()["status"] != "loading", "the model to load", READY_SECONDS)
        assert self.health()["status"] == "ready", self.log
        return self

    def health(self) -> dict[str, Any]:
        response = requests.get(f"{self.url}/health", timeout=30)
        assert response.status_code == 200
        health: dict[str, Any] = response.json()
        return health

    def queue(self) -> tuple[int, int]:
        """Return how many requests run and how many wait."""
        queue = self.health()["queue"]
        return queue["running"], queue["waiting"]

    def wait_queue(self, running: int, waiting: int) -> None:
        wait_until(lambda: self.queue() == (running, waiting), f"{running} running and {waiting} waiting requests")

    def post(self, path: str, body: object, headers: Mapping[str, str] | None = None) -> requests.Response:
        return requests.post(self.url + path, json=body, headers=dict(headers or {}), timeout=READY_SECONDS)

    def begin(self, path: str, body: object, headers: Mapping[str, str] | None = None) -> http.client.HTTPConnection:
        """Send a request without waiting for the answer; the caller closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=READY_SECONDS)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **(headers or {})})
        return connection

    def terminate(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            self.health()
        except requests.ConnectionError:
            return False
        return True
