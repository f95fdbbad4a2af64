"""Client of Ollama's HTTP API. Shapes as recorded from 0.24.0; sizes are bytes, times seconds.

It only translates; what the answers mean for a model's life cycle is decided in `instance.py`.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import structlog

from services.engines.port import EngineError
from services.http import ConnectionRefused, FetchError, HttpRequest

log = structlog.get_logger(__name__)

T = TypeVar("T")
ASK_SECONDS = 5.0
RUNNING_SECONDS = 2.0
FOR_EVER = -1
"""`keep_alive` as a number: the string "-1" is an error (seen with 0.24.0)."""
RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "low_vram")
"""Options for which Ollama restarts a runner when a request has other values (0.24; the last two in older versions)."""
HASH_LENGTH = 12
MAX_NAME_LENGTH = 500
MAX_LOGGED = 5
_OPENED = re.compile(r"(?:FROM|ADAPTER) (.*[/\\]sha256-[0-9a-f]{64})\s*")
FAR_AWAY_YEARS = 100
"""A model that is kept for ever expires about the year 2319."""


class OllamaError(EngineError):
    """Ollama refused a request. `status` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class OllamaUnreachable(EngineError):
    """No Ollama answers at the address. `refused`: the connection was refused, so none can be running there."""

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
    """A model in Ollama's memory (`/api/ps`). If `vram_bytes` is below `size_bytes`, the rest is on the CPU.

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
    """Result of `/api/show`.

    `blobs` are the files that a runner opens, as Ollama sees them: weights first, then projectors and adapters.
    `context_length` is what the model was trained for, `runner_options` are those set in its Modelfile.
    """

    blobs: tuple[str, ...] = ()
    context_length: int | None = None
    runner_options: Mapping[str, str] = field(default_factory=dict)

    @property
    def blob(self) -> str | None:
        """The file of the weights."""
        return self.blobs[0] if self.blobs else None

    def held_as(self, options: Mapping[str, object] | None = None) -> str | None:
        """Return a short key of what is in memory once it is loaded with `options`: files and runner options.

        None if the files are unknown.
        """
        if not self.blobs:
            return None
        files = [blob.rpartition("sha256-")[2][:HASH_LENGTH] for blob in self.blobs]
        merged = {**self.runner_options, **(options or {})}
        return " ".join([*files, *(f"{name}={value}" for name, value in sorted(merged.items()))])


class OllamaApi:
    """One server. Every method raises OllamaUnreachable and OllamaError."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self._odd: dict[str, list[str]] = {}

    def installed(self, timeout: float = ASK_SECONDS) -> list[Installed]:
        """List the models on its disk, without stubs of cloud models."""
        return self._entries("/api/tags", timeout, _installed)

    def running(self) -> list[Running]:
        """List the loaded models. One being loaded is absent, one just unloaded may stay for 50 ms."""
        return self._entries("/api/ps", RUNNING_SECONDS, _running)

    def show(self, name: str) -> Shown:
        document = self._post("/api/show", {"model": name})
        facts = document.get("model_info")
        lengths = [v for k, v in facts.items() if k.endswith(".context_length")] if isinstance(facts, dict) else []
        trained = lengths[0] if lengths and _is_count(lengths[0]) else None
        modelfile, parameters = document.get("modelfile"), document.get("parameters")
        return Shown(
            _opened_files(modelfile) if isinstance(modelfile, str) else (),
            trained,
            _runner_options(parameters) if isinstance(parameters, str) else {},
        )

    def unload(self, name: str) -> None:
        """Request an unload. Ollama answers at once and frees the memory a little later."""
        self._post("/api/generate", {"model": name, "keep_alive": 0, "stream": False})

    def delete(self, name: str) -> None:
        """Delete a model's files. Does not unload it."""
        self.answer(HttpRequest("DELETE", f"{self.base_url}/api/delete", timeout=ASK_SECONDS, body={"model": name}))

    def derive(self, name: str, source: str, context_length: int) -> None:
        """Create the model `name`: the weights of `source` with another context length. Takes no disk space."""
        body = {"model": name, "from": source, "parameters": {"num_ctx": context_length}, "stream": False}
        self._post("/api/create", body, 60.0)

    def request(self, path: str, body: Mapping[str, object], timeout: float) -> HttpRequest:
        """Return a POST for `answer` that may take minutes, such as a load. Ollama notices when it is cancelled."""
        return HttpRequest("POST", self.base_url + path, timeout=timeout, body=body)

    def answer(self, request: HttpRequest) -> dict[str, Any]:
        """Send a request and block until the whole response is here."""
        try:
            answer = request.reply()
        except FetchError as error:
            raise unreachable(self.base_url, error) from None
        return understand(answer.status, answer.content)

    def _entries(self, path: str, timeout: float, read: Callable[[Mapping[str, Any]], T | None]) -> list[T]:
        """List models, parsed by `read`; entries that it can't parse are left out.

        Lists are requested every second, so invalid entries are logged only when they change.
        """
        listed = self.answer(HttpRequest("GET", self.base_url + path, timeout=timeout)).get("models")
        if not isinstance(listed, list | None):
            raise OllamaError(f"an invalid list: {reprlib.repr(listed)}", 200)
        found: list[T] = []
        odd: list[str] = []
        for entry in listed or []:
            try:
                item = read(entry)
            except (ValueError, TypeError, AttributeError, KeyError):
                odd.append(reprlib.repr(entry))
            else:
                found += [] if item is None else [item]
        if odd and odd != self._odd.get(path):
            log.warning("Ollama lists invalid entries; they are left out", path=path, entries=odd[:MAX_LOGGED])
        self._odd[path] = odd
        return found

    def _post(self, path: str, body: Mapping[str, object], timeout: float = ASK_SECONDS) -> dict[str, Any]:
        return self.answer(self.request(path, body, timeout))


def unreachable(base_url: str, error: FetchError) -> OllamaUnreachable:
    """Convert a failed request: what it means, and what to do."""
    if isinstance(error, ConnectionRefused):
        words = f"Ollama is not running at {base_url}. Start it on the Models page, or with `ollama serve`."
        return OllamaUnreachable(words, refused=True)
    words = f"Ollama at {base_url} does not answer: {error}. Look at its log, or start it again."
    return OllamaUnreachable(words, refused=False)


def understand(status: int, content: bytes) -> dict[str, Any]:
    """Parse a complete response. Raises OllamaError with Ollama's message if it is an error."""
    document: Any = None
    with suppress(ValueError, RecursionError):
        document = json.loads(content) if content.strip() else {}
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, dict):  # under /v1
        error = error.get("message")
    if status >= 400 or error:
        raise OllamaError(str(error or content[:300].decode("utf-8", "replace") or f"HTTP status {status}"), status)
    if not isinstance(document, dict):
        raise OllamaError(f"an invalid response: {content[:100]!r}", status)
    return document


def _installed(entry: Mapping[str, Any]) -> Installed | None:
    """Parse an entry of `/api/tags`; None for a cloud stub. Raises ValueError, and others for wrong types."""
    if entry.get("remote_host"):
        return None
    details = entry.get("details")
    known = details if isinstance(details, dict) else {}
    words = [known.get("parameter_size"), known.get("quantization_level")]
    about = " ".join(word for word in words if isinstance(word, str) and word != "unknown")
    return Installed(_name(entry), _text(entry, "digest"), _count(entry, "size"), about)


def _running(entry: Mapping[str, Any]) -> Running:
    """Parse an entry of `/api/ps`. Raises ValueError, and others for wrong types."""
    return Running(
        name=_name(entry),
        size_bytes=_count(entry, "size"),
        vram_bytes=_count(entry, "size_vram"),
        context_length=_count(entry, "context_length") or None,
        expires_at=_unix(_text(entry, "expires_at")),
        digest=_text(entry, "digest"),
    )


def _name(entry: Mapping[str, Any]) -> str:
    name = _text(entry, "name") or _text(entry, "model")
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError("no name")
    return name


def _text(document: Mapping[str, Any], key: str) -> str:
    """Return a string; empty if absent or null. Raises ValueError."""
    value = document.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} is no text")
    return value or ""


def _count(document: Mapping[str, Any], key: str) -> int:
    """Return a number; 0 if absent, as Go omits zeros. Raises ValueError."""
    value = document.get(key)
    if value is None:
        return 0
    if not _is_count(value):
        raise ValueError(f"{key} is no count")
    return int(value)


def _is_count(value: object) -> bool:
    """Whether a value is a non-negative int64: larger numbers break calculations."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _opened_files(modelfile: str) -> tuple[str, ...]:
    """Return the files that a Modelfile names; they precede what its author wrote (TEMPLATE, SYSTEM, …)."""
    found = []
    for line in modelfile.splitlines():
        opened = _OPENED.fullmatch(line)
        if opened is not None:
            found.append(opened[1])
        elif line.strip() and not line.startswith(("#", "FROM ", "ADAPTER ")):
            break
    return tuple(found)


def _runner_options(parameters: str) -> dict[str, str]:
    """Parse the runner options from lines such as `num_ctx    4096`; numbers are normalised (`1e+06`, `1000000`)."""
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
    """Convert RFC 3339 with nanoseconds (`2026-11-21T03:31:24.992507865Z`) to Unix time; None for ever."""
    try:
        at = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", moment)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    far = at.year - datetime.now(UTC).year > FAR_AWAY_YEARS
    return None if far or at.timestamp() < 0 else at.timestamp()  # Go's zero time is in the year 1
