"""The Models page: every model, what a switch would cost, the memory of each device, and the forms that act."""

from __future__ import annotations

from dataclasses import dataclass

from flask import Blueprint, Response, render_template, url_for
from htmx_flask import make_response, request

from blueprints.live import Live
from blueprints.pages import done, live_now, see_other
from blueprints.web import client_name, services
from services.switching.events import SwitchView
from services.switching.plan import Plan, Unload

bp = Blueprint("models", __name__)


@dataclass(frozen=True, slots=True)
class _Preview:
    """What a switch would do, seen from this moment: the models that it unloads and the switch that it throws away."""

    live: Live
    plan: Plan
    unload: tuple[Unload, ...]
    abandons: SwitchView | None

    @property
    def harmless(self) -> bool:
        """Whether nobody loses a model by it."""
        return self.plan.feasible and not self.unload


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
    preview = _look_ahead(live_now(), request.args.get("target", ""))
    template = "fragments/plan.html" if request.htmx else "pages/plan.html"
    return _show_plan(template, preview, request.args.get("activate", "yes"), request.args.get("back", "/models"))


@bp.post("/models/switch")
def switch() -> Response:
    """Switch to a model, asking first when that unloads another or throws away most of a switch under way."""
    target, activate = request.form.get("target_model", ""), request.form.get("activate", "yes")
    live = live_now()
    if request.form.get("confirm") != "yes":
        model = live.status.model(target)
        preview = _look_ahead(live, target)
        if preview.abandons or not (preview.harmless or (model is not None and model.state == "running")):
            return _ask(preview, activate)
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


def _look_ahead(live: Live, target: str) -> _Preview:
    """What a switch to `target` would do. One under way gives way to it, which is no unloading."""
    under_way = live.status.switch
    plan = services().switcher.plan(target, loads_give_way=under_way is not None)
    unload = tuple(u for u in plan.unload if under_way is None or u.model != under_way.to_model)
    return _Preview(live, plan, unload, live.asks_first(target))


def _show_plan(template: str, preview: _Preview, activate: str, back: str) -> str:
    return render_template(
        template,
        live=preview.live,
        plan=preview.plan,
        unload=preview.unload,
        abandons=preview.abandons,
        activate=activate,
        back=back,
    )


def _ask(preview: _Preview, activate: str) -> Response:
    """Show the plan instead of acting on it."""
    back = request.form.get("back", "/models")
    if not request.htmx:
        return see_other(url_for("models.plan", target=preview.plan.target, activate=activate, back=back))
    html = _show_plan("fragments/plan.html", preview, activate, back)
    answer: Response = make_response(html, retarget="#dialog", reswap="innerHTML")
    return answer
