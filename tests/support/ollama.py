"""The fake Ollama as tests use it: a server with configurable models and faults, and a fake registry.

One JSON file (named by FAKE_OLLAMA) configures the fake, which reads it again for each request:

    models          installed at the first start: {"tiny-a:latest": OPTIONS}
    registry        what can be pulled: {"llama3.2:latest": OPTIONS}
    registry_url    where to fetch manifests instead, for example a FakeRegistry's `url`
    bytes_per_second  speed of a pull (default 40,000,000)
    blob_seconds    time per new blob besides its transfer (default 0.05; the real one takes about 1)
    requests_log    a file to which each request is written as a JSON line
    faults          see below

OPTIONS of a model, all optional:

    size            bytes, as /api/tags reports them                    7411936
    hold_mb         MB (of 1,000,000 bytes) that its process holds      20
    load_seconds    how long a load takes                               0.05
    loaded_size     bytes, as /api/ps reports them                      1.35 times size
    context_length  trained context; a longer one is reduced to it      1024
    vram_share      the share of it reported to be on a GPU             0
    version         another number makes other weights: an update       1
    family, parameter_size, quantization_level, answer, thinking
    cloud, embedding_only, broken   true for a model of that kind

Faults (seconds, percent of the weights, or true):

    slow_load: s, stuck_load, crash_at_load, max_loaded: n, unload_after: s, evict_after: s
    never_unload, refuse_unload: text
    pull_slow: bytes/s, pull_stuck_at: %, pull_error_at: {"percent": %, "error": text}, disk_full_at: %,
    pull_kill_server_at: %, digest_mismatch, registry_down
    port_in_use, crash_on_start: text, ignore_sigterm, slow_ps: s, hang
    slow_tokens: s, stream_error_at: number of the token (0 is the first)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.fakes.ollama_parts.library import Layer, Manifest, Name, Package, package
from tests.fakes.ollama_parts.settings import ModelOptions
from tests.support.console import ROOT, free_port, wait_until

BINARY = ROOT / "tests" / "fakes" / "ollama.py"
TINY_A = {
    "size": 7_411_936,
    "loaded_size": 10_494_976,
    "parameter_size": "3.67M",
    "hold_mb": 20,
}
"""The smaller of the two models that the recordings were made with."""
TINY_B = {"size": 46_236_961, "loaded_size": 60_852_224, "parameter_size": "23.08M", "hold_mb": 40}
TIMEOUT = 30.0


class FakeOllama:
    """One Ollama with a folder of its own. After `start` it runs as a server that another program started;
    with `environment` and `binary` a console can start it itself."""

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, Mapping[str, Any]] | None = None,
        registry: Mapping[str, Mapping[str, Any]] | None = None,
        port: int | None = None,
        **faults: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.binary = str(BINARY)
        self.log = folder / "serve.log"
        self.models_folder = folder / "models"
        self._settings = folder / "ollama.json"
        self._requests = folder / "requests.jsonl"
        self.environment = {
            "FAKE_OLLAMA": str(self._settings),
            "OLLAMA_HOST": f"127.0.0.1:{self.port}",
            "OLLAMA_MODELS": str(self.models_folder),
        }
        self.http = requests.Session()
        self.http.trust_env = False
        self.process: subprocess.Popen[bytes] | None = None
        self._document: dict[str, Any] = {
            "models": dict(models or {}),
            "registry": dict(registry or {}),
            "requests_log": str(self._requests),
            "faults": dict(faults),
        }
        self._installed: dict[str, str] = {}
        self._pristine = json.dumps(self._document)
        self._write()

    def __enter__(self) -> FakeOllama:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, **environment: str) -> FakeOllama:
        """Start `ollama serve` and wait until it answers; `environment` adds to its environment.

        Fails with its output if it ends instead.
        """
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, "serve"],
                env=_without_ollama() | self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._listens, "the fake Ollama to listen")
        if not self._installed and not self._document["faults"]:
            self._installed = self._digests()
        return self

    def reset(self) -> FakeOllama:
        """Reset it for the next test: no fault, the original models, nothing loaded, logged or requested.

        Starts it again if it was ended.
        """
        self._document = json.loads(self._pristine)
        self._write()
        if self.process is None or self.process.poll() is not None:
            self._restart()
        for name in set(self.tags()) - set(self._installed):
            self.http.delete(f"{self.url}/api/delete", json={"model": name}, timeout=TIMEOUT).raise_for_status()
        for name in self.ps():
            self.unload(name)
        for path in (self.models_folder / "blobs").glob("*-partial*"):
            path.unlink(missing_ok=True)
        if self._digests() != self._installed:  # one was deleted, or updated
            shutil.rmtree(self.models_folder)
            self._restart()
        os.truncate(self.log, 0)
        self._requests.unlink(missing_ok=True)
        return self

    def end(self) -> None:
        """SIGKILL all processes with this instance's settings, whoever started them; it can be started again."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process is not None:
            self.process.wait(TIMEOUT)
        # Not a wait for the end of each: an orphan may stay a zombie until it is reaped.
        wait_until(lambda: not self.processes(), "the fake Ollama's processes to end")

    def stop(self) -> int:
        """SIGTERM the server that `start` started; return its exit code."""
        return self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL the server alone: its runners survive, as with the real one."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """End all processes with this instance's settings, whoever started them."""
        self.end()
        self.http.close()

    def processes(self) -> list[psutil.Process]:
        """The running servers, runners and pulls with this instance's settings."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def servers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "serve" in command_line(process)]

    def runners(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "runner" in command_line(process)]

    def pulls(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "pull" in command_line(process)]

    def output(self) -> str:
        """The stderr of the server that `start` started."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def set_fault(self, name: str, value: Any = True) -> None:
        """Set a fault; it applies from the server's next action on."""
        self._document["faults"][name] = value
        self._write()

    def clear_faults(self) -> None:
        self._document["faults"] = {}
        self._write()

    def configure(self, **keys: Any) -> None:
        """Set other keys of the configuration: `bytes_per_second`, `registry`, `registry_url`, …"""
        self._document.update(keys)
        self._write()

    def ps(self) -> list[str]:
        """The names of the loaded models."""
        return [model["name"] for model in self._get("/api/ps")["models"]]

    def tags(self) -> list[str]:
        """The names of the installed models."""
        return [model["name"] for model in self._get("/api/tags")["models"]]

    def load(self, name: str, keep_alive: object = None) -> None:
        """Load a model as another program would, and wait until it is loaded."""
        asked = {"model": name} | ({} if keep_alive is None else {"keep_alive": keep_alive})
        self._post("/api/generate", asked)

    def unload(self, name: str) -> None:
        """Unload a model and wait until it is gone."""
        self._post("/api/generate", {"model": name, "keep_alive": 0})
        wait_until(lambda: Name.parse(name).short not in self.ps(), f"{name} to be unloaded")

    def requests(self, path: str | None = None) -> list[dict[str, Any]]:
        """All requests to the server, oldest first, as method, path and body; only those to `path` if given."""
        lines = self._requests.read_text(encoding="utf-8").splitlines() if self._requests.exists() else []
        seen = [json.loads(line) for line in lines]
        return [request for request in seen if path is None or request["path"] == path]

    def pulled_bytes(self, name: str) -> int:
        """Bytes of a model of `registry` on disk, complete or not (updated when a part or a pull ends)."""
        short = Name.parse(name).short
        manifest = package(short, ModelOptions.of(self._document["registry"][short])).manifest
        return sum(self._bytes_of(layer) for layer in manifest.all_layers)

    def _bytes_of(self, layer: Layer) -> int:
        blobs = self.models_folder / "blobs"
        if (blobs / layer.file_name).exists():
            return layer.size
        parts = blobs.glob(f"{layer.file_name}-partial-*")
        return sum(json.loads(part.read_text())["Completed"] for part in parts)

    def _listens(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the fake Ollama ended with {self.process.returncode}: {self.output()}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)):
                return False
        return "Listening on" in self.output()

    def _restart(self) -> None:
        self.end()
        self.start()

    def _digests(self) -> dict[str, str]:
        return {model["name"]: model["digest"] for model in self._get("/api/tags")["models"]}

    def _signal(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("FAKE_OLLAMA") == self.environment["FAKE_OLLAMA"] and any(
                str(BINARY) == word for word in process.cmdline()
            )
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False

    def _get(self, path: str) -> dict[str, Any]:
        answer = self.http.get(self.url + path, timeout=TIMEOUT)
        answer.raise_for_status()
        return answer.json()

    def _post(self, path: str, body: dict[str, Any]) -> None:
        self.http.post(self.url + path, json=body, timeout=TIMEOUT).raise_for_status()

    def _write(self) -> None:
        # Replaced atomically: the server may read it at any moment.
        fresh = self._settings.with_suffix(".new")
        fresh.write_text(json.dumps(self._document), encoding="utf-8")
        fresh.replace(self._settings)


class FakeRegistry:
    """A registry on loopback, in a thread: manifests (JSON of schema version 2) and the small blobs they name.

    `models` are named like `library/tiny-b:latest`, or `tiny-b:latest` for the same; OPTIONS as for the fake Ollama.
    """

    def __init__(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        self._models: dict[str, Package] = {}
        self.seen: list[str] = []
        """The requested paths, oldest first."""
        self._first = {name: dict(options) for name, options in models.items()}
        self.reset()
        self._server = _RegistryServer(("127.0.0.1", 0), _RegistryHandler)
        self._server.registry = self
        self.port = int(self._server.server_address[1])
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeRegistry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(self, name: str, **options: Any) -> Manifest:
        """Offer a model, or another version of one (`version=2`)."""
        parsed = Name.parse(name)
        self._models[parsed.manifest_path] = made = package(parsed.short, ModelOptions.of(options))
        return made.manifest

    def reset(self) -> None:
        """Offer the original models only."""
        self._models.clear()
        for name, options in self._first.items():
            self.publish(name, **options)
        self.seen.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str) -> bytes | None:
        """The content at a path; None if there is none."""
        self.seen.append(path)
        if path in self._models:
            return self._models[path].manifest.data()
        digest = path.rpartition("/blobs/")[2]
        return next((made.contents[digest] for made in self._models.values() if digest in made.contents), None)


class _RegistryServer(ThreadingHTTPServer):
    daemon_threads = True
    registry: FakeRegistry


class _RegistryHandler(BaseHTTPRequestHandler):
    server: _RegistryServer

    def do_GET(self) -> None:
        data = self.server.registry.answer(self.path)
        missing = b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}'
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Type", "application/vnd.docker.distribution.manifest.v2+json")
        self.send_header("Content-Length", str(len(missing if data is None else data)))
        self.end_headers()
        self.wfile.write(missing if data is None else data)

    def log_message(self, *_: object) -> None:
        """Log nothing: requests are recorded in `seen`."""


def command_line(process: psutil.Process) -> list[str]:
    """A process's command line; empty if it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _without_ollama() -> dict[str, str]:
    """This process's environment without variables that would redirect the fake."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OLLAMA_", "FAKE_OLLAMA"))}
