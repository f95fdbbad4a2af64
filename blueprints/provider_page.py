"""Who serves text, images and vision: the dialog that opens over every page, and the same as a page of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from flask import Blueprint, Response, render_template, url_for
from htmx_flask import make_response, request

from blueprints.environment import environment
from blueprints.filters import dom_id
from blueprints.live import Live
from blueprints.models import offers
from blueprints.pages import done, live_now, see_other
from blueprints.pieces import Piece, Sheet, news, sheet
from blueprints.provider_looks import CAPABILITIES, NAMES, Badge, ServiceLook, badge_of, key_look, service_look
from blueprints.web import ERROR_HEADER, STATUS_OF_CODE, ApiError, client_name, services
from services.engines.supervisor import ServiceError
from services.providers.availability import TITLES
from services.providers.local_services import SERVICE_NAMES, ServiceName
from services.providers.ports import PROVIDERS, Choice
from services.providers.selection import Problem, ProviderUnavailable, as_document, parse_choice
from services.status import ModelStatus
from services.switching.jobs import SwitchError

bp = Blueprint("provider_page", __name__)

BEGUN_SECONDS = 5.0
"""How long a form waits for the load of a service to begin."""
PREFIX = "providers-"
"""Precedes every id of the dialog, which opens over pages that have the same lists."""


@dataclass(frozen=True, slots=True)
class ChoiceForm:
    """The form of the choice: what its fields show (`chosen`), and what was chosen when it was shown (`before`).

    `problems` say why the choice was refused, `error` why a service did not start, `told` what was done; `again`: the
    same choice can be applied now.
    """

    chosen: dict[str, str]
    before: dict[str, str]
    problems: tuple[Problem, ...] = ()
    error: str | None = None
    told: str | None = None
    again: bool = False


@bp.app_template_global()
def provider_badge() -> Badge:
    """Return the badge in the header of every page."""
    found = services()
    return badge_of(found.selection.current, key_set=found.openai_key.is_set)


@bp.get("/providers")
def page() -> str:
    told = "Applied. The next job uses these providers." if request.args.get("applied") == "yes" else None
    return _page(_form(told=told))


@bp.get("/fragments/providers")
def content() -> str:
    """Return what the dialog shows."""
    return render_template("fragments/providers.html", in_dialog=True, **_shown(_form()))


@bp.get("/fragments/providers-news")
def fragment() -> Response:
    """Return what has changed since the last poll; a page polls only while the dialog is open."""
    return news(_pieces(live_now(), _looks()))


@bp.post("/providers")
def apply() -> Response:
    """Choose the providers that were changed in the form; the others stay, whoever changed them since."""
    changed = {name: provider for name, provider in _sent().items() if provider != request.form.get(f"was_{name}")}
    if not changed:
        return _answer(_form(told="Nothing was changed."))
    try:
        services().selection.switch(changed)
    except ProviderUnavailable as error:
        return _answer(_as_sent(problems=error.problems), "provider_unavailable")
    if not request.htmx:
        return see_other(url_for("provider_page.page", applied="yes"))
    return _answer(_form(told="Applied. The next job uses these providers."))


@bp.post("/providers/start")
def start() -> Response:
    """Start the service that a refused choice needs; the form keeps the choice, so that it can be applied then.

    Ollama answers when it responds. Flux and vision have only begun to load then, which may take minutes.
    """
    name = request.form.get("service", "")
    if name not in SERVICE_NAMES:
        raise ApiError("invalid_value", f"There is no such service. There are: {', '.join(SERVICE_NAMES)}.")
    try:
        service, _unloaded = services().local_services.start(
            cast("ServiceName", name), requested_by=client_name(), wait=False, wait_seconds=BEGUN_SECONDS
        )
    except (ServiceError, SwitchError) as error:
        return _answer(_as_sent(error=error.message), error.code)
    runs = service.state == "running"
    then = "is running. Apply the choice now." if runs else "is starting. Apply the choice once it runs."
    return _answer(_as_sent(told=f"{TITLES[service.name]} {then}"))


@bp.post("/providers/check-key")
def check_key() -> Response:
    """Ask OpenAI whether it accepts the key."""
    services().openai_key.check()
    return done()


@bp.get("/providers/start")
@bp.get("/providers/check-key")
def listed() -> Response:
    """Redirect browsers that load a form's address by GET."""
    return see_other(url_for("provider_page.page"))


def _form(told: str | None = None) -> ChoiceForm:
    current = as_document(services().selection.current)
    return ChoiceForm(current, current, told=told)


def _sent() -> dict[str, str]:
    """Return the providers in the request's form, by capability."""
    return {str(name): request.form[name] for name in PROVIDERS if name in request.form}


def _as_sent(problems: tuple[Problem, ...] = (), error: str | None = None, told: str | None = None) -> ChoiceForm:
    """Return the form with the values that came."""
    current = as_document(services().selection.current)
    sent = _sent()
    before = {name: request.form.get(f"was_{name}", provider) for name, provider in current.items()}
    chosen: dict[str, str] = {**current, **(parse_choice(sent) if sent else {})}  # type: ignore[dict-item]
    return ChoiceForm(chosen, before, problems, error, told, again=told is not None)


def _answer(form: ChoiceForm, code: str | None = None) -> Response:
    """Respond with the form, or with the whole page to a browser without htmx. `code` is an error's."""
    status = 200 if code is None else STATUS_OF_CODE.get(code, 409)
    if request.htmx:
        html = render_template("fragments/provider_form.html", **_words(form))
        answer: Response = make_response(html, status, retarget=f"#{PREFIX}form", reswap="outerHTML", trigger="refresh")
    else:
        answer = Response(_page(form), status)
    if code is not None:
        answer.headers[ERROR_HEADER] = code
    return answer


def _page(form: ChoiceForm) -> str:
    return render_template("pages/providers.html", in_dialog=False, **_shown(form))


def _shown(form: ChoiceForm) -> dict[str, object]:
    """Return everything that the dialog and the page are rendered from."""
    live, looks = live_now(), _looks()
    return {
        "live": live,
        "pieces": _pieces(live, looks),
        "services": [_card_id(look) for look in looks],
        "environment": environment(),
        "remembered": services().settings.remember_providers,
        "moving": any(look.starting or look.installing for look in looks),
        **_words(form),
    }


def _words(form: ChoiceForm) -> dict[str, object]:
    return {
        "form": form,
        "capabilities": CAPABILITIES,
        "names": NAMES,
        "defaults": as_document(services().selection.defaults),
        "titles": TITLES,
        "startable": {service.name for service in services().local_services.all() if service.can_start},
    }


def _looks() -> list[ServiceLook]:
    """Return the services as they are now."""
    found = services()
    health = found.health.soon()
    return [service_look(service, health[service.name]) for service in found.local_services.all()]


def _pieces(live: Live, looks: list[ServiceLook]) -> Sheet:
    """Return the current pieces: those of the models only where they may be managed."""
    found = services()
    where = environment()
    choice, defaults = found.selection.current, found.selection.defaults
    key = key_look(found.openai_key.base_url, is_set=found.openai_key.is_set, check=found.openai_key.latest)
    pieces = (
        sheet(f"providers-{where}", f"{PREFIX}since")
        .draw("header", live.moment, lambda: [Piece("top-status", "fragments/top_status.html", {"live": live})])
        .draw("now", (choice, defaults), lambda: [_now(choice, defaults)])
        .draw("key", key, lambda: [Piece(f"{PREFIX}key", "fragments/provider_key.html", {"key": key})])
        .draw("services", tuple(looks), lambda: map(_card, looks))
    )
    if where == "local":
        recommended = offers(live)
        basis = (live.jobs, recommended, live.no_pulls, live.status.models)
        pieces.draw("models", basis, lambda: _models(live, recommended))
    return pieces


def _now(choice: Choice, defaults: Choice) -> Piece:
    words = {"current": as_document(choice), "defaults": as_document(defaults)}
    return Piece(f"{PREFIX}now", "fragments/provider_now.html", {**words, "capabilities": CAPABILITIES, "names": NAMES})


def _card(look: ServiceLook) -> Piece:
    return Piece(_card_id(look), "fragments/provider_service.html", {"look": look, "id": _card_id(look)})


def _card_id(look: ServiceLook) -> str:
    return f"{PREFIX}service-{look.name}"


def _models(live: Live, recommended: object) -> Iterator[Piece]:
    installed = [model for model in live.status.models if model.engine in ("llamacpp", "ollama")]
    yield Piece(f"{PREFIX}installed", "fragments/provider_installed.html", {"models": [*map(_entry, installed)]})
    yield Piece(
        f"{PREFIX}downloads",
        "fragments/provider_downloads.html",
        {"live": live, "offers": recommended, "prefix": PREFIX},
    )


def _entry(model: ModelStatus) -> tuple[str, int | None, str]:
    """Return what the list of installed models shows of one."""
    return model.id, model.size_bytes, dom_id(model.id)
