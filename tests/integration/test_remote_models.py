"""Models behind OpenAI's API (`engine = "openai"`), through the gateway's two lanes and the pages."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import requests

from tests.conftest import StartConsole
from tests.fakes.openai_server import ANSWER, KEY, TEXT_MODEL, OpenAIServer
from tests.support.console import Console, wait_until

ANSWERED = " ".join(ANSWER)


@pytest.fixture(scope="module")
def openai() -> Iterator[OpenAIServer]:
    """The API under a path of its own, as routers and proxies have it."""
    with OpenAIServer(prefix="/api/v1") as server:
        yield server


@pytest.fixture(scope="module")
def shared(start_shared: StartConsole, openai: OpenAIServer) -> Console:
    toml = f"""
[[models]]
id = "cloud"
engine = "openai"
source = "{TEXT_MODEL}"

[[models]]
id = "vectors"
engine = "openai"
kind = "embedding"
source = "text-embedding-3-small"

[[models]]
id = "wrong-key"
engine = "openai"
source = "{TEXT_MODEL}"
options = {{ key_env = "WRONG_KEY" }}

[[models]]
id = "no-key"
engine = "openai"
source = "{TEXT_MODEL}"
options = {{ key_env = "NO_KEY" }}
"""
    keys = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": openai.url, "WRONG_KEY": "sk-wrong-but-secret-8Zq"}
    return start_shared(toml=toml, environment=keys)


@pytest.fixture
def console(shared: Console, openai: OpenAIServer) -> Console:
    """Nothing is active; remote models are ready nevertheless."""
    openai.reset()
    for model_id, model in shared.status()["models"].items():
        if model["status"] != "stopped" and not model["remote"]:
            shared.post(f"/v1/models/{model_id}/stop")
    if shared.status()["active_model"] is not None:
        shared.post(f"/v1/models/{shared.status()['active_model']}/stop")
    shared.ask("Hello", model="cloud")
    shared.post("/models/dismiss")
    wait_until(lambda: openai.in_flight == 0, "the stand-in to come to rest")
    openai.reset()
    return shared


def test_a_remote_model_answers_by_its_name_on_both_lanes(console: Console, openai: OpenAIServer):
    """It gets our key and its own name, under its own path, and nothing of who asked."""
    mine = {"Authorization": "Bearer of-the-client", "X-Api-Key": "of-the-client", "Api-Key": "of-the-client"}
    whole = console.post("/v1/chat/completions", {"model": "cloud", "messages": []}, headers=mine)  # the hot lane
    short = console.post("/chat/completions", {"model": "cloud", "messages": []}, headers=mine)  # through Flask
    for answer in (whole, short):
        assert answer.json()["choices"][0]["message"]["content"] == ANSWERED
    for call in openai.calls:
        assert (call.path, call.document["model"]) == ("/api/v1/chat/completions", TEXT_MODEL)
        assert call.headers["authorization"] == f"Bearer {KEY}"
        assert "of-the-client" not in str(call.headers)
    streamed = console.ask("Hello", model="cloud", stream=True)
    assert streamed.text.endswith("data: [DONE]\n\n")
    vectors = console.post("/v1/embeddings", {"model": "vectors", "input": ["a", "b"]})
    assert len(vectors.json()["data"]) == 2


def test_auto_reaches_a_remote_model_only_once_it_was_chosen(console: Console, openai: OpenAIServer):
    """Not as the only one that is ready, and not in place of a local one that was unloaded."""
    assert console.ask("Hello", model="auto").json()["error"]["code"] == "model_not_loaded"
    console.switch("switchyard-mini")
    console.post("/v1/models/switchyard-mini/stop")
    console.wait_for(lambda s: s["models"]["switchyard-mini"]["status"] == "stopped", "the local model to be unloaded")
    assert console.status()["active_model"] is None
    assert console.ask("Hello").json()["error"]["code"] == "model_not_loaded"
    assert openai.calls == []
    console.switch("switchyard-mini")
    chosen = console.switch("cloud")
    assert chosen["status"] == "already_loaded"
    assert console.ask("Hello").json()["choices"][0]["message"]["content"] == ANSWERED
    assert console.states()["switchyard-mini"] == "running"


def test_it_holds_no_memory_and_is_not_counted(console: Console):
    """Neither in its own figures nor on a device, and a plan that needs room does not name it."""
    model = console.model("cloud")
    figures = ("size_gb", "gpu_memory_used_gb", "gpu_memory_required_gb", "device", "estimated_load_time_seconds")
    assert [model[name] for name in figures] == [None] * 5
    plan = console.post("/v1/models/switch/plan", {"target_model": "cloud"}).json()
    assert (plan["feasible"], plan["required_gb"], plan["unload"]) == (True, 0, [])
    memory = console.get("/models").text.partition('id="memory"')[2].partition("</section>")[0]
    assert "System memory" in memory
    assert "cloud" not in memory


def test_a_refused_key_is_reported_in_the_services_words_without_the_key(console: Console):
    """As trouble with the engine: a 401 would say that the client's own key is wrong."""
    for path in ("/v1/chat/completions", "/chat/completions"):
        refused = console.post(path, {"model": "wrong-key", "messages": []})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (502, "key_refused")
        assert "Incorrect API key provided: … You can find your API key at" in error["message"]
        assert "sk-wron" not in refused.text
        assert "8Zq" not in refused.text
    missing = console.post("/v1/chat/completions", {"model": "no-key", "messages": []}).json()["error"]
    assert "NO_KEY" in missing["message"]


def test_a_rate_limit_passes_with_the_time_to_wait(console: Console, openai: OpenAIServer):
    openai.fault("rate_limited:7", times=1)
    refused = console.ask("Hello", model="cloud")
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "7")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_a_client_that_leaves_leaves_nothing_running_upstream(console: Console, openai: OpenAIServer, path: str):
    openai.fault("stuck")
    body = b'{"model": "cloud", "messages": []}'
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", console.port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: openai.in_flight == 1, "the request to arrive upstream")
    wait_until(lambda: openai.in_flight == 0, "the request to end upstream")
    assert openai.disconnects == 1


def test_an_answer_that_is_cut_off_says_so(console: Console, openai: OpenAIServer):
    """A stream ends with an error event; a whole answer breaks the connection off."""
    openai.fault("cut", times=2)
    assert "The answer broke off" in console.ask("Hello", model="cloud", stream=True).text
    with pytest.raises(requests.exceptions.RequestException):
        console.ask("Hello", model="cloud")


def test_the_account_behind_the_key_is_out_of_reach(console: Console, openai: OpenAIServer):
    """Files, batches and settings lie under /v1 too; only what generates is passed on."""
    for answer in (
        console.get("/v1/files?model=cloud"),
        console.delete("/v1/files/file-1?model=cloud"),
        console.post("/v1/fine_tuning/jobs", {"model": "cloud"}),
    ):
        assert answer.status_code == 404
    assert openai.calls == []


def test_a_key_is_on_no_page_and_in_no_log(console: Console):
    """Not after answers, refusals, and a conversation with the model whose key is refused."""
    console.ask("Hello", model="cloud")
    console.ask("Hello", model="wrong-key")
    console.switch("wrong-key")
    sent = console.http.post(console.url + "/chats", data={"text": "Hello"}, timeout=60)
    wait_until(lambda: "refused the key" in console.get(urlsplit(sent.url).path).text, "the answer to fail")
    pages = [console.get(path).text for path in ("/", "/models", "/v1/models", "/v1/models/status", "/metrics")]
    shown = "\n".join([*pages, console.get(urlsplit(sent.url).path).text, console.output()])
    for secret in (KEY, KEY[:10], "sk-wrong"):
        assert secret not in shown
    assert "remote" in pages[1]
