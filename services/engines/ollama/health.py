"""Health check of an Ollama server, or of what else answers at its address.

Format of Ollama 0.24.0: `GET /api/version` answers `{"version": "0.24.0"}`.
"""

from __future__ import annotations

import time

from services.engines.supervisor import Health
from services.http import ConnectionBroken, ConnectionRefused, FetchError, TooSlow, Unreachable, fetch

HEALTH_SECONDS = 2.0


def ask_health(url: str) -> Health:
    """Request the version of the server at `url`; takes at most HEALTH_SECONDS. Never raises."""
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
        return Health(at, version, answers=True, seconds=time.monotonic() - at)
    return Health(at, error=f"What answers at {url} is not Ollama. Check the setting ollama_base_url.")
