"""The only poller of an Ollama server: its health, the loaded models, the installed models.

Other clients load, evict, pull and delete too, so all of that is polled. Everyone else reads the latest results, or
listens to them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import structlog

from services.engines.ollama.api import OllamaApi, OllamaUnreachable, Running
from services.engines.ollama.health import ask_health
from services.engines.ollama.inventory import Inventory
from services.engines.port import EngineError
from services.engines.supervisor import NOT_ASKED, Health
from services.periodic import Periodic

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
FIRST_POLL_SECONDS = 0.5
STOP_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Listing:
    """The loaded models, by name. `reachable` is None while the server is up but doesn't answer.

    `at` is when the request was sent (monotonic seconds): a model that became ready later can't be listed.
    """

    at: float
    reachable: bool | None
    models: Mapping[str, Running]


class OllamaWatch:
    """Polls the server at `base_url` every POLL_SECONDS between `start` and `stop`. Thread-safe.

    A poll requests the health and, if the server answers, the loaded and the installed models, with limits of 2, 2 and
    3 seconds. The results are in `health`, `latest` and `inventory`. `check_health` and `refresh` query at once, for
    callers that wait for a change they have caused.
    """

    def __init__(self, base_url: str) -> None:
        self.api = OllamaApi(base_url.rstrip("/"))
        self.inventory = Inventory(self.api)
        self.health = NOT_ASKED
        self.latest = Listing(float("-inf"), False, MappingProxyType({}))
        self._health_listeners: list[Callable[[Health], object]] = []
        self._listing_listeners: list[Callable[[Listing], object]] = []
        self._refreshing = threading.Lock()
        self._trouble = ""
        self._polls = Periodic("ollama-watch", self._poll, POLL_SECONDS)

    def on_health(self, listener: Callable[[Health], object]) -> None:
        """Call `listener` with each health result."""
        self._health_listeners.append(listener)

    def on_listing(self, listener: Callable[[Listing], object]) -> None:
        """Call `listener` with each listing."""
        self._listing_listeners.append(listener)

    @property
    def polling(self) -> bool:
        return self._polls.running

    def start(self) -> None:
        """Start to poll, and wait a moment for the first poll, so that the first request finds what is loaded."""
        self._polls.start()
        self.wait_polled(FIRST_POLL_SECONDS)

    def wait_polled(self, timeout: float) -> bool:
        """Wait until the first poll is done, at most `timeout` seconds; return whether it is."""
        return self._polls.wait_called(timeout)

    def stop(self) -> None:
        """Stop polling; wait for a poll under way, a few seconds at most."""
        self._polls.stop(STOP_SECONDS)

    def check_health(self) -> Health:
        """Check the server's health now, and notify the listeners."""
        health = ask_health(self.api.base_url)
        if health.at >= self.health.at:  # else a later request was answered first
            self.health = health
        for listener in self._health_listeners:
            listener(health)
        return health

    def refresh(self) -> Listing:
        """List the loaded models now, and notify the listeners.

        A server that is slow to answer is assumed to hold what it held before.
        """
        with self._refreshing:
            at = time.monotonic()
            try:
                models = {model.name: model for model in self.api.running()}
                self.latest = Listing(at, True, MappingProxyType(models))
            except OllamaUnreachable as error:
                self.latest = self._unreachable(at, gone=error.refused)
            except EngineError as error:
                self._warn(str(error))
            latest = self.latest
        return self._notify(latest)

    def _poll(self) -> None:
        health = self.check_health()
        if health.version is not None:
            self.refresh()
            self.inventory.list(fresh=True)
            return
        with self._refreshing:
            if health.at >= self.latest.at:  # else a later request was answered first
                self.latest = self._unreachable(health.at, gone=health.refused)
            latest = self.latest
        self._notify(latest)

    def _unreachable(self, at: float, *, gone: bool) -> Listing:
        return Listing(at, False if gone else None, MappingProxyType({} if gone else self.latest.models))

    def _notify(self, listing: Listing) -> Listing:
        for listener in self._listing_listeners:
            listener(listing)
        return listing

    def _warn(self, trouble: str) -> None:
        """Log each error once, not every second."""
        if trouble != self._trouble:
            log.warning("Ollama's list of loaded models can't be read", error=trouble)
        self._trouble = trouble
