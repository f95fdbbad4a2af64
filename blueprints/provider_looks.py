"""What pages say about providers and the services behind them, as text. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from services.providers.availability import TITLES
from services.providers.health import ServiceHealth
from services.providers.local_services import LocalService, ServiceName
from services.providers.openai_key import KeyCheck
from services.providers.ports import Capability, Choice
from services.text import join_names

CAPABILITIES: Mapping[Capability, str] = {"llm": "Text", "image": "Images", "vision": "Vision"}
"""Their names on pages."""
NAMES: Mapping[Capability, Mapping[str, str]] = {
    "llm": {
        "openai": "OpenAI",
        "ollama": "Ollama",
        "vllm": "vLLM",
        "llamacpp": "Embedded engine",
        "local": "Active model",
    },
    "image": {"openai": "OpenAI", "flux": "Flux (local)"},
    "vision": {"openai": "OpenAI", "local": "CLIP (local)"},
}
"""The providers of each capability, in words."""

_SERVES: Mapping[ServiceName, str] = {"ollama": "Text", "flux": "Images", "vision": "Vision"}
_WORDS = {
    "running": "Running",
    "stopped": "Not running",
    "starting": "Starting",
    "stopping": "Stopping",
    "failed": "Failed",
    "unreachable": "Not reachable",
}
_MARKS = {
    "running": "running",
    "starting": "loading",
    "stopping": "unloading",
    "failed": "failed",
    "unreachable": "failed",
}
_VERSION = re.compile(r"[^\w.-].*")
_LATENCIES = ((10, "under 10 ms"), (50, "under 50 ms"), (200, "under 0.2 s"), (1000, "under 1 s"))


@dataclass(frozen=True, slots=True)
class Badge:
    """The header's button: `tone` is its colour, `word` says the same to those who see no colour."""

    tone: str
    word: str
    title: str


@dataclass(frozen=True, slots=True)
class ServiceLook:
    """One service on the page. Texts that are None are not shown; `mark` is a state's mark, None for a stopped one.

    `percent` is the progress of a start or an installation, None if it is not counted.
    """

    name: str
    title: str
    serves: str
    word: str
    mark: str | None
    figures: tuple[str, ...] = ()
    error: str | None = None
    note: str | None = None
    can_start: bool = False
    can_stop: bool = False
    can_dismiss: bool = False
    can_install: bool = False
    starting: bool = False
    installing: bool = False
    percent: int | None = None
    log_tail: str = ""


@dataclass(frozen=True, slots=True)
class KeyLook:
    """OpenAI on the page: whether a key is set, and what came of asking about it."""

    word: str
    mark: str | None
    address: str
    error: str | None
    is_set: bool
    checked_at: float | None


def badge_of(choice: Choice, *, key_set: bool) -> Badge:
    """Return the badge of a choice: green if OpenAI serves everything, orange if anything is local."""
    chosen = {capability: getattr(choice, capability) for capability in CAPABILITIES}
    remote = sum(provider == "openai" for provider in chosen.values())
    title = ", ".join(f"{CAPABILITIES[c].lower()}: {NAMES[c][provider]}" for c, provider in chosen.items())
    if remote == len(chosen):
        return Badge("openai", "OpenAI" if key_set else "OpenAI, no key", title)
    return Badge("local", "Partly local" if remote else "Local", title)


def service_look(service: LocalService, health: ServiceHealth | None) -> ServiceLook:
    """Return how a service is shown; `health` is None if it has not answered yet."""
    status, job = service.status, service.installation
    answers = status.state == "unreachable" and health is not None and health.available  # in another server's words
    running = status.state == "running" or answers
    state = "running" if running else status.state
    word = _WORDS[state]
    if state == "stopped" and status.local and (service.missing or status.binary is None):
        word = "Not installed"
    return ServiceLook(
        name=service.name,
        title=TITLES[service.name],
        serves=_SERVES[service.name],
        word="Installing" if service.installing else word,
        mark="loading" if service.installing else _MARKS.get(state),
        figures=_figures(service, health if running else None),
        error=None if running else status.error or (job.error if job is not None and service.missing else None),
        note=_note(service, running=running),
        can_start=status.can_start and not running,
        can_stop=status.can_stop,
        can_dismiss=status.state == "failed" or (job is not None and job.state == "failed" and bool(service.missing)),
        can_install=service.can_install,
        starting=state == "starting",
        installing=service.installing,
        percent=job.percent if job is not None and service.installing else service.percent,
        log_tail=status.log_tail or (job.log_tail if job is not None and service.missing else ""),
    )


def _note(service: LocalService, *, running: bool) -> str | None:
    if not service.status.local:
        return "It runs on another machine, so it is started and stopped there."
    if running and not service.status.ours:
        return "Another program started it, so it is stopped there."
    if service.missing and not running and not service.installing:
        return f"It needs Python packages: {join_names([_VERSION.sub('', package) for package in service.missing])}."
    if service.status.state == "stopped" and service.status.binary is None and not service.missing:
        return "“Setting up” below says how to install it."
    return None


def key_look(address: str, *, is_set: bool, check: KeyCheck | None) -> KeyLook:
    """Return how OpenAI is shown."""
    word, mark = ("Key set" if is_set else "No key"), None
    if check is not None and check.answer != "unclear":
        word, mark = ("Key accepted", "running") if check.answer == "accepted" else ("Key refused", "failed")
    checked_at = check.at if check is not None else None
    return KeyLook(word, mark, address, check.error if check is not None else None, is_set, checked_at)


def _figures(service: LocalService, health: ServiceHealth | None) -> tuple[str, ...]:
    """Return what a service does now, or what it serves and how fast it answers.

    Coarse, because pages are sent every change of it.
    """
    if service.installing and service.installation is not None:
        return (service.installation.message,)
    if health is None or not health.available:
        return () if service.progress_words is None else (service.progress_words,)
    count = len(health.models)
    models = () if count == 0 else (health.models[0],) if count == 1 else (f"{count} models",)
    latency = health.latency_ms
    if latency is None:
        return models
    return (*models, f"answers in {next((word for most, word in _LATENCIES if latency < most), 'over 1 s')}")
