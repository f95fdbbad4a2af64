"""A model's instance as the fleet keeps it, and the measurement of an instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import structlog

from services.engines.port import Endpoint, Engine, Exit, Instance, Model, SleepFootprint, Usage
from services.switching.events import InstanceState, InstanceView, LoadView
from services.switching.traffic import Traffic

log = structlog.get_logger(__name__)

NOTICEABLE_BYTES = 1_000_000
"""Smaller changes in memory use do not make a new snapshot version."""

UNRESPONSIVE = (
    "It does not respond: no answer makes progress, and its engine gives no sign of life. "
    "It is restarted if it stays so."
)

MemberState = Literal["absent", "loading", "running", "asleep", "unloading"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measurement of an instance. `model` is its entry, updated with what is known of its weights in memory."""

    model: Model
    usage: Usage | None
    warning: str | None
    sleep_footprint: SleepFootprint | None
    pid: int | None


def measure(instance: Instance) -> Measurement:
    """Measure an instance; unknown values are None. It may block for a moment, so never call it within a message.

    Errors are logged, not raised: a load that works must not fail because a figure is missing.
    """
    try:
        return Measurement(
            instance.model, instance.usage(), instance.warning(), instance.sleep_footprint(), instance.pid
        )
    except Exception as error:
        log.warning("a model can't be measured", model=instance.model.id, error=str(error))
        return Measurement(instance.model, None, None, None, None)


@dataclass(eq=False)
class Member:
    """A model's instance and its state. `shares` is the member whose instance this one uses."""

    model: Model
    engine: Engine
    instance: Instance
    device: str
    reserved_bytes: int
    traffic: Traffic
    state: InstanceState = "loading"
    load: LoadView | None = None
    endpoint: Endpoint | None = None
    usage: Usage | None = None
    sleep_footprint: SleepFootprint | None = None
    loaded_at: float | None = None
    warning: str | None = None
    pid: int | None = None
    exit: Exit | None = None
    """How it ended unasked while a job was busy with it; that job decides what it means."""
    log_tail: str = ""
    """Last lines of its log, set once it has ended."""
    adopted: bool = False
    """Whether it was found loaded, not loaded by this run of the app."""
    shares: Member | None = None
    unresponsive: bool = False
    """Whether it has shown no activity for a while although it has work."""
    drain_until: float | None = None
    """Deadline for the requests in flight while an unload waits for them (Unix seconds)."""

    @property
    def is_loaded(self) -> bool:
        """Loaded, awake or asleep, and not being changed."""
        return self.state in ("running", "asleep")

    def view(self) -> InstanceView:
        unresponsive = self.unresponsive and self.state == "running"
        return InstanceView(
            model=self.model.id,
            engine=self.engine.name,
            state=self.state,
            device=self.device,
            traffic=self.traffic,
            entry=self.model,
            pid=self.pid,
            endpoint=self.endpoint,
            load=self.load,
            usage=self.usage if self.shares is None else None,
            reserved_bytes=self.reserved_bytes if self.shares is None else 0,
            loaded_at=self.loaded_at,
            warning=UNRESPONSIVE if unresponsive else self.warning,
            sleep_footprint=self.sleep_footprint if self.state == "running" else None,
            shares=self.shares.model.id if self.shares is not None else None,
            unresponsive=unresponsive,
            drain_until=self.drain_until,
            adopted=self.adopted,
        )

    def differs(self, reading: Measurement) -> bool:
        """Whether a new measurement is worth a new version of the snapshot."""
        return _differs(self.usage, reading.usage) or self.warning != reading.warning


def _differs(before: Usage | None, now: Usage | None) -> bool:
    if before is None or now is None:
        return before is not now
    return abs(before.bytes - now.bytes) >= NOTICEABLE_BYTES
