"""Engines `flux` and `vision`: a local server with one model, in a Python process of its own.

The server outlives the app, like Ollama: the next run adopts it. One that another program started on the address is
used and never stopped. It is polled in the background, so that nobody waits for it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import structlog

from services.cancellation import CancelToken
from services.engines.port import (
    ADOPT_TIMEOUT,
    HOST_DEVICE,
    EngineError,
    GpuBytes,
    Model,
    Need,
    NotResponding,
    OnExit,
    Report,
)
from services.engines.processes import ProcessRegistry
from services.engines.python_server.about import About
from services.engines.python_server.instance import InstanceContext, ServerInstance
from services.engines.python_server.packages import Packages
from services.engines.python_server.program import Order, PythonServer
from services.engines.python_server.weights import Weights
from services.engines.server_address import Address
from services.engines.supervisor import ServiceError, Supervisor
from services.memory.ledger import Reading
from services.periodic import Periodic

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
FIRST_POLL_SECONDS = 0.5
STOP_SECONDS = 3.0
NOT_IN_ID = re.compile(r"[^\w.:@+-]+")


@dataclass(frozen=True, slots=True)
class Machine:
    """What the engine asks about this machine.

    `readings` returns its devices, `gpu_bytes` maps (device, pid) to bytes, `beside` a device to the ids of the models
    that are loaded there.
    """

    readings: Callable[[], Sequence[Reading]]
    gpu_bytes: GpuBytes
    beside: Callable[[str], list[str]]


NO_MACHINE = Machine(tuple, lambda _device, _pid: None, lambda _device: [])


class PythonServerEngine:
    """The server described by `about`, at `url`, with the model that the setting `model` names.

    Its model is in the catalogue if the server is on this machine, and runs or can be started; a listed one always is.
    `start_timeout` is how many seconds a start may take without progress.
    """

    outlives_app = True
    adopts_from_others = False

    def __init__(
        self,
        about: About,
        url: str,
        model: str,
        registry: ProcessRegistry,
        packages: Packages,
        *,
        machine: Machine = NO_MACHINE,
        on_change: Callable[[], None] = lambda: None,
        start_timeout: float = 1800.0,
    ) -> None:
        self.name = about.name
        self.about = about
        address = Address.parse(url)
        self.local = address.local
        self._default = about.source_of(model)
        self._default_id = _id_of(model)
        self._readings = machine.readings
        self._on_change = on_change
        self._known: dict[str, str] = {}
        """Sources of the models in the catalogue, by id."""
        self._lock = threading.Lock()
        self._current: ServerInstance | None = None
        self._silent_since: float | None = None
        self._weights = Weights(about, packages, registry)
        self.program = PythonServer(about, address, packages)
        self.supervisor = Supervisor(
            self.program, address, registry, on_change=self._changed, start_timeout=start_timeout
        )
        self.program.on_health = self.supervisor.note
        self._context = InstanceContext(
            about, self.program, self.supervisor, address.url, machine.gpu_bytes, self._free, machine.beside
        )
        self._watch = Periodic(f"{about.name}-watch", self.supervisor.refresh, POLL_SECONDS)

    @property
    def model_ids(self) -> Collection[str]:
        """The ids of its models that are, or were, in the catalogue."""
        return list(self._known)

    @property
    def model_id(self) -> str:
        """The id of the model that the settings name: that of the entry that lists it, where one does.

        The catalogue then drops the discovered entry with the same source.
        """
        ids = (id for id, source in list(self._known.items()) if source == self._default and id != self._default_id)
        return next(ids, self._default_id)

    def discover(self) -> Sequence[Model]:
        status = self.supervisor.status()
        if not self.local or not (status.binary or status.state in ("running", "starting") or status.ours):
            return ()
        model = Model(id=self._default_id, engine=self.name, source=self._default, kind=self.about.kind)
        return [self.describe(model)]

    def describe(self, model: Model) -> Model:
        source = self.about.source_of(model.source)
        self._known[model.id] = source
        sizes = self.about.sizes.get(source)
        return replace(
            model,
            source=source,
            kind=self.about.kind,
            description=model.description or self.about.description,
            size_bytes=model.size_bytes or (sizes.download_bytes if sizes else None),
            aliases=tuple(name for name in (source,) if name != model.id and _may_be_alias(name)),
            fault=self._fault(),
            removable=False,
        )

    def estimate(self, model: Model) -> Need:
        """Estimate a model without a declared need, from the sizes of its files and what fits the device."""
        device = self._device(model)
        sizes = self.about.sizes.get(model.source)
        if model.required_bytes or sizes is None:
            return Need(device, 0 if model.required_bytes else model.size_bytes or 0, "estimated")
        total = next((r.total_bytes for r in self._readings() if r.id == device), 0)
        return Need(device, sizes.needed_on(device, total), "estimated")

    def settings_key(self, model: Model) -> str:
        options = sorted((key, str(value)) for key, value in model.options.items())
        return f"{model.source} {self._device(model)} {options}"

    def fetch(self, model: Model, report: Report, token: CancelToken, /) -> None:
        if not self.local or self.supervisor.status().state in ("running", "starting"):
            return  # a server that is there downloads by itself
        try:
            self.program.check_packages()
        except ServiceError as error:
            raise EngineError(error.message) from None
        self._weights.fetch(self._order(model), report, token)

    def launch(self, model: Model, on_exit: OnExit) -> ServerInstance:
        if not self.local:
            raise EngineError(f"The {self.about.title} server is on another machine, so it is started there.")
        with self._lock:
            current = self._current
            if current is not None and not current.ended:
                raise EngineError(
                    f"{self.about.title} serves one model at a time, and holds {current.model.id} now. Unload it first."
                )
            self._check_not_loading_another(model)
            try:
                if self.supervisor.process is None:
                    self.program.check_packages()
                self.program.order = order = self._order(model)
                start = self.supervisor.begin()
            except ServiceError as error:
                raise EngineError(error.message) from None
            needed = model.required_bytes or self.estimate(model).bytes
            self._current = ServerInstance(self._context, model, order.device, needed, on_exit, start)
            return self._current

    def _check_not_loading_another(self, model: Model) -> None:
        """Raise EngineError if the server is still loading another model since an earlier run of the app."""
        starting = self.supervisor.status().state == "starting"
        loading = self.program.report.model if starting else None
        if loading is not None and self.about.source_of(loading) != model.source:
            title = self.about.title
            raise EngineError(f"{title} is still loading {loading}. Wait until it is ready, or stop {title} first.")

    def loaded(self, models: Sequence[Model], /) -> Collection[Model]:
        """Return the model that the server holds, or is loading since an earlier run."""
        current, status = self._current, self.supervisor.status()
        if current is not None and not current.ended:
            held = current.model.id
        elif status.state in ("running", "starting") or (status.ours and status.state == "unreachable"):
            held = self._held()
        else:
            return ()
        return [model for model in models if self.local and model.id == held]

    def adopt(self, model: Model, on_exit: OnExit, /) -> ServerInstance | None:
        with self._lock:
            if self._current is not None and not self._current.ended:
                return None  # it is being launched
            status = self.supervisor.status()
            if status.state == "running":
                self._silent_since = None
                entry = replace(model, started_elsewhere=not status.ours)
                self._current = ServerInstance(self._context, entry, self._device(model), 0, on_exit)
                return self._current
        if status.state == "starting":
            raise NotResponding(f"{self.about.title} is still loading it.")
        if status.ours and status.state == "unreachable":
            self._await_silent(model, status.error or "")
        return None

    def remove(self, model: Model, _keep: Collection[str], /) -> None:
        raise EngineError(
            f"The files of {model.id} lie in the Hugging Face cache, which other programs share: delete them there."
        )

    def prepare(self) -> None:
        """Start to poll the server."""
        self._watch.start()
        self._watch.wait_called(FIRST_POLL_SECONDS)

    def close(self) -> None:
        self._watch.stop(STOP_SECONDS)
        self.supervisor.close()

    def _changed(self) -> None:
        current = self._current
        if current is not None:
            current.note(self.supervisor.status())
        self._on_change()

    def _held(self) -> str:
        """Return the id of the model that the server holds; one that is not in the catalogue counts as the default."""
        model = self.about.source_of(self.program.report.model or "")
        others = (id for id, source in list(self._known.items()) if source == model != self._default)
        return next(others, self.model_id)

    def _await_silent(self, model: Model, error: str) -> None:
        """Stop our silent server once ADOPT_TIMEOUT has passed. Raises NotResponding before that."""
        now = time.monotonic()
        self._silent_since = now if self._silent_since is None else self._silent_since
        if now - self._silent_since < ADOPT_TIMEOUT:
            raise NotResponding(error or f"{self.about.title} does not answer.")
        self._silent_since = None
        log.warning("ending a server that does not answer", service=self.name, model=model.id)
        try:
            self.supervisor.stop()
        except ServiceError as refused:
            log.warning("a server that does not answer can't be stopped", service=self.name, reason=refused.message)

    def _fault(self) -> str | None:
        status = self.supervisor.status()
        if not self.local:
            return f"The {self.about.title} server is on another machine, so it is started there."
        if status.binary or status.ours or status.state in ("running", "starting"):
            return None
        try:
            self.program.check_packages()
        except ServiceError as error:
            return error.message
        return None

    def _order(self, model: Model) -> Order:
        arguments = tuple(str(argument) for argument in _list(model.options.get("arguments")))
        environment = {key: str(value) for key, value in _dict(model.options.get("environment")).items()}
        return Order(model.source, self._device(model), arguments, tuple(environment.items()))

    def _free(self, device: str) -> int | None:
        return next((reading.free_bytes for reading in self._readings() if reading.id == device), None)

    def _device(self, model: Model) -> str:
        asked = model.options.get("device")
        if asked is not None:
            return str(asked)
        return next((reading.id for reading in self._readings() if reading.kind == "gpu"), HOST_DEVICE)


def _id_of(name: str) -> str:
    """Derive a model's id from the setting: the name itself, or the last part of a repository or a path."""
    return NOT_IN_ID.sub("-", name.rstrip("/").rpartition("/")[2]).strip("-.:@+") or "model"


def _may_be_alias(source: str) -> bool:
    return not source.startswith(("/", ".", "~"))


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()


def _dict(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
