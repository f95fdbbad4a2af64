"""The one picture of models, memory and the switch that every page, fragment and endpoint shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import structlog

from services.catalog import Catalog
from services.engines.port import Basis, Model, Need, Usage
from services.memory.devices import DeviceMonitor
from services.memory.ledger import Account, account, holdings_of
from services.switching.events import Board, Failure, InstanceView, LoadView, Loss, Snapshot, SwitchView
from services.switching.planner import Planner

log = structlog.get_logger(__name__)

KEEP_SECONDS = 0.25
FORECAST_SECONDS = 5.0
"""How long a forecast is kept though nothing that it follows from is known to have changed: an engine may know more."""

ModelState = Literal["running", "loading", "unloading", "asleep", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model as people and scripts see it. Sizes are bytes, times seconds, unknown is None."""

    id: str
    engine: str
    state: ModelState
    active: bool
    description: str
    tags: tuple[str, ...]
    size_bytes: int | None
    used_bytes: int | None
    required_bytes: int | None
    memory_basis: Basis | None
    estimated_load_seconds: float | None
    load: LoadView | None
    device: str | None
    in_flight: int
    last_used: float | None
    error: str | None
    warning: str | None
    log_tail: str
    unresponsive: bool = False
    """Whether it runs and gives no sign of life though it should."""
    drain_until: float | None = None
    """Until when its answers under way may take, while the unload of it waits for them."""

    @property
    def moving(self) -> bool:
        """Whether it is being loaded or unloaded, or finishes its answers before it is."""
        return self.state in ("loading", "unloading") or self.drain_until is not None


@dataclass(frozen=True, slots=True)
class _Forecast:
    """What loading a model takes, in bytes and seconds. It holds while `follows_from` is the same, until `until`."""

    follows_from: tuple[object, ...]
    until: float
    need: Need | None
    seconds: float | None


class _Known(NamedTuple):
    """All that a model's status is made from."""

    model: Model
    view: InstanceView | None
    arriving: LoadView | None
    failure: Failure | None
    notice: str | None
    active: bool
    forecast: _Forecast
    in_flight: int
    last_used: float | None


class _Told(NamedTuple):
    """A model's status, and what it was made from."""

    known: _Known
    status: ModelStatus


@dataclass(frozen=True, slots=True)
class Status:
    """Everything at one version: `models` in menu order (running first, then by name), a device account each."""

    version: int
    models: tuple[ModelStatus, ...]
    devices: tuple[Account, ...]
    active_model: str | None
    switch: SwitchView | None
    last_switch: SwitchView | None
    queued: tuple[str, ...]
    loss: Loss | None = None

    @property
    def moving(self) -> bool:
        """Whether anything is changing, so that pages should look often."""
        return self.switch is not None or any(m.moving for m in self.models)

    def model(self, model_id: str) -> ModelStatus | None:
        return next((m for m in self.models if m.id == model_id), None)


class StatusService:
    """Makes the picture from what others publish. Cheap enough for a hundred tabs: one is kept until it is outdated."""

    def __init__(
        self,
        board: Board,
        catalog: Catalog,
        devices: DeviceMonitor,
        planner: Planner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board = board
        self._catalog = catalog
        self._devices = devices
        self._planner = planner
        self._clock = clock
        self._kept: Status | None = None
        self._fresh_until = 0.0
        self._forecasts: Mapping[str, _Forecast] = {}
        self._told: Mapping[str, _Told] = {}

    def current(self) -> Status:
        """The picture now; figures that move by themselves (free memory, requests) at most 0.25 s old."""
        kept, version = self._kept, self._board.current.version
        if kept is not None and kept.version == version and self._clock() < self._fresh_until:
            return kept
        self._kept = status = self._look()
        self._fresh_until = self._clock() + KEEP_SECONDS
        return status

    def _look(self) -> Status:
        snapshot = self._board.current
        views = [v for v in snapshot.instances.values() if v.shares is None]
        holdings = [part for v in views for part in holdings_of(v.model, v.device, v.usage, v.reserved_bytes)]
        catalogue = self._catalog.models.values()
        self._forecasts = forecasts = {model.id: self._forecast(model, snapshot) for model in catalogue}
        self._told = told = {m.id: self._tell(_known(m, snapshot, forecasts[m.id])) for m in catalogue}
        models = [one.status for one in told.values()]
        models.sort(key=lambda m: (_MENU_ORDER[m.state], m.id.casefold()))
        return Status(
            version=snapshot.version,
            models=tuple(models),
            devices=tuple(account(reading, holdings) for reading in self._devices.readings),
            active_model=snapshot.active_model,
            switch=snapshot.switch,
            last_switch=snapshot.last_switch,
            queued=snapshot.queued,
            loss=snapshot.loss,
        )

    def _forecast(self, model: Model, snapshot: Snapshot) -> _Forecast:
        """What is kept of it, if that still holds: for a model in a file it takes three questions to the disk."""
        view = snapshot.instances.get(model.id)
        follows_from = (model, self._planner.learned_version, view is not None and view.state == "asleep")
        kept = self._forecasts.get(model.id)
        if kept is not None and kept.follows_from == follows_from and self._clock() < kept.until:
            return kept
        return _Forecast(follows_from, self._clock() + FORECAST_SECONDS, *self._ask(model))

    def _ask(self, model: Model) -> tuple[Need | None, float | None]:
        """An engine that can't say doesn't spoil the whole picture."""
        try:
            return self._planner.need(model), self._planner.load_seconds(model)
        except Exception as error:
            log.warning("the memory a model needs is unknown", model=model.id, error=str(error))
            return None, None

    def _tell(self, known: _Known) -> _Told:
        """What is kept of it, if nothing that it shows has changed, so that whoever compares pictures is soon done."""
        kept = self._told.get(known.model.id)
        return kept if kept is not None and kept.known == known else _Told(known, _status_of(known))


def _known(model: Model, snapshot: Snapshot, forecast: _Forecast) -> _Known:
    view = snapshot.instances.get(model.id)
    return _Known(
        model=model,
        view=view,
        arriving=_arriving(model, snapshot) if view is None else None,
        failure=snapshot.failures.get(model.id),
        notice=snapshot.notices.get(model.id),
        active=model.id == snapshot.active_model,
        forecast=forecast,
        in_flight=view.traffic.in_flight if view else 0,
        last_used=(view.traffic.last_used if view else None) or snapshot.last_used.get(model.id),
    )


def _status_of(known: _Known) -> ModelStatus:
    model, view, need = known.model, known.view, known.forecast.need
    held = _held(view.usage, asleep=view.state == "asleep") if view and view.usage else None
    error = model.fault or (known.failure.cause if known.failure else None)
    cautions = (view.warning if view else None, known.notice)
    return ModelStatus(
        id=model.id,
        engine=model.engine,
        state=view.state if view else "loading" if known.arriving else "failed" if error else "stopped",
        active=known.active,
        description=model.description,
        tags=model.tags,
        size_bytes=model.size_bytes,
        used_bytes=held,
        required_bytes=(need.bytes or None) if need else None,
        memory_basis="measured" if held else need.basis if need and need.bytes else None,
        estimated_load_seconds=known.forecast.seconds,
        load=view.load if view else known.arriving,
        device=view.device if view else None,
        in_flight=known.in_flight,
        last_used=known.last_used,
        error=error,
        warning=" ".join(words for words in cautions if words) or None,
        log_tail=known.failure.log_tail if known.failure else "",
        unresponsive=view.unresponsive if view else False,
        drain_until=view.drain_until if view else None,
    )


def _held(usage: Usage, *, asleep: bool) -> int:
    """What a model holds. The weights of one that sleeps are in this machine's RAM, which is not what is asked."""
    return usage.bytes if asleep else usage.bytes + usage.spilled_bytes


def _arriving(model: Model, snapshot: Snapshot) -> LoadView | None:
    """How far the download of the model that is switched to is, which comes before its load."""
    switch = snapshot.switch
    if switch is None or switch.to_model != model.id or switch.stage != "downloading":
        return None
    return LoadView(switch.percent, switch.stage, switch.detail, switch.basis, switch.eta_seconds)


_MENU_ORDER: dict[ModelState, int] = {
    "running": 0,
    "loading": 0,
    "unloading": 0,
    "asleep": 1,
    "stopped": 2,
    "failed": 3,
}
