"""`GET /health` of the image server and the vision server."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from services.engines.supervisor import NOT_ASKED, Health, Preparation
from services.http import ConnectionBroken, ConnectionRefused, FetchError, TooSlow, Unreachable, fetch

HEALTH_SECONDS = 2.0
STATES = ("loading", "ready", "failed")


@dataclass(frozen=True, slots=True)
class Report:
    """What a server says of itself, and the health that follows from it; bytes, None where it doesn't say.

    `device` is PyTorch's name, such as `cuda:0` or `cpu`. `needed_bytes` is what the model takes. `aesthetic_error`
    says why the vision server scores without aesthetics.
    """

    health: Health
    model: str | None = None
    device: str | None = None
    memory_bytes: int | None = None
    needed_bytes: int | None = None
    error: str | None = None
    aesthetic_error: str | None = None


NO_REPORT = Report(NOT_ASKED)


def other_service(said: Mapping[str, object], name: str) -> str | None:
    """Return what a server says that it is, if that is not `name`; None for one that doesn't say it."""
    service = said.get("service", name)
    return None if service == name else str(service)[:100]


def ask_health(url: str, name: str, title: str, setting: str) -> Report:
    """Ask the server at `url`, which has to be the service `name`; takes at most HEALTH_SECONDS. Never raises."""
    at = time.monotonic()
    try:
        answer = fetch("GET", f"{url}/health", timeout=HEALTH_SECONDS)
        said = answer.document() if answer.status == 200 else {}
    except TooSlow:
        words = f"{title} at {url} hangs or is overloaded: no answer within {HEALTH_SECONDS:.0f} s."
        return Report(Health(at, error=words))
    except Unreachable as unreachable:
        return Report(Health(at, refused=isinstance(unreachable, ConnectionRefused)))
    except ConnectionBroken:
        return Report(Health(at, error=f"The connection to {url} was cut before an answer came."))
    except (FetchError, ValueError):
        said = {}
    state, model = said.get("status"), said.get("model")
    other = other_service(said, name)
    if other is not None or state not in STATES or not isinstance(model, str):
        why = "" if other is None else f": it says that it is {other}"
        return Report(Health(at, error=f"What answers at {url} is not {title}{why}. Check the setting {setting}."))
    error = _text(said.get("error")) if state == "failed" else None
    health = Health(
        at,
        answers=state == "ready",
        preparing=state == "loading",
        preparation=_preparation(said.get("progress")),
        error=None if state != "failed" else f"{title} could not load {model}: {error or 'it does not say why'}",
    )
    return Report(
        health=health,
        model=model,
        device=_text(said.get("device")),
        memory_bytes=_size(said.get("memory_bytes")),
        needed_bytes=_size(said.get("needed_bytes")),
        error=error,
        aesthetic_error=_text(said.get("aesthetic_error")),
    )


def _preparation(said: object) -> Preparation | None:
    if not isinstance(said, dict):
        return None
    done, total = _size(said.get("completed_bytes")), _size(said.get("total_bytes"))
    done = done if done is None or total is None else min(done, total)
    return Preparation("downloading" if said.get("stage") == "downloading" else "loading", done, total)


def _size(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text(value: object) -> str | None:
    return value[:2000] if isinstance(value, str) and value else None
