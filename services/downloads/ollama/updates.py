"""Checks which installed Ollama models have a newer version: their manifest in the registry has another digest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import structlog

from services.downloads.fetcher import DownloadError
from services.downloads.ollama.registry import Registries, fetch_manifest
from services.engines.ollama.api import Installed
from services.engines.ollama.names import OllamaName
from services.periodic import Periodic

log = structlog.get_logger(__name__)

FIRST_CHECK_SECONDS = 60.0
"""Delay of the first check after the start."""


class UpdateCheck:
    """Checks the registries periodically. `installed` returns the installed models; `every_seconds` 0 means never."""

    def __init__(
        self,
        installed: Callable[[], Sequence[Installed]],
        registries: Registries,
        *,
        every_seconds: float,
        first_seconds: float = FIRST_CHECK_SECONDS,
    ) -> None:
        self._installed = installed
        self._registries = registries
        self._enabled = every_seconds > 0
        self._checking = threading.Lock()
        self._newest: dict[str, str] = {}
        self._checks = Periodic("update-check", self.check, every_seconds, first_seconds=first_seconds)

    @property
    def available(self) -> frozenset[str]:
        """Names of installed models with a newer version, as last checked. No I/O."""
        newest = self._newest
        return frozenset(m.name for m in self._installed() if newest.get(m.name, m.digest) != m.digest)

    def check(self) -> frozenset[str]:
        """Check every installed model now. Without an answer from its registry, a model keeps its last result."""
        with self._checking:
            newest = dict(self._newest)
            for model in self._installed():
                try:
                    name = OllamaName.parse(model.name)
                    newest[model.name] = fetch_manifest(name, self._registries).digest
                except (ValueError, DownloadError) as error:
                    log.info("a model can't be checked for updates", model=model.name, reason=str(error))
            self._newest = newest
        return self.available

    def start(self) -> None:
        if self._enabled:
            self._checks.start()

    def stop(self) -> None:
        self._checks.stop()
