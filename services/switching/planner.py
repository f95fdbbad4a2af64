"""Gathers what a plan is made from: fresh readings, what is loaded, what past loads taught."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import structlog

from services.config import Strategy
from services.engines.port import HOST_DEVICE, EngineError, Model, Need
from services.memory.ledger import Account, Holding, Reading, account, holdings_of
from services.switching.context import SwitchingContext
from services.switching.events import InstanceView, Snapshot
from services.switching.learning import Learned
from services.switching.plan import Alternative, Loaded, Plan, Room, UnloadRules, make_plan
from services.switching.progress import History
from services.switching.traffic import Traffic

log = structlog.get_logger(__name__)


class Devices(Protocol):
    """Who measures memory."""

    @property
    def readings(self) -> Sequence[Reading]:
        """The latest readings."""

    def sample(self) -> Sequence[Reading]:
        """Fresh ones; takes a moment."""


class Planner:
    """Answers what a switch would do. Changes nothing; safe from any thread."""

    def __init__(self, context: SwitchingContext, devices: Devices, learned: Learned) -> None:
        self._settings = context.settings
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
        loads_give_way: bool = False,
        instead_of: str | None = None,
    ) -> Plan:
        """What making `model` ready takes now. It measures, so never in a message to the switcher.

        Raises EngineError when its device isn't there, and what its engine's estimate raises.

        With `loads_give_way` a load under way counts as something that could be unloaded. `instead_of` is a model that
        goes in any case.
        """
        snapshot = self._board.current
        need = self.need(model)
        holdings = _holdings(snapshot.instances.values())
        ledger = self.account(need.device, holdings)
        auto = self._settings.auto_unload if auto_unload is None else auto_unload
        already = snapshot.holder(model)
        others = [view for view in snapshot.instances.values() if view.shares is None and view is not already]
        return make_plan(
            model.id,
            need if already is None else _rest_of(need, already),
            Room(
                available_bytes=ledger.available_bytes,
                total_bytes=ledger.total_bytes,
                host_available_bytes=self._account(HOST_DEVICE, holdings).available_bytes,
            ),
            [self._loaded(view, snapshot, loads_give_way) for view in others],
            UnloadRules(strategy or self._settings.strategy, auto, instead_of),
            load_seconds=self.load_seconds(model) if already is None or already.state == "asleep" else 0.0,
            others=list(self._alternatives()),
        )

    def account(self, device: str, holdings: Sequence[Holding]) -> Account:
        """One device's memory, measured now. Raises EngineError when there is no such device."""
        self._devices.sample()
        return self._account(device, holdings)

    def _account(self, device: str, holdings: Sequence[Holding]) -> Account:
        for reading in self._devices.readings:
            if reading.id == device:
                return account(reading, holdings)
        known = ", ".join(r.id for r in self._devices.readings)
        raise EngineError(f"There is no device {device!r} on this machine. There are: {known}.")

    def _alternatives(self) -> Iterator[Alternative]:
        """The models that could be offered instead. One whose engine can't say what it needs is no reason to fail."""
        for model in self._catalog.models.values():
            if not model.fault:
                try:
                    yield Alternative(model.id, self.need(model))
                except Exception as error:
                    log.warning("the memory a model needs is unknown", model=model.id, error=str(error))

    @property
    def lessons(self) -> int:
        """How many loads have taught something so far: forecasts from before the last one are outdated."""
        return self._learned.lessons

    def need(self, model: Model) -> Need:
        """What a model takes when loaded. Raises whatever its engine's estimate does."""
        return self._learned.need(model, self._engines[model.engine])

    def load_seconds(self, model: Model) -> float | None:
        """How long loading it usually takes, what has to be fetched first included, or waking it while it sleeps.

        None when nobody can know yet.
        """
        loading = self.history(model).total_seconds
        if loading is None or model.fetch_bytes == 0:
            return loading
        fetching = self._learned.fetch_seconds(self._engines[model.engine], model.fetch_bytes)
        return None if fetching is None else fetching + loading

    def history(self, model: Model) -> History:
        """What is known of how long that takes, stage by stage."""
        view = self._board.current.instances.get(model.id)
        return self._history(model, waking=view is not None and view.state == "asleep")

    def _history(self, model: Model, *, waking: bool) -> History:
        return self._learned.history(model, self._engines[model.engine], waking=waking)

    def _loaded(self, view: InstanceView, snapshot: Snapshot, loads_give_way: bool) -> Loaded:
        model, traffic = view.entry, view.traffic
        last_used = traffic.last_used or view.loaded_at
        held = view.usage.bytes if view.usage else 0
        if view.state == "running" and not held:  # a driver that doesn't tell, or one just found: that is not nothing
            held = self.need(model).bytes
        return Loaded(
            model=view.model,
            device=view.device,
            bytes=max(held, view.reserved_bytes),
            idle_seconds=None if last_used is None else max(0.0, self._scheduler.time() - last_used),
            in_flight=traffic.in_flight,
            reload_seconds=self._history(model, waking=False).total_seconds,
            drain_seconds=self._drain_seconds(traffic),
            keep=self._keep(view, snapshot, loads_give_way),
            spilled_bytes=view.usage.spilled_bytes if view.usage else 0,
            asleep=view.state == "asleep",
            rest=view.rest,
            wake_seconds=self._history(model, waking=True).total_seconds,
        )

    def _keep(self, view: InstanceView, snapshot: Snapshot, loads_give_way: bool) -> str | None:
        """Why an instance must stay, whatever the strategy: a promise for one of its names, or something under way."""
        names = {view.model, *(v.model for v in snapshot.instances.values() if v.shares == view.model)}
        if kept := sorted(names.intersection(self._settings.preserve_models)):
            return f"{kept[0]} is one of preserve_models" if kept[0] != view.model else "it is one of preserve_models"
        movable = view.state in ("running", "asleep") or loads_give_way
        return None if movable else f"it is {view.state} right now"

    def _drain_seconds(self, traffic: Traffic) -> float:
        """How long answers under way are likely to take: what they took in the mean, at most what a drain may take."""
        if not traffic.in_flight:
            return 0.0
        longest = self._settings.drain_timeout_seconds
        return longest if traffic.mean_seconds is None else min(longest, traffic.mean_seconds)


def _rest_of(need: Need, view: InstanceView) -> Need:
    """What a model needs beyond what its instance holds already: nothing, unless it sleeps."""
    held = view.usage.bytes if view.usage else 0
    return Need(need.device, max(0, need.bytes - held) if view.state == "asleep" else 0, need.basis)


def _holdings(views: Iterable[InstanceView]) -> list[Holding]:
    own = (v for v in views if v.shares is None)
    return [part for v in own for part in holdings_of(v.model, v.device, v.usage, v.reserved_bytes)]
