"""What has to be true of requests, connections and places at any moment, given what the engines saw."""

from __future__ import annotations

from collections import Counter

from services.gateway.connections import IDLE_PER_ENGINE
from services.gateway.relay import PRUNE_SECONDS
from tests.heart.asking import Asking
from tests.heart.rig import Heart
from tests.heart.wire import BROKEN, FAILED, WHOLE, Arrival, parts_of

NOT_ADMITTED = frozenset({"left", "UnknownModel", "queue_full", "queue_timeout", "model_not_loaded", "starting"})
PASSED_ON = frozenset(
    {"answered", "broken off", "left", "engine_unreachable", "engine_timeout", "NotFound", "MethodNotAllowed"}
)


def check_relay(heart: Heart, switch_errors: frozenset[str] = frozenset()) -> None:
    """Every promise; requests that have ended are looked at once. `switch_errors` may end one that waits for a switch.

    Call it when nobody can run without time passing.
    """
    _check_places(heart)
    _check_connections(heart)
    arrivals: dict[int, list[Arrival]] = {}
    for arrival in heart.wire.arrivals:
        arrivals.setdefault(arrival.number, []).append(arrival)
    for asking in heart.asked:
        mine = arrivals.get(asking.number, [])
        _check_asked_once(mine)
        if asking.gone or asking.outcome is not None:
            assert not any(arrival.at_work for arrival in mine), f"an engine is still at work for {_say(asking)}"
        if asking.outcome is not None:
            _check_ending(asking, mine, heart.wire.silence, switch_errors)
    going_on = {asking.number for asking in heart.asked if asking.outcome is None}
    heart.asked[:] = [asking for asking in heart.asked if asking.number in going_on]
    heart.wire.arrivals[:] = [arrival for arrival in heart.wire.arrivals if arrival.number in going_on]


def check_rest(heart: Heart) -> None:
    """Nothing is under way, for longer than it takes to tidy up."""
    assert all(pool.in_use == 0 for pool in heart.relay._pools.values()), "a place was not given back"
    kept = set(heart.relay._pools)
    assert kept <= heart.now.origins, f"connections are kept to {kept - heart.now.origins}, where nothing is loaded"
    for link in heart.wire.open_links():
        late = link.ended_at is not None and heart.scheduler.now() > link.ended_at + PRUNE_SECONDS
        assert not late, "a connection stays half closed"


def _check_places(heart: Heart) -> None:
    """Each instance counts those in it, no more and no less: a place is given back once, when its request ends."""
    inside = Counter(id(a.admission.instance.traffic) for a in heart.asked if a.admission and a.outcome is None)
    traffics = [view.traffic for view in heart.now.instances.values()]
    traffics += [asking.admission.instance.traffic for asking in heart.asked if asking.admission]
    for traffic in traffics:
        counted, there = traffic.in_flight, inside[id(traffic)]
        assert counted == there, f"{counted} requests are counted at an instance that answers {there}"


def _check_connections(heart: Heart) -> None:
    """Each open connection is one that a request uses, or is kept by its pool."""
    pools = heart.relay._pools.values()
    known = sum(len(pool._in_use) + pool.idle for pool in pools)
    assert known == len(heart.wire.open_links()), f"{heart.wire.open_links()} are open, the pools know {known}"
    assert all(pool.idle <= IDLE_PER_ENGINE for pool in pools)
    asking = sum(asking.outcome is None for asking in heart.asked)
    assert sum(pool.in_use for pool in pools) <= asking, "connections are in use for nobody"


def _check_asked_once(arrivals: list[Arrival]) -> None:
    """A second time only where the first went over a used connection that gave nothing."""
    assert len(arrivals) <= 2, "an engine was asked a third time"
    if len(arrivals) == 2:
        assert arrivals[0].reused, "a new connection was enough to ask a second time"
        assert arrivals[0].heard == 0, "an engine that had begun to answer was asked again"


def _check_ending(asking: Asking, arrivals: list[Arrival], silence: float, switch_errors: frozenset[str]) -> None:
    assert not asking.watched, f"{_say(asking)} is still watched"
    allowed = NOT_ADMITTED | switch_errors if asking.admission is None else PASSED_ON
    assert asking.outcome in allowed, _say(asking)
    assert (asking.outcome == "left") <= asking.gone, f"{_say(asking)} has not left"
    _check_content(asking)
    last = arrivals[-1] if arrivals else None
    if last is not None and last.finished and not asking.gone:
        expected = _due(asking.act, last)
        assert asking.outcome == expected, f"{_say(asking)}: the engine has done its part, {expected} was due"
    if asking.outcome == "engine_timeout":
        assert last is not None
        assert asking.ended_at == last.since + silence, f"{_say(asking)} waited for {asking.ended_at - last.since} s"


def _due(act: str, last: Arrival) -> str:
    """How a request has to end whose engine has done all of its act."""
    overtaken = act == "reset_midway" and last.heard == 0  # by the reset: what had been said before it is lost
    not_replaced = act == "drop_reused" and last.reused  # no new connection could be made
    if overtaken or not_replaced:
        return "engine_unreachable"
    return "answered" if act in WHOLE else FAILED.get(act, "broken off")


def _check_content(asking: Asking) -> None:
    """What is told as an answer is that of this request, and whole."""
    whole = b"".join(parts_of(asking.act, asking.number))
    if asking.outcome == "answered":
        assert asking.act in WHOLE, f"{_say(asking)} can't have been answered"
        ended = asking.received == whole or (asking.act == "until_close" and whole.startswith(asking.received))
        assert ended, f"{_say(asking)} was told {asking.received!r}"
    elif asking.outcome == "broken off":
        assert asking.act in (*BROKEN, *WHOLE), _say(asking)
        told, _, error = asking.received.partition(b'data: {"error"')
        assert whole.startswith(told), f"{_say(asking)} was told {asking.received!r}"
        assert bool(error) == asking.act.endswith("sse"), f"{_say(asking)}: {asking.received!r}"


def _say(asking: Asking) -> str:
    return f"request {asking.number} ({asking.model}, {asking.act}): {asking.outcome}"
