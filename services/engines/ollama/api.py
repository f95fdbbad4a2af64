"""Ollama's HTTP API, as far as the adapter needs it. Shapes as recorded from 0.24.0; figures are bytes and seconds.

No call here decides anything: what the answers mean for a model's life is in `instance.py`.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import requests

from services.engines.port import EngineError
from services.http import control_session

ASK_SECONDS = 5.0
LOOK_SECONDS = 2.0
FOR_EVER = -1
"""`keep_alive` as a number: the string "-1" is an error (seen with 0.24.0)."""
RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "low_vram")
"""Options for which Ollama starts a runner anew when a request comes with other values (0.24; older ones the last two).
"""
HASH_LENGTH = 12
_OPENED = re.compile(r"(?:FROM|ADAPTER) (.*[/\\]sha256-[0-9a-f]{64})\s*")
FAR_AWAY_YEARS = 100
"""A model that is kept for ever expires about the year 2319."""


class OllamaError(EngineError):
    """Ollama refused. `status` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class OllamaUnreachable(EngineError):
    """No Ollama answers at the address. `refused`: nobody listens there, so nothing of it can be running."""

    def __init__(self, message: str, *, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True, slots=True)
class Installed:
    """A model on Ollama's disk (`/api/tags`)."""

    name: str
    digest: str
    size_bytes: int
    about: str


@dataclass(frozen=True, slots=True)
class Running:
    """A model in Ollama's memory (`/api/ps`). `vram_bytes` below `size_bytes` means that a part is on the CPU.

    `expires_at` is a Unix time, None for a model that is kept for ever.
    """

    name: str
    size_bytes: int
    vram_bytes: int
    context_length: int | None
    expires_at: float | None
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Shown:
    """What `/api/show` adds: the files that a runner opens, as Ollama sees them, weights first, then what is laid over
    them (projectors, adapters); the context it was trained for; and the runner options that its Modelfile sets.
    """

    blobs: tuple[str, ...] = ()
    context_length: int | None = None
    runner_options: Mapping[str, str] = field(default_factory=dict)

    @property
    def blob(self) -> str | None:
        """The file of the weights."""
        return self.blobs[0] if self.blobs else None

    def held_as(self, options: Mapping[str, object] | None = None) -> str | None:
        """What of it lies in memory once it is loaded with `options` besides: files and runner options, shortly.

        None when nobody knows the files.
        """
        if not self.blobs:
            return None
        files = [blob.rpartition("sha256-")[2][:HASH_LENGTH] for blob in self.blobs]
        merged = {**self.runner_options, **(options or {})}
        return " ".join([*files, *(f"{name}={value}" for name, value in sorted(merged.items()))])


class OllamaApi:
    """One server. Raises OllamaUnreachable and OllamaError from every method."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self._http = control_session()

    def installed(self, timeout: float = ASK_SECONDS) -> list[Installed]:
        """What is on its disk; stubs of models that run in a cloud are none of this machine's."""
        found = self._get("/api/tags", timeout).get("models") or []
        return [_installed(entry) for entry in found if not entry.get("remote_host")]

    def running(self) -> list[Running]:
        """What is loaded. A model that is being loaded is absent, one just unloaded may stay for 50 ms."""
        return [_running(entry) for entry in self._get("/api/ps", LOOK_SECONDS).get("models") or []]

    def show(self, name: str) -> Shown:
        document = self._post("/api/show", {"model": name})
        lengths = [v for k, v in (document.get("model_info") or {}).items() if k.endswith(".context_length")]
        trained = lengths[0] if lengths and isinstance(lengths[0], int) else None
        return Shown(
            _opened_files(str(document.get("modelfile", ""))),
            trained,
            _runner_options(str(document.get("parameters") or "")),
        )

    def unload(self, name: str) -> None:
        """Ask for an unload. The answer comes at once, the memory is free a little later."""
        self._post("/api/generate", {"model": name, "keep_alive": 0, "stream": False})

    def delete(self, name: str) -> None:
        """Remove a model's files. Does not unload it first."""
        self._ask("DELETE", "/api/delete", {"model": name}, ASK_SECONDS)

    def derive(self, name: str, source: str, context_length: int) -> None:
        """Make `name`: the same weights as `source`, with a context of its own. Takes no disk space."""
        body = {"model": name, "from": source, "parameters": {"num_ctx": context_length}, "stream": False}
        self._post("/api/create", body, 60.0)

    def close(self) -> None:
        self._http.close()

    def _get(self, path: str, timeout: float = ASK_SECONDS) -> dict[str, Any]:
        return self._ask("GET", path, None, timeout)

    def _post(self, path: str, body: Mapping[str, object], timeout: float = ASK_SECONDS) -> dict[str, Any]:
        return self._ask("POST", path, body, timeout)

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None, timeout: float) -> dict[str, Any]:
        try:
            answer = self._http.request(method, self.base_url + path, json=body, timeout=timeout)
        except requests.ConnectionError as error:
            raise unreachable(self.base_url, refused="refused" in str(error)) from None
        except requests.RequestException:
            raise unreachable(self.base_url, refused=False) from None
        return understand(answer.status_code, answer.content)


class LongRequest:
    """One POST that may take minutes, such as a load. `abort` from any thread drops it, which Ollama notices."""

    def __init__(self, base_url: str, path: str, body: Mapping[str, object], timeout: float) -> None:
        parts = urlsplit(base_url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=timeout)
        self._base_url = base_url
        self._path = path
        self._body = json.dumps(body)
        self._lock = threading.Lock()
        self._aborted = False

    def answer(self) -> dict[str, Any]:
        """Send it and block until the whole answer is here.

        Raises OllamaUnreachable, also when it was aborted, and OllamaError.
        """
        try:
            self._connect()
            self._connection.request("POST", self._path, self._body, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            return understand(answer.status, answer.read())
        except ConnectionRefusedError:
            raise unreachable(self._base_url, refused=True) from None
        except (OSError, HTTPException) as error:
            raise OllamaUnreachable(f"Ollama broke off: {error or type(error).__name__}.", refused=False) from None
        finally:
            self._connection.close()

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            if self._connection.sock is not None:
                with suppress(OSError):
                    self._connection.sock.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> None:
        self._connection.connect()
        with self._lock:
            if self._aborted:
                raise ConnectionAbortedError("it was called off")


def unreachable(base_url: str, *, refused: bool) -> OllamaUnreachable:
    if refused:
        words = f"Ollama is not running at {base_url}. Start it on the Models page, or with `ollama serve`."
    else:
        words = f"Ollama at {base_url} does not answer. Look at its log, or start it again."
    return OllamaUnreachable(words, refused=refused)


def understand(status: int, content: bytes) -> dict[str, Any]:
    """A whole answer's document. Raises OllamaError with Ollama's own words when it is an error."""
    document: Any = None
    with suppress(ValueError):
        document = json.loads(content) if content.strip() else {}
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, dict):  # under /v1
        error = error.get("message")
    if status >= 400 or error:
        raise OllamaError(str(error or content[:300].decode("utf-8", "replace") or f"HTTP status {status}"), status)
    if not isinstance(document, dict):
        raise OllamaError(f"an answer that can't be read: {content[:100]!r}", status)
    return document


def _installed(entry: Mapping[str, Any]) -> Installed:
    details = entry.get("details") or {}
    words = [details.get("parameter_size"), details.get("quantization_level")]
    about = " ".join(str(word) for word in words if word and word != "unknown")
    return Installed(str(entry["name"]), str(entry.get("digest", "")), int(entry.get("size") or 0), about)


def _running(entry: Mapping[str, Any]) -> Running:
    context = entry.get("context_length")
    return Running(
        name=str(entry.get("name") or entry.get("model")),
        size_bytes=int(entry.get("size") or 0),
        vram_bytes=int(entry.get("size_vram") or 0),
        context_length=int(context) if context else None,
        expires_at=_unix(str(entry.get("expires_at", ""))),
        digest=str(entry.get("digest", "")),
    )


def _opened_files(modelfile: str) -> tuple[str, ...]:
    """The files that a Modelfile names, which come before all that its author wrote (TEMPLATE, SYSTEM, …)."""
    found = []
    for line in modelfile.splitlines():
        opened = _OPENED.fullmatch(line)
        if opened is not None:
            found.append(opened[1])
        elif line.strip() and not line.startswith(("#", "FROM ", "ADAPTER ")):
            break
    return tuple(found)


def _runner_options(parameters: str) -> dict[str, str]:
    """Of `num_ctx    4096` lines, those that make a runner; numbers in one spelling (`1e+06`, `1000000`)."""
    found = {}
    for line in parameters.splitlines():
        name, _, value = line.strip().partition(" ")
        if name in RUNNER_OPTIONS:
            found[name] = _spelled(value.strip())
    return found


def _spelled(value: str) -> str:
    try:
        return f"{float(value):.0f}"
    except (ValueError, OverflowError):
        return value


def _unix(moment: str) -> float | None:
    """RFC 3339 with nanoseconds (`2026-11-21T03:31:24.992507865Z`) as Unix time; None when it is for ever."""
    try:
        at = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", moment)).astimezone(UTC)
    except ValueError:
        return None
    return None if at.year - datetime.now(UTC).year > FAR_AWAY_YEARS else at.timestamp()
