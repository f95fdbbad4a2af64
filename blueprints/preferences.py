"""The Preferences page: a form of everything that can be changed while the app runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flask import Blueprint, Response, make_response, render_template, request
from pydantic import ValidationError

from blueprints.pages import live_now, see_other
from blueprints.web import services
from services.config import Preferences
from services.store.errors import StoreError

bp = Blueprint("preferences_page", __name__)

FLAGS = ("auto_unload", "confirm_before_unload", "switch_on_request", "last_used", "keep_at_least_one")
NUMBERS = ("idle_unload_seconds", "home_after_seconds")
LISTS = ("favorites", "preserve_models", "preload")
OWN_LIMIT = "idle of "
"""Begins the name of the field with a model's own limit; its id follows."""


@dataclass(frozen=True, slots=True)
class Row:
    """A model's row: its preferences, and its own limit as it was typed."""

    id: str
    favorites: bool
    preserve_models: bool
    preload: bool
    limit: str
    error: str | None


@bp.get("/preferences")
def page() -> str:
    return _page(_typed(services().preferences.current))


@bp.post("/preferences")
def save() -> Response:
    """Store the form. What can't be stored is shown again as it was typed, with the reason."""
    typed = request.form.to_dict(flat=True)
    try:
        services().preferences.update(_values(typed))
    except ValidationError as error:
        return make_response(_page(typed, _errors(error)), 422)
    except StoreError as error:
        return make_response(_page(typed, {}, str(error)), 503)
    return see_other("/preferences?saved=yes")


@bp.post("/preferences/reset")
def reset() -> Response:
    """Return to the settings, for the preference that `name` names or for all.

    What was typed into the other fields and not saved yet stays.
    """
    store, name = services().preferences, request.form.get("name")
    if name is None:
        store.reset()
        return see_other("/preferences?saved=yes")
    store.reset({name})
    typed = request.form.to_dict(flat=True)
    kept = {field: value for field, value in typed.items() if field != "name" and not _belongs(field, name)}
    fresh = {field: value for field, value in _typed(store.current).items() if _belongs(field, name)}
    return make_response(_page(kept | fresh))


def _page(typed: Mapping[str, str], errors: Mapping[str, str] | None = None, failure: str | None = None) -> str:
    store = services().preferences
    live = live_now()
    ids = [model.id for model in live.status.models]
    named = {name.partition(":")[2] for name in typed if name.partition(":")[0] in LISTS}
    named |= {name.removeprefix(OWN_LIMIT) for name in typed if name.startswith(OWN_LIMIT)}
    return render_template(
        "pages/preferences.html",
        live=live,
        typed=typed,
        errors=errors or {},
        failure=failure,
        saved=request.method == "GET" and request.args.get("saved") == "yes",
        changed=store.changed,
        defaults=store.defaults,
        rows=[_row(id_, typed, errors or {}) for id_ in [*ids, *sorted(named - set(ids))]],
        text_models=[model.id for model in live.text_models],
    )


def _belongs(field: str, name: str) -> bool:
    """Return whether a field of the form is part of a preference."""
    if name == "idle_unload_models":
        return field.startswith(OWN_LIMIT)
    return field == name or field.startswith(f"{name}:")


def _row(model_id: str, typed: Mapping[str, str], errors: Mapping[str, str]) -> Row:
    favorites, preserved, preload = (f"{name}:{model_id}" in typed for name in LISTS)
    limit = OWN_LIMIT + model_id
    return Row(model_id, favorites, preserved, preload, typed.get(limit, ""), errors.get(limit))


def _typed(preferences: Preferences) -> dict[str, str]:
    """Return the form's fields for these preferences. A box that is not ticked has no field."""
    fields = {name: "on" for name in FLAGS if getattr(preferences, name)}
    for name in NUMBERS:
        value = getattr(preferences, name)
        fields[name] = "" if value is None else f"{value:g}"
    fields["strategy"] = preferences.strategy
    fields["home_model"] = preferences.home_model or ""
    for name in LISTS:
        fields |= {f"{name}:{model_id}": "on" for model_id in getattr(preferences, name)}
    return fields | {OWN_LIMIT + id_: f"{seconds:g}" for id_, seconds in preferences.idle_unload_models.items()}


def _values(typed: Mapping[str, str]) -> dict[str, object]:
    """Return the preferences of a form's fields; numbers as they were typed."""
    values: dict[str, object] = {name: name in typed for name in FLAGS}
    values |= {name: typed.get(name, "").strip() or None for name in NUMBERS}
    values["strategy"] = typed.get("strategy", "")
    values["home_model"] = typed.get("home_model") or None
    for name in LISTS:
        values[name] = [field.partition(":")[2] for field in typed if field.startswith(f"{name}:")]
    own = {field.removeprefix(OWN_LIMIT): text.strip() for field, text in typed.items() if field.startswith(OWN_LIMIT)}
    values["idle_unload_models"] = {model_id: seconds for model_id, seconds in own.items() if seconds}
    if values["home_after_seconds"] is None:
        values["home_after_seconds"] = services().preferences.defaults.home_after_seconds
    return values


def _errors(error: ValidationError) -> dict[str, str]:
    """Return what is wrong with each field, by its name in the form."""
    found = {}
    for problem in error.errors():
        place = [str(part) for part in problem["loc"]]
        own = place[0] == "idle_unload_models" and len(place) > 1
        found[OWN_LIMIT + place[1] if own else place[0]] = _words(problem["type"], problem["msg"])
    return found


def _words(kind: str, message: str) -> str:
    if kind in ("float_parsing", "float_type", "greater_than", "greater_than_equal", "less_than_equal"):
        return "Enter a number of seconds up to 86400, or nothing."
    return f"{message}."
