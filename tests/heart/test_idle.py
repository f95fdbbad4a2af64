"""Unused models are unloaded, and the console goes back to its home model, as the preferences say."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.config import Preferences
from services.switching.idle import Unused, to_unload
from tests.heart.rig import Heart

LIMIT = 60.0


@pytest.fixture
def make_heart() -> Iterator[Callable[..., Heart]]:
    hearts: list[Heart] = []

    def make(**settings: object) -> Heart:
        hearts.append(Heart(**settings))
        return hearts[-1]

    yield make
    for heart in hearts:
        assert heart.scheduler.failures == []
        heart.close()


def test_an_unused_model_is_unloaded_and_the_last_one_stays(make_heart):
    heart = make_heart(idle_unload_seconds=LIMIT)
    heart.ready("small")
    heart.pass_time(30)
    heart.ready("medium")
    heart.pass_time(LIMIT - 35)
    assert heart.states() == {"small": "running", "medium": "running"}
    heart.pass_time(10)
    assert heart.states() == {"medium": "running"}
    heart.pass_time(10 * LIMIT)
    assert heart.states() == {"medium": "running"}


def test_the_last_one_goes_as_well_where_none_has_to_stay(make_heart):
    heart = make_heart(idle_unload_seconds=LIMIT, keep_at_least_one=False)
    heart.ready("small")
    heart.pass_time(LIMIT + 5)
    assert heart.states() == {}


def test_a_model_that_answers_is_used_until_its_answer_has_ended(make_heart):
    heart = make_heart(idle_unload_seconds=LIMIT, keep_at_least_one=False)
    heart.ready("small")
    request = heart.ask("small", "whole", seconds=LIMIT + 20)
    heart.pass_time(LIMIT + 10)
    assert heart.states() == {"small": "running"}
    heart.pass_time(LIMIT)
    assert request.outcome == "answered"
    assert heart.states() == {"small": "running"}
    heart.pass_time(30)
    assert heart.states() == {}


def test_a_model_may_have_a_limit_of_its_own_or_none(make_heart):
    heart = make_heart(
        idle_unload_seconds=LIMIT, idle_unload_models={"small": 0, "beta": 2 * LIMIT}, keep_at_least_one=False
    )
    for model in ("small", "beta", "alpha"):
        heart.ready(model)
    heart.pass_time(LIMIT + 10)
    assert heart.states() == {"small": "running", "beta": "running"}
    heart.pass_time(10 * LIMIT)
    assert heart.states() == {"small": "running"}


def test_preserved_models_stay_however_long_they_are_unused(make_heart):
    heart = make_heart(idle_unload_seconds=LIMIT, preserve_models=("small",), keep_at_least_one=False)
    heart.ready("small")
    heart.ready("medium")
    heart.pass_time(2 * LIMIT)
    assert heart.states() == {"small": "running"}


def test_what_another_program_may_be_using_is_left_to_it(make_heart):
    """Its use of an Ollama model can't be seen from here."""
    heart = make_heart(idle_unload_seconds=LIMIT, keep_at_least_one=False)
    heart.ready("beta")
    heart.ready("small")
    heart.crash()
    heart.pass_time(2 * LIMIT)
    assert heart.states() == {"beta": "running"}


def test_a_change_of_the_preference_applies_at_once(make_heart):
    heart = make_heart(keep_at_least_one=False)
    heart.ready("small")
    heart.pass_time(LIMIT)
    heart.preferences.update({"idle_unload_seconds": LIMIT})
    heart.pass_time(3)
    assert heart.states() == {}


def test_an_unused_guest_makes_room_for_the_home_model(make_heart):
    """Also where unloading has to be confirmed: the preference is the consent."""
    heart = make_heart(home_model="large", home_after_seconds=LIMIT, confirm_before_unload=True)
    heart.ready("large")
    heart.ready("small", confirm=True)
    heart.pass_time(LIMIT + 5)
    heart.until(lambda: heart.now.active_model == "large", "the home model")
    assert heart.states() == {"large": "running"}


def test_a_home_model_that_can_not_be_loaded_is_tried_again_only_after_the_same_time(make_heart):
    heart = make_heart(home_model="medium", home_after_seconds=LIMIT)
    heart.ready("small")
    heart.faults("medium").crash_loading = True
    failed_at = set()
    for _ in range(int(3 * LIMIT)):
        heart.pass_time(1)
        failed_at |= {failure.at for failure in heart.now.failures.values()}
    assert heart.states() == {"small": "running"}
    assert heart.now.active_model == "small"
    assert len(failed_at) == 2


def test_favourites_are_kept_by_the_strategy_that_preserves_them(make_heart):
    heart = make_heart(favorites=("small",))
    heart.ready("small")
    assert heart.switcher.plan("large").feasible
    refused = heart.switcher.plan("large", "preserve_favorites")
    assert [(b.model, b.reason) for b in refused.blocked_by] == [("small", "it is a favourite")]


@given(
    st.lists(st.builds(Unused, st.sampled_from("abcd"), st.floats(0, 100), st.booleans()), unique_by=lambda u: u.model),
    st.none() | st.floats(1, 100),
    st.dictionaries(st.sampled_from("abcd"), st.floats(0, 100)),
    st.booleans(),
)
def test_only_what_is_due_is_unloaded_the_longest_unused_first(unused, limit, limits, keeps_one):
    """Nothing that is kept or has no limit; all of what is due, but one where one has to stay."""
    preferences = Preferences(idle_unload_seconds=limit, idle_unload_models=limits, keep_at_least_one=keeps_one)
    by_name = {u.model: u for u in unused}
    chosen = to_unload(unused, len(unused), preferences)
    assert len(chosen) <= len(unused) - keeps_one or not unused
    seconds = [by_name[name].seconds for name in chosen]
    assert seconds == sorted(seconds, reverse=True)
    for name in chosen:
        allowed = limits.get(name, limit)
        assert allowed
        assert by_name[name].seconds >= allowed
        assert not by_name[name].kept
