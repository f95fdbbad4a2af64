"""Gathers what a plan is made from: fresh readings, what is loaded, what past loads taught."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from services.catalog import Catalog
from services.config import Settings, Strategy
from services.memory.devices import DeviceMonitor
from services.memory.ledger import Account, Holding, account, holdings_of
from services.switching.engine import Engine, EngineError, Model, Need
from services.switching.events import Board, InstanceView
from services.switching.learning import Learned
from services.switching.plan import Alternative, Loaded, Plan, make_plan


class Planner:
    """Answers what a switch would do. Changes nothing; safe from any thread."""

    def __init__(
        self,
        settings: Settings,
        board: Board,
        catalog: Catalog,
        engines: Mapping[str, Engine],
        devices: DeviceMonitor,
        learned: Learned,
    ) -> None:
        self._settings = settings
        self._board = board
        self._catalog = catalog
        self._engines = engines
        self._devices = devices
        self._learned = learned

    def plan(
        self,
        model: Model,
        strategy: Strategy | None = None,
        auto_unload: bool | None = None,
        *,
        loads_give_way: bool = False,
        instead_of: str | None = None,
    ) -> Plan:
        """What making `model` ready takes now. Raises EngineError when its device isn't there.

        With `loads_give_way` a load under way counts as something that could be unloaded. `instead_of` is a model that
        goes in any case.
        """
        snapshot = self._board.current
        need = self.need(model)
        ledger = self.account(need.device, _holdings(snapshot.instances.values()))
        auto = self._settings.auto_unload if auto_unload is None else auto_unload
        already = model.id in snapshot.instances
        return make_plan(
            model.id,
            Need(need.device, 0, need.basis) if already else need,
            available_bytes=ledger.available_bytes,
            total_bytes=ledger.total_bytes,
            loaded=[self._loaded(view, loads_give_way) for view in snapshot.instances.values()],
            strategy=strategy or self._settings.strategy,
            load_seconds=0.0 if already else self.load_seconds(model),
            auto_unload=auto,
            instead_of=instead_of,
            others=[Alternative(m.id, self.need(m)) for m in self._catalog.models.values() if not m.fault],
        )

    def account(self, device: str, holdings: Iterable[Holding]) -> Account:
        """One device's memory, measured now. Raises EngineError when there is no such device."""
        for reading in self._devices.sample():
            if reading.id == device:
                return account(reading, list(holdings))
        known = ", ".join(r.id for r in self._devices.readings)
        raise EngineError(f"There is no device {device!r} on this machine. There are: {known}.")

    def need(self, model: Model) -> Need:
        return self._learned.need(model, self._engines[model.engine])

    def load_seconds(self, model: Model) -> float | None:
        """How long loading it usually takes; None when nobody can know yet."""
        return self._learned.history(model, self._engines[model.engine]).total_seconds

    def _loaded(self, view: InstanceView, loads_give_way: bool) -> Loaded:
        model = self._catalog.models.get(view.model)
        last_used = view.traffic.last_used or view.loaded_at
        return Loaded(
            model=view.model,
            device=view.device,
            bytes=max(view.usage.bytes if view.usage else 0, view.reserved_bytes),
            idle_seconds=None if last_used is None else max(0.0, time.time() - last_used),
            in_flight=view.traffic.in_flight,
            reload_seconds=self.load_seconds(model) if model else None,
            favorite=view.model in self._settings.preserve_models,
            keep=None if view.state == "running" or loads_give_way else f"it is {view.state} right now",
        )


def _holdings(views: Iterable[InstanceView]) -> list[Holding]:
    return [part for v in views for part in holdings_of(v.model, v.device, v.usage, v.reserved_bytes)]
