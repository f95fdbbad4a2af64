"""Gathers what a plan is made from: fresh readings, what is loaded, what past loads taught."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from services.catalog import Catalog
from services.config import Settings, Strategy
from services.engines.port import HOST_DEVICE, Engine, EngineError, Model, Need
from services.memory.devices import DeviceMonitor
from services.memory.ledger import Account, Holding, account, holdings_of
from services.switching.events import Board, InstanceView
from services.switching.learning import Learned
from services.switching.plan import Alternative, Loaded, Plan, make_plan
from services.switching.progress import History


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
        holdings = _holdings(snapshot.instances.values())
        ledger = self.account(need.device, holdings)
        auto = self._settings.auto_unload if auto_unload is None else auto_unload
        already = snapshot.instances.get(model.id)
        return make_plan(
            model.id,
            need if already is None else _rest_of(need, already),
            available_bytes=ledger.available_bytes,
            total_bytes=ledger.total_bytes,
            loaded=[self._loaded(view, loads_give_way) for view in snapshot.instances.values()],
            strategy=strategy or self._settings.strategy,
            load_seconds=self.load_seconds(model) if already is None or already.state == "asleep" else 0.0,
            auto_unload=auto,
            instead_of=instead_of,
            others=[Alternative(m.id, self.need(m)) for m in self._catalog.models.values() if not m.fault],
            host_available_bytes=self._account(HOST_DEVICE, holdings).available_bytes,
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

    def need(self, model: Model) -> Need:
        return self._learned.need(model, self._engines[model.engine])

    def load_seconds(self, model: Model) -> float | None:
        """How long loading it usually takes, or waking it while it sleeps; None when nobody can know yet."""
        return self.history(model).total_seconds

    def history(self, model: Model) -> History:
        """What is known of how long that takes, stage by stage."""
        view = self._board.current.instances.get(model.id)
        return self._history(model, waking=view is not None and view.state == "asleep")

    def _history(self, model: Model, *, waking: bool) -> History:
        return self._learned.history(model, self._engines[model.engine], waking=waking)

    def _loaded(self, view: InstanceView, loads_give_way: bool) -> Loaded:
        model = self._catalog.models.get(view.model)
        last_used = view.traffic.last_used or view.loaded_at
        movable = view.state in ("running", "asleep") or loads_give_way
        held = view.usage.bytes if view.usage else 0
        if model is not None and view.state == "running" and not held:
            held = self.need(model).bytes  # a driver that doesn't tell, or one just found: unmeasured is not nothing
        return Loaded(
            model=view.model,
            device=view.device,
            bytes=max(held, view.reserved_bytes),
            idle_seconds=None if last_used is None else max(0.0, time.time() - last_used),
            in_flight=view.traffic.in_flight,
            reload_seconds=self._history(model, waking=False).total_seconds if model else None,
            favorite=view.model in self._settings.preserve_models,
            keep=None if movable else f"it is {view.state} right now",
            spilled_bytes=view.usage.spilled_bytes if view.usage else 0,
            asleep=view.state == "asleep",
            rest=view.rest,
            wake_seconds=self._history(model, waking=True).total_seconds if model else None,
        )


def _rest_of(need: Need, view: InstanceView) -> Need:
    """What a model needs beyond what its instance holds already: nothing, unless it sleeps."""
    held = view.usage.bytes if view.usage else 0
    return Need(need.device, max(0, need.bytes - held) if view.state == "asleep" else 0, need.basis)


def _holdings(views: Iterable[InstanceView]) -> list[Holding]:
    return [part for v in views for part in holdings_of(v.model, v.device, v.usage, v.reserved_bytes)]
