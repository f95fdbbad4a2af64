"""Control-plane HTTP: short questions to engines, each with a timeout. Streams go through the gateway's relay."""

from __future__ import annotations

import requests


def control_session(headers: dict[str, str] | None = None) -> requests.Session:
    """A session that ignores proxy variables: engines are asked directly, or not at all."""
    session = requests.Session()
    session.trust_env = False
    session.headers.update(headers or {})
    return session
