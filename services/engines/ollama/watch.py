"""The one place that polls an Ollama server: whether it answers, what it has loaded, what it has on its disk.

Other clients load, evict, pull and delete as well, so all of that is asked again and again. Everyone else reads what
was seen last, or is told of each answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import structlog

from services.engines.ollama.api import OllamaApi, OllamaUnreachable, Running
from services.engines.ollama.health import NOT_ASKED, Health, ask_health
from services.engines.ollama.inventory import Inventory
from services.engines.port import EngineError
from services.periodic import Periodic

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
FIRST_POLL_SECONDS = 0.5
STOP_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Listing:
    """What was loaded, by name. `reachable` is None while the server is there but doesn't answer.

    `at` is when the question was sent (monotonic seconds): what became ready later can't be in it.
    """

    at: float
    reachable: bool | None
    models: Mapping[str, Running]


class OllamaWatch:
    """Polls the server at `base_url` each POLL_SECONDS from its start to its stop. Asked from any thread.

    Each poll asks for the health and, where the server answers, for what is loaded and what is installed, one after the
    other with limits of 2, 2 and 3 seconds. What was said is in `health`, `latest` and `inventory`. `check_health` and
    `look` ask at once, for those who wait for a change that they have caused.
    """

    def __init__(self, base_url: str) -> None:
        self.api = OllamaApi(base_url.rstrip("/"))
        self.inventory = Inventory(self.api)
        self.health = NOT_ASKED
        self.latest = Listing(float("-inf"), False, MappingProxyType({}))
        self._health_listeners: list[Callable[[Health], object]] = []
        self._listing_listeners: list[Callable[[Listing], object]] = []
        self._looking = threading.Lock()
        self._trouble = ""
        self._polls = Periodic("ollama-watch", self._poll, POLL_SECONDS)

    def on_health(self, listener: Callable[[Health], object]) -> None:
        """Have `listener` told of each answer to whether it answers."""
        self._health_listeners.append(listener)

    def on_listing(self, listener: Callable[[Listing], object]) -> None:
        """Have `listener` told of each answer to what is loaded."""
        self._listing_listeners.append(listener)

    @property
    def polling(self) -> bool:
        return self._polls.running

    def start(self) -> None:
        """Poll from now on. The first poll is waited for, a moment: what runs is known when the first request comes."""
        self._polls.start()
        self.wait_polled(FIRST_POLL_SECONDS)

    def wait_polled(self, timeout: float) -> bool:
        """Wait for the end of the first poll, at most `timeout` seconds; whether it is over."""
        return self._polls.wait_called(timeout)

    def stop(self) -> None:
        """Poll no more. A poll under way is waited for, a few seconds at most."""
        self._polls.stop(STOP_SECONDS)

    def check_health(self) -> Health:
        """Ask now whether the server answers, and tell whoever listens."""
        health = ask_health(self.api.base_url)
        if health.at >= self.health.at:  # else somebody who asked later has been answered before
            self.health = health
        for listener in self._health_listeners:
            listener(health)
        return health

    def look(self) -> Listing:
        """Ask now what is loaded, and tell whoever listens.

        A server that is slow to answer is taken to hold what it held before.
        """
        with self._looking:
            at = time.monotonic()
            try:
                models = {model.name: model for model in self.api.running()}
                self.latest = Listing(at, True, MappingProxyType(models))
            except OllamaUnreachable as error:
                self.latest = self._unreachable(at, gone=error.refused)
            except EngineError as error:
                self._warn(str(error))
            latest = self.latest
        return self._tell(latest)

    def _poll(self) -> None:
        health = self.check_health()
        if health.version is not None:
            self.look()
            self.inventory.list(fresh=True)
            return
        with self._looking:
            if health.at >= self.latest.at:  # else somebody who asked later has been answered before
                self.latest = self._unreachable(health.at, gone=health.refused)
            latest = self.latest
        self._tell(latest)

    def _unreachable(self, at: float, *, gone: bool) -> Listing:
        return Listing(at, False if gone else None, MappingProxyType({} if gone else self.latest.models))

    def _tell(self, listing: Listing) -> Listing:
        for listener in self._listing_listeners:
            listener(listing)
        return listing

    def _warn(self, trouble: str) -> None:
        """Say it once, not every second."""
        if trouble != self._trouble:
            log.warning("Ollama's list of loaded models can't be read", error=trouble)
        self._trouble = trouble
