"""The Models page: the table of models with its forms, the preview of a switch, and of a deletion."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flask import Blueprint, Response, render_template, url_for
from htmx_flask import make_response, request

from blueprints.filters import ago, dom_id, size
from blueprints.live import Live, Look
from blueprints.pages import done, live_now, local_path, see_other, show_notice, wait_briefly
from blueprints.pieces import SINCE, Piece, Sheet, news, order, sheet
from blueprints.web import client_name, services
from services.downloads.download import Download
from services.downloads.library import Deletion, Recommended
from services.pins import Pin
from services.status import ModelStatus
from services.switching.events import SwitchView
from services.switching.jobs import SwitchOptions
from services.switching.plan import Plan, Unload
from services.text import join_names

bp = Blueprint("models", __name__)


@dataclass(frozen=True, slots=True)
class _Preview:
    """What a switch would do now: the models it unloads, and the switch it abandons."""

    live: Live
    plan: Plan
    unload: tuple[Unload, ...]
    abandons: SwitchView | None


@dataclass(frozen=True, slots=True)
class DownloadForm:
    """Values of the download form; `error` is its validation error. Source None: none is selected."""

    model: str = ""
    source: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """A recommended model, and its download if one is under way."""

    model: Recommended
    download: Download | None


@dataclass(frozen=True, slots=True)
class _Update:
    """The name under which a newer version of a model is downloaded, and that download if one is under way."""

    name: str
    download: Download | None


@dataclass(frozen=True, slots=True)
class Row:
    """Everything a model's row shows; the row is rendered again when one of these changes.

    `used` says when it was last used, `cancels` is the id of the switch that loads it.
    """

    model: ModelStatus
    look: Look
    used: str | None
    update: _Update | None
    cancels: str | None


@dataclass(frozen=True, slots=True)
class _Shown:
    """Everything the page's pieces are made from: `updates` and `used` (when it was last used) are by model."""

    live: Live
    offers: list[Offer]
    updates: dict[str, _Update]
    used: dict[str, str]
    folder_notice: str | None

    @property
    def bases(self) -> Mapping[str, object]:
        """What each group of pieces is made from."""
        status = self.live.status
        return {
            "parts": (self.live.moment, self.offers),
            "folder": self.folder_notice,
            "rows": (status.models, status.switch, self.live.moving_looks, self.updates, self.used),
        }


@bp.get("/models")
def page() -> str:
    return page_with(DownloadForm())


def page_with(form: DownloadForm) -> str:
    """Render the page, with the values of the download form."""
    live = live_now()
    return render_template(
        "pages/models.html",
        form=form,
        checked=request.args.get("checked") == "yes",
        live=live,
        outdated=len(services().library.outdated),
        pieces=_pieces(live),
        rows=[_row_id(model) for model in live.status.models],
    )


def fields(form: DownloadForm) -> str:
    """Render the download form alone."""
    return render_template("fragments/download_form.html", form=form, live=live_now())


@bp.get("/fragments/models")
def fragment() -> Response:
    """Return what has changed on the Models page since its last poll."""
    return news(_pieces(live_now()))


def drawn_news(marks: Mapping[str, str]) -> str | None:
    """Return what a page with these marks lacks, if that was drawn for other pages already; None if it was not.

    Needs no request.
    """
    found = sheet("models")
    drawn = all(found.is_drawn(group, basis) for group, basis in _shown(live_now()).bases.items())
    return found.since(marks.get(SINCE, "")) if drawn else None


def _pieces(live: Live) -> Sheet:
    """Return the current pieces of the Models page."""
    shown = _shown(live)
    bases = shown.bases
    return (
        sheet("models")
        .draw("parts", bases["parts"], lambda: _parts(live, shown.offers))
        .draw("folder", bases["folder"], lambda: [_folder(shown.folder_notice)])
        .draw("rows", bases["rows"], lambda: _rows(live, shown.updates, shown.used))
    )


def _shown(live: Live) -> _Shown:
    """Return what the page shows now."""
    found = services()
    known, outdated = found.catalog.models, found.library.outdated
    sources = {model_id: known[model_id].source for model_id in outdated if model_id in known}
    return _Shown(
        live,
        offers=offers(live),
        updates={model_id: _Update(name, live.download(name)) for model_id, name in sources.items()},
        used={model.id: ago(model.last_used, live.now) for model in live.status.models if model.last_used},
        folder_notice=found.folder.notice,
    )


def offers(live: Live) -> list[Offer]:
    """Return the recommended models."""
    return [Offer(recommended, live.download(recommended.name)) for recommended in services().library.recommendations()]


def _parts(live: Live, offers: list[Offer]) -> Iterator[Piece]:
    words = {"live": live, "back": "/models"}
    under_way = sum(not job.final for job in live.jobs)
    yield Piece("top-status", "fragments/top_status.html", {"live": live})
    yield Piece("jumps", "fragments/models_jumps.html", {"under_way": under_way, "docker": live.docker})
    yield Piece("banner", "fragments/banner.html", words)
    yield Piece("memory", "fragments/memory.html", {"devices": live.status.devices})
    yield Piece("download-lists", "fragments/downloads.html", {**words, "offers": offers})
    address = services().settings.ollama_base_url
    yield Piece("ollama-card", "fragments/ollama.html", {"service": live.service, "ollama_address": address})
    yield Piece("docker-card", "fragments/docker.html", {"docker": live.docker})
    yield Piece("poll", "fragments/poll.html", {"live": live, "url": url_for("models.fragment")}, swap="outerHTML")


def _folder(notice: str | None) -> Piece:
    return Piece("folder-notice", "fragments/folder.html", {"notice": notice})


def _rows(live: Live, updates: dict[str, _Update], used: dict[str, str]) -> Iterator[Piece]:
    models, switch = live.status.models, live.status.switch
    yield order("model-rows", map(_row_id, models))
    for model in models:
        row = Row(
            model=model,
            look=live.look(model),
            used=used.get(model.id),
            update=updates.get(model.id),
            cancels=switch.id if switch is not None and switch.to_model == model.id and not live.headline else None,
        )
        yield Piece(_row_id(model), "fragments/model_row.html", {"row": row}, alone=False)


def _row_id(model: ModelStatus) -> str:
    return f"row-{dom_id(model.id)}"


@bp.get("/models/plan")
def plan() -> str:
    """Show what a switch to `target` would do: a dialog for htmx, else a page."""
    preview = _look_ahead(live_now(), request.args.get("target", ""))
    template = "fragments/plan.html" if request.htmx else "pages/plan.html"
    return _show_plan(template, preview, request.args.get("activate", "yes"), request.args.get("back"))


@bp.post("/models/switch")
def switch() -> Response:
    """Switch to a model with one click: the banner names the models it unloads, and Cancel restores them.

    Asks for confirmation if this would abandon a switch that is more than half done, if the settings require it before
    an unload, and if the switch is infeasible.
    """
    return switch_or_ask(request.form.get("target_model", ""), request.form.get("activate", "yes"))


def switch_or_ask(target: str, activate: str) -> Response:
    """Switch to a model because of a form, or respond with the plan to confirm; the form's `confirm` says yes."""
    live = live_now()
    if request.form.get("confirm") != "yes":
        preview = _look_ahead(live, target)
        wary = services().preferences.current.confirm_before_unload and bool(preview.unload)
        if preview.abandons or wary or not preview.plan.feasible:
            return _ask(preview, activate)
    options = SwitchOptions(confirm=True, activate=activate == "yes")
    services().switcher.switch(target, requested_by=client_name(), options=options)
    return done(live.status.version)


@bp.post("/models/cancel")
def cancel() -> Response:
    """Cancel the switch that the form names. Does nothing if it has ended; a later switch is not affected."""
    version = services().status.current().version
    services().switcher.cancel(switch_id=request.form.get("switch_id") or None)
    return done(version)


@bp.post("/models/dismiss")
def dismiss() -> Response:
    """Dismiss the message about the last switch or loss."""
    services().switcher.dismiss()
    return done()


@bp.post("/models/<path:model_id>/unload")
def unload(model_id: str) -> Response:
    """Unload a model after its requests in flight; with `now`, stop waiting for those of a model that is draining."""
    version = services().status.current().version
    if request.form.get("now") == "yes":
        services().switcher.unload_now(model_id)
    else:
        wait_briefly(services().switcher.stop(model_id, requested_by=client_name()))
    return done(version)


@bp.post("/models/<path:model_id>/restart")
def restart(model_id: str) -> Response:
    version = services().status.current().version
    wait_briefly(services().switcher.restart(model_id, requested_by=client_name()))
    return done(version)


PIN_HOURS = {"": None, "1": 1.0, "4": 4.0, "24": 24.0, "168": 168.0}
"""Choices of how long to pin, in hours."""


@bp.get("/models/pin")
def ask_to_pin() -> str:
    """Show the form that pins `model`, or its pin: a dialog for htmx, else a page."""
    found = services()
    model = found.catalog.get(request.args.get("model", ""))
    template = "fragments/pin.html" if request.htmx else "pages/pin.html"
    return render_template(template, live=live_now(), model=model, pin=found.pins.current.get(model.id))


@bp.post("/models/<path:model_id>/pin")
def pin(model_id: str) -> Response:
    """Pin a model for `hours`, for ever without; `reason` says why."""
    found = services()
    hours = PIN_HOURS.get(request.form.get("hours", ""))
    until = None if hours is None else time.time() + hours * 3600
    reason = request.form.get("reason", "").strip()[:200]
    found.pins.pin(Pin(found.catalog.get(model_id).id, client_name(), reason, until))
    return done(found.board.current.version - 1)


@bp.post("/models/<path:model_id>/unpin")
def unpin(model_id: str) -> Response:
    """Remove a model's pin; does nothing if it has ended."""
    services().pins.unpin(services().catalog.get(model_id).id)
    return done()


@bp.get("/models/delete")
def ask_to_delete() -> str:
    """Show what deleting `model` would do: a dialog for htmx, else a page."""
    found = services()
    model = found.catalog.get(request.args.get("model", ""))
    live = live_now()
    status = live.status.model(model.id)
    return render_template(
        "fragments/delete.html" if request.htmx else "pages/delete.html",
        live=live,
        model=model,
        loaded=status is not None and status.state in ("running", "loading", "unloading", "asleep"),
        deletion=found.library.deletion(model),
    )


@bp.post("/models/<path:model_id>/delete")
def delete(model_id: str) -> Response:
    """Unload a model and delete its files; respond when they are deleted."""
    removed = services().library.remove(model_id, client_name())
    if not request.htmx:
        return done()
    return show_notice(f"{removed.model} was deleted", _freed(removed.deletion))


def _freed(deletion: Deletion) -> str:
    """Return a sentence about the disk space freed, or the files that stay."""
    if not deletion.shared_with:
        return f"{size(deletion.frees_bytes)} are free again." if deletion.frees_bytes else ""
    uses = "uses" if len(deletion.shared_with) == 1 else "use"
    if len(deletion.files) == 1:
        return f"Its file {deletion.files[0]} stays: {join_names(deletion.shared_with)} {uses} it."
    return f"Its files stay: {join_names(deletion.shared_with)} {uses} them."


@bp.post("/models/check-updates")
def check_updates() -> Response:
    """Ask the registries for newer versions; takes up to some seconds per model."""
    outdated = services().library.check_updates()
    if not request.htmx:
        return see_other(url_for("models.page", checked="yes"))
    return show_notice(*updates_in_words(len(outdated)))


@bp.app_template_global()
def updates_in_words(count: int) -> tuple[str, str]:
    """Return title and text for the result of an update check."""
    if not count:
        return "No newer versions", "As far as the registry answered, every model is up to date."
    title = "1 model has a newer version" if count == 1 else f"{count} models have a newer version"
    return title, "Update downloads it; the one that is here answers until then."


def _look_ahead(live: Live, target: str) -> _Preview:
    """Compute what a switch to `target` would do.

    The load under way is cancelled for it, which does not count as an unload.
    """
    under_way = live.status.switch
    plan = services().switcher.plan(target, preempt_loads=under_way is not None)
    unload = tuple(u for u in plan.unload if under_way is None or u.model != under_way.to_model)
    return _Preview(live, plan, unload, live.asks_first(target))


def _show_plan(template: str, preview: _Preview, activate: str, back: str | None) -> str:
    return render_template(
        template,
        live=preview.live,
        plan=preview.plan,
        unload=preview.unload,
        abandons=preview.abandons,
        activate=activate,
        back=local_path(back, "/models"),
    )


def _ask(preview: _Preview, activate: str) -> Response:
    """Show the plan instead of carrying it out."""
    back = request.form.get("back")
    if not request.htmx:
        return see_other(url_for("models.plan", target=preview.plan.target, activate=activate, back=back))
    html = _show_plan("fragments/plan.html", preview, activate, back)
    answer: Response = make_response(html, retarget="#dialog", reswap="innerHTML")
    return answer
