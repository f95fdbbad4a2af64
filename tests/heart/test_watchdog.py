"""Models that stop responding although they look healthy are detected, shown, stopped and loaded again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.heart.rig import Heart

LIMIT = 120.0
MODEL = "small"


@pytest.fixture
def heart() -> Iterator[Heart]:
    """An app with `small` loaded. A silent answer times out after ten minutes, long after the watchdog acts."""
    heart = Heart(unresponsive_seconds=LIMIT, upstream_timeout_seconds=600)
    heart.ready(MODEL)
    yield heart
    assert heart.scheduler.failures == []
    heart.close()


def warned(heart: Heart) -> bool:
    view = heart.now.instances.get(MODEL)
    return view is not None and view.unresponsive and "does not respond" in (view.warning or "")


def instance(heart: Heart) -> object:
    """The identity of the current instance: it changes with each load."""
    return heart.now.instances[MODEL].traffic


def make_stuck(heart: Heart) -> None:
    """Make `small` stop responding during a request, and wait until the watchdog has stopped it."""
    before = instance(heart)
    heart.ask(MODEL, "silent")
    heart.faults(MODEL).stuck = True
    heart.until(lambda: MODEL not in heart.states() or instance(heart) is not before, "it to be ended")
    heart.faults(MODEL).stuck = False


def test_a_stuck_model_is_marked_then_stopped_and_loaded_again(heart):
    """Its requests break off, none is sent again, and it becomes the active model again."""
    before, began = instance(heart), heart.scheduler.now()
    heart.faults(MODEL).stuck = True
    request = heart.ask(MODEL, "silent")
    heart.until(lambda: warned(heart), "people to be told")
    assert heart.states() == {MODEL: "running"}
    assert heart.scheduler.now() - began < 25
    heart.until(lambda: request.outcome is not None, "the request to be broken off")
    assert request.outcome == "engine_unreachable"
    assert LIMIT <= heart.scheduler.now() - began < LIMIT + 5
    heart.faults(MODEL).stuck = False
    heart.until(lambda: MODEL in heart.states() and instance(heart) is not before, "it to be loaded again")
    heart.until(lambda: heart.states()[MODEL] == "running", "it to run")
    heart.until(lambda: heart.now.active_model == MODEL, "it to be the active one")
    assert not warned(heart)
    assert [arrival.number for arrival in heart.wire.arrivals].count(request.number) == 1


def test_the_cause_is_shown_until_the_model_is_loaded_again(heart):
    """The failure is shown like any unexpected exit. The second restart waits, so that it can be observed."""
    make_stuck(heart)
    heart.until(lambda: heart.states() == {MODEL: "running"}, "it to run again")
    make_stuck(heart)
    cause = "It stopped responding for 120 s, with one request under way, and was ended."
    assert heart.now.failures[MODEL].cause == cause
    heart.until(lambda: heart.states() == {MODEL: "running"}, "it to run again")
    assert heart.now.failures == {}


def test_a_model_that_is_only_slow_is_left_alone(heart):
    """With a long prompt no byte comes for minutes, but the engine responds to the probe between two batches."""
    before = instance(heart)
    request = heart.ask(MODEL, "whole", 500.0)
    heart.until(lambda: request.outcome is not None, "the answer")
    assert request.outcome == "answered"
    assert instance(heart) is before


def test_bytes_of_one_answer_are_a_sign_of_life_for_all(heart):
    """The engine isn't even probed; the probe would report that it is stuck."""
    before = instance(heart)
    heart.faults(MODEL).stuck = True
    waiting, talking = heart.ask(MODEL, "whole", 400.0), heart.ask(MODEL, "sse", 400.0)
    heart.until(lambda: waiting.outcome is not None and talking.outcome is not None, "both answers")
    assert (waiting.outcome, talking.outcome) == ("answered", "answered")
    assert instance(heart) is before


def test_a_client_that_disconnects_without_an_answer_causes_a_probe(heart):
    """Its request may still block the engine although no client waits for it."""
    before = instance(heart)
    heart.faults(MODEL).stuck = True
    request = heart.ask(MODEL, "silent", leaves_after=5.0)
    heart.until(lambda: request.outcome == "disconnected", "the client to leave")
    heart.until(lambda: warned(heart), "people to be told")
    heart.until(lambda: MODEL in heart.states() and instance(heart) is not before, "it to be loaded again")


def test_a_model_that_responds_again_is_left_alone(heart):
    """The warning disappears, and the time limit starts again."""
    before = instance(heart)
    heart.faults(MODEL).stuck = True
    heart.ask(MODEL, "whole", 60.0)
    heart.until(lambda: warned(heart), "people to be told")
    heart.until(lambda: not warned(heart), "the warning to go")
    heart.scheduler.pause(300)
    assert instance(heart) is before


def test_an_idle_model_is_never_probed(heart):
    """Without requests, silence means nothing."""
    before = instance(heart)
    heart.faults(MODEL).stuck = True
    heart.scheduler.pause(1000)
    assert instance(heart) is before


def test_restarts_back_off_and_stop_after_the_third(heart):
    """A request that is always sent again must not restart a model for ever. A later request still loads it."""
    waits = []
    for _ in range(3):
        make_stuck(heart)
        ended = heart.scheduler.now()
        heart.until(lambda: heart.states().get(MODEL) == "running", "it to run again")
        waits.append(heart.scheduler.now() - ended)
    assert waits[0] < 10 < 30 <= waits[1] < 120 <= waits[2] < 140
    make_stuck(heart)
    heart.scheduler.pause(2000)
    assert heart.states() == {}
    request = heart.ask(MODEL, "whole")
    heart.until(lambda: request.outcome is not None, "an answer")
    assert request.outcome == "answered"


def test_the_watchdog_can_be_turned_off():
    """`unresponsive_seconds = 0` turns it off."""
    heart = Heart(unresponsive_seconds=0, upstream_timeout_seconds=3000)
    heart.ready(MODEL)
    before = instance(heart)
    heart.faults(MODEL).stuck = True
    request = heart.ask(MODEL, "silent")
    heart.scheduler.pause(2000)
    assert request.outcome is None
    assert instance(heart) is before
    heart.close()
