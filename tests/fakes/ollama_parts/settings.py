"""Configuration of the fake: the real one's environment variables, and the JSON file that FAKE_OLLAMA names.

The file is checked again at each access, so that a test can set a fault while the server runs.
`tests/support/ollama.py` documents its keys.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DEFAULT_BYTES_PER_SECOND = 40_000_000


@dataclass(frozen=True)
class ModelOptions:
    """One model of the configuration. Sizes in bytes, `hold_mb` in megabytes of 1,000,000 bytes, times in seconds."""

    size: int = 7_411_936
    hold_mb: float = 20
    load_seconds: float = 0.05
    loaded_size: int | None = None
    context_length: int = 1024
    vram_share: float = 0.0
    version: int = 1
    family: str = "llama"
    parameter_size: str | None = None
    quantization_level: str = "unknown"
    answer: str = "I am a fake and answer in ten short words."
    thinking: str = ""
    cloud: bool = False
    embedding_only: bool = False
    broken: bool = False

    @classmethod
    def of(cls, document: dict[str, Any]) -> ModelOptions:
        unknown = set(document) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"the fake knows no model option {', '.join(sorted(unknown))}")
        return cls(**document)


class Settings:
    """The configuration file, read again whenever it has changed; without a file the configuration is empty."""

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        self._seen: tuple[int, int, int] | None = None
        self._document: dict[str, Any] = {}
        self._lock = threading.Lock()

    def document(self) -> dict[str, Any]:
        with self._lock:
            if self._path is None:
                return {}
            try:
                state = self._path.stat()
            except FileNotFoundError:
                return {}
            # The inode distinguishes a file that replaces another within one clock tick.
            seen = (state.st_mtime_ns, state.st_ino, state.st_size)
            if seen != self._seen:
                self._document = json.loads(self._path.read_text(encoding="utf-8"))
                self._seen = seen
            return self._document

    def models(self) -> dict[str, ModelOptions]:
        return self._options("models")

    def registry(self) -> dict[str, ModelOptions]:
        return self._options("registry")

    def registry_url(self) -> str | None:
        return self.document().get("registry_url")

    def options(self, name: str) -> ModelOptions:
        """Options of an installed model; a model that the file doesn't list gets the defaults."""
        known = self.registry() | self.models()
        return known.get(name) or known.get(name.rpartition("/")[2]) or ModelOptions()

    def bytes_per_second(self) -> float:
        return float(self.fault("pull_slow") or self.document().get("bytes_per_second", DEFAULT_BYTES_PER_SECOND))

    def blob_seconds(self) -> float:
        """Time per new blob besides its transfer: about 1 s in the real one, less here to keep tests short."""
        return float(self.document().get("blob_seconds", 0.05))

    def fault(self, name: str) -> Any:
        return self.document().get("faults", {}).get(name)

    def log_request(self, method: str, path: str, body: object) -> None:
        target = self.document().get("requests_log")
        if target:
            line = json.dumps({"method": method, "path": path, "body": body}) + "\n"
            with self._lock, open(target, "a", encoding="utf-8") as file:
                file.write(line)

    def _options(self, key: str) -> dict[str, ModelOptions]:
        return {name: ModelOptions.of(options) for name, options in self.document().get(key, {}).items()}


def listen_address() -> tuple[str, int]:
    """OLLAMA_HOST as (host, port): `host:port`, `http://host:port` or unset."""
    given = os.environ.get("OLLAMA_HOST", "").strip() or "127.0.0.1:11434"
    parts = urlsplit(given if "://" in given else f"http://{given}")
    return parts.hostname or "127.0.0.1", parts.port or 11434


def models_folder() -> Path:
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
