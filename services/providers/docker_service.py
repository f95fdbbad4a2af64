"""Docker's status for the Models page. Polled only if the settings list a vLLM model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from services.engines.containers.port import RuntimeProblem, RuntimeStatus
from services.periodic import Periodic

POLL_SECONDS = 5.0
CLOSE_SECONDS = 1.0

State = Literal["unused", "unknown", "running"] | RuntimeProblem
"""`unused`: no model needs it. `unknown`: not polled yet."""


@dataclass(frozen=True, slots=True)
class DockerStatus:
    """Status of Docker. `error` says why it can't be used and what to do; unknown is None.

    `host` is its address as in DOCKER_HOST, None until polled. `nvidia`: NVIDIA's container runtime is registered.
    """

    state: State
    host: str | None = None
    version: str | None = None
    nvidia: bool = False
    error: str | None = None

    @property
    def socket(self) -> str | None:
        """Path of its socket; None if its address is none on this machine."""
        return self.host.removeprefix("unix://") if self.host and self.host.startswith("unix://") else None


UNUSED = DockerStatus("unused")


class Docker(Protocol):
    """The client to poll."""

    host: str

    def available(self) -> RuntimeStatus:
        """Return whether it can be used now. Never raises."""

    def close(self) -> None:
        """Close its connections."""


class DockerService:
    """Polls Docker if it is `used`. `connect` creates the client at the first poll, because its import is slow.

    `on_change` is called from the polling thread when the status has changed.
    """

    def __init__(
        self,
        connect: Callable[[], Docker],
        *,
        used: bool,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._connect = connect
        self._used = used
        self._on_change = on_change
        self._docker: Docker | None = None
        self._status = DockerStatus("unknown") if used else UNUSED
        self._poll = Periodic("docker-poll", self.refresh, POLL_SECONDS)

    def status(self) -> DockerStatus:
        """Return the latest status. No I/O."""
        return self._status

    def refresh(self) -> DockerStatus:
        """Poll Docker now. Blocks until it answers or its client times out."""
        if self._docker is None:
            self._docker = self._connect()
        docker, before = self._docker, self._status
        found = docker.available()
        self._status = DockerStatus(found.problem or "running", docker.host, found.version, found.nvidia, found.error)
        if self._status != before:
            self._on_change()
        return self._status

    def check(self) -> DockerStatus:
        """Return whether Docker runs, polled now unless it did a moment ago. Blocks as `refresh` does."""
        return self._status if self._status.state == "running" else self.refresh()

    def start_watching(self) -> None:
        """Poll until `close`. Does nothing if Docker is not used."""
        if self._used:
            self._poll.start()

    def close(self) -> None:
        self._poll.stop(CLOSE_SECONDS)
        if self._docker is not None:
            self._docker.close()
