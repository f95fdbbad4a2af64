"""Pins: promises not to unload a model, for ever or until a time (a lease), with an owner and a reason."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Protocol

import structlog

from services.notes import Notes
from services.scheduling import Scheduler, ThreadScheduler

log = structlog.get_logger(__name__)

NOTE = "pins"


@dataclass(frozen=True, slots=True)
class Pin:
    """One pin. `until` is Unix seconds, None for ever."""

    model: str
    owner: str
    reason: str = ""
    until: float | None = None

    @property
    def words(self) -> str:
        """Who holds it, until when and why: `pinned by page until 2026-11-21 18:00: nightly evaluation`."""
        until = "" if self.until is None else time.strftime(" until %Y-%m-%d %H:%M", time.localtime(self.until))
        return f"pinned by {self.owner}{until}" + (f": {self.reason}" if self.reason else "")


class CurrentPins(Protocol):
    """Whatever knows which models are pinned."""

    @property
    def current(self) -> Mapping[str, Pin]:
        """The pins at this moment, by model; no I/O."""


class Pins:
    """The pins by model; a new one replaces the model's last. `on_change` is called after each change. Thread-safe.

    While the app runs, leases end by monotonic time, so that a step of the clock changes none. Of an earlier run only
    the clock is known.
    """

    def __init__(
        self, notes: Notes, on_change: Callable[[], object] = lambda: None, scheduler: Scheduler | None = None
    ) -> None:
        self._notes = notes
        self._on_change = on_change
        self._scheduler = scheduler or ThreadScheduler()
        self._lock = threading.Lock()
        self._current: Mapping[str, Pin] = MappingProxyType({})
        self._ends: dict[str, float] = {}
        """Monotonic time at which each lease ends."""
        for pin in _read(notes.get(NOTE)):
            self._hold(pin)

    @property
    def current(self) -> Mapping[str, Pin]:
        """No I/O. Leases that have ended are left out."""
        if not self._ends:
            return self._current
        now = self._scheduler.now()
        return {model: pin for model, pin in self._current.items() if self._ends.get(model, now + 1) > now}

    def pin(self, pin: Pin) -> None:
        """Pin a model. Raises StoreError if that can't be kept; nothing has changed then."""
        self._keep({**self.current, pin.model: pin})
        with self._lock:
            self._hold(pin)
        self._on_change()

    def unpin(self, model: str) -> Pin | None:
        """Remove a model's pin and return it; None if there is none. Raises StoreError, as `pin`."""
        pin = self.current.get(model)
        if pin is None:
            return None
        self._keep({name: kept for name, kept in self.current.items() if name != model})
        self._drop({model})
        self._on_change()
        return pin

    def expire(self) -> None:
        """Drop the leases that have ended, for pages to see it. Called regularly."""
        ended = self._current.keys() - self.current.keys()
        if ended:
            log.info("leases have ended", models=sorted(ended))
            self._drop(ended)
            self._on_change()

    def _hold(self, pin: Pin) -> None:
        self._ends.pop(pin.model, None)
        if pin.until is not None:
            self._ends[pin.model] = self._scheduler.now() + pin.until - self._scheduler.time()
        self._current = MappingProxyType({**self._current, pin.model: pin})

    def _drop(self, models: set[str]) -> None:
        with self._lock:
            self._current = MappingProxyType({m: pin for m, pin in self._current.items() if m not in models})
            for model in models:
                self._ends.pop(model, None)

    def _keep(self, pins: Mapping[str, Pin]) -> None:
        self._notes.put(NOTE, json.dumps([asdict(pin) for pin in pins.values()]))


def _read(text: str | None) -> list[Pin]:
    try:
        return [_pin(item) for item in json.loads(text or "[]")]
    except (ValueError, TypeError, KeyError):
        log.warning("the pins that were kept can't be read; there are none")
        return []


def _pin(item: Mapping[str, Any]) -> Pin:
    until = item["until"]
    return Pin(str(item["model"]), str(item["owner"]), str(item["reason"]), None if until is None else float(until))
