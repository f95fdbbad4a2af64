"""What a request has to pass before it may act: whose host it asks for, whose page sent it, how often it switches.

The one place for these rules. Both ways in ask it: Flask's before every request, and the hot lane, which takes only
what it lets in and never causes a switch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from limits import parse
from limits.strategies import RateLimiter

from services.config import Settings
from services.container import Services

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

SWITCHING = frozenset(
    {
        "switching.switch",
        "switching.start",
        "switching.restart",
        "scripts.switch_model",
        "scripts.switch_ollama_model",
        "models.switch",
        "models.restart",
    }
)
"""Endpoints that are there to switch: each call counts."""
ANSWERING = frozenset({"chat.create", "chat.send", "chat.retry"})
"""Endpoints that begin an answer of the active model: a call counts when that has to be loaded for it."""

Environ = Mapping[str, Any]


class Refused(Exception):
    """A request may not act. `code` is the contract's; `retry_after` is seconds, where waiting helps."""

    def __init__(self, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after


class Guard:
    """Lets requests in, and counts the switches that each client causes."""

    def __init__(self, services: Services, limiter: RateLimiter) -> None:
        self._services = services
        self._limiter = limiter
        self._limit = parse(services.settings.switch_rate_limit)

    def refusal(self, environ: Environ) -> Refused | None:
        """Why a request (as its WSGI environment) is not let in; None when it is."""
        host = environ.get("HTTP_HOST", environ.get("SERVER_NAME", ""))  # HTTP/1.0 needs no Host
        if not host_is_ours(host, self._services.settings):
            message = f"This server does not answer for the host {host!r}. See the setting allowed_hosts."
            return Refused("forbidden_host", message)
        if environ["REQUEST_METHOD"] not in SAFE_METHODS and not origin_is_ours(environ):
            return Refused("cross_origin", "This request comes from a page of another site, so it is refused.")
        return None

    def check(self, environ: Environ, endpoint: str | None) -> None:
        """Let a request to one of Flask's endpoints in, counting the switch where it causes one. Raises Refused."""
        refused = self.refusal(environ)
        if refused is not None:
            raise refused
        if endpoint in SWITCHING:
            self.count_switch(environ)
        elif endpoint in ANSWERING:
            self.count_switch_to(None, environ)

    def count_switch_to(self, name: str | None, environ: Environ) -> None:
        """Count a switch if asking the model called `name` (None or "auto": the active one) causes one. Raises Refused.

        Asking a model that runs, or that is coming already, causes none.
        """
        if self._services.router.would_switch(name):
            self.count_switch(environ)

    def count_switch(self, environ: Environ) -> None:
        """Seed 001: rapid switching is limited, each client by itself. Raises Refused beyond the limit."""
        who = ("switch", environ.get("REMOTE_ADDR") or "local")
        if self._limiter.hit(self._limit, *who):
            return
        window = self._limiter.get_window_stats(self._limit, *who)
        raise Refused(
            "rate_limited",
            f"Models were switched too often: {self._limit} is the limit (setting switch_rate_limit).",
            retry_after=max(1, math.ceil(window.reset_time - time.time())),
        )


def host_is_ours(host: str, settings: Settings) -> bool:
    """Whether a Host header names this server, with or without a port: a page elsewhere can point its own name at this
    address (DNS rebinding)."""
    name = _host_name(host)
    return name in LOOPBACK_NAMES or name == settings.host or name in settings.allowed_hosts


@lru_cache(maxsize=256)
def _host_name(host: str) -> str:
    """A Host header without its port; empty when it can't be read, such as an unfinished IPv6 address.

    Remembered: the same few come with every request.
    """
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def origin_is_ours(environ: Environ) -> bool:
    """Whether a page of this server sent a request, or no page at all: browsers say where an unsafe one comes from."""
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site is not None:
        return site in ("same-origin", "none")
    origin = environ.get("HTTP_ORIGIN")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc == environ.get("HTTP_HOST")
    except ValueError:
        return False
