"""The status of models, memory and the switch: the single source for every page, fragment and endpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import structlog

from services.engines.port import Basis, Kind, Model, Need, Usage
from services.memory.devices import DeviceMonitor
from services.memory.ledger import Account, account, holdings_of
from services.pins import Pin
from services.switching.context import SwitchingContext
from services.switching.events import Failure, InstanceView, LoadView, Loss, Snapshot, SwitchView
from services.switching.planner import Planner

log = structlog.get_logger(__name__)

CACHE_SECONDS = 0.25
FORECAST_CACHE_SECONDS = 5.0
"""How long a forecast is cached although its known inputs are unchanged; an engine may have learned more."""

ModelState = Literal["running", "loading", "unloading", "asleep", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model as shown to people and scripts. Sizes are bytes, times seconds, unknown is None."""

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
    """Whether it runs but has shown no activity for too long although it has work."""
    drain_until: float | None = None
    """Deadline for the requests in flight while an unload waits for them (Unix seconds)."""
    kind: Kind = "text"
    remote: bool = False
    removable: bool = True
    favorite: bool = False
    pin: Pin | None = None

    @property
    def moving(self) -> bool:
        """Whether it is being loaded, drained or unloaded."""
        return self.state in ("loading", "unloading") or self.drain_until is not None


@dataclass(frozen=True, slots=True)
class _Forecast:
    """Memory and seconds that loading a model takes. Valid while `follows_from` is unchanged, and until `until`."""

    follows_from: tuple[object, ...]
    until: float
    need: Need | None
    seconds: float | None


class _StatusInputs(NamedTuple):
    """Everything a model's status is computed from."""

    model: Model
    view: InstanceView | None
    arriving: LoadView | None
    failure: Failure | None
    notice: str | None
    active: bool
    forecast: _Forecast
    in_flight: int
    last_used: float | None
    favorite: bool = False
    pin: Pin | None = None


class _CachedStatus(NamedTuple):
    """A model's status and its inputs."""

    inputs: _StatusInputs
    status: ModelStatus


@dataclass(frozen=True, slots=True)
class Status:
    """Everything at one version.

    `models` are in menu order: running first, then favourites, then by name. `devices` has one account each.
    """

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
        """Whether anything is changing, so that pages should poll more often."""
        return self.switch is not None or any(m.moving for m in self.models)

    def model(self, model_id: str) -> ModelStatus | None:
        return next((m for m in self.models if m.id == model_id), None)


class StatusService:
    """Computes the status from what others publish.

    Cached until outdated, so that a hundred polling tabs stay cheap.
    """

    def __init__(
        self,
        context: SwitchingContext,
        devices: DeviceMonitor,
        planner: Planner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board = context.board
        self._catalog = context.catalog
        self._devices = devices
        self._planner = planner
        self._preferences = context.preferences
        self._pins = context.pins
        self._clock = clock
        self._latest: Status | None = None
        self._fresh_until = 0.0
        self._forecasts: Mapping[str, _Forecast] = {}
        self._cached: Mapping[str, _CachedStatus] = {}

    def current(self) -> Status:
        """Return the status.

        Figures that change without a new version (free memory, requests) are at most 0.25 s old.
        """
        kept, version = self._latest, self._board.current.version
        if kept is not None and kept.version == version and self._clock() < self._fresh_until:
            return kept
        self._latest = status = self._build()
        self._fresh_until = self._clock() + CACHE_SECONDS
        return status

    def _build(self) -> Status:
        snapshot = self._board.current
        views = [v for v in snapshot.instances.values() if v.shares is None and not v.entry.remote]
        holdings = [part for v in views for part in holdings_of(v.model, v.device, v.usage, v.reserved_bytes)]
        catalogue = self._catalog.models.values()
        self._forecasts = forecasts = {model.id: self._forecast(model, snapshot) for model in catalogue}
        favorites, pins = self._preferences.current.favorites, self._pins.current
        inputs = [
            _inputs_of(m, snapshot, forecasts[m.id])._replace(favorite=m.id in favorites, pin=pins.get(m.id))
            for m in catalogue
        ]
        self._cached = cached = {one.model.id: self._status(one) for one in inputs}
        models = [one.status for one in cached.values()]
        models.sort(key=lambda m: (_MENU_ORDER[m.state], not m.favorite, m.id.casefold()))
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
        """Return the cached forecast while it is valid.

        Computing it takes three disk accesses for a model in a file.
        """
        view = snapshot.instances.get(model.id)
        follows_from = (model, self._planner.learned_version, view is not None and view.state == "asleep")
        kept = self._forecasts.get(model.id)
        if kept is not None and kept.follows_from == follows_from and self._clock() < kept.until:
            return kept
        return _Forecast(follows_from, self._clock() + FORECAST_CACHE_SECONDS, *self._compute(model))

    def _compute(self, model: Model) -> tuple[Need | None, float | None]:
        """Return need and load seconds; None for both if the engine fails, which must not fail the whole status."""
        try:
            return self._planner.need(model), self._planner.load_seconds(model)
        except Exception as error:
            log.warning("the memory a model needs can't be estimated", model=model.id, error=str(error))
            return None, None

    def _status(self, inputs: _StatusInputs) -> _CachedStatus:
        """Return the cached status if its inputs are unchanged, so that equal statuses are the same object."""
        kept = self._cached.get(inputs.model.id)
        return kept if kept is not None and kept.inputs == inputs else _CachedStatus(inputs, _status_of(inputs))


def _inputs_of(model: Model, snapshot: Snapshot, forecast: _Forecast) -> _StatusInputs:
    view = snapshot.instances.get(model.id)
    return _StatusInputs(
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


def _status_of(inputs: _StatusInputs) -> ModelStatus:
    model, view, need = inputs.model, inputs.view, inputs.forecast.need
    held = _held(view.usage, asleep=view.state == "asleep") if view and view.usage else None
    error = model.fault or (inputs.failure.cause if inputs.failure else None)
    cautions = (view.warning if view else None, inputs.notice)
    return ModelStatus(
        id=model.id,
        engine=model.engine,
        state=view.state if view else "loading" if inputs.arriving else "failed" if error else "stopped",
        active=inputs.active,
        description=model.description,
        tags=model.tags,
        size_bytes=model.size_bytes,
        used_bytes=held,
        required_bytes=(need.bytes or None) if need else None,
        memory_basis="measured" if held else need.basis if need and need.bytes else None,
        estimated_load_seconds=None if model.remote else inputs.forecast.seconds,
        load=view.load if view else inputs.arriving,
        device=view.device if view and not model.remote else None,
        in_flight=inputs.in_flight,
        last_used=inputs.last_used,
        error=error,
        warning=" ".join(words for words in cautions if words) or None,
        log_tail=inputs.failure.log_tail if inputs.failure else "",
        unresponsive=view.unresponsive if view else False,
        drain_until=view.drain_until if view else None,
        kind=model.kind,
        remote=model.remote,
        removable=model.removable,
        favorite=inputs.favorite,
        pin=inputs.pin,
    )


def _held(usage: Usage, *, asleep: bool) -> int:
    """Return the memory a model holds, without the host RAM that keeps the weights of a sleeping one."""
    return usage.bytes if asleep else usage.bytes + usage.spilled_bytes


def _arriving(model: Model, snapshot: Snapshot) -> LoadView | None:
    """Return the progress of the download that precedes a model's load, None without one."""
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
