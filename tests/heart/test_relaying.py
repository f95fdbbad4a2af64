"""Requests on their way through router, relay and engine, in memory: how each ends, and what it leaves behind."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from services.gateway import connections
from services.gateway.connections import IDLE_PER_ENGINE, IDLE_SECONDS
from services.gateway.relay import PRUNE_SECONDS
from tests.heart.asking import Asking
from tests.heart.operations import EXPECTED_ERRORS, SETTINGS
from tests.heart.relay_promises import check_relay, check_rest
from tests.heart.rig import Heart
from tests.heart.simulate import PATIENCE, SECONDS
from tests.heart.wire import ACTS, BROKEN, FAILED, WHOLE, parts_of

UNPRESERVED = {**SETTINGS, "preserve_models": ()}
SILENCE = SETTINGS["upstream_timeout_seconds"]
KEPT = set(WHOLE) - {"until_close", "close_after", "twice"}
"""Acts after which the relay keeps the connection."""


@pytest.fixture
def heart() -> Iterator[Heart]:
    """`small` runs. In the end every promise holds, and nothing is left."""
    heart = Heart(**UNPRESERVED)
    heart.ready("small")
    yield heart
    heart.scheduler.settle()
    check_relay(heart)
    heart.scheduler.pause(PRUNE_SECONDS + 1)
    check_rest(heart)
    assert heart.scheduler.failures == []
    heart.close()


def end(heart: Heart, *asked: Asking) -> None:
    heart.until(lambda: all(asking.outcome is not None for asking in asked), "the requests to end")
    heart.scheduler.settle()


def ended(heart: Heart, act: str, seconds: float = 1.0) -> Asking:
    asking = heart.ask("small", act, seconds)
    end(heart, asking)
    return asking


def connections_of(heart: Heart, asking: Asking) -> list[object]:
    return [arrival.link for arrival in heart.wire.arrivals if arrival.number == asking.number]


@pytest.mark.parametrize("act", WHOLE)
def test_a_whole_answer_arrives_as_it_was_given(heart, act):
    """However it is framed; its connection is kept if more can come over it, and its place given back."""
    asking = ended(heart, act)
    assert heart.now.instances["small"].traffic.in_flight == 0
    assert (asking.outcome, asking.received) == ("answered", b"".join(parts_of(act, asking.number)))
    assert asking.status == (400 if act == "refused" else 200)
    assert len(heart.wire.open_links()) == (act in KEPT)


@pytest.mark.parametrize("act", ["pieces", "chunked", "sse", "until_close"])
def test_what_has_come_is_handed_on_at_once(heart, act):
    """A streamed token waits for nothing."""
    asking = heart.ask("small", act, 40.0)
    heart.scheduler.pause(39)
    assert asking.received.startswith(parts_of(act, asking.number)[0])
    assert asking.outcome is None
    end(heart, asking)


@pytest.mark.parametrize("act", FAILED)
def test_an_engine_that_gives_no_answer_is_an_error(heart, act):
    """Asked once over a new connection, which is of no use any more unless it answered properly."""
    asking = ended(heart, act)
    assert asking.outcome == FAILED[act]
    assert len(connections_of(heart, asking)) == 1
    assert len(heart.wire.open_links()) == (act in ("no_route", "no_method"))


@pytest.mark.parametrize("act", BROKEN)
def test_half_an_answer_is_never_taken_for_a_whole_one(heart, act):
    """A stream ends with an error event, anything else with the connection."""
    asking = ended(heart, act)
    assert asking.outcome == "broken off"
    assert (b"engine_failed" in asking.received) == act.endswith("sse")
    assert heart.wire.open_links() == []


def test_a_used_connection_that_gives_nothing_is_replaced_once(heart):
    """By a new one, though others are idle: they may have broken as well."""
    first, second = heart.ask("small"), heart.ask("small")
    end(heart, first, second)
    asking = ended(heart, "drop_reused")
    assert asking.outcome == "answered"
    first_try, second_try = (arrival for arrival in heart.wire.arrivals if arrival.number == asking.number)
    assert (first_try.reused, second_try.reused) == (True, False)


def test_an_engine_is_asked_twice_at_most(heart):
    """The new connection that replaces a broken one is no reason to try once more."""
    ended(heart, "whole")
    asking = ended(heart, "drop")
    assert asking.outcome == "engine_unreachable"
    assert len(connections_of(heart, asking)) == 2


def test_a_connection_that_closed_while_idle_is_not_used(heart):
    """The request isn't sent into the void first."""
    ended(heart, "hang_up_after")
    asking = ended(heart, "whole")
    assert len(connections_of(heart, asking)) == 1


def test_what_an_engine_says_unasked_is_nobodys_answer(heart):
    """It says something more once its answer was whole: the next request would take that for its own."""
    ended(heart, "whole")
    heart.wire.links[0].say(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray")
    assert ended(heart, "whole").outcome == "answered"


def test_a_connection_is_nobody_elses_until_its_answer_is_whole(heart):
    """An interim answer is not the end of one: the connection was given to the next request, and two answers mixed."""
    slow = heart.ask("small", "interim", 30.0)
    heart.scheduler.pause(1)
    quick = ended(heart, "whole")
    assert quick.outcome == "answered"
    assert slow.outcome is None
    end(heart, slow)
    assert slow.outcome == "answered"


@pytest.mark.parametrize("act", ["whole", "pieces", "sse", "silent", "stall_sse", "interim", "drop"])
@pytest.mark.parametrize("after", [0.0, 0.5, 3.0, 11.0])
def test_a_client_that_leaves_breaks_the_generation_off(heart, act, after):
    """At once, wherever the request is: on its way, before the answer, in the middle of it."""
    asking = heart.ask("small", act, 20.0)
    heart.scheduler.pause(after)
    asking.leave()
    heart.scheduler.settle()
    assert asking.outcome == "left"
    assert not any(arrival.at_work for arrival in heart.wire.arrivals)
    assert heart.now.instances["small"].traffic.in_flight == 0
    assert heart.wire.open_links() == []


def test_a_client_that_leaves_while_the_connection_is_made_sends_no_request(heart):
    """An engine may take its time to accept one."""
    heart.wire.slow_dial = 2.0
    asking = heart.ask("small")
    heart.scheduler.pause(1)
    asking.leave()
    end(heart, asking)
    assert asking.outcome == "left"
    assert heart.wire.arrivals == []


def test_a_client_that_left_is_no_reason_to_ask_again(heart):
    """Hung up on by us, a used connection's silence is not the engine's failure."""
    ended(heart, "whole")
    asking = heart.ask("small", "silent")
    heart.scheduler.pause(1)
    asking.leave()
    end(heart, asking)
    assert len(connections_of(heart, asking)) == 1


@pytest.mark.parametrize("act", ["silent", "interim_silent"])
def test_a_silent_engine_is_waited_for_as_long_as_the_setting_says(heart, act):
    """No longer, and no less."""
    began = heart.scheduler.now()
    asking = ended(heart, act)
    assert (asking.outcome, asking.ended_at - began) == ("engine_timeout", SILENCE)


def test_an_engine_that_keeps_talking_may_take_longer(heart):
    """The limit is one of silence: a long answer is none."""
    asking = ended(heart, "sse", 4 * (SILENCE - 1.0))
    assert asking.outcome == "answered"


def test_a_connection_that_can_not_be_made_is_given_up(heart):
    """Within the time for connecting, not that for an answer."""
    heart.wire.slow_dial = 100.0
    began = heart.scheduler.now()
    asking = ended(heart, "whole")
    assert (asking.outcome, asking.ended_at - began) == ("engine_unreachable", connections.CONNECT_SECONDS)


def test_unloading_waits_for_the_answers_under_way(heart):
    """And for no new ones: those wait, and are answered once the model is back."""
    asking = heart.ask("small", "sse", 4.0)
    heart.scheduler.pause(1)
    job = heart.switch("large")
    heart.scheduler.pause(1)
    late = heart.ask("small", "whole")
    heart.done(job)
    assert asking.outcome == "answered"
    assert late.outcome is None
    end(heart, late)
    assert late.outcome == "answered"


def test_an_answer_that_outlasts_the_drain_is_broken_off(heart):
    """The model goes after `drain_timeout_seconds`; its client is told, and nothing stays counted."""
    asking = heart.ask("small", "sse", 1000.0)
    heart.scheduler.pause(1)
    heart.done(heart.switch("large"))
    assert asking.outcome == "broken off"
    assert asking.admission is not None
    assert asking.admission.instance.traffic.in_flight == 0


def test_an_engine_that_crashes_ends_its_answers_with_an_error(heart):
    """Those that had begun and those that had not."""
    begun, waiting = heart.ask("small", "sse", 100.0), heart.ask("small", "whole", 100.0)
    heart.scheduler.pause(30)
    heart.engines["solo"].crash(heart.model("small"))
    end(heart, begun, waiting)
    assert (begun.outcome, waiting.outcome) == ("broken off", "engine_unreachable")


def test_connections_to_what_was_unloaded_are_closed(heart):
    """Its engine may live on, as Ollama does, and nobody asks that one again."""
    asked = [heart.ask("beta") for _ in range(5)]
    end(heart, *asked)
    assert len(heart.wire.open_links()) == 5
    heart.done(heart.switcher.stop("beta", requested_by="test"))
    heart.scheduler.pause(PRUNE_SECONDS + 1)
    assert heart.wire.open_links() == []


def test_connections_that_are_not_used_are_closed_after_a_while(heart):
    """Though their engine would keep them for ever."""
    heart.wire.keep_alive = 1e6
    ended(heart, "whole")
    heart.scheduler.pause(IDLE_SECONDS - 5)
    assert len(heart.wire.open_links()) == 1
    heart.scheduler.pause(PRUNE_SECONDS + 5)
    assert heart.wire.open_links() == []


def test_no_more_connections_are_kept_than_are_of_use(heart):
    """Two hundred streams at once leave 64 connections, not 200."""
    asked = [heart.ask("small", "sse") for _ in range(200)]
    end(heart, *asked)
    assert {asking.outcome for asking in asked} == {"answered"}
    assert len(heart.wire.open_links()) == IDLE_PER_ENGINE


def test_an_engine_answers_so_many_at_a_time_and_no_more(heart, monkeypatch):
    """What is beyond that is told so at once, and there is a place again when one has ended."""
    monkeypatch.setattr(connections, "CONNECTIONS_PER_ENGINE", 3)
    asked = [heart.ask("small") for _ in range(4)]
    end(heart, *asked)
    assert sorted(str(asking.outcome) for asking in asked) == ["answered", "answered", "answered", "queue_full"]
    assert ended(heart, "whole").outcome == "answered"
    heart.asked.clear()  # a full engine is no ending that its promises foresee


def test_the_end_of_the_app_breaks_answers_off(heart):
    """A restart leaves the models where they are; a request that had no answer yet is told to come back."""
    begun, waiting = heart.ask("small", "sse", 100.0), heart.ask("small", "whole", 100.0)
    heart.scheduler.pause(30)
    heart.relay.close()
    end(heart, begun, waiting)
    assert (begun.outcome, waiting.outcome) == ("broken off", "stopping")
    assert heart.wire.open_links() == []
    heart.asked.clear()


MODELS = ("small", "medium", "beta", "alpha", "alpha-too")
ROUNDS, STEPS = 60, 80


@pytest.mark.parametrize("tenth", range(10))
def test_whatever_happens_every_request_ends_once_and_leaves_nothing(tenth):
    """Hundreds of requests with every act, clients that leave, drains, crashes and a slow network, by seed."""
    for seed in range(tenth * ROUNDS // 10, (tenth + 1) * ROUNDS // 10):
        chance, heart = random.Random(seed), Heart(seed, **UNPRESERVED)
        for _ in range(STEPS):
            _step(chance, heart)
            heart.scheduler.settle()
            check_relay(heart, EXPECTED_ERRORS)
        heart.wire.slow_dial = 0.0
        heart.until(lambda heart=heart: all(a.outcome is not None for a in heart.asked), f"requests of seed {seed}")
        heart.until(lambda heart=heart: heart.switcher.job() is None, f"the switch of seed {seed}")
        heart.scheduler.pause(PRUNE_SECONDS + 1)
        check_relay(heart, EXPECTED_ERRORS)
        check_rest(heart)
        assert heart.scheduler.failures == []
        heart.close()


def _step(chance: random.Random, heart: Heart) -> None:
    roll = chance.random()
    if roll < 0.55:
        for _ in range(chance.choice([1, 1, 1, 4])):
            heart.ask(chance.choice(MODELS), chance.choice(ACTS), chance.choice(SECONDS), chance.choice(PATIENCE))
    elif roll < 0.65:
        if there := [asking for asking in heart.asked if not asking.gone]:
            chance.choice(there).leave()
    elif roll < 0.85:
        heart.scheduler.pause(chance.choice([0.0, 0.1, 1.0, 5.0, 40.0]))
    elif roll < 0.9:
        heart.switch(chance.choice(MODELS), replace="queue")
    elif roll < 0.94:
        heart.switcher.stop(chance.choice(MODELS), requested_by="test")
    elif roll < 0.96:
        found = heart.model(chance.choice(MODELS))
        heart.engines[found.engine].crash(found)
    else:
        heart.wire.slow_dial = chance.choice([0.0, 0.0, 1.0, 8.0])
        heart.wire.keep_alive = chance.choice([0.5, 5.0, 1e6])
