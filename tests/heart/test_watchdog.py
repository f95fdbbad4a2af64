"""Models that stop responding while they look healthy: found, told, ended and loaded again, with nothing sent twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.heart.rig import Heart

LIMIT = 120.0
MODEL = "small"


@pytest.fixture
def heart() -> Iterator[Heart]:
    """With `small` loaded. A silent answer would be given up after ten minutes, long after the watchdog acts."""
    heart = Heart(unresponsive_seconds=LIMIT, upstream_timeout_seconds=600)
    heart.ready(MODEL)
    yield heart
    assert heart.scheduler.failures == []
    heart.close()


def warned(heart: Heart) -> bool:
    view = heart.now.instances.get(MODEL)
    return view is not None and view.unresponsive and "does not respond" in (view.warning or "")


def instance(heart: Heart) -> object:
    """Another object after each load."""
    return heart.now.instances[MODEL].traffic


def stick(heart: Heart) -> None:
    """Have `small` go stuck with a request, and wait until it is ended for that."""
    before = instance(heart)
    heart.ask(MODEL, "silent")
    heart.faults(MODEL).stuck = True
    heart.until(lambda: MODEL not in heart.states() or instance(heart) is not before, "it to be ended")
    heart.faults(MODEL).stuck = False


def test_a_stuck_model_is_told_then_ended_and_loaded_again(heart):
    """Its requests break off, none is sent again, and what it was (the active model) it is again."""
    before, began = instance(heart), heart.scheduler.now()
    heart.faults(MODEL).stuck = True
    asking = heart.ask(MODEL, "silent")
    heart.until(lambda: warned(heart), "people to be told")
    assert heart.states() == {MODEL: "running"}
    assert heart.scheduler.now() - began < 25
    heart.until(lambda: asking.outcome is not None, "the request to be broken off")
    assert asking.outcome == "engine_unreachable"
    assert LIMIT <= heart.scheduler.now() - began < LIMIT + 5
    heart.faults(MODEL).stuck = False
    heart.until(lambda: MODEL in heart.states() and instance(heart) is not before, "it to be loaded again")
    heart.until(lambda: heart.states()[MODEL] == "running", "it to run")
    heart.until(lambda: heart.now.active_model == MODEL, "it to be the active one")
    assert not warned(heart)
    assert [arrival.number for arrival in heart.wire.arrivals].count(asking.number) == 1


def test_why_it_was_ended_is_said_until_it_is_loaded_again(heart):
    """As of any other end that nobody asked for. The second restart waits."""
    stick(heart)
    heart.until(lambda: heart.states() == {MODEL: "running"}, "it to run again")
    stick(heart)
    cause = "It stopped responding for 120 s, with one request under way, and was ended."
    assert heart.now.failures[MODEL].cause == cause
    heart.until(lambda: heart.states() == {MODEL: "running"}, "it to run again")
    assert heart.now.failures == {}


def test_a_model_that_is_only_slow_goes_on(heart):
    """No byte for minutes, as with a long prompt: its engine gives a sign of life between two batches."""
    before = instance(heart)
    asking = heart.ask(MODEL, "whole", 500.0)
    heart.until(lambda: asking.outcome is not None, "the answer")
    assert asking.outcome == "answered"
    assert instance(heart) is before


def test_bytes_of_one_answer_are_a_sign_of_life_for_all(heart):
    """The engine isn't even asked, which would say that it is stuck."""
    before = instance(heart)
    heart.faults(MODEL).stuck = True
    waiting, talking = heart.ask(MODEL, "whole", 400.0), heart.ask(MODEL, "sse", 400.0)
    heart.until(lambda: waiting.outcome is not None and talking.outcome is not None, "both answers")
    assert (waiting.outcome, talking.outcome) == ("answered", "answered")
    assert instance(heart) is before


def test_a_client_that_left_without_a_word_is_a_reason_to_look(heart):
    """Its request may hold the engine still, though nobody waits for it any more."""
    before = instance(heart)
    heart.faults(MODEL).stuck = True
    asking = heart.ask(MODEL, "silent", patience=5.0)
    heart.until(lambda: asking.outcome == "left", "the client to leave")
    heart.until(lambda: warned(heart), "people to be told")
    heart.until(lambda: MODEL in heart.states() and instance(heart) is not before, "it to be loaded again")


def test_one_that_comes_to_itself_is_left_alone(heart):
    """The warning goes, and the time counts from then."""
    before = instance(heart)
    heart.faults(MODEL).stuck = True
    heart.ask(MODEL, "whole", 60.0)
    heart.until(lambda: warned(heart), "people to be told")
    heart.until(lambda: not warned(heart), "the warning to go")
    heart.scheduler.pause(300)
    assert instance(heart) is before


def test_an_idle_model_is_never_asked(heart):
    """Nothing is expected of it, so silence says nothing."""
    before = instance(heart)
    heart.faults(MODEL).stuck = True
    heart.scheduler.pause(1000)
    assert instance(heart) is before


def test_restarts_come_later_each_time_and_end_after_the_third(heart):
    """A request that always comes back must not keep a model loading for ever. One that asks for it still gets it."""
    waits = []
    for _ in range(3):
        stick(heart)
        ended = heart.scheduler.now()
        heart.until(lambda: heart.states().get(MODEL) == "running", "it to run again")
        waits.append(heart.scheduler.now() - ended)
    assert waits[0] < 10 < 30 <= waits[1] < 120 <= waits[2] < 140
    stick(heart)
    heart.scheduler.pause(2000)
    assert heart.states() == {}
    asking = heart.ask(MODEL, "whole")
    heart.until(lambda: asking.outcome is not None, "an answer")
    assert asking.outcome == "answered"


def test_it_can_be_switched_off():
    """0 seconds: no watchdog."""
    heart = Heart(unresponsive_seconds=0, upstream_timeout_seconds=3000)
    heart.ready(MODEL)
    before = instance(heart)
    heart.faults(MODEL).stuck = True
    asking = heart.ask(MODEL, "silent")
    heart.scheduler.pause(2000)
    assert asking.outcome is None
    assert instance(heart) is before
    heart.close()
