"""Where a page is asked from: this machine, or somewhere that should not manage its models."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from flask import request

from blueprints.web import services
from services.http import is_loopback

Environment = Literal["local", "production"]

FORWARDED = ("X-Forwarded-For", "Forwarded", "X-Real-Ip")
"""Headers of proxies: whoever asks is not at this machine, although the connection comes from it."""


def environment() -> Environment:
    """Return `local` if the app is bound to loopback and asked from it; the setting `environment` decides if set."""
    settings = services().settings
    if settings.environment is not None:
        return settings.environment
    asked_for = urlsplit(f"//{request.host}").hostname or ""
    here = all(map(is_loopback, (settings.host, request.remote_addr or "", asked_for)))
    return "local" if here and not any(name in request.headers for name in FORWARDED) else "production"
