"""Health of the services that providers run on: Ollama, Flux and vision, checked side by side.

Format of the local servers' `GET /health` (services/local_servers): `{"status": "loading" | "ready" | "failed",
"model", "error", "service"}`. Any JSON object with status 200 counts as an answer, so that a server with less to say
works too, unless it says that it is another service.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from services.engines.ollama.watch import OllamaWatch
from services.engines.python_server.health import other_service
from services.engines.supervisor import NOT_ASKED
from services.http import ConnectionBroken, ConnectionRefused, FetchError, TooSlow, fetch
from services.providers.local_services import ServiceName
from services.providers.probe import Probe

CHECK_SECONDS = 1.5
"""Limit of one check; all of them together answer within two seconds."""
FRESH_SECONDS = 1.0
PATIENCE_SECONDS = 0.1
MOST_BYTES = 100_000


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """Whether a service answers, and how fast in milliseconds (None: not measured).

    `models` are what it serves. `error` says why it can't be used, None if it can. `loading`: it answers, and its model
    is still being loaded. `refused`: nothing listens at its address.
    """

    available: bool
    latency_ms: int | None = None
    models: tuple[str, ...] = ()
    error: str | None = None
    loading: bool = False
    refused: bool = False


class HealthChecks:
    """The health of all services. What hangs takes CHECK_SECONDS, and delays none of the others.

    `installed` returns the names of the models that Ollama has, as last listed.
    """

    def __init__(
        self, watch: OllamaWatch, installed: Callable[[], Iterable[str]], flux_url: str, vision_url: str
    ) -> None:
        self._watch = watch
        self._installed = installed
        self._probes: Mapping[ServiceName, Probe[ServiceHealth]] = {
            "flux": Probe(lambda: ask_server("flux", "Flux", flux_url), FRESH_SECONDS),
            "vision": Probe(lambda: ask_server("vision", "The vision service", vision_url), FRESH_SECONDS),
        }

    def all(self) -> Mapping[ServiceName, ServiceHealth]:
        """Return the health of each, at most about a second old."""
        begun = {name: probe.begin() for name, probe in self._probes.items()}
        return {"ollama": self._ollama(), **{name: outcome.result() for name, outcome in begun.items()}}

    def soon(self) -> Mapping[ServiceName, ServiceHealth | None]:
        """Return what is known within PATIENCE_SECONDS, so that pages don't wait for what hangs.

        That is the health now or, for a service that takes longer, as last found; None before its first answer.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        found: dict[ServiceName, ServiceHealth | None] = {"ollama": self._ollama()}
        for name, outcome in [(name, probe.begin()) for name, probe in self._probes.items()]:
            try:
                found[name] = outcome.result(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                latest = self._probes[name].latest
                found[name] = latest.result() if latest is not None else None
        return found

    def check(self, name: ServiceName) -> ServiceHealth:
        """Check one service now."""
        if name == "ollama":
            self._watch.check_health()
            return self._ollama()
        return self._probes[name].begin(fresh=True).result()

    def _ollama(self) -> ServiceHealth:
        """Return what the watch found last: it polls once a second anyway."""
        found = self._watch.health
        if found is NOT_ASKED:
            return ServiceHealth(False, error="Ollama has not answered yet.")
        if found.version is None:
            error = found.error or f"Nothing answers at {self._watch.api.base_url}."
            return ServiceHealth(False, error=error, refused=found.error is None)
        return ServiceHealth(True, _milliseconds(found.seconds), tuple(sorted(self._installed())))


def ask_server(service: ServiceName, title: str, url: str) -> ServiceHealth:
    """Ask a local server, called `title` in messages, how it is; takes at most CHECK_SECONDS. Never raises."""
    began = time.monotonic()
    try:
        answer = fetch("GET", f"{url}/health", timeout=CHECK_SECONDS, most_bytes=MOST_BYTES)
        said = answer.document() if answer.status == 200 else None
    except ConnectionRefused:
        return ServiceHealth(False, error=f"Nothing answers at {url}.", refused=True)
    except TooSlow:
        return ServiceHealth(
            False, error=f"{title} at {url} hangs or is overloaded: no answer within {CHECK_SECONDS:g} s."
        )
    except ConnectionBroken:
        return ServiceHealth(False, error=f"The connection to {url} was cut before an answer came.")
    except FetchError as error:
        return ServiceHealth(False, error=f"{title} at {url} can't be asked: {error}.")
    except ValueError:
        said = None
    latency = _milliseconds(time.monotonic() - began)
    if said is None:
        return ServiceHealth(False, latency, error=f"What answers at {url} is not the service for it: {answer.status}.")
    other = other_service(said, service)
    if other is not None:
        return ServiceHealth(False, latency, error=f"What answers at {url} is not {title}: it says that it is {other}.")
    if said.get("status") == "failed":
        cause = said.get("error")
        why = f"{cause}" if isinstance(cause, str) and cause else "it gives no reason"
        return ServiceHealth(False, latency, error=f"{title} could not load its model: {why}")
    model = said.get("model")
    loading = said.get("status") == "loading"
    return ServiceHealth(True, latency, (model,) if isinstance(model, str) and not loading else (), loading=loading)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else max(1, round(seconds * 1000))
