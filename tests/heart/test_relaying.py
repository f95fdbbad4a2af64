"""Requests through router, relay and engine, in memory: how each ends, and that nothing is left afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from services.gateway import connections
from services.gateway.connections import IDLE_PER_ENGINE, IDLE_SECONDS
from services.gateway.relay import PRUNE_SECONDS
from tests.heart.client_request import ClientRequest
from tests.heart.operations import EXPECTED_ERRORS, SETTINGS
from tests.heart.relay_invariants import check_relay, check_rest
from tests.heart.rig import Heart
from tests.heart.simulate import LEAVES_AFTER, SECONDS
from tests.heart.wire import ACTS, BROKEN, FAILED, WHOLE, parts_of

UNPRESERVED = {**SETTINGS, "preserve_models": ()}
SILENCE = SETTINGS["upstream_timeout_seconds"]
KEPT = set(WHOLE) - {"until_close", "close_after", "twice"}
"""Acts after which the relay keeps the connection open."""


@pytest.fixture
def heart() -> Iterator[Heart]:
    """An app with `small` loaded. After the test every invariant must hold, and nothing be left."""
    heart = Heart(**UNPRESERVED)
    heart.ready("small")
    yield heart
    heart.scheduler.settle()
    check_relay(heart)
    heart.scheduler.pause(PRUNE_SECONDS + 1)
    check_rest(heart)
    assert heart.scheduler.failures == []
    heart.close()


def wait_for_end(heart: Heart, *requests: ClientRequest) -> None:
    heart.until(lambda: all(request.outcome is not None for request in requests), "the requests to end")
    heart.scheduler.settle()


def run_request(heart: Heart, act: str, seconds: float = 1.0) -> ClientRequest:
    request = heart.ask("small", act, seconds)
    wait_for_end(heart, request)
    return request


def connections_of(heart: Heart, request: ClientRequest) -> list[object]:
    return [arrival.link for arrival in heart.wire.arrivals if arrival.number == request.number]


@pytest.mark.parametrize("act", WHOLE)
def test_a_complete_answer_arrives_unchanged(heart, act):
    """However it is framed. The connection is kept if it can be reused, and the request is no longer counted."""
    request = run_request(heart, act)
    assert heart.now.instances["small"].traffic.in_flight == 0
    assert (request.outcome, request.received) == ("answered", b"".join(parts_of(act, request.number)))
    assert request.status == (400 if act == "refused" else 200)
    assert len(heart.wire.open_links()) == (act in KEPT)


@pytest.mark.parametrize("act", ["pieces", "chunked", "sse", "until_close"])
def test_received_bytes_are_relayed_at_once(heart, act):
    """A streamed token waits for nothing."""
    request = heart.ask("small", act, 40.0)
    heart.scheduler.pause(39)
    assert request.received.startswith(parts_of(act, request.number)[0])
    assert request.outcome is None
    wait_for_end(heart, request)


@pytest.mark.parametrize("act", FAILED)
def test_an_engine_without_an_answer_gives_an_error(heart, act):
    """It is asked once over a new connection, which is kept only after a proper response."""
    request = run_request(heart, act)
    assert request.outcome == FAILED[act]
    assert len(connections_of(heart, request)) == 1
    assert len(heart.wire.open_links()) == (act in ("no_route", "no_method"))


@pytest.mark.parametrize("act", BROKEN)
def test_half_an_answer_never_looks_complete(heart, act):
    """A stream ends with an error event, any other answer with a closed connection."""
    request = run_request(heart, act)
    assert request.outcome == "aborted"
    assert (b"engine_failed" in request.received) == act.endswith("sse")
    assert heart.wire.open_links() == []


def test_a_reused_connection_without_a_response_is_replaced_once(heart):
    """The second attempt uses a new connection, even if others are idle: they may be broken as well."""
    first, second = heart.ask("small"), heart.ask("small")
    wait_for_end(heart, first, second)
    request = run_request(heart, "drop_reused")
    assert request.outcome == "answered"
    first_try, second_try = (arrival for arrival in heart.wire.arrivals if arrival.number == request.number)
    assert (first_try.reused, second_try.reused) == (True, False)


def test_a_request_is_sent_twice_at_most(heart):
    """A failure of the new connection that replaced a broken one is not retried."""
    run_request(heart, "whole")
    request = run_request(heart, "drop")
    assert request.outcome == "engine_unreachable"
    assert len(connections_of(heart, request)) == 2


def test_a_connection_that_was_closed_while_idle_is_not_used(heart):
    """The request isn't sent over it first."""
    run_request(heart, "hang_up_after")
    request = run_request(heart, "whole")
    assert len(connections_of(heart, request)) == 1


def test_unexpected_bytes_of_an_engine_are_never_an_answer(heart):
    """Bytes that an engine sends after a complete answer are not taken for the answer to the next request."""
    run_request(heart, "whole")
    heart.wire.links[0].send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray")
    assert run_request(heart, "whole").outcome == "answered"


def test_a_connection_is_not_reused_before_its_answer_is_complete(heart):
    """An interim response released the connection to the next request, and two answers were mixed."""
    slow = heart.ask("small", "interim", 30.0)
    heart.scheduler.pause(1)
    quick = run_request(heart, "whole")
    assert quick.outcome == "answered"
    assert slow.outcome is None
    wait_for_end(heart, slow)
    assert slow.outcome == "answered"


@pytest.mark.parametrize("act", ["whole", "pieces", "sse", "silent", "stall_sse", "interim", "drop"])
@pytest.mark.parametrize("after", [0.0, 0.5, 3.0, 11.0])
def test_a_client_that_disconnects_stops_the_generation(heart, act, after):
    """At once, whether the request is being sent, waits for the answer, or is in the middle of it."""
    request = heart.ask("small", act, 20.0)
    heart.scheduler.pause(after)
    request.disconnect()
    heart.scheduler.settle()
    assert request.outcome == "disconnected"
    assert not any(arrival.at_work for arrival in heart.wire.arrivals)
    assert heart.now.instances["small"].traffic.in_flight == 0
    assert heart.wire.open_links() == []


def test_a_client_that_disconnects_while_the_relay_connects_causes_no_request(heart):
    """An engine may take a while to accept a connection."""
    heart.wire.slow_dial = 2.0
    request = heart.ask("small")
    heart.scheduler.pause(1)
    request.disconnect()
    wait_for_end(heart, request)
    assert request.outcome == "disconnected"
    assert heart.wire.arrivals == []


def test_a_disconnected_client_causes_no_second_attempt(heart):
    """Our own closing of a reused connection is not a failure of the engine."""
    run_request(heart, "whole")
    request = heart.ask("small", "silent")
    heart.scheduler.pause(1)
    request.disconnect()
    wait_for_end(heart, request)
    assert len(connections_of(heart, request)) == 1


@pytest.mark.parametrize("act", ["silent", "interim_silent"])
def test_a_silent_engine_times_out_after_the_configured_time(heart, act):
    """`upstream_timeout_seconds`, exactly."""
    began = heart.scheduler.now()
    request = run_request(heart, act)
    assert (request.outcome, request.ended_at - began) == ("engine_timeout", SILENCE)


def test_an_engine_that_keeps_sending_may_take_longer(heart):
    """The limit applies to silence, not to the length of an answer."""
    request = run_request(heart, "sse", 4 * (SILENCE - 1.0))
    assert request.outcome == "answered"


def test_a_connection_that_can_not_be_made_is_given_up(heart):
    """After the connect timeout, not the one for an answer."""
    heart.wire.slow_dial = 100.0
    began = heart.scheduler.now()
    request = run_request(heart, "whole")
    assert (request.outcome, request.ended_at - began) == ("engine_unreachable", connections.CONNECT_SECONDS)


def test_unloading_waits_for_the_answers_under_way(heart):
    """It admits no new requests: those wait until the model is loaded again."""
    request = heart.ask("small", "sse", 4.0)
    heart.scheduler.pause(1)
    job = heart.switch("large")
    heart.scheduler.pause(1)
    late = heart.ask("small", "whole")
    heart.done(job)
    assert request.outcome == "answered"
    assert late.outcome is None
    wait_for_end(heart, late)
    assert late.outcome == "answered"


def test_an_answer_longer_than_the_drain_is_cut_off(heart):
    """The model is unloaded after `drain_timeout_seconds`; the client gets an error, and the request isn't counted."""
    request = heart.ask("small", "sse", 1000.0)
    heart.scheduler.pause(1)
    heart.done(heart.switch("large"))
    assert request.outcome == "aborted"
    assert request.admission is not None
    assert request.admission.instance.traffic.in_flight == 0


def test_a_crash_of_the_engine_ends_its_answers_with_an_error(heart):
    """Both answers that have begun and those that have not."""
    begun, waiting = heart.ask("small", "sse", 100.0), heart.ask("small", "whole", 100.0)
    heart.scheduler.pause(30)
    heart.engines["solo"].crash(heart.model("small"))
    wait_for_end(heart, begun, waiting)
    assert (begun.outcome, waiting.outcome) == ("aborted", "engine_unreachable")


def test_connections_to_an_unloaded_model_are_closed(heart):
    """Even if its server keeps running, as Ollama does."""
    requests = [heart.ask("beta") for _ in range(5)]
    wait_for_end(heart, *requests)
    assert len(heart.wire.open_links()) == 5
    heart.done(heart.switcher.stop("beta", requested_by="test"))
    heart.scheduler.pause(PRUNE_SECONDS + 1)
    assert heart.wire.open_links() == []


def test_idle_connections_are_closed_after_a_while(heart):
    """Even if the engine would keep them open for ever."""
    heart.wire.keep_alive = 1e6
    run_request(heart, "whole")
    heart.scheduler.pause(IDLE_SECONDS - 5)
    assert len(heart.wire.open_links()) == 1
    heart.scheduler.pause(PRUNE_SECONDS + 5)
    assert heart.wire.open_links() == []


def test_the_number_of_idle_connections_is_limited(heart):
    """Two hundred concurrent streams leave 64 connections, not 200."""
    requests = [heart.ask("small", "sse") for _ in range(200)]
    wait_for_end(heart, *requests)
    assert {request.outcome for request in requests} == {"answered"}
    assert len(heart.wire.open_links()) == IDLE_PER_ENGINE


def test_the_number_of_requests_per_engine_is_limited(heart, monkeypatch):
    """A request beyond the limit is refused at once; after one has ended the next is admitted."""
    monkeypatch.setattr(connections, "CONNECTIONS_PER_ENGINE", 3)
    requests = [heart.ask("small") for _ in range(4)]
    wait_for_end(heart, *requests)
    assert sorted(str(request.outcome) for request in requests) == ["answered", "answered", "answered", "queue_full"]
    assert run_request(heart, "whole").outcome == "answered"
    heart.requests.clear()  # the invariants don't expect `queue_full` from an admitted request


def test_closing_the_relay_aborts_answers(heart):
    """At a restart of the app models stay loaded; a request without an answer gets `stopping`, to be sent again."""
    begun, waiting = heart.ask("small", "sse", 100.0), heart.ask("small", "whole", 100.0)
    heart.scheduler.pause(30)
    heart.relay.close()
    wait_for_end(heart, begun, waiting)
    assert (begun.outcome, waiting.outcome) == ("aborted", "stopping")
    assert heart.wire.open_links() == []
    heart.requests.clear()


MODELS = ("small", "medium", "beta", "alpha", "alpha-too")
ROUNDS, STEPS = 60, 80


@pytest.mark.parametrize("tenth", range(10))
def test_every_request_ends_once_and_leaves_nothing(tenth):
    """Hundreds of requests per seed with every act, clients that disconnect, drains, crashes and a slow network."""
    for seed in range(tenth * ROUNDS // 10, (tenth + 1) * ROUNDS // 10):
        chance, heart = random.Random(seed), Heart(seed, **UNPRESERVED)
        for _ in range(STEPS):
            _step(chance, heart)
            heart.scheduler.settle()
            check_relay(heart, EXPECTED_ERRORS)
        heart.wire.slow_dial = 0.0
        heart.until(lambda heart=heart: all(a.outcome is not None for a in heart.requests), f"requests of seed {seed}")
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
            heart.ask(chance.choice(MODELS), chance.choice(ACTS), chance.choice(SECONDS), chance.choice(LEAVES_AFTER))
    elif roll < 0.65:
        if there := [request for request in heart.requests if not request.gone]:
            chance.choice(there).disconnect()
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
