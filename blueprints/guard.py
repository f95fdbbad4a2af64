"""Checks on every request: host, origin, and the rate of switches.

The only place for these rules. Flask runs them before every request; the hot lane uses `refusal`, because it relays to
running models only and never causes a switch.
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
        "local_services.start",
        "provider_page.start",
        "providers.start_service",
        "beam_search.start",
        "studio.start",
    }
)
"""Endpoints whose purpose is to switch: each call counts."""
ANSWERING = frozenset({"chat.create", "chat.send", "chat.retry"})
"""Endpoints that begin an answer by the active model: a call counts if the model has to be loaded for it."""

Environ = Mapping[str, Any]


class Refused(Exception):
    """A request is not permitted.

    `code` is an error code of the contract; `retry_after` is seconds, None if a retry won't help.
    """

    def __init__(self, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after


class Guard:
    """Admits requests, and limits the rate of switches per client."""

    def __init__(self, services: Services, limiter: RateLimiter) -> None:
        self._services = services
        self._limiter = limiter
        self._limit = parse(services.settings.switch_rate_limit)

    def refusal(self, environ: Environ) -> Refused | None:
        """Return why a request (its WSGI environment) is not permitted, None if it is."""
        host = environ.get("HTTP_HOST", environ.get("SERVER_NAME", ""))  # HTTP/1.0 needs no Host
        if not host_is_ours(host, self._services.settings):
            message = f"This server does not answer for the host {host!r}. See the setting allowed_hosts."
            return Refused("forbidden_host", message)
        if environ["REQUEST_METHOD"] not in SAFE_METHODS and not origin_is_ours(environ):
            return Refused("cross_origin", "This request comes from a page of another site, so it is refused.")
        return None

    def check(self, environ: Environ, endpoint: str | None) -> None:
        """Check a request to a Flask endpoint, and count the switch if it causes one. Raises Refused."""
        refused = self.refusal(environ)
        if refused is not None:
            raise refused
        if endpoint in SWITCHING:
            self.count_switch(environ)
        elif endpoint in ANSWERING:
            self.count_switch_to(None, environ)

    def count_switch_to(self, name: str | None, environ: Environ) -> None:
        """Count a switch if a request for `name` (None or "auto": the active model) would cause one. Raises Refused.

        A model that runs or is being loaded causes none.
        """
        if self._services.router.would_switch(name):
            self.count_switch(environ)

    def count_switch(self, environ: Environ) -> None:
        """Count a switch by this client. Raises Refused above the limit."""
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
    """Return whether a Host header names this server, with or without a port.

    Prevents DNS rebinding: another site's page can point its own name at this address.
    """
    name = _host_name(host)
    return name in LOOPBACK_NAMES or name == settings.host or name in settings.allowed_hosts


@lru_cache(maxsize=256)
def _host_name(host: str) -> str:
    """Return a Host header without its port; empty if it can't be parsed, such as an incomplete IPv6 address.

    Cached, because few different ones occur.
    """
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def origin_is_ours(environ: Environ) -> bool:
    """Return whether a request came from a page of this server or from no page.

    Browsers send Sec-Fetch-Site or Origin with every unsafe method.
    """
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
