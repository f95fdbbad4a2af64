"""The job: in each iteration all texts, then all pictures, then all scores, each phase as far as possible side by side.

It works in phases so that local providers which don't fit into memory together are switched once per phase, not once
per candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import structlog

from services.cancellation import Cancelled, CancelToken
from services.providers.ports import Capability, JobProviders, Picture, Provider, ProviderError
from services.scheduling import Scheduler, pause
from services.store.records import RunState, StudioCandidate
from services.studio import wording
from services.studio.live_run import Activity, LiveRun, Wait
from services.studio.pictures import NotAPicture, PicturesUnwritable
from services.studio.ranking import flaw, ranked
from services.studio.request import TRIES_PER_LIST, Phase, RunRequest, Wording, derived_seed, most_calls, shares
from services.studio.side_by_side import CallTokens, run_side_by_side

log = structlog.get_logger(__name__)

R = TypeVar("R")

PICTURE_PIXELS = 1024
"""Width and height of a picture that is asked for."""
TEMPERATURE = 0.9
CALM_TEMPERATURE = 0.4
"""For a list that is asked for again: a garbled one is often the work of chance."""
SHORTEST_WAIT = 1.0
LONGEST_WAIT = 600.0
"""Seconds that a run waits for one call in all, when a provider asks it to."""
FOR_GOOD = frozenset({"provider_unavailable", "out_of_memory"})
"""Error codes after which the next call would fail too."""
CUT_OFF = ("provider_unavailable", "The call was cut off, although nobody had cancelled the run.")
NOUNS: Mapping[Phase, str] = {"texts": "writing", "images": "drawing", "scores": "scoring"}
CAPABILITIES: Mapping[Phase, Capability] = {"texts": "llm", "images": "image", "scores": "vision"}


class PictureKeeper(Protocol):
    """Where pictures are kept."""

    def keep(self, picture: Picture) -> str:
        """Store a picture; return its id. Raises NotAPicture and PicturesUnwritable."""

    def read(self, picture_id: str) -> Picture | None:
        """Return a stored picture; None if it is gone."""


class _ProviderGivenUp(ProviderError):
    """A provider was waited for as long as a run waits."""


@dataclass(frozen=True, slots=True)
class _List:
    """A list of candidates to ask for: `count` of them, from the prompt or refining a parent.

    `start` is the number of candidates in the lists before it.
    """

    index: int
    start: int
    count: int
    parent: int | None = None
    wording: Wording | None = None
    told: str = ""


class Search:
    """One run's job. `run` blocks until it is over; `cancel` ends it soon, from any thread."""

    def __init__(
        self,
        live: LiveRun,
        request: RunRequest,
        providers: JobProviders,
        pictures: PictureKeeper,
        scheduler: Scheduler,
        at_once: int,
    ) -> None:
        self._live = live
        self._request = request
        self._providers = providers
        self._pictures = pictures
        self._scheduler = scheduler
        self._at_once = at_once
        self._tokens = CallTokens()
        self._cancelled_as: RunState | None = None
        self._not_before: dict[Phase, float] = {}
        """When a provider that asked to wait may be called again, on the scheduler's clock."""

    def cancel(self, state: RunState = "cancelled") -> None:
        """Cancel every call upstream; the run ends in `state` once they have ended."""
        self._cancelled_as = state
        self._live.cancelling()
        self._tokens.cancel()

    def run(self) -> None:
        """Search to the end. Errors end up in the run; nothing is raised."""
        try:
            self._search()
        except (Cancelled, ProviderError) as error:
            if self._cancelled_as is not None:
                self._live.finish(self._cancelled_as)
            else:
                self._note_failure()
                code, message = (error.code, error.message) if isinstance(error, ProviderError) else CUT_OFF
                self._live.finish("failed", code, message)
        except PicturesUnwritable as error:
            self._live.finish("failed", "state_unwritable", str(error))
        except Exception as error:
            log.exception("a run of the studio failed unexpectedly", run=self._live.view.run.id)
            reason = type(error).__name__
            self._live.finish(
                "failed", "internal_error", f"Switchyard hit a problem of its own ({reason}); its log has the details."
            )
        else:
            self._live.finish("complete")

    def _search(self) -> None:
        kept: list[StudioCandidate] = []
        for iteration in range(1, self._request.iterations + 1):
            fresh = self._write(iteration, self._lists(kept))
            self._draw(iteration, fresh)
            self._score(iteration, [c for c in self._now(fresh) if c.state == "drawn"])
            kept = ranked(self._live.view.candidates)[: self._request.beam_width]

    def _lists(self, kept: Sequence[StudioCandidate]) -> list[_List]:
        """Return the lists to ask for: one from the prompt, or one for each parent."""
        count, origin = self._request.candidates, self._request.origin
        if kept:
            given = shares(count, len(kept))
            return [
                _List(index, sum(given[:index]), share, parent.number, Wording(parent.what, parent.how), told(parent))
                for index, (parent, share) in enumerate(zip(kept, given, strict=False))
            ]
        if origin is not None:
            return [_List(0, 0, count, wording=origin.wording, told=origin.told)]
        return [_List(0, 0, count)]

    def _write(self, iteration: int, lists: Sequence[_List]) -> list[StudioCandidate]:
        """Have the candidates written; return them. They are numbered in the order of the lists."""
        written: dict[int, list[Wording]] = {}

        def work(asked: _List) -> None:
            written[asked.index] = self._ask(iteration, asked)

        refusals = self._phase("texts", iteration, lists, work)
        fresh: list[StudioCandidate] = []
        given: list[tuple[_List, int]] = []
        number = len(self._live.view.candidates)
        for asked in lists:
            wordings = written.get(asked.index)
            if wordings is None:  # refused
                continue
            by_rules = not wordings
            if by_rules:
                wordings = self._by_rules(iteration, asked)
            for each in wordings:
                number += 1
                fresh.append(
                    StudioCandidate(
                        run_id=self._live.view.run.id,
                        number=number,
                        iteration=iteration,
                        parent=asked.parent,
                        what=each.what,
                        how=each.how,
                        by_rules=by_rules,
                        seed=derived_seed(self._request.seed, "picture", number),
                    )
                )
            given.append((asked, 0 if by_rules else len(wordings)))
        self._note_shortage(iteration, given)
        for refusal in dict.fromkeys(error.message for error in refusals):
            self._live.note(f"Iteration {iteration}: a list of candidates is missing. {refusal}")
        self._live.put(*fresh)
        return fresh

    def _ask(self, iteration: int, asked: _List) -> list[Wording]:
        """Return the candidates of one list; empty if the model gave none that can be read, twice."""
        found: list[Wording] = []
        for attempt in range(TRIES_PER_LIST):
            answer = self._ask_once(iteration, asked, attempt)
            found = wording.merged(found, wording.parse_candidates(answer, asked.count), asked.count)
            if len(found) == asked.count:
                break
        return found

    def _ask_once(self, iteration: int, asked: _List, attempt: int) -> str:
        """Return the model's answer; empty if it can't be used."""
        prompt = self._request.prompt
        if asked.wording is None:
            messages = wording.ask_for_first(prompt, asked.count)
        else:
            messages = wording.ask_for_better(prompt, asked.wording, asked.told, asked.count)
        try:
            return self._call(
                "texts",
                lambda token: self._providers.llm.complete(
                    wording.ask_again(messages) if attempt else messages,
                    token,
                    max_tokens=wording.longest_answer(asked.count),
                    temperature=CALM_TEMPERATURE if attempt else TEMPERATURE,
                    seed=derived_seed(self._request.seed, "text", iteration, asked.index, attempt),
                ),
            )
        except ProviderError as error:
            if error.code != "bad_answer":
                raise
            return ""

    def _by_rules(self, iteration: int, asked: _List) -> list[Wording]:
        what = self._request.prompt if asked.wording is None else asked.wording.what
        return wording.by_rules(what, asked.count, (iteration - 1) * self._request.candidates + asked.start)

    def _note_shortage(self, iteration: int, given: Sequence[tuple[_List, int]]) -> None:
        """Say when the model gave fewer candidates than asked for: `given` is how many of each list."""
        none = sum(asked.count for asked, count in given if not count)
        wanted = sum(asked.count for asked, _ in given)
        if none:
            self._live.note(
                f"Iteration {iteration}: the language model was asked twice and gave no list that can be read for "
                f"{none} of {wanted} candidates. What stands in for them was written by rules: the same content in "
                "different looks."
            )
        missing = sum(asked.count - count for asked, count in given if count)
        if missing:
            self._live.note(
                f"Iteration {iteration}: the language model was asked twice and gave {missing} fewer candidates than "
                f"the {wanted} asked for; the run goes on with the rest."
            )

    def _draw(self, iteration: int, candidates: Sequence[StudioCandidate]) -> None:
        def work(candidate: StudioCandidate) -> None:
            picture = self._call(
                "images",
                lambda token: self._providers.image.generate(
                    Wording(candidate.what, candidate.how).prompt,
                    token,
                    width=PICTURE_PIXELS,
                    height=PICTURE_PIXELS,
                    seed=candidate.seed,
                ),
            )
            try:
                kept = self._pictures.keep(picture)
            except NotAPicture as error:
                raise ProviderError("bad_answer", str(error)) from None
            self._live.put(replace(candidate, state="drawn", picture=kept))

        self._phase("images", iteration, candidates, self._or_drop(work))

    def _score(self, iteration: int, candidates: Sequence[StudioCandidate]) -> None:
        def work(candidate: StudioCandidate) -> None:
            picture = self._pictures.read(candidate.picture or "")
            if picture is None:
                raise ProviderError(
                    "bad_answer",
                    "Its picture was removed before it was scored: all of them exceed the setting studio_pictures_gb.",
                )
            score = self._call(
                "scores", lambda token: self._providers.vision.score(picture, self._request.prompt, token)
            )
            flawed = flaw(score)
            if flawed is not None:
                raise ProviderError("bad_answer", flawed)
            self._live.put(
                replace(
                    candidate,
                    state="scored",
                    alignment=score.alignment,
                    aesthetic=score.aesthetic,
                    total=score.total,
                    comment=score.comment,
                )
            )

        self._phase("scores", iteration, candidates, self._or_drop(work))

    def _or_drop(self, work: Callable[[StudioCandidate], None]) -> Callable[[StudioCandidate], None]:
        """Return the work with a failure noted at the candidate, before it is raised."""

        def checked(candidate: StudioCandidate) -> None:
            try:
                work(candidate)
            except ProviderError as error:
                self._live.put(replace(candidate, state="dropped", reason=error.message))
                raise

        return checked

    def _phase(
        self, phase: Phase, iteration: int, items: Sequence[R], work: Callable[[R], None]
    ) -> list[ProviderError]:
        """Make the provider ready, then do the work for all items.

        An item whose call fails is left out, unless the provider has failed for good or all of them fail: that raises
        the provider's error. Return the errors of those left out. Raises Cancelled.
        """
        provider = self._provider(phase)
        self._live.begin(Activity(phase, iteration, provider.name, provider.model, True, 0, len(items)))
        seconds = self._waiting_out(phase, provider.make_ready)
        self._live.served_by(CAPABILITIES[phase], self._providers.names(), seconds)
        self._live.begin(Activity(phase, iteration, provider.name, provider.model, False, 0, len(items), seconds))
        failures: dict[int, ProviderError] = {}

        def one(index: int, item: R) -> Callable[[], None]:
            def do() -> None:
                try:
                    work(item)
                except ProviderError as error:
                    if isinstance(error, _ProviderGivenUp) or error.code in FOR_GOOD:
                        raise
                    failures[index] = error
                self._live.step()

            return do

        works = [one(index, item) for index, item in enumerate(items)]
        at_once = max(1, min(provider.at_once, self._at_once))
        run_side_by_side(self._scheduler, f"studio-{phase}", works, at_once, self._tokens.cancel)
        if failures and len(failures) == len(items):
            raise failures[min(failures)]
        return [failures[index] for index in sorted(failures)]

    def _call(self, phase: Phase, function: Callable[[CancelToken], R]) -> R:
        """Make one call, which is counted."""
        made = self._live.count_call(phase)
        assert made <= getattr(most_calls(self._request), phase), f"more {phase} than the {made - 1} announced"
        return self._waiting_out(phase, function)

    def _waiting_out(self, phase: Phase, function: Callable[[CancelToken], R]) -> R:
        """Call a provider, again after each wait that it asks for, at most LONGEST_WAIT seconds in all."""
        waited = 0.0
        while True:
            with self._tokens.token() as token:
                self._wait_turn(phase, token)
                try:
                    return function(token)
                except ProviderError as error:
                    if error.retry_after is None or not math.isfinite(error.retry_after):
                        raise
                    refusal = error
            seconds = max(SHORTEST_WAIT, refusal.retry_after or 0.0)
            if waited + seconds > LONGEST_WAIT:
                raise _ProviderGivenUp(
                    refusal.code,
                    f"{refusal.message} It asks to wait {seconds:.0f} s; a run waits {LONGEST_WAIT:.0f} s at most.",
                )
            waited += seconds
            self._hold(phase, seconds, refusal.message)

    def _hold(self, phase: Phase, seconds: float, message: str) -> None:
        """Let no call of this phase begin for so long; say so once for all calls that were refused together."""
        before, until = self._not_before.get(phase, 0.0), self._scheduler.now() + seconds
        self._not_before[phase] = max(before, until)
        if until >= before + SHORTEST_WAIT:
            self._live.waits(Wait(self._provider(phase).name, seconds, self._scheduler.time() + seconds, message))

    def _wait_turn(self, phase: Phase, token: CancelToken) -> None:
        """Wait until the provider may be called again."""
        while (left := self._not_before.get(phase, 0.0) - self._scheduler.now()) > 0:
            pause(self._scheduler, left, token)
        self._live.waited()

    def _provider(self, phase: Phase) -> Provider:
        providers = self._providers
        return {"texts": providers.llm, "images": providers.image, "scores": providers.vision}[phase]

    def _note_failure(self) -> None:
        """Say who failed: the words of its error may not."""
        activity = self._live.view.activity
        if activity is not None:
            who = activity.model or activity.provider
            self._live.note(f"Iteration {activity.iteration}: {who} failed at {NOUNS[activity.phase]}.")

    def _now(self, candidates: Sequence[StudioCandidate]) -> list[StudioCandidate]:
        """Return the candidates' current states, in the same order."""
        found = (self._live.view.candidate(candidate.number) for candidate in candidates)
        return [candidate for candidate in found if candidate is not None]


def told(candidate: StudioCandidate) -> str:
    """Return what a scored candidate's score says, for refining it."""
    return wording.told_by(candidate.alignment or 0.0, candidate.aesthetic or 0.0, candidate.comment)
