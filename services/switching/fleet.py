"""The lifecycle state: all instances, failures, the active model, and the switch as shown to people.

Mutable, and changed by messages in the switcher's mailbox only; everyone else reads the snapshots made from it. Nothing
here blocks or calls an engine: what was measured arrives as an argument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from services.engines.port import Endpoint, Engine, Exit, Instance, LoadFailed, Model, Usage
from services.memory.ledger import Holding, holdings_of
from services.notes import Notes
from services.scheduling import Scheduler
from services.switching.events import Failure, InstanceState, LoadView, Loss, SwitchView
from services.switching.member import Measurement, Member, MemberState
from services.switching.traffic import Traffic

ACTIVE_KEY = "active_model"
RESTORE_ACTIVE_SECONDS = 30.0
"""How long after a start the previous run's active model becomes active again when it is adopted. A model that turns up
later was loaded by another client."""


@dataclass(eq=False)
class Fleet:
    """The state. Each method does one message's work: short, no I/O. `changed` is set when a new snapshot is due.

    `notes.put` must not wait for the disk.
    """

    scheduler: Scheduler
    notes: Notes
    switch: SwitchView | None = None
    last_switch: SwitchView | None = None
    loss: Loss | None = None
    active: str | None = None
    changed: bool = False
    _members: dict[str, Member] = field(default_factory=dict)
    _failures: dict[str, Failure] = field(default_factory=dict)
    _notices: dict[str, str] = field(default_factory=dict)
    _last_used: dict[str, float] = field(default_factory=dict)
    _answered: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._previous_active = self._noted_active = self.notes.get(ACTIVE_KEY) or None
        self._restore_until = self.scheduler.now() + RESTORE_ACTIVE_SECONDS

    # Queries.

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members())

    def get(self, model_id: str) -> Member | None:
        return self._members.get(model_id)

    def state_of(self, model_id: str) -> MemberState:
        """Return the state of a model's instance, "absent" if it has none."""
        member = self._members.get(model_id)
        return "absent" if member is None else member.state

    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def loaded_member(self, model_id: str) -> Member | None:
        """Return a model's instance if it is loaded, awake or asleep, and not being changed."""
        member = self._members.get(model_id)
        return member if member is not None and member.is_loaded else None

    def holdings(self) -> list[Holding]:
        own = (m for m in self if m.shares is None and not m.model.remote)
        return [part for m in own for part in holdings_of(m.model.id, m.device, m.usage, m.reserved_bytes)]

    def snapshot(self) -> dict[str, Any]:
        """Return the fields of the next published snapshot."""
        return {
            "instances": MappingProxyType({m.model.id: m.view() for m in self}),
            "failures": MappingProxyType(dict(self._failures)),
            "notices": MappingProxyType(dict(self._notices)),
            "last_used": MappingProxyType(dict(self._last_used)),
            "answered": MappingProxyType(dict(self._answered)),
            "active_model": self.active,
            "switch": self.switch,
            "last_switch": self.last_switch,
            "loss": self.loss,
        }

    # Load: from the launch to the first token.

    def begin_load(self, model: Model, engine: Engine, instance: Instance, device: str, reserved_bytes: int) -> Member:
        """Add an instance that an engine has begun to load."""
        self.clear_failure(model.id)
        return self._add(Member(instance.model, engine, instance, device, reserved_bytes, self._new_traffic()))

    def begin_wake(self, model_id: str, reserved_bytes: int) -> Member | None:
        """Mark a sleeping instance as loading; return None if it no longer sleeps."""
        member = self._members.get(model_id)
        if member is None or member.state != "asleep":
            return None
        self.clear_failure(model_id)
        self._set_state(member, "loading")
        member.reserved_bytes = reserved_bytes
        return member

    def observe(self, member: Member, load: LoadView, usage: Usage | None, pid: int | None) -> None:
        """Record the progress, memory and process of a load under way."""
        member.load = load
        member.usage, member.pid = usage or member.usage, pid
        self.changed = True

    def mark_ready(self, member: Member, endpoint: Endpoint, reading: Measurement) -> None:
        """Record that an instance generated its first token, and route requests to it from now on.

        Raises LoadFailed if it ended in the meantime.
        """
        if member.exit is not None or self._members.get(member.model.id) is not member:
            cause = member.exit.cause if member.exit is not None else "It ended while it was loading"
            raise LoadFailed(f"{cause}.", member.log_tail)
        member.endpoint, member.load, member.reserved_bytes = endpoint, None, 0
        member.loaded_at = self.scheduler.time()
        member.model = reading.model
        self._share_instance(member)
        self._apply(member, reading)
        self._set_state(member, "running")
        member.traffic.reopen()

    def record_failure(self, model_id: str, cause: str, log_tail: str) -> None:
        """Record why a requested model is not running."""
        self._failures[model_id] = Failure(cause, log_tail, self.scheduler.time())
        self.changed = True

    # Unload and sleep.

    def begin_drain(self, model_id: str, seconds: float) -> Member | None:
        """Admit no further requests; those in flight have `seconds` to finish.

        Return None if the model is not loaded.
        """
        member = self.loaded_member(model_id)
        if member is not None:
            member.traffic.close()
            self._drain_until(member, self.scheduler.time() + seconds)
        return member

    def cut_drain_short(self, model_id: str) -> None:
        """End the drain of a model at once instead of waiting for its requests in flight."""
        member = self._members.get(model_id)
        if member is not None and member.drain_until is not None:
            member.traffic.cut_drain_short()

    def cancel_drain(self, member: Member) -> None:
        """Admit requests again, because the unload did not happen."""
        self._drain_until(member, None)
        if member.state == "running":
            member.traffic.reopen()

    def begin_unload(self, member: Member) -> InstanceState:
        """Mark an instance as unloading; return the state it was in."""
        before = member.state
        member.traffic.close()
        self._drain_until(member, None)
        self._set_state(member, "unloading")
        return before

    def undo_unload(self, member: Member, before: InstanceState) -> bool:
        """Return an instance to state `before`, because its engine refused to unload it.

        Return False if it can't go on, because it ended nevertheless or was not loaded before.
        """
        if before not in ("running", "asleep") or member.exit is not None:
            return False
        self._set_state(member, before)
        self.cancel_drain(member)
        return True

    def mark_asleep(self, member: Member, reading: Measurement) -> None:
        """Record that an instance fell asleep, or its loss if it ended on the way."""
        if member.exit is not None:
            self._record_loss(member, member.exit)
            return
        self._apply(member, reading)
        self._set_state(member, "asleep")
        self._deactivate(member)

    def mark_unloaded(self, member: Member) -> None:
        """Remove an unloaded instance, and with it every model that shares it."""
        for one in self._of_one_instance(member):
            self._remove(one)

    def remove_member(self, member: Member) -> None:
        """Remove one model that failed to join a shared instance; the instance stays for the others."""
        self._remove(member)

    # Events that no job asked for.

    def record_exit(self, instance: Instance, exit: Exit, log_tail: str) -> Member | None:
        """Record that an instance ended unasked; return the member that was lost.

        Return None when the instance is unknown, or when a job is busy with it: then the job decides what the exit
        means.
        """
        member = next((m for m in self if m.instance is instance), None)
        if member is None:
            return None
        member.log_tail = log_tail
        if not member.is_loaded:
            member.exit = exit
            return None
        self._record_loss(member, exit)
        if not exit.released:
            failure = self._failures[member.model.id]
            self.loss = Loss(member.model.id, failure.cause, failure.log_tail, failure.at)
        return member

    def adopt(
        self,
        model: Model,
        engine: Engine,
        instance: Instance,
        device: str,
        endpoint: Endpoint | None,
        reading: Measurement,
    ) -> bool:
        """Add an instance that was found loaded; without an endpoint it is asleep.

        Return False if the model has an instance already. The previous run's active model becomes active again when it
        is found.
        """
        if model.id in self._members:
            return False
        self.clear_failure(model.id)
        member = self._add(Member(reading.model, engine, instance, device, 0, self._new_traffic(), adopted=True))
        member.endpoint, member.loaded_at = endpoint, self.scheduler.time()
        member.state = "asleep" if endpoint is None else "running"
        if endpoint is None:
            member.traffic.close()
        self._apply(member, reading)
        if endpoint is not None:
            if model.id == self._previous_active and self.scheduler.now() < self._restore_until:
                self.activate(model.id)
            else:
                self.activate_if_none(model.id)
        return True

    def update_measurement(self, member: Member, reading: Measurement) -> None:
        """Store a fresh measurement; publish only a noticeable change."""
        if self._members.get(member.model.id) is member:
            self._apply(member, reading)

    def set_unresponsive(self, member: Member, unresponsive: bool) -> None:
        """Mark an instance, for all models that share it, as unresponsive or responsive again."""
        for one in self._of_one_instance(member):
            one.unresponsive = unresponsive
        self.changed = True

    # The active model; notices and failures.

    def activate(self, model_id: str) -> None:
        """Route requests that name no model to this one. A model of another kind than text can't become active."""
        if not self._may_be_active(model_id):
            return
        self._previous_active = None
        self._set_active(model_id)

    def activate_if_none(self, model_id: str) -> None:
        """Make a model active only if none is, and never a remote one, whose answers cost money.

        This is not remembered for the next run while the previous run's active model may still be adopted.
        """
        if self.active is None and self._may_be_active(model_id, unasked=True):
            self._set_active(model_id)

    def set_notice(self, model_id: str, words: str) -> None:
        """Set a model's notice: something worth knowing that is no failure."""
        if self._notices.get(model_id) != words:
            self._notices[model_id] = words
            self.changed = True

    def clear_failure(self, model_id: str) -> None:
        """Clear a model's failure, notice and loss, because it is requested again."""
        failed = self._failures.pop(model_id, None)
        noted = self._notices.pop(model_id, None)
        self.changed = self.changed or failed is not None or noted is not None
        if self.loss is not None and self.loss.model == model_id:
            self.loss = None

    # The switch as shown to people.

    def show(self, view: SwitchView | None) -> None:
        """Set the switch under way as shown to people."""
        self.switch = view
        self.changed = True

    def end_switch(self, view: SwitchView) -> None:
        """Make a switch that has ended the last one."""
        if self.switch is not None and self.switch.id == view.id:
            self.switch = None
        self.last_switch = view
        self.changed = True

    def dismiss(self) -> None:
        """Clear the last switch and the last loss, because somebody has read them."""
        self.last_switch = self.loss = None
        self.changed = True

    def _new_traffic(self) -> Traffic:
        return Traffic(self.scheduler.time, self.scheduler.condition())

    def _add(self, member: Member) -> Member:
        self._members[member.model.id] = member
        self._share_instance(member)
        self.changed = True
        return member

    def _share_instance(self, member: Member) -> None:
        """Link a member to the instance that already holds the same weights (`Model.held_as`).

        Linked members are accounted once, drained and unloaded together. They share one `Traffic`, so the link is made
        before the first request is admitted.
        """
        if member.shares is not None:
            return
        held_as = member.model.held_as
        for other in self:
            if held_as is not None and other is not member and other.shares is None:
                same = (other.engine.name, other.model.held_as) == (member.engine.name, held_as)
                if same:
                    member.shares, member.traffic = other, other.traffic

    def _of_one_instance(self, member: Member) -> list[Member]:
        owner = member.shares or member
        return [m for m in self if m is owner or m.shares is owner]

    def _set_state(self, member: Member, state: InstanceState) -> None:
        """Set the state of an instance for all models that share it, except those still joining it."""
        for one in self._of_one_instance(member):
            if one is member or one.endpoint is not None:
                one.state = state
        self.changed = True

    def _drain_until(self, member: Member, at: float | None) -> None:
        for one in self._of_one_instance(member):
            one.drain_until = at
        self.changed = True

    def _record_loss(self, member: Member, exit: Exit) -> None:
        for one in self._of_one_instance(member):
            self._remove(one)
            if exit.released:
                self.set_notice(one.model.id, f"{exit.cause}.")
            else:
                self.record_failure(one.model.id, f"{exit.cause}.", member.log_tail)

    def _remove(self, member: Member) -> None:
        used = member.traffic.last_used
        if used is not None:
            self._last_used[member.model.id] = used
            self._answered[member.model.id] += member.traffic.answered
        if self._members.get(member.model.id) is member:
            del self._members[member.model.id]
        self._deactivate(member)
        self.changed = True

    def _deactivate(self, member: Member) -> None:
        """If `member` was active, activate the most recently used running model instead."""
        if self.active == member.model.id:
            left = [m for m in self if m.state == "running" and self._may_be_active(m.model.id, unasked=True)]
            left.sort(key=lambda m: m.traffic.last_used or m.loaded_at or 0.0)
            self._set_active(left[-1].model.id if left else None)
            if not left and member.model.remote:  # it would be found loaded, and active again, after the next start
                self._noted_active = None
                self.notes.put(ACTIVE_KEY, "")

    def _may_be_active(self, model_id: str, *, unasked: bool = False) -> bool:
        """Return whether a model can become active; `unasked`: without anybody having chosen it."""
        member = self._members.get(model_id)
        return member is None or (member.model.kind == "text" and not (unasked and member.model.remote))

    def _apply(self, member: Member, reading: Measurement) -> None:
        noticeable = member.differs(reading)
        member.usage, member.warning = reading.usage, reading.warning
        member.sleep_footprint, member.pid = reading.sleep_footprint, reading.pid
        self.changed = self.changed or noticeable

    def _set_active(self, model_id: str | None) -> None:
        self.active = model_id
        self.changed = True
        if model_id is not None and self._previous_active is None and model_id != self._noted_active:
            self._noted_active = model_id
            self.notes.put(ACTIVE_KEY, model_id)
