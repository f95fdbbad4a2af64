"""Publish and subscribe of immutable snapshots.

The switcher publishes; everyone else reads `current`, or waits for a newer version. A reader never locks the writer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from services.engines.port import Basis, Endpoint, Model, Rest, Usage
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
    """How a load stands: percent 0-100 (never falling, 100 only when ready), what was seen, how long it may take."""

    percent: int
    stage: str
    detail: str | None = None
    basis: Basis | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance as the switcher last saw it. Times are Unix seconds; `traffic` alone is live.

    `entry` is the catalogue entry it was loaded from, which the catalogue may have lost since. `shares` names the model
    whose instance it is as well, and whose memory is counted there.
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
    rest: Rest | None = None
    shares: str | None = None
    silent: bool = False
    """Whether it gives no sign of life though it should."""
    drain_until: float | None = None
    """Until when the answers under way may take, while the unload of it waits for them."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model is not running though it was asked to."""

    cause: str
    log_tail: str
    at: float


@dataclass(frozen=True, slots=True)
class Loss:
    """A model that was loaded and ended by itself: why (a sentence), the end of its log, and when (Unix seconds)."""

    model: str
    cause: str
    log_tail: str
    at: float


@dataclass(frozen=True, slots=True)
class Unloading:
    """A model that a switch unloads, or puts to sleep, and the reason in words."""

    model: str
    reason: str
    sleeps: bool = False


@dataclass(frozen=True, slots=True)
class SwitchView:
    """A switch as it stands.

    `error` is a code of the contract, `message` says why it failed and what that cost. `restored` are the models that
    it had unloaded and that came back.
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
    """The whole lifecycle state at one version. `switch` is the one under way, `last_switch` the one before.

    `loss` is the last model that ended by itself, until it is asked for again or somebody has read of it.
    `notices` say of models what people should know though nothing failed: somebody else had it unloaded. `last_used`
    are Unix times by model, of those that are loaded no more.
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

    @property
    def origins(self) -> frozenset[str]:
        """Where its instances answer."""
        return frozenset(view.endpoint.origin for view in self.instances.values() if view.endpoint is not None)

    def holder(self, model: Model) -> InstanceView | None:
        """The instance that serves a model, or would: its own, else the one of a model held in memory as it is."""
        own = self.instances.get(model.id)
        if own is not None:
            return self.instances.get(own.shares or model.id, own)
        if model.held_as is None:
            return None
        same = (v for v in self.instances.values() if (v.engine, v.entry.held_as) == (model.engine, model.held_as))
        return next((view for view in same if view.shares is None), None)


class Board:
    """Holds the current snapshot and wakes those who wait for the next one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._current = Snapshot()
        self.closed = False
        """Whether the app is going away, so that whoever follows along should stop."""

    @property
    def current(self) -> Snapshot:
        return self._current

    def publish(self, **changes: Any) -> Snapshot:
        """Replace the current snapshot by one with `changes` (its fields by name) and the next version."""
        with self._changed:
            self._current = replace(self._current, version=self._current.version + 1, **changes)
            self._changed.notify_all()
            return self._current

    def touch(self) -> None:
        """A new version of the same picture: something that is shown beside it has changed."""
        self.publish()

    def wait_newer(self, version: int, timeout: float) -> Snapshot:
        """The current snapshot, once its version exceeds `version` or `timeout` seconds have passed."""
        with self._changed:
            self._changed.wait_for(lambda: self._current.version > version or self.closed, timeout)
            return self._current

    def close(self) -> None:
        """Send everyone home who waits for a newer snapshot."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
