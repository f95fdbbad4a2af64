"""Client of a vLLM server: readiness, first token, sleep and wake.

`/health` and `/v1/models` of vLLM 0.5 to 0.33; since 0.8.5, in development mode, `/sleep`, `/wake_up` and
`/is_sleeping`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import structlog

from services.engines.containers.port import Container
from services.engines.port import Endpoint
from services.http import FetchError, Reply, TooSlow, fetch

log = structlog.get_logger(__name__)

PROBE_SECONDS = 2.0

Condition = Literal["awake", "asleep", "silent", "absent"]
"""Condition of a server: it answers, it sleeps, it accepts connections but doesn't answer in time, or it doesn't serve
the model."""


class VllmServer:
    """The server of `model_id` at `origin`."""

    def __init__(self, origin: str, model_id: str) -> None:
        self._model_id = model_id
        self.endpoint = Endpoint(origin, model=model_id)

    def is_ready(self) -> bool:
        """Return whether it is healthy *and* lists the model.

        A published port may accept and reset before vLLM listens.
        """
        try:
            return self._serves()
        except (FetchError, ValueError):
            return False

    def condition(self) -> Condition:
        """Return its condition. A server that accepts but doesn't answer in time is busy or stuck."""
        try:
            if not self._serves():
                return "absent"
            return "asleep" if self._says_it_sleeps() else "awake"
        except TooSlow:
            return "silent"
        except (FetchError, ValueError):
            return "absent"

    def first_token(self, timeout: float) -> str | None:
        """Generate one token; return its response if that failed, else None. Raises FetchError."""
        hello = [{"role": "user", "content": "Hello"}]
        answer = self._ask("/v1/chat/completions", {"messages": hello}, timeout)
        if answer.status == 400:  # a base model has no template for chats
            answer = self._ask("/v1/completions", {"prompt": "Hello"}, timeout)
        return None if answer.status == 200 else answer.text[:300]

    def generates(self, timeout: float) -> bool | None:
        """Return whether it generates a token in time, also beside other requests; None if it doesn't listen."""
        try:
            self.first_token(timeout)
        except TooSlow:
            return False
        except FetchError:
            return None
        return True

    def is_asleep(self) -> bool | None:
        """Return whether it sleeps; None if it doesn't say, as without a sleep mode."""
        try:
            return self._says_it_sleeps()
        except (FetchError, ValueError):
            return None

    def sleep(self, timeout: float) -> bool:
        """Put it to sleep at level 1 (weights move to host RAM, the KV cache is dropped); return whether it sleeps."""
        return self._command("/sleep?level=1", timeout) and self.is_asleep() is True

    def wake(self, timeout: float) -> bool:
        """Wake it; return whether it is awake."""
        return self._command("/wake_up", timeout) and self.is_asleep() is False

    def _serves(self) -> bool:
        """Return whether it is healthy and lists the model. Raises FetchError and ValueError."""
        if self._get("/health").status != 200:
            return False
        listed = self._get("/v1/models")
        return listed.status == 200 and self._model_id in _ids(listed.document())

    def _says_it_sleeps(self) -> bool | None:
        """Return whether it reports to sleep. Raises FetchError and ValueError."""
        answer = self._get("/is_sleeping")
        said = answer.document().get("is_sleeping") if answer.status == 200 else None
        return said if isinstance(said, bool) else None

    def _get(self, path: str) -> Reply:
        return fetch("GET", self.endpoint.origin + path, timeout=PROBE_SECONDS)

    def _ask(self, path: str, question: dict[str, object], timeout: float) -> Reply:
        body = {"model": self._model_id, "max_tokens": 1, **question}
        return fetch("POST", self.endpoint.origin + path, body=body, timeout=timeout)

    def _command(self, path: str, timeout: float) -> bool:
        """Send a command that it answers when done; return whether it succeeded."""
        try:
            answer = fetch("POST", self.endpoint.origin + path, timeout=timeout)
        except FetchError as error:
            log.warning("vLLM did not answer", model=self._model_id, path=path, error=str(error))
            return False
        if answer.status != 200:
            log.warning("vLLM refused", model=self._model_id, path=path, status=answer.status)
        return answer.status == 200


def _ids(listed: Mapping[str, object]) -> list[object]:
    """Return the ids of the models that a server lists."""
    data = listed.get("data")
    return [entry.get("id") for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []


def server_in(container: Container, model_id: str) -> VllmServer | None:
    """Return the server in a container, None unless it runs."""
    if not container.host_port:
        return None
    return VllmServer(f"http://127.0.0.1:{container.host_port}", model_id)
