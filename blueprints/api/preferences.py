"""Preferences: what can be changed while the app runs."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify
from pydantic import Field

from blueprints.api.spec import documented
from blueprints.web import ApiError, parse_body, services
from services.config import Preferences
from services.preferences import PreferenceStore

bp = Blueprint("preferences", __name__, url_prefix="/v1/preferences")


class PreferencesBody(Preferences):
    """Preferences to change; those that are left out stay. The two lists are ignored, so that an answer can be sent
    back."""

    changed: tuple[str, ...] = Field((), description="ignored")
    defaults: dict[str, Any] = Field({}, description="ignored")


class PreferencesAnswer(Preferences):
    """The preferences, the names of those that were changed, and the settings' values of all."""

    changed: tuple[str, ...]
    defaults: Preferences


@bp.get("")
@documented(answer=PreferencesAnswer)
def read() -> Response:
    """Return the preferences."""
    return _answer(services().preferences)


@bp.put("")
@documented(body=PreferencesBody, answer=PreferencesAnswer, errors=(503,))
def change() -> Response:
    """Change preferences, all that are named or none. They are kept, and win over the settings until they are reset."""
    body = parse_body(PreferencesBody)
    named = body.model_fields_set & Preferences.model_fields.keys()
    services().preferences.update({name: getattr(body, name) for name in named})
    return _answer(services().preferences)


@bp.delete("")
@documented(answer=PreferencesAnswer, errors=(503,))
def reset_all() -> Response:
    """Return to the settings."""
    services().preferences.reset()
    return _answer(services().preferences)


@bp.delete("/<name>")
@documented(answer=PreferencesAnswer, errors=(503,))
def reset(name: str) -> Response:
    """Return to the setting of one preference."""
    if name not in Preferences.model_fields:
        known = ", ".join(Preferences.model_fields)
        raise ApiError("not_found", f"There is no preference {name!r}. There are: {known}.")
    services().preferences.reset({name})
    return _answer(services().preferences)


def _answer(store: PreferenceStore) -> Response:
    values, defaults = store.current.model_dump(mode="json"), store.defaults.model_dump(mode="json")
    return jsonify({**values, "changed": sorted(store.changed), "defaults": defaults})
