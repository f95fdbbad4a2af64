"""Access checks by host and origin, and the rate limit on switches."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import pytest
from werkzeug.test import TestResponse

from blueprints.guard import ANSWERING, SWITCHING, host_is_ours, origin_is_ours
from services.switching.events import Unloading
from tests.support.in_process import InProcess, in_process
from tests.support.scripted_engine import ScriptedEngine

MINI, SMALL = "switchyard-mini", "switchyard-small"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """An app that allows each client one switch a minute."""
    with in_process(tmp_path_factory.mktemp("app"), switch_rate_limit="1/minute") as console:
        yield console


@pytest.fixture
def console(shared: InProcess, request: pytest.FixtureRequest) -> InProcess:
    """The app in its first state, with a client address of its own, so that nothing was counted yet."""
    shared.reset()
    shared.client.environ_base["REMOTE_ADDR"] = request.node.name
    return shared


@pytest.fixture
def engine(console: InProcess) -> Iterator[ScriptedEngine]:
    """An engine for switchyard-mini that answers every request."""
    engine = ScriptedEngine()
    console.show(MINI, origin=engine.origin)
    yield engine
    engine.close()


def use_up_limit(console: InProcess) -> None:
    """Request a switch, which is counted although it fails."""
    assert console.client.post("/v1/models/switch", json={"target_model": "nope"}).status_code == 404


def assert_limited(response: TestResponse) -> None:
    assert response.status_code == 429
    assert 0 < int(response.headers["Retry-After"]) <= 60


WAYS = [
    ("/v1/models/switch", {"json": {"target_model": MINI}}),
    (f"/v1/models/switch?target_model={MINI}", {}),
    (f"/v1/models/{MINI}/start", {}),
    (f"/v1/models/{MINI}/restart", {}),
    (f"/api/switch-model?model_id={MINI}", {}),
    ("/ollama/models/switch", {"json": {"model": MINI}}),
    ("/models/switch", {"data": {"target_model": MINI, "confirm": "yes"}}),
    (f"/models/{MINI}/restart", {"data": {}}),
    (CHAT, {"json": {"model": MINI, "messages": HELLO}}),
    ("/chat/completions", {"json": {"model": MINI, "messages": HELLO}}),
    ("/v1/messages", {"json": {"model": MINI, "messages": HELLO}}),
    ("/v1/rerank", {"json": {"model": MINI}}),
    ("/v1/audio/speech", {"json": {"model": MINI}}),
]


@pytest.mark.parametrize(("path", "body"), WAYS)
def test_every_switching_endpoint_is_limited(console, path, body):
    """Four of these endpoints were not limited. Beyond the limit the switcher isn't called; Retry-After is sent."""
    use_up_limit(console)
    response = console.client.post(path, **body)
    assert_limited(response)
    assert console.switch_requests == []
    if path.startswith(("/v1/", "/chat/")):
        assert response.get_json()["error"]["code"] == "rate_limited"
        assert response.get_json()["error"]["type"] == "rate_limit_error"
    elif path.startswith(("/api/", "/ollama/")):
        assert response.get_json()["error"] == "rate_limited"


@pytest.mark.parametrize(("path", "body"), WAYS)
def test_all_switching_endpoints_share_one_limit(console, path, body):
    """All endpoints share one count."""
    console.client.post(path, **body)
    assert_limited(console.client.post("/v1/models/switch", json={"target_model": "nope"}))


def test_a_chat_answer_that_needs_its_model_loaded_counts(console):
    """An answer of a running model is not counted, nor one that waits for the switch under way."""
    use_up_limit(console)
    console.show(MINI, "asleep")
    console.services.board.publish(active_model=MINI)
    assert_limited(console.client.post("/chats", data={"text": "Hello"}))
    assert console.services.chats.conversations() == []
    assert_limited(console.client.post("/chats/some/messages", data={"text": "Hello"}))
    console.show_switch(MINI)
    assert console.client.post("/chats/some/messages", data={"text": ""}).status_code != 429
    console.services.board.publish(switch=None)
    console.show(MINI, "running")
    assert console.client.post("/chats/some/messages", data={"text": ""}).status_code != 429


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_requests_to_a_running_model_are_not_counted(console, engine, path):
    """However often, by its name or as the active one."""
    use_up_limit(console)
    for body in ({"model": MINI}, {"model": "auto"}, {}) * 5:
        assert console.client.post(path, json=body).status_code == 200
    assert len(engine.requests) == 15


def test_requests_that_join_a_switch_are_not_counted(console):
    """A request that joins a switch causes none: the one under way, or a queued one."""
    use_up_limit(console)
    switch = console.show_switch(MINI)
    console.services.board.publish(queued=(SMALL,))
    for name in (MINI, SMALL, None):
        assert console.client.post(CHAT, json={"model": name}).status_code != 429
    assert console.switch_requests == [MINI, SMALL, MINI]
    console.services.board.publish(switch=None, queued=(), last_switch=switch)
    assert_limited(console.client.post(CHAT, json={"model": SMALL}))


def test_requests_to_a_model_being_unloaded_are_counted(console, engine):
    """The model has to be loaded again after the switch that unloads it."""
    use_up_limit(console)
    console.services.board.current.instances[MINI].traffic.close()
    console.show_switch(SMALL, unloads=(Unloading(MINI, "to make room"),))
    assert_limited(console.client.post(CHAT, json={"model": MINI}))
    assert engine.requests == []


def test_requests_without_a_switch_are_not_counted(console):
    """Reading, planning, unknown models, GETs and cancelling; also requests while `switch_on_request` is off."""
    for _ in range(3):
        console.client.get("/v1/models/status")
        console.client.post("/v1/models/switch/plan", json={"target_model": MINI})
        assert console.client.post(CHAT, json={"model": "nope"}).status_code == 404
        assert console.client.get(f"/v1/x?model={MINI}").status_code == 409
    use_up_limit(console)


def test_requests_are_not_counted_where_they_may_not_switch(tmp_path):
    """They get the same error each time, not a 429."""
    with in_process(tmp_path, switch_rate_limit="1/minute", switch_on_request=False) as console:
        codes = [console.client.post(CHAT, json={"model": MINI}).status_code for _ in range(3)]
    assert codes == [409, 409, 409]


def test_requests_that_cause_no_switch_pass_no_hook_of_the_limiter(console):
    """Flask-Limiter only counts here; its own look for limits took a third of a small answer's time."""
    app = console.app
    hooks = [*app.before_request_funcs[None], *app.after_request_funcs[None], *app.teardown_request_funcs.get(None, ())]
    assert not [hook for hook in hooks if "limiter" in repr(hook).lower()]


def test_each_client_has_its_own_limit(console):
    """One client over its limit doesn't affect others."""
    use_up_limit(console)
    other = {"REMOTE_ADDR": "somebody else"}
    url = "/v1/models/switch?target_model=nope"
    assert console.client.post(url, environ_overrides=other).status_code == 404
    assert_limited(console.client.post(url, environ_overrides=other))


def test_every_endpoint_that_switches_is_listed(console):
    """Each view that loads something or starts a run of the Studio is on the guard's list, and no other."""
    sources = {name: inspect.getsource(view) for name, view in console.app.view_functions.items()}
    switches = r"(switcher\.(switch|restart)|switch_or_ask|local_services\.start|studio\.start)\("
    assert {n for n, source in sources.items() if re.search(switches, source)} == SWITCHING
    assert {n for n, source in sources.items() if re.search(r"chats\.(start|send|retry)\(", source)} == ANSWERING


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/anything", "/v1/models/switch", "/models/switch"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
    ],
)
def test_a_page_of_another_site_can_not_act(console, engine, path, headers):
    """It can neither read what is loaded nor load anything."""
    response = console.client.post(path, json={"target_model": SMALL, "messages": HELLO}, headers=headers)
    assert response.status_code == 403
    assert (engine.requests, console.switch_requests) == ([], [])


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "same-origin"}, {"Origin": "http://localhost"}, {}])
def test_the_own_page_and_plain_scripts_can_act(console, engine, headers):
    """Same origin by either header, or a client without browser headers."""
    assert console.client.post(CHAT, json={"messages": HELLO}, headers=headers).status_code == 200
    assert len(engine.requests) == 1


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8787", "[", ""])
def test_a_foreign_host_name_is_refused(console, engine, host):
    """DNS rebinding."""
    response = console.client.post(CHAT, json={"messages": HELLO}, headers={"Host": host})
    assert response.status_code in (400, 403)
    assert engine.requests == []


def test_http_1_0_needs_no_host(console):
    """The server's own address is used as the name."""
    guard = console.app.extensions["switchyard.guard"]
    assert guard.refusal({"REQUEST_METHOD": "GET", "SERVER_NAME": "127.0.0.1"}) is None
    assert guard.refusal({"REQUEST_METHOD": "GET", "SERVER_NAME": "evil.example"}).code == "forbidden_host"


def test_origins_are_compared_by_name_and_port(console):
    """Another port of this machine is another site."""
    settings = console.services.settings
    assert all(host_is_ours(host, settings) for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8787", "[::1]:8787"))
    ours = {"HTTP_HOST": "127.0.0.1:8787"}
    assert origin_is_ours({**ours, "HTTP_ORIGIN": "http://127.0.0.1:8787"})
    assert not origin_is_ours({**ours, "HTTP_ORIGIN": "http://127.0.0.1:3000"})
