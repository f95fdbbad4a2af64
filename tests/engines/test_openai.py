"""Engine `openai`: the port's conformance suite on the fake API, and what is different about models elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from services.engines.openai.account import Account
from services.engines.openai.engine import OpenAI
from services.engines.port import Endpoint, EngineError, Model
from tests.engines.conformance import EngineCase, EngineConformance
from tests.fakes.openai_server import KEY, TEXT_MODEL, OpenAIServer

GOOD = Model("cloud", "openai", TEXT_MODEL)


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


class TestOpenAI(EngineConformance):
    """Nothing is loaded: "served" means that the engine lets requests through, and nothing can end unasked."""

    @pytest.fixture
    def case(self, server: OpenAIServer) -> EngineCase:
        engine = OpenAI(Account(server.url, KEY), {})
        other = Model("org/other:1", "openai", "gpt-5-mini")
        damaged = Model("damaged", "openai", TEXT_MODEL, options={"key_env": "NO_SUCH_KEY"})

        def serves(endpoint: Endpoint) -> bool:
            return any(model.source == endpoint.model for model in engine.loaded([GOOD, other]))

        def end(_instance: object) -> None:
            server.fault("error")

        server.reset()
        return EngineCase(engine, GOOD, other, damaged, end=end, serves=serves)

    def test_a_model_is_described_with_its_size_and_an_estimate(self, case: EngineCase):
        """It has no size here, and takes no memory."""
        model = case.engine.describe(case.good)
        assert (model.remote, model.size_bytes, model.fault) == (True, None, None)
        assert case.engine.estimate(model).bytes == 0

    def test_the_memory_of_a_loaded_model_is_measured_on_its_device(self, case: EngineCase):
        """There is none."""
        with case.ready() as (instance, _):
            assert instance.usage() is None

    def test_an_unexpected_exit_is_reported_once_with_its_cause(self, case: EngineCase):
        """A service that fails is no exit: its models stay, and its answers say what is wrong."""
        with case.ready() as (instance, endpoint):
            case.end(instance)
            assert case.serves(endpoint)
            assert instance.responds(1.0) is None
        assert case.exits == []

    def test_nothing_is_sent_to_load_warm_up_or_adopt_a_model(self, case: EngineCase, server: OpenAIServer):
        """Each request would cost money."""
        with case.ready():
            adopted = case.engine.adopt(case.engine.describe(case.good), case.exits.append)
            assert adopted is not None
            adopted.wait_ready(lambda _: None, 1.0)
            adopted.stop(1.0)
        assert server.calls == []

    def test_a_model_with_a_key_is_found_loaded_until_it_is_unloaded_by_hand(self, case: EngineCase):
        """So it is ready after each start. What was unloaded comes back with the next switch, or the next start."""
        model = case.engine.describe(case.good)
        assert case.engine.loaded([model, case.engine.describe(case.damaged)]) == [model]
        case.launch().stop(1.0)
        assert case.engine.loaded([model]) == []
        assert case.engine.adopt(model, case.exits.append) is None
        case.launch()
        assert case.engine.loaded([model]) == [model]
        assert OpenAI(Account("http://x/v1", "key"), {}).loaded([model]) == [model]

    def test_nothing_is_deleted(self, case: EngineCase):
        with pytest.raises(EngineError, match="no files here"):
            case.engine.remove(case.good, ())


@pytest.mark.parametrize(
    ("options", "authorization", "fault"),
    [
        ({}, f"Bearer {KEY}", None),
        ({"base_url": "https://api.example/other/v1"}, f"Bearer {KEY}", None),
        ({"key_env": "MINE"}, "Bearer sk-mine", None),
        ({"base_url": "http://127.0.0.1:1234/v1"}, None, None),
        ({"base_url": "http://127.0.0.1:1234/v1", "key_env": "MINE"}, "Bearer sk-mine", None),
        ({"key_env": "EMPTY"}, None, "EMPTY"),
    ],
)
def test_a_key_goes_only_where_it_belongs(options, authorization, fault):
    """The settings' key goes to the settings' host alone; another host gets the key that its model names, or none."""
    engine = OpenAI(Account("https://api.example/v1", KEY), {"MINE": " sk-mine\n", "EMPTY": ""})
    model = engine.describe(replace(GOOD, options=options))
    if fault is not None:
        assert fault in str(model.fault)
        return
    endpoint = engine.launch(model, print).wait_ready(lambda _: None, 1.0)
    assert endpoint.headers.get("Authorization") == authorization


def test_without_a_key_a_model_says_which_setting_is_missing():
    model = OpenAI(Account("https://api.example/v1"), {}).describe(GOOD)
    assert "OPENAI_API_KEY" in str(model.fault)


def test_no_key_is_printed():
    """Neither of an account nor of an endpoint, which logs and tracebacks may show."""
    account = Account("https://api.example/v1", KEY)
    assert KEY not in f"{account!r} {account.endpoint('x')!r}"


@pytest.mark.parametrize(
    ("base_url", "origin", "path"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com", "/v1"),
        ("https://openrouter.example/api/v1", "https://openrouter.example", "/api/v1"),
        ("http://10.0.0.2:8080", "http://10.0.0.2:8080", ""),
    ],
)
def test_the_path_of_a_base_url_takes_the_place_of_v1(base_url, origin, path):
    endpoint = Account(base_url, KEY).endpoint("x")
    assert (endpoint.origin, endpoint.base_path) == (origin, path)
