"""The lifecycle state: every instance, the failures, which model is the active one, the switch as people see it.

Mutable, and changed by messages in the switcher's mailbox alone. Everyone else reads the snapshots that are made of it.
Nothing here waits or asks an engine: what was learned of one comes in with the message.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from services.engines.port import Endpoint, Engine, Exit, Instance, LoadFailed, Model, Usage
from services.memory.ledger import Holding, holdings_of
from services.scheduling import Scheduler
from services.switching.events import Failure, InstanceState, LoadView, Loss, SwitchView
from services.switching.member import Measurement, Member, Standing
from services.switching.traffic import Traffic

ACTIVE = "active_model"
FIND_SECONDS = 30.0
"""How long after a start what the run before had loaded may turn up; later it was somebody else who loaded it."""


class Notes(Protocol):
    """What is remembered between two runs of the app, by key. `put` must not wait for the disk."""

    def get(self, key: str) -> str | None: ...

    def put(self, key: str, value: str) -> None: ...


@dataclass(eq=False)
class Fleet:
    """The state. Every method is one message's work: short, without I/O. `changed` says whether to publish it anew."""

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

    def __post_init__(self) -> None:
        self._before = self.notes.get(ACTIVE)
        self._find_until = self.scheduler.now() + FIND_SECONDS

    # What is there.

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members())

    def get(self, model_id: str) -> Member | None:
        return self._members.get(model_id)

    def standing(self, model_id: str) -> Standing:
        """Where a model stands now: the one place that says so."""
        member = self._members.get(model_id)
        return "absent" if member is None else member.state

    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def held(self, model_id: str) -> Member | None:
        """The instance of a model that is loaded, awake or asleep, with nothing under way."""
        member = self._members.get(model_id)
        return member if member is not None and member.held else None

    def holdings(self) -> list[Holding]:
        own = (m for m in self if m.shares is None)
        return [part for m in own for part in holdings_of(m.model.id, m.device, m.usage, m.reserved_bytes)]

    def snapshot(self) -> dict[str, Any]:
        """The fields of the next published snapshot."""
        return {
            "instances": MappingProxyType({m.model.id: m.view() for m in self}),
            "failures": MappingProxyType(dict(self._failures)),
            "notices": MappingProxyType(dict(self._notices)),
            "last_used": MappingProxyType(dict(self._last_used)),
            "active_model": self.active,
            "switch": self.switch,
            "last_switch": self.last_switch,
            "loss": self.loss,
        }

    # A load, from its launch to its first token.

    def begin_load(self, model: Model, engine: Engine, instance: Instance, device: str, reserved_bytes: int) -> Member:
        """An engine has begun to load a model."""
        self.forgive(model.id)
        return self._add(Member(instance.model, engine, instance, device, reserved_bytes, self._new_traffic()))

    def begin_wake(self, model_id: str, reserved_bytes: int) -> Member | None:
        """A sleeper is about to be woken; None when it doesn't sleep any more."""
        member = self._members.get(model_id)
        if member is None or member.state != "asleep":
            return None
        self.forgive(model_id)
        self._set_state(member, "loading")
        member.reserved_bytes = reserved_bytes
        return member

    def observe(self, member: Member, load: LoadView, usage: Usage | None, pid: int | None) -> None:
        """How far a load is, what it holds by now, and in which process."""
        member.load = load
        member.usage, member.pid = usage or member.usage, pid
        self.changed = True

    def ready(self, member: Member, endpoint: Endpoint, reading: Measurement) -> None:
        """Its first token is out: requests are routed to it from now on. Raises LoadFailed if it ended meanwhile."""
        if member.exit is not None or self._members.get(member.model.id) is not member:
            cause = member.exit.cause if member.exit is not None else "It ended while it was loading"
            raise LoadFailed(f"{cause}.", member.log_tail)
        member.endpoint, member.load, member.reserved_bytes = endpoint, None, 0
        member.loaded_at = self.scheduler.time()
        member.model = reading.model
        self._link(member)
        self._take(member, reading)
        self._set_state(member, "running")
        member.traffic.reopen()

    def fail(self, model_id: str, cause: str, log_tail: str) -> None:
        """Remember why a model is not running though it was asked to."""
        self._failures[model_id] = Failure(cause, log_tail, self.scheduler.time())
        self.changed = True

    # An unload, or a sleep.

    def begin_drain(self, model_id: str, seconds: float) -> Member | None:
        """Let no request in any more; those under way may take `seconds`.

        None when it is not held, so that there is nothing to unload.
        """
        member = self.held(model_id)
        if member is not None:
            member.traffic.close()
            self._drain_until(member, self.scheduler.time() + seconds)
        return member

    def cut_short(self, model_id: str) -> None:
        """Have nobody wait any more for the answers of a model that is being unloaded."""
        member = self._members.get(model_id)
        if member is not None and member.drain_until is not None:
            member.traffic.hurry()

    def resume(self, member: Member) -> None:
        """Nothing came of unloading it: it goes on serving."""
        self._drain_until(member, None)
        if member.state == "running":
            member.traffic.reopen()

    def begin_unload(self, member: Member) -> InstanceState:
        """It is being stopped, or put to sleep; returns the state it was in."""
        before = member.state
        member.traffic.close()
        self._drain_until(member, None)
        self._set_state(member, "unloading")
        return before

    def refuse_unload(self, member: Member, before: InstanceState) -> bool:
        """Its engine would not let it go. Whether it goes on as it was; False when it ended all the same."""
        if before not in ("running", "asleep") or member.exit is not None:
            return False
        self._set_state(member, before)
        self.resume(member)
        return True

    def asleep(self, member: Member, reading: Measurement) -> None:
        """It fell asleep, unless it ended on the way."""
        if member.exit is not None:
            self._lose(member, member.exit)
            return
        self._take(member, reading)
        self._set_state(member, "asleep")
        self._retire(member)

    def gone(self, member: Member) -> None:
        """It was unloaded, with every other name of the same instance."""
        for one in self._of_one_instance(member):
            self._remove(one)

    def drop_name(self, member: Member) -> None:
        """One more name of an instance did not work out; the instance itself is as it was."""
        self._remove(member)

    # What instances do by themselves.

    def exited(self, instance: Instance, exit: Exit, log_tail: str) -> Member | None:
        """An instance ended without having been asked to; returns the member that was lost by it.

        None when a job is busy with it, which is to decide what that means, or when nobody knows it any more.
        """
        member = next((m for m in self if m.instance is instance), None)
        if member is None:
            return None
        member.log_tail = log_tail
        if not member.held:
            member.exit = exit
            return None
        self._lose(member, exit)
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
        """Take in an instance that was found loaded, asleep if it has no endpoint; False when the model has one by now.

        The active model of the run before is that again once it is found.
        """
        if model.id in self._members:
            return False
        self.forgive(model.id)
        member = self._add(Member(reading.model, engine, instance, device, 0, self._new_traffic()))
        member.endpoint, member.loaded_at = endpoint, self.scheduler.time()
        member.state = "asleep" if endpoint is None else "running"
        if endpoint is None:
            member.traffic.close()
        self._take(member, reading)
        if endpoint is not None:
            if model.id == self._before and self.scheduler.now() < self._find_until:
                self.activate(model.id)
            else:
                self.fall_to(model.id)
        return True

    def measured(self, member: Member, reading: Measurement) -> None:
        """A fresh reading of an instance; published only if it changed noticeably."""
        if self._members.get(member.model.id) is member:
            self._take(member, reading)

    def silent(self, member: Member, silent: bool) -> None:
        """It gives no sign of life though it should, or does again."""
        for one in self._of_one_instance(member):
            one.silent = silent
        self.changed = True

    # The active model, and what is said of models.

    def activate(self, model_id: str) -> None:
        """Requests that name no model go to this one from now on."""
        self._before = None
        self._note_active(model_id)

    def fall_to(self, model_id: str) -> None:
        """Requests that name no model go to this one for want of another; the active one of before may turn up."""
        if self.active is None:
            self._note_active(model_id)

    def note(self, model_id: str, words: str) -> None:
        """Say what people should know of a model though nothing failed."""
        if self._notices.get(model_id) != words:
            self._notices[model_id] = words
            self.changed = True

    def forgive(self, model_id: str) -> None:
        """Forget what was said of a model: it is asked for again."""
        failed = self._failures.pop(model_id, None)
        noted = self._notices.pop(model_id, None)
        self.changed = self.changed or failed is not None or noted is not None
        if self.loss is not None and self.loss.model == model_id:
            self.loss = None

    # The switch as people see it.

    def show(self, view: SwitchView | None) -> None:
        """The switch under way, as it stands now."""
        self.switch = view
        self.changed = True

    def end_switch(self, view: SwitchView) -> None:
        """A switch has ended; it is the last one now."""
        if self.switch is not None and self.switch.id == view.id:
            self.switch = None
        self.last_switch = view
        self.changed = True

    def dismiss(self) -> None:
        """People have read how the last switch ended, or that a model has ended by itself."""
        self.last_switch = self.loss = None
        self.changed = True

    def _new_traffic(self) -> Traffic:
        return Traffic(self.scheduler.time, self.scheduler.condition())

    def _add(self, member: Member) -> Member:
        self._members[member.model.id] = member
        self._link(member)
        self.changed = True
        return member

    def _link(self, member: Member) -> None:
        """Models that are held in memory as one are one instance: counted once, drained and gone together.

        Done before anybody is let in: their traffic is one as well.
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
        """Of an instance with all its names, but those that are only being added."""
        for one in self._of_one_instance(member):
            if one is member or one.endpoint is not None:
                one.state = state
        self.changed = True

    def _drain_until(self, member: Member, at: float | None) -> None:
        for one in self._of_one_instance(member):
            one.drain_until = at
        self.changed = True

    def _lose(self, member: Member, exit: Exit) -> None:
        for one in self._of_one_instance(member):
            self._remove(one)
            if exit.released:
                self.note(one.model.id, f"{exit.cause}.")
            else:
                self.fail(one.model.id, f"{exit.cause}.", member.log_tail)

    def _remove(self, member: Member) -> None:
        used = member.traffic.last_used
        if used is not None:
            self._last_used[member.model.id] = used
        if self._members.get(member.model.id) is member:
            del self._members[member.model.id]
        self._retire(member)
        self.changed = True

    def _retire(self, member: Member) -> None:
        """An instance answers no more. If it was the active one, the most recently used other one is now."""
        if self.active == member.model.id:
            left = [m for m in self if m.state == "running"]
            left.sort(key=lambda m: m.traffic.last_used or m.loaded_at or 0.0)
            self._note_active(left[-1].model.id if left else None)

    def _take(self, member: Member, reading: Measurement) -> None:
        noticeable = member.differs(reading)
        member.usage, member.warning = reading.usage, reading.warning
        member.rest, member.pid = reading.rest, reading.pid
        self.changed = self.changed or noticeable

    def _note_active(self, model_id: str | None) -> None:
        self.active = model_id
        self.changed = True
        if model_id is not None and self._before is None:
            self.notes.put(ACTIVE, model_id)
