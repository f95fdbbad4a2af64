"""The Studio's job on in-memory providers and a virtual clock: phases, trouble, waits, cancelling, same results."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cancellation import Cancelled
from services.providers.ports import JobProviders, Picture, ProviderError, Score
from services.store.records import StudioRun
from services.studio.live_run import LiveRun, RunView
from services.studio.pictures import NotAPicture, PicturesUnwritable, media_type
from services.studio.request import Origin, RunRequest, Wording, most_calls
from services.studio.search import LONGEST_WAIT, Search
from tests.heart.virtual import VirtualScheduler
from tests.support.studio_providers import (
    FakeImages,
    FakeText,
    FakeVision,
    by_content,
    hash_of,
    listing,
    png,
    refusing,
)

LONG = 1e6
REQUEST = RunRequest("a fox", beam_width=2, iterations=2, candidates=4, seed=7)


class Kept:
    """Pictures in memory."""

    def __init__(self) -> None:
        self.held: dict[str, Picture] = {}

    def keep(self, picture: Picture) -> str:
        if media_type(picture.data) is None:
            raise NotAPicture("It is none.")
        name = f"{hash_of(picture.data):064x}"
        self.held[name] = picture
        return name

    def read(self, picture_id: str) -> Picture | None:
        return self.held.get(picture_id)


class Job:
    """One run on a virtual clock."""

    def __init__(
        self, request: RunRequest = REQUEST, *, at_once: int = 4, order: int = 0, kept=None, **options
    ) -> None:
        self.clock = VirtualScheduler(order)
        made = {"llm": FakeText, "image": FakeImages, "vision": FakeVision}
        self.providers = JobProviders(
            *(kind(scheduler=self.clock, **options.get(name, {})) for name, kind in made.items())
        )
        run = StudioRun(
            "r",
            request.prompt,
            request.beam_width,
            request.iterations,
            request.candidates,
            request.seed,
            "running",
            dict(self.providers.names()),
            self.clock.time(),
        )
        self.live = LiveRun(run, self.clock, lambda _changed: None)
        self.search = Search(self.live, request, self.providers, kept or Kept(), self.clock, at_once)
        self.clock.spawn("job", self.search.run)

    @property
    def view(self) -> RunView:
        return self.live.view

    def until(self, predicate: Callable[[], bool]) -> None:
        assert self.clock.run_until(predicate, LONG)

    def finish(self) -> RunView:
        self.until(lambda: self.view.run.final)
        self.clock.settle()
        assert self.clock.failures == []
        assert self.running == 0
        return self.view

    @property
    def running(self) -> int:
        return sum(p.running for p in self.all)

    @property
    def all(self):
        return (self.providers.llm, self.providers.image, self.providers.vision)

    def events(self) -> list[str]:
        return [e.name for e in self.live.follow() if e is not None]


def numbers(view: RunView, state: str) -> list[int]:
    return [c.number for c in view.candidates if c.state == state]


def test_a_run_ends_with_every_candidate_ranked():
    """Two iterations of four: eight pictures with scores, ranks from 1, children of the two best of the first four."""
    view = Job().finish()
    assert view.run.state == "complete"
    assert [c.rank for c in view.ranking] == list(range(1, 9))
    first = sorted((c for c in view.candidates if c.iteration == 1), key=lambda c: c.rank)
    assert {c.parent for c in view.candidates if c.iteration == 2} == {first[0].number, first[1].number}
    assert view.run.calls == {"texts": 3, "images": 8, "scores": 8}


def test_the_first_event_names_the_providers_and_the_last_is_the_result():
    job = Job()
    job.finish()
    names = job.events()
    assert (names[0], names[-1]) == ("providers", "result")
    assert names.count("candidate") == 8 * 3
    assert "result" not in names[:-1]


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        lambda width, more, iterations, seed: RunRequest("p", width, iterations, width + more, seed),
        st.integers(1, 4),
        st.integers(0, 3),
        st.integers(1, 3),
        st.integers(0, 99),
    ),
    st.integers(0, 99),
    st.integers(0, 99),
    st.integers(1, 5),
)
def test_the_same_seed_gives_the_same_ranking_in_any_order_and_calls_stay_within_the_bound(
    request_, one, other, at_once
):
    """Whatever overlaps with what; and no run makes more calls than announced, garbled lists included."""

    def garbling(count: int, seed: int) -> str:
        return listing(count, seed) if seed % 3 else "once upon a time"

    def answered(order: int, at_once: int) -> RunView:
        return Job(
            request_,
            order=order,
            at_once=at_once,
            llm={"answer": garbling, "seconds": 1.0},
            image={"seconds": 2.0},
            vision={"seconds": 0.5},
        ).finish()

    first, second = answered(one, at_once), answered(other, 1)
    assert [(c.number, c.what, c.picture, c.total) for c in first.ranking] == [
        (c.number, c.what, c.picture, c.total) for c in second.ranking
    ]
    assert first.run.state == "complete"
    bound = most_calls(request_)
    assert all(first.run.calls[phase] <= getattr(bound, phase) for phase in ("texts", "images", "scores"))


def test_another_seed_gives_other_pictures():
    other = RunRequest("a fox", 2, 2, 4, 8)
    assert {c.picture for c in Job().finish().candidates}.isdisjoint(
        {c.picture for c in Job(other).finish().candidates}
    )


def test_calls_overlap_as_far_as_provider_and_setting_allow():
    job = Job(at_once=3, image={"seconds": 1.0, "at_once": 8}, vision={"seconds": 1.0, "at_once": 2})
    job.finish()
    assert [p.most_at_once for p in job.all[1:]] == [3, 2]


def test_all_texts_then_all_images_then_all_scores_each_after_making_ready():
    """Providers that do not fit into memory together are switched once per phase; the seconds are summed up."""
    job = Job(llm={"ready_seconds": 2.0}, image={"ready_seconds": 10.0}, vision={"ready_seconds": 0.5})
    view = job.finish()
    assert [p.readied for p in job.all] == [2, 2, 2]
    assert view.run.switching_seconds == {"llm": 4.0, "image": 20.0, "vision": 1.0}
    phases = [
        (e.value.iteration, e.value.phase)
        for e in job.live.follow()
        if e and e.name == "phase" and e.value.making_ready
    ]
    assert phases == [(i, p) for i in (1, 2) for p in ("texts", "images", "scores")]


def test_a_garbled_list_is_asked_for_once_more():
    answers = iter(["once upon a time", listing(4)])
    job = Job(RunRequest("a fox", 1, 1, 4, 7), llm={"answer": lambda _count, _seed: next(answers)})
    view = job.finish()
    assert job.providers.llm.calls == 2
    assert "Your last answer could not be read" in job.providers.llm.asked[1]
    assert view.run.notes == ()
    assert not any(c.by_rules for c in view.candidates)


def test_a_model_that_gives_no_list_is_stood_in_for_by_rules_and_that_is_said():
    job = Job(llm={"answer": lambda _count, _seed: "once upon a time"})
    view = job.finish()
    assert view.run.state == "complete"
    assert all(c.by_rules for c in view.candidates)
    assert len({c.how for c in view.candidates}) == 8
    assert [note[:50] for note in view.run.notes] == [
        f"Iteration {n}: the language model was asked twice and"[:50] for n in (1, 2)
    ]
    assert "for 4 of 4 candidates" in view.run.notes[0]
    assert job.providers.llm.calls == most_calls(REQUEST).texts


def test_a_short_list_goes_on_with_what_it_holds_and_that_is_said():
    view = Job(RunRequest("a fox", 1, 1, 4, 7), llm={"answer": lambda _count, _seed: listing(3)}).finish()
    assert len(view.candidates) == 3
    assert "gave 1 fewer candidates than the 4" in view.run.notes[0]
    assert view.run.state == "complete"


def test_a_refused_picture_is_dropped_with_its_reason_and_the_rest_goes_on():
    trouble = refusing("provider_refused", "That is against the rules.", calls=range(1, 2))
    view = Job(RunRequest("a fox", 1, 1, 4, 7), image={"trouble": trouble}).finish()
    assert view.run.state == "complete"
    [dropped] = [c for c in view.candidates if c.state == "dropped"]
    assert dropped.reason == "That is against the rules."
    assert len(view.ranking) == 3


def test_an_image_that_is_none_is_dropped():
    view = Job(
        RunRequest("a fox", 1, 1, 4, 7), image={"draw": lambda prompt, seed: b"<html>" if "-0" in prompt else png(seed)}
    ).finish()
    assert numbers(view, "dropped") == [1]
    assert view.run.state == "complete"


@pytest.mark.parametrize("bad", [math.nan, math.inf, 7.0])
def test_a_score_that_is_no_number_drops_the_candidate_and_never_ranks(bad):
    scores = iter([Score(bad, 0.5, bad)])
    view = Job(
        RunRequest("a fox", 1, 1, 4, 7), at_once=1, vision={"judge": lambda p: next(scores, None) or by_content(p)}
    ).finish()
    [dropped] = [c for c in view.candidates if c.state == "dropped"]
    assert "unusable" in dropped.reason
    assert dropped not in view.ranking
    assert dropped.picture


@pytest.mark.parametrize("code", ["provider_unavailable", "out_of_memory"])
def test_a_provider_that_fails_for_good_ends_the_run_in_its_words_and_keeps_what_was_made(code):
    """The first iteration is ranked; calls that overlap with the failing one end."""
    job = Job(image={"trouble": refusing(code, "Needs 12 GB, 3 GB are free.", calls=range(5, 99)), "seconds": 1.0})
    view = job.finish()
    assert (view.run.state, view.run.error, view.run.message) == (
        "failed", code, "Needs 12 GB, 3 GB are free.",
    )  # fmt: skip
    assert view.run.notes == ("Iteration 2: brush-model failed at drawing.",)
    assert [c.rank for c in view.ranking] == [1, 2, 3, 4]
    assert job.events()[-1] == "result"


@pytest.mark.parametrize("who", ["llm", "image", "vision"])
def test_a_provider_that_refuses_every_call_ends_the_run(who):
    view = Job(**{who: {"trouble": refusing("provider_refused", "The key is wrong.")}}).finish()
    assert (view.run.state, view.run.message) == ("failed", "The key is wrong.")


def test_a_provider_that_cannot_be_made_ready_ends_the_run():
    view = Job(image={"ready_trouble": refusing("out_of_memory", "It does not fit.")}).finish()
    assert (view.run.state, view.run.message) == ("failed", "It does not fit.")
    assert numbers(view, "written") == [1, 2, 3, 4]


def test_a_rate_limit_is_waited_out_visibly_and_nothing_is_lost():
    """All calls that overlap wait together; the wait is told once, with how long and why."""
    trouble = refusing("rate_limited", "Slow down.", calls=range(0, 3), retry_after=20.0)
    job = Job(RunRequest("a fox", 1, 1, 3, 7), image={"trouble": trouble, "seconds": 1.0})
    job.until(lambda: job.view.wait is not None)
    wait = job.view.wait
    assert (wait.provider, wait.seconds, wait.message) == ("brush", 20.0, "Slow down.")
    assert wait.until == job.clock.time() + 20.0
    view = job.finish()
    assert view.run.state == "complete"
    assert view.wait is None
    assert len(view.ranking) == 3
    assert job.events().count("wait") == 1
    assert view.run.calls["images"] == 3


@pytest.mark.parametrize("asked", [LONGEST_WAIT + 1, 100.0])
def test_waiting_is_bounded(asked):
    """A wait that is too long, and one that is repeated for ever, end the run in the provider's words."""
    job = Job(image={"trouble": refusing("rate_limited", "Come back later.", retry_after=asked)})
    view = job.finish()
    assert view.run.state == "failed"
    assert view.run.message.startswith("Come back later.")
    assert job.clock.now() <= LONGEST_WAIT + 1


@pytest.mark.parametrize("asked", [math.nan, math.inf, None])
def test_a_wait_without_an_end_is_no_wait(asked):
    view = Job(image={"trouble": refusing("rate_limited", "Quota used up.", retry_after=asked)}).finish()
    assert (view.run.state, view.run.message) == ("failed", "Quota used up.")


def test_a_rate_limit_while_making_ready_is_waited_out():
    job = Job(image={"ready_trouble": refusing("provider_unavailable", "Loading.", calls=range(2), retry_after=5.0)})
    assert job.finish().run.state == "complete"


@settings(max_examples=80, deadline=None)
@given(st.floats(0, 20), st.integers(0, 99))
def test_a_cancelled_run_leaves_no_call_running(at, order):
    """Cancelled at any moment, also while a rate limit is waited out or a model is made ready."""
    trouble = refusing("rate_limited", calls=range(1, 2), retry_after=3.0)
    busy = {"seconds": 1.0, "ready_seconds": 1.0}
    job = Job(order=order, llm=busy, image={**busy, "trouble": trouble}, vision=busy)
    job.clock.run_until(lambda: False, at)
    ended = job.view.run.final
    before = job.clock.now()
    job.search.cancel()
    view = job.finish()
    assert job.clock.now() == before, "the end has to come at once"
    assert ended or view.run.state == "cancelled"
    made = [p.calls for p in job.all]
    job.clock.run_until(lambda: False, 100)
    assert [p.calls for p in job.all] == made, "no call begins after the end"
    assert [c.rank for c in view.ranking] == list(range(1, len(view.ranking) + 1))


def test_an_error_that_a_cancel_provokes_counts_as_the_cancel():
    """An adapter may report the connection that was cut."""

    def cut(_number, token):
        token.wait(0)
        job.search.cancel()
        raise ProviderError("provider_unavailable", "The connection ended.")

    job = Job(image={"trouble": cut})
    assert job.finish().run.state == "cancelled"


def test_a_call_that_is_cut_off_uncancelled_ends_the_run():
    """It must never stay under way without a job."""

    def cut(_number, _token):
        raise Cancelled

    view = Job(image={"trouble": cut}).finish()
    assert (view.run.state, view.run.error) == ("failed", "provider_unavailable")


def test_a_refused_list_is_said_and_the_others_go_on():
    """The second iteration asks for two lists."""
    trouble = refusing("provider_refused", "Too rude.", calls=range(1, 2))
    view = Job(llm={"trouble": trouble}).finish()
    assert view.run.state == "complete"
    assert view.run.notes == ("Iteration 2: a list of candidates is missing. Too rude.",)
    assert len(view.candidates) == 4 + 2


def test_a_disk_that_takes_no_picture_ends_the_run():
    class Full(Kept):
        def keep(self, _picture):
            raise PicturesUnwritable("No space is left.")

    view = Job(kept=Full()).finish()
    assert (view.run.state, view.run.error, view.run.message) == ("failed", "state_unwritable", "No space is left.")


def test_a_picture_that_went_before_it_was_scored_is_said():
    class Small(Kept):
        def keep(self, picture):
            self.held.clear()
            return super().keep(picture)

    view = Job(RunRequest("a fox", 1, 1, 3, 7), kept=Small(), at_once=1).finish()
    assert len(view.ranking) == 1
    assert all("studio_pictures_gb" in c.reason for c in view.candidates if c.state == "dropped")


def test_an_unforeseen_error_ends_the_run_without_its_text():
    def judge(_picture):
        raise RuntimeError("sk-secret")

    view = Job(vision={"judge": judge}).finish()
    assert (view.run.state, view.run.error) == ("failed", "internal_error")
    assert "sk-secret" not in view.run.message


def test_a_continued_run_begins_with_refining_its_origin():
    origin = Origin("earlier", 3, Wording("a red fox", "in ink"), "It lacks snow.")
    job = Job(RunRequest("a fox", 1, 1, 2, 7, origin))
    job.finish()
    assert "a red fox" in job.providers.llm.asked[0]
    assert "It lacks snow." in job.providers.llm.asked[0]


def test_late_and_resuming_followers_get_every_event_after_theirs():
    job = Job()
    job.finish()
    every = list(job.live.follow())
    assert [e.number for e in every] == list(range(1, len(every) + 1))
    assert list(job.live.follow(5)) == every[5:]
    assert list(job.live.follow(10_000)) == []


def test_a_follower_gets_each_event_as_it_comes_and_a_sign_of_life_between():
    job = Job(RunRequest("a fox", 1, 1, 1, 7), image={"seconds": 25.0})
    heard = []

    def follow():
        heard.extend(job.live.follow())

    job.clock.spawn("follower", follow)
    job.until(lambda: None in heard)
    assert heard[0].name == "providers"
    job.finish()
    assert heard[-1].name == "result"
