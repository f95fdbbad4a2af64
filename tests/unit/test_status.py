"""The picture of all models: made anew when it is outdated, and no more of it than has changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from types import MappingProxyType

import pytest

from blueprints.api import shapes
from services.engines.port import Model, Need
from services.status import CACHE_SECONDS, FORECAST_CACHE_SECONDS, Status, StatusService
from services.store.records import LoadRecord
from tests.support.in_process import InProcess, in_process

MINI, SMALL = "switchyard-mini", "switchyard-small"


class Seen:
    """A status service with a clock of its own, and how often each model's need was worked out for it."""

    def __init__(self, console: InProcess, patch: pytest.MonkeyPatch) -> None:
        services = self.services = console.services
        self.now = 0.0
        self.asked: Counter[str] = Counter()
        need = services.switcher._planner.need

        def counted(model: Model) -> Need:
            self.asked[model.id] += 1
            return need(model)

        patch.setattr(services.switcher._planner, "need", counted)
        self.status = StatusService(
            services.board, services.catalog, services.devices, services.switcher._planner, lambda: self.now
        )

    def look(self, seconds: float = CACHE_SECONDS) -> Counter[str]:
        """What a look at the status asks for, that many seconds after the last one."""
        self.now += seconds
        self.asked.clear()
        self.status.current()
        return self.asked


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    with in_process(tmp_path_factory.mktemp("app")) as console:
        yield console


@pytest.fixture
def seen(console: InProcess, monkeypatch: pytest.MonkeyPatch) -> Seen:
    console.reset()
    seen = Seen(console, monkeypatch)
    assert seen.look() == {MINI: 1, SMALL: 1}
    return seen


def test_what_a_model_needs_is_worked_out_once(seen: Seen) -> None:
    assert not seen.look()
    seen.services.board.touch()
    assert not seen.look(0)


def test_it_is_worked_out_again_now_and_then(seen: Seen) -> None:
    """An engine may learn what nobody else is told of."""
    assert seen.look(FORECAST_CACHE_SECONDS) == {MINI: 1, SMALL: 1}


def test_a_model_that_has_changed_is_looked_at_again(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    models = dict(seen.services.catalog.models)
    models[MINI] = replace(models[MINI], size_bytes=7)
    monkeypatch.setattr(seen.services.catalog, "_models", MappingProxyType(models))
    assert seen.look() == {MINI: 1}


def test_a_load_teaches_something_at_once(seen: Seen) -> None:
    learned = seen.services.switcher._planner._learned
    learned.record(LoadRecord(MINI, "llamacpp", "key", "ready", 1.0, {}, 1, "host", 0.0))
    assert seen.look() == {MINI: 1, SMALL: 1}


def test_a_model_that_fell_asleep_takes_another_time(seen: Seen, console: InProcess) -> None:
    console.show(MINI, "asleep")
    assert seen.look() == {MINI: 1}


def test_however_many_listen_to_events_each_version_is_put_into_words_once(
    console: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
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
