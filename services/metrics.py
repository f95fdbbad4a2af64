"""What Prometheus scrapes: the status, and counts since the app started. Computed at each scrape.

The requests of a model are counted where they are anyway (`Traffic`), so that a relayed request costs nothing more.
Counters begin at 0 with the app, which Prometheus takes for a restart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from services.downloads.download import Download
from services.memory.ledger import Account
from services.status import ModelStatus, Status
from services.switching.events import Snapshot
from services.switching.tally import Tally


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the figures come from; each is called once per scrape."""

    status: Callable[[], Status]
    snapshot: Callable[[], Snapshot]
    tally: Tally
    waiting: Callable[[], Mapping[str, int]]
    downloads: Callable[[], Sequence[Download]]


class Metrics:
    """The text of `/metrics`."""

    def __init__(self, sources: Sources, version: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Switchyard(sources, version))
        ProcessCollector(registry=self._registry)

    content_type = CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _Switchyard(Collector):
    def __init__(self, sources: Sources, version: str) -> None:
        self._sources = sources
        self._version = version

    def collect(self) -> Iterator[Metric]:
        status, snapshot = self._sources.status(), self._sources.snapshot()
        yield _gauge("info", "The version that runs.", [({"version": self._version}, 1)])
        yield from _of_models(status.models)
        yield from _of_memory(status)
        yield from _of_requests(snapshot, self._sources.waiting())
        yield from _of_switches(self._sources.tally, status)
        downloads = Counter(download.state for download in self._sources.downloads())
        yield _gauge("downloads", "Downloads by state.", [({"state": name}, n) for name, n in downloads.items()])


def _of_models(models: Sequence[ModelStatus]) -> Iterator[Metric]:
    states = [({"model": m.id, "engine": m.engine, "kind": m.kind, "state": m.state}, 1) for m in models]
    yield _gauge("model_state", "1 for the state that a model is in.", states)
    yield _gauge(
        "model_active", "1 for the model that answers requests naming none.", _each(models, lambda m: m.active)
    )
    needed = [({"model": m.id, "basis": m.memory_basis or ""}, m.required_bytes) for m in models if m.required_bytes]
    yield _gauge("model_required_bytes", "Memory that a model takes when loaded, and how that is known.", needed)
    forecast = [({"model": m.id}, m.estimated_load_seconds) for m in models if m.estimated_load_seconds is not None]
    yield _gauge("model_load_forecast_seconds", "Forecast of the time to load a model.", forecast)


def _of_memory(status: Status) -> Iterator[Metric]:
    held = [({"device": d.id, "model": model}, size) for d in status.devices for model, size in d.ours]
    yield _gauge("model_memory_bytes", "Memory that a loaded model holds on a device, measured.", held)
    parts: tuple[tuple[str, Callable[[Account], int]], ...] = (
        ("total", lambda d: d.total_bytes),
        ("available", lambda d: d.available_bytes),
        ("reserved", lambda d: d.reserved_bytes),
        ("other_programs", lambda d: d.other_bytes),
    )
    rows = [({"device": d.id, "name": d.name, "part": name}, of(d)) for d in status.devices for name, of in parts]
    yield _gauge("device_memory_bytes", "A device's memory: in all, available, reserved by loads, others'.", rows)


def _of_requests(snapshot: Snapshot, waiting: Mapping[str, int]) -> Iterator[Metric]:
    views = snapshot.instances.values()
    answered = Counter(dict(snapshot.answered))
    for view in views:
        answered[view.model] += view.traffic.answered
    rows = [({"model": model}, count) for model, count in sorted(answered.items())]
    yield _counter("requests", "Requests that a model has answered, whatever came of them.", rows)
    in_flight = [({"model": view.model}, view.traffic.in_flight) for view in views]
    yield _gauge("requests_in_flight", "Requests that a model is answering.", in_flight)
    queued = [({"model": model}, count) for model, count in waiting.items()]
    yield _gauge("requests_waiting", "Requests that wait for a model to be loaded.", queued)


def _of_switches(tally: Tally, status: Status) -> Iterator[Metric]:
    switches = SummaryMetricFamily("switchyard_switch_seconds", "Switches from request to end.", labels=["outcome"])
    for outcome, count in tally.switches.items():
        switches.add_metric([outcome], count_value=count, sum_value=tally.seconds.get(outcome, 0.0))
    yield switches
    failed = [({"model": model}, count) for model, count in tally.failed_loads.items()]
    yield _counter("failed_loads", "Loads that failed.", failed)
    yield _gauge("switch_under_way", "1 while a switch is under way.", [({}, int(status.switch is not None))])


def _each(models: Sequence[ModelStatus], holds: Callable[[ModelStatus], bool]) -> list[tuple[dict[str, str], float]]:
    return [({"model": m.id}, 1) for m in models if holds(m)]


Rows = Sequence[tuple[Mapping[str, str], float]]


def _gauge(name: str, about: str, rows: Rows) -> Metric:
    return _filled(GaugeMetricFamily(f"switchyard_{name}", about, labels=_labels(rows)), rows)


def _counter(name: str, about: str, rows: Rows) -> Metric:
    return _filled(CounterMetricFamily(f"switchyard_{name}", about, labels=_labels(rows)), rows)


def _labels(rows: Rows) -> list[str]:
    return list(rows[0][0]) if rows else []


def _filled(family: GaugeMetricFamily | CounterMetricFamily, rows: Rows) -> Metric:
    for labels, value in rows:
        family.add_metric(list(labels.values()), value)
    return family
