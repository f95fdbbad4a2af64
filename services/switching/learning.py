"""What past loads taught: how long a model takes and how much it holds, per (model, engine, settings)."""

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
"""The settings key under which fetches are remembered, their bytes as `memory_bytes`."""
_BASIS_RANK: dict[Basis, int] = {"measured": 0, "learned": 1, "declared": 2, "estimated": 3}


class LoadStore(Protocol):
    """Where records of loads are kept."""

    def add(self, record: LoadRecord) -> None: ...

    def recent_all(self, limit: int) -> list[LoadRecord]: ...


class Learned:
    """Past loads in memory, and each new one to the store as well."""

    def __init__(self, store: LoadStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._loads: dict[Key, list[LoadRecord]] = {}
        self.lessons = 0
        """How many records were taken in; it grows with each."""
        for record in sorted(store.recent_all(2_000), key=lambda r: r.at):
            self._remember(record)

    def record(self, load: LoadRecord) -> None:
        self._remember(load)
        self._store.add(load)

    def history(self, model: Model, engine: Engine, *, waking: bool = False) -> History:
        """How long loading took before, or waking it; the declared time when it never was loaded."""
        ready = self._ready(model.id, engine, load_key(model, engine, waking=waking))
        if not ready:
            return History(None if waking else model.load_seconds, basis="declared")
        return learn([cast("dict[Stage, float]", r.stage_seconds) for r in ready])

    def record_fetch(self, model: Model, engine: Engine, size: int, seconds: float, *, device: str, at: float) -> None:
        """Remember how long fetching `size` bytes of a model took."""
        self.record(LoadRecord(model.id, engine.name, FETCHING, "ready", seconds, {}, size, device, at))

    def fetch_seconds(self, engine: Engine, size: int | None) -> float | None:
        """How long fetching `size` bytes takes, by the pace of the latest fetches; None when nobody can know."""
        with self._lock:
            fetches = [r for key, loads in self._loads.items() if key[1:] == (engine.name, FETCHING) for r in loads]
        latest = sorted(fetches, key=lambda r: r.at)[-5:]
        paces = [r.memory_bytes / r.total_seconds for r in latest if r.memory_bytes and r.total_seconds > 0]
        return size / median(paces) if size is not None and paces else None

    def need(self, model: Model, engine: Engine) -> Need:
        """max(declared, learned p95, the engine's estimate), and which of them decided."""
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

    def _remember(self, record: LoadRecord) -> None:
        key = (record.model, record.engine, record.settings_key)
        with self._lock:
            self._loads[key] = [*self._loads.get(key, ()), record][-KEPT_PER_KEY:]
            self.lessons += 1


def load_key(model: Model, engine: Engine, *, waking: bool = False) -> str:
    """Under which settings a load is remembered. Waking is another thing than loading, and is learned by itself."""
    return f"{engine.settings_key(model)} waking" if waking else engine.settings_key(model)


def percentile_95(sizes: Sequence[int]) -> int:
    """The nearest-rank 95th percentile of a non-empty sequence."""
    ranked = sorted(sizes)
    return ranked[math.ceil(0.95 * len(ranked)) - 1]
