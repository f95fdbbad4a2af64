"""Fixtures of the unit tests: the app in this process instead of a real console."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.in_process import InProcess, in_process
from tests.support.scripted_engine import Reply, ScriptedEngine


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """The module's app in this process, with the demo models. A module may override it."""
    with in_process(tmp_path_factory.mktemp("app")) as console:
        yield console


@pytest.fixture
def console(shared: InProcess) -> InProcess:
    """The module's app with nothing loaded and nothing under way."""
    shared.reset()
    return shared


@pytest.fixture
def loaded(console: InProcess) -> Iterator[Callable[..., ScriptedEngine]]:
    """Load switchyard-mini on a scripted engine."""
    started: list[ScriptedEngine] = []

    def load(*replies: Reply) -> ScriptedEngine:
        started.append(ScriptedEngine(*replies))
        console.show("switchyard-mini", origin=started[-1].origin)
        return started[-1]

    yield load
    for engine in started:
        engine.close()
