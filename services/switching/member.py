"""One model's instance as the fleet keeps it, and what a look at it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import structlog

from services.engines.port import Endpoint, Engine, Exit, Instance, Model, Rest, Usage
from services.switching.events import InstanceState, InstanceView, LoadView
from services.switching.traffic import Traffic

log = structlog.get_logger(__name__)

NOTICEABLE_BYTES = 1_000_000
"""A change of use below this is not worth a new version of the snapshot."""

SILENT = (
    "It does not respond: no answer makes progress, and its engine gives no sign of life. "
    "It is restarted if it stays so."
)

Standing = Literal["absent", "loading", "running", "asleep", "unloading"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one look at an instance gave; `model` is its entry, with what is known by now of how it is held."""

    model: Model
    usage: Usage | None
    warning: str | None
    rest: Rest | None
    pid: int | None


def read(instance: Instance) -> Measurement:
    """Look at an instance; what can't be known is None. It may take a moment, so never in a message.

    Nothing it meets is an error: a load that works must not fail for want of a figure.
    """
    try:
        return Measurement(instance.model, instance.usage(), instance.warning(), instance.rest(), instance.pid)
    except Exception as error:
        log.warning("a model can't be measured", model=instance.model.id, error=str(error))
        return Measurement(instance.model, None, None, None, None)


@dataclass(eq=False)
class Member:
    """One model's instance and what is known of it. `shares` is the member whose instance it is as well."""

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
    rest: Rest | None = None
    loaded_at: float | None = None
    warning: str | None = None
    pid: int | None = None
    exit: Exit | None = None
    """How it ended by itself while a job was busy with it; that job decides what it means."""
    log_tail: str = ""
    """The last lines of its log, once it has ended."""
    shares: Member | None = None
    silent: bool = False
    """Whether it has given no sign of life for a while though it should."""
    drain_until: float | None = None
    """Until when the answers under way may take (Unix seconds), while the unload of it waits for them."""

    @property
    def held(self) -> bool:
        """Loaded, awake or asleep, with nothing under way."""
        return self.state in ("running", "asleep")

    def view(self) -> InstanceView:
        silent = self.silent and self.state == "running"
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
            warning=SILENT if silent else self.warning,
            rest=self.rest if self.state == "running" else None,
            shares=self.shares.model.id if self.shares is not None else None,
            silent=silent,
            drain_until=self.drain_until,
        )

    def differs(self, reading: Measurement) -> bool:
        """Whether a fresh reading is worth a new version of the snapshot."""
        return _differs(self.usage, reading.usage) or self.warning != reading.warning


def _differs(before: Usage | None, now: Usage | None) -> bool:
    if before is None or now is None:
        return before is not now
    return abs(before.bytes - now.bytes) >= NOTICEABLE_BYTES
