"""The notice, on every page until dismissed, that a damaged database was set aside."""

from __future__ import annotations

from flask import Blueprint, Response
from htmx_flask import make_response, request

from blueprints.pages import done
from blueprints.web import services

bp = Blueprint("set_aside", __name__)


@bp.app_template_global()
def damaged_database() -> str | None:
    """Return the path of the database set aside, None if there is nothing to show."""
    found = services().damaged.current
    return None if found is None else str(found.resolve())


@bp.post("/database/dismiss")
def dismiss() -> Response:
    """Hide the notice for good. The file stays."""
    services().damaged.dismiss()
    if not request.htmx:
        return done()
    answer: Response = make_response("")
    return answer
