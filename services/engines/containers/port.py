"""The port to a container runtime, and the values that cross it.

Calls block for a bounded time: if the runtime hangs they raise RuntimeHangs. Streams (`Stream`) block until there is
output, and are ended by closing them from another thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, TypeVar

from services.cancellation import CancelToken
from services.engines.port import EngineError

MANAGED_LABEL = "switchyard.managed"
MODEL_LABEL = "switchyard.model"
SPEC_LABEL = "switchyard.spec"
HASH_LENGTH = 16

State = Literal["created", "running", "paused", "restarting", "removing", "exited", "dead"]
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount. `source` is a path on the host if absolute, else the name of a volume; `target` is in the container."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """A container to create.

    `port` is the one it listens on, published on a loopback port of the runtime's choice. `gpus` are GPU UUIDs.
    `shm_bytes` is the size of its /dev/shm (None: the runtime's default); with `host_ipc` it uses the host's. `labels`
    are added to those of every managed container.
    """

    name: str
    image: str
    port: int
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    gpus: tuple[str, ...] = ()
    shm_bytes: int | None = None
    host_ipc: bool = False

    @property
    def spec_hash(self) -> str:
        """Hash of everything but name and labels; equal for equal containers."""
        matters = {key: value for key, value in asdict(self).items() if key not in ("name", "labels")}
        text = json.dumps(matters, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]

    @property
    def all_labels(self) -> dict[str, str]:
        return {**self.labels, MANAGED_LABEL: "1", SPEC_LABEL: self.spec_hash}


@dataclass(frozen=True, slots=True)
class Container:
    """A container at one moment.

    `host_port` is where its port is published, None unless it runs. `exit_code` is that of its last run, None if it
    never ran. `started_at` is seconds since the epoch. `pid` is its first process in the host's pid namespace, None
    unless it runs; `ContainerRuntime.pids` returns all.
    """

    id: str
    name: str
    state: State
    image: str
    labels: Mapping[str, str]
    host_port: int | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    started_at: float | None = None
    pid: int | None = None

    @property
    def managed(self) -> bool:
        """Whether Switchyard created it."""
        return self.labels.get(MANAGED_LABEL) == "1"

    @property
    def model(self) -> str | None:
        return self.labels.get(MODEL_LABEL)

    @property
    def spec_hash(self) -> str | None:
        return self.labels.get(SPEC_LABEL)


RuntimeProblem = Literal["not_running", "not_installed", "forbidden", "unresponsive", "unusable"]


@dataclass(frozen=True, slots=True)
class RuntimeStatus:
    """Whether the runtime can be used. If not, `problem` says why and `error` says it for people.

    `nvidia`: an NVIDIA runtime is registered.
    """

    running: bool
    version: str | None = None
    nvidia: bool = False
    error: str | None = None
    problem: RuntimeProblem | None = None


class ContainerError(EngineError):
    """The runtime could not do what was asked. The text is for people: what happened, why, what to do.

    `problem` is why the runtime as a whole can't be used, if that is the cause.
    """

    problem: RuntimeProblem = "unusable"


class RuntimeDown(ContainerError):
    """It isn't running, isn't installed, or has stopped."""

    problem: RuntimeProblem = "not_running"


class RuntimeMissing(RuntimeDown):
    """It isn't installed."""

    problem: RuntimeProblem = "not_installed"


class RuntimeForbidden(ContainerError):
    """This user may not use it."""

    problem: RuntimeProblem = "forbidden"


class RuntimeHangs(ContainerError):
    """It did not answer in time. What was asked may still happen."""

    problem: RuntimeProblem = "unresponsive"


class NoGpuRuntime(ContainerError):
    """It can't give GPUs to containers."""


class ImageMissing(ContainerError):
    """The image is neither on the runtime's machine nor in a registry it can reach."""


class NameTaken(ContainerError):
    """A container of that name exists. `holder` is that container, None if it is gone by now."""

    def __init__(self, message: str, holder: Container | None) -> None:
        super().__init__(message)
        self.holder = holder


class NotOurs(ContainerError):
    """Switchyard did not create the container, so it neither stops nor removes it."""


class ContainerGone(ContainerError):
    """The container no longer exists."""


class Stream(Protocol[T_co]):
    """Live output. `next` blocks until there is some, and ends when there can't be more."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __next__(self) -> T_co: ...

    def close(self) -> None:
        """End the stream. Thread-safe, also while `next` blocks in another thread; idempotent."""


PullReport = Callable[[int, int | None], None]
"""Takes bytes done and in total; the total is None while the size of a layer is unknown."""


class ContainerRuntime(Protocol):
    """Runs containers. Stops and removes only those that Switchyard created, and raises NotOurs for others.

    Every method but `available` raises RuntimeDown, RuntimeForbidden, RuntimeHangs, or ContainerError with the
    runtime's message; methods that take an id raise ContainerGone unless they say otherwise.
    """

    def available(self) -> RuntimeStatus:
        """Return whether it can be used now. Never raises."""

    def create(self, spec: ContainerSpec) -> str:
        """Create a container without starting it; return its id. Raises ImageMissing and NameTaken."""

    def start(self, container_id: str) -> None:
        """Start it. Raises NoGpuRuntime; a container that failed to start still exists."""

    def attach(self, container_id: str) -> Stream[bytes]:
        """Stream the output of a container that isn't started yet, stdout and stderr merged, as it arrives.

        Ends when the container ends or the runtime stops.
        """

    def logs_tail(self, container_id: str, lines: int) -> str:
        """Return the last lines of its output."""

    def wait(self, container_id: str, timeout: float) -> int | None:
        """Return its exit code once it has ended; None if it still runs after `timeout` seconds.

        A container that was never started counts as ended, with 0.
        """

    def stop(self, container_id: str, grace: float) -> None:
        """Block until it has ended, by force after `grace` seconds. Does nothing if it has ended or is gone."""

    def remove(self, container_id: str) -> None:
        """Remove it, by force if it runs. Does nothing if it is gone."""

    def inspect(self, container_id: str) -> Container:
        """Return its current state."""

    def by_name(self, name: str) -> Container | None:
        """Return the container of that name, whoever created it."""

    def find(self, labels: Mapping[str, str]) -> list[Container]:
        """Return Switchyard's containers with these labels, running or not."""

    def pids(self, container_id: str) -> tuple[int, ...]:
        """Return its processes in the host's pid namespace; none unless it runs."""

    def image_present(self, image: str) -> bool: ...

    def pull(self, image: str, report: PullReport, token: CancelToken) -> None:
        """Block until the image is complete.

        Raises ImageMissing, ContainerError, and Cancelled as soon as `token` is cancelled. Complete layers are kept for
        the next try.
        """

    def close(self) -> None:
        """Close the connections to it. Containers go on, and the next call opens new connections."""
