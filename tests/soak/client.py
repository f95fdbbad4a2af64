"""One of those who use the console at once. Every answer that it gets is judged by the contract."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests

from tests.soak.contract import ENGINE_TROUBLE, STATE_TROUBLE, STATUSES, code_of, is_engines_own, objection
from tests.soak.record import Record
from tests.soak.world import BAD, COPIES, NOBODY, World

ANSWER_SECONDS = 120.0
"""The longest that anything may be silent: longer than every bound of the settings together."""
PAGE = {"Accept": "text/html"}
STREAM = {"Accept": "text/event-stream"}

Event = tuple[str, dict[str, Any]]


class Lost(Exception):
    """The connection broke while the app was being restarted or killed: there is no answer to judge."""


class Client:
    """Does operations one after another. `doing` is the one under way."""

    def __init__(self, world: World, record: Record) -> None:
        self.world = world
        self.record = record
        self.doing = ""
        self._http = requests.Session()
        self._http.trust_env = False

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.ask("GET", path, **options)

    def post(self, path: str, body: object = None, **options: Any) -> requests.Response:
        return self.ask("POST", path, json=body, **options)

    def ask(self, method: str, path: str, *, model: str | None = None, **options: Any) -> requests.Response:
        """One whole answer, judged. `model` is who it depends on, as far as that is known. Raises Lost."""
        began = time.monotonic()
        with self._connected(f"{method} {path}", began):
            answer = self._send(method, path, **options)
            self._judge(answer, path, began, model)
        return answer

    def leave(self, method: str, path: str, *, seconds: float, **options: Any) -> None:
        """Ask, and hang up after a while without an answer."""
        try:
            self._send(method, path, timeout=(5, seconds), headers={"Connection": "close"}, **options)
        except requests.RequestException:
            self.record.count(self.doing, "left")
        else:
            self.record.count(self.doing, "answered before it left")

    @contextmanager
    def stream(self, method: str, path: str, *, model: str | None = None, **options: Any) -> Iterator[Stream | None]:
        """An answer as it comes, None when it is an error; leaving the context hangs up. Raises Lost."""
        began = time.monotonic()
        with self._connected(f"{method} {path}", began), self._send(method, path, stream=True, **options) as answer:
            self._judge(answer, path, began, model)
            streams = answer.headers.get("Content-Type", "").startswith("text/event-stream")
            yield Stream(self, answer, began, model) if answer.status_code == 200 and streams else None

    def judge_code(self, code: str, words: str, began: float, model: str | None) -> None:
        """An error that came in a stream."""
        self.record.count(self.doing, f"event {code}")
        if code not in STATUSES:
            self.record.breach(f"{self.doing}: an event says {code!r}: {words}")
        elif code in ENGINE_TROUBLE | STATE_TROUBLE and not self._expected(code, began, model):
            self.record.breach(f"{self.doing} of {model}: {code} though nobody ordered a fault: {words}")

    def _judge(self, answer: requests.Response, path: str, began: float, model: str | None) -> None:
        status, asked = answer.status_code, answer.request
        if status < 400:
            self.record.count(self.doing, f"{status}")
            return
        for_people = asked.headers.get("Accept") == PAGE["Accept"]
        code = code_of(answer.content)
        if is_engines_own(path, answer.content) and code != "internal_error" and self._excused(began, model):
            self.record.count(self.doing, f"{status} of the engine")
            return
        self.record.count(self.doing, f"{status} {code or 'page'}")
        if for_people or asked.method == "HEAD":
            told = status == 503 and any(self.record.explained(code, began) for code in STATE_TROUBLE)
            wrong = None if status == 404 or told else f"instead of a page: {answer.text[:300]}"
        else:
            wrong = objection(path, status, answer.headers, answer.content)
        if wrong is None and code in ENGINE_TROUBLE | STATE_TROUBLE and not self._expected(code, began, model):
            wrong = f"is {code} though nobody ordered a fault: {answer.text[:300]}"
        if wrong is None and code == "model_not_found" and not self._may_be_gone(began, model):
            wrong = f"says that a model which is there is not: {answer.text[:300]}"
        if wrong is not None:
            self.record.breach(f"{self.doing}: {asked.method} {path} ({model}): {status} {wrong}")

    def _may_be_gone(self, began: float, model: str | None) -> bool:
        return model in (NOBODY, *COPIES) or (model is None and self.record.faulty_since(began, None))

    def _expected(self, code: str, began: float, model: str | None) -> bool:
        """Whether an error comes of a fault that was ordered, of the model or around the app."""
        return self.record.explained(code, began) or (code in ENGINE_TROUBLE and self._excused(began, model))

    def _excused(self, began: float, model: str | None) -> bool:
        """Whether trouble with an engine was asked for. Who asks the active model can't know which one that is."""
        return model is None or model in BAD or self.record.faulty_since(began, model)

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", ANSWER_SECONDS)
        return self._http.request(method, self.world.url + path, allow_redirects=False, **options)

    @contextmanager
    def _connected(self, what: str, began: float) -> Iterator[None]:
        """A connection that breaks is a broken promise, but while the app is being restarted or killed."""
        try:
            yield
        except requests.RequestException as error:
            if not self.record.disturbed_since(began):
                seconds = time.monotonic() - began
                self.record.breach(f"{self.doing}: {what} broke off after {seconds:.1f} s: {error!r}")
            self.record.count(self.doing, "connection lost")
            raise Lost from None


class Stream:
    """The events of an answer. Whoever reads on to the end has it judged whether that was one."""

    def __init__(self, client: Client, answer: requests.Response, began: float, model: str | None) -> None:
        self._client = client
        self._answer = answer
        self._began = began
        self._model = model

    def events(self, most: int | None = None) -> list[Event]:
        """The named events to the end, or the first `most` of them."""
        seen: list[Event] = []
        name = ""
        for line in self._lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                seen.append((name, _parsed(line[6:])))
                if len(seen) == most:
                    break
        return seen

    def answers(self, most: int | None = None) -> list[str]:
        """The data of a chat answer to the end, or the first `most` pieces."""
        seen: list[str] = []
        for line in self._lines():
            if line.startswith("data: "):
                seen.append(line[6:])
                if len(seen) == most:
                    break
        return seen

    def judge_switch(self, events: list[Event]) -> None:
        """A switch that was followed to its end says how it ended, once."""
        ends = [event for event in events if event[0] in ("complete", "error")]
        if len(ends) != 1 or events[-1] is not ends[0]:
            self._ended_badly(f"the switch to {self._model} has the ends {ends}")
        elif ends[0][0] == "error":
            self._judge_error(str(ends[0][1].get("error")), str(ends[0][1].get("message")))

    def judge_answer(self, pieces: list[str]) -> None:
        """A chat answer that was read to its end is whole, or says what went wrong."""
        last = pieces[-1] if pieces else ""
        if last == "[DONE]":
            return
        error = _parsed(last).get("error")
        if not isinstance(error, dict):
            self._ended_badly(f"the answer of {self._model} just ends, with {last!r}")
        elif not self._client._excused(self._began, self._model):
            self._client.record.breach(f"{self._client.doing}: {self._model} broke off without a fault: {error}")
        else:
            self._client.record.count(self._client.doing, "event broke off")

    def _judge_error(self, code: str, words: str) -> None:
        self._client.judge_code(code, words, self._began, self._model)

    def _ended_badly(self, words: str) -> None:
        if not self._client.record.disturbed_since(self._began):
            self._client.record.breach(f"{self._client.doing}: {words}")

    def _lines(self) -> Iterator[str]:
        for line in self._answer.iter_lines(chunk_size=None):
            yield line.decode()


def _parsed(data: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
