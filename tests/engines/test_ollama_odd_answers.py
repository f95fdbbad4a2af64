"""Refusals and odd, endless or slow answers of Ollama break neither the watch nor the start of the app."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.catalog import Catalog
from services.engines.ollama.api import OllamaApi
from services.engines.ollama.engine import Ollama
from services.engines.ollama.instance import EVICTED, ServerProcess
from services.engines.ollama.watch import OllamaWatch
from services.engines.port import EngineError, Exit, Model
from tests.engines.conformance import GRACE, LOAD_SECONDS
from tests.support.console import wait_until
from tests.support.ollama import FakeOllama
from tests.support.sockets import PlainServer

GOOD = {"name": "good:latest", "size": 1000, "digest": "d" * 64, "details": {"parameter_size": "1M"}}
ODD: list[Any] = [
    None,
    7,
    "text",
    [],
    {},
    {"name": None},
    {"name": ""},
    {"name": 5},
    {"name": "two\nlines"},
    {"name": "n" * 10_000},
    {**GOOD, "name": "a", "size": "large"},
    {**GOOD, "name": "a", "size": -1},
    {**GOOD, "name": "a", "size": True},
    {**GOOD, "name": "a", "size": 10**30},
    {**GOOD, "name": "a", "size": float("inf")},
    {**GOOD, "name": "a", "digest": ["x"]},
]


class Answers:
    """A server with a fixed answer for each path: a document, or a function that writes to the connection."""

    def __init__(self) -> None:
        self.paths: dict[str, Any] = {
            "/api/version": {"version": "0.24.0"},
            "/api/tags": {"models": [GOOD]},
            "/api/ps": {"models": []},
            "/api/show": {},
        }
        self.server = PlainServer(self._answer)

    def _answer(self, link: socket.socket, request: bytes) -> None:
        said = self.paths[request.split(b" ")[1].decode()]
        if callable(said):
            said(link)
        else:
            body = said if isinstance(said, bytes) else json.dumps(said).encode()
            link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


@pytest.fixture
def answers() -> Iterator[Answers]:
    answers = Answers()
    yield answers
    answers.server.close()


@pytest.fixture
def engine(answers: Answers) -> Iterator[Ollama]:
    engine = Ollama(OllamaWatch(answers.server.url), local=False)
    yield engine
    engine.close()


def test_only_invalid_entries_are_left_out(answers: Answers, engine: Ollama):
    """The valid entries of both lists (on disk, in memory) remain; the warning is logged once, not every second."""
    answers.paths["/api/tags"] = {"models": [*ODD, GOOD]}
    answers.paths["/api/ps"] = {"models": [*ODD, {**GOOD, "size_vram": 1000, "expires_at": "2319-01-01T00:00:00Z"}]}
    engine.prepare()
    catalog = Catalog([], {"ollama": engine})
    assert list(catalog.models) == ["good:latest"]
    assert [model.id for model in engine.loaded(list(catalog.models.values()))] == ["good:latest"]
    api = OllamaApi(answers.server.url)
    with capture_logs() as logged:
        for _ in range(3):
            assert [running.name for running in api.running()] == ["good:latest"]
    assert len([line for line in logged if "invalid entries" in line["event"]]) == 1


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        {"models": 5},
        {"models": "x"},
        {"models": {"a": 1}},
        {"models": None},
        {"error": ["x"]},
        {"error": {"message": None}},
    ],
)
@pytest.mark.parametrize("path", ["/api/tags", "/api/ps", "/api/show"])
def test_malformed_answers_raise_in_neither_the_catalogue_nor_the_switcher(
    answers: Answers, engine: Ollama, path: str, said: object
):
    """`discover`, `describe` and `loaded` return what is known, whatever the server answers."""
    answers.paths[path] = said
    engine.prepare()
    found = engine.discover()
    described = engine.describe(Model("good:latest", "ollama", "good"))
    assert list(engine.loaded([*found, described])) == []


@pytest.mark.parametrize(
    "said",
    [
        {"modelfile": 5, "model_info": [], "parameters": {}},
        {"modelfile": None, "model_info": {"x.context_length": "long"}, "parameters": 7},
        {"model_info": {"x.context_length": -1}},
        {"model_info": {"x.context_length": True}},
    ],
)
def test_malformed_details_are_ignored(answers: Answers, engine: Ollama, said: object):
    """Such a model has no twin and no known context length, but it can still be described."""
    answers.paths["/api/show"] = said
    engine.prepare()
    described = engine.describe(Model("good:latest", "ollama", "good"))
    assert (described.fault, described.held_as, described.size_bytes) == (None, None, 1000)


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "soon", "", None])
def test_a_missing_or_invalid_expiry_is_none(answers: Answers, moment: object):
    """Go's zero time is in the year 1, which can't be converted to local time."""
    answers.paths["/api/ps"] = {"models": [{**GOOD, "expires_at": moment}]}
    (running,) = OllamaApi(answers.server.url).running()
    assert running.expires_at is None


def _drip(link: socket.socket) -> None:
    link.sendall(b'HTTP/1.1 200 OK\r\n\r\n{"models": [')
    while True:
        link.sendall(b" ")
        time.sleep(0.1)


def _flood(link: socket.socket) -> None:
    link.sendall(b'HTTP/1.1 200 OK\r\n\r\n{"models": [')
    while True:
        link.sendall(b" " * 1_000_000)


@pytest.mark.parametrize("misbehave", [_drip, _flood])
def test_an_endless_answer_does_not_stop_the_watch(
    answers: Answers, engine: Ollama, misbehave: Callable[[socket.socket], None]
):
    """The last known list of loaded models stays valid meanwhile; the next good answer updates it."""
    answers.paths["/api/ps"] = {"models": [GOOD]}
    engine.prepare()
    good = engine.describe(Model("good:latest", "ollama", "good"))
    wait_until(lambda: list(engine.loaded([good])) == [good], "it to be found")
    looks: list[None] = []

    def misbehaving(link: socket.socket) -> None:
        looks.append(None)
        misbehave(link)

    answers.paths["/api/ps"] = misbehaving
    wait_until(lambda: len(looks) >= 2, "the watch to look again")
    assert list(engine.loaded([good])) == [good]
    answers.paths["/api/ps"] = {"models": []}
    wait_until(lambda: list(engine.loaded([good])) == [], "what is true to be seen")


def test_a_refused_unload_reports_why_and_a_later_unload_is_noticed(tmp_path: Path):
    """The error has Ollama's message, the model still serves, and when it is unloaded later, its exit is reported."""
    with FakeOllama(tmp_path / "ollama", models={"tiny-a:latest": {}}) as server:
        process = ServerProcess(server.servers()[0].pid)
        engine = Ollama(OllamaWatch(server.url), local=True, process=lambda: process)
        engine.prepare()
        exits: list[Exit] = []
        instance = engine.launch(engine.describe(Model("tiny-a", "ollama", "tiny-a")), exits.append)
        instance.wait_ready(lambda _: None, LOAD_SECONDS)
        server.set_fault("refuse_unload", "the fake keeps it")
        with pytest.raises(EngineError, match="refuses to unload tiny-a: the fake keeps it"):
            instance.stop(GRACE)
        assert server.ps() == ["tiny-a:latest"]
        assert instance.usage() is not None
        server.clear_faults()
        server.unload("tiny-a")
        wait_until(lambda: bool(exits), "its end to be noticed")
        assert exits == [Exit(EVICTED, released=True)]
        engine.close()
