"""Whether OpenAI takes the key of the settings. Asked on demand only: a poll would cost a request of an account."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from pydantic import SecretStr

from services.http import FetchError, Reply, fetch
from services.providers.probe import Probe
from services.redaction import without_key

CHECK_SECONDS = 5.0
MOST_WORDS = 300

Answer = Literal["accepted", "refused", "unclear"]


@dataclass(frozen=True, slots=True)
class KeyCheck:
    """What came of asking: `unclear` if no answer says yes or no. `error` is for people, in OpenAI's own words.

    `at` is seconds since the epoch.
    """

    answer: Answer
    at: float
    error: str | None = None
    models: tuple[str, ...] = ()
    latency_ms: int | None = None


class OpenAIKey:
    """The key for OpenAI, or for what answers in its place at `base_url`."""

    def __init__(self, base_url: str, key: SecretStr | None) -> None:
        self.base_url = base_url
        self._key = key
        self._probe = Probe(self._ask)
        self.latest: KeyCheck | None = None

    @property
    def is_set(self) -> bool:
        return self._key is not None

    def check(self) -> KeyCheck | None:
        """Ask `GET /models` now, and keep the result in `latest`; None without a key. Takes at most CHECK_SECONDS."""
        if self._key is None:
            return None
        self.latest = check = self._probe.begin(fresh=True).result()
        return check

    def _ask(self) -> KeyCheck:
        key = "" if self._key is None else self._key.get_secret_value()
        at, began = time.time(), time.monotonic()
        try:
            reply = fetch(
                "GET",
                f"{self.base_url}/models",
                timeout=CHECK_SECONDS,
                headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
            )
        except FetchError as error:
            return KeyCheck("unclear", at, f"OpenAI could not be asked at {self.base_url}: {error}.")
        latency = round((time.monotonic() - began) * 1000)
        if reply.status in (401, 403):
            return KeyCheck("refused", at, f"OpenAI refuses the key: {_words(reply, key)}", latency_ms=latency)
        if reply.status != 200:
            return KeyCheck("unclear", at, f"OpenAI answered with {reply.status}: {_words(reply, key)}")
        return KeyCheck("accepted", at, models=_models(reply), latency_ms=latency)


def _words(reply: Reply, key: str) -> str:
    """Return what it says of its error, without the key, in one line."""
    try:
        error = reply.document().get("error")
    except ValueError:
        error = None
    said = error.get("message") if isinstance(error, dict) else error
    if not isinstance(said, str) or not said.strip():
        return f"it gives no reason (status {reply.status})."
    line = " ".join("".join(c if c.isprintable() else " " for c in without_key(said, key)).split())
    return line if len(line) <= MOST_WORDS else f"{line[:MOST_WORDS]}…"


def _models(reply: Reply) -> tuple[str, ...]:
    try:
        listed = reply.document().get("data")
    except ValueError:
        listed = None
    entries = listed if isinstance(listed, list) else []
    return tuple(str(e["id"]) for e in entries if isinstance(e, dict) and "id" in e)
