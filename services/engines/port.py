"""The port that every engine implements, and the values that cross it.

An adapter is straight-line blocking code: the switcher runs its methods in workers of its own and stays
responsive. What differs between engines stays behind this port.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from services.abort import Abort

Basis = Literal["measured", "learned", "declared", "estimated"]
"""Where a figure comes from, best first."""

Stage = Literal["downloading", "loading_weights", "initializing_gpu", "warming_up"]
"""The stages of one load, in order."""

HOST_DEVICE = "host"
"""The id of the device that stands for this machine's RAM."""


@dataclass(frozen=True, slots=True)
class Model:
    """One catalogue entry.

    `source` is what the engine loads (a file path for llamacpp, a name with its tag for ollama); sizes are bytes,
    times seconds, and what nobody knows is None. `aliases` are other ids that people may say. `fault` says why the
    model can't be loaded at all (a damaged file), in words. `digest` tells versions of the same source apart.
    `held_as` says what of it lies in memory once it is loaded: models of one engine with the same are served by one
    instance, whose memory is held once; None when that isn't known, or can't happen.
    `files` on this disk are what it consists of, by every path that leads to them, and `companions` what it is loaded
    with besides; empty where its engine doesn't tell.
    `fetch_bytes` have to come to this machine before it can be loaded: 0 when all is here.
    """

    id: str
    engine: str
    source: str
    description: str = ""
    size_bytes: int | None = None
    required_bytes: int | None = None
    load_seconds: float | None = None
    tags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    digest: str | None = None
    held_as: str | None = None
    fetch_bytes: int | None = 0
    files: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes on a device when loaded."""

    device: str
    bytes: int
    basis: Basis


@dataclass(frozen=True, slots=True)
class Usage:
    """What a loaded (or loading) model holds on one device, measured now.

    `mapped_bytes` is the part of `bytes` that the kernel would also call available: pages of a mapped file.
    `spilled_bytes` is what it holds in this machine's RAM besides, because it did not fit on its GPU.
    """

    device: str
    bytes: int
    mapped_bytes: int = 0
    spilled_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Rest:
    """What a loaded model goes on holding while it sleeps, which is sooner ended than a load begun anew.

    `keeps_bytes` of its device; `host_bytes` of this machine's RAM, besides what it holds of that awake.
    """

    keeps_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """One observation of a load: the stage it is in and, where something was counted, how far it is.

    `fraction` is 0 to 1 of this stage, None when nothing was counted; `detail` is for people ("3 of 4 shards").
    """

    stage: Stage
    fraction: float | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a ready instance answers: an origin such as `http://127.0.0.1:40123`, and headers to add.

    `model` is the name that the engine there wants to read in a request; None when any will do.
    """

    origin: str
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Exit:
    """An instance ended without having been asked to, and why: words without a full stop.

    `released`: nothing is broken, somebody else had the engine unload it.
    """

    cause: str
    released: bool = False


class EngineError(Exception):
    """An engine could not do what was asked. The text is for people: what happened, why, what to do."""


class LoadFailed(EngineError):
    """A load ended without a ready model. `cause` is the first cause, `log_tail` the engine's last lines."""

    def __init__(self, cause: str, log_tail: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.log_tail = log_tail


class NotYet(EngineError):
    """What is to be adopted is there but doesn't answer yet: ask again at one of the next looks."""


ADOPT_PATIENCE = 60.0
"""Seconds for which a process or container of ours may be silent before it is adopted; then it is ended."""

GpuBytes = Callable[[str, int], int | None]
"""(device id, pid) to the bytes that process holds there, None when the driver doesn't say."""
Report = Callable[[Evidence], None]
OnExit = Callable[[Exit], None]
"""Called once, from any thread, when an instance ends without having been asked to."""


class Instance(Protocol):
    """A model launched on an engine: being loaded, loaded, asleep, or being unloaded."""

    @property
    def model(self) -> Model:
        """The model that it was made for; its `held_as` is what really lies in memory, as far as that is known."""

    @property
    def pid(self) -> int | None:
        """The process that holds the model, where it is one of ours."""

    def wait_ready(self, report: Report, timeout: float) -> Endpoint:
        """Block until the engine itself says that the model answers. Raises LoadFailed."""

    def warm_up(self, timeout: float) -> None:
        """Generate one real token. Raises LoadFailed."""

    def responds(self, timeout: float, /) -> bool | None:
        """Whether the part of it that generates gives a sign of life within `timeout` seconds.

        None when it can't be asked without waiting for its turn to generate. Never raises.
        """

    def usage(self) -> Usage | None:
        """What it holds now; None when that can't be known."""

    def stop(self, grace: float) -> None:
        """Block until it is gone, by force after `grace` seconds, and with it all that is held as the same.

        Safe to call twice and from another thread: a `wait_ready` or `warm_up` under way then raises LoadFailed.
        Raises EngineError when it can't be made to go: it goes on serving then.
        """

    @property
    def asleep(self) -> bool:
        """Whether it sleeps: it holds little of its device, and answers nobody until `wake`."""

    def rest(self) -> Rest | None:
        """What it would keep if it slept instead of being stopped; None when it can't sleep."""

    def sleep(self, timeout: float, /) -> None:
        """Block until it sleeps. Raises EngineError; nobody knows how it is then, so it has to be stopped."""

    def wake(self, report: Report, timeout: float, /) -> Endpoint:
        """Block until one that sleeps answers again. Raises LoadFailed, as `wait_ready` does."""

    def log_tail(self) -> str:
        """The last lines of what the engine said about this instance."""

    def warning(self) -> str | None:
        """What people should know about it though it works: it runs partly on the CPU, it will be unloaded at five."""


class Sleepless:
    """The part of `Instance` about sleep, for engines whose models can't."""

    @property
    def asleep(self) -> bool:
        return False

    def rest(self) -> Rest | None:
        return None

    def sleep(self, _timeout: float, /) -> None:
        raise EngineError("This engine's models can't sleep.")

    def wake(self, _report: Report, _timeout: float, /) -> Endpoint:
        raise LoadFailed("This engine's models can't sleep, so there is nothing to wake.")


class Engine(Protocol):
    """A thing that serves models."""

    @property
    def name(self) -> str: ...

    @property
    def outlives_app(self) -> bool:
        """Whether its instances stay loaded when the app goes, to be found again by the next one."""

    def discover(self) -> Sequence[Model]:
        """Look what models are there by themselves, without being listed in the settings."""

    def describe(self, model: Model) -> Model:
        """Complete a listed model with what the engine knows (size, fault). Never raises."""

    def estimate(self, model: Model) -> Need:
        """What loading it takes, before it was ever loaded. Bytes 0 when there is nothing to go by."""

    def settings_key(self, model: Model) -> str:
        """Whatever changes how long a load takes or how much it holds, as one short string."""

    def fetch(self, model: Model, report: Report, abort: Abort, /) -> None:
        """Block until all that loading it takes is on this machine. It comes before anybody makes room for it.

        Reports the stage `downloading` if there is something to fetch, else nothing. Raises EngineError, and Aborted
        within a second of `abort`.
        """

    def launch(self, model: Model, on_exit: OnExit) -> Instance:
        """Begin loading, and return at once. Raises EngineError when it can't even begin."""

    def loaded(self, models: Sequence[Model], /) -> Collection[Model]:
        """Which of these models of it are loaded there, or asleep, whichever client loaded them, as last seen.

        Of those with the same `held_as`, all. No I/O, and never raises: it is called every second.
        """

    def adopt(self, model: Model, on_exit: OnExit, /) -> Instance | None:
        """The instance of a model that is loaded, or asleep, without having been launched here; None where it isn't.

        Takes a few seconds at most. Raises NotYet while it is there but doesn't answer: `loaded` goes on naming it, and
        it is to be shown, left alone, and asked for again. After ADOPT_PATIENCE seconds of silence one that is ours is
        ended, and None returned.
        """

    def remove(self, model: Model, keep: Collection[str], /) -> None:
        """Delete the files of a model that is not loaded, but for those in `keep`, which others use.

        Raises EngineError when they can't be deleted, or must not.
        """

    def prepare(self) -> None:
        """Do ahead what makes the next load start sooner; called once the app serves. Returns at once."""

    def close(self) -> None:
        """Let go of everything the engine holds for itself."""
