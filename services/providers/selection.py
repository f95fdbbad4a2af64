"""Who serves text, images and vision: the defaults of the settings, and what was chosen since.

A choice lasts until the app restarts, unless the setting `remember_providers` keeps it. It changes by `switch` alone:
a provider that fails later stays chosen, and nothing else takes its place.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import cast

import structlog

from services.notes import Notes
from services.providers.local_services import ServiceName
from services.providers.ports import ALIASES, PROVIDERS, Capability, Choice

log = structlog.get_logger(__name__)

NOTE = "providers"
"""Under which the choice is stored."""


class UnknownProvider(Exception):
    """There is no such capability or provider. The text names those there are."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a provider can't serve a capability: what is wrong, and what to do (`guidance`).

    `service` is the local service that has to run for it; None if that would not help.
    """

    capability: Capability
    provider: str
    message: str
    guidance: str
    service: ServiceName | None = None


class ProviderUnavailable(Exception):
    """A provider that was asked for can't serve; nothing was switched."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(" ".join(f"{p.message}. {p.guidance}" for p in problems))
        self.problems = tuple(problems)


class Selection:
    """The providers chosen now. Thread-safe.

    `find_problem` blocks for a bounded time; it is called for all providers of a switch side by side. `notes` is None
    where a choice is not to be remembered.
    """

    def __init__(
        self,
        defaults: Choice,
        find_problem: Callable[[Capability, str], Problem | None],
        *,
        notes: Notes | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.defaults = defaults
        self._find_problem = find_problem
        self._notes = notes
        self._on_change = on_change
        self._lock = threading.Lock()
        self._chosen: Mapping[Capability, str] = {} if notes is None else _stored(notes)

    @property
    def current(self) -> Choice:
        """What the next job runs with."""
        return replace(self.defaults, **dict[str, str](self._chosen.items()))

    def switch(self, wanted: Mapping[str, object]) -> Choice:
        """Choose a provider for each capability that is named, all or none of them; return the whole choice.

        Raises UnknownProvider, and ProviderUnavailable if one of them can't serve now.
        """
        chosen = parse_choice(wanted)
        problems = self._problems(chosen)
        if problems:
            raise ProviderUnavailable(problems)
        with self._lock:
            both = {**self._chosen, **chosen}
            if self._notes is not None:
                self._notes.put(NOTE, json.dumps(both))
            self._chosen = both
            current = self.current
        self._on_change()
        return current

    def check(self, skip: Callable[[Capability, str], bool]) -> Choice:
        """Return what a job would run with now. Raises ProviderUnavailable if one of them can't serve.

        A provider that `skip` accepts is not asked: a job loads its model itself.
        """
        current = self.current
        asked = {c: getattr(current, c) for c in PROVIDERS if not skip(c, getattr(current, c))}
        problems = self._problems(asked)
        if problems:
            raise ProviderUnavailable(problems)
        return current

    def _problems(self, chosen: Mapping[Capability, str]) -> list[Problem]:
        """Check all side by side, so that two services that hang take no longer than one."""
        outcomes = [self._begin(capability, provider) for capability, provider in chosen.items()]
        return [problem for outcome in outcomes if (problem := outcome.result()) is not None]

    def _begin(self, capability: Capability, provider: str) -> Future[Problem | None]:
        outcome: Future[Problem | None] = Future()

        def check() -> None:
            try:
                outcome.set_result(self._find_problem(capability, provider))
            except Exception as error:
                outcome.set_exception(error)

        threading.Thread(target=check, name="provider-check", daemon=True).start()
        return outcome


def parse_choice(wanted: Mapping[str, object]) -> dict[Capability, str]:
    """Return providers by capability, without aliases. Raises UnknownProvider."""
    if not wanted:
        raise UnknownProvider(f"Name a provider for at least one of {', '.join(PROVIDERS)}.")
    chosen: dict[Capability, str] = {}
    for name, provider in wanted.items():
        if name not in PROVIDERS:
            raise UnknownProvider(f"There is no capability {name[:100]!r}. There are: {', '.join(PROVIDERS)}.")
        capability = cast("Capability", name)
        known = ALIASES[capability].get(provider, provider) if isinstance(provider, str) else None
        if known not in PROVIDERS[capability]:
            there_is = ", ".join((*PROVIDERS[capability], *ALIASES[capability]))
            raise UnknownProvider(f"There is no provider {str(provider)[:100]!r} for {name}. There are: {there_is}.")
        chosen[capability] = known
    return chosen


def _stored(notes: Notes) -> dict[Capability, str]:
    """Return what was stored, without what this version doesn't know."""
    try:
        stored = json.loads(notes.get(NOTE) or "{}")
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        log.warning("the stored choice of providers can't be read, so the settings' defaults hold")
        return {}
    found: dict[Capability, str] = {}
    for name, provider in stored.items():
        try:
            found.update(parse_choice({name: provider}))
        except UnknownProvider as error:
            log.warning("a stored choice of providers is left out", reason=str(error))
    return found


def as_document(choice: Choice) -> dict[str, str]:
    """Return a choice as JSON."""
    return asdict(choice)
