"""Helpers shared by the views of all pages: the current status, and responses to forms."""

from __future__ import annotations

import re
import time

import structlog
from flask import Blueprint, Response, redirect, render_template
from htmx_flask import make_response, request

from blueprints.live import Live
from blueprints.web import services
from services.switching.jobs import Job

bp = Blueprint("pages", __name__)
log = structlog.get_logger(__name__)

_LOCAL_PATH = re.compile(r"/(?![/\\])[^\x00-\x20\\]*")
_NOTICE_SECONDS = 0.3
_BEGUN_SECONDS = 1.0


def live_now() -> Live:
    """Return the current status with its wording."""
    found = services()
    return Live(
        found.status.current(),
        time.time(),
        tuple(found.downloads.all()),
        found.ollama_service.status(),
        found.docker_service.status(),
    )


@bp.app_template_global()
def live_if_known() -> Live | None:
    """Return `live_now`, or None on an error. For pages such as an error page, which must not fail because of it."""
    try:
        return live_now()
    except Exception as error:
        log.warning("the status for the header can't be computed", error=str(error))
        return None


def done(version: int | None = None) -> Response:
    """Respond to a form that worked: htmx polls at once, a browser without it is redirected to its page.

    With `version`, the version before the action, it waits a moment for a newer one, so that the poll sees that
    something began; otherwise the page would wait for a whole idle interval.
    """
    if version is not None:
        services().board.wait_newer(version, _NOTICE_SECONDS)
    if request.htmx:
        answer: Response = make_response("", 204, trigger="refresh")
        return answer
    return see_other(local_path(request.form.get("back"), "/"))


def wait_briefly(job: Job) -> None:
    """Wait a moment for a job's end, for browsers without htmx, whose page polls only while something is changing."""
    if not request.htmx:
        job.wait_done(_BEGUN_SECONDS)


def local_path(back: str | None, otherwise: str) -> str:
    """Return where a page or form leads back to, if that is a path of this server: `/\\evil` leads to another site."""
    return back if back is not None and _LOCAL_PATH.fullmatch(back) else otherwise


def show_notice(title: str, message: str) -> Response:
    """Respond to a form whose result is not visible on the page: show it in the notice area, and let htmx poll."""
    html = render_template("fragments/told.html", title=title, message=message)
    answer: Response = make_response(html, retarget="#notice", reswap="innerHTML", trigger="refresh")
    return answer


def see_other(path: str) -> Response:
    """Redirect after a form, so that reloading repeats nothing."""
    answer = redirect(path, code=303)
    assert isinstance(answer, Response)
    return answer
