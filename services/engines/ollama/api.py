"""Ollama's HTTP API, as far as the adapter needs it. Shapes as recorded from 0.24.0; figures are bytes and seconds.

No call here decides anything: what the answers mean for a model's life is in `instance.py`.
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
LOOK_SECONDS = 2.0
FOR_EVER = -1
"""`keep_alive` as a number: the string "-1" is an error (seen with 0.24.0)."""
RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "low_vram")
"""Options for which Ollama starts a runner anew when a request comes with other values (0.24; older ones the last two).
"""
HASH_LENGTH = 12
LONGEST_NAME = 500
MOST_TOLD = 5
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
        self._odd: dict[str, list[str]] = {}

    def installed(self, timeout: float = ASK_SECONDS) -> list[Installed]:
        """What is on its disk; stubs of models that run in a cloud are none of this machine's."""
        return self._entries("/api/tags", timeout, _installed)

    def running(self) -> list[Running]:
        """What is loaded. A model that is being loaded is absent, one just unloaded may stay for 50 ms."""
        return self._entries("/api/ps", LOOK_SECONDS, _running)

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
        """Ask for an unload. The answer comes at once, the memory is free a little later."""
        self._post("/api/generate", {"model": name, "keep_alive": 0, "stream": False})

    def delete(self, name: str) -> None:
        """Remove a model's files. Does not unload it first."""
        self.answer(HttpRequest("DELETE", f"{self.base_url}/api/delete", timeout=ASK_SECONDS, body={"model": name}))

    def derive(self, name: str, source: str, context_length: int) -> None:
        """Make `name`: the same weights as `source`, with a context of its own. Takes no disk space."""
        body = {"model": name, "from": source, "parameters": {"num_ctx": context_length}, "stream": False}
        self._post("/api/create", body, 60.0)

    def request(self, path: str, body: Mapping[str, object], timeout: float) -> HttpRequest:
        """A POST that may take minutes, such as a load, for `answer`. Ollama notices when it is cancelled."""
        return HttpRequest("POST", self.base_url + path, timeout=timeout, body=body)

    def answer(self, request: HttpRequest) -> dict[str, Any]:
        """Send it and block until the whole answer is here."""
        try:
            answer = request.reply()
        except FetchError as error:
            raise unreachable(self.base_url, error) from None
        return understand(answer.status, answer.content)

    def _entries(self, path: str, timeout: float, read: Callable[[Mapping[str, Any]], T | None]) -> list[T]:
        """What `read` makes of each model that is listed there. One that it can't read is left out, the others stay.

        Lists are asked for every second, so what is odd is logged when it changes.
        """
        listed = self.answer(HttpRequest("GET", self.base_url + path, timeout=timeout)).get("models")
        if not isinstance(listed, list | None):
            raise OllamaError(f"a list that can't be read: {reprlib.repr(listed)}", 200)
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
            log.warning("Ollama lists what can't be read; it is left out", path=path, entries=odd[:MOST_TOLD])
        self._odd[path] = odd
        return found

    def _post(self, path: str, body: Mapping[str, object], timeout: float = ASK_SECONDS) -> dict[str, Any]:
        return self.answer(self.request(path, body, timeout))


def unreachable(base_url: str, error: FetchError) -> OllamaUnreachable:
    """What it means that no whole answer came, and what to do."""
    if isinstance(error, ConnectionRefused):
        words = f"Ollama is not running at {base_url}. Start it on the Models page, or with `ollama serve`."
        return OllamaUnreachable(words, refused=True)
    words = f"Ollama at {base_url} does not answer: {error}. Look at its log, or start it again."
    return OllamaUnreachable(words, refused=False)


def understand(status: int, content: bytes) -> dict[str, Any]:
    """A whole answer's document. Raises OllamaError with Ollama's own words when it is an error."""
    document: Any = None
    with suppress(ValueError, RecursionError):
        document = json.loads(content) if content.strip() else {}
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, dict):  # under /v1
        error = error.get("message")
    if status >= 400 or error:
        raise OllamaError(str(error or content[:300].decode("utf-8", "replace") or f"HTTP status {status}"), status)
    if not isinstance(document, dict):
        raise OllamaError(f"an answer that can't be read: {content[:100]!r}", status)
    return document


def _installed(entry: Mapping[str, Any]) -> Installed | None:
    """None for a stub. Raises ValueError and what a wrong type makes Python raise."""
    if entry.get("remote_host"):
        return None
    details = entry.get("details")
    known = details if isinstance(details, dict) else {}
    words = [known.get("parameter_size"), known.get("quantization_level")]
    about = " ".join(word for word in words if isinstance(word, str) and word != "unknown")
    return Installed(_name(entry), _text(entry, "digest"), _count(entry, "size"), about)


def _running(entry: Mapping[str, Any]) -> Running:
    """Raises ValueError and what a wrong type makes Python raise."""
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
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError("no name")
    return name


def _text(document: Mapping[str, Any], key: str) -> str:
    """What isn't there, or is null, is empty. Raises ValueError."""
    value = document.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} is no text")
    return value or ""


def _count(document: Mapping[str, Any], key: str) -> int:
    """Go leaves out a number that is 0. Raises ValueError."""
    value = document.get(key)
    if value is None:
        return 0
    if not _is_count(value):
        raise ValueError(f"{key} is no count")
    return int(value)


def _is_count(value: object) -> bool:
    """Whether it is a number that Go could have meant (an int64): larger ones break whoever computes with them."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


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
    except (ValueError, OverflowError):
        return None
    far = at.year - datetime.now(UTC).year > FAR_AWAY_YEARS
    return None if far or at.timestamp() < 0 else at.timestamp()  # Go's zero time is in the year 1
