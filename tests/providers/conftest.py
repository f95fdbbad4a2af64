"""What stands behind the adapters in their tests: OpenAI's stand-in, and an app with models that a test scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from services.engines.openai.account import Account
from services.providers.adapters import openai as openai_adapters
from services.providers.adapters.openai_api import OpenAIApi
from services.providers.adapters.upstream import CatalogModel, Gateway
from tests.fakes.openai_server import KEY, OpenAIServer
from tests.providers.contract import RETRY_AFTER, ProviderCase
from tests.support.in_process import InProcess, in_process
from tests.support.scripted_engine import Reply, ScriptedEngine, answer

HANG_SECONDS = 2.0
"""After which a call that hangs is given up, in these tests."""
STAND_IN_FAULTS = {
    "refuse": "refused",
    "busy": f"rate_limited:{RETRY_AFTER}",
    "fail": "error",
    "cut": "cut",
    "hang": "stuck",
    "garble": "garbled",
    "endless": "endless",
}


@pytest.fixture(scope="session")
def openai_server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def openai(openai_server: OpenAIServer) -> OpenAIServer:
    """The stand-in without faults."""
    openai_server.reset()
    return openai_server


@pytest.fixture
def api(openai: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> OpenAIApi:
    """The stand-in's API, whose answers are given up after HANG_SECONDS or a megabyte."""
    for name, limit in (("CHAT_SECONDS", HANG_SECONDS), ("IMAGE_SECONDS", HANG_SECONDS), ("IMAGE_BYTES", 1_000_000)):
        monkeypatch.setattr(openai_adapters, name, limit)
    return OpenAIApi(Account(openai.url, KEY))


StandInCase = Callable[..., ProviderCase]


@pytest.fixture
def stand_in_case(openai: OpenAIServer) -> StandInCase:
    """Make the case of an adapter of OpenAI's API."""

    def make(provider: object, ask: Callable[..., object], is_valid: Callable[..., bool]) -> ProviderCase:
        return ProviderCase(
            provider,
            ask,
            is_valid,
            cause=lambda fault: openai.fault(STAND_IN_FAULTS[fault]),
            asked=lambda: len(openai.calls),
            at_work=lambda: openai.in_flight,
        )

    return make


@pytest.fixture(scope="package")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """An app whose engines the tests script; one that says nothing for HANG_SECONDS is given up."""
    with in_process(tmp_path_factory.mktemp("app"), upstream_timeout_seconds=HANG_SECONDS) as console:
        yield console


@pytest.fixture
def gateway(console: InProcess) -> Gateway:
    console.reset()
    found = console.services
    return Gateway(found.board, found.catalog, found.switcher, found.router, found.relay)


class Scripted:
    """A model of the catalogue whose engine sends what `cause` sets, at first `good`."""

    def __init__(self, console: InProcess, gateway: Gateway, model: str, engine: str, good: bytes) -> None:
        self._console = console
        self._model, self._engine = model, engine
        self.servers: list[ScriptedEngine] = []
        self.upstream = CatalogModel(gateway, model)
        self.serve(Reply(good))

    def serve(self, *replies: Reply) -> None:
        self.servers.append(ScriptedEngine(*replies))
        self._console.show(self._model, engine=self._engine, origin=self.servers[-1].origin)

    def cause(self, fault: str) -> None:
        whole = answer("200 OK", {"padding": "x" * 100})
        faults = {
            "refuse": Reply(answer("400 Bad Request", _error("Rejected by the safety rules."))),
            "busy": Reply(answer("429 Too Many Requests", _error("Busy."), f"Retry-After: {RETRY_AFTER}")),
            "fail": Reply(answer("500 Internal Server Error", _error("Something broke in the engine."))),
            "cut": Reply(whole[: len(whole) - 50], close=True),
            "hang": Reply(),
            "garble": Reply(answer("200 OK", b'{"choices": [{"mess')),
            "endless": Reply(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 20_000_000),
        }
        self.serve(faults[fault])

    def reply(self, status: str, document: object) -> Reply:
        return Reply(answer(status, document))

    def asked(self) -> int:
        return sum(len(server.requests) for server in self.servers)

    def at_work(self) -> int:
        """Requests that have arrived and whose connection is still open, unless they have been answered."""
        view = self._console.services.board.current.instances[self._model]
        latest = self.servers[-1]
        return min(len(latest.requests), view.traffic.in_flight)

    def case(self, provider: object, ask: Callable[..., object], is_valid: Callable[..., bool]) -> ProviderCase:
        return ProviderCase(provider, ask, is_valid, self.cause, self.asked, self.at_work)

    def bodies(self) -> list[dict]:
        return [json.loads(request.body) for server in self.servers for request in server.requests]

    def close(self) -> None:
        for server in self.servers:
            server.close()


@pytest.fixture
def script(console: InProcess, gateway: Gateway) -> Iterator[Callable[..., Scripted]]:
    """Put a scripted model into the app: its id, its engine's name, and the body of its good answer."""
    made: list[Scripted] = []

    def make(model: str, engine: str, good: object, kind: str = "application/json") -> Scripted:
        head = answer("200 OK", good).replace(b"text/plain", kind.encode())
        made.append(Scripted(console, gateway, model, engine, head))
        return made[-1]

    yield make
    for one in made:
        one.close()


def _error(words: str) -> dict[str, object]:
    return {"error": {"code": "x", "message": words}}
