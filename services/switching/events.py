"""Publish and subscribe of immutable snapshots.

The switcher publishes; everyone else reads `Board.current`, or waits for a newer version. A reader never locks the
writer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from services.engines.port import Basis, Endpoint, Model, SleepFootprint, Usage
from services.switching.traffic import Traffic

InstanceState = Literal["loading", "running", "unloading", "asleep"]
SwitchStage = Literal[
    "requested",
    "checking_memory",
    "downloading",
    "draining",
    "unloading",
    "waiting_for_memory",
    "loading",
    "warming_up",
    "cancelling",
    "rolling_back",
    "ready",
    "failed",
    "cancelled",
    "refused",
    "rolled_back",
]
FINAL_STAGES: frozenset[SwitchStage] = frozenset({"ready", "failed", "cancelled", "refused", "rolled_back"})


@dataclass(frozen=True, slots=True)
class LoadView:
    """Progress of one load or download.

    `percent` is 0 to 100, never falls, and reaches 100 only when the model is ready. `basis` says where the figures
    come from, `eta_seconds` is None when there is no honest forecast.
    """

    percent: int
    stage: str
    detail: str | None = None
    basis: Basis | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance at one version. Times are Unix seconds. `traffic` is the live object, everything else a copy.

    `entry` is the catalogue entry it was loaded from; the catalogue may have dropped it since. `shares` is the id of
    the model whose instance this one uses; the memory is accounted to that model.
    """

    model: str
    engine: str
    state: InstanceState
    device: str
    traffic: Traffic
    entry: Model
    pid: int | None = None
    endpoint: Endpoint | None = None
    load: LoadView | None = None
    usage: Usage | None = None
    reserved_bytes: int = 0
    loaded_at: float | None = None
    warning: str | None = None
    sleep_footprint: SleepFootprint | None = None
    shares: str | None = None
    unresponsive: bool = False
    """Whether it has shown no activity for too long although it has work."""
    drain_until: float | None = None
    """Deadline for the requests in flight while an unload waits for them (Unix seconds)."""
    adopted: bool = False
    """Whether it was found loaded, not loaded by this run of the app."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a requested model is not running: cause, last log lines, time (Unix seconds)."""

    cause: str
    log_tail: str
    at: float


@dataclass(frozen=True, slots=True)
class Loss:
    """A loaded model that ended unasked: cause (a sentence), last log lines, time (Unix seconds)."""

    model: str
    cause: str
    log_tail: str
    at: float


@dataclass(frozen=True, slots=True)
class Unloading:
    """A model that a switch unloads or puts to sleep, and the reason as text."""

    model: str
    reason: str
    sleeps: bool = False


@dataclass(frozen=True, slots=True)
class SwitchView:
    """State of one switch.

    `error` is an error code of the HTTP contract; `message` says why the switch failed and what that cost. `restored`
    lists the models it had unloaded that are loaded again.
    """

    id: str
    to_model: str
    from_model: str | None
    requested_by: str
    started_at: float
    stage: SwitchStage = "requested"
    percent: int = 0
    detail: str | None = None
    basis: Basis | None = None
    eta_seconds: float | None = None
    unloads: tuple[Unloading, ...] = ()
    finished_at: float | None = None
    error: str | None = None
    message: str | None = None
    log_tail: str = ""
    restored: tuple[str, ...] = ()

    @property
    def final(self) -> bool:
        return self.stage in FINAL_STAGES


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole lifecycle state at one version. `switch` is the one under way, `last_switch` the last that ended.

    `loss` is the last model that ended unasked, until it is requested again or dismissed. `notices` holds one message
    per model for events that are no failures, such as an unload by another client. `last_used` maps unloaded models to
    Unix times.
    """

    version: int = 0
    instances: Mapping[str, InstanceView] = field(default_factory=lambda: MappingProxyType({}))
    failures: Mapping[str, Failure] = field(default_factory=lambda: MappingProxyType({}))
    notices: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    active_model: str | None = None
    switch: SwitchView | None = None
    last_switch: SwitchView | None = None
    loss: Loss | None = None
    queued: tuple[str, ...] = ()
    last_used: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    answered: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Number of requests that instances which are gone had answered, by model."""

    @property
    def origins(self) -> frozenset[str]:
        """The HTTP origins of all instances."""
        return frozenset(view.endpoint.origin for view in self.instances.values() if view.endpoint is not None)

    def holder(self, model: Model) -> InstanceView | None:
        """Return the instance that serves `model`, or would serve it.

        That is the model's own instance, else one of the same engine whose weights in memory are the same
        (`Model.held_as`).
        """
        own = self.instances.get(model.id)
        if own is not None:
            return self.instances.get(own.shares or model.id, own)
        if model.held_as is None:
            return None
        same = (v for v in self.instances.values() if (v.engine, v.entry.held_as) == (model.engine, model.held_as))
        return next((view for view in same if view.shares is None), None)


class Board:
    """The current snapshot, and a way to wait for the next one. Thread-safe."""

    def __init__(self) -> None:
        self._publishing = threading.Lock()
        self._outdated = threading.Event()
        """Set when the current snapshot is no longer the latest. Each has its own: waking all who wait for one takes a
        sixth of the time that a condition takes, which wakes them one by one with a lock."""
        self._current = Snapshot()
        self.closed = False
        """Whether the app is shutting down; streams end when it is set."""

    @property
    def current(self) -> Snapshot:
        return self._current

    def publish(self, **changes: Any) -> Snapshot:
        """Replace the current snapshot: `changes` are fields by name, the version grows by one."""
        with self._publishing:
            self._current = snapshot = replace(self._current, version=self._current.version + 1, **changes)
            self._wake()
            return snapshot

    def touch(self) -> None:
        """Publish an unchanged snapshot as a new version, because something that pages show beside it has changed."""
        self.publish()

    def wait_newer(self, version: int, timeout: float) -> Snapshot:
        """Return the current snapshot once its version exceeds `version`, or after `timeout` seconds."""
        outdated = self._outdated  # taken first: a snapshot published after this line sets it
        if self._current.version <= version and not self.closed:
            outdated.wait(timeout)
        return self._current

    def close(self) -> None:
        """Set `closed` and wake everyone in `wait_newer`."""
        with self._publishing:
            self.closed = True
            self._wake()

    def _wake(self) -> None:
        outdated, self._outdated = self._outdated, threading.Event()
        outdated.set()
