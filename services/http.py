"""Control-plane HTTP: short questions to engines, each with a timeout. Streams go through the relay."""

from __future__ import annotations

import ipaddress

import requests


def control_session(headers: dict[str, str] | None = None) -> requests.Session:
    """A session that ignores proxy variables: engines are asked directly, or not at all."""
    session = requests.Session()
    session.trust_env = False
    session.headers.update(headers or {})
    return session


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without its port, is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
