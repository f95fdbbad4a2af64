"""The Models page: every model, what a switch would cost, the memory of each device, and the forms that act."""

from __future__ import annotations

from flask import Blueprint, Response, render_template, url_for
from htmx_flask import make_response, request

from blueprints.pages import done, live_now, see_other
from blueprints.web import client_name, services
from services.switching.plan import Plan

bp = Blueprint("models", __name__)


@bp.get("/models")
def page() -> str:
    return render_template("pages/models.html", live=live_now(), back="/models")


@bp.get("/fragments/models")
def fragment() -> str:
    """What changes on the Models page, as pieces that htmx puts where they belong."""
    return render_template("fragments/models_live.html", live=live_now(), back="/models")


@bp.get("/models/plan")
def plan() -> str:
    """What a switch to `target` would do: a dialog for htmx, a page of its own otherwise."""
    target, activate = request.args.get("target", ""), request.args.get("activate", "yes")
    live = live_now()
    return render_template(
        "fragments/plan.html" if request.htmx else "pages/plan.html",
        live=live,
        plan=services().switcher.plan(target),
        abandons=live.asks_first(target),
        activate=activate,
        back=request.args.get("back", "/models"),
    )


@bp.post("/models/switch")
def switch() -> Response:
    """Switch to a model, asking first when that unloads another or throws away most of a switch under way."""
    target, activate = request.form.get("target_model", ""), request.form.get("activate", "yes")
    live = live_now()
    if request.form.get("confirm") != "yes":
        model = live.status.model(target)
        ready = model is not None and model.state == "running"
        plan = None if ready else services().switcher.plan(target)
        if live.asks_first(target) or (plan is not None and _worth_asking(plan)):
            return _ask(target, activate)
    services().switcher.switch(
        target, requested_by=client_name(), replace="cancel", confirm=True, activate=activate == "yes"
    )
    return done(live.status.version)


@bp.post("/models/cancel")
def cancel() -> Response:
    version = services().status.current().version
    services().switcher.cancel()
    return done(version)


@bp.post("/models/dismiss")
def dismiss() -> Response:
    """Put away the message about the last switch."""
    services().switcher.dismiss()
    return done()


@bp.post("/models/<path:model_id>/unload")
def unload(model_id: str) -> Response:
    version = services().status.current().version
    services().switcher.stop(model_id, requested_by=client_name())
    return done(version)


@bp.post("/models/<path:model_id>/restart")
def restart(model_id: str) -> Response:
    version = services().status.current().version
    services().switcher.restart(model_id, requested_by=client_name())
    return done(version)


def _worth_asking(plan: Plan) -> bool:
    return bool(plan.unload) or not plan.feasible


def _ask(target: str, activate: str) -> Response:
    """Show the plan instead of acting on it."""
    back = request.form.get("back", "/models")
    if not request.htmx:
        return see_other(url_for("models.plan", target=target, activate=activate, back=back))
    live = live_now()
    html = render_template(
        "fragments/plan.html",
        live=live,
        plan=services().switcher.plan(target),
        abandons=live.asks_first(target),
        activate=activate,
        back=back,
    )
    answer: Response = make_response(html, retarget="#dialog", reswap="innerHTML")
    return answer
