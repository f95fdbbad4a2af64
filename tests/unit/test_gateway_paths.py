"""Requests under /v1: which reach an engine, which may cause a switch, and the errors of the others."""

from __future__ import annotations

import pytest

from tests.support.scripted_engine import Reply, answer

MINI, SMALL = "switchyard-mini", "switchyard-small"
IMAGE_ELSEWHERE = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}


def error(response) -> dict[str, object]:
    """The error in OpenAI's shape."""
    document = response.get_json()
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return document["error"]


@pytest.mark.parametrize(
    ("method", "headers"), [("GET", {}), ("GET", IMAGE_ELSEWHERE), ("HEAD", IMAGE_ELSEWHERE), ("DELETE", {})]
)
def test_only_a_post_switches(console, loaded, method, headers):
    """A page of another site named a model in an <img>, and the model in use was unloaded. Now nothing is called."""
    engine = loaded()
    response = console.client.open(f"/v1/anything?model={SMALL}", method=method, headers=headers)
    assert response.status_code == 409
    if method != "HEAD":
        assert error(response)["code"] == "model_not_loaded"
    assert (console.switch_requests, engine.requests) == ([], [])


@pytest.mark.parametrize("state", ["asleep", "loading", "unloading"])
def test_a_get_does_not_load_a_model(console, state):
    """Whether the request names it or it is the active one."""
    console.show(SMALL, state)
    assert error(console.client.get(f"/v1/anything?model={SMALL}"))["code"] == "model_not_loaded"
    console.services.board.publish(active_model=SMALL)
    assert error(console.client.get("/v1/anything"))["code"] == "model_not_loaded"
    assert console.switch_requests == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
def test_any_path_is_relayed_to_a_loaded_model(console, loaded, method):
    """Any other /v1 path is relayed to the loaded model's engine, with its query, unchanged."""
    engine = loaded(Reply(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nETag: yes\r\n\r\n" + b"hi" * (method != "HEAD")))
    response = console.client.open("/v1/responses/resp_1?model=auto&x=1", method=method)
    assert (response.status_code, response.headers["ETag"]) == (200, "yes")
    assert response.data == (b"" if method == "HEAD" else b"hi")
    assert engine.lines == [f"{method} /v1/responses/resp_1?model=auto&x=1 HTTP/1.1"]


def test_a_post_to_an_unknown_path_does_not_switch(console, loaded):
    """A misspelt path must not unload a model; the error names the model that isn't loaded, and what to do."""
    engine = loaded()
    response = console.client.post("/v1/chat/completion", json={"model": SMALL})
    assert response.status_code == 409
    assert SMALL in str(error(response)["message"])
    assert (console.switch_requests, engine.requests) == ([], [])


@pytest.mark.parametrize(
    "path", ["chat/completions", "completions", "responses", "messages/count_tokens", "score", "audio/speech"]
)
def test_a_post_to_a_generating_path_switches(console, path):
    """Paths that all engines serve, and paths that some serve."""
    console.client.post(f"/v1/{path}", json={"model": SMALL})
    assert console.switch_requests == [SMALL]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", {"POST", "OPTIONS"}),
        ("PUT", "/v1/completions", {"POST", "OPTIONS"}),
        ("DELETE", "/v1/messages/count_tokens", {"POST", "OPTIONS"}),
        ("GET", "/chat/completions", {"POST", "OPTIONS"}),
        ("POST", "/v1/models", {"GET", "HEAD", "OPTIONS"}),
        ("DELETE", f"/v1/models/{MINI}", {"GET", "HEAD", "OPTIONS"}),
        ("POST", "/v1/models/status", {"GET", "HEAD", "OPTIONS"}),
        ("PATCH", "/v1/models/switch", {"GET", "HEAD", "POST", "DELETE", "OPTIONS"}),
        ("POST", "/v1/models/switch/events", {"GET", "HEAD", "OPTIONS"}),
        ("GET", "/v1/models/switch/plan", {"POST", "OPTIONS"}),
        ("GET", f"/v1/models/{MINI}/start", {"POST", "OPTIONS"}),
        ("POST", "/v1/events", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_a_known_path_with_another_method_is_405(console, loaded, method, path, allowed):
    """With Allow, in OpenAI's shape; the engine is not called, because its error would differ."""
    engine = loaded()
    response = console.client.open(path, method=method)
    assert response.status_code == 405
    assert set(response.headers["Allow"].split(", ")) == allowed
    assert error(response)["code"] == "method_not_allowed"
    assert (console.switch_requests, engine.requests) == ([], [])


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v1/models/", "/v1/events/more", "/v1/preferences/x/y", "/v1/x/../../api/delete", "/v1/./x"],
)
def test_our_own_and_unsafe_paths_are_not_relayed(console, loaded, method, path):
    """Outside /v1, engines have endpoints that unload, delete and shut down."""
    engine = loaded()
    response = console.client.open(path, method=method)
    assert response.status_code == 404
    assert engine.requests == []


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT"])
def test_an_unknown_path_with_nothing_loaded_is_404(console, method):
    """There is no engine that could serve it."""
    response = console.client.open("/v1/nonsense", method=method)
    assert (response.status_code, error(response)["code"]) == (404, "not_found")


NO_SUCH_ADDRESS = [
    pytest.param(b"404 page not found", id="ollama"),
    pytest.param({"detail": "Not Found"}, id="vllm, before 0.10"),
    pytest.param({"error": {"message": "Not Found", "type": "NotFoundError", "param": None, "code": 404}}, id="vllm"),
    pytest.param({"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}, id="llama.cpp"),
    pytest.param(b"", id="nothing"),
]


@pytest.mark.parametrize("body", NO_SUCH_ADDRESS)
@pytest.mark.parametrize("path", ["/v1/nonsense", "/v1/embeddings", "/v1/rerank"])
def test_a_path_that_the_engine_does_not_serve_is_our_404(console, loaded, path, body):
    """In Flask and in the hot lane: each engine words this error differently."""
    engine = loaded(Reply(answer("404 Not Found", body)))
    view = console.services.board.current.instances[MINI]
    response = console.client.post(path, json={"input": "x"})
    assert (response.status_code, error(response)["code"]) == (404, "not_found")
    assert MINI in str(error(response)["message"])
    assert len(engine.requests) == 1
    assert view.traffic.in_flight == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_any_other_404_is_relayed_unchanged(console, loaded, path):
    """An error about a model or response is relayed unchanged, byte for byte."""
    own = {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "param": None, "code": 404}}
    engine = loaded(Reply(answer("404 Not Found", own)))
    response = console.client.post(path, json={"messages": []})
    assert (response.status_code, response.get_json()) == (404, own)
    assert len(engine.requests) == 1


def test_a_long_404_is_relayed_completely(console, loaded):
    """The part that was read to examine it is included."""
    loaded(Reply(answer("404 Not Found", b"x" * 300_000)))
    response = console.client.post("/v1/chat/completions", json={"messages": []})
    assert (response.status_code, response.data) == (404, b"x" * 300_000)


def test_a_method_that_the_engine_does_not_allow_is_our_405(console, loaded):
    """With the methods that the engine allows."""
    loaded(Reply(answer("405 Method Not Allowed", {"detail": "Method Not Allowed"}, "Allow: POST")))
    response = console.client.get("/v1/load_lora_adapter")
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")
    assert error(response)["code"] == "method_not_allowed"


def test_a_truncated_404_is_an_engine_error(console, loaded):
    """The request is no longer counted as in flight."""
    loaded(Reply(b"HTTP/1.1 404 Not Found\r\nContent-Length: 100\r\n\r\n{", close=True))
    response = console.client.post("/v1/chat/completions", json={"messages": []})
    assert (response.status_code, error(response)["code"]) == (502, "engine_unreachable")
    assert console.services.board.current.instances[MINI].traffic.in_flight == 0


def test_an_unknown_model_is_404_with_any_method(console, loaded):
    """The same error as for a POST."""
    loaded()
    assert error(console.client.get("/v1/anything?model=nope"))["code"] == "model_not_found"
