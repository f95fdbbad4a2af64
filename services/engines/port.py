"""The port that every engine adapter implements, and the values that cross it.

An adapter is blocking code without lifecycle state of its own: the switcher calls it from jobs in greenlets of their
own. Differences between engines stay behind this port.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from services.cancellation import CancelToken

Basis = Literal["measured", "learned", "declared", "estimated"]
"""Where a figure comes from, the most reliable first."""

Stage = Literal["downloading", "loading_weights", "initializing_gpu", "warming_up"]
"""The stages of one load, in order."""
STAGE_ORDER: tuple[Stage, ...] = get_args(Stage)

Kind = Literal["text", "image", "vision", "embedding"]
"""What a model does: generate text, draw pictures, judge pictures, or make vectors of texts."""

HOST_DEVICE = "host"
"""Id of the device that stands for this machine's RAM."""


@dataclass(frozen=True, slots=True)
class Model:
    """One catalogue entry. Sizes are bytes, times seconds, unknown is None.

    `source` is what the engine loads: a file path for llamacpp, a name with its tag for ollama. `aliases` are other ids
    that requests may use. `fault` says why the model can't be loaded at all (a damaged file). `digest` identifies the
    version of the source. `held_as` identifies the weights in memory: models of one engine with the same value share
    one instance, accounted once; None if unknown or never shared. `files` are the paths of its files on this disk,
    links and their targets, `companions` files loaded with it; empty if the engine doesn't report them. `fetch_bytes`
    have to be fetched before it can be loaded, 0 if none. Only a model of the `kind` text can become the active one.
    `started_elsewhere`: it is loaded on a server that another program started, so that it can't be unloaded from here.
    Files of one that is not `removable` are shared with other programs, and not deleted from here.
    A `remote` model runs on another service: it takes no memory here, and becomes active only when someone chooses it.
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
    kind: Kind = "text"
    started_elsewhere: bool = False
    remote: bool = False
    removable: bool = True


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that a model takes on a device when loaded."""

    device: str
    bytes: int
    basis: Basis


@dataclass(frozen=True, slots=True)
class Usage:
    """Memory that a loaded or loading model holds, measured now.

    `mapped_bytes` is the part of `bytes` that the kernel also counts as available: pages of a mapped file.
    `spilled_bytes` is what it holds in host RAM because it did not fit on its GPU.
    """

    device: str
    bytes: int
    mapped_bytes: int = 0
    spilled_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SleepFootprint:
    """Memory that a model keeps while it sleeps; waking it is faster than loading it.

    `keeps_bytes` stay on its device; `host_bytes` of host RAM are added to what it holds there awake.
    """

    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """One observation of a load: its stage and, if something was counted, the progress.

    `fraction` is 0 to 1 of this stage, None if nothing was counted; `detail` is for people ("3 of 4 shards").
    """

    stage: Stage
    fraction: float | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address of a ready instance: an origin such as `http://127.0.0.1:40123`, and headers to add to requests.

    `model` is the name that the engine expects in a request; None if any will do. `base_path` is the path in whose
    place requests have `/v1`.
    """

    origin: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    model: str | None = None
    base_path: str = "/v1"


@dataclass(frozen=True, slots=True)
class Exit:
    """An instance ended unasked. `cause` is a sentence without its full stop.

    `released`: nothing failed, another client had the engine unload it.
    """

    cause: str
    released: bool = False


class EngineError(Exception):
    """An engine could not do what was asked. The text is for people: what happened, why, what to do."""


class LoadFailed(EngineError):
    """A load failed. `cause` is the first cause, `log_tail` the engine's last log lines."""

    def __init__(self, cause: str, log_tail: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.log_tail = log_tail


class NotResponding(EngineError):
    """A model to adopt is loaded but doesn't answer yet; try again at the next pass."""


ADOPT_TIMEOUT = 60.0
"""Seconds that a process or container of ours may be silent before it is adopted; then it is ended."""

GpuBytes = Callable[[str, int], int | None]
"""Maps (device id, pid) to the bytes the process holds there, None if the driver doesn't report it."""
Report = Callable[[Evidence], None]
OnExit = Callable[[Exit], None]
"""Called once, from any thread, when an instance ends unasked."""


class Instance(Protocol):
    """A model launched on an engine: being loaded, loaded, asleep, or being unloaded."""

    @property
    def model(self) -> Model:
        """The model it was made for. `held_as` is updated to what really is in memory, once known."""

    @property
    def pid(self) -> int | None:
        """The process that holds the model, if it is one of ours."""

    def wait_ready(self, report: Report, timeout: float) -> Endpoint:
        """Block until the engine reports the model as ready. Raises LoadFailed."""

    def warm_up(self, timeout: float) -> None:
        """Generate one real token. Raises LoadFailed."""

    def responds(self, timeout: float, /) -> bool | None:
        """Return whether its generating part replies within `timeout` seconds.

        None if it can't be probed without queueing for generation. Never raises.
        """

    def usage(self) -> Usage | None:
        """Return what it holds now; None if unknown."""

    def stop(self, grace: float) -> None:
        """Block until it is gone, by force after `grace` seconds. All models that share its weights go with it.

        Idempotent and thread-safe: a `wait_ready` or `warm_up` under way raises LoadFailed. Raises EngineError if it
        can't be stopped; it goes on serving then.
        """

    @property
    def asleep(self) -> bool:
        """Whether it sleeps: it holds little memory on its device, and answers no request until `wake`."""

    def sleep_footprint(self) -> SleepFootprint | None:
        """Return what it would keep asleep; None if it can't sleep."""

    def sleep(self, timeout: float, /) -> None:
        """Block until it sleeps. Raises EngineError; its state is undefined then, and it has to be stopped."""

    def wake(self, report: Report, timeout: float, /) -> Endpoint:
        """Block until a sleeping instance answers again. Raises LoadFailed, as `wait_ready`."""

    def log_tail(self) -> str:
        """Return the engine's last log lines about this instance."""

    def warning(self) -> str | None:
        """Return a message about a working instance: it runs partly on the CPU, or it will be unloaded at five."""


class NoSleepMixin:
    """Mixin: the sleep part of `Instance` for engines that don't support it."""

    @property
    def asleep(self) -> bool:
        return False

    def sleep_footprint(self) -> SleepFootprint | None:
        return None

    def sleep(self, _timeout: float, /) -> None:
        raise EngineError("This engine's models can't sleep.")

    def wake(self, _report: Report, _timeout: float, /) -> Endpoint:
        raise LoadFailed("This engine's models can't sleep, so there is nothing to wake.")


class Engine(Protocol):
    """Serves models."""

    @property
    def name(self) -> str: ...

    @property
    def outlives_app(self) -> bool:
        """Whether its instances stay loaded when the app ends, to be adopted by the next run."""

    @property
    def adopts_from_others(self) -> bool:
        """Whether an instance that it adopts may have been loaded by another program, which may be using it."""

    def discover(self) -> Sequence[Model]:
        """Return the models that exist without being listed in the settings."""

    def describe(self, model: Model) -> Model:
        """Complete a listed model with what the engine knows (size, fault). Never raises."""

    def estimate(self, model: Model) -> Need:
        """Estimate the memory of a model that was never loaded; bytes are 0 if nothing is known."""

    def settings_key(self, model: Model) -> str:
        """Return a short string of everything that changes a model's load time or memory."""

    def fetch(self, model: Model, report: Report, token: CancelToken, /) -> None:
        """Block until all files that loading takes are on this machine. Runs before memory is freed for the model.

        Reports the stage `downloading` if anything is missing, else nothing. Raises EngineError, and Cancelled within a
        second of the cancellation.
        """

    def launch(self, model: Model, on_exit: OnExit) -> Instance:
        """Begin loading and return at once. Raises EngineError if it can't begin."""

    def loaded(self, models: Sequence[Model], /) -> Collection[Model]:
        """Return which of these models are loaded or asleep, by whichever client, as last seen.

        Of models with the same `held_as`, all. No I/O; never raises; called every second.
        """

    def adopt(self, model: Model, on_exit: OnExit, /) -> Instance | None:
        """Return an instance for a model that is loaded or asleep and was not launched here; None if it is not loaded.

        Takes a few seconds at most. Raises NotYet while the model doesn't answer; `loaded` goes on returning it, and
        the caller tries again later. After ADOPT_PATIENCE seconds without an answer, an instance of ours is ended, and
        None returned.
        """

    def remove(self, model: Model, keep: Collection[str], /) -> None:
        """Delete the files of a model that is not loaded, except those in `keep`, which other models use.

        Raises EngineError if they can't or must not be deleted.
        """

    def prepare(self) -> None:
        """Do in advance what makes the next load faster. Called once the app serves; returns at once."""

    def close(self) -> None:
        """Release everything the engine holds for itself."""
