"""In-memory engines, devices and a database, with a switch for each fault."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.cancellation import CancelToken
from services.engines.port import (
    HOST_DEVICE,
    Endpoint,
    EngineError,
    Evidence,
    Exit,
    LoadFailed,
    Model,
    Need,
    OnExit,
    Report,
    SleepFootprint,
    Usage,
)
from services.memory.ledger import Reading
from services.memory.programs import Program
from services.scheduling import pause
from services.store.records import LoadRecord
from tests.heart.virtual import VirtualScheduler

GB = 1_000_000_000
GPU = "gpu-0"


@dataclass
class Faults:
    """Faults of a model; each lasts until it is cleared."""

    crash_loading: bool = False
    hang_loading: bool = False
    refuse_first_token: bool = False
    crash_when_ready: bool = False
    refuse_launch: bool = False
    refuse_unload: bool = False
    refuse_sleep: bool = False
    refuse_wake: bool = False
    refuse_estimate: bool = False
    refuse_fetch: bool = False
    fetch_seconds: float = 0.0
    slow_stop: float = 0.0
    stuck: bool = False
    """It generates nothing any more, but looks healthy."""


@dataclass
class Machine:
    """The devices: the memory held on each, and what other programs use."""

    scheduler: VirtualScheduler
    totals: Mapping[str, int]
    held: dict[object, dict[str, int]] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    slow_seconds: float = 0.0
    """Duration of a reading: a slow or hanging driver."""
    lag_seconds: float = 0.0
    """How long the memory of ended processes is still reported as used."""
    _lingering: list[object] = field(default_factory=list)

    def sample(self) -> Sequence[Reading]:
        if self.slow_seconds:
            self.scheduler.pause(self.slow_seconds)
        return self.readings

    @property
    def readings(self) -> Sequence[Reading]:
        return tuple(
            Reading(
                id=device,
                name=device,
                kind="host" if device == HOST_DEVICE else "gpu",
                total_bytes=total,
                free_bytes=max(0, total - self.ours(device) - self.others.get(device, 0)),
            )
            for device, total in self.totals.items()
        )

    def programs(self, device: str, _ours: Collection[int]) -> Sequence[Program]:
        held = self.others.get(device, 0)
        return [Program("hog", held, (4242,))] if held else []

    def free(self, key: object) -> None:
        """What held memory has ended; the driver's account of it follows."""
        held = self.held.pop(key, None)
        if held is not None and self.lag_seconds:
            remainder = object()
            self.held[remainder] = held
            self._lingering.append(remainder)
            lag = self.lag_seconds

            def follow() -> None:
                self.scheduler.pause(lag)
                self.held.pop(remainder, None)

            self.scheduler.spawn("driver", follow)

    def catch_up(self) -> None:
        """The driver's account is true again."""
        for remainder in self._lingering:
            self.held.pop(remainder, None)
        self._lingering.clear()

    def ours(self, device: str) -> int:
        return sum(held.get(device, 0) for held in self.held.values())


class StubInstance:
    """One model loaded, being loaded or being unloaded."""

    def __init__(self, engine: StubEngine, model: Model, on_exit: OnExit) -> None:
        self.model = model
        self._engine = engine
        self._scheduler = engine.scheduler
        self._changed = engine.scheduler.condition()
        self._on_exit = on_exit
        self.stopping = False
        self.gone = False
        self.ready = False
        self.sleeping = False
        self.exit_reported = False

    pid = None

    def wait_ready(self, report: Report, timeout: float) -> Endpoint:
        if not self.ready:
            self._load(report, timeout)
        return self._endpoint()

    def warm_up(self, timeout: float) -> None:
        self._pass(min(timeout, 0.05), "warming up")
        if self._engine.faults(self.model).refuse_first_token:
            raise LoadFailed("Its first answer was an error", "no token")
        self.ready = True
        if self._engine.faults(self.model).crash_when_ready:
            self._engine.crash(self.model)
            self._scheduler.pause(0.01)  # its exit may be reported before the load's end

    def responds(self, timeout: float) -> bool | None:
        if self._engine.faults(self.model).stuck:
            self._scheduler.pause(timeout)
            return False
        return True

    def usage(self) -> Usage | None:
        held = self._engine.machine.held.get(self._key)
        device = self._engine.device
        return None if held is None else Usage(device, held.get(device, 0))

    def stop(self, grace: float) -> None:
        faults = self._engine.faults(self.model)
        if faults.refuse_unload and self.ready and not self.gone:
            raise EngineError("The engine refuses to unload it.")
        self._set(stopping=True)
        if self.gone:
            return
        if self.ready:
            self._engine.on_stop(self)
        self._scheduler.pause(min(grace, 0.1 + faults.slow_stop))
        self._engine.drop(self)

    @property
    def asleep(self) -> bool:
        return self.sleeping

    def sleep_footprint(self) -> SleepFootprint | None:
        if not self._engine.sleeps:
            return None
        return SleepFootprint(self._engine.size_of(self.model) // 10, self._engine.size_of(self.model))

    def sleep(self, _timeout: float) -> None:
        self._scheduler.pause(0.5)
        if self._engine.faults(self.model).refuse_sleep:
            raise EngineError("It did not fall asleep.")
        if self.gone:
            raise EngineError("It is gone.")
        self._engine.on_stop(self)
        self.sleeping = True
        size = self._engine.size_of(self.model)
        self._engine.machine.held[self._key] = {self._engine.device: size // 10, HOST_DEVICE: size}

    def wake(self, report: Report, _timeout: float) -> Endpoint:
        report(Evidence("loading_weights", None, "waking up"))
        self._pass(0.5, "waking")
        if self._engine.faults(self.model).refuse_wake:
            raise LoadFailed("It did not wake up", "")
        self.sleeping = False
        self._hold(1.0)
        return self._endpoint()

    def log_tail(self) -> str:
        return "the end of its log"

    def warning(self) -> str | None:
        return None

    def end(self, exit: Exit) -> None:
        """End by itself; its exit is reported a little later, as by a watcher thread."""
        if not self.exit_reported:
            self.exit_reported = True
            self._engine.drop(self)
            self._set()
            if not self.stopping:
                self._scheduler.spawn("exit", lambda: self._on_exit(exit))

    @property
    def _key(self) -> object:
        return self._engine.key(self.model)

    def _endpoint(self) -> Endpoint:
        return Endpoint(self._engine.origin(self.model), model=self.model.source)

    def _load(self, report: Report, timeout: float) -> None:
        faults = self._engine.faults(self.model)
        for part in range(1, 5):
            self._pass(self._engine.load_seconds / 4, "loading")
            self._hold(part / 4)
            report(Evidence("loading_weights", part / 4, f"{part} of 4 shards"))
            if faults.crash_loading and part == 3:
                self._engine.drop(self)
                raise LoadFailed("It crashed while loading", "the last words")
        if faults.hang_loading:
            self._pass(timeout, "hanging")
            raise LoadFailed(f"It was not ready after {timeout:.0f} s", "")

    def _hold(self, share: float) -> None:
        size = int(self._engine.size_of(self.model) * share)
        self._engine.machine.held[self._key] = {self._engine.device: size}

    def _pass(self, seconds: float, what: str) -> None:
        """Let time pass. Raises LoadFailed if it is stopped, or ends, meanwhile."""
        self._changed.wait_for(lambda: self.stopping or self.gone, seconds)
        if self.stopping:
            raise LoadFailed(f"It was stopped while {what}.", "")
        if self.gone:
            raise LoadFailed(f"It ended while {what}.", "")

    def _set(self, *, stopping: bool | None = None) -> None:
        with self._changed:
            self.stopping = self.stopping if stopping is None else stopping
            self._changed.notify_all()


class StubEngine:
    """An engine whose models hold memory and take time to load. `shared`: other clients load and unload there too."""

    def __init__(
        self,
        name: str,
        scheduler: VirtualScheduler,
        machine: Machine,
        models: Iterable[Model],
        *,
        device: str = HOST_DEVICE,
        shared: bool = False,
        sleeps: bool = False,
        load_seconds: float = 2.0,
        on_stop: Callable[[StubInstance], None] = lambda _: None,
        on_end: Callable[[str, Collection[str] | None], None] = lambda _origin, _models: None,
    ) -> None:
        self.name = name
        self.scheduler = scheduler
        self.machine = machine
        self.device = device
        self.sleeps = sleeps
        self.outlives_app = shared or sleeps
        self.adopts_from_others = shared
        self.load_seconds = load_seconds
        self.on_stop = on_stop
        self.on_end = on_end
        """Called when models stop answering at an origin: with their ids, or None for all."""
        self._models = tuple(models)
        self.listed = {model.id: model for model in self._models}
        self._sizes = {model.id: model.required_bytes or 0 for model in self._models}
        self.instances: dict[object, list[StubInstance]] = {}
        """The instances in memory, or being loaded, by what they are held as: one per name."""
        self._foreign: dict[object, bool] = {}
        """Models that other clients have loaded, and whether each is asleep."""
        self._faults: dict[str, Faults] = {}
        self.unreachable = False
        self._shared = shared
        self._origins: dict[object, str] = {}
        self._ports = itertools.count(40_000)

    def faults(self, model: Model) -> Faults:
        return self._faults.setdefault(model.id, Faults())

    def size_of(self, model: Model) -> int:
        return self._sizes[model.id]

    def key(self, model: Model) -> object:
        return (self.name, model.held_as or model.id)

    def origin(self, model: Model) -> str:
        """The origin of a loaded model: a port of its own, or that of the shared server."""
        if self._shared:
            return f"http://{self.name}:11434"
        key = self.key(model)
        if key not in self._origins:
            self._origins[key] = f"http://{self.name}:{next(self._ports)}"
        return self._origins[key]

    def listens(self, origin: str) -> bool:
        """Whether a connection to this origin is accepted."""
        return origin in self._origins.values() or (self._shared and origin == f"http://{self.name}:11434")

    # The port.

    def discover(self) -> Sequence[Model]:
        return list(self.listed.values())

    def describe(self, model: Model) -> Model:
        return model

    def estimate(self, model: Model) -> Need:
        if self.faults(model).refuse_estimate:
            raise RuntimeError("its need is unknown")
        return Need(self.device, self._sizes.get(model.id, 0), "estimated")

    def settings_key(self, _model: Model) -> str:
        return ""

    def fetch(self, model: Model, report: Report, token: CancelToken, /) -> None:
        faults = self.faults(model)
        if faults.fetch_seconds:
            for part in range(1, 5):
                report(Evidence("downloading", part / 4))
                pause(self.scheduler, faults.fetch_seconds / 4, token)
            if faults.refuse_fetch:
                raise EngineError("The download failed.")
            faults.fetch_seconds = 0.0

    def launch(self, model: Model, on_exit: OnExit) -> StubInstance:
        if self.unreachable or self.faults(model).refuse_launch:
            raise EngineError("The engine refuses to begin.")
        if model.id not in self.listed:
            raise EngineError("Its files are gone.")
        instance = StubInstance(self, model, on_exit)
        instance.ready = self._is_ready(self.key(model)) or self._foreign.pop(self.key(model), None) is not None
        self.instances.setdefault(self.key(model), []).append(instance)
        return instance

    def loaded(self, models: Sequence[Model], /) -> Collection[Model]:
        there = {*self._foreign, *filter(self._is_ready, self.instances)}
        return [model for model in models if self.key(model) in there]

    def adopt(self, model: Model, on_exit: OnExit, /) -> StubInstance | None:
        key = self.key(model)
        self.scheduler.pause(0.05)
        asleep = self._foreign.pop(key, None)
        if asleep is None and not self._is_ready(key):
            return None
        instance = StubInstance(self, model, on_exit)
        instance.ready = True
        names = self.instances.setdefault(key, [])
        instance.sleeping = bool(asleep) or any(one.sleeping for one in names)
        names.append(instance)
        return instance

    def remove(self, model: Model, _keep: Collection[str]) -> None:
        self.listed.pop(model.id, None)

    def prepare(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to close."""

    # Changes from outside.

    def drop(self, instance: StubInstance) -> None:
        """Remove an instance from memory, under all of its names."""
        key = self.key(instance.model)
        for one in self.instances.pop(key, [instance]):
            one.gone = True
        self.machine.free(key)
        self._end_answers(key)

    def _end_answers(self, key: object) -> None:
        """End the answers of models held under this key."""
        if self._shared:
            self.on_end(f"http://{self.name}:11434", {m.id for m in self._models if self.key(m) == key})
        elif key in self._origins:
            self.on_end(self._origins.pop(key), None)

    def _is_ready(self, key: object) -> bool:
        return any(one.ready and not one.stopping and not one.gone for one in self.instances.get(key, ()))

    def load_by_other(self, model: Model) -> None:
        """Load a model as another client."""
        key = self.key(model)
        if key not in self.instances and key not in self._foreign:
            self._foreign[key] = False
            self.machine.held[key] = {self.device: self._sizes[model.id]}

    def release_by_other(self, model: Model) -> None:
        """Unload a model as another client."""
        key = self.key(model)
        if self._foreign.pop(key, None) is not None:
            self.machine.held.pop(key, None)
        elif self._is_ready(key):
            self._end_all(key, Exit("Another program had it unloaded", released=True))

    def crash(self, model: Model) -> None:
        """End the instances of a model as a crash does."""
        self._end_all(self.key(model), Exit("Its process ended with exit code 3"))

    def _end_all(self, key: object, exit: Exit) -> None:
        for one in list(self.instances.get(key, ())):
            one.end(exit)

    def survive_restart(self, *, keep: bool) -> None:
        """Survive the end of the app: end what was half loaded; what was loaded is kept, if `keep`, to be adopted."""
        for key, (first, *_) in list(self.instances.items()):
            stays, held = keep and self._is_ready(key), self.machine.held.get(key)
            self.drop(first)
            self.machine.catch_up()
            if stays and held is not None:
                self._foreign[key], self.machine.held[key] = first.sleeping, held


class StubStore:
    """Notes and past loads in memory."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.loads: list[LoadRecord] = []
        self.failing = False

    def get(self, key: str) -> str | None:
        return self.notes.get(key)

    def put(self, key: str, value: str) -> None:
        if self.failing:
            raise OSError("database is locked")
        self.notes[key] = value

    def add(self, record: LoadRecord) -> None:
        if self.failing:
            raise OSError("database is locked")
        self.loads.append(record)

    def recent_all(self, _limit: int) -> list[LoadRecord]:
        return list(self.loads)


def model(model_id: str, engine: str, gb: float, **fields: object) -> Model:
    """A catalogue entry that needs `gb` decimal gigabytes."""
    plain = Model(model_id, engine, source=model_id, size_bytes=int(gb * GB), required_bytes=int(gb * GB))
    return replace(plain, **fields)  # type: ignore[arg-type]
