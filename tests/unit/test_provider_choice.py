"""`/api/providers/status`, `switch` and `health`."""

from __future__ import annotations

import pytest

from services.engines.supervisor import Health
from tests.support.console import free_port
from tests.support.health_servers import json_server

BASE = "/api/providers"
KEY = "sk-test-abcdefghijklmnop"
READY = {"status": "ready", "model": "flux-schnell"}


@pytest.fixture
def make_client(make_app):
    """Make a client; keyword arguments are settings. Nothing listens at the services' addresses unless they say so."""

    def make(**settings):
        nowhere = f"http://127.0.0.1:{free_port()}"
        app = make_app(**{"flux_api_url": nowhere, "local_vision_api_url": nowhere, **settings})
        return app.test_client()

    return make


def current(client):
    return client.get(f"{BASE}/status").get_json()["current"]


def test_the_status_has_the_shape_of_the_contract(make_client):
    with json_server(READY) as flux:
        client = make_client(flux_api_url=flux.url, llm_provider="local", openai_api_key=KEY)
        answer = client.get(f"{BASE}/status")
        said = answer.get_json()
    assert said["current"] == said["defaults"] == {"llm": "local", "image": "openai", "vision": "openai"}
    assert said["environment"] == "local"
    assert list(said["health"]) == ["ollama", "flux", "vision"]
    for health in said["health"].values():
        assert {"available", "latency_ms", "models", "error"} <= set(health)
    flux_health = said["health"]["flux"]
    assert (flux_health["available"], flux_health["models"], flux_health["error"]) == (True, ["flux-schnell"], None)
    assert flux_health["latency_ms"] >= 1
    assert (said["health"]["vision"]["available"], said["health"]["vision"]["models"]) == (False, [])
    assert "Nothing answers" in said["health"]["vision"]["error"]
    assert said["openai"] | {"key_set": True, "checked": None} == said["openai"]
    assert KEY not in answer.text


def test_a_switch_is_seen_by_the_status_and_leaves_the_defaults(make_client):
    with json_server(READY) as flux:
        client = make_client(flux_api_url=flux.url)
        answer = client.post(f"{BASE}/switch", json={"llm": "llamacpp", "image": "flux"})
        said = answer.get_json()
        assert (answer.status_code, said["status"]) == (200, "success")
        chosen = {"llm": "llamacpp", "image": "flux", "vision": "openai"}
        assert said["current"] == current(client) == chosen
        assert said["defaults"] == dict.fromkeys(chosen, "openai")


def test_a_service_that_is_down_refuses_the_whole_switch(make_client):
    """503 in the contract's words, with what to do; what could have been switched is not."""
    client = make_client()
    answer = client.post(f"{BASE}/switch", json={"llm": "ollama", "vision": "local"})
    said = answer.get_json()
    assert (answer.status_code, said["status"], said["error"]) == (503, "error", "provider_unavailable")
    assert "Ollama service not available" in said["message"]
    assert "Start Ollama service before switching" in said["guidance"]
    assert "Local vision service not available" in said["message"]
    assert [problem["service"] for problem in said["problems"]] == ["ollama", "vision"]
    assert client.post(f"{BASE}/switch", json={"llm": "local", "image": "flux"}).status_code == 503
    assert current(client) == dict.fromkeys(("llm", "image", "vision"), "openai")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"llm": "gpt-4"}, ("gpt-4", "openai, ollama, vllm, llamacpp, local")),
        ({"image": "midjourney"}, ("midjourney", "openai, flux, dalle")),
        ({"audio": "x"}, ("audio", "llm, image, vision")),
        ({}, ("llm, image, vision",)),
        ({"vision": 7}, ("openai, local, gpt-vision",)),
    ],
)
def test_what_is_unknown_is_named_with_what_there_is(make_client, body, named):
    answer = make_client().post(f"{BASE}/switch", json=body)
    assert (answer.status_code, answer.get_json()["error"]) == (422, "unknown_provider")
    for words in named:
        assert words in answer.get_json()["message"]


def test_a_body_that_is_no_object_is_refused(make_client):
    client = make_client()
    for body in ("", "[]", "{", '"ollama"'):
        assert client.post(f"{BASE}/switch", data=body).status_code == 400


def test_openai_without_a_key_names_the_setting(make_client):
    client = make_client(llm_provider="local")
    answer = client.post(f"{BASE}/switch", json={"llm": "openai"})
    assert answer.status_code == 503
    assert "openai_api_key" in answer.get_json()["message"]
    assert "OPENAI_API_KEY" in answer.get_json()["message"]
    assert current(client)["llm"] == "local"


def test_a_key_that_openai_refuses_is_refused_in_its_words(make_client):
    """The key is asked about once for all capabilities, and is in no answer."""
    refusal = {"error": {"message": f"Incorrect API key provided: {KEY}. Find yours in your account."}}
    with json_server(refusal, 401) as openai:
        client = make_client(
            openai_base_url=f"{openai.url}/v1",
            openai_api_key=KEY,
            llm_provider="local",
            image_provider="flux",
        )
        answer = client.post(f"{BASE}/switch", json={"llm": "openai", "image": "dalle"})
        again = client.get(f"{BASE}/status")
    assert answer.status_code == 503
    assert "Incorrect API key provided" in answer.get_json()["message"]
    assert KEY not in answer.text + again.text
    assert again.get_json()["openai"]["checked"] == "refused"
    assert current(client)["llm"] == "local"


def test_openai_that_does_not_answer_may_be_chosen(make_client):
    """A key is set: a network that is down for a moment keeps nobody from choosing it."""
    client = make_client(openai_base_url=f"http://127.0.0.1:{free_port()}", openai_api_key=KEY, llm_provider="local")
    assert client.post(f"{BASE}/switch", json={"llm": "openai"}).status_code == 200


def test_openai_is_asked_on_demand_only(make_client):
    """Status and health are polled, and each request counts in somebody's account."""
    with json_server({"data": []}) as openai:
        client = make_client(openai_base_url=openai.url, openai_api_key=KEY)
        client.get(f"{BASE}/status")
        said = client.get(f"{BASE}/health").get_json()
        assert (said["openai"]["checked"], openai.requests) == (None, [])
        said = client.get(f"{BASE}/health?check=openai").get_json()
        assert (said["openai"]["checked"], len(openai.requests)) == ("accepted", 1)
        assert client.get(f"{BASE}/health?check=everything").status_code == 422


def test_engines_need_a_model(make_client, tmp_path):
    """The job loads it by a switch when it starts, so that it need not be loaded now."""
    empty = tmp_path / "empty"
    empty.mkdir()
    client = make_client(models_dir=empty)
    for llm, words in (("llamacpp", "models folder"), ("vllm", "switchyard.toml"), ("local", "Models page")):
        answer = client.post(f"{BASE}/switch", json={"llm": llm})
        assert answer.status_code == 503
        assert words in answer.get_json()["guidance"]
    assert make_client().post(f"{BASE}/switch", json={"llm": "local"}).status_code == 200


def test_a_service_that_has_started_is_noticed_at_once(make_client):
    """The same switch succeeds right after the start: it does not rely on the last poll."""
    port = free_port()
    client = make_client(flux_api_url=f"http://127.0.0.1:{port}")
    client.get(f"{BASE}/status")
    assert client.post(f"{BASE}/switch", json={"image": "flux"}).status_code == 503
    with json_server(READY, port=port):
        assert client.post(f"{BASE}/switch", json={"image": "flux"}).status_code == 200


def test_the_models_of_ollama_are_in_its_health(make_app, monkeypatch):
    """From the watch that polls it anyway: no request is sent."""
    app = make_app()
    found = app.extensions["switchyard"]
    monkeypatch.setattr(found.health, "_installed", lambda: ["mistral:latest", "llama3.2:latest"])
    monkeypatch.setattr(found.health._watch, "health", Health(0.0, "0.24.0", seconds=0.0123))
    said = app.test_client().get(f"{BASE}/health").get_json()["health"]["ollama"]
    assert (said["available"], said["latency_ms"], said["models"]) == (
        True,
        12,
        ["llama3.2:latest", "mistral:latest"],
    )


@pytest.mark.parametrize(
    ("headers", "address", "expected"),
    [
        ({}, "127.0.0.1", "local"),
        ({"Host": "localhost:8787"}, "127.0.0.1", "local"),
        ({"Host": "[::1]:8787"}, "::1", "local"),
        ({}, "192.0.2.7", "production"),
        ({"Host": "switchyard.lan"}, "127.0.0.1", "production"),
        ({"X-Forwarded-For": "192.0.2.7"}, "127.0.0.1", "production"),
    ],
)
def test_local_is_bound_to_and_asked_from_loopback(make_client, headers, address, expected):
    """Through a proxy, or by another name, whoever asks is elsewhere."""
    client = make_client(allowed_hosts=("switchyard.lan",))
    answer = client.get(f"{BASE}/status", headers=headers, environ_base={"REMOTE_ADDR": address})
    assert answer.get_json()["environment"] == expected


@pytest.mark.parametrize("environment", ["local", "production"])
def test_the_setting_decides_the_environment(make_client, environment):
    client = make_client(environment=environment)
    for address in ("127.0.0.1", "192.0.2.7"):
        answer = client.get(f"{BASE}/status", environ_base={"REMOTE_ADDR": address})
        assert answer.get_json()["environment"] == environment


@pytest.mark.parametrize(("remember", "expected"), [(False, "openai"), (True, "llamacpp")])
def test_a_choice_outlasts_a_restart_only_if_it_is_to_be_remembered(make_app, remember, expected):
    """Through the database: the second app is a new one on the same state folder."""
    first = make_app(remember_providers=remember)
    assert first.test_client().post(f"{BASE}/switch", json={"llm": "llamacpp"}).status_code == 200
    first.extensions["switchyard"].close()
    assert current(make_app(remember_providers=remember).test_client())["llm"] == expected
