"""Gathers the inputs of a plan: fresh measurements, what is loaded, and what was learned from past loads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from services.config import Preferences, Strategy
from services.engines.port import HOST_DEVICE, EngineError, Model, Need
from services.memory.ledger import Account, Holding, Reading, account, holdings_of
from services.memory.programs import Program
from services.pins import Pin
from services.switching.context import SwitchingContext
from services.switching.events import InstanceView, Snapshot
from services.switching.learning import Learned
from services.switching.plan import Alternative, Loaded, Plan, Room, UnloadRules, make_plan
from services.switching.progress import History
from services.switching.traffic import Traffic

log = structlog.get_logger(__name__)


class Devices(Protocol):
    """Source of memory readings."""

    @property
    def readings(self) -> Sequence[Reading]:
        """The latest readings; no I/O."""

    def sample(self) -> Sequence[Reading]:
        """Take and return new readings; may block for a moment."""

    def programs(self, device: str, ours: Collection[int]) -> Sequence[Program]:
        """Return the programs that hold most of a device, without the processes `ours` and their descendants.

        Empty if they can't be determined. May block for a moment.
        """


class Planner:
    """Computes plans. Changes nothing; thread-safe."""

    def __init__(self, context: SwitchingContext, devices: Devices, learned: Learned) -> None:
        self._settings = context.settings
        self._preferences = context.preferences
        self._pins = context.pins
        self._board = context.board
        self._catalog = context.catalog
        self._engines = context.engines
        self._devices = devices
        self._learned = learned
        self._scheduler = context.scheduler

    def plan(
        self,
        model: Model,
        strategy: Strategy | None = None,
        auto_unload: bool | None = None,
        *,
        preempt_loads: bool = False,
        instead_of: str | None = None,
    ) -> Plan:
        """Return the plan for making `model` ready now. It measures, so never call it within a switcher message.

        With `preempt_loads` a load under way counts as a candidate for unloading. `instead_of` is unloaded in any case.
        Raises EngineError if the model's device does not exist, and whatever its engine's estimate raises.
        """
        snapshot = self._board.current
        need = self.need(model)
        holdings = _holdings(snapshot.instances.values())
        ledger = self.account(need.device, holdings)
        preferences = self._preferences.current
        auto = preferences.auto_unload if auto_unload is None else auto_unload
        order = strategy or preferences.strategy
        kept = _Kept.by(preferences, order, self._pins.current)
        already = snapshot.holder(model)
        held_here = [view for view in snapshot.instances.values() if view.shares is None and not view.entry.remote]
        plan = make_plan(
            model.id,
            need if already is None else _remaining_need(need, already),
            Room(ledger, self._account(HOST_DEVICE, holdings).available_bytes),
            [self._loaded(view, snapshot, kept, preempt_loads) for view in held_here if view is not already],
            UnloadRules(order, auto, instead_of),
            load_seconds=self.load_seconds(model) if already is None or already.state == "asleep" else 0.0,
            others=list(self._alternatives(snapshot)),
        )
        return self._with_names(plan)

    def programs(self, device: str) -> Sequence[Program]:
        """Return the other programs that hold most of a device; empty if unknown. May block for a moment."""
        return self._devices.programs(device, [v.pid for v in self._board.current.instances.values() if v.pid])

    def _with_names(self, plan: Plan) -> Plan:
        """Add the names of the programs to a plan that they keep from being feasible."""
        if not any(limit.kind == "other_programs" for limit in plan.limits):
            return plan
        programs = tuple(self.programs(plan.device))
        named = (replace(o, programs=programs) if o.kind == "other_programs" else o for o in plan.limits)
        return replace(plan, limits=tuple(named))

    def account(self, device: str, holdings: Sequence[Holding]) -> Account:
        """Return the account of one device, measured now. Raises EngineError if there is no such device."""
        self._devices.sample()
        return self._account(device, holdings)

    def _account(self, device: str, holdings: Sequence[Holding]) -> Account:
        for reading in self._devices.readings:
            if reading.id == device:
                return account(reading, holdings)
        known = ", ".join(r.id for r in self._devices.readings)
        raise EngineError(f"There is no device {device!r} on this machine. There are: {known}.")

    def _alternatives(self, snapshot: Snapshot) -> Iterator[Alternative]:
        """Yield the models that could be loaded instead: none that is loaded already, or being loaded.

        Models whose engine fails to estimate their memory are left out.
        """
        for model in self._catalog.models.values():
            holder = snapshot.holder(model)
            if not model.fault and not model.remote and (holder is None or holder.state == "asleep"):
                try:
                    yield Alternative(model.id, self.need(model))
                except Exception as error:
                    log.warning("the memory a model needs can't be estimated", model=model.id, error=str(error))

    @property
    def learned_version(self) -> int:
        """Number of loads learned from so far; forecasts made at a lower number are outdated."""
        return self._learned.version

    def need(self, model: Model) -> Need:
        """Return the memory a model takes when loaded. Raises whatever its engine's estimate raises."""
        return self._learned.need(model, self._engines[model.engine])

    def load_seconds(self, model: Model) -> float | None:
        """Forecast the time to load a model, including the fetch of missing files, or to wake it if it sleeps.

        None if unknown.
        """
        loading = self.history(model).total_seconds
        if loading is None or model.fetch_bytes == 0:
            return loading
        fetching = self._learned.fetch_seconds(self._engines[model.engine], model.fetch_bytes)
        return None if fetching is None else fetching + loading

    def history(self, model: Model) -> History:
        """Return past times, stage by stage, for loading a model, or for waking it if it sleeps."""
        view = self._board.current.instances.get(model.id)
        return self._history(model, waking=view is not None and view.state == "asleep")

    def _history(self, model: Model, *, waking: bool) -> History:
        return self._learned.history(model, self._engines[model.engine], waking=waking)

    def _loaded(self, view: InstanceView, snapshot: Snapshot, kept: _Kept, preempt_loads: bool) -> Loaded:
        model, traffic = view.entry, view.traffic
        last_used = traffic.last_used or view.loaded_at
        held = view.usage.bytes if view.usage else 0
        if view.state == "running" and not held:  # not measured: the driver doesn't report it, or it was just adopted
            held = self.need(model).bytes
        return Loaded(
            model=view.model,
            device=view.device,
            bytes=max(held, view.reserved_bytes),
            idle_seconds=None if last_used is None else max(0.0, self._scheduler.time() - last_used),
            in_flight=traffic.in_flight,
            reload_seconds=self._history(model, waking=False).total_seconds,
            drain_seconds=self._drain_seconds(traffic),
            keep_reason=_keep_reason(view, snapshot, kept, preempt_loads),
            spilled_bytes=view.usage.spilled_bytes if view.usage else 0,
            asleep=view.state == "asleep",
            sleep_footprint=view.sleep_footprint,
            wake_seconds=self._history(model, waking=True).total_seconds,
        )

    def _drain_seconds(self, traffic: Traffic) -> float:
        """Estimate how long the requests in flight take: the mean of past requests, at most the drain timeout."""
        if not traffic.in_flight:
            return 0.0
        longest = self._settings.drain_timeout_seconds
        return longest if traffic.mean_seconds is None else min(longest, traffic.mean_seconds)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Models that no plan unloads: preserved ones, pinned ones, and favourites where the strategy preserves those."""

    preserved: frozenset[str]
    pins: Mapping[str, Pin]
    favorites: frozenset[str]

    @classmethod
    def by(cls, preferences: Preferences, strategy: Strategy, pins: Mapping[str, Pin]) -> _Kept:
        favorites = preferences.favorites if strategy == "preserve_favorites" else ()
        return cls(frozenset(preferences.preserve_models), pins, frozenset(favorites))


def _keep_reason(view: InstanceView, snapshot: Snapshot, kept: _Kept, preempt_loads: bool) -> str | None:
    """Return why an instance must stay whatever the strategy: a preference, or a change under way; else None."""
    names = {view.model, *(v.model for v in snapshot.instances.values() if v.shares == view.model)}
    reasons = [(name, kept.pins[name].words) for name in sorted(names & kept.pins.keys())]
    reasons += [(name, "one of preserve_models") for name in sorted(names & kept.preserved)]
    reasons += [(name, "a favourite") for name in sorted(names & kept.favorites)]
    for name, words in reasons:
        return f"{name} is {words}" if name != view.model else f"it is {words}"
    if view.entry.started_elsewhere:
        return "another program started its server"
    movable = view.state in ("running", "asleep") or preempt_loads
    return None if movable else f"it is {view.state} right now"


def _remaining_need(need: Need, view: InstanceView) -> Need:
    """Return what a model needs beyond what its instance already holds: nothing, unless it sleeps."""
    held = view.usage.bytes if view.usage else 0
    return Need(need.device, max(0, need.bytes - held) if view.state == "asleep" else 0, need.basis)


def _holdings(views: Iterable[InstanceView]) -> list[Holding]:
    own = (v for v in views if v.shares is None and not v.entry.remote)
    return [part for v in own for part in holdings_of(v.model, v.device, v.usage, v.reserved_bytes)]
