"""The ollama engine on an Ollama server: the conformance suite, a switch, a chat and a download.

`make test-ollama OLLAMA=/path/to/ollama OLLAMA_TEST_MODEL=…` runs this file on a real Ollama.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import requests

from services.engines.ollama.engine import Ollama
from services.engines.ollama.instance import ServerProcess
from services.engines.ollama.names import OllamaName
from services.engines.ollama.watch import OllamaWatch
from services.engines.port import Endpoint, Instance, Model
from tests.conftest import StartConsole
from tests.engines.conformance import EngineCase, EngineConformance, SharingConformance
from tests.support.console import Console
from tests.support.ollama_server import OllamaServer, ollama_server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaServer]:
    with ollama_server(tmp_path_factory.mktemp("ollama")) as server:
        yield server


@pytest.fixture
def server(running: OllamaServer) -> OllamaServer:
    """The Ollama server, with nothing loaded."""
    running.empty()
    return running


@pytest.fixture
def twin(server: OllamaServer) -> Iterator[str]:
    """A model with the same weights and its own system prompt, as made from a Modelfile."""
    name = "twin:latest"
    _order(server, "POST", "/api/create", {"model": name, "from": server.model, "system": "Rhyme.", "stream": False})
    yield name
    _order(server, "DELETE", "/api/delete", {"model": name})


class TestOnAServer(EngineConformance, SharingConformance):
    """The port's conformance suite, including shared instances."""

    @pytest.fixture
    def case(self, server: OllamaServer, twin: str) -> Iterator[EngineCase]:
        engine = Ollama(OllamaWatch(server.url), local=True, process=lambda: ServerProcess(server.pid))
        engine.prepare()
        good, other, missing = (Model(name, "ollama", name) for name in (server.model, server.other, "missing:latest"))

        def serves(endpoint: Endpoint) -> bool:
            return endpoint.model in server.ps()

        def end(_: Instance) -> None:
            server.unload(server.model)

        yield EngineCase(engine, good, other, missing, end=end, serves=serves, twin=Model(twin, "ollama", twin))
        engine.close()


@pytest.fixture
def console(start_console: StartConsole, server: OllamaServer) -> Console:
    console = start_console(
        ollama_base_url=server.url,
        ollama_binary=server.binary,
        ollama_insecure_registry=True,
        download_hosts=OllamaName.parse(server.model).host,
        disk_margin_gb=0,
    )
    console.wait_for(lambda s: {server.model, server.other} <= set(s["models"]), "its models")
    return console


def test_switching_there_and_back_unloads_and_loads_in_ollama(console: Console, server: OllamaServer):
    """After each switch Ollama holds the new model and not the old one (seed 002)."""
    for old, new in ((None, server.model), (server.model, server.other), (server.other, server.model)):
        answer = console.post("/ollama/models/switch", {"model": new}).json()
        assert (answer["status"], answer["old_model"], answer["new_model"]) == ("success", old, new)
        assert server.ps() == [new]
        assert console.status()["active_model"] == new


def test_a_chat_is_streamed_without_reloading_the_model(console: Console, server: OllamaServer):
    """The answer arrives token by token; the model stays loaded on the same device."""
    console.post("/ollama/models/switch", {"model": server.other})
    before = console.model(server.other)
    with closing(console.ask("Hello", stream=True, max_tokens=8)) as answer:
        lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 2
    assert console.model(server.other)["device"] == before["device"]
    assert server.ps() == [server.other]


def test_a_model_is_deleted_and_downloaded_again(console: Console, server: OllamaServer):
    """The download runs Ollama's command to its end; then the model can be switched to."""
    console.switch(server.model)
    console.delete(f"/api/providers/models/{server.model}")
    assert server.model not in server.tags()
    body = {"model": server.model, "source": "ollama"}
    with closing(console.post("/api/providers/models/download", body, stream=True)) as answer:
        assert '"status": "complete"' in answer.text
    assert server.model in server.tags()
    console.wait_for(lambda s: server.model in s["models"], "the model")
    console.switch(server.model)


def _order(server: OllamaServer, method: str, path: str, body: dict[str, object]) -> None:
    with requests.Session() as http:
        http.trust_env = False
        http.request(method, server.url + path, json=body, timeout=30).raise_for_status()
