"""Invariants of requests, connections and traffic counts at any moment, given what the engines received."""

from __future__ import annotations

from collections import Counter

from services.gateway.connections import IDLE_PER_ENGINE
from services.gateway.relay import PRUNE_SECONDS
from tests.heart.client_request import ClientRequest
from tests.heart.rig import Heart
from tests.heart.wire import BROKEN, FAILED, WHOLE, Arrival, parts_of

NOT_ADMITTED = frozenset(
    {"disconnected", "UnknownModel", "queue_full", "queue_timeout", "model_not_loaded", "starting"}
)
RELAYED = frozenset(
    {"answered", "aborted", "disconnected", "engine_unreachable", "engine_timeout", "NotFound", "MethodNotAllowed"}
)


def check_relay(heart: Heart, switch_errors: frozenset[str] = frozenset()) -> None:
    """Check every invariant; ended requests are checked once. `switch_errors` may end a request that waits for a
    switch.

    Call it when no greenlet can run without time passing.
    """
    _check_traffic(heart)
    _check_connections(heart)
    arrivals: dict[int, list[Arrival]] = {}
    for arrival in heart.wire.arrivals:
        arrivals.setdefault(arrival.number, []).append(arrival)
    for request in heart.requests:
        mine = arrivals.get(request.number, [])
        _check_attempts(mine)
        if request.gone or request.outcome is not None:
            assert not any(arrival.at_work for arrival in mine), f"an engine still works for {_describe(request)}"
        if request.outcome is not None:
            _check_ending(request, mine, heart.wire.read_timeout, switch_errors)
    open_requests = {request.number for request in heart.requests if request.outcome is None}
    heart.requests[:] = [request for request in heart.requests if request.number in open_requests]
    heart.wire.arrivals[:] = [arrival for arrival in heart.wire.arrivals if arrival.number in open_requests]


def check_rest(heart: Heart) -> None:
    """Check that nothing is left after a while without requests."""
    assert all(pool.in_use == 0 for pool in heart.relay._pools.values()), "a connection was not returned"
    kept = set(heart.relay._pools)
    assert kept <= heart.now.origins, f"connections are kept to {kept - heart.now.origins}, where nothing is loaded"
    for link in heart.wire.open_links():
        late = link.ended_at is not None and heart.scheduler.now() > link.ended_at + PRUNE_SECONDS
        assert not late, "a connection stays half closed"


def _check_traffic(heart: Heart) -> None:
    """Each instance counts exactly the requests in it: a request leaves the count once, when it ends."""
    inside = Counter(id(a.admission.instance.traffic) for a in heart.requests if a.admission and a.outcome is None)
    traffics = [view.traffic for view in heart.now.instances.values()]
    traffics += [request.admission.instance.traffic for request in heart.requests if request.admission]
    for traffic in traffics:
        counted, there = traffic.in_flight, inside[id(traffic)]
        assert counted == there, f"an instance counts {counted} requests, but has {there}"


def _check_connections(heart: Heart) -> None:
    """Each open connection is in use by a request, or idle in its pool."""
    pools = heart.relay._pools.values()
    known = sum(len(pool._in_use) + pool.idle for pool in pools)
    assert known == len(heart.wire.open_links()), f"{heart.wire.open_links()} are open, the pools know {known}"
    assert all(pool.idle <= IDLE_PER_ENGINE for pool in pools)
    request = sum(request.outcome is None for request in heart.requests)
    assert sum(pool.in_use for pool in pools) <= request, "connections are in use without a request"


def _check_attempts(arrivals: list[Arrival]) -> None:
    """A request is sent a second time only if the first used connection gave no response."""
    assert len(arrivals) <= 2, "an engine was asked a third time"
    if len(arrivals) == 2:
        assert arrivals[0].reused, "a request was sent again after a new connection failed"
        assert arrivals[0].heard == 0, "a request was sent again although the engine had begun to answer"


def _check_ending(
    request: ClientRequest, arrivals: list[Arrival], read_timeout: float, switch_errors: frozenset[str]
) -> None:
    assert not request.watched, f"the client of {_describe(request)} is still watched"
    allowed = NOT_ADMITTED | switch_errors if request.admission is None else RELAYED
    assert request.outcome in allowed, _describe(request)
    assert (request.outcome == "disconnected") <= request.gone, f"{_describe(request)}, but the client is there"
    _check_content(request)
    last = arrivals[-1] if arrivals else None
    if last is not None and last.finished and not request.gone:
        expected = _expected(request.act, last)
        assert request.outcome == expected, f"{_describe(request)}: expected is {expected}"
    if request.outcome == "engine_timeout":
        assert last is not None
        expected_at = last.since + read_timeout
        assert request.ended_at == expected_at, f"{_describe(request)} at {request.ended_at}, expected {expected_at}"


def _expected(act: str, last: Arrival) -> str:
    """The expected outcome of a request whose engine has completed its act."""
    lost = act == "reset_midway" and last.heard == 0  # the reset discards what was sent before it
    not_replaced = act == "drop_reused" and last.reused  # no new connection could be made
    if lost or not_replaced:
        return "engine_unreachable"
    return "answered" if act in WHOLE else FAILED.get(act, "aborted")


def _check_content(request: ClientRequest) -> None:
    """A complete answer is the one to this request; an aborted one is a prefix of it."""
    whole = b"".join(parts_of(request.act, request.number))
    if request.outcome == "answered":
        assert request.act in WHOLE, f"{_describe(request)} can't have been answered"
        ended = request.received == whole or (request.act == "until_close" and whole.startswith(request.received))
        assert ended, f"{_describe(request)} received {request.received!r}"
    elif request.outcome == "aborted":
        assert request.act in (*BROKEN, *WHOLE), _describe(request)
        text, _, error = request.received.partition(b'data: {"error"')
        assert whole.startswith(text), f"{_describe(request)} received {request.received!r}"
        assert bool(error) == request.act.endswith("sse"), f"{_describe(request)}: {request.received!r}"


def _describe(request: ClientRequest) -> str:
    return f"request {request.number} ({request.model}, {request.act}): {request.outcome}"
