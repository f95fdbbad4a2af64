"""The clients' operations. Kind, model and options are random by the seed; the timing is not."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import requests

from tests.soak.client import PAGE, STREAM, Client
from tests.soak.world import BAD, COPIES, HEALTHY, HUGE, OLLAMA, UNKNOWN_MODEL, Conversation

Operation = Callable[[Client, random.Random], None]

OPERATIONS: dict[str, tuple[int, Operation]] = {}
"""Each operation with its weight."""
HELLO = [{"role": "user", "content": "Hello"}]
STATUS_SECONDS = 10.0
"""The longest that the status request may take on a busy machine."""
MESSAGE = re.compile(
    r'<li id="message-(\w+)" class="message (user|assistant \w+)">(.*?)(?=<li id="message-|\Z)', re.DOTALL
)
"""A message on the Chat page: its id, its kind, its inner HTML."""
POLLED = (
    "/v1/models",
    "/v1/models/good",
    "/v1/models/switch",
    "/api/model-loading-status",
    "/api/providers/models/status",
    "/api/providers/services/status",
    "/healthz",
    "/readyz",
)
PAGES = ("/", "/models", "/chats/new", "/fragments/models", "/fragments/chat-status", "/docs")
BAD_REQUESTS = (
    ("GET", "/v1/models/none-such", None),
    ("PUT", "/v1/models/switch", {}),
    ("POST", "/v1/models/switch", {"target": "good"}),
    ("POST", "/v1/models/switch", {"target_model": "good", "replace": "perhaps"}),
    ("POST", "/v1/chat/completions", {"model": 7}),
    ("POST", "/v1/chat/completions", [1]),
    ("POST", "/api/switch-model", None),
    ("POST", "/ollama/models/switch", {"model": "good"}),
    ("GET", "/nothing", None),
)


def operation(weight: int) -> Callable[[Operation], Operation]:
    def register(function: Operation) -> Operation:
        OPERATIONS[function.__name__] = (weight, function)
        return function

    return register


# Chatting.


@operation(12)
def chat_streamed(client: Client, dice: random.Random) -> None:
    model = _talker(dice)
    with client.stream("POST", "/v1/chat/completions", model=model, json=_question(model, stream=True)) as stream:
        if stream is not None:
            stream.check_answer(stream.answers())


@operation(10)
def chat_whole(client: Client, dice: random.Random) -> None:
    model = _talker(dice)
    path = dice.choice(["/v1/chat/completions", "/v1/chat/completions", "/chat/completions"])
    answer = client.post(path, _question(model), model=model)
    if answer.status_code != 200:
        return
    document = answer.json()
    if model not in (None, document["model"]) or not document["choices"][0]["message"]["content"]:
        client.record.violation(f"{client.doing}: not the answer of {model}: {answer.text[:200]}")


@operation(6)
def chat_aborted_in_the_middle(client: Client, dice: random.Random) -> None:
    model = _talker(dice)
    with client.stream("POST", "/v1/chat/completions", model=model, json=_question(model, stream=True)) as stream:
        if stream is not None:
            stream.answers(most=dice.randint(1, 4))


@operation(5)
def chat_aborted_before_the_answer(client: Client, dice: random.Random) -> None:
    model = _talker(dice)
    seconds = dice.choice([0.05, 0.3, 1.0])
    client.abort("POST", "/v1/chat/completions", seconds=seconds, json=_question(model))


# Switching.


@operation(10)
def switch_followed(client: Client, dice: random.Random) -> None:
    body = _switch_request(dice)
    target = body["target_model"]
    with client.stream("POST", "/v1/models/switch", model=str(target), json=body, headers=STREAM) as stream:
        if stream is not None:
            stream.check_switch(stream.events())


@operation(4)
def switch_stream_aborted(client: Client, dice: random.Random) -> None:
    body = _switch_request(dice)
    target = str(body["target_model"])
    with client.stream("POST", "/v1/models/switch", model=target, json=body, headers=STREAM) as stream:
        if stream is not None:
            stream.events(most=dice.randint(1, 3))


@operation(10)
def switch_started(client: Client, dice: random.Random) -> None:
    body = _switch_request(dice)
    client.post("/v1/models/switch", body, model=str(body["target_model"]))


@operation(6)
def switch_awaited(client: Client, dice: random.Random) -> None:
    body = _switch_request(dice)
    client.post("/v1/models/switch", {**body, "wait": True}, model=str(body["target_model"]))


@operation(3)
def switch_by_script(client: Client, dice: random.Random) -> None:
    model = _target(dice)
    client.post(f"/api/switch-model?model_id={model}", model=model)


@operation(3)
def switch_by_page(client: Client, dice: random.Random) -> None:
    model = _target(dice)
    form = {"target_model": model, "activate": dice.choice(["yes", "no"]), "confirm": dice.choice(["yes", "no"])}
    client.post("/models/switch", model=model, data=form)


@operation(3)
def switch_in_ollama(client: Client, dice: random.Random) -> None:
    model = dice.choice(OLLAMA)
    client.post("/ollama/models/switch", {"model": model}, model=model)


@operation(5)
def start(client: Client, dice: random.Random) -> None:
    model = _target(dice)
    client.post(f"/v1/models/{model}/start", model=model)


@operation(6)
def stop(client: Client, dice: random.Random) -> None:
    model = _target(dice)
    path = dice.choice(["/v1/models/{}/stop", "/v1/models/{}/stop", "/models/{}/unload"])
    client.post(path.format(model), model=model)


@operation(4)
def restart(client: Client, dice: random.Random) -> None:
    model = _target(dice)
    path = dice.choice(["/v1/models/{}/restart", "/v1/models/{}/restart", "/models/{}/restart"])
    client.post(path.format(model), model=model)


@operation(3)
def cancel_current(client: Client, _dice: random.Random) -> None:
    client.ask("DELETE", "/v1/models/switch")


@operation(3)
def cancel_by_page(client: Client, dice: random.Random) -> None:
    """Cancel the current switch by its id, an earlier one by its id, or whichever is current."""
    shown = client.get("/v1/models/switch").json().get("switch_id")
    which = dice.choice(["shown", "old", "any"])
    with client.world.lock:
        seen = client.world.switches_seen
        old = dice.choice(seen)
        seen.extend([shown] if shown else [])
    client.post("/models/cancel", data={"switch_id": {"shown": shown or old, "old": old, "any": ""}[which]})


@operation(6)
def plan(client: Client, dice: random.Random) -> None:
    model = _target(dice)
    if dice.random() < 0.3:
        client.get(f"/models/plan?target={model}", model=model)
    elif dice.random() < 0.5:
        client.post(f"/v1/models/switch/plan?target_model={model}", model=model)
    else:
        client.post("/v1/models/switch/plan", {"target_model": model, "strategy": _strategy(dice)}, model=model)


# Files.


@operation(4)
def delete_a_copy(client: Client, dice: random.Random) -> None:
    model = dice.choice(COPIES)
    client.record.inject_fault("files deleted", model)
    if dice.random() < 0.7:
        client.ask("DELETE", f"/api/providers/models/{model}", model=model)
    else:
        client.post(f"/models/{model}/delete", model=model)


@operation(2)
def remove_a_file(client: Client, dice: random.Random) -> None:
    model = dice.choice(COPIES)
    client.record.inject_fault("file removed", model)
    client.world.remove_file(model)


@operation(5)
def add_a_file(client: Client, dice: random.Random) -> None:
    client.world.add_file(dice.choice(COPIES))


# Reading.


@operation(14)
def get_status(client: Client, _dice: random.Random) -> None:
    timed_status(client)


@operation(8)
def get_other_endpoints(client: Client, dice: random.Random) -> None:
    client.get(dice.choice(POLLED))


@operation(10)
def get_a_page(client: Client, dice: random.Random) -> None:
    client.ask(dice.choice(["GET", "GET", "HEAD"]), dice.choice(PAGES), headers=PAGE)


@operation(4)
def follow_events(client: Client, dice: random.Random) -> None:
    """Follow all changes, or the current switch, for a while."""
    path = dice.choice(["/v1/events", "/v1/events", "/v1/models/switch/events"])
    with client.stream("GET", path, headers=STREAM) as stream:
        if stream is not None:
            stream.events(most=1 if path == "/v1/events" else dice.randint(1, 5))


@operation(4)
def send_a_bad_request(client: Client, dice: random.Random) -> None:
    method, path, body = dice.choice(BAD_REQUESTS)
    answer = client.ask(method, path, json=body, model=UNKNOWN_MODEL)
    if answer.status_code < 400:
        client.record.violation(f"{client.doing}: {method} {path} {body} was answered with {answer.status_code}")


# Conversations.


@operation(8)
def start_a_conversation(client: Client, dice: random.Random) -> None:
    text = f"Question {dice.getrandbits(64):x}"
    answer = client.post("/chats", data={"text": text})
    if answer.status_code == 303:
        begun = Conversation(answer.headers["Location"].rpartition("/")[2], [text])
        with client.world.lock:
            client.world.conversations.append(begun)


@operation(10)
def write_a_message(client: Client, dice: random.Random) -> None:
    conversation = client.world.conversation(dice)
    if conversation is None:
        return
    text = f"Question {dice.getrandbits(64):x}"
    answer = client.post(f"/chats/{conversation.id}/messages", data={"text": text})
    if answer.status_code == 303:
        conversation.accepted.append(text)


@operation(4)
def retry_or_stop_an_answer(client: Client, dice: random.Random) -> None:
    conversation = client.world.conversation(dice)
    messages = messages_of(client, conversation) if conversation is not None else []
    if messages:
        message_id, _, _ = messages[-1]
        client.post(f"/messages/{message_id}/{dice.choice(['retry', 'stop'])}")


@operation(4)
def watch_an_answer(client: Client, dice: random.Random) -> None:
    conversation = client.world.conversation(dice)
    messages = messages_of(client, conversation) if conversation is not None else []
    if messages:
        message_id, _, _ = messages[-1]
        with client.stream("GET", f"/messages/{message_id}/stream", headers=STREAM) as stream:
            if stream is not None:
                stream.events(most=dice.choice([1, 3, 100]))


@operation(1)
def delete_a_conversation(client: Client, dice: random.Random) -> None:
    conversation = client.world.conversation(dice)
    if conversation is not None:
        conversation.deleted = True
        client.post(f"/chats/{conversation.id}/delete")


# Faults of engines.


@operation(3)
def kill_an_engine(client: Client, dice: random.Random) -> None:
    found = [*client.world.engines(), *(("", runner) for runner in client.world.ollama.runners())]
    if not found:
        return
    model, process = dice.choice(found)
    for name in [model] if model else OLLAMA:
        client.record.inject_fault("kill -9 of an engine", name)
    with suppress(psutil.NoSuchProcess):
        process.kill()


@operation(2)
def use_ollama_from_another_program(client: Client, dice: random.Random) -> None:
    """Load or unload a model in the shared Ollama, as another program would."""
    model = dice.choice(OLLAMA)
    what = dice.choice([{}, {"keep_alive": 0}])
    for name in OLLAMA:
        client.record.inject_fault("Ollama used by another program", name)
    with suppress(requests.RequestException):
        requests.post(f"{client.world.ollama.url}/api/generate", json={"model": model, **what}, timeout=30)


def timed_status(client: Client) -> dict[str, Any] | None:
    """Get the status and record how long it took; None if the response is an error."""
    began = time.monotonic()
    answer = client.get("/v1/models/status")
    seconds = time.monotonic() - began
    if not client.record.disturbed_since(began):
        client.record.status_seconds.append(seconds)
        if seconds > STATUS_SECONDS:
            client.record.violation(f"{client.doing}: the status took {seconds:.1f} s")
    return answer.json() if answer.status_code == 200 else None


def messages_of(client: Client, conversation: Conversation) -> list[tuple[str, str, str]]:
    """The messages that the Chat page shows of a conversation: id, kind and inner HTML of each."""
    page = client.get(f"/chats/{conversation.id}", headers=PAGE)
    return MESSAGE.findall(page.text) if page.status_code == 200 else []


def _talker(dice: random.Random) -> str | None:
    """The model to ask: mostly one without faults, or the active one (None, "auto")."""
    kind = dice.choices(["healthy", "active", "ollama", "copy", "bad"], [50, 20, 12, 12, 6])[0]
    if kind == "active":
        return None
    return dice.choice({"healthy": HEALTHY, "ollama": OLLAMA, "copy": COPIES, "bad": BAD}[kind])


def _question(model: str | None, *, stream: bool = False) -> dict[str, object]:
    return {"messages": HELLO, "stream": stream, **({} if model is None else {"model": model})}


def _target(dice: random.Random) -> str:
    kinds = {
        "healthy": HEALTHY,
        "copy": COPIES,
        "ollama": OLLAMA,
        "bad": BAD,
        "huge": (HUGE,),
        "unknown": (UNKNOWN_MODEL,),
    }
    return dice.choice(kinds[dice.choices(list(kinds), [50, 20, 13, 12, 3, 2])[0]])


def _strategy(dice: random.Random) -> str:
    return dice.choice(["largest_first", "oldest_first", "preserve_favorites", "cheapest_reload"])


def _switch_request(dice: random.Random) -> dict[str, object]:
    """The body of a random switch request."""
    request: dict[str, object] = {"target_model": _target(dice)}
    if dice.random() < 0.9:  # else the default "cancel"; if all requests cancelled, no switch would ever finish
        request["replace"] = dice.choice(["cancel", "queue", "queue", "queue", "refuse"])
    if dice.random() < 0.6:
        request["confirm"] = dice.random() < 0.8
    if dice.random() < 0.2:
        request["strategy"] = _strategy(dice)
    return request
