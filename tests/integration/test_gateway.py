"""The OpenAI-compatible gateway: routing, streams, the queue, and errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator

import pytest
import requests
from openai import BadRequestError, NotFoundError, OpenAI

from tests.support.console import FAKE_LLAMA_SERVER, Console, fake_model, wait_until

MINI, SMALL = "switchyard-mini", "switchyard-small"
HELLO = [{"role": "user", "content": "Hello"}]


FAKE_MODELS = (
    fake_model("slow", "slow_load:1.5")
    + fake_model("bad", "crash_loading")
    + fake_model("talker", "slow_tokens:1")
    + fake_model("ponderer", "slow_tokens:3")  # its answer takes half a minute
    + fake_model("dies", "crash_answering")
    + fake_model("good")
)


@pytest.fixture
def openai(console: Console) -> Iterator[OpenAI]:
    """OpenAI's own Python client with only its base URL changed."""
    with OpenAI(base_url=f"{console.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def shared_with_fakes(start_shared: Callable[..., Console]) -> Console:
    return start_shared(toml=FAKE_MODELS, llamacpp_server=FAKE_LLAMA_SERVER, queue_limit=2)


@pytest.fixture
def console_with_fakes(shared_with_fakes: Console) -> Console:
    """A console at rest whose models are slow to load, crash, or answer slowly; its queue holds two requests."""
    return shared_with_fakes.reset()


def test_the_openai_client_works_with_and_without_streaming(console, openai):
    """The list of models, a whole answer, and the same answer streamed."""
    console.switch(MINI)
    assert {model.id for model in openai.models.list()} == {MINI, SMALL}
    assert openai.models.retrieve(MINI).id == MINI
    options = {"model": MINI, "messages": HELLO, "temperature": 0, "max_tokens": 40}
    whole = openai.chat.completions.create(**options).choices[0].message.content
    pieces = [c.choices[0].delta.content or "" for c in openai.chat.completions.create(stream=True, **options)]
    assert len(pieces) > 3
    assert "".join(pieces) == whole
    assert openai.completions.create(model=MINI, prompt="Hello", max_tokens=2).choices[0].text is not None


def test_a_request_for_an_unloaded_model_switches_to_it(console, openai):
    """The named model is loaded for the request, and answers it."""
    answer = openai.chat.completions.create(model=SMALL, messages=HELLO, max_tokens=4)
    assert answer.model == SMALL
    assert console.states()[SMALL] == "running"


def test_unknown_models_are_404_with_the_available_ones(console, openai):
    """In OpenAI's shape, which its client understands."""
    with pytest.raises(NotFoundError) as caught:
        openai.chat.completions.create(model="../etc/passwd", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert MINI in caught.value.message
    assert console.get("/v1/models/nope").status_code == 404


def test_an_engines_error_is_relayed_unchanged(console, openai):
    """The engine's own 400 reaches the client."""
    console.switch(MINI)
    with pytest.raises(BadRequestError):
        openai.chat.completions.create(model=MINI, messages=[{"role": "user"}], max_tokens=1)  # type: ignore[typeddict-item]


def test_nothing_loaded_and_no_model_named_is_409(console):
    """`auto` without an active model: the error says what to do."""
    answer = console.ask("Hello")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_not_loaded")


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"not json", 400), (b"[1]", 400), (b'{"model": 7}', 400), (b"{" * 100_000, 400), (b"", 409)],
)
def test_invalid_bodies_get_errors_in_openais_shape(client, body, status):
    """No JSON, JSON of another type, a wrong field type, absurd nesting, an empty body."""
    answer = client.post("/v1/chat/completions", data=body, content_type="application/json")
    assert answer.status_code == status
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_too_large_is_413(console):
    """Ten megabytes with a limit of eight; the error names the setting."""
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]})
    answer = console.http.post(f"{console.url}/v1/chat/completions", data=body, timeout=10)
    assert answer.status_code == 413
    assert "max_body_mb" in answer.json()["error"]["message"]
    assert console.get("/healthz").status_code == 200


def test_switch_on_request_can_be_turned_off(start_console):
    """A model that isn't loaded is then 409, and nothing is loaded."""
    console = start_console(switch_on_request="false")
    answer = console.ask("Hello", model=MINI)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_not_loaded")
    assert console.states()[MINI] == "stopped"


def test_waiting_requests_are_visible_and_bounded(console_with_fakes):
    """Two requests wait and are listed; the third is refused with Retry-After; both are answered in the end."""
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(_ask_alone(console_with_fakes, "slow").status_code), daemon=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_until(
        lambda: sum(q["requests"] for q in console_with_fakes.get("/v1/models/switch").json()["queue"]) == 2,
        "both requests to be seen waiting",
    )
    third = console_with_fakes.ask("Hello", model="slow")
    assert (third.status_code, third.json()["error"]["code"]) == (503, "queue_full")
    assert int(third.headers["Retry-After"]) > 0
    for thread in threads:
        thread.join(20)
    assert answers == [200, 200]


def test_a_request_for_a_model_that_fails_to_load_gets_the_cause(console_with_fakes):
    """The load's first cause, in OpenAI's shape."""
    answer = console_with_fakes.ask("Hello", model="bad")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "load_failed")
    assert "told to crash" in answer.json()["error"]["message"]


def test_disconnecting_from_a_stream_stops_the_generation(console_with_fakes):
    """The engine sees its connection close, and the request is no longer in flight."""
    console_with_fakes.switch("talker")
    with console_with_fakes.post(
        "/v1/chat/completions", {"model": "talker", "messages": HELLO, "stream": True}, stream=True
    ) as answer:
        next(answer.iter_lines())
    wait_until(lambda: console_with_fakes.model("talker")["in_flight"] == 0, "the request to end")
    logs = (console_with_fakes.folder / "state" / "logs").glob("llama-server-*.log")
    log = max(logs, key=lambda path: path.stat().st_mtime)
    wait_until(lambda: "the client went away" in log.read_text(), "the engine to notice")


def test_disconnecting_before_the_answer_ends_the_request(console_with_fakes):
    """For a non-streamed answer nothing was written yet; the request is no longer in flight."""
    console_with_fakes.switch("ponderer")
    with pytest.raises(requests.Timeout):
        requests.post(
            f"{console_with_fakes.url}/v1/chat/completions", json={"model": "ponderer", "messages": HELLO}, timeout=0.5
        )
    wait_until(lambda: console_with_fakes.model("ponderer")["in_flight"] == 0, "the request to end", timeout=20)


def test_disconnecting_while_queued_frees_the_place(console_with_fakes):
    """Its place in the queue is free again; the load continues."""
    with pytest.raises(requests.Timeout):
        requests.post(
            f"{console_with_fakes.url}/v1/chat/completions", json={"model": "slow", "messages": HELLO}, timeout=0.4
        )
    wait_until(
        lambda: sum(q["requests"] for q in console_with_fakes.get("/v1/models/switch").json()["queue"]) == 0,
        "the place to be free",
    )
    console_with_fakes.wait_for(lambda s: s["models"]["slow"]["status"] == "running", "the load to finish")


def test_a_crash_during_a_stream_is_reported_in_the_stream(console_with_fakes):
    """The stream ends with an error event, and the model is shown as failed."""
    console_with_fakes.switch("dies")
    answer = console_with_fakes.post("/v1/chat/completions", {"messages": HELLO, "stream": True})
    last = [line for line in answer.text.splitlines() if line.startswith("data: ")][-1]
    assert "broke off" in json.loads(last[6:])["error"]["message"]
    console_with_fakes.wait_for(lambda s: s["models"]["dies"]["status"] == "failed", "the crash to be shown")


def test_a_request_right_after_a_crash_does_not_hang(console_with_fakes):
    """Right after a crash the model is loaded again, or the request gets an error; the app keeps serving."""
    console_with_fakes.switch("good")
    (engine,) = console_with_fakes.engines()
    engine.kill()
    answer = console_with_fakes.ask("Hello", model="good")
    assert answer.status_code in (200, 502)
    assert console_with_fakes.get("/healthz").status_code == 200


def test_chat_completions_without_v1_is_the_same_gateway(console):
    """Seed 002: POST /chat/completions, errors in the same shape."""
    console.switch(MINI)
    answer = console.post("/chat/completions", {"messages": HELLO, "max_tokens": 4})
    assert answer.json()["model"] == MINI
    assert console.post("/chat/completions", {"model": "nope", "messages": HELLO}).json()["error"]["code"]


def test_any_other_path_of_the_engine_is_relayed(console):
    """A `/v1/…` path that Switchyard doesn't know gets the engine's own answer."""
    console.switch(MINI)
    assert console.post("/v1/embeddings", {"input": "Hello"}).status_code in (200, 400, 500, 501)
    tokens = console.post("/v1/messages/count_tokens", {"model": MINI, "messages": HELLO})
    assert tokens.status_code == 200
    assert tokens.json()["input_tokens"] > 0


def _ask_alone(console: Console, model: str) -> requests.Response:
    """A chat request over a connection of its own, for another thread."""
    return requests.post(f"{console.url}/v1/chat/completions", json={"model": model, "messages": HELLO}, timeout=30)
