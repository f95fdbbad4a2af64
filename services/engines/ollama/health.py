"""Whether an Ollama server answers at its address, or what else is there.

Format of Ollama 0.24.0: `GET /api/version` answers `{"version": "0.24.0"}`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from services.http import ConnectionBroken, ConnectionRefused, FetchError, TooSlow, Unreachable, fetch

HEALTH_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Health:
    """The answer to one question: a version (Ollama answers), an error in words, or neither: nobody listens.

    `at` is when the question was sent (monotonic seconds). `refused`: the host itself said that nobody listens, so that
    nothing of Ollama can be running there.
    """

    at: float
    version: str | None = None
    error: str | None = None
    refused: bool = False

    @property
    def anybody(self) -> bool:
        """Whether something listens at the address."""
        return self.version is not None or self.error is not None


NOT_ASKED = Health(float("-inf"))


def ask_health(url: str) -> Health:
    """Ask the server at `url` for its version; takes HEALTH_SECONDS at most. Never raises."""
    at = time.monotonic()
    version: object = None
    try:
        answer = fetch("GET", f"{url}/api/version", timeout=HEALTH_SECONDS)
        version = answer.document().get("version") if answer.status == 200 else None
    except TooSlow:
        words = f"Ollama at {url} hangs or is overloaded: no answer within {HEALTH_SECONDS:.0f} s."
        return Health(at, error=words)
    except Unreachable as error:
        return Health(at, refused=isinstance(error, ConnectionRefused))
    except ConnectionBroken:
        return Health(at, error=f"The connection to {url} was cut before an answer came.")
    except (FetchError, ValueError):
        pass
    if isinstance(version, str):
        return Health(at, version)
    return Health(at, error=f"What answers at {url} is not Ollama. Check the setting ollama_base_url.")
