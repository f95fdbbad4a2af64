"""The forms of the Models page that start, pause, resume and cancel downloads."""

from __future__ import annotations

from typing import cast

from flask import Blueprint, Response
from htmx_flask import make_response, request

from blueprints.models import DownloadForm, fields, page_with
from blueprints.pages import done, see_other
from blueprints.web import ERROR_HEADER, client_name, services
from services.downloads.fetcher import DownloadError, Source

bp = Blueprint("downloads", __name__, url_prefix="/downloads")

PLACE = "/models#downloads"
SOURCES = ("ollama", "huggingface")


@bp.get("")
def listed() -> Response:
    """Redirect browsers that load a form's address by GET."""
    return see_other(PLACE)


@bp.post("")
def start() -> Response:
    """Start a download. An error in a name that was typed is shown at its field."""
    model, source = request.form.get("model", "").strip(), request.form.get("source", "ollama")
    typed = request.form.get("typed") == "yes"
    try:
        if source not in SOURCES:
            raise DownloadError("invalid_name", "Choose where it comes from: Ollama or Hugging Face.")
        if not model:
            raise DownloadError("invalid_name", "Write the name of the model to download.")
        services().downloads.request(model, cast("Source", source), client_name())
    except DownloadError as error:
        if not typed:
            raise
        return _ask_again(DownloadForm(model, source, error.message))
    if typed and request.htmx:
        answer: Response = make_response(fields(DownloadForm(source=source)), trigger="refresh")
        return answer
    return done()


@bp.post("/<download_id>/pause")
def pause(download_id: str) -> Response:
    services().downloads.pause(download_id)
    return done()


@bp.post("/<download_id>/resume")
def resume(download_id: str) -> Response:
    """Continue a paused download, or retry a failed one."""
    services().downloads.resume(download_id)
    return done()


@bp.post("/<download_id>/cancel")
def cancel(download_id: str) -> Response:
    services().downloads.cancel(download_id)
    return done()


@bp.post("/<download_id>/remove")
def remove(download_id: str) -> Response:
    """Remove a finished download from the list; the model stays."""
    services().downloads.remove(download_id)
    return done()


def _ask_again(form: DownloadForm) -> Response:
    """Return the form with the typed values and their error."""
    if not request.htmx:
        return Response(page_with(form), 422)
    answer: Response = make_response(fields(form), 422, retarget="#download-form", reswap="outerHTML")
    answer.headers[ERROR_HEADER] = "invalid_name"
    return answer
