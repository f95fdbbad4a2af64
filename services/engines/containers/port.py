"""The port to whatever runs containers, and the values that cross it.

Calls block, but never for good: a runtime that hangs ends them with RuntimeHangs. Streams (`Stream`) block for as long
as there is nothing to say, and are ended by closing them from another thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, TypeVar

from services.abort import Abort
from services.engines.port import EngineError

MANAGED_LABEL = "switchyard.managed"
MODEL_LABEL = "switchyard.model"
SPEC_LABEL = "switchyard.spec"
HASH_LENGTH = 16

State = Literal["created", "running", "paused", "restarting", "removing", "exited", "dead"]
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Mount:
    """`source` is a path of the host where it is absolute, else the name of a volume; `target` is in the container."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """A container to be made.

    `port` is the one that it listens on; the runtime publishes it on a loopback port of its own choice. `gpus` are
    GPU UUIDs, `shm_bytes` the size of its /dev/shm (None: the runtime's default), which `host_ipc` replaces by the
    host's. `labels` come on top of those that every managed container bears.
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
        """Tells whether a container that exists was made from an equal spec, whatever its name and labels are."""
        matters = {key: value for key, value in asdict(self).items() if key not in ("name", "labels")}
        text = json.dumps(matters, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]

    @property
    def all_labels(self) -> dict[str, str]:
        return {**self.labels, MANAGED_LABEL: "1", SPEC_LABEL: self.spec_hash}


@dataclass(frozen=True, slots=True)
class Container:
    """A container as it was at one moment.

    `host_port` is where its port is published on this machine, None unless it runs. `exit_code` is that of its last
    run, None while there was none. `started_at` is seconds since the epoch. `pid` is its first process as the
    runtime's host counts, None unless it runs; `ContainerRuntime.pids` names all.
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
        """Whether Switchyard made it."""
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
    """Whether the runtime can be used. `problem` and `error`, in words, say why not; None where it can.

    `nvidia` tells whether an NVIDIA runtime is registered.
    """

    running: bool
    version: str | None = None
    nvidia: bool = False
    error: str | None = None
    problem: RuntimeProblem | None = None


class ContainerError(EngineError):
    """The runtime could not do what was asked. The text is for people: what happened, why, what to do.

    `problem` is why the runtime as a whole can't be used, where that is the cause.
    """

    problem: RuntimeProblem = "unusable"


class RuntimeDown(ContainerError):
    """It isn't running, isn't installed, or went away."""

    problem: RuntimeProblem = "not_running"


class RuntimeMissing(RuntimeDown):
    """It isn't installed."""

    problem: RuntimeProblem = "not_installed"


class RuntimeForbidden(ContainerError):
    """This user may not use it."""

    problem: RuntimeProblem = "forbidden"


class RuntimeHangs(ContainerError):
    """It took too long to answer. What was asked may still happen."""

    problem: RuntimeProblem = "unresponsive"


class NoGpuRuntime(ContainerError):
    """It can't hand GPUs to containers."""


class ImageMissing(ContainerError):
    """The image is not on the runtime's machine, or in no registry that it knows."""


class NameTaken(ContainerError):
    """A container of that name exists. `holder` is that container, None when it went meanwhile."""

    def __init__(self, message: str, holder: Container | None) -> None:
        super().__init__(message)
        self.holder = holder


class NotOurs(ContainerError):
    """Switchyard did not make the container, and so neither stops nor removes it."""


class ContainerGone(ContainerError):
    """The container does not exist any more."""


class Stream(Protocol[T_co]):
    """What comes live. `next` blocks until there is something and ends when nothing can come any more."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __next__(self) -> T_co: ...

    def close(self) -> None:
        """End it, from any thread, also while `next` blocks in another. Safe to call twice."""


PullReport = Callable[[int, int | None], None]
"""Bytes here and bytes in all; None in all as long as the size of a layer is unknown."""


class ContainerRuntime(Protocol):
    """Runs containers. Only those that Switchyard made are ever stopped or removed, else NotOurs is raised.

    Any method but `available` raises RuntimeDown, RuntimeForbidden, RuntimeHangs, or ContainerError with the runtime's
    own words; those that take an id raise ContainerGone unless they say otherwise.
    """

    def available(self) -> RuntimeStatus:
        """Whether it can be used now. Never raises."""

    def create(self, spec: ContainerSpec) -> str:
        """Make a container that doesn't run yet; its id. Raises ImageMissing and NameTaken."""

    def start(self, container_id: str) -> None:
        """Run it. Raises NoGpuRuntime; a container that could not start still exists."""

    def attach(self, container_id: str) -> Stream[bytes]:
        """Stream what a container that doesn't run yet will write, stdout and stderr in one, in pieces as they come.

        Ends when the container ends and when the runtime goes away.
        """

    def logs_tail(self, container_id: str, lines: int) -> str:
        """The last lines of what it has written."""

    def wait(self, container_id: str, timeout: float) -> int | None:
        """Its exit code once it has ended; None when it still runs after `timeout` seconds.

        One that was never started counts as ended, with 0.
        """

    def stop(self, container_id: str, grace: float) -> None:
        """Block until it has ended, by force after `grace` seconds. One that has ended or is gone will do."""

    def remove(self, container_id: str) -> None:
        """Remove it, by force if it runs. One that is gone will do."""

    def inspect(self, container_id: str) -> Container:
        """How it is now."""

    def by_name(self, name: str) -> Container | None:
        """The container of that name, whoever made it."""

    def find(self, labels: Mapping[str, str]) -> list[Container]:
        """Switchyard's containers that bear these labels, running or not."""

    def pids(self, container_id: str) -> tuple[int, ...]:
        """Every process in it, as the runtime's host counts; none when it doesn't run."""

    def image_present(self, image: str) -> bool: ...

    def pull(self, image: str, report: PullReport, abort: Abort) -> None:
        """Block until the image is here. Raises ImageMissing, ContainerError, and Aborted at once on `abort`.

        Layers that have arrived stay for the next try.
        """

    def close(self) -> None:
        """Let go of the connections to it; containers go on, and the next call makes new ones."""
