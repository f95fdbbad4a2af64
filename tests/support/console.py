"""A real Switchyard for tests: gunicorn with its gevent worker in a process of its own, used over HTTP."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import requests

from services.config import UNPREFIXED
from services.engines.processes import MARK_VARIABLE
from services.store.repository import open_store

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODELS = ROOT / "models"
FAKE_LLAMA_SERVER = ROOT / "tests" / "fakes" / "llama_server.py"
TIMEOUT = 60.0
"""Seconds. It only ends a hang: no test passes because of it, so a busy machine may take its time."""
PORTS = random.SystemRandom()
PRODUCTION = ROOT / "tests" / "support" / "production"
NO_OLLAMA = "http://127.0.0.1:9"
"""The discard port, where nothing listens: a test uses only the Ollama that it starts itself, never this machine's."""
NO_SERVER = NO_OLLAMA
"""Likewise for the Flux and vision services."""
NO_PROGRAMS = "/no/local/servers"
"""A folder without the programs of these services: no test starts one, or installs PyTorch for it, by chance."""
NOTHING_LOCAL = {
    "ollama_base_url": NO_OLLAMA,
    "flux_api_url": NO_SERVER,
    "local_vision_api_url": NO_SERVER,
    "local_servers_dir": NO_PROGRAMS,
}
"""Settings of an app that finds no server on this machine."""


def is_a_setting(variable: str) -> bool:
    """Whether a variable of this machine's environment would change what a console does."""
    return variable in UNPREFIXED or variable.startswith(("SWITCHYARD_", "OLLAMA_", "HF_", "DOCKER_"))


class Console:
    """One running Switchyard.

    `settings` become environment variables, `toml` its settings file; `environment` is added as it is. `descriptors`
    is the number of files and sockets that each of its processes may have open, as set by `ulimit -n`. A package that
    only tests install, and that a library would import, is hidden from it (`tests/support/production`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        models_dir: Path = DEMO_MODELS,
        toml: str = "",
        descriptors: int | None = None,
        environment: dict[str, str] | None = None,
        **settings: object,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = requests.Session()
        self.http.trust_env = False
        config = folder / "switchyard.toml"
        config.write_text(toml, encoding="utf-8")
        self.environment = {
            "SWITCHYARD_CONFIG": str(config),
            "SWITCHYARD_PORT": str(self.port),
            "SWITCHYARD_STATE_DIR": str(folder / "state"),
            "SWITCHYARD_MODELS_DIR": str(models_dir),
            "SWITCHYARD_OLLAMA_BASE_URL": NO_OLLAMA,
            "SWITCHYARD_FLUX_API_URL": NO_SERVER,
            "SWITCHYARD_LOCAL_VISION_API_URL": NO_SERVER,
            "SWITCHYARD_LOCAL_SERVERS_DIR": NO_PROGRAMS,
            **(environment or {}),
            **{f"SWITCHYARD_{name.upper()}": str(value) for name, value in settings.items()},
        }
        path = self.environment.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PRODUCTION), path)))
        self.log = folder / "console.log"
        self._limits = [] if descriptors is None else ["prlimit", f"--nofile={descriptors}:{descriptors}"]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def state(self) -> Path:
        return Path(self.environment["SWITCHYARD_STATE_DIR"])

    def start(self) -> Console:
        """Start it and wait until it answers; also on the state of an earlier run. Fails with its log."""
        put_empty_database(self.state)
        self.launch()
        wait_until(self._answers, f"the console to answer (it writes to {self.log})")
        return self

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process without waiting for anything."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._limits, sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py"],
                cwd=ROOT,
                env={k: v for k, v in os.environ.items() if not is_a_setting(k)} | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.process

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal to the gunicorn master, wait for its end and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT)

    def kill(self) -> None:
        """SIGKILL master and worker only: what a crash of the app leaves behind stays."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(TIMEOUT)

    def reset(self) -> Console:
        """Reset it to rest: nothing under way, nothing loaded, nothing to report. Starts it again if it has ended.

        What it has learned, logged and stored stays: a test that must not see that starts a console of its own.
        """
        if self.process is None or self.process.poll() is not None:
            self.start()
        self.delete("/v1/preferences")
        self.delete("/v1/models/switch")
        for model_id, state in self.states().items():
            if state != "stopped":
                self.post(f"/v1/models/{model_id}/stop")
        self.wait_for(lambda s: s["switch"] is None and s["active_model"] is None, "the console to come to rest")
        self.post("/models/dismiss")
        return self

    def cancel_downloads(self) -> None:
        """Empty the list of downloads, whatever their state; files of finished ones stay."""
        downloads = "/api/providers/models/downloads"

        def none_left() -> bool:
            left = self.get(downloads).json()["downloads"]
            for download in left:
                self.delete(f"{downloads}/{download['id']}")  # cancels it, then removes it from the list
            return not left

        wait_until(none_left, "the downloads to be cancelled")

    def close(self) -> None:
        """End it and everything it started, at once: an orderly stop takes over a second, and has tests of its own."""
        if self.process is None:
            return
        left = self._recorded()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGSTOP)  # so that it starts nothing while its children are listed
            left += self.children()
            self.kill()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.http.close()

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def children(self) -> list[psutil.Process]:
        """All processes below it: the worker, and the engines it started."""
        assert self.process is not None
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _recorded(self) -> list[psutil.Process]:
        """All processes that it has recorded and that still run, including those of earlier runs of the app."""
        found = []
        for path in (self.state / "processes").glob("*.json"):
            with suppress(psutil.Error, OSError):
                process = psutil.Process(int(path.stem))
                if MARK_VARIABLE in process.environ():  # else the pid belongs to another program by now
                    found.append(process)
        return found

    def engines(self) -> list[psutil.Process]:
        """The engine processes that hold a model (the standby process holds none and isn't recorded)."""
        recorded = (self.state / "processes").glob("*.json")
        return [psutil.Process(int(path.stem)) for path in recorded if psutil.pid_exists(int(path.stem))]

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.http.get(self.url + path, timeout=TIMEOUT, **options)

    def post(self, path: str, body: object = None, **options: Any) -> requests.Response:
        if body is not None:
            options["json"] = body
        return self.http.post(self.url + path, timeout=TIMEOUT, **options)

    def put(self, path: str, body: object) -> requests.Response:
        return self.http.put(self.url + path, json=body, timeout=TIMEOUT)

    def delete(self, path: str) -> requests.Response:
        return self.http.delete(self.url + path, timeout=TIMEOUT)

    def status(self) -> dict[str, Any]:
        answer = self.get("/v1/models/status")
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def model(self, model_id: str) -> dict[str, Any]:
        document: dict[str, Any] = self.status()["models"][model_id]
        return document

    def states(self) -> dict[str, str]:
        return {model_id: model["status"] for model_id, model in self.status()["models"].items()}

    def switch(self, model_id: str, **options: object) -> dict[str, Any]:
        """Switch to a model and wait until it is ready."""
        answer = self.post("/v1/models/switch", {"target_model": model_id, "wait": True, **options})
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def switch_stream(self, model_id: str, **options: object) -> Iterator[tuple[str, dict[str, Any]]]:
        """Switch, and yield the stream's events as (name, data)."""
        with closing(
            self.post(
                "/v1/models/switch",
                {"target_model": model_id, **options},
                headers={"Accept": "text/event-stream"},
                stream=True,
            )
        ) as answer:
            assert answer.status_code == 200, answer.text
            yield from events(answer)

    def ask(self, text: str, **body: object) -> requests.Response:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"messages": messages, "temperature": 0, **body})

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Poll the status until it meets `condition`; return that status."""
        seen: dict[str, Any] = {}

        def met() -> bool:
            seen.clear()
            seen.update(self.status())
            return condition(seen)

        wait_until(met, what)
        return seen

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the console ended with {self.process.returncode}: {self.output()}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)):
                return False
        with suppress(requests.ConnectionError):
            return self.get("/readyz").status_code == 200
        return False


def put_empty_database(state_dir: Path) -> None:
    """Give a state folder without a database an empty one: creating the tables takes a third of a start."""
    database = state_dir / "switchyard.db"
    if not database.exists():
        state_dir.mkdir(parents=True, exist_ok=True)
        database.write_bytes(_empty_database())


@functools.cache
def _empty_database() -> bytes:
    """The database as the app itself creates it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "switchyard.db"
        open_store(path).close()
        return path.read_bytes()


def events(answer: requests.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The named events of an SSE response, with parsed data."""
    name = ""
    for line in answer.iter_lines(decode_unicode=True):
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def wait_until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
    """Poll until `condition` holds; fail the test, naming `what`, after `timeout` seconds.

    Polls every 10 ms at first, then less often: asking a console a hundred times a second kept half a processor busy.
    """
    deadline = time.monotonic() + timeout
    pause = 0.01
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what}"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.1)


def free_port() -> int:
    """A free port on loopback that no other test run takes meanwhile, except by an unlikely coincidence.

    It is below the kernel's ephemeral ports (from 32768), one of which could become the local end of a connection
    before a program listens on it; and it is random, since the workers of one run ask at the same moment.
    """
    while True:
        port = PORTS.randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def fake_model(model_id: str, *faults: str, source: str = "switchyard-mini.gguf", **fields: object) -> str:
    """A `[[models]]` table for a model of the fake llama-server, with its faults."""
    arguments = [part for fault in faults for part in ("--fault", fault)]
    lines = [f'id = "{model_id}"', f'source = "{source}"', *(f"{key} = {json.dumps(v)}" for key, v in fields.items())]
    return "\n".join(["[[models]]", *lines, "[models.options]", f"arguments = {json.dumps(arguments)}", ""])
