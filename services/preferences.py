"""What people may change while the app runs: defaults from the settings, and what was changed, which wins and is kept.

Planner, procedure and router read `current` at the moment of use, so that a change applies to the next decision.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import structlog
from pydantic import ValidationError

from services.config import Preferences
from services.notes import Notes

log = structlog.get_logger(__name__)

NOTE = "preferences"


class CurrentPreferences(Protocol):
    """Whatever has preferences that may change."""

    @property
    def current(self) -> Preferences:
        """The preferences at this moment; no I/O."""


class PreferenceStore:
    """The preferences and their changes. `on_change` is called after each change. Thread-safe."""

    def __init__(self, defaults: Preferences, notes: Notes, on_change: Callable[[], object] = lambda: None) -> None:
        self.defaults = defaults
        self._notes = notes
        self._on_change = on_change
        self._lock = threading.Lock()
        self._changes, self._current = _merged(defaults, _read(notes.get(NOTE)))

    @property
    def current(self) -> Preferences:
        """No I/O."""
        return self._current

    @property
    def changed(self) -> Collection[str]:
        """Names of the preferences that differ from their defaults."""
        return self._changes.keys()

    def update(self, changes: Mapping[str, object]) -> Preferences:
        """Change some preferences, all or none; one that is set to its default counts as reset.

        Raises pydantic's ValidationError, and StoreError if the change can't be kept; nothing has changed then.
        """
        return self._set(lambda kept: {**kept, **changes})

    def reset(self, names: Collection[str] | None = None) -> Preferences:
        """Return to the defaults, of these preferences or of all. Raises StoreError; nothing has changed then."""
        dropped = Preferences.model_fields if names is None else names
        return self._set(lambda kept: {name: value for name, value in kept.items() if name not in dropped})

    def _set(self, change: Callable[[Mapping[str, object]], Mapping[str, object]]) -> Preferences:
        with self._lock:  # also while it is kept: of two changes at once both count
            current = Preferences.model_validate({**self.defaults.model_dump(), **change(self._changes)})
            changes = _differences(self.defaults, current)
            self._notes.put(NOTE, json.dumps(changes))
            self._changes, self._current = changes, current
        self._on_change()
        return current


def _differences(defaults: Preferences, current: Preferences) -> dict[str, Any]:
    before = defaults.model_dump(mode="json")
    return {name: value for name, value in current.model_dump(mode="json").items() if value != before[name]}


def _read(text: str | None) -> dict[str, Any]:
    try:
        kept = json.loads(text or "{}")
    except ValueError:
        kept = None
    if isinstance(kept, dict):
        return kept
    log.warning("what was kept of the preferences can't be read; the settings apply")
    return {}


def _merged(defaults: Preferences, kept: Mapping[str, Any]) -> tuple[dict[str, Any], Preferences]:
    """Apply each change that is still valid: another version may have kept one that this one does not know."""
    current = defaults
    for name, value in kept.items():
        try:
            current = Preferences.model_validate({**current.model_dump(), name: value})
        except ValidationError:
            log.warning("a changed preference is not valid any more; the setting applies", preference=name)
    return _differences(defaults, current), current
