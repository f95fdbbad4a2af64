"""Fixtures for the unit tests of several modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.in_process import InProcess
from tests.support.scripted_engine import Reply, ScriptedEngine


@pytest.fixture
def loaded(console: InProcess) -> Iterator[Callable[..., ScriptedEngine]]:
    """Load switchyard-mini on a scripted engine; needs a fixture `console` of the module."""
    started: list[ScriptedEngine] = []

    def load(*replies: Reply) -> ScriptedEngine:
        started.append(ScriptedEngine(*replies))
        console.show("switchyard-mini", origin=started[-1].origin)
        return started[-1]

    yield load
    for engine in started:
        engine.close()
