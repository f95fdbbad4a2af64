"""Which installed Ollama models have a newer version in their registry: its manifest has another digest."""

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
"""After the start, when whoever started it has other things to wait for."""


class UpdateCheck:
    """Asks the registries now and then. `installed` gives what is on Ollama's disk; `every_seconds` 0 means never."""

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
        """Names of installed models with a newer version, as far as is known. Asks nobody outside this machine."""
        newest = self._newest
        return frozenset(m.name for m in self._installed() if newest.get(m.name, m.digest) != m.digest)

    def check(self) -> frozenset[str]:
        """Ask for every installed model now. One whose registry doesn't answer keeps what was known of it."""
        with self._checking:
            newest = dict(self._newest)
            for model in self._installed():
                try:
                    name = OllamaName.parse(model.name)
                    newest[model.name] = fetch_manifest(name, self._registries).digest
                except (ValueError, DownloadError) as error:
                    log.info("can't tell whether there is a newer version", model=model.name, reason=str(error))
            self._newest = newest
        return self.available

    def start(self) -> None:
        if self._enabled:
            self._checks.start()

    def stop(self) -> None:
        self._checks.stop()
