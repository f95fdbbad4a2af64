"""The Studio's pages: the form that starts a run, one run, two runs side by side; and the pictures."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flask import Blueprint, Response, current_app, render_template, url_for
from htmx_flask import make_response, request

from blueprints.live import Live
from blueprints.pages import live_now, see_other
from blueprints.pieces import Piece, Sheet, news, order, sheet
from blueprints.provider_looks import CAPABILITIES
from blueprints.studio_words import RunWords, calls_in_words, served_in_words
from blueprints.web import ApiError, handles_errors_of, services
from services.store.records import StudioCandidate
from services.studio.live_run import RunView
from services.studio.request import (
    LARGEST_SEED,
    LONGEST_PROMPT,
    MOST_CANDIDATES,
    MOST_ITERATIONS,
    MOST_KEPT,
    InvalidRequest,
    most_calls,
)
from services.studio.studio import Asked, Listed, RunNotFound

bp = Blueprint("studio", __name__)

LISTED = 30
"""Runs on one page of the list."""
BEST_COMPARED = 4
"""Pictures of each run when two are compared."""
RUN_POLL_SECONDS = 1
STOP_POLLING = 286
"""Status on which htmx polls no more."""
SHEETS = 8
"""Runs whose drawn pieces are kept."""
YEAR = 365 * 24 * 3600
BOUNDS = {
    "most_kept": MOST_KEPT,
    "most_iterations": MOST_ITERATIONS,
    "most_candidates": MOST_CANDIDATES,
    "largest_seed": LARGEST_SEED,
    "longest_prompt": LONGEST_PROMPT,
}
_ORIGIN = re.compile(r"([0-9a-f]{1,64})-([0-9]{1,6})")
_NUMBER = re.compile(r"\s*[0-9]{1,12}\s*")


@dataclass(frozen=True, slots=True)
class RunForm:
    """The values of the form as they were typed; why no run was started (`error`, of `code`), and by which `field`."""

    prompt: str = ""
    beam_width: str = "2"
    iterations: str = "2"
    candidates: str = "4"
    seed: str = ""
    origin: str = ""
    error: str | None = None
    code: str | None = None
    field: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, str]) -> RunForm:
        """Read the values of a form or a query; what is missing keeps its default."""
        names = ("prompt", "beam_width", "iterations", "candidates", "seed", "origin")
        return cls(**{name: values[name] for name in names if name in values})

    @classmethod
    def again(cls, view: RunView) -> RunForm:
        """Return the values that a run was started with."""
        run = view.run
        origin = "" if run.origin_run is None else f"{run.origin_run}-{run.origin_number}"
        shape = (str(run.beam_width), str(run.iterations), str(run.candidates))
        return cls(run.prompt, *shape, str(run.seed), origin)

    @property
    def asked(self) -> Asked:
        """What the values ask for. Raises InvalidRequest."""
        found = _ORIGIN.fullmatch(self.origin)
        return Asked(
            self.prompt,
            self._number("beam_width", "The number of pictures kept"),
            self._number("iterations", "Iterations"),
            self._number("candidates", "Candidates"),
            self._number("seed", "The seed") if self.seed.strip() else None,
            None if found is None else (found[1], int(found[2])),
        )

    def _number(self, name: str, words: str) -> int:
        typed: str = getattr(self, name)
        if not _NUMBER.fullmatch(typed):
            raise InvalidRequest(name, f"{words} has to be a whole number.")
        return int(typed)


@bp.get("/studio")
def page() -> str:
    """Show the form and the earlier runs. `again` fills the form with a run's values, `continue` with its candidate."""
    form = RunForm.of(request.args)
    studio = services().studio
    if "again" in request.args:
        form = RunForm.again(studio.get(request.args["again"]))
    elif found := _ORIGIN.fullmatch(request.args.get("continue", "")):
        form = replace(RunForm.again(studio.get(found[1])), seed="", origin=found[0])
    return _page(form)


@bp.post("/studio/runs")
def start() -> Response:
    """Start a run; the page of the run follows it."""
    begun = services().studio.start(RunForm.of(request.form).asked)
    return see_other(url_for("studio.run", run_id=begun.run.id))


@handles_errors_of("studio.start")
def show_refusal(error: ApiError) -> Response:
    """Respond to a run that was not started: everything that was typed stays, with the reason."""
    return Response(_page(replace(RunForm.of(request.form), error=error.message, code=error.code, field=error.param)))


@bp.get("/studio/runs")
def earlier() -> Response | str:
    """Show the runs begun before the one that the query names (`before`); without it, redirect to the form."""
    if "before" not in request.args:
        return see_other(url_for("studio.page"))
    run, live = services().studio.get(request.args["before"]).run, live_now()
    runs = [_row(each, live.now) for each in services().studio.listed(LISTED, (run.created_at, run.id))]
    return render_template("pages/studio_runs.html", live=live, runs=runs, full=len(runs) == LISTED)


@bp.get("/fragments/studio-calls")
def calls() -> str:
    """Say how many calls a run of this shape makes."""
    return _calls(replace(RunForm.of(request.args), prompt="-", origin=""))


@bp.get("/fragments/studio")
def fragment() -> Response:
    """Return what has changed on the Studio's first page since its last poll."""
    return news(_list_pieces(live_now()))


@bp.get("/studio/runs/<run_id>")
def run(run_id: str) -> str:
    view, live = services().studio.get(run_id), live_now()
    words = RunWords(view, live.now)
    return render_template(
        "pages/studio_run.html",
        live=live,
        view=view,
        words=words,
        pieces=_run_pieces(view, live),
        cards=[_card_id(candidate) for candidate in _shown(view)],
        others=[each.run for each in services().studio.listed(LISTED) if each.run.id != run_id],
    )


@bp.get("/fragments/studio/<run_id>")
def run_fragment(run_id: str) -> Response:
    """Return what has changed on a run's page since its last poll. One that was deleted is told once."""
    try:
        return news(_run_pieces(services().studio.get(run_id), live_now()))
    except RunNotFound as error:
        html = render_template("fragments/told.html", title="Deleted", message=str(error))
        answer: Response = make_response(html, STOP_POLLING, retarget="#notice", reswap="innerHTML")
        return answer


@bp.post("/studio/runs/<run_id>/cancel")
def cancel(run_id: str) -> Response:
    """Cancel a run; does nothing to one that is over."""
    services().studio.cancel(run_id)
    return see_other(url_for("studio.run", run_id=run_id))


@bp.post("/studio/runs/<run_id>/delete")
def delete(run_id: str) -> Response:
    services().studio.delete(run_id)
    return see_other(url_for("studio.page"))


@bp.get("/studio/compare")
def compare() -> str:
    """Show two runs side by side: those that the query names as `run`."""
    live = live_now()
    chosen = list(dict.fromkeys(request.args.getlist("run")))
    views = [services().studio.get(run_id) for run_id in chosen[:2]] if len(chosen) == 2 else []
    return render_template(
        "pages/studio_compare.html",
        live=live,
        compared=[(RunWords(view, live.now), _cards(view, BEST_COMPARED)) for view in views],
        chosen=len(chosen),
        capabilities=CAPABILITIES,
    )


@bp.get("/studio/pictures/<picture_id>")
def picture(picture_id: str) -> Response:
    """Serve a picture. Its address is the hash of its content, so a browser may keep it for ever."""
    found = services().studio.pictures.read(picture_id)
    if found is None:
        raise ApiError("not_found", "This picture does not exist, or was removed to save space.")
    answer = Response(found.data, mimetype=found.media_type)
    answer.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    answer.cache_control.private = True
    answer.cache_control.max_age = YEAR
    answer.cache_control.immutable = True
    answer.set_etag(picture_id)
    return answer


def _page(form: RunForm) -> str:
    live = live_now()
    return render_template(
        "pages/studio.html",
        live=live,
        form=form,
        bounds=BOUNDS,
        calls=_calls(replace(form, prompt="-")),
        origin=_origin(form),
        under_way=services().studio.under_way,
        pieces=_list_pieces(live),
    )


def _calls(form: RunForm) -> str:
    """Say how many calls the form's values make, or what is wrong with them."""
    try:
        return calls_in_words(most_calls(services().studio.check(form.asked)))
    except InvalidRequest as error:
        return error.message
    except RunNotFound as error:
        return str(error)


def _origin(form: RunForm) -> dict[str, Any] | None:
    """Return the card of the candidate that the form's run goes on from; None without one."""
    found = _ORIGIN.fullmatch(form.origin)
    if found is None:
        return None
    try:
        view = services().studio.get(found[1])
    except RunNotFound:
        return None
    candidate = view.candidate(int(found[2]))
    return None if candidate is None else _card(view, candidate)


def _list_pieces(live: Live) -> Sheet:
    """Return the current pieces of the Studio's first page."""
    runs = [_row(each, live.now) for each in services().studio.listed(LISTED)]
    served = served_in_words(services().selection.current)
    return (
        sheet("studio")
        .draw("parts", live.moment, lambda: _parts(live, url_for("studio.fragment"), live.announcement))
        .draw("served", served, lambda: [Piece("studio-served", "fragments/studio_served.html", {"served": served})])
        .draw("runs", runs, lambda: [_list(runs)])
    )


def _list(runs: list[dict[str, Any]]) -> Piece:
    return Piece("studio-runs", "fragments/studio_runs.html", {"runs": runs, "full": len(runs) == LISTED})


def _row(listed: Listed, now: float) -> dict[str, Any]:
    """Return what the list shows of a run."""
    view = RunView(listed.run, ())
    best = listed.best
    there = best is not None and best.picture is not None and services().studio.pictures.has(best.picture)
    words = RunWords(view, now)
    return {"run": listed.run, "best": best, "there": there, "state": words.state, "drawn": words.drawn}


def _run_pieces(view: RunView, live: Live) -> Sheet:
    """Return the current pieces of a run's page."""
    words = RunWords(view, live.now)
    shown = _shown(view)
    cards = [_card(view, candidate) for candidate in shown]
    url = url_for("studio.run_fragment", run_id=view.run.id)
    announced = "\n".join([live.announcement, *words.announcement])
    seconds = live.poll_seconds if view.run.final else min(RUN_POLL_SECONDS, live.poll_seconds)
    state = (view.run, view.activity, view.wait, view.cancelling, words.waiting)
    return (
        _sheet_of(view.run.id)
        .draw("parts", (live.moment, announced, seconds), lambda: _parts(live, url, announced, seconds))
        .draw("now", state, lambda: [_now(words)])
        .draw("cards", cards, lambda: _card_pieces(cards))
    )


def _parts(live: Live, url: str, announced: str, seconds: float | None = None) -> Iterator[Piece]:
    yield Piece("top-status", "fragments/top_status.html", {"live": live})
    yield Piece("banner", "fragments/banner.html", {"live": live, "back": "/studio"})
    poll = {"url": url, "announced": announced, "seconds": live.poll_seconds if seconds is None else seconds}
    yield Piece("poll", "fragments/studio_poll.html", poll, swap="outerHTML")


def _now(words: RunWords) -> Piece:
    return Piece("studio-now", "fragments/studio_now.html", {"words": words, "capabilities": CAPABILITIES})


def _card_pieces(cards: list[dict[str, Any]]) -> Iterator[Piece]:
    yield order("studio-cards", [card["id"] for card in cards])
    for card in cards:
        yield Piece(card["id"], "fragments/studio_card.html", {"card": card}, alone=False)


def _shown(view: RunView) -> list[StudioCandidate]:
    """Return the candidates in the order of the page: as they came while it runs, then the ranking and the rest."""
    if not view.run.final:
        return list(view.candidates)
    ranking = list(view.ranking)
    numbers = {candidate.number for candidate in ranking}
    return ranking + [candidate for candidate in view.candidates if candidate.number not in numbers]


def _cards(view: RunView, most: int) -> list[dict[str, Any]]:
    """Return the cards of a run's best candidates."""
    return [_card(view, candidate) for candidate in view.ranking[:most]]


def _card(view: RunView, candidate: StudioCandidate) -> dict[str, Any]:
    """Return what a candidate's card shows."""
    there = candidate.picture is not None and services().studio.pictures.has(candidate.picture)
    return {
        "id": _card_id(candidate),
        "candidate": candidate,
        "there": there,
        "gone": candidate.picture is not None and not there,
        "ended": view.run.final,
        "most_bytes": services().studio.pictures.most_bytes,
    }


def _card_id(candidate: StudioCandidate) -> str:
    return f"candidate-{candidate.run_id[:8]}-{candidate.number}"


def _sheet_of(run_id: str) -> Sheet:
    """Return the sheet of one run; those looked at last are kept."""
    sheets: OrderedDict[str, Sheet] = current_app.extensions.setdefault("switchyard.studio_sheets", OrderedDict())
    found = sheets.pop(run_id, None) or Sheet()
    sheets[run_id] = found
    while len(sheets) > SHEETS:
        sheets.popitem(last=False)
    return found
