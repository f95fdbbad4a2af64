"""What every page says until it is dismissed: a damaged database was set aside, and a new one begun."""

from __future__ import annotations

from flask import Blueprint, Response
from htmx_flask import make_response, request

from blueprints.pages import done
from blueprints.web import services

bp = Blueprint("set_aside", __name__)


@bp.app_template_global()
def damaged_database() -> str | None:
    """Where the database lies that was set aside; None when there is nothing to say of it."""
    found = services().damaged.current
    return None if found is None else str(found.resolve())


@bp.post("/database/dismiss")
def dismiss() -> Response:
    """Say it no more. The file stays."""
    services().damaged.dismiss()
    if not request.htmx:
        return done()
    answer: Response = make_response("")
    return answer
