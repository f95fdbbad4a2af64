"""What the views of all pages share: the picture of this moment, and the answer to a form."""

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
    """The status of this moment, with the words for it."""
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
    """The same for pages that are about something else, such as an error, which must not fail for want of it."""
    try:
        return live_now()
    except Exception as error:
        log.warning("the header can't say how things are", error=str(error))
        return None


def done(version: int | None = None) -> Response:
    """The answer to a form that worked: htmx looks again at once, a browser without it goes back to its page.

    With `version`, the one from before the form was acted on, it waits a moment for a newer one: who looks again must
    see that something began, or would rest for a whole idle interval.
    """
    if version is not None:
        services().board.wait_newer(version, _NOTICE_SECONDS)
    if request.htmx:
        answer: Response = make_response("", 204, trigger="refresh")
        return answer
    return see_other(local_path(request.form.get("back"), "/"))


def show_begun(job: Job) -> None:
    """Give a job a moment to end, for a browser without htmx: its page would show the model as it was before, and looks
    again only while something is moving."""
    if not request.htmx:
        job.wait_done(_BEGUN_SECONDS)


def local_path(back: str | None, otherwise: str) -> str:
    """Where a page or form says that it leads back to, if that is a path of this server: `/\\evil` is another site."""
    return back if back is not None and _LOCAL_PATH.fullmatch(back) else otherwise


def told(title: str, message: str) -> Response:
    """The answer to a form whose outcome can be seen nowhere on the page: it is said above it, and htmx looks again."""
    html = render_template("fragments/told.html", title=title, message=message)
    answer: Response = make_response(html, retarget="#notice", reswap="innerHTML", trigger="refresh")
    return answer


def see_other(path: str) -> Response:
    """A redirect after a form: the browser fetches `path`, and a reload repeats nothing."""
    answer = redirect(path, code=303)
    assert isinstance(answer, Response)
    return answer
