"""Looks at what an Ollama server has loaded, again and again: other clients load, evict and change things as well."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import structlog

from services.engines.ollama.api import OllamaApi, OllamaUnreachable, Running
from services.engines.port import EngineError

log = structlog.get_logger(__name__)

INTERVAL_SECONDS = 1.0
FIRST_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Listing:
    """One look: what was loaded by name. `reachable` is None while the server is there but doesn't answer.

    `at` is when the question was sent (monotonic seconds): what became ready later can't be in it.
    """

    at: float
    reachable: bool | None
    models: Mapping[str, Running]


class OllamaWatch:
    """Keeps the latest look and tells `on_look` about each. Asked from any thread."""

    def __init__(self, api: OllamaApi, on_look: Callable[[Listing], None], interval: float = INTERVAL_SECONDS) -> None:
        self._api = api
        self._on_look = on_look
        self._interval = interval
        self._looking = threading.Lock()
        self._stopped = threading.Event()
        self._trouble = ""
        self._looked = threading.Event()
        self.latest = Listing(float("-inf"), False, MappingProxyType({}))
        self._thread = threading.Thread(target=self._run, name="ollama-look", daemon=True)

    def start(self) -> None:
        """Look from now on. The first look is waited for, a moment: what runs is known when the first request comes."""
        if not self._thread.is_alive() and not self._stopped.is_set():
            self._thread.start()
            self._looked.wait(FIRST_LOOK_SECONDS)

    def stop(self) -> None:
        self._stopped.set()

    def look(self) -> Listing:
        """Look now. A server that is slow to answer is taken to hold what it held before."""
        with self._looking:
            at = time.monotonic()
            try:
                models = {model.name: model for model in self._api.running()}
                self.latest = Listing(at, True, MappingProxyType(models))
            except OllamaUnreachable as error:
                gone = error.refused
                self.latest = Listing(at, False if gone else None, MappingProxyType({} if gone else self.latest.models))
            except EngineError as error:
                self._warn(str(error))
            latest = self.latest
        self._on_look(latest)
        return latest

    def _warn(self, trouble: str) -> None:
        """Say it once, not every second."""
        if trouble != self._trouble:
            log.warning("Ollama's list of loaded models can't be read", error=trouble)
        self._trouble = trouble

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.look()
            except Exception:
                log.exception("a look at Ollama failed")
            self._looked.set()
            self._stopped.wait(self._interval)
