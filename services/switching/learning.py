"""Load times and memory learned from past loads, per (model, engine, settings)."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from statistics import median
from typing import Protocol, cast

from services.engines.port import Basis, Engine, Model, Need, Stage
from services.store.records import LoadRecord
from services.switching.progress import History, learn

Key = tuple[str, str, str]
KEPT_PER_KEY = 20
FETCHING = "fetching"
"""Settings key of fetch records; their size in bytes is kept as `memory_bytes`."""
_BASIS_RANK: dict[Basis, int] = {"measured": 0, "learned": 1, "declared": 2, "estimated": 3}


class LoadStore(Protocol):
    """Persistent store of load records."""

    def add(self, record: LoadRecord) -> None: ...

    def recent_all(self, limit: int) -> list[LoadRecord]: ...


class Learned:
    """Cache of past loads; new ones are also written to the store. Thread-safe."""

    def __init__(self, store: LoadStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._loads: dict[Key, list[LoadRecord]] = {}
        self.version = 0
        """Number of records so far. Forecasts made at a lower version are outdated."""
        for record in sorted(store.recent_all(2_000), key=lambda r: r.at):
            self._keep(record)

    def record(self, load: LoadRecord) -> None:
        self._keep(load)
        self._store.add(load)

    def history(self, model: Model, engine: Engine, *, waking: bool = False) -> History:
        """Return past load times, or wake times; the declared load time if the model was never loaded."""
        ready = self._ready(model.id, engine, load_key(model, engine, waking=waking))
        if not ready:
            return History(None if waking else model.load_seconds, basis="declared")
        return learn([cast("dict[Stage, float]", r.stage_seconds) for r in ready])

    def record_fetch(self, model: Model, engine: Engine, size: int, seconds: float, *, device: str, at: float) -> None:
        """Record that fetching `size` bytes of a model took `seconds`."""
        self.record(LoadRecord(model.id, engine.name, FETCHING, "ready", seconds, {}, size, device, at))

    def fetch_seconds(self, engine: Engine, size: int | None) -> float | None:
        """Forecast the seconds that fetching `size` bytes takes.

        It is based on the median rate of the latest five fetches; None if unknown.
        """
        with self._lock:
            fetches = [r for key, loads in self._loads.items() if key[1:] == (engine.name, FETCHING) for r in loads]
        latest = sorted(fetches, key=lambda r: r.at)[-5:]
        paces = [r.memory_bytes / r.total_seconds for r in latest if r.memory_bytes and r.total_seconds > 0]
        return size / median(paces) if size is not None and paces else None

    def need(self, model: Model, engine: Engine) -> Need:
        """Return the memory a model needs.

        It is the largest of the declared size, the learned 95th percentile and the engine's estimate; `Need.basis` says
        which.
        """
        estimate = engine.estimate(model)
        figures: list[tuple[int, Basis]] = [(estimate.bytes, estimate.basis)]
        if model.required_bytes:
            figures.append((model.required_bytes, "declared"))
        ready = self._ready(model.id, engine, load_key(model, engine))
        measured = [r.memory_bytes for r in ready if r.memory_bytes]
        if measured:
            figures.append((percentile_95(measured), "learned"))
        size, basis = max(figures, key=lambda figure: (figure[0], -_BASIS_RANK[figure[1]]))
        return Need(estimate.device, size, basis)

    def _ready(self, model_id: str, engine: Engine, key: str) -> list[LoadRecord]:
        with self._lock:
            return [r for r in self._loads.get((model_id, engine.name, key), ()) if r.outcome == "ready"]

    def _keep(self, record: LoadRecord) -> None:
        key = (record.model, record.engine, record.settings_key)
        with self._lock:
            self._loads[key] = [*self._loads.get(key, ()), record][-KEPT_PER_KEY:]
            self.version += 1


def load_key(model: Model, engine: Engine, *, waking: bool = False) -> str:
    """Return the settings key of a load. Waking takes a different time than loading, so it has a key of its own."""
    return f"{engine.settings_key(model)} waking" if waking else engine.settings_key(model)


def percentile_95(sizes: Sequence[int]) -> int:
    """Return the nearest-rank 95th percentile of a non-empty sequence."""
    ranked = sorted(sizes)
    return ranked[math.ceil(0.95 * len(ranked)) - 1]
