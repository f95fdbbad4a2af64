"""The status of all models: computed again when outdated, and only the changed parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from types import MappingProxyType

import pytest

from blueprints.api import shapes
from services.engines.port import Model, Need
from services.scheduling import ThreadScheduler
from services.status import CACHE_SECONDS, FORECAST_CACHE_SECONDS, Status, StatusService
from services.store.records import LoadRecord
from services.switching.context import SwitchingContext
from tests.support.in_process import InProcess, in_process

MINI, SMALL = "switchyard-mini", "switchyard-small"


class CountingStatus:
    """A status service with its own clock, which counts how often each model's need is computed."""

    def __init__(self, console: InProcess, patch: pytest.MonkeyPatch) -> None:
        services = self.services = console.services
        self.now = 0.0
        self.asked: Counter[str] = Counter()
        need = services.switcher._planner.need

        def counted(model: Model) -> Need:
            self.asked[model.id] += 1
            return need(model)

        patch.setattr(services.switcher._planner, "need", counted)
        context = SwitchingContext(
            services.settings,
            services.preferences,
            services.pins,
            services.board,
            services.catalog,
            services.engines,
            ThreadScheduler(),
        )
        self.status = StatusService(context, services.devices, services.switcher._planner, lambda: self.now)

    def look(self, seconds: float = CACHE_SECONDS) -> Counter[str]:
        """The computations caused by reading the status this many seconds after the last time."""
        self.now += seconds
        self.asked.clear()
        self.status.current()
        return self.asked


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    with in_process(tmp_path_factory.mktemp("app")) as console:
        yield console


@pytest.fixture
def status(console: InProcess, monkeypatch: pytest.MonkeyPatch) -> CountingStatus:
    console.reset()
    status = CountingStatus(console, monkeypatch)
    assert status.look() == {MINI: 1, SMALL: 1}
    return status


def test_a_models_need_is_computed_once(status: CountingStatus) -> None:
    assert not status.look()
    status.services.board.touch()
    assert not status.look(0)


def test_a_need_is_computed_again_after_a_while(status: CountingStatus) -> None:
    """An engine may have learned something without an event."""
    assert status.look(FORECAST_CACHE_SECONDS) == {MINI: 1, SMALL: 1}


def test_a_changed_models_need_is_computed_again(status: CountingStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    models = dict(status.services.catalog.models)
    models[MINI] = replace(models[MINI], size_bytes=7)
    monkeypatch.setattr(status.services.catalog, "_models", MappingProxyType(models))
    assert status.look() == {MINI: 1}


def test_a_load_updates_the_need_at_once(status: CountingStatus) -> None:
    learned = status.services.switcher._planner._learned
    learned.record(LoadRecord(MINI, "llamacpp", "key", "ready", 1.0, {}, 1, "host", 0.0))
    assert status.look() == {MINI: 1, SMALL: 1}


def test_a_sleeping_model_has_another_load_time(status: CountingStatus, console: InProcess) -> None:
    console.show(MINI, "asleep")
    assert status.look() == {MINI: 1}


def test_each_version_is_serialised_once_for_all_listeners(console: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    document = shapes.status_document

    def counted(status: Status, waiting: Mapping[str, int]) -> dict[str, object]:
        made.append(status.version)
        return document(status, waiting)

    monkeypatch.setattr(shapes, "status_document", counted)
    monkeypatch.setattr(console.services.status, "_clock", lambda: 0.0)
    version = console.services.board.publish().version
    with ExitStack() as open_streams:
        answers = [open_streams.enter_context(closing(console.client.get("/v1/events"))) for _ in range(5)]
        listeners = [iter(answer.response) for answer in answers]
        for _ in range(3):
            events = {next(listener) for listener in listeners}
            assert len(events) == 1
            assert f'"version":{version}'.encode() in events.pop()
            assert made == [version]
            made.clear()
            version = console.services.board.publish().version
