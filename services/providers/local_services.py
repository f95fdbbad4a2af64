"""The services on this machine, in one form for pages and scripts: Ollama, Flux and vision.

Ollama is started as a program. Flux and vision hold a model, so they are started and stopped by the switcher: starting
one is a switch that does not change the active model, with a plan, a confirmation where the settings require one, and a
rollback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from services.engines.python_server.engine import PythonServerEngine
from services.engines.supervisor import Preparation, ServiceError, ServiceStatus, State, Supervisor
from services.providers.installation import Installation, Installer
from services.sizes import format_part
from services.switching.events import Board
from services.switching.jobs import Job, SwitchOptions
from services.switching.switcher import Switcher

ServiceName = Literal["ollama", "flux", "vision"]
SERVICE_NAMES: tuple[ServiceName, ...] = get_args(ServiceName)


@dataclass(frozen=True, slots=True)
class LocalService:
    """One service as shown. Times are seconds, unknown is None.

    `state`, `ours`, `pid`, `error` and the rest of `status` are the server's (`ServiceStatus`), except that a switch to
    its model counts as starting. `model` is the model that a start would load, `loaded` the one it holds now; both are
    None for Ollama, which holds many. `missing` are Python packages that have to be installed before it can be started;
    `installation` is the job that installs them, under way or the last one.
    """

    name: ServiceName
    title: str
    address: str
    status: ServiceStatus
    model: str | None = None
    loaded: str | None = None
    missing: tuple[str, ...] = ()
    installation: Installation | None = None

    @property
    def state(self) -> State:
        return self.status.state

    @property
    def installing(self) -> bool:
        return self.installation is not None and self.installation.state == "running"

    @property
    def can_start(self) -> bool:
        return self.status.can_start

    @property
    def can_stop(self) -> bool:
        return self.status.can_stop

    @property
    def can_install(self) -> bool:
        """Whether packages are missing and none are being installed now."""
        return bool(self.missing) and self.status.local and not self.installing

    @property
    def preparation(self) -> Preparation | None:
        return self.status.preparation

    @property
    def percent(self) -> int | None:
        """Progress of what a start is doing now: its download, or the load; None if nothing is counted."""
        seen = self.status.preparation
        if seen is None or seen.completed_bytes is None or not seen.total_bytes:
            return None
        return min(100, 100 * seen.completed_bytes // seen.total_bytes)

    @property
    def progress_words(self) -> str | None:
        """What a start is doing now, such as "Downloading 3.1 of 33.7 GB"."""
        seen = self.status.preparation
        if seen is None:
            return None
        verb = "Downloading" if seen.stage == "downloading" else "Loading"
        if seen.completed_bytes is None or not seen.total_bytes:
            return verb
        return f"{verb} {format_part(seen.completed_bytes, seen.total_bytes)}"


class LocalServices:
    """Lists, starts and stops the services, and installs what they need."""

    def __init__(
        self,
        ollama: Supervisor,
        servers: Mapping[str, PythonServerEngine],
        switcher: Switcher,
        board: Board,
        installer: Installer,
    ) -> None:
        self._ollama = ollama
        self._servers = servers
        self._switcher = switcher
        self._board = board
        self._installer = installer

    def all(self) -> tuple[LocalService, ...]:
        """Return every service. No requests; reads a few files at most."""
        return tuple(self.get(name) for name in SERVICE_NAMES)

    def get(self, name: ServiceName) -> LocalService:
        if name == "ollama":
            return LocalService(name, "Ollama", self._ollama.address.url, self._ollama.status())
        server = self._servers[name]
        loaded = self._loaded(name)
        return LocalService(
            name,
            server.about.title,
            server.supervisor.address.url,
            self._as_shown(server, loaded),
            model=server.model_id,
            loaded=loaded,
            missing=server.program.packages.missing() if server.local else (),
            installation=self._installer.current,
        )

    def start(
        self,
        name: ServiceName,
        *,
        requested_by: str,
        wait_seconds: float,
        confirm: bool | None = None,
        wait: bool = True,
    ) -> tuple[LocalService, Sequence[str]]:
        """Start a service, or join its start; return it, and the models unloaded for it, once it answers.

        For Flux and vision this takes at most `wait_seconds`; without `wait`, it returns once their load has begun.

        Raises ServiceError, and for Flux and vision SwitchError: `confirmation_required` with the plan if other models
        had to be unloaded and the settings require a confirmation, `insufficient_memory`, `load_failed` and others.
        """
        if name == "ollama":
            self._ollama.start()
            return self.get(name), ()
        self.check_startable(name)
        server = self._servers[name]
        status = server.supervisor.status()
        if status.state == "running" and not status.ours:
            return self.get(name), ()
        options = SwitchOptions(activate=False, confirm=confirm)
        job = self._switcher.switch(server.model_id, requested_by=requested_by, replace="queue", options=options)
        if wait:
            job.wait_done(wait_seconds)
        else:
            job.wait_started(wait_seconds)
        _raise_error_of(job)
        return self.get(name), tuple(job.unloaded)

    def check_startable(self, name: ServiceName) -> None:
        """Raise ServiceError `remote_service` or `packages_missing` if a service can't be started for lack of either.

        For Flux and vision: their model may not be in the catalogue then.
        """
        server = self._servers.get(name)
        if server is None:
            return
        status = server.supervisor.status()
        if not status.local:
            server.supervisor.begin()  # raises: it is on another machine
        if status.state not in ("running", "starting") and not status.ours:
            server.program.check_packages()

    def stop(self, name: ServiceName, *, requested_by: str, wait_seconds: float) -> LocalService:
        """Stop a service that was started from here, once its requests in flight are finished; cancel its start.

        Raises ServiceError `not_ours`, `remote_service` or `stop_failed`, and SwitchError.
        """
        if name == "ollama":
            self._ollama.stop()
            return self.get(name)
        server = self._servers[name]
        status = server.supervisor.status()
        loaded = self._loaded(name) or self._target(server)
        if loaded is not None and (status.ours or status.state in ("stopped", "failed", "starting")):
            job = self._switcher.stop(loaded, requested_by=requested_by)
            job.wait_done(wait_seconds)
            _raise_error_of(job)
        else:
            server.supervisor.stop()
        return self.get(name)

    def dismiss(self, name: ServiceName) -> None:
        """Clear the message about a service's last failure, and about a failed installation."""
        if name == "ollama":
            self._ollama.dismiss()
            return
        self._servers[name].supervisor.dismiss()
        self._installer.dismiss()

    def install(self, name: ServiceName) -> Installation:
        """Begin to install the packages that a service lacks; return at once. Raises ServiceError."""
        self._check_installable(name)
        running = [s.about.title for s in self._servers.values() if s.supervisor.process is not None]
        if running and self._servers[name].program.packages.missing():
            words = f"Stop {' and '.join(running)} first: what runs now would lose the packages that are replaced."
            raise ServiceError("services_running", words)
        return self._installer.start()

    def cancel_installation(self, name: ServiceName) -> Installation | None:
        """Cancel the installation under way; None if there was none. Raises ServiceError."""
        self._check_installable(name)
        return self._installer.cancel()

    def close(self) -> None:
        """End an installation under way. Services go on, and the next run adopts them."""
        self._installer.close()

    def _check_installable(self, name: ServiceName) -> None:
        if name == "ollama":
            words = "Ollama is no Python program: install it from https://ollama.com/download."
            raise ServiceError("not_installable", words)
        if not self._servers[name].local:
            raise ServiceError("remote_service", "It is on another machine, so its packages are installed there.")

    def _loaded(self, engine: str) -> str | None:
        """Return the model that an engine holds or is loading."""
        here = self._board.current.instances.values()
        return next((view.model for view in here if view.engine == engine), None)

    def _target(self, server: PythonServerEngine) -> str | None:
        """Return the server's model if a switch to it is under way or waits."""
        snapshot = self._board.current
        wanted = [*snapshot.queued, *([snapshot.switch.to_model] if snapshot.switch is not None else [])]
        return next((model for model in wanted if model in server.model_ids), None)

    def _as_shown(self, server: PythonServerEngine, loaded: str | None) -> ServiceStatus:
        status = server.supervisor.status()
        if status.state in ("stopped", "failed") and loaded is None and self._target(server) is not None:
            return replace(status, state="starting", error=None, can_start=False, can_stop=True)
        return status


def _raise_error_of(job: Job) -> None:
    """Raise a job's error, if it has one."""
    if job.error is not None:
        raise job.error
