"""The instances as the switcher keeps them: mutable, touched by the switcher alone, published as snapshots."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from services.engines.port import Endpoint, Engine, Exit, Instance, Model, Usage
from services.memory.ledger import Holding, holdings_of
from services.switching.events import Board, Failure, InstanceState, InstanceView, LoadView, SwitchView
from services.switching.traffic import Traffic

ACTIVE = "active_model"
FIND_SECONDS = 30.0
"""How long after a start what the run before had loaded may turn up; later it was somebody else who loaded it."""
NOTICEABLE_BYTES = 1_000_000
"""A change of use below this is not worth a new version of the snapshot."""


@dataclass(eq=False)
class Member:
    """One instance and what is known of it."""

    model: Model
    engine: Engine
    instance: Instance
    device: str
    reserved_bytes: int
    state: InstanceState = "loading"
    traffic: Traffic = field(default_factory=Traffic)
    load: LoadView | None = None
    endpoint: Endpoint | None = None
    usage: Usage | None = None
    loaded_at: float | None = None
    warning: str | None = None
    exit: Exit | None = None
    """How it ended by itself while something was under way with it; whoever had begun that decides what it means."""

    def measure(self) -> bool:
        """Take a fresh reading of what it holds and how it is; True when that changed noticeably."""
        warned, self.warning = self.warning, self.instance.warning()
        return self._measure_usage() or warned != self.warning

    def _measure_usage(self) -> bool:
        before, self.usage = self.usage, self.instance.usage()
        if before is None or self.usage is None:
            return before is not self.usage
        return abs(before.bytes - self.usage.bytes) >= NOTICEABLE_BYTES

    def view(self) -> InstanceView:
        return InstanceView(
            model=self.model.id,
            engine=self.engine.name,
            state=self.state,
            device=self.device,
            traffic=self.traffic,
            pid=self.instance.pid,
            endpoint=self.endpoint,
            load=self.load,
            usage=self.usage,
            reserved_bytes=self.reserved_bytes,
            loaded_at=self.loaded_at,
            warning=self.warning,
            rest=self.instance.rest() if self.state == "running" else None,
        )


class Notes(Protocol):
    """What is remembered between two runs of the app, by key."""

    def get(self, key: str) -> str | None: ...

    def put(self, key: str, value: str) -> None: ...


class Fleet:
    """Every instance by model id, the failures, and which model is the active one, also from one run to the next."""

    def __init__(self, board: Board, notes: Notes) -> None:
        self._board = board
        self._notes = notes
        self._members: dict[str, Member] = {}
        self._failures: dict[str, Failure] = {}
        self._notices: dict[str, str] = {}
        self._active: str | None = None
        self._before = notes.get(ACTIVE)
        self._found_by = time.monotonic() + FIND_SECONDS

    @property
    def active(self) -> str | None:
        return self._active

    def activate(self, model_id: str) -> None:
        """Requests that name no model go to this one from now on."""
        self._before = None
        self._note_active(model_id)

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def get(self, model_id: str) -> Member | None:
        return self._members.get(model_id)

    def running(self, model_id: str) -> Member | None:
        member = self._members.get(model_id)
        return member if member is not None and member.state == "running" else None

    def held(self, model_id: str) -> Member | None:
        """The instance of a model that is loaded, awake or asleep, with nothing under way."""
        member = self._members.get(model_id)
        return member if member is not None and member.state in ("running", "asleep") else None

    def add(self, member: Member) -> None:
        self._members[member.model.id] = member
        self.forgive(member.model.id)

    def lose(self, member: Member, exit: Exit) -> None:
        """An instance ended without having been asked to: forget it, and say why."""
        self.remove(member)
        if exit.released:
            self.note(member.model.id, f"{exit.cause}.")
        else:
            self.fail(member.model.id, f"{exit.cause}.", member.instance.log_tail())

    def fall_to(self, model_id: str) -> None:
        """Requests that name no model go to this one for want of another; the active one of before may turn up."""
        self._note_active(model_id)

    def take_in(self, member: Member) -> None:
        """Add an instance that was found loaded. The active model of the run before is that again once it is found."""
        self.add(member)
        if member.state != "running":
            return
        if member.model.id == self._before and time.monotonic() < self._found_by:
            self.activate(member.model.id)
        elif self._active is None:
            self._note_active(member.model.id)

    def remove(self, member: Member) -> None:
        """Forget an instance that is gone."""
        if self._members.get(member.model.id) is member:
            del self._members[member.model.id]
        self.retire(member)

    def retire(self, member: Member) -> None:
        """An instance answers no more. If it was the active one, the most recently used other one is now."""
        if self.active == member.model.id:
            left = [m for m in self if m.state == "running"]
            left.sort(key=lambda m: m.traffic.last_used or m.loaded_at or 0.0)
            self._note_active(left[-1].model.id if left else None)

    def fail(self, model_id: str, cause: str, log_tail: str) -> None:
        self._failures[model_id] = Failure(cause, log_tail, time.time())

    def note(self, model_id: str, words: str) -> None:
        """Say why a model is gone though nothing failed."""
        self._notices[model_id] = words

    def forgive(self, model_id: str) -> None:
        """Forget what was said of a model: it is asked for again."""
        self._failures.pop(model_id, None)
        self._notices.pop(model_id, None)

    def holdings(self) -> list[Holding]:
        return [part for m in self for part in holdings_of(m.model.id, m.device, m.usage, m.reserved_bytes)]

    def measure(self) -> bool:
        """Fresh readings of all; True when one changed noticeably."""
        changed = [member.measure() for member in self]
        return any(changed)

    def _note_active(self, model_id: str | None) -> None:
        self._active = model_id
        if model_id is not None and self._before is None:
            self._notes.put(ACTIVE, model_id)

    def publish(self, **more: SwitchView | tuple[str, ...] | None) -> None:
        """Publish the instances as they are now, with `switch`, `last_switch` or `queued` where given."""
        self._board.publish(
            instances=MappingProxyType({m.model.id: m.view() for m in self}),
            failures=MappingProxyType(dict(self._failures)),
            notices=MappingProxyType(dict(self._notices)),
            active_model=self.active,
            **more,
        )
