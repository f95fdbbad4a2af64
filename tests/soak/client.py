"""One of the concurrent clients. Each response is checked against the contract."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests

from tests.soak.contract import ENGINE_TROUBLE, STATE_TROUBLE, STATUSES, code_of, find_violation, is_from_engine
from tests.soak.record import Record
from tests.soak.world import BAD, COPIES, UNKNOWN_MODEL, World

ANSWER_SECONDS = 120.0
"""The longest that a response may be silent: longer than all limits in the settings together."""
PAGE = {"Accept": "text/html"}
STREAM = {"Accept": "text/event-stream"}

Event = tuple[str, dict[str, Any]]


class ConnectionLost(Exception):
    """The connection broke while the app was being restarted or killed: there is no response to check."""


class Client:
    """Runs operations one after another. `doing` is the current one."""

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
        """Get one complete response and check it. `model`: the model it depends on, if known. Raises ConnectionLost."""
        began = time.monotonic()
        with self._connected(f"{method} {path}", began):
            answer = self._send(method, path, **options)
            self._check(answer, path, began, model)
        return answer

    def abort(self, method: str, path: str, *, seconds: float, **options: Any) -> None:
        """Send a request, and disconnect if there is no response after `seconds`."""
        try:
            self._send(method, path, timeout=(5, seconds), headers={"Connection": "close"}, **options)
        except requests.RequestException:
            self.record.count(self.doing, "aborted")
        else:
            self.record.count(self.doing, "answered before the abort")

    @contextmanager
    def stream(self, method: str, path: str, *, model: str | None = None, **options: Any) -> Iterator[Stream | None]:
        """Yield a streamed response, or None for an error; leaving the context disconnects. Raises ConnectionLost."""
        began = time.monotonic()
        with self._connected(f"{method} {path}", began), self._send(method, path, stream=True, **options) as answer:
            self._check(answer, path, began, model)
            streams = answer.headers.get("Content-Type", "").startswith("text/event-stream")
            yield Stream(self, answer, began, model) if answer.status_code == 200 and streams else None

    def check_code(self, code: str, words: str, began: float, model: str | None) -> None:
        """Check an error that came as an event in a stream."""
        self.record.count(self.doing, f"event {code}")
        if code not in STATUSES:
            self.record.violation(f"{self.doing}: an event says {code!r}: {words}")
        elif code in ENGINE_TROUBLE | STATE_TROUBLE and not self._expected(code, began, model):
            self.record.violation(f"{self.doing} of {model}: {code} without an injected fault: {words}")

    def _check(self, answer: requests.Response, path: str, began: float, model: str | None) -> None:
        status, request = answer.status_code, answer.request
        if status < 400:
            self.record.count(self.doing, f"{status}")
            return
        for_people = request.headers.get("Accept") == PAGE["Accept"]
        code = code_of(answer.content)
        if is_from_engine(path, answer.content) and code != "internal_error" and self._excused(began, model):
            self.record.count(self.doing, f"{status} of the engine")
            return
        self.record.count(self.doing, f"{status} {code or 'page'}")
        if for_people or request.method == "HEAD":
            explained = status == 503 and any(self.record.explained(code, began) for code in STATE_TROUBLE)
            wrong = None if status == 404 or explained else f"instead of a page: {answer.text[:300]}"
        else:
            wrong = find_violation(path, status, answer.headers, answer.content)
        if wrong is None and code in ENGINE_TROUBLE | STATE_TROUBLE and not self._expected(code, began, model):
            wrong = f"is {code} without an injected fault: {answer.text[:300]}"
        if wrong is None and code == "model_not_found" and not self._may_be_gone(began, model):
            wrong = f"says that an existing model does not exist: {answer.text[:300]}"
        if wrong is not None:
            self.record.violation(f"{self.doing}: {request.method} {path} ({model}): {status} {wrong}")

    def _may_be_gone(self, began: float, model: str | None) -> bool:
        return model in (UNKNOWN_MODEL, *COPIES) or (model is None and self.record.faulty_since(began, None))

    def _expected(self, code: str, began: float, model: str | None) -> bool:
        """Whether an injected fault, of the model or of the environment, explains an error."""
        return self.record.explained(code, began) or (code in ENGINE_TROUBLE and self._excused(began, model))

    def _excused(self, began: float, model: str | None) -> bool:
        """Whether a fault of the model explains engine trouble. For the active model (None) any fault does."""
        return model is None or model in BAD or self.record.faulty_since(began, model)

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", ANSWER_SECONDS)
        return self._http.request(method, self.world.url + path, allow_redirects=False, **options)

    @contextmanager
    def _connected(self, what: str, began: float) -> Iterator[None]:
        """Record a broken connection as a violation, unless the app is being restarted or killed."""
        try:
            yield
        except requests.RequestException as error:
            if not self.record.disturbed_since(began):
                seconds = time.monotonic() - began
                self.record.violation(f"{self.doing}: {what} broke off after {seconds:.1f} s: {error!r}")
            self.record.count(self.doing, "connection lost")
            raise ConnectionLost from None


class Stream:
    """The events of a streamed response. A caller that reads to the end can have the end checked."""

    def __init__(self, client: Client, answer: requests.Response, began: float, model: str | None) -> None:
        self._client = client
        self._answer = answer
        self._began = began
        self._model = model

    def events(self, most: int | None = None) -> list[Event]:
        """The named events, to the end or the first `most` of them."""
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
        """The data of a chat answer, to the end or the first `most` pieces."""
        seen: list[str] = []
        for line in self._lines():
            if line.startswith("data: "):
                seen.append(line[6:])
                if len(seen) == most:
                    break
        return seen

    def check_switch(self, events: list[Event]) -> None:
        """Check that a switch followed to its end reported exactly one end."""
        ends = [event for event in events if event[0] in ("complete", "error")]
        if len(ends) != 1 or events[-1] is not ends[0]:
            self._ended_badly(f"the switch to {self._model} reported the ends {ends}")
        elif ends[0][0] == "error":
            self._check_error(str(ends[0][1].get("error")), str(ends[0][1].get("message")))

    def check_answer(self, pieces: list[str]) -> None:
        """Check that a chat answer read to its end is complete, or reports an error."""
        last = pieces[-1] if pieces else ""
        if last == "[DONE]":
            return
        error = _parsed(last).get("error")
        if not isinstance(error, dict):
            self._ended_badly(f"the answer of {self._model} ends without an end mark, with {last!r}")
        elif not self._client._excused(self._began, self._model):
            self._client.record.violation(f"{self._client.doing}: {self._model} broke off without a fault: {error}")
        else:
            self._client.record.count(self._client.doing, "event broke off")

    def _check_error(self, code: str, words: str) -> None:
        self._client.check_code(code, words, self._began, self._model)

    def _ended_badly(self, words: str) -> None:
        if not self._client.record.disturbed_since(self._began):
            self._client.record.violation(f"{self._client.doing}: {words}")

    def _lines(self) -> Iterator[str]:
        for line in self._answer.iter_lines(chunk_size=None):
            yield line.decode()


def _parsed(data: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
